"""experiments/: every script at a minute size, the statistics against slow twins, and the rules."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from data.corpus import encode_records, read_records, train_val_split, without_duplicates
from experiments import (
    collapse,
    common,
    figure2,
    figure3,
    heads,
    mechanism,
    report,
    retention,
    routing,
    table1,
)
from hydralora import add_hydralora, hydra_layers
from model import save_llama
from support import evaluation
from tests.conftest import ROOT, WORLD, tiny_model

FAMILIES = ("tavi", "calendar", "arithmetic", "code")
SCRIPTS = {"table1": (table1, ["--scaling", "constant", "--quiz", "QUIZ"]),
           "heads": (heads, ["--heads", "1", "2"]),
           "figure2": (figure2, ["--total", "12", "--families", "2", "4"]),
           "figure3": (figure3, ["--families", "tavi", "code", "--rank", "8"]),
           "retention": (retention, ["--keep-data", "KEEP", "--rates", "4e-3", "8e-3"]),
           "routing": (routing, ["--heads", "3"]), "collapse": (collapse, ["--every", "1"]),
           "mechanism": (mechanism, ["--steps", "3"])}
VERDICTS = {"holds", "does not hold", "not shown"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny random model, 48 training and 16 validation records of four families, a quiz of four
    questions, and the folder that the tests share their runs in."""
    folder = tmp_path_factory.mktemp("claims")
    save_llama(tiny_model(), WORLD / "base" / "tokenizer.model", folder / "weights")
    for name, count in (("train", 12), ("val", 4)):
        records = read_records(WORLD / f"{name}.jsonl")
        chosen = [r for family in FAMILIES
                  for r in [r for r in records if r["category"] == family][:count]]
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


def flags_of(place, out, *, runs=None, seeds=2, val=True):
    """The flags of a run of seconds; later ones win."""
    return ["--weights", str(place / "weights"), "--data", str(place / "train.jsonl"),
            *(["--val-data", str(place / "val.jsonl")] if val else []), "--seeds", str(seeds),
            "--epochs", "1", "--max-steps", "2", "--max-seq-len", "128",
            "--runs", str(runs or place / "runs"), "--out", str(out)]


SWEPT = ["--rates", "4e-3", "--jobs", "1"]


def command_of(name, place, out):
    """(script, the flags of a run of seconds); a skip where train.py cannot do it."""
    script, more = SCRIPTS[name]
    if name == "retention" and "keep_data" not in train.WORLD_RECIPE:
        pytest.skip("train.py has no --keep-data")
    if name == "mechanism":
        return script, ["--seeds", "2", "--rates", "8e-3", "--out", str(out), *more]
    paths = {"QUIZ": place / "quiz", "KEEP": place / "keep.jsonl"}
    return script, [*flags_of(place, out), *(SWEPT if name != "collapse" else []),
                    *(str(paths.get(flag, flag)) for flag in more)]


def prepared(place, out, *more):
    p = common.parser("test", common.__doc__, seeds=2, epochs=1)
    return common.prepare(p, [*flags_of(place, out), *SWEPT, *more])


# ---------------------------------------------------------------- what is published


