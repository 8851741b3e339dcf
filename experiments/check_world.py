"""Is the embedded world what it should be? The measures that it was chosen by.

HydraLoRA sections 2 and 4 rest on facts that a corpus and a quiz may or may not have:

    the quiz      can rise and can fall: the base is neither at chance nor perfect, tuning raises it
    validation    is not the training set again: its atoms, or their combinations, are new
    answers       come out right after tuning, in every family
    methods       can be told apart: full fine-tuning ends ahead of LoRA of rank 8; families
                  interfere: LoRA on one alone does better than on the mix; no rate near collapses

    python -m experiments.check_world

Every arm sweeps its own learning rate on a held-out part of its training data; the validation set
and the quiz are read at the rate so chosen. HydraLoRA itself is not run here: the
world is not chosen by it. Every run stays in runs/check_world/, so a check that was stopped goes on
where it was.
"""

import math
import statistics
import sys
from pathlib import Path

from data import WORLD
from data.corpus import read_records
from data.make.families import FAMILIES, atoms
from data.make.world import write_records
from experiments.common import FULL, best_rate, lora, quiz_accuracy, run_all, sweep
from experiments.report import difference, interval, show
from support.cli import Parser, flag, run_script
from train import WORLD_RECIPE

RATES = {"full": (2.5e-4, 5e-4, 1e-3, 2e-3), "lora": (1e-3, 2e-3, 4e-3, 8e-3)}
ALONE_RATES, ALONE_SEEDS = (4e-3, 8e-3), 2  # of LoRA on a family alone, which takes few steps
ARMS = {"full": FULL, "LoRA r8": lora(8), "LoRA r24": lora(24)}
CHANCE, COLLAPSED = 0.25, 1.5  # of a loss at twice the best rate, over the loss at the best
NAMES = [family.__name__ for family in FAMILIES]


def flags_of(args, config, rate, seed, data, val=None):
    """The arguments of train.py: the world's recipe; without val, a part of data is held out."""
    flags = {**WORLD_RECIPE, "data": data, "val_data": val, "lr": rate, "seed": seed,
             "keep_data": WORLD / "keep.jsonl" if val == WORLD / "val.jsonl" else None,
             "epochs": args.epochs, "save_every": 0, "device": "cpu", "dtype": "fp32", **config}
    return [part for name, value in flags.items() if value is not None
            for part in (flag(name), str(value))]


def tune(args, asked, quiz=False):
    """The metrics of the runs [(config, rate, seed, data, val)], in order."""
    runs = run_all([flags_of(args, *run) for run in asked], args, WORLD / "quiz" if quiz else None)
    return [run["metrics"] for run in runs]


def swept(args, arms, rates):
    """{name: {rate: held-out loss}} of arms {name: (config, data)} at these rates."""
    tried = sweep(list(arms), rates, lambda asked: [run["val_loss"] for run in tune(
        args, [(arms[name][0], rate, 0, arms[name][1], None) for name, rate in asked])], widen=0)
    for name, losses in tried.items():
        listed = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())
        print(f"        {name}: held-out loss by learning rate {listed}", flush=True)
    return tried


def say(holds, text):
    """One measure, and whether it holds."""
    print(f"{'holds' if holds else 'MISSED':8}{text}", flush=True)
    return holds


# ---------------------------------------------------------------- the measures


def check_quiz(args, runs):
    """Point 2 of docs/world.md."""
    base = quiz_accuracy(str(WORLD / "base"), None, WORLD / "quiz", args.runs / "base-quiz.json")
    count = sum(len(p.read_text(encoding="utf-8").splitlines())
                for p in (WORLD / "quiz" / "test").glob("*.csv"))
    held = [say(0.30 <= base <= 0.50, f"the base answers {base:.1%} of {count} quiz questions: "
                                      "30 to 50"),
            say(count >= 1000, f"{count} questions: at least 1,000")]
    gains = {}
    for name in ("full", "LoRA r8"):
        scores = [run["quiz"] for run in runs[name]]
        gains[name] = difference(scores, [base] * len(scores))
        spread = statistics.stdev(scores) if scores[1:] else math.nan
        print(f"        {name}: quiz {show(interval(scores), percent=True)}, over the base "
              f"{100 * gains[name]['mean']:+.1f} points")
        held += [say(spread <= 0.02, f"{name}: its seeds differ by {100 * spread:.1f} points: "
                                     "at most 2"),
                 say(min(scores) > CHANCE + 0.03, f"{name}: its lowest seed has {min(scores):.1%}: "
                                                  "above chance, 25")]
    best = max(gains.values(), key=lambda gain: gain["mean"])
    held.append(say(best["mean"] >= 0.05 and (best["low"] or 0) > 0,
                    f"tuning raises the quiz by {show(best, percent=True)}: at least 5 points, "
                    "the interval above zero"))
    return held


def check_atoms(train, val):
    """Point 3: the share of the validation's atoms that never occurs in training."""
    new = {}
    for name in NAMES:
        trained, asked = ({a for r in records if r["category"] == name for a in atoms(r)}
                          for records in (train, val))
        new[name] = len(asked - trained) / len(asked)
        print(f"        {name:16}{len(asked):5} atoms in validation, {new[name]:.0%} new")
    return [say(sum(share == 1 for share in new.values()) >= len(NAMES) / 2,
                "in at least half of the families all atoms are new")]


