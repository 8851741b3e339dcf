"""What can a router do that rank cannot? A toy to be read in one sitting: one layer, eight tasks.

A token is 56 random numbers and 8 that name its task. A frozen layer W gets it, and what is to be
learned on top is an update: of rank 2, and for each task another one,

    y = W(x) + B_task A x        the tasks contradict each other: like x, other y
    y = W(x) + B A x             they do not

HydraLoRA 8x2 has a head for each task. One LoRA of its size has a larger rank, but one map for all
tasks: beside a linear W it can learn the mean of the eight at best, an eighth of the target. A
SwiGLU has a gate of its own, silu(w1 x), which multiplies w3 x: with adapters in it, LoRA can tell
the tasks apart as well.

    python -m experiments.mechanism       # two minutes on one slow core

Printed is the share of the update that is left unexplained on new tokens. Every arm is run at the
learning rate that its sweep chose, in which other seeds draw the layer, the tasks and the tokens.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from experiments.common import RESULTS, rates_table, run_experiment, steady_rate, sweep
from experiments.report import (
    claim,
    claims_text,
    difference,
    error_bars,
    interval,
    judged,
    markdown,
    show,
    write_results,
)
from hydralora import TARGETS, adapters_disabled, add_hydralora
from model import FeedForward, ModelArgs
from support.cli import Parser

# as it was committed before the run; the others in make_claims are secondary
PRIMARY = "linear layer, tasks that contradict: HydraLoRA leaves less unexplained than LoRA"
WIDTH, TASKS, RANK, CUE = 64, 8, 2, 2.0  # numbers of a token, 8 of them CUE or 0, the task's name
LAYERS, KINDS = ("linear", "SwiGLU"), ("contradict", "agree")
RATES = (8e-3, 1.13e-2, 1.6e-2)  # to begin with
SWEEP_SEEDS = (100, 101)
BATCH, TEST = 128, 4096  # tokens, new ones every time


def frozen_layer(layer):
    """(module, names of the linear layers that get adapters)."""
    if layer == "linear":
        return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)), ("0",)
    return FeedForward(ModelArgs(dim=WIDTH, n_layers=1, n_heads=1, vocab_size=1,
                                 multiple_of=32)), TARGETS


def new_model(layer, heads, rank):
    """(the frozen layer with adapters, trainable parameters); alpha / rank is 4, as elsewhere."""
    model, targets = frozen_layer(layer)
    for weight in model.parameters():
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model, add_hydralora(model, targets=targets, heads=heads, rank=rank, alpha=4 * rank)


def methods(layer):
    """{name: (heads, rank)}; LoRA's rank gives it the parameters of HydraLoRA, router included."""
    matched = round(new_model(layer, TASKS, RANK)[1] / new_model(layer, 1, 1)[1])
    return {f"HydraLoRA {TASKS}x{RANK}": (TASKS, RANK), f"LoRA r{matched}": (1, matched)}


def draw_tokens(count, a, b):
    """(x, the update that is to be learned) of so many tokens of random tasks."""
    task = torch.randint(TASKS, (count,))
    content = torch.randn(count, WIDTH - TASKS)
    x = torch.cat([content, CUE * F.one_hot(task, TASKS)], dim=1)
    return x, (b[task] @ (content @ a.T)[..., None])[..., 0]  # B_task A x


def unexplained(layer, kind, shape, rate, seed, steps):
    """The share of the update that a trained adapter leaves, 0 to 1 and above."""
    torch.manual_seed(seed)
    a = torch.randn(RANK, WIDTH - TASKS) / (WIDTH - TASKS) ** 0.5
    b = torch.randn(TASKS, WIDTH, RANK) / RANK ** 0.5
    if kind == "agree":
        b = b[:1].expand_as(b)
    model, _ = new_model(layer, *shape)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                  weight_decay=0.0)

    def error(count):
        x, update = draw_tokens(count, a, b)
        with torch.no_grad(), adapters_disabled(model):
            frozen = model(x)
        return (model(x) - frozen - update).square().sum(), update.square().sum()

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        (error(BATCH)[0] / BATCH / WIDTH).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        left, whole = error(TEST)
    share = (left / whole).item()
    return share if math.isfinite(share) else math.inf


