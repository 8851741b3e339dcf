"""Dropout on A x, as hydralora.py has it, against dropout on x, as in LoRA's paper.

A mask on x (T, width) has to be drawn, multiplied and kept for the backward pass in
every adapted layer; one on A x (T, rank) costs almost nothing. Is anything lost? Trains
HydraLoRA on the embedded world both ways, seed by seed, and compares the validation
losses. experiments/benchmark.py measures the time of both.

    python -m experiments.compare_dropout --dropout 0.1 --epochs 1 --seeds 3
"""

import statistics
import sys
from contextlib import nullcontext
from unittest import mock

import train
from experiments.steps import project_masked_on_x
from hydralora import HydraLinear
from support.cli import Parser, run_script
from support.files import read_json

OUT = "runs/compare-dropout"


def parse_args(argv):
    p = Parser("experiments.compare_dropout", __doc__)
    p.add_argument("--dropout", type=float, default=0.1, help="share that is dropped (0.1)")
    p.add_argument("--epochs", type=int, default=1, help="passes over the world's corpus (1)")
    p.add_argument("--max-steps", type=int, default=0, help="stop after so many steps, 0: off (0)")
    p.add_argument("--seeds", type=int, default=3, help="runs of each (3)")
    return p.parse_args(argv)


def run(args):
    losses = {"on A x": [], "on x": []}
    for seed in range(args.seeds):
        flags = ["--dropout", args.dropout, "--epochs", args.epochs, "--seed", seed,
                 "--max-steps", args.max_steps, "--device", "cpu", "--overwrite", "--out", OUT]
        masked_on_x = mock.patch.object(HydraLinear, "project", project_masked_on_x)
        for name, mask in (("on A x", nullcontext()), ("on x", masked_on_x)):
            with mask:
                status = train.main([str(flag) for flag in flags])
            if status:
                return status
            losses[name].append(read_json(f"{OUT}/run.json", "metrics")["metrics"]["val_loss"])
    print(f"\ndropout {args.dropout}, {args.epochs} epochs: validation loss")
    for name, values in losses.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"mask {name:7} {statistics.mean(values):.4f} ± {spread:.4f}   "
              + " ".join(f"{value:.4f}" for value in values))
    return 0


def main(argv=None):
    return run_script("experiments.compare_dropout", parse_args, run, argv)


if __name__ == "__main__":
    sys.exit(main())