def check_answers(runs):
    """Point 4, with LoRA of as many ranks as the main command has."""
    def exact(name, family=None):
        return statistics.mean((run["categories"][family] if family else run)["exact_match"]
                               for run in runs[name])

    least = min(NAMES, key=lambda family: exact("LoRA r24", family))
    for name, found in runs.items():
        loss, right, kept = (interval(values) for values in zip(*(
            (run["val_loss"], run["exact_match"], run["kept"]["loss"]) for run in found)))
        print(f"        {name}: validation loss {show(loss)}, right {show(right, percent=True)}, "
              f"kept: loss {found[0]['kept']['loss_base']:.2f} -> {show(kept, digits=2)}")
        for part in (NAMES[:5], NAMES[5:]):
            print(10 * " " + ", ".join(f"{family} {exact(name, family):.0%}" for family in part))
    return [say(exact("LoRA r24") >= 0.5, f"LoRA r24 answers {exact('LoRA r24'):.1%}: at least 50"),
            say(exact("LoRA r24", least) >= 0.15, f"LoRA r24 in its worst family, {least}: "
                                                  f"{exact('LoRA r24', least):.1%}: at least 15"),
            say(exact("full") >= 0.8, f"full fine-tuning answers {exact('full'):.1%}: at least 80")]


def check_gap(args, runs, best, mix):
    """Point 5, the first and the last part."""
    full, small = ([run["val_loss"] for run in runs[name]] for name in ("full", "LoRA r8"))
    share = interval([1 - a / b for a, b in zip(full, small)])
    held = [say(share["mean"] >= 0.15, f"full fine-tuning ends {show(share, percent=True)} below "
                                       "LoRA r8 in validation loss: at least 15")]
    for name, rate in best.items():
        once, twice = tune(args, [(ARMS[name], factor * rate, 0, mix, None) for factor in (1, 2)])
        ratio = twice["val_loss"] / once["val_loss"]
        held.append(say(ratio < COLLAPSED, f"{name}: at {2 * rate:g}, twice its best rate, the "
                                           f"loss is {ratio:.2f} times as high: no collapse"))
    return held


def check_interference(args, mix, val, mixed):
    """Point 5, the second part: LoRA r8 on one family alone, at the same number of its records."""
    parts = {}
    for family in NAMES:
        for path in (mix, val):
            parts[family, path] = args.runs / "data" / f"{family}.{path.name}"
            write_records([r for r in read_records(path) if r["category"] == family],
                          parts[family, path])
    tried = swept(args, {family: (ARMS["LoRA r8"], parts[family, mix]) for family in NAMES},
                  ALONE_RATES)
    count = min(ALONE_SEEDS, args.seeds)
    found = tune(args, [(ARMS["LoRA r8"], best_rate(tried[family]), seed, parts[family, mix],
                         parts[family, val]) for family in NAMES for seed in range(count)])
    better = 0
    print(f"        {'family':16}{'LoRA r8 on the mix':>20}{'on it alone':>20}{'change':>9}")
    for i, family in enumerate(NAMES):
        alone = [run["val_loss"] for run in found[i * count:(i + 1) * count]]
        together = [run["categories"][family]["val_loss"] for run in mixed]
        change = statistics.mean(alone) / statistics.mean(together) - 1
        better += change < 0
        print(f"        {family:16}{show(interval(together)):>20}{show(interval(alone)):>20}"
              f"{change:9.1%}")
    return [say(better >= 6, f"{better} of {len(NAMES)} families are learned better alone: at "
                             "least 6")]


def check_world(args):
    mix, val = WORLD / "train.jsonl", WORLD / "val.jsonl"
    tried = {}
    for name, config in ARMS.items():
        tried |= swept(args, {name: (config, mix)}, RATES[config["method"]])
    best = {name: best_rate(losses) for name, losses in tried.items()}
    rates = {**best, "LoRA r24": WORLD_RECIPE["lr"]}  # it stands for the main command
    seeds = range(args.seeds)
    found = tune(args, [(config, rates[name], seed, mix, val)
                        for name, config in ARMS.items() for seed in seeds], quiz=True)
    runs = {name: found[i * args.seeds:(i + 1) * args.seeds] for i, name in enumerate(ARMS)}
    held = check_quiz(args, runs)
    held += check_atoms(read_records(mix), read_records(val))
    held += check_answers(runs)
    held += check_gap(args, runs, best, mix)
    held += check_interference(args, mix, val, runs["LoRA r8"])
    print(f"\n{sum(held)} of {len(held)} measures hold")


def main(argv=None):
    parser = Parser("check_world.py", __doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of every arm (3)")
    parser.add_argument("--epochs", type=int, default=WORLD_RECIPE["epochs"],
                        help="passes over the data (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each (2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/check_world"),
                        help="folder that keeps the runs for the next time (runs/check_world)")
    args = parser.parse_args(argv)
    return run_script("check_world.py", lambda: check_world(args), argv,
                      stopped="stopped; the same command goes on from here",
                      memory="close other programs; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
