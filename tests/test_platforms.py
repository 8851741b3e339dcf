"""Windows and macOS as far as Linux can show them, and standard error that is no terminal."""

import os
import subprocess
import sys
import time

import pytest
import torch

import train
from data import corpus
from support import cli, device
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


def test_what_a_device_has_of_its_own_is_asked_of_its_kind_and_not_by_cudas_name(monkeypatch):
    """As far as a machine without Apple's GPU can show it: torch.mps is there, and replaced."""
    kept = {}
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: f"state of {device}")
    monkeypatch.setattr(torch.mps, "set_rng_state",
                        lambda state, device: kept.update({device: state}))
    assert device.peak_memory("mps") == 3
    assert device.get_rng_state("mps:0") == "state of mps:0"
    device.set_rng_state("a state", "mps")
    device.set_rng_state(None, "cpu")
    assert kept == {"mps": "a state"} and device.get_rng_state("cpu") is None
    assert device.pick_dtype(None, "mps") == "fp32" and device.pick_dtype(None, "cuda:1") == "bf16"
    assert 0 < device.peak_memory("cpu") < 2**10


def test_only_cuda_is_given_pinned_memory_and_a_copy_that_is_not_waited_for(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *place, **how: seen.append((place, how)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: seen.append("pinned") or x)
    corpus.to_device([1], "mps")
    corpus.to_device([1], "cuda:1")
    assert seen == [(("mps",), {}), "pinned", (("cuda:1",), {"non_blocking": True})]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_autocast_and_fp16s_scaler_know_mps_without_a_warning(recwarn, dtype):
    args = train.parse_args(["--device", "cpu", "--dtype", dtype])
    args.device = "mps:0"
    model = torch.nn.Linear(2, 2)
    optimizer, scaler = train.make_optimizer(model, args)
    with device.autocast(args):
        pass
    assert scaler.is_enabled() == (dtype == "fp16")
    assert not [str(w.message) for w in recwarn.list if "autocast" in str(w.message).lower()]


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is a GPU of Apple's here")
def test_mps_is_refused_in_one_line_where_there_is_none(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--data", data, "--device", "mps", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "--device mps cannot be used" in error


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
