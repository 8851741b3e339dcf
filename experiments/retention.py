"""Learning against forgetting: what does a method keep of what the base knew, at equal learning?

"LoRA Learns Less and Forgets Less" (Biderman et al. 2024, arXiv 2405.09673) has the frame: learning
across, forgetting up, one curve a method. Learning is the validation loss of the mix; forgetting is
the loss on --keep-data, texts that the base knows and the mix does not teach. Every method runs at
the same learning rates, and none is selected: the curve is the result.

    python -m experiments.retention

At equal learning: the level is the highest of the methods' lowest mean losses, which all of them
reach. Seed by seed, from the lowest rate on, the curve is followed to where it comes down to the
level, and what is kept there is read off between the two rates. A seed that never comes so low
counts with its lowest loss; a method that is lower at the lowest rate already has no value.

Why: of the trained adapters nearest to the level, what is kept with the gate uniform or constant,
and with the update of each block switched off; and how large the update is beside W0 x.
"""

import statistics
import sys
from contextlib import ExitStack, contextmanager

import torch

from data import corpus
from experiments import common
from experiments.common import FULL, hydra, lora, split
from experiments.report import (
    claim,
    claims_text,
    difference,
    interval,
    judged,
    markdown,
    show,
    write_results,
)
from experiments.routing import batches_of, constant, gate_sums, loss_with, unchanged, uniform
from hydralora import hydra_layers

PRIMARY = "at equal learning HydraLoRA 3x8 keeps more than one LoRA of its size"
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
HYDRA, UNIFORM, SPLIT = "HydraLoRA 3x8", "uniform gate 3x8", "LoRA (Split) 4x8"
STYLES = {"LoRA r8": ("o", ":"), "LoRA, matched": ("s", "--"), "LoRA r32": ("^", ":"),
          SPLIT: ("P", "-."), HYDRA: ("D", "-"), UNIFORM: ("v", "-."), "full": ("X", ":")}
EXAMINED = 400  # records of the validation set behind "why"


def methods(args):
    return {"LoRA r8": lora(8), "LoRA, matched": lora(common.matched_rank(args)),
            "LoRA r32": lora(32), SPLIT: split(4, 8), HYDRA: hydra(3),
            UNIFORM: hydra(3, gate="uniform"), "full": FULL}


def make_runs(args, configs, records, val):
    """{name: {rate: [run of each seed]}}; a rate at which a seed diverged is left out."""
    keys = [(name, rate) for name in configs for rate in sorted(args.rates)]
    flags = [common.train_flags(args, configs[name], rate=rate, seed=seed, epochs=args.epochs,
                                data=records, val=val, keep=True)
             for name, rate in keys for seed in range(args.seeds)]
    found, runs = iter(common.run_all(flags, args)), {name: {} for name in configs}
    for name, rate in keys:
        own = [next(found) for _ in range(args.seeds)]
        if any("reason" in run for run in own):
            print(f"{name} diverged at {rate:g}, which is left out")
        else:
            runs[name][rate] = own
        if rate == max(args.rates) and not runs[name]:
            raise ValueError(f"{name} diverged at every rate of {args.rates}: give lower --rates")
    return runs


# ---------------------------------------------------------------- equal learning


def mean_losses(rates):
    return {rate: statistics.fmean(common.values(runs)) for rate, runs in rates.items()}


def common_level(runs):
    """The highest of the methods' lowest mean losses."""
    return max(min(mean_losses(rates).values()) for rates in runs.values())


def kept_at(points, level):
    """What is kept where [(validation loss, kept loss)], by rising rate, comes down to the level;
    at the lowest loss where it never does; None where it is lower from the start."""
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
        seeds = zip(*(zip(common.values(own), common.values(own, "kept"))
                      for _, own in sorted(rates.items())))
        kept = [kept_at(list(points), level) for points in seeds]
        found[name] = None if None in kept else kept
    return found


def make_claims(kept):
    """kept {name: [loss of each seed] or None}."""
    def add(text, worse, better, primary=False):
        known = kept[worse] and kept[better]
        return claim(text, difference(kept[worse], kept[better]) if known else None, primary)

    return judged([
        add(PRIMARY, "LoRA, matched", HYDRA, primary=True),
        *(add(f"at equal learning {better} keeps more than {worse}", worse, better)
          for worse, better in (("LoRA r8", HYDRA), ("LoRA r32", HYDRA), (UNIFORM, HYDRA),
                                ("LoRA r32", SPLIT), ("full", "LoRA r8")))], __file__)


# ---------------------------------------------------------------- why


@contextmanager
def switched_off(layers):
    """Inside, the update of these layers is zero."""
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
    """|update| / |W0 x|, the roots of the sums of squares over all real tokens, mean over the
    layers."""
    layers, sums = hydra_layers(model).values(), {}

    def note(layer, inputs, real):
        x = inputs[0][real]
        frozen = layer.base(x)
        update = layer.forward(x) - frozen
        sums[layer] = sums.get(layer, 0) + torch.stack([frozen.square().sum(),
                                                        update.square().sum()]).double()

    for batch in map(corpus.collate, batches):
        with ExitStack() as after:
            for layer in layers:
                after.callback(layer.register_forward_pre_hook(
                    lambda layer, inputs, mask=batch.attention_mask:
                    note(layer, inputs, mask)).remove)
            model.hidden_states(batch.tokens)
    return statistics.fmean((update / whole).sqrt().item() for whole, update in sums.values())


