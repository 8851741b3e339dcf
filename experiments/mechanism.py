"""What can a router do that rank cannot? A toy to be read in one sitting: one layer, eight tasks.

A token is 56 random numbers and 8 that name its task. To be learned is an update of rank 2 on
top of a frozen layer W: y = W(x) + B_task A x, where the tasks contradict each other (like x,
other y), or y = W(x) + B A x, where they agree. HydraLoRA 8x2 has a head for each task. One LoRA
of its size has a larger rank, but one map for all tasks: next to a linear W it can learn the mean
of the eight at best, an eighth of the target. A SwiGLU has a gate of its own, silu(w1 x), which
multiplies w3 x: with adapters in it, LoRA can tell the tasks apart as well.

    python -m experiments.mechanism       # two minutes on one slow core

Printed is the share of the update that is left unexplained on new tokens, at the learning rate
that a sweep chose, in which other seeds draw the layer, the tasks and the tokens.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from experiments import common, report
from hydralora import TARGETS, adapters_disabled, add_hydralora
from model import FeedForward, ModelArgs
from support.cli import Parser

# as it was committed before the run; the others in make_claims are secondary
PRIMARY = "linear layer, tasks that contradict: HydraLoRA leaves less unexplained than LoRA"
WIDTH = 64  # numbers of a token; the last TASKS of them are 0, but for the task's own: CUE
TASKS, RANK = 8, 2
CUE = 2.0
LAYERS, KINDS = ("linear", "SwiGLU"), ("contradict", "agree")
RATES = (8e-3, 1.13e-2, 1.6e-2)  # to begin with
SWEEP_SEEDS = (100, 101)
BATCH, TEST = 128, 4096  # tokens, drawn anew every time


def frozen_layer(layer):
    """(module, names of the linear layers that get adapters)."""
    if layer == "linear":
        return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)), ("0",)
    args = ModelArgs(dim=WIDTH, n_layers=1, n_heads=1, vocab_size=1, multiple_of=32)
    return FeedForward(args), TARGETS


def new_model(layer, heads, rank):
    """(the frozen layer with adapters, trainable parameters); alpha / rank is 4, as elsewhere."""
    model, targets = frozen_layer(layer)
    for weight in model.parameters():
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model, add_hydralora(model, targets=targets, heads=heads, rank=rank, alpha=4 * rank)


def methods(layer):
    """{name: (heads, rank)}; LoRA's rank gives it the parameters of HydraLoRA, router
    included."""
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
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=0.0)

    def squared_error(count):
        """(of the adapter, of no adapter at all)."""
        x, update = draw_tokens(count, a, b)
        with torch.no_grad(), adapters_disabled(model):
            frozen = model(x)
        return (model(x) - frozen - update).square().sum(), update.square().sum()

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        loss = squared_error(BATCH)[0] / BATCH / WIDTH
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        left, whole = squared_error(TEST)
    share = (left / whole).item()
    return share if math.isfinite(share) else math.inf


def measure(layer, kind, shape, args, name):
    """({rate: [of each sweep seed]}, [of each seed at the rate chosen])."""
    def shares(rate, seeds):
        return [unexplained(layer, kind, shape, rate, seed, args.steps) for seed in seeds]

    tried = common.sweep([name], args.rates, lambda asked: [shares(rate, SWEEP_SEEDS)
                                                            for _, rate in asked])[name]
    rate = common.steady_rate(tried)
    found = shares(rate, range(args.seeds))
    print(f"{name}, {layer}, tasks {kind}: rate {rate:g}, left "
          f"{report.show(report.interval(found))}", flush=True)
    return tried, found


def make_claims(left):
    """left {(layer, kind): [shares of HydraLoRA, shares of LoRA]}."""
    found = []
    for (layer, kind), (hydra, lora) in left.items():
        text = f"{layer} layer, tasks that {kind}: HydraLoRA leaves less unexplained than LoRA"
        found.append(report.claim(text, report.difference(lora, hydra), text == PRIMARY))
    return report.judge(found, __file__)


def draw_mechanism(pyplot, rows):
    """A panel per frozen layer; a pair of bars for tasks that contradict, one for those that
    agree."""
    figure, axes = pyplot.subplots(1, len(LAYERS), sharey=True, figsize=(9, 4),
                                   layout="constrained")
    styles = (("HydraLoRA", -0.18, "tab:blue", ""), ("LoRA", 0.18, "lightgrey", "//"))
    for axis, layer in zip(axes, LAYERS):
        for start, shift, color, hatch in styles:
            own = [row for row in rows
                   if row["layer"] == layer and row["method"].startswith(start)]
            x = [i + shift for i in range(len(own))]
            stats = [row["left"] for row in own]
            axis.bar(x, [stat["mean"] for stat in stats], 0.34, color=color, hatch=hatch,
                     edgecolor="black", label=own[0]["method"])
            report.error_bars(axis, x, stats, fmt="none", color="black")
            for place, stat in zip(x, stats):
                top = stat["mean"] if stat["high"] is None else stat["high"]
                axis.annotate(f"{stat['mean']:.3f}", (place, top), ha="center",
                              textcoords="offset points", xytext=(0, 4))
        axis.set_xticks(range(len(KINDS)), [f"tasks that {kind}" for kind in KINDS])
        axis.set_title(f"frozen {layer} layer")
        axis.legend()
    axes[0].set_ylim(0, 1.08)
    axes[0].set_ylabel("share of the update left unexplained")
    return figure


def parse_args(argv):
    p = Parser("experiments.mechanism", __doc__)
    p.add_argument("--seeds", type=int, default=5, help="runs per method (5)")
    p.add_argument("--steps", type=int, default=300, help="steps per run (300)")
    common.add_rates_flag(p, RATES)
    p.add_argument("--out", type=Path, default=common.RESULTS,
                   help="folder of the results (experiments/results)")
    return p.parse_args(argv)


def run(args):
    torch.set_num_threads(1)
    rows = []
    left, swept = {}, {}
    for layer in LAYERS:
        for kind in KINDS:
            for name, shape in methods(layer).items():
                tried, found = measure(layer, kind, shape, args, name)
                swept[f"{name}, {layer}, {kind}"] = tried
                left.setdefault((layer, kind), []).append(found)
                rows.append({"layer": layer, "tasks": kind, "method": name,
                             "rate": common.steady_rate(tried), "left": report.interval(found),
                             "trainable": new_model(layer, *shape)[1]})
    claims = make_claims(left)
    table = report.markdown(
        ["frozen layer", "tasks", "method", "trainable", "rate", "left unexplained"],
        [[row["layer"], row["tasks"], row["method"], f"{row['trainable']:,}",
          f"{row['rate']:g}", report.show(row["left"])] for row in rows])
    conditions = {"seeds": args.seeds, "steps": args.steps, "rates": args.rates,
                  "torch": torch.__version__}
    report.write_results(
        args, "mechanism",
        {"conditions": conditions, "sweep": swept, "rows": rows, "claims": claims},
        [table, report.claims_text(claims), common.rates_table(swept)],
        lambda pyplot: draw_mechanism(pyplot, rows))


if __name__ == "__main__":
    sys.exit(common.main("mechanism", parse_args, run))
