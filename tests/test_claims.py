"""experiments/: every script at a minute size, the statistics against slow twins, and the rules."""

import json
import math
import shutil
import sys

import pytest
import torch

import train
from data.corpus import encode_records, hold_out, read_records
from experiments import collapse, common, figure2, figure3, heads, routing, table1
from hydralora import add_hydralora, hydra_layers
from model import save_llama
from support import evaluation
from tests.conftest import ROOT, WORLD, tiny_model

FAMILIES = ("tavi", "calendar", "arithmetic", "code")
SCRIPTS = {"table1": (table1, ["--scaling", "constant", "--quiz", "QUIZ"]),
           "heads": (heads, ["--heads", "1", "2"]),
           "figure2": (figure2, ["--total", "12", "--families", "2", "4"]),
           "figure3": (figure3, ["--families", "tavi", "code", "--rank", "8"]),
           "routing": (routing, ["--heads", "3"]), "collapse": (collapse, ["--every", "1"])}


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


def prepared(place, out, *more):
    p = common.parser("test", common.__doc__, seeds=2, epochs=1)
    return common.prepare(p, [*flags_of(place, out), *SWEPT, *more])


# ---------------------------------------------------------------- what is published


# sha256 of base and training records of the world in commit 5045320, which the results are of
FORMER_WORLD = {"weights": "5d92d88c2f7afad8cf9c4afaf41fc0fec7bbe613e9c1d0093e7e46eba9d8e856",
                "data": "4dc522fd531e6bd95c209365f7b05b0cda1f4b88e2bd8cb9b0b6541ab8fe8b07"}


@pytest.mark.parametrize("name", [*SCRIPTS, "table1-dolly"])
def test_published_results_are_of_the_world_that_they_name_and_shown_as_written(name):
    shown = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    assert (common.RESULTS / f"{name}.md").read_text(encoding="utf-8") in shown
    assert f"(results/{name}.png)" in shown and (common.RESULTS / f"{name}.png").exists()
    made = json.loads((common.RESULTS / f"{name}.json").read_text(encoding="utf-8"))["conditions"]
    if name != "table1-dolly":
        assert {key: made[key] for key in FORMER_WORLD} == FORMER_WORLD
        for page in (shown, (ROOT / "README.md").read_text(encoding="utf-8")):
            assert "commit 5045320" in " ".join(page.split())
    assert made["recipe"] == common.RECIPE


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
    script, more = SCRIPTS[name]
    more = [str(place / "quiz") if flag == "QUIZ" else flag for flag in more]
    command = [*flags_of(place, tmp_path), *(SWEPT if name != "collapse" else []), *more]
    assert common.run_experiment(name, script.main, command) == 0
    written = {end: (tmp_path / f"{name}.{end}").read_bytes() for end in ("json", "md")}
    result = json.loads(written["json"])
    assert {c["verdict"] for c in result["claims"]} <= {"holds", "does not hold", "undecided here"}
    assert written["md"].decode() in capsys.readouterr().out
    assert common.run_experiment(name, script.main, command) == 0
    assert written == {end: (tmp_path / f"{name}.{end}").read_bytes() for end in ("json", "md")}
    out = capsys.readouterr().out
    assert "run 1 of" not in out and ("0 of them to be computed" in out or name == "collapse")


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
    assert len(table1.methods(args, 4)) == 16
    args.scaling = "constant"
    assert {c["alpha"] / c["rank"] for c in table1.methods(args, 4).values() if "rank" in c} == {4}
    assert list(table1.methods(args, 4)) == [*table1.methods(args, 3)][:8] + [
        "HydraLoRA 4x8, k-means"] + [*table1.methods(args, 3)][8:]  # 3 heads stand there already


