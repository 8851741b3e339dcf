"""Is the embedded world what it should be? The measures that it was chosen by.

    the quiz      can rise and can fall: the base is neither at chance nor perfect, tuning raises it
    validation    is not the training set again: its atoms, or their combinations, are new
    answers       come out right after tuning, in every family
    methods       can be told apart: full fine-tuning ends ahead of LoRA of rank 8; families
                  interfere: LoRA on one alone does better than on the mix; no rate near collapses

    python -m experiments.check_world

Every arm sweeps its own learning rate on a held-out part of its training data; the validation set
and the quiz are read at the rate so chosen. HydraLoRA is not run: the world is not chosen by it.
"""

import math
import statistics
import sys
from itertools import chain
from pathlib import Path

import train
from data import WORLD
from data.corpus import read_records
from data.make.families import FAMILIES, atoms
from experiments import common
from experiments.common import FULL, lora
from experiments.report import difference, interval, show
from support.cli import Parser

RATES = {"full": (2.5e-4, 5e-4, 1e-3, 2e-3), "lora": (1e-3, 2e-3, 4e-3, 8e-3)}
ALONE_RATES = (4e-3, 8e-3)  # of LoRA on a family alone, which takes few steps
ALONE_SEEDS = 2
# clipped as when the world was chosen
ARMS = {"full": {**FULL, "clip": 1.0}, "LoRA r8": lora(8, clip=1.0),
        "LoRA r24": lora(24, clip=1.0)}
CHANCE = 0.25  # accuracy of guessing
COLLAPSED = 1.5  # loss at twice the best rate, divided by the loss at the best
NAMES = list(FAMILIES)
# one seed chooses among these rates alone, on the records that train.py itself would hold out
SWEEP = dict(seeds=1, share=train.VAL_SHARE, widen=0)


# ---------------------------------------------------------------- the measures: (holds, text) each


def check_quiz(args, runs):
    """The base's accuracy, the size of the quiz, and what tuning adds."""
    world = {"base": {"folder": WORLD / "base"}}
    base = common.quiz_accuracies(world, WORLD / "quiz", args)["base"]
    count = sum(len(p.read_text(encoding="utf-8").splitlines())
                for p in (WORLD / "quiz" / "test").glob("*.csv"))
    yield 0.30 <= base <= 0.50, f"the base answers {base:.1%} of {count} quiz questions: 30 to 50"
    yield count >= 1000, f"{count} questions: at least 1,000"
    gains = []
    for name in ("full", "LoRA r8"):
        scores = common.values(runs[name], "quiz")
        gains.append(difference(scores, [base] * len(scores)))
        spread = statistics.stdev(scores) if scores[1:] else math.nan
        print(f"        {name}: quiz {show(interval(scores), percent=True)}, over the base "
              f"{100 * gains[-1]['mean']:+.1f} points")
        yield spread <= 0.02, f"{name}: its seeds differ by {100 * spread:.1f} points: at most 2"
        yield (min(scores) > CHANCE + 0.03,
               f"{name}: its lowest seed has {min(scores):.1%}: above chance, 25")
    best = max(gains, key=lambda gain: gain["mean"])
    yield (best["mean"] >= 0.05 and (best["low"] or 0) > 0,
           f"tuning raises the quiz by {show(best, percent=True)}: at least 5 points, the "
           "interval above zero")


def check_atoms(records, val):
    """The share of the validation's atoms that never occurs in training."""
    new = []
    for name in NAMES:
        trained, asked = ({a for r in part if r["category"] == name for a in atoms(r)}
                          for part in (records, val))
        new.append(len(asked - trained) / len(asked))
        print(f"        {name:16}{len(asked):5} atoms in validation, {new[-1]:.0%} new")
    yield new.count(1) >= len(NAMES) / 2, "in at least half of the families all atoms are new"


def check_answers(runs):
    """Exact matches, with LoRA of as many ranks as the main command has."""
    exact = {name: {family: statistics.mean(run["metrics"]["categories"][family]["exact_match"]
                                            for run in found) for family in NAMES}
             for name, found in runs.items()}
    right = {name: interval(common.values(found, "exact_match")) for name, found in runs.items()}
    for name, found in runs.items():
        loss, kept = (interval(common.values(found, metric)) for metric in ("val_loss", "kept"))
        base = found[0]["metrics"]["kept"]["loss_base"]
        print(f"        {name}: validation loss {show(loss)}, right "
              f"{show(right[name], percent=True)}, kept: loss {base:.2f} -> {show(kept, digits=2)}")
        for part in (NAMES[:5], NAMES[5:]):
            print(10 * " " + ", ".join(f"{family} {exact[name][family]:.0%}" for family in part))
    tuned, full = right["LoRA r24"]["mean"], right["full"]["mean"]
    worst = min(NAMES, key=exact["LoRA r24"].get)
    lowest = exact["LoRA r24"][worst]
    yield tuned >= 0.5, f"LoRA r24 answers {tuned:.1%}: at least 50"
    yield lowest >= 0.15, f"LoRA r24 in its worst family, {worst}: {lowest:.1%}: at least 15"
    yield full >= 0.8, f"full fine-tuning answers {full:.1%}: at least 80"


