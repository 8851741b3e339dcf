"""How many heads? One to eight, at constant rank and at a constant number of parameters.

Each number of heads is tuned and run alike, at rank 8 (more heads, more parameters) and at the rank
that gives the parameters of 3 heads of rank 8, router included. One head is LoRA.

    python -m experiments.heads      # after table1, whose runs it shares

Claims: more heads help at constant parameters; at constant rank. The runs at 1 head and 3 are those
of table1. What k-means says of the number of heads is in docs/heads.md.
"""

import sys

from experiments import common
from experiments.common import hydra
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

PRIMARY = "at constant parameters the most heads are ahead of the fewest"
SERIES = {"rank": "constant rank", "parameters": "constant parameters"}


def configs_of(args):
    """{(series, heads): flags of train.py}."""
    configs = {}
    for heads in args.heads:
        configs["rank", heads] = hydra(heads)
        configs["parameters", heads] = hydra(heads, common.matched_rank(args, heads))
    return configs


def make_claims(losses, heads):
    """losses {(series, heads): [loss of each seed]}."""
    fewest, most = min(heads), max(heads)
    if fewest == most:
        return []

    def gain(series):
        return difference(losses[series, fewest], losses[series, most])

    return judged([claim(PRIMARY, gain("parameters"), primary=True),
                   claim(f"at constant rank {most} heads are ahead of {fewest}", gain("rank"))],
                  __file__)


def make_table(rows):
    return markdown(
        ["heads", "held constant", "rank", "rate", "trainable", "validation loss", "exact match"],
        [[row["heads"], row["series"], row["rank"], f"{row['rate']:g}", f"{row['trainable']:,}",
          show(row["val_loss"]), show(row["exact_match"], percent=True)] for row in rows])


def draw_heads(pyplot, rows):
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for key, marker, line in (("rank", "o", "-"), ("parameters", "s", "--")):
        part = [row for row in rows if row["series"] == key]
        error_bars(axes, [row["heads"] for row in part], [row["val_loss"] for row in part],
                   marker=marker, linestyle=line, label=SERIES[key])
    axes.set_xticks(sorted({row["heads"] for row in rows}))
    axes.set_xlabel("heads (number of B matrices)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend()
    return figure


def main(argv=None):
    p = common.parser("heads", __doc__, seeds=5, epochs=1, records=common.MIXED)
    p.add_argument("--heads", type=int, nargs="+", default=[1, 2, 3, 4, 8],
                   help="numbers of heads (1 2 3 4 8)")
    args, records, val = common.prepare(p, argv)
    if min(args.heads) < 1:
        p.error("--heads must be at least 1")
    configs = {f"{heads} heads at constant {key}": (key, heads, config)
               for (key, heads), config in configs_of(args).items()}
    tried = common.tune({name: (config, [records]) for name, (_, _, config) in configs.items()},
                        args)
    runs = common.run_seeds({name: config for name, (_, _, config) in configs.items()}, tried,
                            args, records, val)
    rows = [{"series": key, "heads": heads, "rank": config["rank"],
             "rate": common.steady_rate(tried[name]),
             "trainable": runs[name][0]["parameters"]["trainable"],
             "val_loss": interval(common.values(runs[name])),
             "exact_match": interval(common.values(runs[name], "exact_match"))}
            for name, (key, heads, config) in configs.items()]
    losses = {(row["series"], row["heads"]): row["val_loss"]["values"] for row in rows}
    claims, last = make_claims(losses, args.heads), list(configs)[-1]
    again = common.rerun(last, runs[last], args)
    write_results(
        args, "heads", {"conditions": common.conditions(args, records, val), "sweep": tried,
                        "rows": rows, "rerun": again, "claims": claims},
        [make_table(rows), common.rerun_text(again), claims_text(claims),
         common.rates_table(tried)],
        lambda pyplot: draw_heads(pyplot, rows))
    return 0


if __name__ == "__main__":
    sys.exit(common.run_experiment("heads", main, None))
