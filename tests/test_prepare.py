"""data/prepare_dolly.py and data/prepare_mmlu.py: whole data passes unchanged, anything else is
refused in one line with nothing written. Offline; the real files are used where they are at hand.

    python -m pytest tests/test_prepare.py -q
"""

import contextlib
import hashlib
import io
import json
import signal
import socket
import subprocess
import sys
import tarfile

import pytest

from data import prepare_dolly, prepare_mmlu
from tests.conftest import ROOT, asset

SCRIPTS = {"prepare_dolly.py": prepare_dolly, "prepare_mmlu.py": prepare_mmlu}
CATEGORIES = sorted(prepare_dolly.CATEGORIES)


def command(script, source, out):
    return ["-m", f"data.{script.removesuffix('.py')}", "--source", str(source), "--out", str(out)]


def run(script, source, out):
    """Status, stdout and stderr of a script's main() under that command line."""
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    main = SCRIPTS[script].main
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout),
          contextlib.redirect_stderr(stderr)):
        patch.setattr(sys, "argv", command(script, source, out)[1:])
        try:
            main()
        except SystemExit as stop:
            status = stop.code
    return status, stdout.getvalue(), stderr.getvalue()


def accepts(script, source, out):
    """Runs a script that must succeed and returns what it printed."""
    status, stdout, stderr = run(script, source, out)
    assert (status, stderr) == (0, "")
    return stdout


def refuses(script, source, out, *expected):
    """Runs a script that must refuse: status 2, one line that holds every expected word, no new
    file or folder beside `out`."""
    before = sorted(out.parent.rglob("*"))
    status, _, stderr = run(script, source, out)
    assert status == 2
    assert stderr.count("\n") == 1 and stderr.startswith(f"{script}: "), stderr
    for word in expected:
        assert word in stderr
    assert sorted(out.parent.rglob("*")) == before


def dolly_line(i=0, **changes):
    record = dict(instruction=f"q {i} \u2028", context="", response="a",
                  category=CATEGORIES[i % 8])
    return (json.dumps({**record, **changes}, ensure_ascii=False) + "\n").encode()


def dolly_lines():
    return [dolly_line(i) for i in range(15_011)]


@pytest.fixture
def made_dolly(tmp_path):
    path = tmp_path / "made.jsonl"
    path.write_bytes(b"".join(dolly_lines()))
    return path


def test_the_real_dolly_passes_and_is_written_unchanged(tmp_path):
    source, out = asset("dolly/databricks-dolly-15k.jsonl"), tmp_path / "new" / "dolly.jsonl"
    printed = accepts("prepare_dolly.py", source, out)
    assert out.read_bytes() == source.read_bytes()
    for words in (("open_qa", "3,742"), ("creative_writing", "709"), ("records", "15,011")):
        assert list(words) in [line.split() for line in printed.splitlines()]
    assert "not the public original byte for byte" in printed
    assert [path.name for path in out.parent.iterdir()] == ["dolly.jsonl"]


def test_dolly_twice_is_fine_but_a_different_file_is_never_replaced(tmp_path, made_dolly):
    out = tmp_path / "dolly.jsonl"
    accepts("prepare_dolly.py", made_dolly, out)
    accepts("prepare_dolly.py", made_dolly, out)
    out.write_text("mine")
    refuses("prepare_dolly.py", made_dolly, out, str(out), "differs", "--out")
    assert out.read_text() == "mine"


def test_a_truncated_dolly_is_refused(tmp_path, made_dolly):
    whole = made_dolly.read_bytes()
    source, out = tmp_path / "cut.jsonl", tmp_path / "dolly.jsonl"
    source.write_bytes(b"".join(dolly_lines()[:15_010]))
    refuses("prepare_dolly.py", source, out, "15,010 records", "15,011")
    source.write_bytes(whole[:-9])
    refuses("prepare_dolly.py", source, out, "line 15011", "not JSON")
    source.write_bytes(b"")
    refuses("prepare_dolly.py", source, out, "found 0 records")
    source.write_bytes(whole + dolly_line())
    refuses("prepare_dolly.py", source, out, "15,012 records")