def measure(layer, kind, shape, args, name):
    """({rate: [of each sweep seed]}, [of each seed at the rate chosen])."""
    tried = {}

    def losses_at(asked):
        for _, rate in asked:
            tried[rate] = [unexplained(layer, kind, shape, rate, seed, args.steps)
                           for seed in SWEEP_SEEDS]
        return [sum(tried[rate]) / len(SWEEP_SEEDS) for _, rate in asked]

    sweep([name], args.rates, losses_at)
    rate = steady_rate(tried)
    found = [unexplained(layer, kind, shape, rate, seed, args.steps) for seed in range(args.seeds)]
    print(f"{name}, {layer}, tasks {kind}: rate {rate:g}, left {show(interval(found))}", flush=True)
    return tried, found


def make_claims(left):
    """left {(layer, kind): [shares of HydraLoRA, shares of LoRA]}."""
    found = [(f"{layer} layer, tasks that {kind}: HydraLoRA leaves less unexplained than LoRA",
              difference(lora, hydra)) for (layer, kind), (hydra, lora) in left.items()]
    return judged([claim(text, stat, primary=text == PRIMARY) for text, stat in found], __file__)


def draw_mechanism(pyplot, rows):
    """A panel for each frozen layer; a pair of bars for tasks that contradict, one for those that
    agree."""
    figure, axes = pyplot.subplots(1, len(LAYERS), sharey=True, figsize=(9, 4),
                                   layout="constrained")
    for axis, layer in zip(axes, LAYERS):
        for i, (start, color, hatch) in enumerate((("HydraLoRA", "tab:blue", ""),
                                                   ("LoRA", "lightgrey", "//"))):
            own = [row for row in rows if row["layer"] == layer and row["method"].startswith(start)]
            x = [place + (0.36 if i else 0) for place in range(len(own))]
            axis.bar(x, [row["left"]["mean"] for row in own], 0.34, color=color, hatch=hatch,
                     edgecolor="black", label=own[0]["method"])
            error_bars(axis, x, [row["left"] for row in own], fmt="none", color="black")
            for place, row in zip(x, own):
                top = row["left"]["mean"] if row["left"]["high"] is None else row["left"]["high"]
                axis.annotate(f"{row['left']['mean']:.3f}", (place, top), ha="center",
                              textcoords="offset points", xytext=(0, 4))
        axis.set_xticks([0.18, 1.18], [f"tasks that {kind}" for kind in KINDS])
        axis.set_title(f"frozen {layer} layer")
        axis.legend()
    axes[0].set_ylim(0, 1.08)
    axes[0].set_ylabel("share of the update left unexplained")
    return figure


def main(argv=None):
    p = Parser("experiments.mechanism", __doc__)
    p.add_argument("--seeds", type=int, default=5, help="runs of every arm (5)")
    p.add_argument("--steps", type=int, default=300, help="of a run (300)")
    p.add_argument("--rates", type=float, nargs="+", default=list(RATES),
                   help="learning rates to try; wider where the best is the lowest or highest "
                        f"({' '.join(f'{rate:g}' for rate in RATES)})")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder (experiments/results)")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    rows, left, swept = [], {}, {}
    for layer in LAYERS:
        for kind in KINDS:
            for name, shape in methods(layer).items():
                tried, found = measure(layer, kind, shape, args, name)
                swept[f"{name}, {layer}, {kind}"] = tried
                left.setdefault((layer, kind), []).append(found)
                rows.append({"layer": layer, "tasks": kind, "method": name,
                             "rate": steady_rate(tried), "left": interval(found),
                             "trainable": new_model(layer, *shape)[1]})
    claims = make_claims(left)
    table = markdown(
        ["frozen layer", "tasks", "method", "trainable", "rate", "left unexplained"],
        [[row["layer"], row["tasks"], row["method"], f"{row['trainable']:,}", f"{row['rate']:g}",
          show(row["left"])] for row in rows])
    write_results(args, "mechanism",
                  {"conditions": {"seeds": args.seeds, "steps": args.steps, "rates": args.rates,
                                  "torch": torch.__version__},
                   "sweep": swept, "rows": rows, "claims": claims},
                  [table, claims_text(claims), rates_table(swept)],
                  lambda pyplot: draw_mechanism(pyplot, rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_experiment("mechanism", main, None))