def examine(run, val):
    """{"kept" and "mix": {change: loss, "update size": share}} of one trained adapter; the constant
    gate is each layer's mean over the mix."""
    model, tokenizer, args, limit = common.trained_model(run)
    mix = batches_of(corpus.encode_records(common.draw_records(val, EXAMINED), tokenizer, limit)[0])
    texts = {"kept": batches_of(corpus.encode_texts(args.keep_data, tokenizer, limit)[0]),
             "mix": mix}
    changes = {"as trained": unchanged}
    if args.heads > 1:
        changes |= {"gate uniform": uniform, "gate constant": constant(*gate_sums(
            model, mix, args)[:2])}
    blocks = {}
    for name, layer in hydra_layers(model).items():
        blocks.setdefault(f"block {int(name.split('.')[1]) + 1} off", []).append(layer)
    found = {}
    for part, batches in texts.items():
        found[part] = {key: loss_with(model, batches, args, change)
                       for key, change in changes.items()}
        for key, layers in blocks.items():
            with switched_off(layers):
                found[part][key] = loss_with(model, batches, args, unchanged)
        found[part]["update size"] = update_size(model, batches)
    return found


def find_reasons(args, runs, level, val):
    """{name: [examine() of each seed]} of HydraLoRA and LoRA of its size, at the rate whose mean
    loss is nearest to the level."""
    found = {}
    for name in (HYDRA, "LoRA, matched"):
        means = mean_losses(runs[name])
        own = runs[name][min(means, key=lambda rate: abs(means[rate] - level))]
        key = [args.keep_data and common.file_fingerprint(args.keep_data), EXAMINED]
        found[name] = [common.remember(run["folder"] / "retention.json", key,
                                       lambda run=run: examine(run, val)) for run in own]
    return found


# ---------------------------------------------------------------- what is written


def curve_table(runs):
    return markdown(["method", "rate", "trainable", "validation loss", "kept: loss"],
                    [[name, f"{rate:g}", f"{own[0]['parameters']['trainable']:,}",
                      *(show(interval(common.values(own, m))) for m in ("val_loss", "kept"))]
                     for name, rates in runs.items() for rate, own in rates.items()])


def equal_table(kept, level):
    return markdown([f"at equal learning, a validation loss of {level:.4f}", "kept: loss"],
                    [[name, show(own and interval(own))] for name, own in kept.items()])


def reasons_table(reasons):
    """A row a change; HydraLoRA's kept and mix, then LoRA's."""
    rows = []
    for key in reasons[HYDRA][0]["kept"]:
        cells = [show(interval(one[part][key] for one in seeds)) if key in seeds[0][part] else "-"
                 for seeds in reasons.values() for part in ("kept", "mix")]
        rows.append([{"update size": "size of the update beside W0 x"}.get(key, key), *cells])
    return markdown(["loss after training", *(f"{name}, {part}" for name in reasons
                                              for part in ("kept", "mix"))], rows)


def draw_retention(pyplot, runs, base, level):
    """One line a method, from its lowest rate on; seeds thin."""
    from matplotlib import ticker
    figure, axis = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for (name, rates), color in zip(runs.items(), pyplot.cm.tab10.colors):
        marker, line = STYLES[name]
        seeds = [[common.values(own, metric) for _, own in sorted(rates.items())]
                 for metric in ("val_loss", "kept")]
        for seed in range(len(seeds[0][0])):
            axis.plot([of[seed] for of in seeds[0]], [of[seed] for of in seeds[1]], color=color,
                      linewidth=0.6, alpha=0.4)
        axis.plot(*([statistics.fmean(of) for of in part] for part in seeds), color=color,
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


def main(argv=None):
    p = common.parser("retention", __doc__, seeds=5, epochs=1, records=common.MIXED, sweeps=False)
    p.add_argument("--rates", type=float, nargs="+", default=list(RATES),
                   help=f"learning rates of every method ({' '.join(f'{r:g}' for r in RATES)})")
    p.add_argument("--jobs", type=int, default=2, help="processes of one thread each (2)")
    p.add_argument("--name", default="retention", help="of the files in --out (retention)")
    args, records, val = common.prepare(p, argv)
    if not args.keep_data:
        p.error("--keep-data FILE is needed: without it nothing is known of what is kept")
    runs = make_runs(args, methods(args), records, val)
    level = common_level(runs)
    kept, reasons = at_equal_learning(runs, level), find_reasons(args, runs, level, val)
    claims, base = make_claims(kept), next(iter(runs[HYDRA].values()))[0]["metrics"]["kept"]
    means = mean_losses(runs[HYDRA])
    again = common.rerun(HYDRA, runs[HYDRA][min(means, key=lambda r: abs(means[r] - level))], args)
    curves = {name: {rate: {metric: interval(common.values(own, metric))
                            for metric in ("val_loss", "kept")} for rate, own in rates.items()}
              for name, rates in runs.items()}
    write_results(
        args, args.name,
        {"conditions": common.conditions(args, records, val), "curves": curves,
         "kept_base": base["loss_base"], "level": level, "at_equal_learning": kept,
         "reasons": reasons, "rerun": again, "claims": claims},
        [f"Before tuning the loss on what is to be kept is {base['loss_base']:.4f}.",
         curve_table(runs), equal_table(kept, level), common.rerun_text(again),
         claims_text(claims), reasons_table(reasons)],
        lambda pyplot: draw_retention(pyplot, runs, base["loss_base"], level))
    return 0


if __name__ == "__main__":
    sys.exit(common.run_experiment("retention", main, None))
