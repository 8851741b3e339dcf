"""Learning against forgetting: what does a method keep of what the base knew, at equal learning?

As in "LoRA Learns Less and Forgets Less" (Biderman et al. 2024, arXiv 2405.09673) every method
is a curve: validation loss of the mix (learning) on one axis, loss on --keep-data (forgetting)
on the other, a point per learning rate. No rate is selected: the kept loss is interpolated where
the curve of a seed comes down to the level of validation loss that all methods reach.

    python -m experiments.retention
"""

import math
import statistics
import sys
from functools import partial

import torch

from data.corpus import collate, encode_records, encode_texts
from experiments import common, report
from experiments.common import FULL, hydra, lora, split
from experiments.routing import (
    constant_gate,
    gate_sums,
    layer_inputs,
    loss_with,
    make_batches,
    unchanged,
    uniform_gate,
)
from hydralora import hydra_layers

PRIMARY = "at equal learning HydraLoRA 3x8 keeps more than one LoRA of its size"
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
HYDRA, SPLIT = "HydraLoRA 3x8", "LoRA (Split) 4x8"
MATCHED = "LoRA, matched"
STYLES = {"LoRA r8": ("o", ":"), MATCHED: ("s", "--"), "LoRA r32": ("^", ":"),
          SPLIT: ("P", "-."), HYDRA: ("D", "-"), "full": ("X", ":")}
EXAMINED = 400  # records of the validation set behind "why"


def methods(args):
    return {"LoRA r8": lora(8), MATCHED: lora(common.matched_rank(args)), "LoRA r32": lora(32),
            SPLIT: split(4, 8), HYDRA: hydra(3), "full": FULL}


def make_runs(args, configs, records, val):
    """{name: {rate: [run of each seed]}}; a rate at which a seed diverged is left out."""
    found = common.run_seeds({(name, rate): common.run_flags(
        args, config, rate=rate, records=records, val=val, keep_data=args.keep_data)
        for name, config in configs.items() for rate in sorted(args.rates)}, args,
        may_diverge=True)
    runs = {name: {} for name in configs}
    for (name, rate), seeds in found.items():
        if math.isinf(max(common.values(seeds))):
            print(f"{name} diverged at {rate:g}, which is left out")
        else:
            runs[name][rate] = seeds
    for name in configs:
        if not runs[name]:
            raise ValueError(f"{name} diverged at every rate of {args.rates}: give lower --rates")
    return runs


# ---------------------------------------------------------------- equal learning


def common_level(runs):
    """The highest of the methods' lowest mean losses."""
    return max(min(map(common.mean_loss, rates.values())) for rates in runs.values())


def nearest_runs(rates, level):
    """The runs at the rate whose mean loss is nearest to the level."""
    return min(rates.values(), key=lambda runs: abs(common.mean_loss(runs) - level))


def kept_at(points, level):
    """The kept loss at which [(validation loss, kept loss)], by rising rate, comes down to the
    level; that of the lowest validation loss if it never does; None if it starts lower."""
    if points[0][0] < level:
        return None
    for (above, kept), (below, then) in zip(points, points[1:]):
        if below <= level <= above:
            share = (above - level) / (above - below) if above > below else 0.0
            return kept + share * (then - kept)
    return min(points)[1]


def at_equal_learning(runs, level):
    """{name: [kept loss of each seed]}, None for a method with a seed that has no value."""
    found = {}
    for name, rates in runs.items():
        points = [zip(common.values(seeds), common.values(seeds, "kept"))
                  for _, seeds in sorted(rates.items())]
        kept = [kept_at(curve, level) for curve in zip(*points)]
        found[name] = None if None in kept else kept
    return found


def make_claims(kept, runs):
    """kept {name: [loss of each seed] or None}; the last two say that the rate decides who is
    ahead in validation loss."""
    def less(worse, better):
        known = kept[worse] and kept[better]
        return report.loss_difference(kept[worse], kept[better]) if known else None

    pairs = (("LoRA r8", HYDRA), ("LoRA r32", HYDRA), ("LoRA r32", SPLIT),
             ("full", "LoRA r8"))
    found = {PRIMARY: less(MATCHED, HYDRA),
             **{f"at equal learning {better} keeps more than {worse}": less(worse, better)
                for worse, better in pairs}}
    for rate, worse, better in ((1e-3, HYDRA, MATCHED), (8e-3, MATCHED, HYDRA)):
        if rate in runs[worse] and rate in runs[better]:
            found[f"at a rate of {rate:g} {better} is ahead of {worse} in validation loss"] = \
                report.loss_difference(*(common.values(runs[name][rate])
                                         for name in (worse, better)))
    return report.judge(found, PRIMARY, __file__)


# ---------------------------------------------------------------- why


def without_block(block):
    """A change of the gate: zero, and with it the update, in all layers of a block."""
    def change(name, gate, mask):
        return 0 * gate if name.startswith(f"layers.{block}.") else gate
    return change


@torch.no_grad()
def update_size(model, batches):
    """|update| / |W0 x|, mean over the layers; each norm is over all tokens but padding."""
    layers = hydra_layers(model)
    frozen, update = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)  # sums of squares
    for batch in map(collate, batches):
        for name, x in layer_inputs(model, batch).items():
            x = x[batch.attention_mask]
            y = layers[name].base(x)
            frozen[name] += y.square().sum().double()
            update[name] += (layers[name](x) - y).square().sum().double()
    return statistics.fmean((update[name] / frozen[name]).sqrt().item() for name in layers)