def test_dolly_without_one_of_its_categories_is_refused(tmp_path):
    source = tmp_path / "seven.jsonl"
    source.write_bytes(dolly_line() * 15_011)
    refuses("prepare_dolly.py", source, tmp_path / "out", "in 1 categories, expected 15,011 in 8")


@pytest.mark.parametrize("line, words", [
    (b"<!DOCTYPE html>\n", "not JSON"),
    (b"\n", "not JSON"),
    (b"\xff\xfe\n", "not JSON"),
    (b"[" * 100_000 + b"\n", "not JSON"),
    (b"[1]\n", "expected the fields"),
    (b'{"instruction": "q"}\n', "expected the fields"),
    (dolly_line(extra="x"), "expected the fields"),
    (dolly_line(context=None), "not a string"),
    (dolly_line(category="poetry"), "unknown category 'poetry'"),
])
def test_a_broken_dolly_line_is_named_by_its_number(tmp_path, line, words):
    source = tmp_path / "broken.jsonl"
    source.write_bytes(dolly_line() * 2 + line + dolly_line())
    refuses("prepare_dolly.py", source, tmp_path / "dolly.jsonl", "line 3:", words)


def test_only_a_download_must_be_the_public_original(tmp_path, made_dolly, monkeypatch, capsys):
    url, out = made_dolly.as_uri(), tmp_path / "dolly.jsonl"
    refuses("prepare_dolly.py", url, out, "sha256", prepare_dolly.SHA256)
    monkeypatch.setattr(prepare_dolly, "SHA256",
                        hashlib.sha256(made_dolly.read_bytes()).hexdigest())
    prepare_dolly.prepare(url, out)
    assert out.read_bytes() == made_dolly.read_bytes()
    printed = capsys.readouterr().out
    assert printed.startswith(f"downloading {url}\n") and "public original" in printed


ROW = b'"q, ""quoted""\nand a second line",None,NA,1,"x, y",B\n'


def mmlu_files(val_rows=1531):
    """MMLU's shape with made-up questions: {name: bytes}."""
    files = {}
    for split, rows in (("dev", 285), ("val", val_rows), ("test", 14042)):
        for i in range(57):
            count = rows // 57 + (i < rows % 57)
            name = f"subject_{chr(97 + i // 26)}{chr(97 + i % 26)}"
            files[f"{split}/{name}_{split}.csv"] = ROW * count
    return files


