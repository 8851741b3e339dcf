"""experiments/: every script at a tiny size, the statistics against slow twins, the rules."""

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval_mmlu
import train
from data.corpus import encode_records, read_records, train_val_split, without_duplicates
from experiments import (
    choices,
    collapse,
    common,
    figure2,
    figure3,
    heads,
    mechanism,
    real_model,
    report,
    retention,
    routing,
    table1,
)
from hydralora import add_hydralora, hydra_layers, record_gates
from model import load_llama, save_llama
from support import evaluation, files
from support.device import autocast
from support.lock import file_lock
from tests.conftest import ROOT, WORLD, status_of, tiny_model

FAMILIES = ("tavi", "calendar", "arithmetic", "code")
SWEPT = ["--rates", "4e-3", "--jobs", "1"]
SCRIPTS = {"table1": (table1, [*SWEPT, "--scaling", "constant", "--quiz", "QUIZ"]),
           "heads": (heads, [*SWEPT, "--heads", "1", "2"]),
           "figure2": (figure2, [*SWEPT, "--total", "12", "--families", "2", "4", "--seeds", "5"]),
           "figure3": (figure3, [*SWEPT, "--families", "tavi", "code", "--rank", "8"]),
           "retention": (retention, ["--keep-data", "KEEP", "--rates", "4e-3", "8e-3"]),
           "routing": (routing, SWEPT), "collapse": (collapse, ["--every", "1"]),
           "mechanism": (mechanism, ["--steps", "3"]),
           "choices": (choices, ["--rates", "4e-3", "--part", "gate", "d"])}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny random model, 48 training and 16 validation records of four families, a quiz of four
    questions, and the folder that the tests share their runs in."""
    folder = tmp_path_factory.mktemp("claims")
    save_llama(tiny_model(), WORLD / "base" / "tokenizer.model", folder / "weights")
    for name, count in (("train", 12), ("val", 4)):
        records = read_records(WORLD / f"{name}.jsonl")
        chosen = [record for family in FAMILIES
                  for record in common.of_families(records, [family])[:count]]
        text = "".join(json.dumps(record) + "\n" for record in chosen)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    texts = "".join(json.dumps({"text": record["response"]}) + "\n" for record in chosen[:8])
    (folder / "keep.jsonl").write_text(texts, encoding="utf-8")
    for part in ("dev", "test"):
        source = min((WORLD / "quiz" / part).glob("*.csv"))
        (folder / "quiz" / part).mkdir(parents=True)
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "quiz" / part / source.name).write_text("".join(lines[:5]), encoding="utf-8")
    return folder


class InProcess:
    """Instead of a child process: the script in this one, a hundred times as fast for two steps."""

    def __init__(self, path, script, *flags, threads=1):
        main = {"train.py": train.main, "eval_mmlu.py": eval_mmlu.main}[script]
        path.parent.mkdir(parents=True, exist_ok=True)
        with (open(f"{path}.log", "w", encoding="utf-8") as log,
              contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(log)):
            self.returncode = status_of(main, flags)

    def poll(self):
        return self.returncode


START_SCRIPT = common.start_script


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    monkeypatch.setattr(common, "start_script", InProcess)


def flags_of(place, out, *more, runs=None):
    """The flags of a run of seconds; later ones win."""
    return ["--weights", str(place / "weights"), "--data", str(place / "train.jsonl"),
            "--val-data", str(place / "val.jsonl"), "--seeds", "2", "--epochs", "1",
            "--max-steps", "2", "--max-seq-len", "128", "--runs", str(runs or place / "runs"),
            "--out", str(out), *more]


def start(name, command):
    """The exit status of a script."""
    script = SCRIPTS[name][0]
    return common.main(name, script.parse_args, script.run, command)


def prepared(place, out, *more, runs=None):
    """(args, training records, validation records)."""
    p = common.parser("test", common.__doc__, seeds=2, epochs=1)
    args = common.parse_args(p, flags_of(place, out, *SWEPT, *more, runs=runs))
    args.scaling = "both"
    return args, *common.load_records(args)


def run_flags(args, config, records, val, rate=4e-3, **more):
    return common.run_flags(args, config, rate=rate, records=records, val=val, **more)


# ---------------------------------------------------------------- what is published


# until they run again: clipped at 1, the lower of two rates within the scatter of two seeds
FORMER_RULES = ("figure2", "figure3", "heads", "quantized", "quantized-dolly", "retention",
                "routing", "table1", "table1-dolly")


@pytest.mark.parametrize("name", sorted(path.stem for path in common.RESULTS.glob("*.json")))
def test_published_results_are_shown_as_written_and_of_the_world_of_now(name):
    """A script whose world or rules have changed runs again, or its results go."""
    readme = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    written = (common.RESULTS / f"{name}.md").read_text(encoding="utf-8")
    section, = [part for part in re.split(r"^### ", readme, flags=re.M) if written in part]
    if not name.startswith("quantized"):  # tables alone
        assert f"(results/{name}.png)" in section and (common.RESULTS / f"{name}.png").exists()
    result = json.loads((common.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    made = result["conditions"]
    if name not in FORMER_RULES:
        assert made["commit"] and made.get("recipe", common.RECIPE) == common.RECIPE
    if name not in ("mechanism", "table1-dolly", "quantized-dolly"):
        assert made["weights"] == files.weights_fingerprint(WORLD / "base")
        assert made["data"] == files.file_fingerprint(WORLD / "train.jsonl")
    assert all(c["fixed_by"] for c in result.get("claims", []) if c["primary"])


def test_a_figure_under_the_former_rules_is_called_so_in_the_readme():
    """The list above and the readme's sentence go together when the last has run again."""
    readme = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    assert ("by the former rules" in readme) == bool(FORMER_RULES)


def test_a_primary_claim_is_one_line_of_its_script():
    """So that git finds the commit which brought it."""
    for name, (script, _) in SCRIPTS.items():
        text = Path(script.__file__).read_text(encoding="utf-8")
        assert name == "collapse" or f'PRIMARY = "{script.PRIMARY}"\n' in text


FINDINGS = {  # row of the README's table: (result, beginning of its claim)
    "Better than one LoRA": [("table1-dolly", "section 3: HydraLoRA 3x8, wq,wv ahead of LoRA r17"),
                             ("table1", "section 3: HydraLoRA 3x8, wq,wv ahead of LoRA r17")],
    "And in the feed-forward": [("table1-dolly", "section 3: HydraLoRA 3x8 ahead of LoRA r18"),
                                ("table1", "section 3: HydraLoRA 3x8 ahead of LoRA r19, matched")],
    "Does it forget less": [("retention", "at equal learning")],
    "Are many small heads": [("heads", "at constant parameters")],
    "Do tasks that contradict": [("mechanism", "linear layer")],
}


@pytest.mark.parametrize("question", FINDINGS)
def test_the_readmes_findings_have_the_p_values_of_the_results(question):
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## What was found\n")[1]
    row, = [line for line in section.splitlines() if line.startswith(f"| {question}")]
    for name, text in FINDINGS[question]:
        claims = json.loads((common.RESULTS / f"{name}.json").read_text())["claims"]
        found = next(c for c in claims if c["claim"].startswith(text))
        p = found.get("p_corrected", found["p"])  # the latter was corrected by the former rules
        assert ("p < 0.001" if p < 0.001 else f"p {p:.3f}") in row


