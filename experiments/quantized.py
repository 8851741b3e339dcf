"""What a base in int8 or NF4 costs: error of the weights, losses, the quiz, time of a step.

    python -m experiments.quantized
    python -m experiments.quantized --weights stories260K --data dolly.jsonl --max-seq-len 256 \\
        --rate 5.66e-3 --margin 0.013 --name quantized-dolly

Dettmers et al. 2023 (QLoRA) claim that after tuning nothing is lost by a base in NF4. Here
HydraLoRA 3x8 is tuned alike on the base as it is, in int8 and in NF4, seed by seed. The claim
holds if the 95 % interval of the difference in validation loss, quantised minus not, lies within
the margin on both sides, which is two one-sided t tests at 2.5 %. The margin is half of what the
learned gate gains on a uniform one in table1, or on Dolly half of the distance to the LoRA of its
size: a difference that would not change what is said of any method.
"""

import copy
import sys
from functools import partial
from pathlib import Path

from torch import nn

from data import WORLD
from experiments import common, report, steps
from experiments.common import hydra
from model import load_llama
from support.quantize import KINDS, QuantizedLinear, quantize_blocks

PRIMARY = "after tuning, a base in NF4 loses no more than the margin"
SECONDARY = "after tuning, a base in int8 loses no more than the margin"
METRICS = ("val_loss", "exact_match", "kept", "quiz")


def measure_weights(weights):
    """{kind: {bits, error}} of the linear layers in the blocks: bits per weight, and the norm of
    the error over the norm of the weights."""
    found = {}
    for kind in KINDS:
        model, _ = load_llama(weights)
        dense = {name: layer.weight for name, layer in model.layers.named_modules()
                 if isinstance(layer, nn.Linear)}
        quantize_blocks(model, kind)
        layers = {name: layer for name, layer in model.layers.named_modules()
                  if isinstance(layer, QuantizedLinear)}
        error = sum((layers[name].weight - dense[name]).float().square().sum() for name in dense)
        norm = sum(weight.float().square().sum() for weight in dense.values())
        size = sum(layer.codes.nbytes + layer.scales.nbytes for layer in layers.values())
        found[kind] = {"bits": 8 * size / sum(weight.numel() for weight in dense.values()),
                       "error": (error / norm).sqrt().item()}
    return found


def time_steps(rounds):
    """{kind: seconds of a step, round by round} of HydraLoRA 3x8 on a random model of 143 million
    weights in fp32, 2 x 256 tokens, all in turn in this process."""
    base = steps.random_base(steps.SMOL)
    batch = steps.random_batch(2, 256, steps.SMOL["vocab_size"])
    works = {}
    for kind in ("none", *KINDS):
        model = copy.deepcopy(base)
        if kind in KINDS:
            quantize_blocks(model, kind)
        method = steps.adapted(model, rank=8, heads=3)
        works[kind] = partial(method.step, batch)
        works[kind]()  # warm
    return steps.time_rounds(works, rounds)


def verdict(stat, margin):
    """"equal" within the margin on both sides; "behind" and "ahead" if zero is outside the
    interval; else "undecided"."""
    if stat["low"] is None:
        return "undecided"
    if -margin < stat["low"] and stat["high"] < margin:
        return "equal"
    if stat["low"] <= 0 <= stat["high"]:
        return "undecided"
    return "behind" if stat["mean"] > 0 else "ahead"


def make_claims(runs, margin):
    found = []
    for text, kind in ((PRIMARY, "nf4"), (SECONDARY, "int8")):
        stat = report.difference(common.values(runs[kind]), common.values(runs["none"]))
        found.append({"claim": text, "primary": text == PRIMARY, "difference": stat,
                      "margin": margin, "verdict": verdict(stat, margin),
                      "fixed_by": report.fixed_by(__file__, text)})
    return found


def make_rows(args, runs, weights):
    rows = []
    for kind, own in runs.items():
        metrics = own[0]["metrics"]
        row = {"quantize": kind, **weights.get(kind, {}), "val_loss_base": metrics["val_loss_base"]}
        if args.quiz:
            base = {kind: {"folder": Path(args.weights), "quantize": kind}}
            row["quiz_base"] = common.quiz_accuracies(base, args.quiz, args)[kind]
        rows.append({**row, **common.intervals(own, METRICS)})
    return rows


def make_tables(rows, claims, seconds):
    def cell(row, key, form):
        return form(row[key]) if key in row else "-"

    losses = report.markdown(
        ["base", "bits per weight", "error of the weights", "loss of the base", "loss, tuned",
         "quiz of the base", "quiz, tuned", "exact match", "kept: loss"],
        [[row["quantize"], cell(row, "bits", "{:.2f}".format), cell(row, "error", "{:.2%}".format),
          f"{row['val_loss_base']:.4f}", report.show(row["val_loss"]),
          cell(row, "quiz_base", "{:.2%}".format),
          *(cell(row, key, partial(report.show, percent=key != "kept"))
            for key in ("quiz", "exact_match", "kept"))] for row in rows])
    judged = report.markdown(
        ["claim", "margin", "difference", "verdict", "fixed by"],
        [[c["claim"], f"{c['margin']:g}", report.show(c["difference"], sign="+"), c["verdict"],
          c["fixed_by"] or "not committed"] for c in claims])
    slower = steps.time_ratios(seconds, "none")
    times = report.markdown(
        ["base", "seconds per step", "times the unquantised"],
        [[kind, f"{median:.2f}", f"{1 / slower[kind]:.2f}"]
         for kind, median in steps.medians(seconds).items()])
    return [losses, judged, times]


def parse_args(argv):
    p = common.parser("quantized", __doc__, seeds=5, epochs=1, rates=(), sweep_epochs=0)
    p.add_argument("--rate", type=float, default=4e-3, help="peak learning rate (%(default)s)")
    p.add_argument("--margin", type=float, default=0.006,
                   help="difference in loss that counts as none (%(default)s)")
    p.add_argument("--rounds", type=int, default=5, help="of the steps that are timed (5)")
    p.add_argument("--name", default="quantized", help="of the files written (quantized)")
    p.set_defaults(max_steps=250, first_seed=0)
    args = common.parse_args(p, argv)
    args.quiz = WORLD / "quiz" if Path(args.weights) == WORLD / "base" else None
    return args


def run(args):
    records, val = common.load_records(args)
    configs = {kind: hydra(3, quantize=kind, clip=1.0) for kind in ("none", *KINDS)}
    runs = common.run_methods(configs, dict.fromkeys(configs, args.rate), args, records, val,
                              args.quiz)
    rows = make_rows(args, runs, measure_weights(args.weights))
    claims = make_claims(runs, args.margin)
    seconds = time_steps(args.rounds)
    conditions = {**common.conditions(args, records, val), "rate": args.rate}
    report.write_results(args, args.name, {"conditions": conditions, "rows": rows,
                                           "claims": claims, "seconds": seconds},
                         make_tables(rows, claims, seconds))


if __name__ == "__main__":
    sys.exit(common.main("quantized", parse_args, run))
