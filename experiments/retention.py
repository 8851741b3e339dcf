"""Learning against forgetting: what does a method keep of what the base knew, at equal learning?

As in "LoRA Learns Less and Forgets Less" (Biderman et al. 2024, arXiv 2405.09673) every method
is a curve: validation loss of the mix (learning) on one axis, loss on --keep-data (forgetting)
on the other, a point per learning rate. No rate is selected.

    python -m experiments.retention

Equal learning is a level of validation loss: the highest of the methods' lowest mean losses,
which all of them reach. Seed by seed, from the lowest rate on, the curve is followed to where it
comes down to the level, and the kept loss is interpolated there. A seed that never comes so low
counts with its lowest loss; a method that is lower at the lowest rate already has no value.

Why: of the trained adapters nearest to the level, the losses with the gate uniform or constant
and with the update of each block switched off, and the size of the update compared with W0 x.
"""

import statistics
import sys
from contextlib import ExitStack, contextmanager

import torch

from data import corpus
from experiments import common, report
from experiments.common import FULL, hydra, lora, split
from experiments.routing import (
    constant_gate,
    gate_sums,
    loss_with,
    make_batches,
    unchanged,
    uniform_gate,
)
from hydralora import hydra_layers
from support import files

PRIMARY = "at equal learning HydraLoRA 3x8 keeps more than one LoRA of its size"
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
HYDRA, UNIFORM, SPLIT = "HydraLoRA 3x8", "uniform gate 3x8", "LoRA (Split) 4x8"
MATCHED = "LoRA, matched"
STYLES = {"LoRA r8": ("o", ":"), MATCHED: ("s", "--"), "LoRA r32": ("^", ":"),
          SPLIT: ("P", "-."), HYDRA: ("D", "-"), UNIFORM: ("v", "-."), "full": ("X", ":")}
EXAMINED = 400  # records of the validation set behind "why"


def methods(args):
    return {"LoRA r8": lora(8), MATCHED: lora(common.matched_rank(args)), "LoRA r32": lora(32),
            SPLIT: split(4, 8), HYDRA: hydra(3), UNIFORM: hydra(3, gate="uniform"), "full": FULL}


def make_runs(args, configs, records, val):
    """{name: {rate: [run of each seed]}}; a rate at which a seed diverged is left out."""
    data, val = (common.write_records(part, args) for part in (records, val))
    found = common.run_all({(name, rate, seed): common.run_settings(
        args, config, rate=rate, seed=seed, data=data, val=val, keep=True)
        for name, config in configs.items() for rate in sorted(args.rates)
        for seed in range(args.seeds)}, args, may_diverge=True)
    runs = {name: {} for name in configs}
    for name, rates in runs.items():
        for rate in sorted(args.rates):
            seeds = [found[name, rate, seed] for seed in range(args.seeds)]
            if any("diverged" in run for run in seeds):
                print(f"{name} diverged at {rate:g}, which is left out")
            else:
                rates[rate] = seeds
        if not rates:
            raise ValueError(f"{name} diverged at every rate of {args.rates}: give lower --rates")
    return runs


# ---------------------------------------------------------------- equal learning


def mean_by_rate(rates):
    return {rate: statistics.fmean(common.values(runs)) for rate, runs in rates.items()}


def common_level(runs):
    """The highest of the methods' lowest mean losses."""
    return max(min(mean_by_rate(rates).values()) for rates in runs.values())


def nearest_runs(rates, level):
    """The runs at the rate whose mean loss is nearest to the level."""
    means = mean_by_rate(rates)
    return rates[min(means, key=lambda rate: abs(means[rate] - level))]


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


def make_claims(kept):
    """kept {name: [loss of each seed] or None}."""
    def add(text, worse, better, primary=False):
        known = kept[worse] and kept[better]
        stat = report.difference(kept[worse], kept[better]) if known else None
        return report.claim(text, stat, primary)

    pairs = (("LoRA r8", HYDRA), ("LoRA r32", HYDRA), (UNIFORM, HYDRA), ("LoRA r32", SPLIT),
             ("full", "LoRA r8"))
    secondary = [add(f"at equal learning {better} keeps more than {worse}", worse, better)
                 for worse, better in pairs]
    return report.judge([add(PRIMARY, MATCHED, HYDRA, primary=True), *secondary], __file__)


# ---------------------------------------------------------------- why


@contextmanager
def switched_off(layers):
    """Within this context the update of these layers is zero."""
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales):
            layer.scale = scale


@torch.no_grad()
def update_size(model, batches):
    """|update| / |W0 x|, mean over the layers; each norm is over all tokens but padding."""
    layers = hydra_layers(model).values()
    sums = dict.fromkeys(layers, 0)  # of squares: W0 x, update

    for batch in map(corpus.collate, batches):
        def add(layer, inputs, mask=batch.attention_mask):
            x = inputs[0][mask]
            frozen = layer.base(x)
            update = layer.forward(x) - frozen
            squares = [frozen.square().sum(), update.square().sum()]
            sums[layer] = sums[layer] + torch.stack(squares).double()

        with ExitStack() as hooks:
            for layer in layers:
                hooks.callback(layer.register_forward_pre_hook(add).remove)
            model.hidden_states(batch.tokens)
    return statistics.fmean((update / frozen).sqrt().item() for frozen, update in sums.values())