# ---------------------------------------------------------------- the scripts


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_runs_and_again_from_its_runs_to_the_same_bytes(name, place, tmp_path, capsys):
    paths = {"QUIZ": str(place / "quiz"), "KEEP": str(place / "keep.jsonl")}
    more = [paths.get(flag, flag) for flag in SCRIPTS[name][1]]
    command = flags_of(place, tmp_path, *more)
    if name == "mechanism":
        command = ["--seeds", "2", "--rates", "8e-3", "--out", str(tmp_path), *more]
    assert start(name, command) == 0
    written = {end: (tmp_path / f"{name}.{end}").read_bytes() for end in ("json", "md")}
    claims = json.loads(written["json"]).get("claims", [])
    assert {c["verdict"] for c in claims} <= {"ahead", "behind", "equal", "undecided"}
    result = json.loads(written["json"])
    assert result["conditions"]["commit"] == report.code_commit()
    for row in result.get("rows", [])[name == "table1":]:  # not of the base
        assert row["seeds"] == [20, 21]
        assert name == "mechanism" or row["clip"] in (0, 1) and len(row["categories"]) == 4
    for own in result.get("sweep", {}).values():
        assert own["seeds"] == [100, 101, 102] and str(own["rate"]) in own["losses"]
        assert name == "mechanism" or own["clip"] in (0, 1) and own["categories"]
    assert sum(c["primary"] for c in claims) == (name != "collapse")
    assert written["md"].decode() in capsys.readouterr().out
    if all(map(importlib.util.find_spec, ("matplotlib", "sklearn"))):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert start(name, command) == 0
    assert written == {end: (tmp_path / f"{name}.{end}").read_bytes() for end in ("json", "md")}
    out = capsys.readouterr().out
    assert "run 1 of" not in out and " minutes, " not in out
    assert name in ("choices", "collapse", "mechanism") or "0 of them to be computed" in out


