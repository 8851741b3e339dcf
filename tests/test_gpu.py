"""experiments/gpu.py: all of it in small on a CPU, and what it does when a part goes wrong."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from experiments import gpu, gpu_parts
from model import ModelArgs, Transformer
from tests.conftest import ROOT

SHAPE = gpu_parts.TINY.seven


def content(out):
    return json.loads((out / "gpu.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_part_runs_in_small_and_writes_its_tables(tmp_path):
    results = sorted((ROOT / "experiments" / "results").iterdir())
    done = subprocess.run([sys.executable, "-m", "experiments.gpu", "--device", "cpu", "--tiny",
                           "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = content(tmp_path)
    assert found["parts"].keys() == gpu.PARTS.keys()
    assert all(part["status"].startswith("done, ") for part in found["parts"].values())
    tables = {name: part["tables"] for name, part in found["parts"].items()}
    ours = ["HydraLoRA 3 x 8", "LoRA r24", "floor"]
    for case in ("1 x 48 tokens", "Dolly's lengths, one record a step"):
        for kind in ("plain", "checkpointed"):
            rows = tables["step"][f"{case}, {kind}"]
            assert [row["method"] for row in rows][:3] == ours
            assert len(rows) == 5 if gpu_parts.FRAMEWORKS else 3
            assert all(row["seconds"] > 0 and row["share of the peak"] > 0 for row in rows)
    assert len(tables["step"]["aims, as on a CPU"]) == (4 if gpu_parts.FRAMEWORKS else 2)
    assert tables["growth"].keys() == {"heads", "rank", "length"}
    assert sum(row["share"] for row in tables["profile"]["where a step's time goes"]
               ) == pytest.approx(1)
    compiled = tables["profile"]["torch.compile (eager) of the blocks"]
    assert [row["graph breaks"] for row in compiled] == [0, 0]
    assert len(tables["memory"]["peak of a step and --dry-run's sum"]) == 4
    assert tables["commands"]["the main command"][0]["tuned"] > 0
    assert [row["prompts"] for row in tables["commands"]["MMLU, five shots, drawn prompts"]
            ] == ["shared prefix", "whole"]
    assert "answers are the same" in found["parts"]["commands"]["notes"][0]
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert all(f"## {name}: " in text for name in gpu.PARTS) and "no figure means anything" in text
    assert sorted(os.listdir(tmp_path)) == ["gpu.json", "gpu.md"]
    assert sorted((ROOT / "experiments" / "results").iterdir()) == results


def test_a_part_that_fails_or_takes_too_long_loses_nothing_and_the_others_run(tmp_path,
                                                                              monkeypatch, capsys):
    limits = {}

    def run(command, *, stderr, timeout, **settings):
        part = command[command.index("--part") + 1]
        limits[part] = timeout
        report = gpu.Report(tmp_path, part)
        report.row("a table", value=1.5)
        if part == "step":
            raise subprocess.TimeoutExpired(command, timeout)
        if part == "memory":
            stderr.write("Traceback\n  a line\nRuntimeError: a bug\n")
            return SimpleNamespace(returncode=1)
        report.add(lambda part: part.update(status="done, 1 s"))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    parts = content(tmp_path)["parts"]
    assert list(parts) == list(gpu.PARTS)
    assert all(part["tables"] == {"a table": [{"value": 1.5}]} for part in parts.values())
    assert parts["step"]["status"].startswith(f"stopped at its limit of {gpu.PARTS['step'][0]} s")
    assert parts["memory"]["status"] == "FAILED with status 1: RuntimeError: a bug"
    assert {parts[name]["status"] for name in ("commands", "growth", "profile")} == {"done, 1 s"}
    assert "RuntimeError: a bug" in (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert sum(limits.values()) <= gpu.LIMIT == 600
    assert "wrote gpu.json and gpu.md" in capsys.readouterr().out


def test_without_a_card_it_says_what_does_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, words in (([], "finds no CUDA device"), (["--device", "cpu"], "give --tiny")):
        with pytest.raises(SystemExit) as stop:
            gpu.main([*flags, "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()


def test_results_in_small_do_not_go_to_the_results_of_the_repository():
    assert gpu.parse_args(["--device", "cpu", "--tiny"]).out.parts == ("runs", "gpu-tiny")


# ---------------------------------------------------------------- the parts


def test_the_shapes_are_those_of_7b_and_13b():
    for args, weights in ((gpu_parts.FULL.seven, 6_738_415_616),
                          (gpu_parts.FULL.thirteen, 13_015_864_320)):
        with torch.device("meta"):
            assert sum(p.numel() for p in Transformer(ModelArgs(**args)).parameters()) == weights


def test_what_does_not_fit_is_skipped_with_the_reason_and_the_rest_goes_on(tmp_path, monkeypatch):
    report = gpu.Report(tmp_path, "memory")

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. And more.")

    assert gpu_parts.attempt(report, "a step", "cpu", full) is None
    with pytest.raises(ZeroDivisionError):
        gpu_parts.attempt(report, "a bug of ours", "cpu", lambda: 1 / 0)
    assert gpu_parts.attempt(report, "PEFT", "cpu", lambda: 1 / 0, foreign=True) is None
    monkeypatch.setattr(gpu_parts, "total_memory", lambda device: 2**20)
    gpu_parts.measure_memory(report, gpu_parts.TINY, "cpu")
    notes = content(tmp_path)["parts"]["memory"]["notes"]
    assert notes[0] == ("a step: skipped, too little memory on the card (CUDA out of memory)")
    assert notes[1] == "PEFT: skipped, ZeroDivisionError (division by zero)"
    assert len(notes) == 6 and all("GiB are needed" in note for note in notes[2:])


def test_a_missing_framework_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_parts, "FRAMEWORKS", False)
    assert gpu_parts.load_frameworks(gpu.Report(tmp_path, "step"), "cpu") is None
    assert "peft is not installed" in content(tmp_path)["parts"]["step"]["notes"][0]


def test_a_method_that_does_not_fit_leaves_the_table_to_the_others(tmp_path, monkeypatch):
    base = gpu_parts.random_base(SHAPE, "cpu")
    found = {name: make() for name, make in gpu_parts.makers(
        base, gpu_parts.flags_of("cpu"), None).items()}

    def full(batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(found["LoRA r24"], "step", full)
    gpu_parts.compare_methods(gpu.Report(tmp_path, "step"), "a table", found,
                              [gpu_parts.row_of(16, SHAPE["vocab_size"])], scale=gpu_parts.TINY,
                              device="cpu", peak=1e12, aims=True)
    part = content(tmp_path)["parts"]["step"]
    assert [row["method"] for row in part["tables"]["a table"]] == ["HydraLoRA 3 x 8", "floor"]
    assert [row["aim"] for row in part["tables"]["aims, as on a CPU"]] == [
        "HydraLoRA 3 x 8 over the floor, time"]
    assert part["notes"] == ["LoRA r24, a table: skipped, too little memory on the card (CUDA out "
                             "of memory.)"]


@pytest.mark.slow
def test_the_frameworks_share_the_bases_weights_and_train_their_adapters_alone():
    pytest.importorskip("peft", reason="peft is not installed")
    frameworks = pytest.importorskip("experiments.frameworks")
    base = gpu_parts.random_base(SHAPE, "cpu")
    places = {p.data_ptr() for p in base.parameters()}
    common = dict(alpha=32, dropout=0.0, base=base)
    for model in (frameworks.peft_lora(base.args, rank=4, **common),
                  frameworks.looped_hydra(base.args, rank=4, heads=2, **common)):
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert {p.data_ptr() for p in frozen} == places
        before = [p.clone() for p in base.parameters()]
        method = gpu_parts.Framework(model, frameworks.train_step)
        gpu_parts.take(method, [gpu_parts.row_of(12, SHAPE["vocab_size"])])
        assert all(torch.equal(a, b) for a, b in zip(before, base.parameters()))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_dollys_lengths_rounded_up_to_64_keep_their_records():
    rows = gpu_parts.dolly_rows(gpu_parts.FULL)
    assert len(rows) == gpu_parts.FULL.dolly
    lengths = [len(s.ids) - 1 for (s,) in rows]
    assert max(lengths) <= 1024 and len(set(lengths)) > 6 and gpu_parts.positions(rows) == sum(
        lengths)


def test_the_drawn_prompts_are_as_many_as_asked_and_share_a_subjects_shots():
    subjects = gpu_parts.drawn_prompts(gpu_parts.FULL, 32000)
    assert len(subjects) == 57 and sum(map(len, subjects)) == 1000
    assert all(401 <= len(ids) <= 651 for prompts in subjects for ids, _ in prompts)
    for prompts in subjects:
        shared = os.path.commonprefix([ids for ids, _ in prompts])
        assert len(shared) >= 380
