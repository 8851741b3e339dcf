"""Windows and macOS as far as Linux can show them, and standard error that is no terminal."""

import os
import subprocess
import sys
import time

import pytest

import train
from support import cli
from tests.conftest import ROOT, WORLD

UNIX_ONLY = ["resource", "fcntl", "grp", "pwd", "termios", "syslog"]

WITHOUT_UNIX = f"""
import os, sys
for name in {UNIX_ONLY}:
    sys.modules[name] = None  # an import of it raises ImportError
original = os.open
def only_files(path, *arguments, **settings):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))  # as Windows has it
    return original(path, *arguments, **settings)
os.open = only_files
import cluster, eval_mmlu, train
from tools import generate
assert train.main(["--data", sys.argv[2], "--max-steps", "2", "--device", "cpu", "--out",
                   sys.argv[1]]) == 0
adapter = os.path.join(sys.argv[1], "adapter.pt")
assert generate.main(["Say it.", "--adapter", adapter, "--max-new-tokens", "2"]) == 0
assert eval_mmlu.main(["--adapter", adapter, "--limit", "1", "--device", "cpu"]) == 0
assert cluster.main(["--k-max", "2", "--data", sys.argv[2], "--device", "cpu", "--out",
                     os.path.join(sys.argv[1], "clusters.json")]) == 0
"""


@pytest.fixture
def data(tmp_path):
    """40 records of the world."""
    lines = (WORLD / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:40]), encoding="utf-8")
    return str(tmp_path / "few.jsonl")


@pytest.mark.slow
def test_the_main_path_runs_without_what_only_unix_has(tmp_path, data):
    done = subprocess.run([sys.executable, "-c", WITHOUT_UNIX, str(tmp_path / "out"), data],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"adapter.pt", "run.json", "log.csv", "mmlu.json", "clusters.json"} == set(
        os.listdir(tmp_path / "out"))


def test_progress_is_a_line_every_30_seconds_where_there_is_no_terminal(monkeypatch, capsys):
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    assert cli.LINE_SECONDS == 30
    bar = cli.progress(total=100, desc="train")
    bar._time, bar.start_t, bar.last_print_t = time.time, clock[0], clock[0]
    for _ in range(100):
        clock[0] += 1
        bar.update()
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("train: ") for line in lines)


def test_a_bar_that_ends_within_30_seconds_prints_nothing_there(capsys):
    for _ in cli.progress(range(1000), desc="quick"):
        pass
    assert capsys.readouterr().err == ""


def test_a_terminal_sees_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in cli.progress(range(3), desc="seen"):
        pass
    assert "seen: 100%" in capsys.readouterr().err


@pytest.mark.slow
def test_the_log_of_a_run_without_a_terminal_is_short(tmp_path, data, capsys):
    assert train.main(["--data", data, "--max-steps", "20", "--device", "cpu", "--out",
                       str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.count("\n") <= 1
