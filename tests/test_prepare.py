"""data/prepare_dolly.py and data/prepare_mmlu.py: complete data passes unchanged, anything else is
refused in one line and nothing is written. Offline; the real files are used if they are there."""

import contextlib
import hashlib
import http.server
import io
import json
import signal
import socket
import subprocess
import sys
import tarfile
import threading

import pytest

from data import download, prepare_dolly, prepare_mmlu
from tests.conftest import ROOT, asset, status_of

both_scripts = pytest.mark.parametrize("script", [prepare_dolly, prepare_mmlu])
CATEGORIES = sorted(prepare_dolly.CATEGORIES)


@pytest.fixture(autouse=True)
def do_not_wait_for_the_disk(monkeypatch):
    monkeypatch.setattr(download.os, "fsync", lambda file: None)


def run(script, source, out):
    """Status, stdout and stderr of a script's main() with these flags."""
    with (contextlib.redirect_stdout(io.StringIO()) as stdout,
          contextlib.redirect_stderr(io.StringIO()) as stderr):
        status = status_of(script.main, ["--source", source, "--out", out]) or 0
    return status, stdout.getvalue(), stderr.getvalue()


def accepts(script, source, out):
    """Runs a script that must succeed and returns what it printed."""
    status, stdout, stderr = run(script, source, out)
    assert (status, stderr) == (0, "")
    return stdout


def refuses(script, source, out, *expected, status=2):
    """Runs a script that must end with one line that has every expected text, and with no new
    file or folder next to `out`."""
    before = sorted(out.parent.rglob("*"))
    found, _, stderr = run(script, source, out)
    name = script.__name__.removeprefix("data.")
    assert found == status and stderr.count("\n") == 1 and stderr.startswith(f"{name}.py: "), stderr
    assert all(text in stderr for text in expected), stderr
    assert sorted(out.parent.rglob("*")) == before


# ---------------------------------------------------------------- Dolly


def dolly_line(i=0, **changes):
    record = dict(instruction=f"q {i} \u2028", context="", response="a", category=CATEGORIES[i % 8])
    return (json.dumps({**record, **changes}, ensure_ascii=False) + "\n").encode()


@pytest.fixture
def made_dolly(tmp_path):
    path = tmp_path / "made.jsonl"
    path.write_bytes(b"".join(map(dolly_line, range(15_011))))
    return path


def test_the_real_dolly_is_written_unchanged(tmp_path):
    source, out = asset("dolly/databricks-dolly-15k.jsonl"), tmp_path / "new" / "dolly.jsonl"
    printed = accepts(prepare_dolly, source, out)
    assert out.read_bytes() == source.read_bytes()
    rows = [line.split() for line in printed.splitlines()]
    assert ["open_qa", "3,742"] in rows and ["records", "15,011"] in rows


def test_dolly_can_be_prepared_twice_but_never_replaces_another_file(tmp_path, made_dolly):
    out = tmp_path / "dolly.jsonl"
    accepts(prepare_dolly, made_dolly, out)
    assert "not the public original byte for byte" in accepts(prepare_dolly, made_dolly, out)
    out.write_text("mine")
    refuses(prepare_dolly, made_dolly, out, str(out), "differs", "--out")
    assert out.read_text() == "mine"


def test_a_dolly_with_another_number_of_records_is_refused(tmp_path, made_dolly):
    whole, out = made_dolly.read_bytes(), tmp_path / "dolly.jsonl"
    for data, text in ((whole[:whole.rindex(b"\n", 0, -1) + 1], "15,010 records"),
                       (whole[:-9], "line 15011:"), (b"", "found 0 records"),
                       (whole + dolly_line(), "15,012 records"),
                       (dolly_line() * 15_011, "in 1 categories, expected 15,011 in 8")):
        made_dolly.write_bytes(data)
        refuses(prepare_dolly, made_dolly, out, text)


@pytest.mark.parametrize("line", [
    b"<!DOCTYPE html>\n", b"\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"[1]\n",
    b'{"instruction": "q"}\n', dolly_line(extra="x"), dolly_line(context=None),
    dolly_line(category="poetry")])
def test_a_broken_dolly_line_is_named_by_its_number(tmp_path, line):
    source = tmp_path / "broken.jsonl"
    source.write_bytes(dolly_line() * 2 + line + dolly_line())
    refuses(prepare_dolly, source, tmp_path / "dolly.jsonl", "line 3: ", "is no record of Dolly")


