"""experiments/: the benchmarks in small on a CPU, and what gpu.py does when a part goes wrong."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

import train
from experiments import benchmark, compare_dropout, gpu, parts, random_checkpoint, steps
from hydralora import HydraLinear
from model import ModelArgs, Transformer, load_llama
from tests.conftest import ROOT, WORLD

TOKENIZER = str(WORLD / "base" / "tokenizer.model")


def content(out):
    return json.loads((out / "gpu.json").read_text(encoding="utf-8"))


def full_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. And more.")


# ---------------------------------------------------------------- gpu.py


@pytest.mark.slow
def test_every_part_runs_with_tiny_models_and_writes_its_tables(tmp_path, monkeypatch):
    start = subprocess.run

    def run(command, **settings):
        if "growth" in command or "--part" not in command:  # as it is
            return start(command, **settings)
        return SimpleNamespace(returncode=gpu.main(command[3:]))  # quicker in this process

    monkeypatch.setattr(subprocess, "run", run)
    results = sorted((ROOT / "experiments" / "results").iterdir())
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    found = content(tmp_path)
    assert found["parts"].keys() == gpu.PARTS.keys()
    assert all(part["status"].startswith("done, ") for part in found["parts"].values())
    tables = {name: part["tables"] for name, part in found["parts"].items()}
    methods = {"HydraLoRA 3 x 8", "LoRA r24", "floor"}
    if not found["parts"]["step"]["notes"][1:]:  # transformers and peft are installed
        methods |= set(parts.FOREIGN)
    for case in ("1 x 48 tokens", "Dolly's lengths"):
        for kind in ("plain", "checkpointed"):
            rows = tables["step"][f"{case}, {kind}"]
            assert {row["method"] for row in rows} == methods
            assert all(row["seconds"] > 0 and row["share of the peak"] > 0 for row in rows)
    assert len(tables["step"]["aims, as on a CPU"]) == len(methods) - 1
    assert tables["growth"].keys() == {"heads", "rank", "length"}
    shares = [row["share"] for row in tables["profile"]["where a step's time goes"]]
    assert sum(shares) == pytest.approx(1)
    compiled = tables["profile"]["torch.compile (eager) of the blocks"]
    assert [row["graph breaks"] for row in compiled] == [0, 0]
    assert len(tables["memory"]["peak of a step and --dry-run's sum"]) == 4
    assert tables["commands"]["the main command"][0]["tuned"] > 0
    ways = [row["prompts"] for row in tables["commands"]["MMLU, five shots, drawn prompts"]]
    assert ways == ["shared prefix", "whole"]
    assert "6 of 6 answers are the same" in found["parts"]["commands"]["notes"][0]
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert all(f"## {name}: " in text for name in gpu.PARTS) and "no figure means anything" in text
    assert set(os.listdir(tmp_path)) - {"gpu.lock"} == {"gpu.json", "gpu.md"}
    assert sorted((ROOT / "experiments" / "results").iterdir()) == results


def test_a_part_that_fails_or_takes_too_long_loses_nothing_and_the_others_run(
        tmp_path, monkeypatch, capsys):
    limits = {}

    def run(command, *, stderr, timeout, **settings):
        part = command[command.index("--part") + 1]
        limits[part] = timeout

        def measure(report, scale, device):
            report.row("a table", {"value": 1.5})
            if part == "step":
                raise subprocess.TimeoutExpired(command, timeout)
            if part == "memory":
                raise RuntimeError("a bug")

        with mock.patch.dict(parts.MEASURES, {part: measure}):
            try:
                gpu.run_part(part, tmp_path, "cpu", tiny=True)
            except RuntimeError as error:
                stderr.write(f"Traceback\n  a line\nRuntimeError: {error}\n")
                return SimpleNamespace(returncode=1)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    found = content(tmp_path)["parts"]
    assert list(found) == list(gpu.PARTS)
    assert all(part["tables"] == {"a table": [{"value": 1.5}]} for part in found.values())
    limit = gpu.PARTS["step"][0]
    assert found["step"]["status"].startswith(f"stopped at its limit of {limit} s")
    assert found["memory"]["status"] == "FAILED with status 1: RuntimeError: a bug"
    assert {found[name]["status"] for name in ("commands", "growth", "profile")} == {"done, 0 s"}
    assert "RuntimeError: a bug" in (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert sum(limits.values()) <= gpu.LIMIT == 600
    assert "wrote gpu.json and gpu.md" in capsys.readouterr().out


def test_without_a_card_gpu_py_says_what_does_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, words in (([], "finds no CUDA device"), (["--device", "cpu"], "give --tiny")):
        with pytest.raises(SystemExit) as stop:
            gpu.main([*flags, "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()


def test_tiny_results_do_not_replace_those_of_the_repository():
    assert gpu.parse_args(["--device", "cpu", "--tiny"]).out.parts == ("runs", "gpu-tiny")


def test_the_shapes_are_those_of_7b_and_13b():
    for args, weights in ((parts.FULL.seven, 6_738_415_616),
                          (parts.FULL.thirteen, 13_015_864_320)):
        with torch.device("meta"):
            assert sum(p.numel() for p in Transformer(ModelArgs(**args)).parameters()) == weights


# ---------------------------------------------------------------- the parts


def test_only_too_little_memory_and_foreign_errors_are_skipped_with_a_note():
    report = parts.Report()
    assert parts.attempt(report, "a step", full_memory) is None
    assert parts.attempt(report, "PEFT LoRA r24", lambda: 1 / 0, ", plain") is None
    with pytest.raises(ZeroDivisionError):
        parts.attempt(report, "a bug of ours", lambda: 1 / 0)
    assert report.content["notes"] == [
        "a step: skipped, too little memory on the card (CUDA out of memory)",
        "PEFT LoRA r24, plain: skipped, ZeroDivisionError (division by zero)"]


def test_a_size_that_cannot_fit_on_the_card_is_not_tried(monkeypatch):
    report = parts.Report()
    monkeypatch.setattr(parts, "total_memory", lambda device: 2**20)
    monkeypatch.setattr(parts, "peak_of_step", None)
    parts.measure_memory(report, parts.TINY, "cpu")
    assert len(report.content["notes"]) == 4 and not report.content["tables"]
    assert all("GiB are needed" in note for note in report.content["notes"])


def test_a_method_that_is_absent_or_does_not_fit_leaves_the_table_to_the_others(monkeypatch):
    # as without transformers, whether or not an earlier test has imported it
    monkeypatch.delattr("experiments.frameworks", raising=False)
    monkeypatch.setitem(sys.modules, "experiments.frameworks", None)
    report = parts.Report()
    base = steps.random_base(parts.SMALL)
    seconds = parts.compare_methods(
        report, "a table", {**parts.METHODS, "LoRA r24": full_memory}, base,
        [steps.random_batch(1, 16, 768)], device="cpu", product=1e12, rounds=2)
    parts.report_aims(report, "aims", seconds)
    tables, notes = report.content["tables"], report.content["notes"]
    assert [row["method"] for row in tables["a table"]] == ["HydraLoRA 3 x 8", "floor"]
    assert {len(values) for values in seconds.values()} == {2}
    assert [row["aim"] for row in tables["aims"]] == ["HydraLoRA 3 x 8 over the floor, time"]
    assert notes[0].startswith("LoRA r24, a table: skipped, too little memory on the card")
    assert len(notes) == 3 and all("ModuleNotFoundError" in note for note in notes[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", parts.METHODS | steps.VARIANTS)
def test_every_method_trains_its_adapters_alone_on_the_weights_of_the_base(name):
    if name in parts.FOREIGN:
        pytest.importorskip("peft", reason="peft is not installed")
    base = steps.random_base(parts.SMALL)
    before = [p.clone() for p in base.parameters()]
    method = (parts.METHODS | steps.VARIANTS)[name](base)
    trained = [p for p in method.model.parameters() if p.requires_grad]
    frozen = [p for p in method.model.parameters() if not p.requires_grad]
    starts = [p.clone() for p in trained]
    assert {p.data_ptr() for p in frozen} == {p.data_ptr() for p in base.parameters()}
    method.steps([steps.random_batch(2, 12, 768)] * 2)
    assert all(torch.equal(a, b) for a, b in zip(before, base.parameters()))
    assert all(not torch.equal(a, b) for a, b in zip(starts, trained))
    assert bool(trained) == (name != "floor")


def test_an_undone_choice_computes_what_ours_does_without_dropout(monkeypatch):
    monkeypatch.setattr(steps, "DROPOUT", 0.0)
    base = steps.random_base(parts.SMALL)
    found = []
    for make in (parts.METHODS[steps.OURS], *steps.VARIANTS.values()):
        torch.manual_seed(0)
        method = make(base)
        method.steps([steps.random_batch(2, 12, 768)] * 3)
        found.append([p.detach() for p in method.model.parameters() if p.requires_grad])
    for other in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0], other))


def test_rounds_go_through_all_works_in_turn_and_end_with_the_budget():
    calls = []
    works = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert [len(v) for v in steps.time_rounds(works, 3).values()] == [3, 3]
    assert calls == ["a", "b"] * 3
    assert [len(v) for v in steps.time_rounds(works, 3, budget=0).values()] == [1, 1]
    assert steps.time_ratios({"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, "a")["b"] == 2


def test_dollys_lengths_rounded_up_to_64_keep_their_records():
    rows = parts.dolly_batches(parts.FULL.dolly, 1024)
    lengths = [len(s.ids) - 1 for batch in rows for s in batch]
    assert len(rows) == parts.FULL.dolly and max(lengths) <= 1024 and len(set(lengths)) > 6
    assert all(len(batch) * (len(batch[0].ids) - 1) <= 1024 for batch in rows)
    assert steps.positions(rows) == sum(lengths)
    longer = [s for batch in parts.rounded_up(rows) for s in batch]
    for exact, up in zip([s for batch in rows for s in batch], longer, strict=True):
        assert (len(up.ids) - 1) % 64 == 0 and len(up.ids) - len(exact.ids) < 64
        assert up.ids[:len(exact.ids)] == exact.ids and up.response_start == exact.response_start


def test_a_named_region_is_not_counted_as_a_kernel():
    kinds = torch.autograd.DeviceType
    events = [SimpleNamespace(device_type=kind, is_user_annotation=named, name=name)
              for kind, named, name in ((kinds.CPU, False, "aten::mm"), (kinds.CUDA, False, "gemm"),
                                        (kinds.CUDA, True, "Optimizer.step#AdamW.step"))]
    assert [event.name for event in parts.kernels(events)] == ["gemm"]


def test_a_profiler_that_sees_no_kernel_is_a_note():
    report = parts.Report()
    args = SimpleNamespace(args=SimpleNamespace(vocab_size=9))
    method = SimpleNamespace(model=args, step=lambda batch: torch.ones(3) + 1)
    parts.profile(report, method, [], "cuda")  # on a CPU nothing has a time of a GPU
    assert not report.content["tables"] and "sees no kernels" in report.content["notes"][0]


def test_the_drawn_prompts_are_as_many_as_asked_and_share_a_subjects_shots():
    subjects = parts.drawn_prompts(57, 1000, (380, 520), 32000)
    assert len(subjects) == 57 and sum(map(len, subjects)) == 1000
    assert all(401 <= len(p.ids) <= 651 for prompts in subjects for p in prompts)
    for prompts in subjects:
        assert len(os.path.commonprefix([p.ids for p in prompts])) >= 380


# ---------------------------------------------------------------- the other commands


@pytest.mark.slow
def test_the_benchmark_measures_every_part(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(benchmark, "LENGTHS", (8, 16))
    monkeypatch.setattr(benchmark, "PRODUCT", 64)
    monkeypatch.setitem(benchmark.SMOL, "vocab_size", 1000)
    monkeypatch.setattr(nn.Module, "compile", lambda module, backend: None)
    assert benchmark.main([
        "--parts", ",".join(benchmark.PARTS), "--repeats", "1", "--layers", "1", "--tokens", "8",
        "--data", str(WORLD / "val.jsonl"), "--tokenizer", TOKENIZER, "--batch-size", "2",
        "--batches", "2", "--json", str(tmp_path / "b.json"),
        "--picture", str(tmp_path / "growth.svg")]) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["conditions"]["weights"] > 1e6
    assert found["seconds"].keys() == set(benchmark.PARTS) - {"memory"}
    assert found["tables"].keys() > {"heads", "rank", "length", "where a step's time goes",
                                     "Dolly's lengths, batches of 2"}
    assert "<svg" in (tmp_path / "growth.svg").read_text()
    assert "over the floor" in capsys.readouterr().out


def test_one_layer_keeps_little_more_for_many_heads():
    one = parts.kept_bytes(1)
    assert one < parts.kept_bytes(8) <= 1.5 * one


@pytest.mark.parametrize("shards", ["1", "2"])
def test_the_random_checkpoint_is_written_loaded_and_trained(tmp_path, shards, capsys):
    out = str(tmp_path / "random")
    for command in (["write", "--out", out, "--shards", shards, "--layers", "1", "--dim", "128",
                     "--tokenizer", TOKENIZER],
                    ["load", "--weights", out], ["step", "--weights", out, "--tokens", "8"]):
        assert random_checkpoint.main(command) == 0
    text = capsys.readouterr().out
    assert f"load: {shards} shards" in text and "8 tokens, loss" in text
    model, _ = load_llama(out)
    assert model.output.weight.dtype == torch.bfloat16
    assert 0.015 < model.output.weight.float().std() < 0.025


@pytest.mark.slow
def test_the_masks_are_compared_on_the_world(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.WORLD_RECIPE, "keep_data", None)
    read, project = train.load_train_val, HydraLinear.project
    monkeypatch.setattr(train, "load_train_val", lambda *paths, **settings: tuple(
        part[:8] for part in read(*paths, **settings)))
    assert compare_dropout.main(["--dropout", "0.2", "--max-steps", "1", "--seeds", "1"]) == 0
    *_, on_ax, on_x = capsys.readouterr().out.splitlines()
    assert on_ax.startswith("mask on A x") and on_x.startswith("mask on x")
    assert on_ax.split()[-1] != on_x.split()[-1] and HydraLinear.project is project