def test_without_matplotlib_the_tables_are_written_and_one_line_says_so(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.write_results(argparse.Namespace(out=tmp_path), "x", {"a": 1}, ["text"], print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.md"]
    assert capsys.readouterr().out.count("no picture: matplotlib is not installed") == 1


@pytest.mark.parametrize("flags, message", [
    (["--weights", "w"], "--weights needs --data"), (["--seeds", "0"], "--seeds"),
    (["--epochs", "0"], "--epochs"), (["--sweep-epochs", "0"], "--sweep-epochs"),
    (["--jobs", "0"], "--jobs"), (["--rates", "0"], "--rates"), (["--records", "-1"], "--records"),
])
def test_impossible_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        heads.parse_args(flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("name, flags", [
    ("heads", ["--heads", "0"]), ("routing", ["--heads", "1"]), ("retention", []),
    ("figure2", ["--families", "5"]), ("figure2", ["--total", "4800"]),
    ("figure3", ["--families", "tavi", "absent"])])
def test_what_cannot_be_measured_is_refused(name, flags, place, tmp_path):
    try:
        status = start(name, flags_of(place, tmp_path, *SWEPT, *flags))
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and not list(tmp_path.iterdir())


def test_the_families_compared_by_default_are_the_worlds():
    assert set(figure3.FAMILIES) <= common.families(read_records(WORLD / "val.jsonl"))


# ---------------------------------------------------------------- table 1


def made_up_runs(args, more=True):
    """Runs of table1's methods whose metrics are their number in the list, and the seed."""
    def run(number, seed):
        metrics = {"val_loss": 100.0 - number + seed, "val_loss_base": 100.0,
                   "exact_match": 0.0, "exact_match_base": 0.0}
        if more:
            metrics |= {"quiz": number + seed,
                        "kept": {"loss": 3.0 * number + seed, "loss_base": 1.0}}
        return {"parameters": {"trainable": number, "trainable_without_router": number},
                "settings": {"lr": 1e-3, "clip": 0.0, "seed": seed}, "metrics": metrics}

    return {name: [run(number, 0.0), run(number, 0.25)]
            for number, name in enumerate(table1.methods(args))}


def test_table1_has_every_method_and_compares_it_with_hydralora_on_its_layers(place, tmp_path):
    args, _, _ = prepared(place, tmp_path)
    args.quiz = None
    configs, runs = table1.methods(args), made_up_runs(args)
    assert len(configs) == 18
    for name, config in configs.items():
        assert (config.get("targets") == "wq,wv") == name.endswith(", wq,wv")
        assert "rank" not in config or config["alpha"] in (4 * config["rank"], 32)
        assert config.get("alpha") == 32 or not name.endswith(", alpha 32")
    base, *rows = table1.make_rows(args, runs)
    assert base["trainable"] == 0 and "quiz" not in base and base["kept"]["mean"] == 1
    assert [row["name"] for row in rows] == list(configs)
    for row in rows:
        suffix = ", wq,wv" if row["name"].endswith(", wq,wv") else ""
        if row["name"] == table1.HYDRA + suffix:
            assert row["difference"] is None
        else:
            pairs = zip(common.values(runs[row["name"]]),
                        common.values(runs[table1.HYDRA + suffix]))
            assert row["difference"]["values"] == [a - b for a, b in pairs]


def swept(args):
    """A sweep of table1's methods that is lowest at 2e-3 plus their number."""
    return {name: common.sweep_result({rate: [abs(math.log2(rate / 2e-3) - number / 100)] * 3
                                       for rate in (1e-3, 2e-3, 4e-3)})
            for number, name in enumerate(table1.methods(args))}


def test_claims_pair_methods_and_are_positive_for_the_better_one(place, tmp_path):
    """The losses are in the order of the methods."""
    args, _, _ = prepared(place, tmp_path)
    runs = made_up_runs(args)
    order = list(runs)
    found = {c["claim"]: c for c in table1.make_claims(args, runs, swept(args))}
    assert len(found) == 19 and not any("quiz" in text for text in found)
    attention = table1.matched_lora(args, targets="wq,wv")[0] + table1.ATTENTION
    primary = found.pop(table1.PRIMARY)
    assert primary["primary"] and primary["difference"]["mean"] == order.index(
        table1.HYDRA + table1.ATTENTION) - order.index(attention)
    assert found.pop(table1.RATE)["difference"]["mean"] > 0
    assert found.pop(table1.CUE)["difference"] is None  # not these families
    for text, claim in found.items():
        kind, pair = text.split(": ")
        better, worse = pair.split(" ahead of ")
        sign = -3 if kind == "kept" else 1
        mean = claim["difference"]["mean"]
        assert mean == pytest.approx(sign * (order.index(better) - order.index(worse)))
        assert (", wq,wv" in worse) == (", wq,wv" in better)
        assert (", clip 1" in worse) == (", clip 1" in better)
    args.scaling = "constant"
    without = table1.make_claims(args, made_up_runs(args, more=False), swept(args))
    assert len(without) == 13 and not any("kept" in c["claim"] for c in without)


def test_robustness_is_what_twice_the_rate_costs_in_percent(place, tmp_path):
    args, _, _ = prepared(place, tmp_path)
    runs = made_up_runs(args)
    matched = table1.matched_lora(args)[0]
    for name, rise in ((matched, 1.5), (table1.HYDRA, 1.2)):
        runs[name + table1.TWICE] = [
            {"metrics": {"val_loss": rise * loss}} for loss in common.values(runs[name])]
    claim, = [c for c in table1.make_claims(args, runs, swept(args)) if "robust" in c["claim"]]
    assert claim["difference"]["values"] == pytest.approx([30, 30]) and claim["percent"] is None


def test_the_gain_of_cued_families_is_compared_with_that_of_the_others():
    def run(cued, other):
        losses = {**dict.fromkeys(table1.CUED, cued), "code": other, "tavi": other}
        return {"metrics": {"val_loss": 1, "categories": {
            name: {"val_loss": loss} for name, loss in losses.items()}}}

    stat = table1.cue_gain([run(2, 2), run(2, 2)], [run(1, 1.5), run(1, 2)])
    assert stat["values"] == [25, 50]


def test_a_uniform_gate_trains_as_one_lora_of_its_rank(place, tmp_path):
    """So it is called LoRA r8. With clipping they would differ: each B_i has a third of the
    gradient."""
    args, records, val = prepared(place, tmp_path, "--max-steps", "20", "--epochs", "9")
    flags = {name: run_flags(args, config, records, val) for name, config in (
        ("uniform", common.hydra(3, gate="uniform")), ("lora", common.lora(8)))}
    runs = common.run_all(flags, args)
    losses = {name: run["metrics"]["val_loss"] for name, run in runs.items()}
    assert losses["uniform"] == pytest.approx(losses["lora"], rel=1e-4)


# ---------------------------------------------------------------- data and the sweep


def test_the_scripts_on_the_whole_mix_would_train_alike():
    """With other defaults heads and routing would share no run with table1."""
    asked = [script.parse_args([]) for script in (table1, heads, routing, retention)]
    for key in ("records", "epochs", "max_steps", "max_seq_len", "weights", "data", "val_data",
                "keep_data"):
        assert len({str(getattr(args, key)) for args in asked}) == 1
    assert asked[0].records == common.MIXED
    for args in asked[1:3]:  # retention sweeps nothing
        assert (args.sweep_epochs, args.rates) == (asked[0].sweep_epochs, asked[0].rates)


def test_records_are_drawn_and_without_validation_data_a_tenth_is_held_out(place):
    p = common.parser("test", common.__doc__, seeds=1, epochs=1)
    records, val = common.load_records(common.parse_args(p, [
        "--weights", str(place / "weights"), "--data", str(place / "train.jsonl"),
        "--records", "20"]))
    assert (len(records), len(val)) == (18, 2)
    whole = read_records(place / "train.jsonl")
    assert all(record in whole for record in records + val)
    assert not [record for record in records if record in val]


def test_without_paths_the_data_are_those_of_train_py():
    args = common.parse_args(common.parser("test", common.__doc__, seeds=1, epochs=1), [])
    expected = train.parse_args([])
    [expected.data] = expected.data
    for name in common.PATHS:
        assert getattr(args, name) == getattr(expected, name)
    records, val = common.load_records(args)
    assert val == read_records(WORLD / "val.jsonl")
    assert records == without_duplicates(read_records(WORLD / "train.jsonl"), val)


def test_no_learning_rate_is_chosen_by_the_validation_set(place, tmp_path, monkeypatch):
    """Every run of the sweep trains and is measured on training records alone, the same for all
    methods; the validation set is read by the other runs only."""
    asked = []

    def run_all(runs, args, **_):
        asked.append(list(runs.values()))
        return {key: {"metrics": {"val_loss": flags["lr"], "exact_match": 0.0},
                      "settings": {**flags, "heads": flags.get("heads", 1)},
                      "parameters": {"trainable": 1, "trainable_without_router": 1}}
                for key, flags in runs.items()}

    monkeypatch.setattr(common, "run_all", run_all)
    monkeypatch.setattr(common, "rerun", lambda *_: {"arm": "", "runs": 0, "threads": 2,
                                                     "moved": {}})
    command = flags_of(place, tmp_path, "--heads", "1", "2", "--rates", "4e-3", "8e-3")
    assert start("heads", [*command, "--epochs", "3", "--sweep-epochs", "2"]) == 0
    sweeps, last = asked[:-1], asked[-1]
    known, validation = (read_records(place / f"{name}.jsonl") for name in ("train", "val"))
    assert len(sweeps) == 1 + common.WIDEN  # the best was always the lowest
    swept = sum(sweeps, [])
    (data, held_out), = {(flags["data"], flags["val_data"]) for flags in swept}
    training, held_out = read_records(data), read_records(held_out)
    assert all(r in known and r not in validation for r in training + held_out)
    assert not [r for r in held_out if r in training] and len(held_out) == 5
    assert {(flags["epochs"], flags["seed"]) for flags in swept} == {
        (2, seed) for seed in (100, 101, 102)}
    assert {(flags["epochs"], flags["lr"]) for flags in last} == {(3, 0.0005)}
    assert all(read_records(flags["val_data"]) == validation for flags in last)
    assert all(read_records(flags["data"]) == known for flags in last)


def test_the_sweep_widens_at_an_edge_and_stops_inside():
    def measure_around(best):
        return lambda asked: {(name, rate): [abs(math.log2(rate / best[name]))]
                              for name, rate in asked}

    best = {"inside": 2.83e-3, "above": 1.13e-2, "below": 1e-5}
    tried = common.sweep(best, common.RATES, measure_around(best))
    assert sorted(tried["inside"]) == [2e-3, 2.83e-3, 4e-3, 5.66e-3]
    assert sorted(tried["above"]) == [2.83e-3, 4e-3, 5.66e-3, 8e-3, 1.13e-2, 1.6e-2]
    assert common.best_rate(tried["above"]) == 1.13e-2
    assert sorted(tried["below"])[:6] == [3.54e-4, 5e-4, 7.07e-4, 1e-3, 1.41e-3, 2e-3]
    assert len(tried["below"]) == 3 + common.WIDEN
    for rates, widen in (([4e-3], 6), (common.RATES, 0)):
        tried = common.sweep(["one"], rates, measure_around({"one": 1}), widen)
        assert sorted(tried["one"]) == sorted(rates)
    for rates in (common.RATES, mechanism.RATES):
        assert all(b / a == pytest.approx(2 ** 0.5, rel=5e-3) for a, b in zip(rates, rates[1:]))


def test_the_rate_of_the_lowest_mean_is_used_and_a_diverged_seed_loses():
    """No rate is preferred for being low: that rule moved LoRA alone (docs/log.md)."""
    assert common.best_rate({1: [5.0, 5.0], 2: [3.0, 3.2], 4: [2.9, 3.1]}) == 4
    assert common.best_rate({2: [2.9, 3.1], 4: [math.inf, 2.0]}) == 2


def test_no_seed_that_chooses_a_rate_is_reported():
    args = common.parse_args(common.parser("test", common.__doc__, seeds=5, epochs=1), [])
    reported = range(args.first_seed, args.first_seed + args.seeds)
    assert len(common.sweep_seeds()) >= 3 and not set(reported) & set(common.sweep_seeds())
    assert not set(reported) & set(range(15))  # those of earlier results and readings


def test_the_first_run_has_the_first_seed(place, tmp_path):
    args, records, val = prepared(place, tmp_path, "--first-seed", "40")
    assert run_flags(args, common.lora(8), records, val)["seed"] == 40


def test_the_best_rate_of_a_seed_is_read_off_a_parabola():
    def losses(*best):
        return {rate: [math.log2(rate / b) ** 2 for b in best]
                for rate in (1e-3, 2e-3, 4e-3, 8e-3)}

    found = common.lowest_between(losses(2e-3, 3e-3))
    assert found == pytest.approx([2e-3, 3e-3], rel=1e-6)
    assert common.lowest_between(losses(2e-3, 9e-3)) is None  # at an edge
    tried = {"a": {"losses": losses(4e-3, 3e-3)}, "b": {"losses": losses(2e-3, 2e-3)}}
    assert common.rate_ratio(tried, "a", "b")["values"] == pytest.approx([1, math.log2(1.5)])


def test_a_rate_that_diverges_loses_and_any_other_error_ends_the_script(
        place, tmp_path, monkeypatch):
    args, records, val = prepared(place, tmp_path, "--rates", "4e-3", "0.9",
                                  runs=tmp_path / "runs")
    run, arms = train.run, {"lora": (common.lora(2), [records])}

    def diverges(settings):
        if settings.lr > 0.5:
            Path(settings.out).mkdir(parents=True)
            raise ValueError("step 3: loss nan, gradient norm nan on line 1 of the training data")
        return run(settings)

    def fails(settings):
        raise ValueError("bad input")

    monkeypatch.setattr(train, "run", diverges)
    tried = common.tune(arms, args)
    assert tried["lora"]["losses"][0.9] == [math.inf] * 3 and tried["lora"]["rate"] < 0.1
    assert "diverged" in common.rates_table(tried)
    with pytest.raises(ValueError, match="diverged at the rate.*gradient norm nan"):
        common.run_methods({"lora": common.lora(2)}, {"lora": 0.9}, args, records, val)
    args.rates = [0.8, 0.9]
    with pytest.raises(ValueError, match="diverged at every rate"):
        common.tune(arms, args)
    monkeypatch.setattr(train, "run", fails)
    with pytest.raises(ValueError, match="bad input"):
        common.tune({"lora": (common.lora(3), [records])}, args)


# ---------------------------------------------------------------- the kept runs


def test_a_run_is_found_by_its_flags_and_content_and_not_by_path(place, tmp_path):
    args, records, val = prepared(place, tmp_path, runs=tmp_path / "runs")

    def folder(config=common.lora(8), records=records, val=val, **more):
        return common.run_folder(run_flags(args, config, records, val, **more), args.runs)

    known = {folder(), folder(config=common.lora(16)), folder(config=common.hydra(3)),
             folder(rate=2e-3), folder(seed=1), folder(epochs=2), folder(records=records[1:]),
             folder(val=val[1:])}
    assert len(known) == 8
    shutil.copytree(args.weights, tmp_path / "weights")
    args.weights = str(tmp_path / "weights")
    assert folder() in known
    save_llama(tiny_model(seed=1), WORLD / "base" / "tokenizer.model", tmp_path / "weights")
    assert folder() not in known


def test_a_later_flag_of_train_py_renames_no_run(place, tmp_path):
    """The name is golden. A flag is in it if a script gives it, and then at any value."""
    args, records, val = prepared(place, tmp_path)
    args.weights = str(WORLD / "base")

    def name(**more):
        flags = run_flags(args, common.hydra(3, gate="uniform"), records, val, **more)
        return common.run_folder(flags, tmp_path).name

    golden = "hydralora-c93f0e0861994a07"
    assert name() == name(top_k=None) == golden
    assert len({golden, name(clip=1.0), name(clip=0.5)}) == 3


def test_a_value_is_computed_once_and_read_as_it_was_written(tmp_path):
    path = tmp_path / "value.json"
    assert common.cached(path, lambda: {1: 2}) == {"1": 2}
    assert common.cached(path, lambda: pytest.fail("computed again")) == {"1": 2}


@pytest.mark.slow
def test_a_stopped_script_ends_its_processes_and_continues_to_the_same_table(place, tmp_path):
    def command(name):
        return flags_of(place, tmp_path / name, *SWEPT, "--heads", "1", "--seeds", "1",
                        "--max-steps", "100", "--epochs", "20", "--sweep-epochs", "20",
                        runs=tmp_path / f"{name}-runs")

    script = subprocess.Popen([sys.executable, "-m", "experiments.heads", *command("stopped")],
                              cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("stopped-runs/*/log.csv")) and script.poll() is None:
        time.sleep(0.1)
    script.terminate()
    assert "the same command continues" in script.communicate(timeout=60)[1]
    assert script.returncode == 143 and not (tmp_path / "stopped").exists()
    for path in tmp_path.glob("stopped-runs/*/log.csv"):
        with file_lock(path.parent / ".lock", path.parent):  # or its process would hold it
            assert not (path.parent / "unfinished.tmp").exists()
    for name in ("stopped", "whole"):
        assert start("heads", command(name)) == 0
    a, b = (tmp_path / name / "heads.json" for name in ("stopped", "whole"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.slow
def test_several_processes_give_what_this_one_gives_and_report_why_a_run_fails(
        place, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "start_script", START_SCRIPT)
    args, records, val = prepared(place, tmp_path, runs=tmp_path / "runs")
    flags = {seed: run_flags(args, common.hydra(2), records, val, seed=seed) for seed in range(2)}
    args.jobs = 2
    with pytest.raises(ValueError, match="train.py: --rank 999 is more than"):
        common.run_all({**flags, "bad": run_flags(args, common.lora(999), records, val)}, args)
    several = common.run_all(flags, args)
    again = common.rerun("HydraLoRA", list(several.values()), args)
    assert {run["versions"]["threads"] for run in several.values()} == {1}
    rerun = [files.read_json(f"{run['folder']}-2threads/run.json") for run in several.values()]
    assert {run["versions"]["threads"] for run in rerun} == {common.THREADS}
    moved = [a - b for a, b in zip(common.values(several.values()), common.values(rerun))]
    assert again["moved"]["val_loss"]["scatter"] == pytest.approx(
        math.sqrt(sum(m * m for m in moved) / 2))
    assert "Rerunning HydraLoRA with 2 threads" in common.rerun_text(again)
    monkeypatch.setattr(common, "start_script", InProcess)
    args.runs = tmp_path / "others"
    for seed, run in common.run_all(flags, args).items():
        assert run["metrics"] == several[seed]["metrics"]
        a, b = (torch.load(found["folder"] / "adapter.pt", weights_only=True)["tensors"]
                for found in (run, several[seed]))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_quiz_of_a_run_is_that_of_its_own_weights(place, tmp_path):
    args, records, val = prepared(place, tmp_path)
    runs = common.run_all({config["method"]: run_flags(args, config, records, val)
                           for config in (common.lora(2), common.FULL)}, args, quiz=place / "quiz")
    for method, weights in (("lora", args.weights), ("full", runs["full"]["folder"])):
        out = tmp_path / f"{method}.json"
        flags = ["--weights", weights, "--data", place / "quiz", "--shots", "0", "--out", out]
        if method == "lora":
            flags += ["--adapter", runs["lora"]["folder"] / "adapter.pt"]
        assert status_of(eval_mmlu.main, flags) == 0
        assert files.read_json(out)["accuracy"] == runs[method]["metrics"]["quiz"]


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30])
@pytest.mark.parametrize("t", [0.0, 0.7, 2.5, 6.0])
def test_students_p_is_what_the_density_leaves_outside(freedom, t):
    """A slow twin: Simpson's rule over Student's density from 0 to t."""
    norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(
        freedom * math.pi)

    def density(x):
        return norm * (1 + x * x / freedom) ** (-(freedom + 1) / 2)

    h, n = t / 2000, 2000
    inside = h / 3 * sum(density(i * h) * (1 if i in (0, n) else 4 if i % 2 else 2)
                         for i in range(n + 1))
    assert report.student_p(t, freedom) == pytest.approx(1 - 2 * inside, abs=1e-9)
    assert report.student_p(-t, freedom) == report.student_p(t, freedom)


def test_intervals_and_paired_differences_by_hand():
    found = report.interval([1.0, 2.0, 3.0])  # s = 1: half is 4.3027 / sqrt(3)
    assert found["mean"] == 2 and found["high"] - 2 == pytest.approx(2.48414, abs=1e-4)
    assert found["low"] == pytest.approx(-0.48414, abs=1e-4)
    # far apart from seed to seed, yet B is ahead by 0.1, 0.2, 0.3 each time: s = 0.1
    pair = report.difference([1.1, 5.2, 9.3], [1.0, 5.0, 9.0])
    assert pair["mean"] == pytest.approx(0.2) and pair["low"] == pytest.approx(-0.04841, abs=1e-4)
    assert report.interval([7.0]) == {"mean": 7.0, "low": None, "high": None, "values": [7.0]}
    with pytest.raises(ValueError, match="paired"):
        report.difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize("better, expected", [
    ([1.0, 1.1, 0.9], "ahead"), ([3.0, 3.1, 2.9], "behind"), ([1.9, 1.9, 1.9], "ahead"),
    ([2.01, 1.99, 2.0], "equal"), ([2.3, 1.6, 2.1], "undecided"), ([1.0], "undecided")])
def test_a_verdict_is_a_difference_found_or_an_equality_found_or_undecided(better, expected):
    stat = report.loss_difference([2.0] * len(better), better)
    claim, = report.judge({"x": stat}, None, __file__)
    assert claim["verdict"] == expected
    found = len(better) > 1 and not stat["low"] <= 0 <= stat["high"]
    assert (claim["p"] < 0.05) == found
    assert claim["percent"]["mean"] == pytest.approx(100 * stat["mean"] / 2)
    word = "equal within 3 %" if expected == "equal" else expected
    assert f"| {word} " in report.claims_text([claim])


def test_equality_is_two_one_sided_tests():
    """They agree with the 90 % interval lying within the margin, and know no other unit."""
    for values in ([1.0, -1.0, 0.5, 2.0], [2.0, 2.5, 2.9, 2.2], [3.5, 3.6, 3.4, 3.5], [2.9, -2.9]):
        stat = report.interval(values)
        half = report.standard_error(stat) * report.student_quantile(len(values) - 1, 0.1)
        inside = -3 < stat["mean"] - half and stat["mean"] + half < 3
        assert (report.equality_p(stat) < 0.05) == inside
        assert report.equality_p(report.interval([-v for v in values])) == pytest.approx(
            report.equality_p(stat))
    assert report.equality_p(report.interval([1.0])) == report.equality_p(None) == 1
    bits = report.difference([0.2, 0.2, 0.21], [0.2, 0.21, 0.2])
    claim, = report.judge({"x": bits}, None, __file__)
    assert claim["verdict"] == "undecided" and claim["margin"] is claim["percent"] is None


def test_equality_is_corrected_for_the_number_of_claims_too():
    percent = report.loss_difference([2.0] * 4, [2.05, 1.97, 2.03, 2.0])
    p = report.equality_p(percent["percent"])
    assert 0.02 < p < 0.05
    alone, = report.judge({"x": percent}, None, __file__)
    assert alone["verdict"] == "equal"
    bits = report.difference([0.2] * 4, [0.21, 0.2, 0.2, 0.19])  # of which it is not asked
    claims = report.judge({"x": percent, "y": percent, "z": percent, "b": bits}, "z", __file__)
    assert [c["verdict"] for c in claims] == ["undecided", "undecided", "equal", "undecided"]
    assert claims[0]["p_equal_corrected"] == pytest.approx(2 * p)


def test_power_is_what_draws_of_that_difference_are_found_with():
    """A slow twin: of 2,000 drawn samples of that mean, four of five are significant."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 8, generator=generator, dtype=torch.float64)
    seen = report.detectable(report.interval([-1.0, 1.0] * 4)) / report.statistics.stdev(
        [-1.0, 1.0] * 4)
    found = sum(report.p_value(report.interval((row + seen).tolist())) < 0.05 for row in noise)
    assert found / 2000 == pytest.approx(0.8, abs=0.04)


def test_holms_correction_by_hand():
    assert report.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert report.holm([0.5, 0.9]) == [1, 1] and report.holm([]) == []
    assert report.holm([0.02]) == [0.02]  # alone there is nothing to correct


def test_only_secondary_claims_are_corrected():
    stat = report.interval([0.3, 1.0, 1.4, 0.5])
    p = report.p_value(stat)
    assert 0.02 < p < 0.05
    claims = report.judge({"a": stat, "b": stat, "c": stat, "d": None}, "a", "absent.py")
    assert [c["p"] for c in claims] == pytest.approx([p, p, p, 1])
    assert [c["p_corrected"] for c in claims] == pytest.approx([p, 3 * p, 3 * p, 1])
    assert [c["verdict"] for c in claims] == ["ahead", *["undecided"] * 3]
    assert [c["primary"] for c in claims] == [True, False, False, False]
    assert "primary: a" in report.claims_text(claims)
    assert "was not committed before the run" in report.claims_text(claims)


def test_results_name_the_commit_that_brought_the_primary_claim(tmp_path):
    def git(*words):
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)

    script = tmp_path / "script.py"
    try:
        git("init")
    except OSError:
        pytest.skip("no git")
    for content in ('PRIMARY = "one"', 'PRIMARY = "two"', 'PRIMARY = "two"\nprint(1)'):
        script.write_text(content)
        git("add", "script.py")
        git("commit", "-m", content)
    second = git("rev-parse", "HEAD~1").stdout
    assert report.fixed_by(script, "two") == second[:10]
    script.write_text('PRIMARY = "three"')
    assert report.fixed_by(script, "three") is None  # in no commit yet
    assert report.fixed_by(tmp_path / "absent.py", "two") is None


def test_tables_line_up_and_numbers_are_shown_with_their_intervals():
    table = report.markdown(["a", "long name"], [[1234, "x"], [None, 0.001]])
    assert table == ("| a     | long name |\n|-------|-----------|\n| 1,234 | x         |\n"
                     "| -     | 0.001     |")
    stat = {"mean": 0.5, "low": 0.25, "high": 0.75}
    assert report.show(stat) == report.cell(stat) == "0.5000 ± 0.2500" and report.show(None) == "-"
    assert report.show(stat, percent=True) == "50.0 ± 25.0 %"
    assert report.show(stat, 2, sign="+") == "+0.50 ± 0.25"
    assert report.show(report.interval([1.0])) == "1.0000"
    assert report.finite({1: [math.inf, 2.0]}) == {"1": [None, 2.0]}


def test_matched_ranks_have_the_parameters_of_hydralora_router_included():
    args = common.parse_args(common.parser("test", common.__doc__, seeds=1, epochs=1), [])
    model = tiny_model(dim=128, n_layers=6, multiple_of=32)
    assert common.count_trainable(args, 3, 8) == add_hydralora(model, rank=8, heads=3)
    assert common.matched_rank(args, 3) == 8
    for heads_, targets in ((1, None), (2, None), (8, None), (1, "wq,wv")):
        wanted = common.count_trainable(args, 3, 8, targets)
        rank = common.matched_rank(args, heads_, targets=targets)
        off = {r: abs(common.count_trainable(args, heads_, r, targets) - wanted)
               for r in (rank - 1, rank, rank + 1) if r > 0}
        assert min(off.values()) == off[rank]


# ---------------------------------------------------------------- figure2, figure3, mechanism


def test_families_are_dealt_once_and_corpora_have_one_size(place):
    records = read_records(place / "train.jsonl")
    for size in (1, 2, 4):
        groups = figure2.deal(FAMILIES, size, seed=3)
        assert sorted(sum(groups, [])) == sorted(FAMILIES)
        for group in groups:
            chosen = figure2.corpus(records, group, 12, seed=3)
            assert len(chosen) == 12 and common.families(chosen) == set(group)
    assert figure2.deal(FAMILIES, 2, seed=0) != figure2.deal(FAMILIES, 2, seed=1)
    with pytest.raises(ValueError, match="--total"):
        figure2.corpus(records, ["tavi"], 13, seed=0)
    for count, sizes in ((1, [1]), (2, [1, 2]), (8, [1, 4, 8]), (9, [1, 3, 9]), (11, [1, 11])):
        assert figure2.sizes(count) == sizes and not [n for n in sizes if count % n]


def test_growth_is_claimed_from_five_seeds_on():
    for seeds, claimed in ((4, 0), (5, 4)):
        losses = {(name, size): [0.1 * size + 0.01 * seed for seed in range(seeds)]
                  for name in ("full", *figure2.LINES) for size in (1, 8)}
        claims = figure2.make_claims(losses, [1, 8], seeds)
        assert sum("grows" in c["claim"] or "wider" in c["claim"] for c in claims) == claimed
        assert len(claims) == claimed + 2


def test_the_experiments_know_the_a_and_the_router_that_a_run_started_from(place, tmp_path):
    """At the first step only B has a gradient, so a run of one step ends with the others."""
    args, records, val = prepared(place, tmp_path, "--max-steps", "1")
    run = common.run_all({0: run_flags(args, common.hydra(3), records, val, seed=1000)}, args)[0]
    found = figure3.matrices(run)
    assert all(torch.equal(found["a"][name], found["start"][name]) for name in found["a"])
    assert any(found["b"][name].any() for name in found["b"])
    assert figure3.mean_over([found, found], "a", figure3.overlap) == pytest.approx(1)
    layers = hydra_layers(common.trained_model(run)[0])
    with torch.no_grad():
        for layer in layers.values():
            layer.router.mul_(5)
    routers = routing.untrained_routers(run, layers)
    for name, layer in layers.items():
        assert torch.allclose(5 * routers["as drawn"][name], layer.router)
        assert torch.allclose(routers["of the trained norm"][name], layer.router)


def test_the_overlap_of_row_spaces_knows_no_basis():
    a, b = torch.randn(2, 4, 40, generator=torch.Generator().manual_seed(0))
    change = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    assert figure3.overlap([change @ a, a]) == pytest.approx(1, abs=1e-5)
    assert abs(evaluation.mean_cosine(torch.stack([change @ a, a]))) < 0.9
    assert figure3.overlap([change @ a, b]) == pytest.approx(figure3.overlap([a, b]), abs=1e-5)
    assert figure3.overlap([a.T, b.T]) == pytest.approx(figure3.overlap([a, b]))
    assert figure3.overlap([a, a, b]) == pytest.approx((1 + 2 * figure3.overlap([a, b])) / 3)
    many = torch.randn(200, 2, 4, 40, generator=torch.Generator().manual_seed(2))
    assert sum(map(figure3.overlap, many)) / 200 == pytest.approx(4 / 40, abs=0.01)
    assert figure3.overlap([torch.eye(4)[:2], torch.eye(4)[1:3]]) == pytest.approx(0.5)


@pytest.mark.parametrize("layer", mechanism.LAYERS)
def test_the_toys_lora_has_the_size_of_its_hydralora(layer):
    sizes = [mechanism.new_model(layer, *shape)[1] for shape in mechanism.methods(layer).values()]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_one_linear_map_for_contradicting_tasks_leaves_most_of_them_unexplained():
    """An eighth of the update is what the mean of eight maps explains; heads have no such end."""
    left = {heads: mechanism.unexplained("linear", "contradict", (heads, rank), 1.13e-2, 50, 150)
            for heads, rank in ((8, 2), (1, 13))}
    assert left[1] > 0.8 and left[8] < 0.2


def test_zero_router_and_zero_b_leave_copies_and_a_random_router_does_not(place, tmp_path):
    args, records, val = prepared(place, tmp_path, "--max-steps", "0")
    flags = run_flags(args, common.hydra(3), records, val, epochs=4)
    zero, random = (collapse.watch(flags, records, start, every=4)
                    for start in ("router 0, B 0", "router random, B 0"))
    assert zero["apart"][-1] == 0 and zero["steps"] == [1, 5, 9, 13, 17, 21, 24]
    assert random["apart"][-1] > 0 and random["cosine"][-1] < zero["cosine"][-1]
    assert collapse.separated(zero) is None
    assert collapse.separated({"steps": [1, 5, 9, 13], "cosine": [0.1, 0.95, 0.5, 0.4]}) == 9


# ---------------------------------------------------------------- routing


@pytest.fixture
def adapted(tokenizer):
    """(a model with heads that differ, 12 sequences numbered in order)."""
    torch.manual_seed(0)
    model = tiny_model()
    add_hydralora(model, rank=4, heads=3)
    with torch.no_grad():
        for layer in hydra_layers(model).values():
            layer.lora_B.normal_(std=0.3)
    records = train_val_split(read_records(WORLD / "val.jsonl"), 0.01, seed=0)[1]
    sequences, _ = encode_records(records, tokenizer, 128)
    return model, sorted(sum(routing.make_batches(sequences), []), key=lambda s: s.record)


def test_mutual_information_of_known_tables():
    assert routing.mutual_information(torch.tensor([[3.0, 6.0], [1.0, 2.0]])) == pytest.approx(0)
    assert routing.mutual_information(torch.eye(2)) == pytest.approx(1)
    assert routing.mutual_information(torch.eye(8)) == pytest.approx(3)
    table = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    slow = sum(v / 4 * math.log2(v / 4 / (row / 4 * column / 4))
               for v, row, column in [(1, 2, 1), (1, 2, 3), (2, 2, 3)])
    assert routing.mutual_information(table) == pytest.approx(slow)


def test_information_by_chance_is_what_a_gate_without_categories_has():
    categories = ["a", "b"] * 40
    blind = {"layer": torch.eye(2).double().repeat_interleave(2, dim=0).repeat(20, 1)}
    found, chance = routing.information(blind, categories)
    assert found == pytest.approx(0, abs=1e-9) and 0 < chance < 0.1
    found, chance = routing.information({"layer": torch.eye(2).double().repeat(40, 1)}, categories)
    assert found == pytest.approx(1) and chance < 0.1


def test_the_records_of_the_batches_are_numbered_without_gaps(adapted):
    model, sequences = adapted
    batches = routing.make_batches(sequences[1:])  # the first did not fit
    assert sorted(s.record for s in sum(batches, [])) == list(range(len(sequences) - 1))
    assert sequences[1].record == 1  # the caller's own keeps its number


def test_a_changed_gate_changes_the_loss_and_only_as_named(adapted):
    model, sequences = adapted
    batches = [sequences[:7], sequences[7:]]
    whole = routing.loss_with(model, batches, routing.unchanged)
    plain = evaluation.evaluate(model, sequences, precision=autocast("cpu", "fp32"))
    assert whole == pytest.approx(plain[""]["loss"], rel=1e-5)
    for change in (routing.uniform_gate, routing.shuffled, routing.without_head(1)):
        assert abs(routing.loss_with(model, batches, change) - whole) > 1e-4
    assert whole == routing.loss_with(model, batches, routing.unchanged)  # restored
    mask = torch.tensor([[True, True, True], [True, False, False]])
    gate = torch.rand(2, 3, 4).softmax(-1)
    dealt = routing.shuffled("", gate, mask)
    assert sorted(dealt[mask].tolist()) == sorted(gate[mask].tolist()) and not dealt.equal(gate)
    assert dealt[~mask].equal(gate[~mask])  # padding neither gives nor takes
    less = routing.without_head(2)("", gate, mask)
    assert not less[..., 2].any() and torch.allclose(less.sum(-1), torch.ones(2, 3))
    assert torch.allclose(less[..., 0] / less[..., 1], gate[..., 0] / gate[..., 1])
    assert routing.uniform_gate("", gate, mask).unique().tolist() == [0.25]


def test_gate_sums_are_the_routing_of_train_py(adapted):
    model, sequences = adapted
    known = evaluation.routing_report(model, sequences, precision=autocast("cpu", "fp32"))
    sums, tokens = routing.gate_sums(model, [sequences[:9], sequences[9:]])
    for category in {s.category for s in sequences}:
        own = [s.category == category for s in sequences]
        for name, gates in sums.items():
            mean = gates[own].sum(0) / tokens[own].sum()
            assert mean.tolist() == pytest.approx(known["gate"][name][category], abs=1e-5)


def test_effective_heads_are_counted_token_by_token(adapted):
    model, sequences = adapted
    found = routing.effective_heads(model, [sequences[:7], sequences[7:]])
    slow = []
    for s in sequences:
        with record_gates(model) as gates:
            model.hidden_states(torch.tensor([s.ids[:-1]]))
        slow += [1 / sum(w * w for w in token) for gate in gates.values()
                 for token in gate[0].tolist()]
    assert found == pytest.approx(sum(slow) / len(slow), rel=1e-4) and 1 < found < 3


def test_an_untrained_router_reads_what_the_trained_layers_read(adapted):
    model, sequences = adapted
    batches = [sequences[:9], sequences[9:]]
    own = {name: layer.router.detach() for name, layer in hydra_layers(model).items()}
    flipped = {name: router.flip(0) for name, router in own.items()}
    sums, _ = routing.gate_sums(model, batches)
    other, _ = routing.gate_sums(model, batches, flipped)
    for name in sums:
        assert torch.allclose(sums[name], other[name].flip(1), atol=1e-4)


def test_a_lora_is_measured_without_each_part_of_its_rank(place, tmp_path):
    args, records, val = prepared(place, tmp_path)
    run = common.run_all({0: run_flags(args, common.lora(7), records, val)}, args)[0]
    losses = routing.examine_lora(run, val, 3)["loss"]
    assert losses["whole"] == pytest.approx(run["metrics"]["val_loss"], abs=1e-5)
    assert len(set(losses.values())) == 4 and list(losses)[1:] == [f"less part {i}"
                                                                   for i in (1, 2, 3)]
    every = routing.examine_lora(run, val, 1)["loss"]["less part 1"]
    assert every == pytest.approx(run["metrics"]["val_loss_base"], abs=1e-5)


# ---------------------------------------------------------------- retention


def curve(*points):
    """{rate: [run]} of one seed."""
    return {1e-3 * 2 ** i: [{"metrics": {"val_loss": loss, "kept": {"loss": kept}}}]
            for i, (loss, kept) in enumerate(points)}


def test_the_kept_loss_is_read_off_where_the_curve_comes_down_to_the_level():
    points = [(2.0, 0.5), (1.0, 1.5), (0.8, 2.0), (0.9, 4.0)]
    assert retention.kept_at(points, 1.5) == pytest.approx(1.0)
    assert retention.kept_at(points, 0.9) == pytest.approx(1.75)  # not 4.0, on the way up again
    assert retention.kept_at(points, 0.5) == 2.0  # never there: its lowest
    assert retention.kept_at(points, 2.5) is None  # lower from the start
    assert retention.kept_at([(1.0, 1.0), (1.0, 3.0)], 1.0) == 1.0


def test_the_level_is_one_that_every_method_reaches():
    runs = {"slow": curve((3.0, 0.1), (2.0, 0.2)), "fast": curve((2.5, 0.3), (1.0, 0.7), (1.5, 1)),
            "full": curve((1.9, 2.0), (0.5, 3.0))}
    level = retention.common_level(runs)
    assert level == 2.0
    kept = retention.at_equal_learning(runs, level)
    assert kept["slow"] == [0.2] and kept["full"] is None
    assert kept["fast"] == pytest.approx([0.3 + 0.4 / 3])
    assert retention.nearest_runs(runs["fast"], level) == runs["fast"][1e-3]


def test_a_rate_at_which_a_seed_diverges_is_left_out_and_no_rate_is_refused(
        place, tmp_path, monkeypatch):
    args, records, val = prepared(place, tmp_path, "--rates", "4e-3", "8e-3")
    diverged = {8e-3}

    def run_all(runs, args, may_diverge):
        return {key: {"metrics": {"val_loss": math.inf if flags["seed"] and flags["lr"] in diverged
                                  else flags["lr"]}} for key, flags in runs.items()}

    monkeypatch.setattr(common, "run_all", run_all)
    configs = {"LoRA r8": common.lora(8)}
    runs = retention.make_runs(args, configs, records, val)
    assert list(runs["LoRA r8"]) == [4e-3] and len(runs["LoRA r8"][4e-3]) == 2
    diverged.add(4e-3)
    with pytest.raises(ValueError, match="diverged at every rate"):
        retention.make_runs(args, configs, records, val)


def test_a_method_that_keeps_more_has_a_positive_difference_and_one_without_value_none():
    kept = {name: [2.0, 2.1] for name in retention.STYLES}
    kept |= {retention.HYDRA: [1.5, 1.7], "full": None}
    runs = {name: {rate: [{"metrics": {"val_loss": loss + seed}} for seed in (0, 0.01)]
                   for rate in (1e-3, 8e-3)}
            for name, loss in ((retention.HYDRA, 1.0), (retention.MATCHED, 1.5))}
    claims = {c["claim"]: c for c in retention.make_claims(kept, runs)}
    assert claims[retention.PRIMARY]["difference"]["mean"] == pytest.approx(0.45)
    last = claims["at equal learning LoRA r8 keeps more than full"]
    assert last["difference"] is None and last["verdict"] == "undecided"
    low, high = list(claims.values())[-2:]
    assert "at a rate of 0.001 LoRA, matched" in low["claim"] and "0.008 HydraLoRA" in high["claim"]
    assert low["difference"]["mean"] == -0.5 and high["difference"]["mean"] == 0.5


def test_an_update_is_switched_off_and_measured_against_the_frozen_output(adapted):
    model, sequences = adapted
    batches = [sequences[:4]]
    loss = routing.loss_with(model, batches, retention.without_block(0))
    whole = retention.update_size(model, batches)
    layers = hydra_layers(model)
    for name, layer in layers.items():
        layer.scale = 0.0 if name.startswith("layers.0.") else layer.scale
    assert routing.loss_with(model, batches, routing.unchanged) == pytest.approx(loss, rel=1e-6)
    assert whole > retention.update_size(model, batches) > 0
    one, *others = layers.values()
    one.scale = 8.0
    for layer in others:
        layer.scale = 0.0
    inputs = []
    hook = one.register_forward_pre_hook(lambda _, x: inputs.append(x[0][0]))
    for sequence in sequences[:4]:
        model.hidden_states(torch.tensor([sequence.ids[:-1]]))
    hook.remove()
    x = torch.cat(inputs)
    slow = ((one(x) - one.base(x)).norm() / one.base(x).norm()).item()
    assert retention.update_size(model, batches) == pytest.approx(slow / len(layers), rel=1e-4)


# ---------------------------------------------------------------- a real model


class NoWheel:
    """What load_base returns, of the tiny model: its layers are named as Meta's."""

    def __init__(self, place):
        self.place, self.loaded = place, 0

    def __call__(self, file, folder):
        self.loaded += 1
        model, tokenizer = load_llama(self.place / "weights", dtype=torch.float32)
        return model, tokenizer, "sha256 of the file"


@pytest.fixture
def real(place, tmp_path, monkeypatch):
    """start() runs real_model on the tiny model and returns (status, its JSON)."""
    monkeypatch.setattr(real_model, "load_base", NoWheel(place))
    monkeypatch.setattr(real_model, "ATTENTION", "wq,wv")
    monkeypatch.setattr(real_model, "FEED_FORWARD", "w1,w2,w3")
    monkeypatch.setattr(real_model, "LENGTH", 120)
    monkeypatch.setattr(real_model, "KEPT", 2)
    monkeypatch.setattr(real_model, "PASSAGE", 1)

    def start():
        status = common.main("real_model", real_model.parse_args, real_model.run, [
            "--base", "x", "--data", str(WORLD / "val.jsonl"), "--train", "8", "--sweep", "4",
            "--val", "4", "--seeds", "3", "--other-seeds", "2", "--rates", "2e-3",
            "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)])
        return status, json.loads((tmp_path / "real_model.json").read_text())

    monkeypatch.setattr(real_model, "draw", functools.partial(draw_with_a_long_record,
                                                              real_model.draw))
    return start


def draw_with_a_long_record(draw, records, tokenizer, counts):
    long = {"instruction": "Sum it up.", "context": "a long story " * 200, "response": "No.",
            "category": "long"}
    return draw([*records, long], tokenizer, counts)


@pytest.mark.slow
def test_a_real_model_is_measured_and_a_second_call_computes_nothing(
        real, tmp_path, capsys, monkeypatch):
    status, result = real()
    assert status == 0
    first, *others = result["claims"]
    assert first["claim"] == real_model.PRIMARY and first["primary"]
    assert len(first["difference"]["values"]) == 3 and not any(c["primary"] for c in others)
    shared = {c["claim"]: len(c["difference"]["values"]) for c in others if c["difference"]}
    assert all(count == (3 if "wq,wv: " in text and "kept" in text else 2)
               for text, count in shared.items())
    rows = {(row["name"], row["layers"]): row for row in result["rows"]}
    assert len(rows) == 6
    for (name, layers), row in rows.items():
        fixed = name != real_model.SMALL and layers == "wq,wv"
        assert row["seeds"] == [20, 21, 22][:3 if fixed else 2] and row["clip"] == 0
        assert row["kept_passages"]["mean"] != row["kept_world"]["mean"] and row["categories"]
    hydra, matched = (rows[name, "wq,wv"]["trainable"]
                      for name in (real_model.HYDRA, real_model.MATCHED))
    assert matched == pytest.approx(hydra, rel=0.1)
    assert len(result["sweep"]) == 6
    monkeypatch.setattr(common, "run_here", lambda *_: pytest.fail("computed again"))
    before = (tmp_path / "real_model.json").read_bytes()
    assert real()[0] == 0 and (tmp_path / "real_model.json").read_bytes() == before


def test_no_record_of_the_real_model_is_in_two_parts_or_shortened(place, tokenizer):
    long = {"instruction": "Sum it up.", "context": "a story " * 200, "response": "No."}
    records = read_records(WORLD / "val.jsonl")
    records += [{**long, "category": "long"}] * len(records)  # half of the draw, if shortened
    parts = real_model.draw(records, tokenizer, {"train": 20, "sweep": 10, "val": 15})
    drawn = [s.record for part in ("train", "sweep", "val") for s in parts[part]]
    assert len(set(drawn)) == 45
    assert not any(s.shortened for s in parts["train"]) and max(
        len(s.ids) for s in parts["train"]) <= real_model.LENGTH
    again = real_model.draw(records, tokenizer, {"train": 20, "sweep": 10, "val": 15})
    assert [s.ids for s in again["val"]] == [s.ids for s in parts["val"]]
    with pytest.raises(ValueError, match="are needed"):
        real_model.draw(records[:20], tokenizer, {"train": 30})


def test_a_model_of_transformers_has_the_names_that_the_loop_asks_for(tokenizer):
    transformers = pytest.importorskip("transformers", reason="needs requirements-optional.txt")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
        num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2))
    base = real_model.Base(model)
    sequences, _ = encode_records(read_records(WORLD / "val.jsonl")[:6], tokenizer, 96)
    found = evaluation.evaluate(base, sequences, precision=autocast("cpu", "fp32"))[""]
    slow = 0.0
    for s in sequences:
        logits = model(torch.tensor([s.ids[:-1]])).logits[0].log_softmax(-1)
        slow -= sum(logits[i - 1, s.ids[i]].item() for i in s.targets)
    assert found["loss"] == pytest.approx(slow / found["tokens"], rel=1e-4)


def test_a_run_that_another_process_computes_is_left_to_it_and_a_kill_loses_that_run(tmp_path):
    """The other process holds the lock of run 0 and ends it; this one takes the rest."""
    taken = []

    def compute(spec):
        taken.append(spec)
        if spec == 1:
            (tmp_path / f"{files.digest(0)}.json").write_text('{"metrics": "theirs"}')
            holder.close()
        return {"metrics": spec}

    path = tmp_path / f"{files.digest(0)}.json"
    holder = contextlib.ExitStack()
    with holder:
        holder.enter_context(file_lock(path, path))
        found = common.compute_each({"a": 0, "b": 1, "c": 2}, tmp_path, compute)
    assert taken == [1, 2] and found["a"] == {"metrics": "theirs"} and found["c"]["metrics"] == 2
    assert found["b"]["commit"] == report.code_commit()
    path.unlink()  # as after a kill: the lock is free, the run is not there
    assert common.compute_each({"a": 0}, tmp_path, compute)["a"]["metrics"] == 0


# ---------------------------------------------------------------- the choices


def with_change(change, seed=0, **settings):
    """(tiny model whose B are random and to which a change is made, arguments for train_here)."""
    torch.manual_seed(seed)
    model = tiny_model()
    add_hydralora(model, targets=("w1", "wq"), **{"rank": 4, "heads": 3, **settings})
    with torch.no_grad():
        for layer in hydra_layers(model).values():
            layer.lora_B.normal_(std=0.3)
    return model, choices.CHANGES[change](model, 1e-3)


def gates_of(model, tokens):
    with record_gates(model) as gates, torch.no_grad():
        model.hidden_states(tokens)
    return gates


TOKENS = torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("change", [*choices.CHANGES])
def test_every_choice_trains_what_it_should_and_leaves_the_base(change, tokenizer):
    settings = {"gate": "uniform"} if "uniform" in change else {}
    model, more = with_change(change, **settings)
    before = {name: p.clone() for name, p in model.named_parameters()}
    sequences, _ = encode_records(read_records(WORLD / "val.jsonl")[:16], tokenizer, 96)
    list(common.train_here(model, sequences, lr=1e-2, seed=0, batch_size=4, **more))
    moved = {name.split(".")[-1] for name, p in model.named_parameters()
             if not torch.equal(p, before[name])}
    expected = {"lora_A", "lora_B", "router"}
    if change in ("A frozen", choices.RANDOM):
        expected -= {"lora_A" if change == "A frozen" else "router"}
    if "uniform" in change or "per position" in change:
        expected -= {"router"}
    assert moved == expected


def test_a_router_on_a_x_reads_the_rank():
    model, _ = with_change("router on A x")
    layer = model.layers[0].feed_forward.w1
    x = torch.randn(2, 5, layer.base.in_features)
    slow = layer.base(x)
    z = x @ layer.lora_A.T
    w = (z @ layer.router.T).softmax(-1)
    for i in range(3):
        slow = slow + layer.scale * w[..., i:i + 1] * (z @ layer.lora_B[i].T)
    assert torch.allclose(layer(x), slow, atol=1e-4)


@pytest.mark.parametrize("k", [1, 2])
def test_top_k_keeps_the_largest_weights_and_gives_the_router_a_gradient(k):
    dense = {name: gate for name, gate in gates_of(with_change("A frozen")[0], TOKENS).items()}
    model, _ = with_change(f"top {k}")
    name = "layers.0.attention.wq"  # its input is the same in both
    kept, whole = gates_of(model, TOKENS)[name], dense[name]
    assert ((kept > 0).sum(-1) == k).all()
    assert kept.argmax(-1).equal(whole.argmax(-1))
    if k == 1:
        assert torch.allclose(kept.sum(-1), whole.amax(-1))
    else:
        assert torch.allclose(kept.sum(-1), torch.ones(3, 7))
    model.hidden_states(TOKENS).sum().backward()
    assert hydra_layers(model)[name].router.grad.abs().sum() > 0


def test_the_controls_of_the_gate_have_heads_that_differ_and_read_no_later_token():
    own = gates_of(with_change("A frozen")[0], TOKENS)
    name = "layers.0.attention.wq"
    other = gates_of(with_change("gates of another record")[0], TOKENS)[name]
    assert other[1].equal(own[name][0]) and other[0].equal(own[name][2])
    model, _ = with_change("gates drawn per position")
    drawn = gates_of(model, TOKENS)[name]
    assert drawn[0].equal(drawn[2]) and drawn.equal(gates_of(model, TOKENS.flip(0))[name])
    assert torch.allclose(drawn.sum(-1), torch.ones(3, 7)) and drawn[0].std(0).min() > 0.05
    later = TOKENS.clone()
    later[:, 5:] = 3
    for change in ("gates of another record", "gates drawn per position"):
        model, _ = with_change(change)
        with torch.no_grad():
            a, b = (model.hidden_states(tokens)[:, :5] for tokens in (TOKENS, later))
        assert torch.allclose(a, b, atol=1e-5)


def test_the_balance_is_1_for_even_heads_and_n_for_one_and_ignores_padding():
    even, one = torch.full((2, 4, 3), 1 / 3), torch.eye(3)[torch.zeros(2, 4, dtype=int)]
    mask = torch.ones(2, 4, dtype=torch.bool)
    assert choices.balance({"a": even}, mask) == pytest.approx(1)
    assert choices.balance({"a": one}, mask) == pytest.approx(3)
    assert choices.balance({"a": even, "b": one}, mask) == pytest.approx(2)
    mask[1] = False
    mixed = torch.stack([even[0], one[0]])
    assert choices.balance({"a": mixed}, mask) == pytest.approx(1)


def test_a_balance_of_no_weight_is_the_plain_step(tokenizer):
    sequences, _ = encode_records(read_records(WORLD / "val.jsonl")[:16], tokenizer, 96)
    found = []
    for more in ({}, choices.balanced(0.0, None, None)):
        model, _ = with_change("balance loss 1")
        list(common.train_here(model, sequences, lr=1e-2, seed=0, batch_size=4, **more))
        found.append(hydra_layers(model)["layers.0.feed_forward.w1"].lora_B)
    assert torch.allclose(*found, atol=1e-4)


def test_lora_plus_scales_the_rate_of_b_alone():
    model, more = with_change("B's rate times 16")
    rates = {id(p): group["peak_lr"] for group in more["optimizer"].param_groups
             for p in group["params"]}
    for layer in hydra_layers(model).values():
        assert [rates[id(p)] for p in (layer.lora_A, layer.lora_B, layer.router)] == [
            1e-3, 16e-3, 1e-3]
    assert len(rates) == 3 * len(hydra_layers(model))


def test_every_variant_of_the_choices_is_compared_with_its_reference():
    parts = list(choices.variants(1))
    arms = choices.make_arms(parts, dict.fromkeys(choices.LAYERS, 17))
    runs = {arm: [{"metrics": {"val_loss": 2.0 - (own["change"] is None)}}] * 2
            for arm, own in arms.items()}
    claims = choices.make_claims(parts, runs)
    assert sum(c["primary"] for c in claims) == 1
    changed = sum(len(own) for own in choices.variants(1).values())
    assert len(claims) == 2 * changed
    for c in claims:  # learned gates were made better, as all references
        ahead = "ahead of the same with" in c["claim"]
        expected = 1 if ahead else 0 if "sqrt" in c["claim"] else -1
        assert c["difference"]["mean"] == expected
    scales = {own["settings"]["alpha"] / own["settings"]["rank"] for (name, _), own in arms.items()
              if "sqrt" in name}
    assert sorted(scales) == pytest.approx([32 / 32 ** 0.5, 32 / 8 ** 0.5])