def test_claims_pair_methods_of_one_scaling():
    def run(loss):
        return [{"metrics": {"val_loss": loss + seed}} for seed in (0.0, 0.25)]

    runs = {"LoRA r8": run(2), "LoRA r32": run(1), "LoRA r32, alpha 32": run(1.5)}
    found = {c["claim"]: c["difference"]["mean"] for c in table1.make_claims(runs)}
    assert found == {"a higher rank helps: LoRA r32 ahead of LoRA r8": 1,
                     "a higher rank helps: LoRA r32, alpha 32 ahead of LoRA r8": 0.5}


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
    script, more = SCRIPTS[name]
    more = [str(place / "quiz") if flag == "QUIZ" else flag for flag in more]
    script.main([*flags_of(place, tmp_path), *(SWEPT if name != "collapse" else []), *more])
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
        seen.append([p.get_default(key) for key in ("records", "epochs", "sweep_epochs", "rates",
                                                    "max_steps", "max_seq_len")])
        raise ValueError("enough")

    monkeypatch.setattr(common, "prepare", prepare)
    for script in (table1, heads, routing):
        with pytest.raises(ValueError, match="enough"):
            script.main([])
    assert seen == [seen[0]] * 3 and seen[0][0] == common.MIXED


def test_records_are_drawn_and_without_validation_data_a_tenth_is_held_out(place, tmp_path):
    p = common.parser("test", common.__doc__, seeds=1, epochs=1)
    _, records, val = common.prepare(p, [*flags_of(place, tmp_path, val=False), "--records", "20"])
    assert (len(records), len(val)) == (18, 2)
    whole = read_records(place / "train.jsonl")
    assert all(record in whole for record in records + val)
    assert not [record for record in records if record in val]
    args, records, val = common.prepare(p, [])
    assert (len(records), len(val), args.weights) == (12800, 1200, str(WORLD / "base"))


@pytest.mark.slow
def test_no_learning_rate_is_chosen_by_the_validation_set(place, tmp_path, monkeypatch):
    """Every run of the sweep trains and is measured on training records alone, the same for all
    methods; the validation set is read by the other runs only."""
    asked = []

    def run_all(runs, args, quiz=None):
        asked.append([train.parse_args(flags) for flags in runs])
        return [{"metrics": {"val_loss": run.lr, "exact_match": 0.0},
                 "parameters": {"trainable": 1}} for run in asked[-1]]

    monkeypatch.setattr(common, "run_all", run_all)
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
    assert {run.epochs for run in last} == {3} and {run.lr for run in last} == {0.0005}
    assert all(read_records(run.val_data) == validation for run in last)
    assert all(read_records(run.data) == known for run in last)


def test_the_sweep_widens_at_an_edge_and_stops_inside():
    def measure_around(best):
        return lambda asked: [abs(math.log2(rate / best[name])) for name, rate in asked]

    best = {"inside": 4e-3, "above": 1.6e-2, "below": 1e-4}
    losses = common.sweep(best, (2e-3, 4e-3, 8e-3), measure_around(best))
    assert sorted(losses["inside"]) == [2e-3, 4e-3, 8e-3]
    assert sorted(losses["above"]) == [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
    assert common.best_rate(losses["above"]) == 1.6e-2
    assert sorted(losses["below"]) == [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3]  # at most three more
    assert common.sweep(["one"], [4e-3], measure_around({"one": 1})) == {
        "one": {4e-3: pytest.approx(7.9658, abs=1e-4)}}


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
    assert tried["lora"][0.9] == math.inf and common.best_rate(tried["lora"]) < 0.1
    assert "diverged" in common.rates_table(tried)
    with pytest.raises(ValueError, match="diverged at the rate"):
        common.run_seeds({"lora": common.lora(2)}, {"lora": {0.9: 1.0}}, args, records, val)
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
    assert len(calls) == 3 + 2  # two of four runs were not computed again
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


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 30])
def test_t_quantiles_leave_a_fortieth_in_the_tail(freedom):
    """A slow twin: Simpson's rule over Student's density from 0 to the quantile."""
    norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(
        freedom * math.pi)

    def density(x):
        return norm * (1 + x * x / freedom) ** (-(freedom + 1) / 2)

    t, n = common.T_975[freedom - 1], 2000
    h = t / n
    inside = h / 3 * sum(density(i * h) * (1 if i in (0, n) else 4 if i % 2 else 2)
                         for i in range(n + 1))
    assert 0.5 + inside == pytest.approx(0.975, abs=3e-5)