def test_a_download_must_be_the_public_original(tmp_path, made_dolly, monkeypatch):
    url, out = made_dolly.as_uri(), tmp_path / "dolly.jsonl"
    refuses(prepare_dolly, url, out, "sha256", prepare_dolly.SHA256)
    sha256 = hashlib.sha256(made_dolly.read_bytes()).hexdigest()
    monkeypatch.setattr(prepare_dolly, "SHA256", sha256)
    printed = accepts(prepare_dolly, url, out)
    assert out.read_bytes() == made_dolly.read_bytes()
    assert printed.startswith(f"downloading {url}\n") and "sha256 of the public" in printed


# ---------------------------------------------------------------- MMLU

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


def tar_member(name, data=b"stolen,1,2,3,4,A\n", **attributes):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in attributes.items():
        setattr(member, key, value)
    return member, data


def make_tar(path, files, prefix="data/", extra=()):
    """A tar of `files`; `extra` has more (TarInfo, bytes) pairs, which come before them."""
    with tarfile.open(path, "w") as tar:
        for member, data in [*extra, *(tar_member(prefix + n, d) for n, d in files.items())]:
            tar.addfile(member, io.BytesIO(data))
    return path


def read_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def test_the_real_mmlu_is_copied_byte_for_byte(tmp_path):
    source, out = asset("mmlu"), tmp_path / "new" / "mmlu"
    printed = accepts(prepare_mmlu, source, out)
    files = read_files(source)
    assert read_files(out) == files
    lines = [line.split() for line in printed.splitlines()]
    for split, rows in (("dev", "285"), ("val", "1542"), ("test", "14042")):
        assert [split, "57", "subjects", rows, "rows"] in lines
    rest = {"README.txt": b"x", "auxiliary_train/race.csv": b"x"}  # as in the public tar
    accepts(prepare_mmlu, make_tar(tmp_path / "tar", {**rest, **files}), tmp_path / "again")
    assert read_files(tmp_path / "again") == files


def test_both_editions_of_val_pass_from_a_download_and_the_older_one_is_noted(tmp_path):
    out = tmp_path / "out"
    for rows, noted in ((1531, False), (1542, True)):
        url = make_tar(tmp_path / "data.tar", mmlu_files(rows), prefix="./data/").as_uri()
        printed = accepts(prepare_mmlu, url, out)
        assert printed.startswith(f"downloading {url}\n")
        assert ("note: val is an earlier edition, 1542 rows" in printed) == noted
        assert read_files(out) == mmlu_files(rows)
        out.rename(tmp_path / str(rows))
    source = make_tar(tmp_path / "data.tar", mmlu_files(1540))
    refuses(prepare_mmlu, source, out, "1540 rows in val", "1531 or 1542")


def test_the_source_may_be_the_folder_above_data_and_out_may_be_an_empty_folder(tmp_path):
    make_folder(tmp_path / "unpacked" / "data", mmlu_files())
    out = tmp_path / "mmlu"
    out.mkdir()
    accepts(prepare_mmlu, tmp_path / "unpacked", out)
    assert read_files(out) == mmlu_files()


def test_hostile_tar_members_are_ignored(tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("secret")
    extra = [tar_member(name) for name in (
        "../escaped.csv", "data/../../test/escaped_test.csv", str(tmp_path / "absolute_test.csv"),
        "data/test/../escaped_test.csv", "data/test/a/b_test.csv", "data/test/wrong_dev.csv",
        "data/test/newline_test.csv\n", "data/data/test/twice_test.csv")]
    extra += [tar_member(f"data/test/{name}_test.csv", b"", type=kind, linkname=str(secret))
              for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE),
                                 ("pipe", tarfile.FIFOTYPE), ("folder", tarfile.DIRTYPE))]
    source = make_tar(tmp_path / "data.tar", mmlu_files(), extra=extra)
    accepts(prepare_mmlu, source, tmp_path / "mmlu")
    assert read_files(tmp_path / "mmlu") == mmlu_files()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.tar", "mmlu", "secret.csv"]


