"""Can the embedded world tell methods apart? Two measurements that it was chosen by.

HydraLoRA section 2 rests on two facts that a corpus may or may not have, so they are measured:

1. full fine-tuning ends well ahead of LoRA of rank 8 at the same number of steps;
2. families interfere: LoRA of rank 8 tuned on one family alone does better on it than LoRA tuned on
   the whole mix with the same records of that family, for the same number of epochs.

    python -m experiments.check_world

Every arm sweeps its own learning rate on 5 % of its training data; the validation set is read once
per seed, at the rate so chosen. HydraLoRA itself is not run here: the world is not chosen by it.
Every run stays in runs/check_world/, so a check that was stopped goes on where it was.
"""

import statistics
import sys
from pathlib import Path

from data import WORLD
from data.corpus import read_records
from data.make_world import FAMILIES, write_records
from experiments.common import best_rate, read_run, run_folder, sweep, train_once
from support.cli import Parser, run_script

RATES = {"full": (1e-3, 2e-3, 4e-3, 8e-3), "lora": (2e-3, 4e-3, 8e-3, 1.6e-2)}
RUNS = Path("runs/check_world")


def tune(method, data, rate, seed, epochs, val=None):
    """The metrics of one run of train.py, validated on its own held-out part or on val."""
    flags = ["--method", method, "--data", str(data), "--lr", str(rate), "--seed", str(seed),
             "--epochs", str(epochs), "--save-every", "0"]
    flags += ["--val-data", str(val)] if val else []
    folder = run_folder(flags, RUNS)
    train_once(flags, folder)
    return read_run(flags, folder, None)["metrics"]


def swept(method, data, epochs):
    """The learning rate with the lowest loss on a held-out part of the training data."""
    losses = sweep([method], RATES[method], lambda asked: [
        tune(method, data, rate, 0, epochs)["val_loss"] for _, rate in asked], widen=0)[method]
    listed = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in losses.items())
    print(f"{method} on {data.stem}: held-out loss by learning rate {listed}", flush=True)
    return best_rate(losses)


def shown(values):
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if values[1:] else mean


def measure_gap(args, mix, val):
    """Claim 1; returns the runs of LoRA on the mix."""
    runs = {}
    for method in ("full", "lora"):
        rate = swept(method, mix, args.epochs)
        runs[method] = [tune(method, mix, rate, seed, args.epochs, val)
                        for seed in range(args.seeds)]
        print(f"{method}: validation loss {shown([r['val_loss'] for r in runs[method]])}, "
              f"exact match {shown([r['exact_match'] for r in runs[method]])}", flush=True)
    full, lora = (statistics.mean(r["val_loss"] for r in runs[m]) for m in ("full", "lora"))
    print(f"full fine-tuning ends {1 - full / lora:.1%} below LoRA of rank 8\n")
    return runs["lora"]


def measure_interference(args, mix, val, mixed_runs):
    """Claim 2, a line a family."""
    print(f"{'family':16}{'LoRA on the mix':>20}{'LoRA on it alone':>20}{'change':>9}")
    for family in [family.__name__ for family in FAMILIES]:
        parts = {}
        for path in (mix, val):
            parts[path] = RUNS / f"{family}.{path.name}"
            write_records([r for r in read_records(path) if r["category"] == family], parts[path])
        rate = swept("lora", parts[mix], args.epochs)
        alone = [tune("lora", parts[mix], rate, seed, args.epochs, parts[val])["val_loss"]
                 for seed in range(args.seeds)]
        mixed = [r["categories"][family]["val_loss"] for r in mixed_runs]
        change = statistics.mean(alone) / statistics.mean(mixed) - 1
        print(f"{family:16}{shown(mixed):>20}{shown(alone):>20}{change:9.1%}", flush=True)


def main(argv=None):
    parser = Parser("check_world.py", __doc__)
    parser.add_argument("--seeds", type=int, default=2, help="runs of every arm (2)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the data (3)")
    args = parser.parse_args(argv)
    return run_script("check_world.py", lambda: check_world(args), argv,
                      stopped="stopped; the same command goes on from here",
                      memory="close other programs; the same command goes on from here")


def check_world(args):
    mix, val = WORLD / "train.jsonl", WORLD / "val.jsonl"
    measure_interference(args, mix, val, measure_gap(args, mix, val))


if __name__ == "__main__":
    sys.exit(main())