def examine(run, val, keep_data):
    """{"kept" and "mix": {change: loss, "update size": share}} of one trained adapter; the
    constant gate is each layer's mean over the mix."""
    model, tokenizer = common.trained_model(run)
    longest = run["settings"]["max_seq_len"]
    records = common.draw_records(val, EXAMINED)
    mix = make_batches(corpus.encode_records(records, tokenizer, longest)[0])
    kept = make_batches(corpus.encode_texts(keep_data, tokenizer, longest)[0])
    changes = {"as trained": unchanged}
    if run["settings"].get("heads", 1) > 1:
        sums, tokens, _ = gate_sums(model, mix)
        changes |= {"gate uniform": uniform_gate, "gate constant": constant_gate(sums, tokens)}
    blocks = {}
    for name, layer in hydra_layers(model).items():
        blocks.setdefault(f"block {int(name.split('.')[1]) + 1} off", []).append(layer)
    found = {}
    for part, batches in (("kept", kept), ("mix", mix)):
        found[part] = {key: loss_with(model, batches, change) for key, change in changes.items()}
        for key, layers in blocks.items():
            with switched_off(layers):
                found[part][key] = loss_with(model, batches, unchanged)
        found[part]["update size"] = update_size(model, batches)
    return found


def find_reasons(args, runs, level, val):
    """{name: [examine() of each seed]} of HydraLoRA and LoRA of its size."""
    key = [files.file_fingerprint(args.keep_data), EXAMINED]
    return {name: [common.cached(run["folder"] / "retention.json", key,
                                 lambda run=run: examine(run, val, args.keep_data))
                   for run in nearest_runs(runs[name], level)] for name in (HYDRA, MATCHED)}


# ---------------------------------------------------------------- what is written


def curve_table(curves):
    return report.markdown(
        ["method", "rate", "trainable", "validation loss", "kept: loss"],
        [[name, f"{rate:g}", f"{point['trainable']:,}", report.show(point["val_loss"]),
          report.show(point["kept"])]
         for name, rates in curves.items() for rate, point in rates.items()])


def equal_table(kept, level):
    return report.markdown(
        [f"at equal learning, a validation loss of {level:.4f}", "kept: loss"],
        [[name, report.show(own and report.interval(own))] for name, own in kept.items()])


def reasons_table(reasons):
    """A row per change; HydraLoRA's kept loss and mix, then LoRA's."""
    columns = [(name, part) for name in reasons for part in ("kept", "mix")]
    rows = []
    for key in reasons[HYDRA][0]["kept"]:
        label = "size of the update compared with W0 x" if key == "update size" else key
        row = [label]
        for name, part in columns:
            seeds = [one[part] for one in reasons[name]]
            known = key in seeds[0]
            row.append(report.show(report.interval(one[key] for one in seeds) if known else None))
        rows.append(row)
    return report.markdown(["loss after training", *map(", ".join, columns)], rows)


def draw_retention(pyplot, curves, base, level):
    """One line per method, from its lowest rate on; seeds thin."""
    from matplotlib import ticker
    figure, axis = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for (name, rates), color in zip(curves.items(), pyplot.cm.tab10.colors):
        marker, line = STYLES[name]
        points = [point for _, point in sorted(rates.items())]
        x, y = ([point[metric] for point in points] for metric in ("val_loss", "kept"))
        for seed in range(len(x[0]["values"])):
            axis.plot([stat["values"][seed] for stat in x], [stat["values"][seed] for stat in y],
                      color=color, linewidth=0.6, alpha=0.4)
        axis.plot([stat["mean"] for stat in x], [stat["mean"] for stat in y], color=color,
                  marker=marker, linestyle=line, linewidth=2, label=name)
    axis.axhline(base, color="grey", linewidth=1, linestyle=":")
    axis.annotate("the base, before tuning", (0.99, base), xycoords=("axes fraction", "data"),
                  ha="right", va="bottom", color="grey")
    axis.axvline(level, color="grey", linewidth=1)
    axis.annotate("equal learning", (level, 0.99), xycoords=("data", "axes fraction"),
                  rotation=90, ha="right", va="top", color="grey")
    axis.set(xscale="log", yscale="log")  # full tuning's higher rates would flatten all the rest
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
        side.set_major_formatter(ticker.FormatStrFormatter("%g"))
        side.set_minor_locator(ticker.NullLocator())
    axis.set_xlabel("validation loss of the mix (nats per token): learned more to the left")
    axis.set_ylabel("kept: loss on what the base knew (nats per token)")
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
    reasons = find_reasons(args, runs, level, val)
    base = runs[HYDRA][min(runs[HYDRA])][0]["metrics"]["kept"]["loss_base"]
    again = common.rerun(HYDRA, nearest_runs(runs[HYDRA], level), args)
    curves = {name: {rate: {metric: report.interval(common.values(seeds, metric))
                            for metric in ("val_loss", "kept")}
                     | {"trainable": seeds[0]["parameters"]["trainable"]}
                     for rate, seeds in rates.items()} for name, rates in runs.items()}
    common.publish(args, args.name, records, val,
                   {"curves": curves, "kept_base": base, "level": level,
                    "at_equal_learning": kept, "reasons": reasons},
                   tables=[f"Before tuning the loss on what is to be kept is {base:.4f}.",
                           curve_table(curves), equal_table(kept, level)],
                   again=again, claims=make_claims(kept), more=[reasons_table(reasons)],
                   draw=lambda pyplot: draw_retention(pyplot, curves, base, level))


if __name__ == "__main__":
    sys.exit(common.main("retention", parse_args, run))