def check_gap(args, runs, best, records):
    """Full fine-tuning ends ahead of LoRA, and no arm collapses at twice its best rate."""
    full, small = (common.values(runs[name]) for name in ("full", "LoRA r8"))
    share = interval([1 - a / b for a, b in zip(full, small)])
    yield (share["mean"] >= 0.15, f"full fine-tuning ends {show(share, percent=True)} below LoRA "
           "r8 in validation loss: at least 15")
    for name, rate in best.items():
        tried = common.tune({name: (ARMS[name], [records])}, args, (rate, 2 * rate), **SWEEP)
        ratio = tried[name]["losses"][2 * rate][0] / tried[name]["losses"][rate][0]
        yield (ratio < COLLAPSED, f"{name}: at {2 * rate:g}, twice its best rate, the loss is "
               f"{ratio:.2f} times as high: no collapse")


def check_interference(args, records, val, mixed):
    """LoRA r8 on one family alone, at the same number of its records."""
    config = ARMS["LoRA r8"]
    alone = {name: common.of_families(records, [name]) for name in NAMES}
    best = sweep(args, {name: (config, [alone[name]]) for name in NAMES}, ALONE_RATES)
    runs = common.run_seeds({name: common.run_flags(
        args, config, rate=best[name], records=alone[name],
        val=common.of_families(val, [name])) for name in NAMES}, args,
        seeds=min(ALONE_SEEDS, args.seeds))
    better = 0
    print(f"        {'family':16}{'LoRA r8 on the mix':>20}{'on it alone':>20}{'change':>9}")
    for name in NAMES:
        own = interval(common.values(runs[name]))
        together = interval(run["metrics"]["categories"][name]["val_loss"] for run in mixed)
        change = own["mean"] / together["mean"] - 1
        better += change < 0
        print(f"        {name:16}{show(together):>20}{show(own):>20}{change:9.1%}")
    yield better >= 6, f"{better} of {len(NAMES)} families are learned better alone: at least 6"


def sweep(args, arms, rates):
    """{name: best rate} of arms as in common.tune."""
    return {name: tried["rate"] for name, tried in common.tune(arms, args, rates, **SWEEP).items()}


def parse_args(argv):
    p = Parser("experiments.check_world", __doc__)
    p.add_argument("--seeds", type=int, default=3, help="runs per arm (3)")
    p.add_argument("--epochs", type=int, default=train.WORLD_RECIPE["epochs"],
                   help="passes over the data (%(default)s)")
    p.add_argument("--jobs", type=int, default=2, help="processes of one thread each (2)")
    p.add_argument("--runs", type=Path, default=Path("runs/check_world"),
                   help="folder that keeps the runs (runs/check_world)")
    p.set_defaults(weights=str(WORLD / "base"), keep_data=str(WORLD / "keep.jsonl"), max_steps=0,
                   max_seq_len=None, first_seed=0)
    args = p.parse_args(argv)
    args.sweep_epochs = args.epochs
    return args


def run(args):
    records, val = (read_records(WORLD / f"{name}.jsonl") for name in ("train", "val"))
    best = {}
    for name, config in ARMS.items():
        best |= sweep(args, {name: (config, [records])}, RATES[config["method"]])
    rates = {**best, "LoRA r24": train.WORLD_RECIPE["lr"]}  # it represents the main command
    runs = common.run_methods(ARMS, rates, args, records, val, WORLD / "quiz")
    checks = []
    for holds, text in chain(check_quiz(args, runs), check_atoms(records, val),
                             check_answers(runs), check_gap(args, runs, best, records),
                             check_interference(args, records, val, runs["LoRA r8"])):
        print(f"{'holds' if holds else 'MISSED':8}{text}", flush=True)
        checks.append(holds)
    print(f"\n{sum(checks)} of {len(checks)} measures hold")


if __name__ == "__main__":
    sys.exit(common.main("check_world", parse_args, run))