def examine(run, val, keep_data):
    """{"kept" and "mix": {change: loss, "update size": share}} of one trained adapter; the
    constant gate is each layer's mean over the mix."""
    model, tokenizer = common.trained_model(run)
    longest = run["settings"]["max_seq_len"]
    records = common.draw_records(val, EXAMINED)
    mix = make_batches(encode_records(records, tokenizer, longest)[0])
    kept = make_batches(encode_texts(keep_data, tokenizer, longest)[0])
    changes = {"as trained": unchanged}
    if run["settings"].get("heads", 1) > 1:
        mean = constant_gate(*gate_sums(model, mix))
        changes |= {"gate uniform": uniform_gate, "gate constant": mean}
    changes |= {f"block {i + 1} off": without_block(i) for i in range(len(model.layers))}
    return {part: {**{key: loss_with(model, batches, change) for key, change in changes.items()},
                   "update size": update_size(model, batches)}
            for part, batches in (("kept", kept), ("mix", mix))}


# ---------------------------------------------------------------- what is written


def reasons_table(reasons):
    """A row per change; HydraLoRA's kept loss and mix, then LoRA's."""
    columns = [(name, part) for name in reasons for part in ("kept", "mix")]
    rows = []
    for key in reasons[HYDRA][0]["kept"]:
        row = ["size of the update compared with W0 x" if key == "update size" else key]
        for name, part in columns:
            own = [seed[part][key] for seed in reasons[name] if key in seed[part]]
            row.append(report.interval(own) if own else None)
        rows.append(row)
    return report.markdown(["loss after training", *map(", ".join, columns)], rows)


def draw_retention(pyplot, curves, base, level):
    """One line per method, from its lowest rate on; seeds thin."""
    from matplotlib import ticker
    figure, axis = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for (name, rates), color in zip(curves.items(), pyplot.cm.tab10.colors):
        marker, line = STYLES[name]
        x, y = ([rates[rate][metric] for rate in sorted(rates)] for metric in ("val_loss", "kept"))
        for seed in range(len(x[0]["values"])):
            axis.plot([stat["values"][seed] for stat in x], [stat["values"][seed] for stat in y],
                      color=color, linewidth=0.6, alpha=0.4)
        axis.plot([stat["mean"] for stat in x], [stat["mean"] for stat in y], color=color,
                  marker=marker, linestyle=line, linewidth=2, label=name)
    axis.axhline(base, color="grey", linestyle=":", label="the base, before tuning")
    axis.axvline(level, color="grey", label="equal learning")
    axis.set(xscale="log", yscale="log",  # full tuning's higher rates would flatten all the rest
             xlabel="validation loss of the mix (nats per token): learned more to the left",
             ylabel="kept: loss on what the base knew (nats per token)")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
        side.set_major_formatter("{x:g}")
        side.set_minor_locator(ticker.NullLocator())
    axis.legend()
    return figure


def parse_args(argv):
    p = common.parser("retention", __doc__, seeds=5, epochs=1, records=common.MIXED, rates=RATES,
                      sweep_epochs=None)
    p.add_argument("--name", default="retention", help="name of the files in --out (retention)")
    args = common.parse_args(p, argv)
    if not args.keep_data:
        p.error("--keep-data FILE is needed: without it forgetting cannot be measured")
    return args


def run(args):
    records, val = common.load_records(args)
    runs = make_runs(args, methods(args), records, val)
    level = common_level(runs)
    kept = at_equal_learning(runs, level)
    reasons = {name: [common.cached(run["folder"] / "retention.json",
                                    partial(examine, run, val, args.keep_data))
                      for run in nearest_runs(runs[name], level)] for name in (HYDRA, MATCHED)}
    base = runs[HYDRA][min(runs[HYDRA])][0]["metrics"]["kept"]["loss_base"]
    again = common.rerun(HYDRA, nearest_runs(runs[HYDRA], level), args)
    curves = {name: {rate: common.make_row(seeds, ["val_loss", "kept"])
                     for rate, seeds in rates.items()} for name, rates in runs.items()}
    curve_table = report.markdown(
        ["method", "rate", "trainable", "validation loss", "kept: loss"],
        [[name, rate, point["trainable"], point["val_loss"], point["kept"]]
         for name, rates in curves.items() for rate, point in rates.items()])
    equal_table = report.markdown(
        [f"at equal learning, a validation loss of {level:.4f}", "kept: loss"],
        [[name, own and report.interval(own)] for name, own in kept.items()])
    common.publish(args, args.name, records, val,
                   {"curves": curves, "kept_base": base, "level": level,
                    "at_equal_learning": kept, "reasons": reasons},
                   tables=[f"Before tuning the loss on what is to be kept is {base:.4f}.",
                           curve_table, equal_table],
                   again=again, claims=make_claims(kept, runs), more=[reasons_table(reasons)],
                   draw=lambda pyplot: draw_retention(pyplot, curves, base, level))


if __name__ == "__main__":
    sys.exit(common.main("retention", parse_args, run))