def make_folder(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def make_tar(path, files, prefix="data/", extra=()):
    """A tar of `files`; `extra` holds more (TarInfo, bytes) pairs, put before them."""
    members = list(extra)
    for name, data in files.items():
        member = tarfile.TarInfo(prefix + name)
        member.size = len(data)
        members.append((member, data))
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return path


def read_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def test_the_real_mmlu_folder_passes_and_is_copied_byte_for_byte(tmp_path):
    source, out = asset("mmlu"), tmp_path / "new" / "mmlu"
    printed = accepts("prepare_mmlu.py", source, out)
    assert read_files(out) == read_files(source)
    lines = [line.split() for line in printed.splitlines()]
    for split, rows in (("dev", "285"), ("val", "1542"), ("test", "14042")):
        assert [split, "57", "subjects", rows, "rows"] in lines
    assert "note: val is an earlier edition, 1542 rows" in printed
    assert [path.name for path in out.parent.iterdir()] == ["mmlu"]


def test_a_tar_of_the_real_mmlu_gives_the_same_files_without_the_rest_of_the_tar(tmp_path):
    files = read_files(asset("mmlu"))
    rest = {"README.txt": b"x", "auxiliary_train/race.csv": b"x", "possibly_contaminated.txt": b""}
    source = make_tar(tmp_path / "data.tar", {**rest, **files})
    accepts("prepare_mmlu.py", source, tmp_path / "mmlu")
    assert read_files(tmp_path / "mmlu") == files


def test_both_editions_of_val_pass_and_the_older_one_is_noted(tmp_path):
    for rows, noted in ((1531, False), (1542, True)):
        source = make_folder(tmp_path / f"source{rows}", mmlu_files(rows))
        printed = accepts("prepare_mmlu.py", source, tmp_path / f"out{rows}")
        assert ("note:" in printed) == noted
    source = make_folder(tmp_path / "source1540", mmlu_files(1540))
    refuses("prepare_mmlu.py", source, tmp_path / "out1540", "1540 rows in val", "1531 or 1542")


def test_the_folder_may_be_the_one_that_holds_data_and_out_may_be_empty(tmp_path):
    make_folder(tmp_path / "unpacked" / "data", mmlu_files())
    (tmp_path / "unpacked" / "data" / "auxiliary_train").mkdir()
    out = tmp_path / "mmlu"
    out.mkdir()
    accepts("prepare_mmlu.py", tmp_path / "unpacked", out)
    assert read_files(out) == mmlu_files()


def test_a_downloaded_tar_is_laid_out_like_one_on_disk(tmp_path):
    source = make_tar(tmp_path / "data.tar", mmlu_files(), prefix="./data/")
    printed = accepts("prepare_mmlu.py", source.as_uri(), tmp_path / "mmlu")
    assert printed.startswith(f"downloading {source.as_uri()}\n")
    assert read_files(tmp_path / "mmlu") == mmlu_files()


def hostile(name, data=b"stolen,1,2,3,4,A\n", **attributes):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in attributes.items():
        setattr(member, key, value)
    return member, data


def test_hostile_tar_members_are_ignored(tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("secret")
    extra = [
        hostile("../escaped.csv"), hostile("data/../../test/escaped_test.csv"),
        hostile(str(tmp_path / "absolute_test.csv")), hostile("data/test/../escaped_test.csv"),
        hostile("data/test/a/b_test.csv"), hostile("data/test/wrong_dev.csv"),
        hostile("data/test/newline_test.csv\n"), hostile("data/data/test/twice_test.csv"),
        hostile("data/test/link_test.csv", b"", type=tarfile.SYMTYPE, linkname=str(secret)),
        hostile("data/test/hard_test.csv", b"", type=tarfile.LNKTYPE, linkname=str(secret)),
        hostile("data/test/pipe_test.csv", b"", type=tarfile.FIFOTYPE),
        hostile("data/test/folder_test.csv", b"", type=tarfile.DIRTYPE),
    ]
    source = make_tar(tmp_path / "data.tar", mmlu_files(), extra=extra)
    accepts("prepare_mmlu.py", source, tmp_path / "mmlu")
    assert read_files(tmp_path / "mmlu") == mmlu_files()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.tar", "mmlu", "secret.csv"]


def test_a_link_in_the_place_of_a_wanted_file_does_not_count(tmp_path):
    files = mmlu_files()
    name = sorted(files)[0]
    extra = [hostile("data/" + name, b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")]
    del files[name]
    source = make_tar(tmp_path / "data.tar", files, extra=extra)
    refuses("prepare_mmlu.py", source, tmp_path / "mmlu", "56 files dev/")


def test_a_tar_member_of_absurd_size_is_refused_unread(tmp_path):
    large = b"\0" * (prepare_mmlu.LARGEST + 1)
    source = make_tar(tmp_path / "data.tar", {}, extra=[hostile("data/dev/x_dev.csv", large)])
    refuses("prepare_mmlu.py", source, tmp_path / "mmlu", "data/dev/x_dev.csv", "16,777,217 bytes")


def test_what_is_not_a_whole_tar_is_refused(tmp_path):
    source, out = tmp_path / "data.tar", tmp_path / "mmlu"
    for data in (b"", b"<html>not found</html>", b"\x1f\x8b\x08" + b"\0" * 600):
        source.write_bytes(data)
        refuses("prepare_mmlu.py", source, out, "not a whole, uncompressed tar")
    whole = make_tar(source, mmlu_files()).read_bytes()
    source.write_bytes(whole[:len(whole) // 2 + 100])
    refuses("prepare_mmlu.py", source, out, "tar")


def test_mmlu_with_a_file_or_a_row_missing_is_refused(tmp_path):
    source, out = make_folder(tmp_path / "source", mmlu_files()), tmp_path / "mmlu"
    file = source / "test" / "subject_aa_test.csv"
    file.write_bytes(file.read_bytes()[:-len(ROW)])
    refuses("prepare_mmlu.py", source, out, "14041 rows in test", "14042")
    file.rename(source / "test" / "other_test.csv")
    refuses("prepare_mmlu.py", source, out, "same 57 subjects")
    (source / "test" / "other_test.csv").unlink()
    refuses("prepare_mmlu.py", source, out, "56 files test/")
    refuses("prepare_mmlu.py", tmp_path / "source" / "dev", out, "0 files dev/")


@pytest.mark.parametrize("row, words", [
    (b"q,1,2,3,A\n", "found 5 columns"),
    (b"q,1,2,3,4,A,\n", "found 7 columns"),
    (b"\n", "found 0 columns"),
    (b"q,1,2,3,4,E\n", "found the answer 'E'"),
    (b"q,1,2,3,4, A\n", "found the answer ' A'"),
    (b'q,1,"2"3,3,4,A\n', "expected after"),
    (b'"never closed,1,2,3,4,A\n', "unexpected end of data"),
    (b"\xff,1,2,3,4,A\n", "utf-8"),
])
def test_a_broken_mmlu_row_is_named_by_file_and_line(tmp_path, row, words):
    files = mmlu_files()
    files["val/subject_ab_val.csv"] = b'"two\nlines",1,2,3,4,A\n' + row
    source = make_folder(tmp_path / "source", files)
    where = "val/subject_ab_val.csv" + ("" if words == "utf-8" else " line 3")
    refuses("prepare_mmlu.py", source, tmp_path / "mmlu", where, words)


def test_a_folder_with_something_in_it_is_never_written_to(tmp_path):
    source, out = make_folder(tmp_path / "source", mmlu_files()), tmp_path / "mmlu"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    refuses("prepare_mmlu.py", source, out, str(out), "not an empty folder")
    refuses("prepare_mmlu.py", source, out / "mine.txt", "not an empty folder")
    refuses("prepare_dolly.py", source, out, "is not a file")
    assert read_files(out) == {"mine.txt": b"mine"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_source_that_cannot_be_had_gives_one_line(tmp_path, script):
    out = tmp_path / "new" / "out"
    with socket.socket() as closed:  # a port that is bound but does not listen refuses everyone
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/data"
        refuses(script, url, out, "cannot download", url, "--source")
    refuses(script, (tmp_path / "absent").as_uri(), out, "cannot download", "--source")
    refuses(script, "nosuch://x", out, "cannot download", "--source")
    refuses(script, tmp_path / "absent", out, "there is no file", "--source")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_and_a_cut_connection_in_a_download_leave_nothing(tmp_path, script):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/data"
        for end in ("Ctrl-C", "cut"):
            process = subprocess.Popen(
                [sys.executable, *command(script, url, tmp_path / "out")], text=True, cwd=ROOT,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc")
                if end == "Ctrl-C":
                    process.send_signal(signal.SIGINT)
                    printed, error = process.communicate(timeout=60)
            if end == "cut":
                printed, error = process.communicate(timeout=60)
            assert process.returncode == (130 if end == "Ctrl-C" else 2)
            assert error.count("\n") == 1 and "Traceback" not in error
            assert printed == f"downloading {url}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", [prepare_dolly, prepare_mmlu])
def test_ctrl_c_before_the_rename_leaves_nothing(tmp_path, module, monkeypatch, made_dolly):
    def interrupt(*paths):
        raise KeyboardInterrupt

    source = made_dolly if module is prepare_dolly else make_tar(tmp_path / "tar", mmlu_files())
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(module.os, "replace", interrupt)
    script = f"{module.__name__.removeprefix('data.')}.py"
    status, _, stderr = run(script, source, tmp_path / "out")
    assert status == 130 and stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_command_runs_from_the_repository_and_its_help_names_the_url(script):
    done = subprocess.run([sys.executable, "-m", f"data.{script.removesuffix('.py')}", "--help"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    url = SCRIPTS[script].URL
    assert url in "".join(done.stdout.split())
