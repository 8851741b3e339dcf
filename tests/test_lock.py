"""One folder, one run: support/lock.py, and the scripts that lock what they write."""

import errno
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

import eval_mmlu
import train
from model import save_llama
from support import lock as lock_module
from support.lock import file_lock
from tests.conftest import ROOT, WORLD, tiny_model
from tests.test_robust import flags_of, snapshot
from tools import generate

HOST = socket.gethostname()
ME = f"process {os.getpid()} on {HOST}"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_held(path, holder=ME):
    with pytest.raises(ValueError, match=f"^it is held by {holder}, which writes there: wait"):
        with file_lock(path, "it"):
            pass


# ---------------------------------------------------------------- the lock


@pytest.fixture(params=["Unix", "Windows"])
def either_system(request, monkeypatch):
    """Windows as far as Linux can show it: its own call, and no open file can be removed."""
    monkeypatch.setattr(lock_module, "PAUSE", 0)
    if request.param == "Unix":
        return
    fcntl, unlink = pytest.importorskip("fcntl"), Path.unlink

    def locking(fd, mode, count):
        assert os.lseek(fd, 0, os.SEEK_CUR) > 1000  # others must be able to read the name
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError from None

    def unlink_closed(path):
        held = {os.path.realpath(fd) for fd in Path("/proc/self/fd").glob("*")}
        if str(path) in held:
            raise PermissionError
        unlink(path)

    monkeypatch.setattr(lock_module, "fcntl", None)
    monkeypatch.setattr(lock_module, "msvcrt",
                        types.SimpleNamespace(locking=locking, LK_NBLCK=2), raising=False)
    monkeypatch.setattr(Path, "unlink", unlink_closed)


def test_a_second_holder_is_refused_and_told_who_the_first_is(tmp_path, either_system):
    with file_lock(tmp_path / ".lock", "it"):
        assert_held(tmp_path / ".lock")
        assert_held(tmp_path / ".lock")
        with file_lock(tmp_path / "other", "it"):
            pass
    with file_lock(tmp_path / ".lock", "it"):
        pass


def test_a_lock_leaves_nothing_not_even_the_folders_made_for_it(tmp_path, either_system):
    with file_lock(tmp_path / "a" / "b" / ".lock", "it"):
        assert names(tmp_path / "a" / "b") == [".lock.pid"]
    assert names(tmp_path) == []
    (tmp_path / "mine").mkdir()  # empty, but not made for the lock
    with pytest.raises(KeyboardInterrupt), file_lock(tmp_path / "mine" / ".lock", "it"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["mine"] and names(tmp_path / "mine") == []
    with file_lock(tmp_path / "c" / ".lock", "it"):
        (tmp_path / "c" / "result").touch()
    assert names(tmp_path / "c") == ["result"]


def test_the_lock_folder_of_an_older_version_is_ignored_and_kept(tmp_path):
    (tmp_path / ".lock").mkdir()
    (tmp_path / ".lock" / f"{os.getpid()}-ab12.34-{HOST}").touch()
    with file_lock(tmp_path / ".lock", "it"):
        assert_held(tmp_path / ".lock")
    assert names(tmp_path) == [".lock"] and len(names(tmp_path / ".lock")) == 1


HOLDER = """
import subprocess, sys, time
from support.lock import file_lock
with file_lock(sys.argv[1], "it"):
    child = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_a_killed_holder_is_free_at_once_although_its_child_lives(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "new" / ".lock"], cwd=ROOT,
                              stdout=subprocess.PIPE)
    child = int(holder.stdout.readline())
    try:
        assert_held(tmp_path / "new" / ".lock", f"process {holder.pid} on {HOST}")
        holder.kill()
        holder.communicate()
        assert names(tmp_path / "new") == [".lock.pid"]
        with file_lock(tmp_path / "new" / ".lock", "it"):
            assert_held(tmp_path / "new" / ".lock", ME)
        assert names(tmp_path / "new") == []
    finally:
        os.kill(child, 9)


def test_a_file_system_without_locks_gets_a_warning_and_the_run_continues(
        tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)
    with file_lock(tmp_path / ".lock", "it"), file_lock(tmp_path / ".lock", "it"):
        pass
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and names(tmp_path) == []
    assert "warning: the file system of it has no locks (No locks available)" in printed[0]


@pytest.mark.parametrize("place", ["file/run", "file/run/deeper"])
def test_the_folder_is_named_if_no_lock_can_be_made_there(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"{place} cannot be written .*name another place"):
        with file_lock(tmp_path / place / ".lock", "it"):
            pass


RACE = """
import os, sys, time
from support import lock
lock.PAUSE, wins, end = 0, 0, time.time() + 60
print(flush=True)
sys.stdin.readline()
while wins < 100 and time.time() < end:
    try:
        with lock.file_lock("made/.lock", "it"):
            os.close(os.open("inside", os.O_CREAT | os.O_EXCL))  # fails if another one is inside
            time.sleep(0.001)
            os.unlink("inside")
            wins += 1
    except ValueError:
        pass
assert wins == 100, wins
"""


@pytest.mark.slow
def test_of_several_that_take_one_lock_again_and_again_no_two_ever_hold_it(tmp_path):
    runs = [subprocess.Popen([sys.executable, "-c", RACE], cwd=tmp_path, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": str(ROOT)}) for _ in range(3)]
    for run in runs:
        run.stdout.readline()
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    errors = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0] * 3, errors
    assert not list(tmp_path.glob("made/*"))


# ---------------------------------------------------------------- the scripts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model and 60 records."""
    folder = tmp_path_factory.mktemp("lock")
    save_llama(tiny_model(n_layers=1), WORLD / "base" / "tokenizer.model", folder / "w")
    with open(WORLD / "train.jsonl", encoding="utf-8") as file:
        lines = [line for line in file if json.loads(line)["category"] == "tavi"][:60]
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def command(made, tmp_path):
    return flags_of(made / "w", made / "data.jsonl", tmp_path / "out")


@pytest.mark.parametrize("script, flags, out, lock", [
    (train, [], "out", "out/.lock"),
    (train, ["--overwrite"], "out", "out/.lock"),
    (train, ["--resume"], "alias", "out/.lock"),  # one folder under two names is one folder
    (eval_mmlu, [], "out", "out.lock"),
    (generate, ["--data", str(WORLD / "val.jsonl"), "--weights", str(WORLD / "base")], "out",
     "out.lock")])
def test_every_script_that_writes_refuses_an_output_that_is_held(
        tmp_path, capsys, script, flags, out, lock):
    (tmp_path / "alias").symlink_to(tmp_path / "out")
    with file_lock(tmp_path / lock, "it"):
        before = snapshot(tmp_path)
        assert script.main([*flags, "--out", str(tmp_path / out)]) == 2
        assert snapshot(tmp_path) == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tmp_path / out} is held by {ME}, which writes" in error


def test_a_run_that_cannot_start_leaves_no_folder_and_no_file(made, command, tmp_path):
    for flags in (["--data", "absent"], ["--weights", "absent"], ["--resume"]):
        assert train.main([*command, *flags]) == 2
    assert eval_mmlu.main(["--weights", str(made / "w"), "--data", str(tmp_path), "--device", "cpu",
                           "--out", str(tmp_path / "new" / "mmlu.json")]) == 2
    assert names(tmp_path) == []


def test_dry_run_needs_no_lock(command, tmp_path):
    with file_lock(tmp_path / "out" / ".lock", "it"):
        assert train.main([*command, "--dry-run"]) == 0
