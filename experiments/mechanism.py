"""What can a router do that rank cannot? A toy to be read in one sitting: one layer, eight tasks.

A token is 56 random numbers and 8 that name its task. To be learned is an update of rank 2 on
top of a frozen layer W: y = W(x) + B_task A x, where the tasks contradict each other (like x,
other y), or y = W(x) + B A x, where they agree. HydraLoRA 8x2 has a head for each task. One LoRA
of its size has a larger rank, but one map for all tasks: next to a linear W it can learn the mean
of the eight at best. A SwiGLU has a gate of its own, silu(w1 x), which multiplies w3 x.

    python -m experiments.mechanism       # two minutes on one slow core
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
BATCH, TEST = 128, 4096  # tokens, drawn anew every time


def new_model(layer, heads, rank):
    """(a frozen layer with adapters, trainable parameters); alpha / rank is 4, as elsewhere."""
    if layer == "linear":
        model, targets = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)), ("0",)
    else:
        args = ModelArgs(dim=WIDTH, n_layers=1, n_heads=1, vocab_size=1, multiple_of=32)
        model, targets = FeedForward(args), TARGETS
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


def make_claims(rows):
    """Of every frozen layer and kind of tasks: HydraLoRA, whose row is followed by LoRA's."""
    found = {}
    for hydra, lora in zip(rows[::2], rows[1::2]):
        text = (f"{hydra['layer']} layer, tasks that {hydra['tasks']}: HydraLoRA leaves less "
                "unexplained than LoRA")
        found[text] = report.difference(lora["left"]["values"], hydra["left"]["values"])
    return report.judge(found, PRIMARY, __file__)


def draw_mechanism(pyplot, rows):
    names = [f"{row['method']}, {row['layer']}, tasks that {row['tasks']}" for row in rows]
    panels = {"share of the update left unexplained": [row["left"] for row in rows]}
    return report.points_chart(pyplot, names, panels)


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
    arms = {f"{name}, {layer}, {kind}": (layer, kind, name, shape)
            for layer in LAYERS for kind in KINDS for name, shape in methods(layer).items()}

    def shares(arm, rate, seeds):
        layer, kind, _, shape = arms[arm]
        return [unexplained(layer, kind, shape, rate, seed, args.steps) for seed in seeds]

    swept = {arm: common.sweep_result(own) for arm, own in common.sweep(
        arms, args.rates, lambda asked: {(arm, rate): shares(arm, rate, common.sweep_seeds())
                                         for arm, rate in asked}).items()}
    rows = []
    for arm, (layer, kind, name, shape) in arms.items():
        rate = swept[arm]["rate"]
        seeds = range(common.FIRST_SEED, common.FIRST_SEED + args.seeds)
        left = report.interval(shares(arm, rate, seeds))
        rows.append({"layer": layer, "tasks": kind, "method": name, "rate": rate,
                     "seeds": list(seeds), "left": left,
                     "trainable": new_model(layer, *shape)[1]})
        print(f"{arm}: rate {rate:g}, left {report.show(left)}", flush=True)
    claims = make_claims(rows)
    table = report.markdown(
        ["frozen layer", "tasks", "method", "trainable", "rate", "left unexplained"],
        [[row["layer"], row["tasks"], row["method"], row["trainable"], row["rate"], row["left"]]
         for row in rows])
    conditions = {"seeds": args.seeds, "steps": args.steps, "rates": args.rates,
                  "commit": report.code_commit(), "torch": torch.__version__}
    report.write_results(
        args, "mechanism",
        {"conditions": conditions, "sweep": swept, "rows": rows, "claims": claims},
        [table, report.claims_text(claims), common.rates_table(swept)],
        lambda pyplot: draw_mechanism(pyplot, rows))


if __name__ == "__main__":
    sys.exit(common.main("mechanism", parse_args, run))
