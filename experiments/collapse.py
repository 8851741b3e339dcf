"""Zero router plus zero B: why HydraLoRA's heads would stay one head, and what tells them apart.

Every B starts at zero, so at the first step each B_i gets the same gradient times its gate. With a
router of zeros the gates are equal, and with them the heads, the gradients of the gates, and all
that follows: a LoRA of the same rank. Each start below is trained by the same steps; printed is the
mean cosine between the B matrices (1: copies), and how many steps it takes to stay below 0.9. That
is arithmetic and no sample: there are no claims and intervals here, and a test holds the copies.

    python -m experiments.collapse   # 5 runs of 300 steps
"""

import math
import statistics
import sys
from itertools import combinations

import torch
import torch.nn.functional as F

import train
from data.corpus import encode_records
from experiments import common
from experiments.common import hydra
from experiments.report import markdown, write_results
from hydralora import hydra_layers

APART = 0.9
# (factor of the router's own random start, standard deviation of B)
STARTS = {"router 0, B 0": (0.0, 0.0), "router x 1e-6, B 0": (1e-6, 0.0),
          "router x 1e-3, B 0": (1e-3, 0.0), "router random, B 0": (1.0, 0.0),
          "router 0, B random": (0.0, 1e-3)}
STYLES = ("-", "--", "-.", ":", (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v")


def likeness(model):
    """(mean cosine between the heads' B matrices, largest difference between two of them)."""
    pairs = [pair for layer in hydra_layers(model).values()
             for pair in combinations(layer.lora_B.detach(), 2)]
    return (statistics.fmean(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
                             for a, b in pairs), max((a - b).abs().max().item() for a, b in pairs))


def watch(flags, records, start, every):
    """{steps, cosine, difference}, a value each every so many steps of the run."""
    args = train.parse_args(flags)
    torch.manual_seed(args.seed)
    model, tokenizer = train.load_base(args)
    args = train.resolve_args(args, model, clusters=None)
    train.add_adapters(model, args)
    router, b = STARTS[start]
    with torch.no_grad():
        for layer in hydra_layers(model).values():
            layer.router.mul_(router)
            layer.lora_B.normal_().mul_(b)
    sequences, _ = encode_records(records, tokenizer, args.max_seq_len)
    plan, trace = train.plan_steps(sequences, args), {"steps": [], "cosine": [], "apart": []}
    optimizer, scaler = train.make_optimizer(model, args)
    for row in train.train_steps(model, plan, optimizer, scaler, args):
        if (row["step"] - 1) % every == 0 or row["step"] == len(plan):
            for key, value in zip(trace, (row["step"], *likeness(model))):
                trace[key].append(value)
    return trace


def separated(trace):
    """The first step seen from which on the heads are apart for good, or None."""
    since = None
    for step, cosine in zip(trace["steps"], trace["cosine"]):
        since = None if cosine >= APART else since or step
    return since


def make_table(traces):
    rows = []
    for start, seeds in traces.items():
        steps = [str(separated(trace) or "never") for trace in seeds]
        rows.append([start, ", ".join(f"{trace['cosine'][-1]:.4f}" for trace in seeds),
                     f"{max(trace['apart'][-1] for trace in seeds):.2g}", ", ".join(steps)])
    return markdown(["start", "cosine at the end", "largest difference of two B",
                     "steps until below 0.9 for good"], rows)


def draw_collapse(pyplot, traces):
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for (start, seeds), style, marker in zip(traces.items(), STYLES, MARKERS):
        mean = [statistics.fmean(values) for values in zip(*(trace["cosine"] for trace in seeds))]
        axes.plot(seeds[0]["steps"], mean, linestyle=style, marker=marker, markersize=4,
                  markevery=max(1, len(mean) // 8), label=start)
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("mean cosine between the B matrices")
    axes.legend()
    return figure


def main(argv=None):
    p = common.parser("collapse", __doc__, seeds=1, epochs=1, sweeps=False)
    p.set_defaults(max_steps=300)
    p.add_argument("--every", type=int, default=5, help="steps between two looks (5)")
    args, records, val = common.prepare(p, argv)
    traces = {}
    torch.set_num_threads(1)
    for start in STARTS:
        traces[start] = []
        for seed in range(args.seeds):
            flags = common.train_flags(args, hydra(3), rate=train.WORLD_RECIPE["lr"], seed=seed,
                                       epochs=args.epochs, data=records, val=val)
            key = [start, STARTS[start], args.every, common.run_folder(flags, args.runs).name]
            traces[start].append(common.remember(
                args.runs / f"collapse-{common.digest(key)}.json", key,
                lambda flags=flags, start=start: watch(flags, records, start, args.every)))
            last = traces[start][-1]["cosine"][-1]
            print(f"{start}, seed {seed}: cosine {last if math.isfinite(last) else 'nan'}",
                  flush=True)
    write_results(
        args, "collapse", {"conditions": common.conditions(args, records, val), "traces": traces},
        [make_table(traces)],
        lambda pyplot: draw_collapse(pyplot, traces))
    return 0


if __name__ == "__main__":
    sys.exit(common.run_experiment("collapse", main, None))