def test_what_is_not_the_whole_tar_is_refused(tmp_path):
    source, out = tmp_path / "data.tar", tmp_path / "mmlu"
    for data, words in ((b"", "not a whole, uncompressed tar"),
                        (b"<html>not found</html>", "is a web page"),
                        (b"\x1f\x8b\x08" + b"\0" * 600, "compressed with gzip")):
        source.write_bytes(data)
        refuses(prepare_mmlu, source, out, words)
    whole = make_tar(source, mmlu_files()).read_bytes()
    source.write_bytes(whole[:len(whole) // 2 + 100])
    refuses(prepare_mmlu, source, out, "tar")
    large = b"\0" * (prepare_mmlu.LARGEST + 1)
    make_tar(source, {}, extra=[tar_member("data/dev/x_dev.csv", large)])
    refuses(prepare_mmlu, source, out, "data/dev/x_dev.csv", "16,777,217 bytes")


def test_mmlu_with_a_broken_row_or_a_row_or_file_missing_is_refused(tmp_path):
    source, out = make_folder(tmp_path / "source", mmlu_files()), tmp_path / "mmlu"
    file = source / "test" / "subject_aa_test.csv"
    whole = file.read_bytes()
    for row, text in ((b"q,1,2,3,4, A\n", "row 2: the answer is ' A'"),
                      (b"q,1,2,3,4,A,\n", "row 2: 7 columns"),
                      (b'q,1,"2"3,3,4,A\n', "row 2: ',' expected after")):
        file.write_bytes(b'"two\nlines",1,2,3,4,A\n' + row)
        refuses(prepare_mmlu, source, out, "test/subject_aa_test.csv", text)
    file.write_bytes(whole[:-len(ROW)])
    refuses(prepare_mmlu, source, out, "14041 rows in test", "14042")
    file.rename(source / "test" / "other_test.csv")
    refuses(prepare_mmlu, source, out, "same 57 subjects")
    (source / "test" / "other_test.csv").unlink()
    refuses(prepare_mmlu, source, out, "56 files test/")
    refuses(prepare_mmlu, tmp_path / "source" / "dev", out, "0 files dev/")


# ---------------------------------------------------------------- both scripts


def test_a_folder_with_something_in_it_is_never_written_to(tmp_path):
    source, out = make_folder(tmp_path / "source", mmlu_files()), tmp_path / "mmlu"
    make_folder(out, {"mine.txt": b"mine"})
    refuses(prepare_mmlu, source, out, str(out), "not an empty folder")
    refuses(prepare_mmlu, source, out / "mine.txt", "not an empty folder")
    refuses(prepare_dolly, source, out, "is not a file")
    assert read_files(out) == {"mine.txt": b"mine"}


@both_scripts
def test_a_source_that_cannot_be_read_gives_one_line(tmp_path, script):
    out = tmp_path / "new" / "out"
    with socket.socket() as closed:  # a port that is bound but does not listen refuses everyone
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/data"
        refuses(script, url, out, "cannot download", url, "--source")
    refuses(script, (tmp_path / "absent").as_uri(), out, "cannot download", "--source")
    refuses(script, "nosuch://x", out, "cannot download", "--source")
    refuses(script, tmp_path / "absent", out, "there is no file", "--source")
    assert list(tmp_path.iterdir()) == []


@both_scripts
@pytest.mark.parametrize("end, status", [("Ctrl-C", 130), ("connection lost", 2)])
def test_an_interrupted_download_leaves_nothing(tmp_path, script, end, status):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/data"
        process = subprocess.Popen(
            [sys.executable, "-m", script.__name__, "--source", url, "--out", tmp_path / "out"],
            text=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        connection, _ = server.accept()
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc")
        if end == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        else:
            connection.close()
        printed, error = process.communicate(timeout=60)
        connection.close()
    assert process.returncode == status
    assert error.count("\n") == 1 and "Traceback" not in error
    assert printed == f"downloading {url}\n" and list(tmp_path.iterdir()) == []


def test_ctrl_c_before_the_rename_leaves_nothing(tmp_path, monkeypatch, made_dolly):
    def interrupt(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(download.os, "replace", interrupt)
    refuses(prepare_dolly, made_dolly, tmp_path / "out", "nothing is half written", status=130)


@pytest.mark.parametrize("status, words", [(200, "more than"), (500, r"\x1b]0;x\x07")])
def test_a_server_that_sends_without_end_or_escapes_gets_one_line(tmp_path, monkeypatch, status,
                                                                  words):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status, "\x1b]0;x\x07")
            self.send_header("Content-Length", str(10**14))
            self.end_headers()
            self.wfile.write(b"x" * 500)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(download, "LARGEST", 400)
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/x"
        refuses(prepare_dolly, url, tmp_path / "out", words)
        server.shutdown()


def test_a_file_larger_than_any_source_is_not_read(tmp_path):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(6 << 30)
    refuses(prepare_dolly, tmp_path / "sparse", tmp_path / "out", "it is another file")
