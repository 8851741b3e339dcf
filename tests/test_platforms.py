"""Windows and macOS as far as Linux can show them, and standard error that is no terminal."""

import os
import subprocess
import sys
import time

import pytest
import torch

import train
from data import corpus
from support import device, output
from tests.conftest import ROOT, WORLD

UNIX_ONLY = ["resource", "fcntl", "grp", "pwd", "termios", "syslog"]

AS_ON_WINDOWS = f"""
import os, subprocess, sys, types  # subprocess itself asks for msvcrt
for name in {UNIX_ONLY}:
    sys.modules[name] = None  # an import of it raises ImportError
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda *_: None)
original = os.open
def only_files(path, *arguments, **settings):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
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


@pytest.mark.slow
def test_the_main_path_needs_no_module_of_unix_and_prints_no_bar_without_a_terminal(tmp_path):
    lines = (WORLD / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:40]), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", AS_ON_WINDOWS, tmp_path / "out",
                           tmp_path / "few.jsonl"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"adapter.pt", "run.json", "log.csv", "mmlu.json", "clusters.json"} == set(
        os.listdir(tmp_path / "out"))
    assert done.stderr.count("\n") <= 1


# ---------------------------------------------------------------- devices


def test_device_queries_are_not_hardcoded_to_cuda(monkeypatch):
    """As far as a machine without Apple's GPU can show it: torch.mps is there, and replaced."""
    restored = {}
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: f"state of {device}")
    monkeypatch.setattr(torch.mps, "set_rng_state",
                        lambda state, device: restored.update({device: state}))
    assert device.peak_memory("mps") == 3
    assert device.get_rng_state("mps:0") == "state of mps:0"
    device.set_rng_state("a state", "mps")
    device.set_rng_state(None, "cpu")
    assert restored == {"mps": "a state"} and device.get_rng_state("cpu") is None
    assert device.pick_dtype(None, "mps") == "fp32" and device.pick_dtype(None, "cuda:1") == "bf16"
    assert 0 < device.peak_memory("cpu") < 2**10


def test_only_cuda_gets_pinned_memory_and_copies_without_waiting(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *place, **how: seen.append((place, how)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: seen.append("pinned") or x)
    corpus.to_device([1], "mps")
    corpus.to_device([1], "cuda:1")
    assert seen == [(("mps",), {}), "pinned", (("cuda:1",), {"non_blocking": True})]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_autocast_and_the_scaler_of_fp16_support_mps_without_a_warning(recwarn, dtype):
    with device.autocast("mps:0", dtype):
        pass
    assert torch.amp.GradScaler("mps").is_enabled()
    assert not [w for w in recwarn.list if "cast" in str(w.message) or "Scaler" in str(w.message)]


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is a GPU of Apple's here")
def test_mps_is_refused_in_one_line_if_there_is_none(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--device", "mps", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "--device mps cannot be used" in error


# ---------------------------------------------------------------- progress


def test_without_a_terminal_progress_is_a_line_every_30_seconds(monkeypatch, capsys):
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    assert output.LINE_SECONDS == 30
    bar = output.progress(total=100, desc="train")
    bar._time, bar.start_t, bar.last_print_t = time.time, clock[0], clock[0]
    for _ in range(100):
        clock[0] += 1
        bar.update()
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("train: ") for line in lines)
    for _ in output.progress(range(1000), desc="quick"):  # it ends within 30 seconds
        pass
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in output.progress(range(3), desc="seen"):
        pass
    assert "seen: 100%" in capsys.readouterr().err
