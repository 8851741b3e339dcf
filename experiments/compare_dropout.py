"""Where the adapters' dropout acts: on A x, as hydralora.py has it, or on x, as LoRA's authors do.

A mask on x (T, width) has to be drawn, multiplied and kept for the backward pass in every adapted
layer; one on A x (T, rank) costs almost nothing. Is anything lost? Trains HydraLoRA on the embedded
world both ways, seed by seed, and compares the validation losses. The time of both is measured by
experiments/benchmark.py.

    python -m experiments.compare_dropout --dropout 0.1 --epochs 1 --seeds 3
"""

import argparse
import statistics
from contextlib import contextmanager, nullcontext

import torch.nn.functional as F

import train
from hydralora import HydraLinear


def project_masked_on_x(layer, x):
    """HydraLinear.project with the mask on x; the router reads x without it."""
    masked = F.dropout(x, layer.settings.dropout, layer.training)
    return F.linear(masked, layer.lora_A.flatten(0, -2)), F.linear(x, layer.router)


@contextmanager
def masked_on_x():
    """Inside, every HydraLinear drops x in place of A x."""
    original, HydraLinear.project = HydraLinear.project, project_masked_on_x
    try:
        yield
    finally:
        HydraLinear.project = original


MASKS = {"on A x": nullcontext, "on x": masked_on_x}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--dropout", type=float, default=0.1, help="share that is dropped (0.1)")
    p.add_argument("--epochs", type=int, default=1, help="passes over the world's corpus (1)")
    p.add_argument("--max-steps", type=int, default=0, help="stop after so many, 0: off")
    p.add_argument("--seeds", type=int, default=3, help="runs of each (3)")
    args = p.parse_args(argv)
    losses = {name: [] for name in MASKS}
    for seed in range(args.seeds):
        for name, mask in MASKS.items():
            with mask():
                losses[name].append(final_loss(args, seed))
    print(f"\ndropout {args.dropout}, {args.epochs} epochs: validation loss")
    for name, values in losses.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"mask {name:7} {statistics.mean(values):.4f} ± {spread:.4f}   "
              + " ".join(f"{value:.4f}" for value in values))
    return losses


def final_loss(args, seed):
    settings = train.parse_args([
        "--dropout", str(args.dropout), "--epochs", str(args.epochs), "--seed", str(seed),
        "--max-steps", str(args.max_steps), "--device", "cpu", "--overwrite",
        "--out", "runs/compare-dropout"])
    status, result = train.run_training(settings)
    if status:
        raise SystemExit(status)
    return result["metrics"]["val_loss"]


if __name__ == "__main__":
    main()