def test_intervals_and_paired_differences_by_hand():
    found = common.interval([1.0, 2.0, 3.0])  # s = 1, t = 4.303: half is 4.303 / sqrt(3)
    assert found["mean"] == 2 and found["high"] - 2 == pytest.approx(2.48434, abs=1e-4)
    assert found["low"] == pytest.approx(-0.48434, abs=1e-4)
    # far apart from seed to seed, yet B is ahead by 0.1, 0.2, 0.3 each time: s = 0.1
    pair = common.difference([1.1, 5.2, 9.3], [1.0, 5.0, 9.0])
    assert pair["mean"] == pytest.approx(0.2) and pair["low"] == pytest.approx(-0.04843, abs=1e-4)
    assert common.interval([7.0]) == {"mean": 7.0, "low": None, "high": None, "values": [7.0]}
    assert common.interval(range(40))["high"] > common.interval(range(40))["mean"]
    with pytest.raises(ValueError, match="paired"):
        common.difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize("values, said", [
    ([1.0, 1.1, 0.9], "holds"), ([-1.0, -1.1, -0.9], "does not hold"),
    ([1.0, -1.0, 0.1], "undecided here"), ([5.0], "undecided here"),
    ([0.0, 0.0], "undecided here")])
def test_a_verdict_follows_from_the_interval(values, said):
    assert common.claim("x", common.interval(values))["verdict"] == said


def test_tables_line_up_and_numbers_are_shown_with_their_intervals():
    table = common.markdown(["a", "long name"], [[1, "x"], ["yy", 22]])
    assert table == ("| a  | long name |\n|----|-----------|\n| 1  | x         |\n"
                     "| yy | 22        |")
    stat = {"mean": 0.5, "low": 0.25, "high": 0.75}
    assert common.show(stat) == "0.5000 ± 0.2500" and common.show(None) == "-"
    assert common.show(stat, percent=True) == "50.0 ± 25.0 %"
    assert common.signed(stat, 2) == "+0.50 ± 0.25"
    assert common.show(common.interval([1.0])) == "1.0000"
    assert common.plain({1: [math.inf, 2.0]}) == {"1": [None, 2.0]}


@pytest.mark.slow
def test_matched_ranks_have_the_parameters_of_hydralora_router_included():
    args, _, _ = common.prepare(common.parser("test", common.__doc__, seeds=1, epochs=1), [])
    model = tiny_model(dim=128, n_layers=6, multiple_of=32)
    assert common.count_trainable(args, 3, 8) == add_hydralora(model, rank=8, heads=3)
    wanted = common.count_trainable(args, 3, 8)
    for heads_ in range(1, 9):
        rank = common.matched_rank(args, heads_, wanted)
        off = {r: abs(common.count_trainable(args, heads_, r) - wanted)
               for r in (rank - 1, rank, rank + 1) if r > 0}
        assert min(off.values()) == off[rank]
    assert common.matched_rank(args, 3, wanted) == 8


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
    assert figure3.mean_cosine([found, found], "a") == pytest.approx(1)


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
    records = hold_out(read_records(WORLD / "val.jsonl"), 0.03, seed=0)[1]
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
    sums, tokens, entropy = routing.gate_sums(model, [sequences[:9], sequences[9:]], args,
                                              len(sequences))
    categories = [sequence.category for sequence in sequences]
    each = routing.by_category(tokens, categories)[:, None]
    for name, own in sums.items():
        mean = (routing.by_category(own, categories) / each).tolist()
        for row, category in zip(mean, sorted(set(categories))):
            assert row == pytest.approx(known["gate"][name][category], abs=1e-5)
        assert entropy[name] == pytest.approx(known["entropy"][name], abs=1e-5)
    found, chance = routing.information(sums, categories)
    assert found >= 0 and chance >= 0


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