@pytest.mark.parametrize("name", sorted(path.stem for path in common.RESULTS.glob("*.json")))
def test_published_results_are_shown_as_written_and_of_the_world_of_now(name):
    """A script whose world or rules have changed runs again, or its results go."""
    readme = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    written = (common.RESULTS / f"{name}.md").read_text(encoding="utf-8")
    section, = [part for part in re.split(r"^### ", readme, flags=re.M) if written in part]
    assert f"(results/{name}.png)" in section and (common.RESULTS / f"{name}.png").exists()
    result = json.loads((common.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    made = result["conditions"]
    if name != "mechanism":
        assert made["recipe"] == common.RECIPE
        assert "sweep_seeds" in made
    if name not in ("mechanism", "table1-dolly"):
        assert made["weights"] == common.weights_fingerprint(WORLD / "base")
        assert made["data"] == common.file_fingerprint(WORLD / "train.jsonl")
    assert all(c["fixed_by"] for c in result.get("claims", []) if c["primary"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_primary_claim_stands_in_its_script_in_one_line(name):
    """So that git finds the commit which brought it."""
    script = SCRIPTS[name][0]
    text = Path(script.__file__).read_text(encoding="utf-8")
    assert name == "collapse" or f'PRIMARY = "{script.PRIMARY}"\n' in text


def test_every_row_of_the_readmes_answer_was_written_by_a_script():
    """The claims name their script in a last column."""
    def cells(line):
        return tuple(cell.strip() for cell in line.strip("|").split("|"))

    written = {path.stem: set(map(cells, path.read_text(encoding="utf-8").splitlines()))
               for path in common.RESULTS.glob("*.md")}
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## What was found\n")[1]
    lines = section.split("\n## ")[0].splitlines()
    rows = [cells(line) for line, after in zip(lines, lines[1:])
            if line.startswith("| ") and not after.startswith("|-")]
    assert 6 <= len(rows) <= 8
    for row in rows:
        assert row[:-1] in written[row[-1]]


# ---------------------------------------------------------------- the scripts


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_runs_and_again_from_its_runs_to_the_same_bytes(name, place, tmp_path, capsys):
    script, command = command_of(name, place, tmp_path)
    assert common.run_experiment(name, script.main, command) == 0
    written = {end: (tmp_path / f"{name}.{end}").read_bytes() for end in ("json", "md")}
    result = json.loads(written["json"])
    assert {c["verdict"] for c in result.get("claims", [])} <= VERDICTS
    assert sum(c["primary"] for c in result.get("claims", [])) <= 1
    assert written["md"].decode() in capsys.readouterr().out
    assert common.run_experiment(name, script.main, command) == 0
    assert written == {end: (tmp_path / f"{name}.{end}").read_bytes() for end in ("json", "md")}
    out = capsys.readouterr().out
    assert "run 1 of" not in out and ("0 of them to be computed" in out
                                      or name in ("collapse", "mechanism"))


@pytest.mark.slow
def test_table1_has_every_method_with_both_counts_and_pairs_its_seeds(place, tmp_path):
    command = [*flags_of(place, tmp_path), *SWEPT, "--scaling", "fixed", "--name", "fixed"]
    assert table1.main(command) == 0
    result = json.loads((tmp_path / "fixed.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert "quiz" not in rows["LoRA r8"] and rows["base"]["trainable"] == 0
    assert {config["alpha"] for config in result["configs"].values() if "alpha" in config} == {32}
    hydra, other = rows[table1.HYDRA], rows["LoRA r8"]
    assert hydra["trainable"] > hydra["without_router"] == rows["uniform gate 3x8"]["trainable"]
    assert len(other["difference"]["values"]) == 2 and hydra["difference"] is None
    for a, b, d in zip(*(row["values"] for row in (other["val_loss"], hydra["val_loss"],
                                                   other["difference"]))):
        assert d == pytest.approx(a - b)
    args, _, _ = prepared(place, tmp_path)
    args.scaling = "both"
    assert len(table1.methods(args)) == 18
    args.scaling = "constant"
    assert {c["alpha"] / c["rank"] for c in table1.methods(args).values() if "rank" in c} == {4}
    attention = {name for name, c in table1.methods(args).items() if c.get("targets") == "wq,wv"}
    assert len(attention) == 4 and all(name.endswith(", wq,wv") for name in attention)


def test_claims_pair_methods_of_one_scaling_layer_and_metric(place, tmp_path):
    """With losses in the order of the names below, positive is on the claim's side throughout."""
    args, _, _ = prepared(place, tmp_path)
    args.scaling, number = "both", iter(range(100))
    matched = table1.matched_name(args, common.TARGETS)[0]
    runs = {name: [{"metrics": {"val_loss": 100.0 - place + seed, "exact_match": 0.0,
                                "quiz": place + seed, "kept": {"loss": 3.0 * place + seed}}}
                   for seed in (0.0, 0.25)] for name in table1.methods(args)
            for place in [next(number)]}
    found = {c["claim"]: c for c in table1.make_claims(args, runs)}
    order = list(runs)

    def apart(worse, better):
        return order.index(better) - order.index(worse)

    for text, c in found.items():
        if not c["primary"]:
            kind, pair = text.split(": ")
            better, worse = pair.split(" ahead of ")
            sign = -3 if kind == "kept" else 1
            assert c["difference"]["mean"] == pytest.approx(sign * apart(worse, better))
            assert (", wq,wv" in worse) == (", wq,wv" in better)
            if ", alpha 32" in better:
                assert worse.endswith(", alpha 32")
    assert found[table1.PRIMARY]["difference"]["mean"] == apart(matched, table1.HYDRA)
    assert f"section 3: {table1.HYDRA} ahead of {matched}, alpha 32" in found
    assert not [text for text in found if "LoRA r32 ahead of LoRA r8, alpha" in text]
    assert len(found) == 20


def test_without_a_quiz_and_texts_to_keep_table1_claims_nothing_of_them(place, tmp_path):
    args, _, _ = prepared(place, tmp_path)
    args.scaling = "constant"
    runs = {name: [{"metrics": {"val_loss": 1.0, "exact_match": 0.0}}] * 2
            for name in table1.methods(args)}
    claims = table1.make_claims(args, runs)
    assert not any(c["primary"] or "quiz" in c["claim"] for c in claims) and len(claims) == 12


@pytest.mark.slow
def test_without_matplotlib_the_tables_come_out_and_one_line_says_so(place, tmp_path, monkeypatch,
                                                                    capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert collapse.main([*flags_of(place, tmp_path), "--every", "1"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["collapse.json", "collapse.md"]
    assert capsys.readouterr().out.count("no picture: matplotlib is not here") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_draws_its_picture(name, place, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    script, command = command_of(name, place, tmp_path)
    script.main(command)
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("flags, message", [
    (["--weights", "w"], "--weights needs --data"), (["--seeds", "0"], "--seeds"),
    (["--epochs", "0"], "--epochs"), (["--sweep-epochs", "0"], "--sweep-epochs"),
    (["--jobs", "0"], "--jobs"), (["--rates", "0"], "--rates"), (["--records", "-1"], "--records"),
])
def test_impossible_flags_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        heads.main(flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("script, flags", [
    (heads, ["--heads", "0"]), (routing, ["--heads", "1"]), (figure2, ["--families", "5"]),
    (retention, []),
    (figure2, ["--total", "4800"]), (figure3, ["--families", "tavi", "absent"])])
def test_what_cannot_be_measured_is_refused(script, flags, place, tmp_path):
    with pytest.raises((ValueError, SystemExit)):
        script.main([*flags_of(place, tmp_path), *SWEPT, *flags])
    assert not list(tmp_path.iterdir())


def test_the_families_compared_by_default_are_the_worlds():
    assert set(figure3.FAMILIES) <= {r["category"] for r in read_records(WORLD / "val.jsonl")}


# ---------------------------------------------------------------- data and the sweep


def test_the_scripts_on_the_whole_mix_would_train_alike(monkeypatch):
    """With other defaults heads and routing would share no run with table1."""
    seen = []

    def prepare(p, argv):
        seen.append([p.get_default(key) for key in ("records", "epochs", "max_steps",
                                                    "max_seq_len", "sweep_epochs", "rates")])
        raise ValueError("enough")

    monkeypatch.setattr(common, "prepare", prepare)
    for script in (table1, heads, routing, retention):
        with pytest.raises(ValueError, match="enough"):
            script.main([])
    assert seen[:3] == [seen[0]] * 3 and seen[0][0] == common.MIXED
    assert seen[3][:4] == seen[0][:4]  # retention sweeps nothing


def test_records_are_drawn_and_without_validation_data_a_tenth_is_held_out(place, tmp_path):
    p = common.parser("test", common.__doc__, seeds=1, epochs=1)
    _, records, val = common.prepare(p, [*flags_of(place, tmp_path, val=False), "--records", "20"])
    assert (len(records), len(val)) == (18, 2)
    whole = read_records(place / "train.jsonl")
    assert all(record in whole for record in records + val)
    assert not [record for record in records if record in val]
    args, records, val = common.prepare(p, [])
    assert val == read_records(WORLD / "val.jsonl") and args.weights == str(WORLD / "base")
    assert records == without_duplicates(read_records(WORLD / "train.jsonl"), val)


@pytest.mark.slow
def test_no_learning_rate_is_chosen_by_the_validation_set(place, tmp_path, monkeypatch):
    """Every run of the sweep trains and is measured on training records alone, the same for all
    methods; the validation set is read by the other runs only."""
    asked = []

    def run_all(runs, args, quiz=None):
        asked.append([train.parse_args(flags) for flags in runs])
        return [{"metrics": {"val_loss": run.lr, "exact_match": 0.0}, "flags": flags,
                 "parameters": {"trainable": 1}} for run, flags in zip(asked[-1], runs)]

    monkeypatch.setattr(common, "run_all", run_all)
    monkeypatch.setattr(common, "rerun", lambda *_: {"arm": "", "runs": 0, "threads": 2,
                                                     "moved": {}})
    command = [*flags_of(place, tmp_path), "--heads", "1", "2", "--rates", "4e-3", "8e-3"]
    assert heads.main([*command, "--epochs", "3", "--sweep-epochs", "2"]) == 0
    sweeps, last = asked[:-1], asked[-1]
    known, validation = (read_records(place / f"{name}.jsonl") for name in ("train", "val"))
    assert len(sweeps) == 1 + common.WIDEN  # the best was always the lowest
    assert len({(run.data, run.val_data) for runs in sweeps for run in runs}) == 1
    kept, held = (read_records(path) for path in (sweeps[0][0].data, sweeps[0][0].val_data))
    assert all(record in known and record not in validation for record in kept + held)
    assert not [record for record in held if record in kept] and len(held) == 5
    assert {run.epochs for runs in sweeps for run in runs} == {2}
    assert {run.seed for runs in sweeps for run in runs} == {0, 1}
    assert {run.epochs for run in last} == {3} and {run.lr for run in last} == {0.0005}
    assert all(read_records(run.val_data) == validation for run in last)
    assert all(read_records(run.data) == known for run in last)


def test_the_sweep_widens_at_an_edge_and_stops_inside():
    def measure_around(best):
        return lambda asked: [abs(math.log2(rate / best[name])) for name, rate in asked]

    best = {"inside": 2.83e-3, "above": 1.13e-2, "below": 1e-5}
    losses = common.sweep(best, common.RATES, measure_around(best))
    assert sorted(losses["inside"]) == [2e-3, 2.83e-3, 4e-3, 5.66e-3]
    assert sorted(losses["above"]) == [2.83e-3, 4e-3, 5.66e-3, 8e-3, 1.13e-2, 1.6e-2]
    assert common.best_rate(losses["above"]) == 1.13e-2
    assert sorted(losses["below"])[:6] == [3.54e-4, 5e-4, 7.07e-4, 1e-3, 1.41e-3, 2e-3]
    assert len(losses["below"]) == 3 + common.WIDEN
    assert common.sweep(["one"], [4e-3], measure_around({"one": 1})) == {
        "one": {4e-3: pytest.approx(7.9658, abs=1e-4)}}


def test_the_rates_are_a_factor_of_sqrt_2_apart():
    for rates in (common.RATES, mechanism.RATES):
        assert all(b / a == pytest.approx(2 ** 0.5, rel=5e-3) for a, b in zip(rates, rates[1:]))
    assert {round(2 * math.log2(rate / 1e-3), 2) % 1 for rate in retention.RATES} == {0}


@pytest.mark.parametrize("tried, chosen", [
    ({1: [5.0, 5.0], 2: [3.0, 3.0], 4: [2.9, 2.9]}, 4),  # apart by more than nothing
    ({1: [5.0, 5.0], 2: [3.0, 3.2], 4: [2.9, 3.1]}, 2),  # by less than the seeds: the lower
    ({1: [5.0, 5.0], 2: [2.9, 3.1], 4: [3.0, 3.2]}, 2),  # never a higher one than the best
    ({1: [3.3, 3.1], 2: [3.0, 3.2], 4: [2.0, 4.0], 8: [math.inf, 2.0]}, 1),
    ({1: [math.inf, 3.0], 2: [3.0, 3.0]}, 2), ({1: [3.0], 2: [2.9]}, 2)])
def test_of_two_rates_within_the_seeds_scatter_the_lower_is_used(tried, chosen):
    assert common.steady_rate(tried) == chosen


def test_a_rate_that_diverges_loses_and_any_other_error_ends_the_script(place, tmp_path,
                                                                       monkeypatch):
    args, records, val = prepared(place, tmp_path, "--runs", str(tmp_path / "runs"))
    run = train.run_training

    def fails(settings):
        if settings.lr > 0.5:
            (args.runs / "x").mkdir(parents=True, exist_ok=True)
            common.Path(settings.out).mkdir(parents=True)
            raise ValueError("step 3: loss nan, gradient norm nan on line 1 of the training data")
        return run(settings)

    monkeypatch.setattr(train, "run_training", fails)
    args.rates = [4e-3, 0.9]
    tried = common.tune({"lora": (common.lora(2), [records])}, args)
    assert tried["lora"][0.9] == [math.inf] * 2 and common.steady_rate(tried["lora"]) < 0.1
    assert "diverged" in common.rates_table(tried)
    with pytest.raises(ValueError, match="diverged at the rate"):
        common.run_seeds({"lora": common.lora(2)}, {"lora": {0.9: [1.0]}}, args, records, val)
    monkeypatch.setattr(train, "run_training",
                        lambda settings: exec("raise ValueError('bad input')"))
    with pytest.raises(ValueError, match="bad input"):
        common.tune({"lora": (common.lora(3), [records])}, args)


# ---------------------------------------------------------------- the kept runs


def test_a_run_is_found_by_settings_and_content_not_by_place(place, tmp_path):
    args, records, val = prepared(place, tmp_path, "--runs", str(tmp_path / "runs"))

    def folder(config=common.lora(8), rate=4e-3, seed=0, epochs=1, data=records, val=val):
        return common.run_folder(common.train_flags(args, config, rate=rate, seed=seed,
                                                    epochs=epochs, data=data, val=val), args.runs)

    known = {folder(), folder(config=common.lora(16)), folder(config=common.lora(8, 16.0)),
             folder(rate=2e-3), folder(seed=1), folder(epochs=2), folder(data=records[1:]),
             folder(val=val[1:])}
    assert len(known) == 8
    shutil.copytree(args.weights, tmp_path / "weights")
    args.weights = str(tmp_path / "weights")
    assert folder() in known
    save_llama(tiny_model(seed=1), WORLD / "base" / "tokenizer.model", tmp_path / "weights")
    assert folder() not in known


@pytest.mark.slow
def test_a_stopped_script_goes_on_to_the_same_table(place, tmp_path, monkeypatch, capsys):
    command = ["--heads", "1", *SWEPT]
    run, calls = train.run_training, []

    def stops(settings):
        calls.append(settings)
        if len(calls) == 3:
            common.Path(settings.out).mkdir(parents=True)
            (common.Path(settings.out) / "log.csv").write_text("step,loss\n1,")  # half written
            return 130, None  # what train.py returns after Ctrl-C
        return run(settings)

    monkeypatch.setattr(train, "run_training", stops)
    apart = [*flags_of(place, tmp_path / "a", runs=tmp_path / "runs", seeds=1), *command]
    assert common.run_experiment("heads", heads.main, apart) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert common.run_experiment("heads", heads.main, apart) == 0
    assert len(calls) == 1 + (2 * 2 + 2 + 1)  # the stopped one, and each of seven once
    whole = [*flags_of(place, tmp_path / "b", runs=tmp_path / "others", seeds=1), *command]
    assert common.run_experiment("heads", heads.main, whole) == 0
    assert (tmp_path / "a" / "heads.json").read_bytes() == (tmp_path / "b" /
                                                           "heads.json").read_bytes()


@pytest.mark.slow
def test_two_processes_give_what_one_gives_and_say_when_a_run_fails(place, tmp_path, capfd):
    args, records, val = prepared(place, tmp_path)
    flags = [common.train_flags(args, common.hydra(2), rate=4e-3, seed=seed, epochs=1, data=records,
                                val=val) for seed in range(2)]
    one = common.run_all(flags, args)
    args.runs, args.jobs = tmp_path / "runs", 2
    bad = common.train_flags(args, common.lora(999), rate=4e-3, seed=0, epochs=1, data=records,
                             val=val)
    with pytest.raises(ValueError, match="a run failed"):
        common.run_all([*flags, bad], args)
    two = common.run_all(flags, args)
    printed = capfd.readouterr()
    assert "--rank 999 is more than" in printed.err and "2 runs, 0 of them" in printed.out
    assert [r["metrics"] for r in one] == [r["metrics"] for r in two]
    for a, b in zip(one, two):
        a, b = (torch.load(r["folder"] / "adapter.pt", weights_only=True)["tensors"]
                for r in (a, b))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_quiz_of_a_run_is_that_of_its_own_weights(place, tmp_path):
    args, records, val = prepared(place, tmp_path)
    flags = [common.train_flags(args, config, rate=4e-3, seed=0, epochs=1, data=records, val=val)
             for config in (common.lora(2), common.FULL)]
    for run in common.run_all(flags, args, place / "quiz"):
        kept = json.loads((run["folder"] / "quiz.json").read_text())
        assert kept["value"] == run["metrics"]["quiz"] and 0 <= kept["value"] <= 1
        assert common.run_accuracy(run["folder"], run["flags"], place / "quiz") == kept["value"]


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


@pytest.mark.parametrize("freedom, t", [(1, 12.706), (2, 4.303), (4, 2.776), (30, 2.042)])
def test_the_quantile_of_an_interval_is_that_of_the_tables(freedom, t):
    assert report.student_quantile(freedom) == pytest.approx(t, abs=5e-4)


def test_a_p_below_5_percent_is_an_interval_without_zero():
    for numbers in ([1.0, 2.0, 3.0], [1.0, 1.1, 0.9], [-1.0, 0.2, -0.5, -0.9], [0.1, 3.0]):
        stat = report.interval(numbers)
        assert (report.p_value(stat) < 0.05) == (not stat["low"] <= 0 <= stat["high"])
    assert report.p_value(report.interval([5.0])) == report.p_value(None) == 1
    assert report.p_value(report.interval([2.0, 2.0])) == 0
    assert report.p_value(report.interval([0.0, 0.0])) == 1


def test_holms_correction_by_hand():
    assert report.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert report.holm([0.5, 0.9]) == [1, 1] and report.holm([]) == []
    assert report.holm([0.02]) == [0.02]  # alone there is nothing to correct


def test_only_secondary_claims_are_corrected_and_one_primary_is_allowed():
    stat = report.interval([0.3, 1.0, 1.4, 0.5])
    p = report.p_value(stat)
    assert 0.02 < p < 0.05
    claims = report.judged([report.claim("a", stat, primary=True), report.claim("b", stat),
                            report.claim("c", stat), report.claim("d", None)], "absent.py")
    assert [c["p"] for c in claims] == pytest.approx([p, 3 * p, 3 * p, 1])
    assert [c["verdict"] for c in claims] == ["holds", *["not shown"] * 3]
    assert "primary: a" in report.claims_text(claims)
    assert "was not committed before the run" in report.claims_text(claims)
    with pytest.raises(ValueError, match="2 primary claims"):
        report.judged([report.claim("a", stat, primary=True)] * 2, __file__)


def test_results_name_the_commit_that_brought_the_primary_claim(tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *words], cwd=tmp_path,
                       check=True, capture_output=True)

    script = tmp_path / "script.py"
    try:
        git("init")
    except OSError:
        pytest.skip("no git")
    for content in ('PRIMARY = "one"', 'PRIMARY = "two"', 'PRIMARY = "two"\nprint(1)'):
        script.write_text(content)
        git("add", "script.py")
        git("commit", "-m", content)
    second = subprocess.run(["git", "rev-parse", "HEAD~1"], cwd=tmp_path, capture_output=True,
                            text=True).stdout
    assert report.fixed_by(script, "two") == second[:10]
    script.write_text('PRIMARY = "three"')
    assert report.fixed_by(script, "three") is None  # in no commit yet
    assert report.fixed_by(tmp_path / "absent.py", "two") is None


def test_intervals_and_paired_differences_by_hand():
    found = report.interval([1.0, 2.0, 3.0])  # s = 1: half is 4.3027 / sqrt(3)
    assert found["mean"] == 2 and found["high"] - 2 == pytest.approx(2.48414, abs=1e-4)
    assert found["low"] == pytest.approx(-0.48414, abs=1e-4)
    # far apart from seed to seed, yet B is ahead by 0.1, 0.2, 0.3 each time: s = 0.1
    pair = report.difference([1.1, 5.2, 9.3], [1.0, 5.0, 9.0])
    assert pair["mean"] == pytest.approx(0.2) and pair["low"] == pytest.approx(-0.04841, abs=1e-4)
    assert report.interval([7.0]) == {"mean": 7.0, "low": None, "high": None, "values": [7.0]}
    assert report.interval(range(40))["high"] > report.interval(range(40))["mean"]
    with pytest.raises(ValueError, match="paired"):
        report.difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize("values, said", [
    ([1.0, 1.1, 0.9], "holds"), ([-1.0, -1.1, -0.9], "does not hold"),
    ([1.0, -1.0, 0.1], "not shown"), ([5.0], "not shown"), ([0.0, 0.0], "not shown")])
def test_a_verdict_follows_from_the_interval(values, said):
    claim, = report.judged([report.claim("x", report.interval(values))], __file__)
    assert claim["verdict"] == said


def test_tables_line_up_and_numbers_are_shown_with_their_intervals():
    table = report.markdown(["a", "long name"], [[1, "x"], ["yy", 22]])
    assert table == ("| a  | long name |\n|----|-----------|\n| 1  | x         |\n"
                     "| yy | 22        |")
    stat = {"mean": 0.5, "low": 0.25, "high": 0.75}
    assert report.show(stat) == "0.5000 ± 0.2500" and report.show(None) == "-"
    assert report.show(stat, percent=True) == "50.0 ± 25.0 %"
    assert report.signed(stat, 2) == "+0.50 ± 0.25"
    assert report.show(report.interval([1.0])) == "1.0000"
    assert report.plain({1: [math.inf, 2.0]}) == {"1": [None, 2.0]}


@pytest.mark.slow
def test_matched_ranks_have_the_parameters_of_hydralora_router_included():
    args, _, _ = common.prepare(common.parser("test", common.__doc__, seeds=1, epochs=1), [])
    model = tiny_model(dim=128, n_layers=6, multiple_of=32)
    assert common.count_trainable(args, 3, 8) == add_hydralora(model, rank=8, heads=3)
    wanted = common.count_trainable(args, 3, 8)
    for heads_ in range(1, 9):
        rank = common.matched_rank(args, heads_)
        off = {r: abs(common.count_trainable(args, heads_, r) - wanted)
               for r in (rank - 1, rank, rank + 1) if r > 0}
        assert min(off.values()) == off[rank]
    assert common.matched_rank(args, 3) == 8
    model = tiny_model(dim=128, n_layers=6, multiple_of=32)
    attention = common.matched_rank(args, targets=("wq", "wv"))
    assert abs(add_hydralora(model, targets=["wq", "wv"], rank=attention, heads=1)
               - common.count_trainable(args, 3, 8, ("wq", "wv"))) < 6 * 2 * 256


# ---------------------------------------------------------------- what the scripts compute


def test_families_are_dealt_once_and_corpora_have_one_size(place):
    records = read_records(place / "train.jsonl")
    for size in (1, 2, 4):
        groups = figure2.deal(FAMILIES, size, seed=3)
        assert sorted(sum(groups, [])) == sorted(FAMILIES)
        for group in groups:
            chosen = figure2.corpus(records, group, 12, seed=3)
            assert len(chosen) == 12 and {r["category"] for r in chosen} == set(group)
    assert figure2.deal(FAMILIES, 2, seed=0) != figure2.deal(FAMILIES, 2, seed=1)
    with pytest.raises(ValueError, match="--total"):
        figure2.corpus(records, ["tavi"], 13, seed=0)


def test_figure3_knows_the_a_that_a_run_started_from(place, tmp_path):
    """At the first step A has no gradient, so a run of one step ends with its first A."""
    args, records, val = prepared(place, tmp_path, "--max-steps", "1")
    for seed in (0, 1000):
        flags = common.train_flags(args, common.lora(8), rate=4e-3, seed=seed, epochs=1,
                                   data=records, val=val)
        run, = common.run_all([flags], args)
        found = figure3.matrices(flags, run["folder"])
        assert all(torch.equal(found["a"][name], found["start"][name]) for name in found["a"])
        assert any(found["b"][name].any() for name in found["b"])
    assert figure3.mean_over([found, found], "a", figure3.cosine) == pytest.approx(1)
    assert figure3.mean_over([found, found], "a", figure3.overlap) == pytest.approx(1)


def test_the_overlap_of_row_spaces_knows_no_basis():
    a, b = torch.randn(2, 4, 40, generator=torch.Generator().manual_seed(0))
    change = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    assert figure3.overlap(change @ a, a).item() == pytest.approx(1, abs=1e-5)
    assert abs(figure3.cosine(change @ a, a)) < 0.9
    assert figure3.overlap(change @ a, b).item() == pytest.approx(figure3.overlap(a, b).item(),
                                                                  abs=1e-5)
    assert figure3.overlap(a.T, b.T).item() == pytest.approx(figure3.overlap(a, b).item())
    many = torch.randn(200, 2, 4, 40, generator=torch.Generator().manual_seed(2))
    chance = sum(figure3.overlap(*pair).item() for pair in many) / 200
    assert chance == pytest.approx(4 / 40, abs=0.01)
    assert figure3.by_chance({"w1": a}) == pytest.approx(4 / 40)
    assert figure3.by_chance({"w1": a, "w2": torch.empty(20, 4)}) == pytest.approx(
        (4 / 40 + 4 / 20) / 2)
    assert figure3.overlap(torch.eye(4)[:2], torch.eye(4)[1:3]).item() == pytest.approx(0.5)


def test_mutual_information_of_known_tables():
    assert routing.mutual_information(torch.tensor([[3.0, 6.0], [1.0, 2.0]])) == pytest.approx(0)
    assert routing.mutual_information(torch.eye(2)) == pytest.approx(1)
    assert routing.mutual_information(torch.eye(8)) == pytest.approx(3)
    table = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    slow = sum(v / 4 * math.log2(v / 4 / (row / 4 * column / 4))
               for v, row, column in [(1, 2, 1), (1, 2, 3), (2, 2, 3)])
    assert routing.mutual_information(table) == pytest.approx(slow)


def tampered(tokenizer):
    """A model with heads that differ, its sequences in batches, and train.py's arguments."""
    torch.manual_seed(0)
    model = tiny_model()
    add_hydralora(model, rank=4, heads=3)
    with torch.no_grad():
        for layer in hydra_layers(model).values():
            layer.lora_B.normal_(std=0.3)
    records = train_val_split(read_records(WORLD / "val.jsonl"), 0.03, seed=0)[1]
    sequences, _ = encode_records(records, tokenizer, 128)
    for place, sequence in enumerate(sequences):
        sequence.record = place
    return model, sequences, train.parse_args(["--device", "cpu"])


def test_the_gate_is_tampered_with_only_as_named(tokenizer):
    model, sequences, args = tampered(tokenizer)
    batches = [sequences[:7], sequences[7:]]
    whole = routing.loss_with(model, batches, args, lambda name, w, real: w)
    plain = evaluation.evaluate(model, sequences, args, "")[""]["loss"]
    assert whole == pytest.approx(plain, rel=1e-5)
    for change in (routing.uniform, routing.shuffled, routing.without_head(1)):
        assert abs(routing.loss_with(model, batches, args, change) - whole) > 1e-4
    assert whole == routing.loss_with(model, batches, args, lambda name, w, real: w)  # restored
    real = torch.tensor([[True, True, True], [True, False, False]])
    w = torch.rand(2, 3, 4).softmax(-1)
    dealt = routing.shuffled("", w, real)
    assert sorted(dealt[real].tolist()) == sorted(w[real].tolist()) and not dealt.equal(w)
    assert dealt[~real].equal(w[~real])  # padding neither gives nor takes
    less = routing.without_head(2)("", w, real)
    assert not less[..., 2].any() and torch.allclose(less.sum(-1), torch.ones(2, 3))
    assert torch.allclose(less[..., 0] / less[..., 1], w[..., 0] / w[..., 1])
    assert routing.uniform("", w, real).unique().tolist() == [0.25]


def test_gate_sums_by_category_are_the_routing_of_train_py(tokenizer):
    model, sequences, args = tampered(tokenizer)
    known = evaluation.routing_report(model, sequences, args)
    sums, tokens, entropy = routing.gate_sums(model, [sequences[:9], sequences[9:]], args)
    categories = [sequence.category for sequence in sequences]
    each = routing.by_category(tokens, categories)[:, None]
    for name, own in sums.items():
        mean = (routing.by_category(own, categories) / each).tolist()
        for row, category in zip(mean, sorted(set(categories))):
            assert row == pytest.approx(known["gate"][name][category], abs=1e-5)
        assert entropy[name] == pytest.approx(known["entropy"][name], abs=1e-5)
    found, chance = routing.information(sums, categories)
    assert found >= 0 and chance >= 0


def test_an_untrained_router_reads_what_the_trained_layers_read(tokenizer):
    model, sequences, args = tampered(tokenizer)
    batches = [sequences[:9], sequences[9:]]
    own = {name: layer.router.detach() for name, layer in hydra_layers(model).items()}
    sums, tokens, _ = routing.gate_sums(model, batches, args)
    again, count, _ = routing.gate_sums(model, batches, args, routing.gates_by(own))
    assert count.equal(tokens)
    for name in sums:
        assert torch.allclose(sums[name], again[name], atol=1e-4)
    turned = {name: router.flip(0) for name, router in own.items()}
    other, _, _ = routing.gate_sums(model, batches, args, routing.gates_by(turned))
    for name in sums:
        assert torch.allclose(sums[name], other[name].flip(1), atol=1e-4)


def test_the_untrained_router_is_that_of_the_runs_start(place, tmp_path):
    args, records, val = prepared(place, tmp_path, "--max-steps", "1")
    flags = common.train_flags(args, common.hydra(3), rate=4e-3, seed=1, epochs=1, data=records,
                               val=val)
    run, = common.run_all([flags], args)
    layers = hydra_layers(common.trained_model(run)[0])
    found = routing.untrained(run, layers)
    for name, layer in layers.items():  # the first step has no gradient for the router
        assert found["as drawn"][name].equal(layer.router)
    with torch.no_grad():
        for layer in layers.values():
            layer.router.mul_(5)
    for name, router in routing.untrained(run, layers)["of the trained norm"].items():
        assert torch.allclose(router, layers[name].router)


def test_a_part_of_the_rank_is_removed_and_comes_back(tokenizer):
    torch.manual_seed(0)
    model = tiny_model()
    add_hydralora(model, rank=7, heads=1)
    for layer in hydra_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    before = [layer.lora_B.clone() for layer in hydra_layers(model).values()]
    gone = 0
    for part in range(3):
        with routing.less_rank(model, part, 3):
            zeros = {int((layer.lora_B == 0).all(dim=1).sum())
                     for layer in hydra_layers(model).values()}
            gone += zeros.pop()
            assert not zeros
    assert gone == 7
    assert all(a.equal(layer.lora_B) for a, layer in zip(before, hydra_layers(model).values()))


# ---------------------------------------------------------------- retention, mechanism, figure2


def curve(*points):
    """{rate: [run]} of one seed."""
    return {1e-3 * 2 ** i: [{"metrics": {"val_loss": loss, "kept": {"loss": kept}}}]
            for i, (loss, kept) in enumerate(points)}


def test_what_is_kept_is_read_off_where_the_curve_comes_down_to_the_level():
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


def test_a_rate_at_which_a_seed_diverges_is_left_out_and_no_rate_is_refused(place, tmp_path,
                                                                            monkeypatch):
    args, records, val = prepared(place, tmp_path, "--rates", "4e-3", "8e-3")
    diverged = {8e-3}

    def run_all(flags, args):
        asked = [train.parse_args(one) for one in flags]
        return [{"reason": "loss nan", "folder": one.lr} if one.seed and one.lr in diverged
                else {"metrics": {"val_loss": one.lr}} for one in asked]

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
    claims = {c["claim"]: c for c in retention.make_claims(kept)}
    assert claims[retention.PRIMARY]["difference"]["mean"] == pytest.approx(0.45)
    last = claims["at equal learning LoRA r8 keeps more than full"]
    assert last["difference"] is None and last["verdict"] == "not shown"


def test_an_update_is_switched_off_and_measured_against_the_frozen_output(tokenizer):
    model, sequences, args = tampered(tokenizer)
    layers = hydra_layers(model)
    whole = retention.update_size(model, [sequences[:4]])
    with retention.switched_off(layers.values()):
        assert retention.update_size(model, [sequences[:4]]) == 0
        off = routing.loss_with(model, [sequences[:4]], args, routing.unchanged)
    assert off != routing.loss_with(model, [sequences[:4]], args, routing.unchanged)
    assert retention.update_size(model, [sequences[:4]]) == whole > 0
    for layer in list(layers.values())[1:]:
        layer.scale = 0.0
    one, inputs = next(iter(layers.values())), []
    hook = one.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    for sequence in sequences[:4]:
        model.hidden_states(torch.tensor([sequence.ids[:-1]]))
    hook.remove()
    x = torch.cat([part[0] for part in inputs])
    slow = ((one(x) - one.base(x)).norm() / one.base(x).norm()).item()
    assert retention.update_size(model, [sequences[:4]]) == pytest.approx(slow / len(layers),
                                                                          rel=1e-4)


@pytest.mark.parametrize("count, sizes", [(1, [1]), (2, [1, 2]), (8, [1, 4, 8]), (9, [1, 3, 9]),
                                          (10, [1, 5, 10]), (11, [1, 11])])
def test_figure2_deals_every_family_at_every_size(count, sizes):
    assert figure2.sizes(count) == sizes and not [n for n in sizes if count % n]


def test_growth_is_claimed_from_five_seeds_on():
    for seeds, claimed in ((4, 0), (5, 4)):
        gaps = {(name, size): [0.1 * size + 0.01 * seed for seed in range(seeds)]
                for name in figure2.LINES for size in (1, 8)}
        claims = figure2.make_claims(gaps, [1, 8], seeds)
        assert sum("grows" in c["claim"] or "wider" in c["claim"] for c in claims) == claimed
        assert len(claims) == claimed + 2


@pytest.mark.parametrize("layer", mechanism.LAYERS)
def test_the_toys_lora_has_the_size_of_its_hydralora(layer):
    sizes = [mechanism.new_model(layer, *shape)[1] for shape in mechanism.methods(layer).values()]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_the_toys_tasks_differ_by_their_cue_alone():
    torch.manual_seed(0)
    a, b = torch.randn(2, 56), torch.randn(8, 64, 2)
    x, update = mechanism.draw_tokens(16, a, b)
    for token, row in zip(x, update):
        cue = token[56:]
        assert sorted(cue.tolist()) == [0] * 7 + [mechanism.CUE]
        assert torch.allclose(row, b[cue.argmax()] @ (a @ token[:56]), atol=1e-4)


@pytest.mark.slow
def test_one_linear_map_for_contradicting_tasks_is_left_with_most_of_them():
    """An eighth of the update is what the mean of eight maps explains; heads have no such end."""
    left = {heads: mechanism.unexplained("linear", "contradict", (heads, rank), 1.13e-2, 50, 150)
            for heads, rank in ((8, 2), (1, 13))}
    assert left[1] > 0.8 and left[8] < 0.2


@pytest.mark.slow
def test_a_rerun_on_more_threads_is_a_run_of_its_own_in_one_process(place, tmp_path, monkeypatch):
    args, records, val = prepared(place, tmp_path, "--runs", str(tmp_path / "runs"))
    flags = [common.train_flags(args, common.lora(2), rate=4e-3, seed=seed, epochs=1, data=records,
                                val=val) for seed in range(2)]
    runs = common.run_all(flags, args)
    args.jobs = 2
    monkeypatch.setattr(common.multiprocessing, "get_context", None)  # no process beside this one
    found = common.rerun("LoRA", runs, args)
    again = common.run_all(flags, args, threads=common.THREADS)
    assert not {run["folder"] for run in runs} & {run["folder"] for run in again}
    assert {run["versions"]["threads"] for run in runs} == {1}
    assert {run["versions"]["threads"] for run in again} == {common.THREADS}
    moved = [a - b for a, b in zip(common.values(runs), common.values(again))]
    assert found["moved"]["val_loss"]["scatter"] == pytest.approx(
        math.sqrt(sum(m * m for m in moved) / 2))
    assert "LoRA by (root mean square over 2 runs)" in common.rerun_text(found)


def test_information_by_chance_is_what_a_gate_without_categories_has():
    categories = ["a", "b"] * 40
    blind = {"layer": torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).repeat(20, 1)}
    sees = {"layer": torch.eye(2).repeat(40, 1)}
    found, chance = routing.information(blind, categories)
    assert found == pytest.approx(0, abs=1e-9) and 0 < chance < 0.1
    found, chance = routing.information(sees, categories)
    assert found == pytest.approx(1) and chance < 0.1


def test_zero_router_and_zero_b_leave_copies_and_a_random_router_does_not(place, tmp_path):
    args, records, val = prepared(place, tmp_path, "--max-steps", "0")
    flags = common.train_flags(args, common.hydra(3), rate=4e-3, seed=0, epochs=4, data=records,
                               val=val)
    zero, random = (collapse.watch(flags, records, start, every=4)
                    for start in ("router 0, B 0", "router random, B 0"))
    assert zero["apart"][-1] == 0 and zero["steps"] == [1, 5, 9, 13, 17, 21, 24]
    assert random["apart"][-1] > 0 and random["cosine"][-1] < zero["cosine"][-1]
    assert collapse.separated(zero) is None
    assert collapse.separated({"steps": [1, 5], "cosine": [0.95, 0.5]}) == 5
    assert collapse.separated({"steps": [1, 5, 9, 13], "cosine": [0.1, 0.95, 0.5, 0.4]}) == 9
