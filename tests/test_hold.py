"""One folder, one run: the second is refused, and what a killed one left holds nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import eval_mmlu
import train
from model import save_llama
from support import hold
from support.hold import holding, is_running, myself, process_start
from tests.conftest import ROOT, WORLD, tiny_model


@pytest.fixture
def command(tmp_path):
    """A run of a few seconds in a process of its own."""
    save_llama(tiny_model(n_layers=1), WORLD / "base" / "tokenizer.model", tmp_path / "w")
    lines = (WORLD / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "d.jsonl").write_text("".join(lines[:80]), encoding="utf-8")
    return ["train.py", "--weights", str(tmp_path / "w"), "--data", str(tmp_path / "d.jsonl"),
            "--heads", "2", "--rank", "2", "--max-seq-len", "100", "--device", "cpu",
            "--batch-size", "4", "--grad-accum", "1", "--dropout", "0", "--max-steps", "5",
            "--out", str(tmp_path / "runs" / "out")]


def start(*arguments):
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.slow
def test_of_two_runs_at_once_one_wins_and_the_other_names_it(command, tmp_path):
    both = [start(*command) for _ in range(2)]
    results = sorted(ended(process) for process in both)
    winner, = [p for p in both if p.returncode == 0]
    assert [status for status, _, _ in results] == [0, 2]
    line = results[1][2]
    assert line.count("\n") == 1 and ("is held by process" in line or "already holds a run" in line)
    if "held" in line:
        assert f"process {winner.pid}, which writes there" in line
    assert sorted(os.listdir(tmp_path / "runs" / "out")) == ["adapter.pt", "log.csv", "run.json"]
    assert os.listdir(tmp_path / "runs") == ["out"]


HOLD = """
import sys, time
from support.hold import holding
with holding(sys.argv[1], "it"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder's file."""
    process = start("-c", HOLD, str(tmp_path / "runs" / "out" / ".lock"))
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_held_folder_is_refused_in_one_line_and_nothing_is_written(command, holder, tmp_path,
                                                                     capsys):
    for flags in ([], ["--overwrite"]):
        assert train.main([*command[1:], *flags]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert f"out is held by process {holder.pid}, which writes there" in line
    assert os.listdir(tmp_path / "runs" / "out") == [".lock"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_what_a_killed_or_stopped_run_left_behind_holds_nothing(command, holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait()
    assert (tmp_path / "runs" / "out" / ".lock").exists() == (number == signal.SIGKILL)
    assert train.main(command[1:]) == 0
    assert sorted(os.listdir(tmp_path / "runs" / "out")) == ["adapter.pt", "log.csv", "run.json"]


def test_a_refused_run_leaves_no_folder_and_no_file(command, tmp_path):
    assert train.main([*command[1:], "--data", "absent"]) == 2
    assert not (tmp_path / "runs").exists()


def write_lock(path, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**myself(), **changes}))


def test_another_machine_is_named_with_what_to_do(command, tmp_path, capsys):
    lock = tmp_path / "runs" / "out" / ".lock"
    write_lock(lock, host="node7", pid=12)
    assert train.main(command[1:]) == 2
    line = capsys.readouterr().err
    assert "held by process 12 on another machine, node7" in line and f"delete {lock}" in line
    lock.unlink()
    assert train.main(command[1:]) == 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "9999"])
def test_a_file_that_names_nobody_holds_nothing(tmp_path, monkeypatch, content):
    monkeypatch.setattr(hold, "WAIT", 0)
    lock = tmp_path / ".lock"
    lock.write_text(content)
    if content == "9999":
        write_lock(lock, pid=99999999999999999999)
    with holding(lock, "it"):
        assert json.loads(lock.read_text()) == myself()
    assert not lock.exists()


def test_a_number_that_another_process_got_since_is_not_the_holder(tmp_path):
    me = myself()
    if me["start"] is None:
        pytest.skip("only Linux tells when a process started")
    assert is_running(me, tmp_path / "x") and process_start(os.getpid()) == me["start"]
    write_lock(tmp_path / ".lock", start="1")
    with holding(tmp_path / ".lock", "it"):
        pass


@pytest.mark.slow
def test_of_many_that_see_a_file_left_behind_only_one_takes_it(tmp_path):
    lock = tmp_path / ".lock"
    code = ("import sys, time\nfrom support.hold import holding\n"
            "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
            "with holding(sys.argv[1], 'it'):\n    time.sleep(3)\n")
    write_lock(lock, pid=2**22 + 7)
    at = str(time.time() + 2)
    statuses = [ended(p)[0] for p in [start("-c", code, str(lock), at) for _ in range(4)]]
    assert sorted(statuses) == [0, 1, 1, 1] and not lock.exists()
    assert os.listdir(tmp_path) == []


def test_the_quiz_is_answered_by_one_process_into_one_file(command, tmp_path, capsys):
    out = tmp_path / "m.json"
    flags = ["--weights", command[2], "--limit", "1", "--shots", "0", "--max-seq-len", "128",
             "--device", "cpu", "--out", str(out)]
    with holding(f"{out}.lock", out):
        before = sorted(os.listdir(tmp_path))
        assert eval_mmlu.main(flags) == 2
        assert f"m.json is held by process {os.getpid()}" in capsys.readouterr().err
        assert sorted(os.listdir(tmp_path)) == before
    assert eval_mmlu.main(flags) == 0
    assert not list(tmp_path.glob("*.lock"))
