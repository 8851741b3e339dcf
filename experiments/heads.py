"""How many heads? One to eight, at constant rank and at a constant number of parameters.

Each number of heads is tuned and run alike, at rank 8 (more heads, more parameters) and at the
rank that gives the parameters of 3 heads of rank 8, router included. One head is LoRA.

    python -m experiments.heads      # after table1, whose runs it shares

Claims: more heads help at constant parameters; at constant rank. The runs at 1 head and 3 are
those of table1. What k-means says of the number of heads is in docs/heads.md.
"""

import sys

from experiments import common, report
from experiments.common import hydra

PRIMARY = "at constant parameters the most heads are ahead of the fewest"
SERIES = {"rank": "constant rank", "parameters": "constant parameters"}


def methods(args):
    """{name: (series, heads, settings)}."""
    found = {}
    for heads in args.heads:
        ranks = {"rank": 8, "parameters": common.matched_rank(args, heads)}
        for series, rank in ranks.items():
            name = f"{heads} head{'s' if heads > 1 else ''} at constant {series}"
            found[name] = (series, heads, hydra(heads, rank))
    return found


def make_claims(losses, heads):
    """losses {(series, heads): [loss of each seed]}."""
    fewest, most = min(heads), max(heads)
    if fewest == most:
        return []
    gains = {series: report.difference(losses[series, fewest], losses[series, most])
             for series in SERIES}
    secondary = f"at constant rank {most} heads are ahead of {fewest}"
    return report.judge([report.claim(PRIMARY, gains["parameters"], primary=True),
                         report.claim(secondary, gains["rank"])], __file__)


def make_table(rows):
    header = ["heads", "held constant", "rank", "rate", "trainable", "validation loss",
              "exact match"]
    return report.markdown(header, [
        [row["heads"], row["series"], row["rank"], f"{row['rate']:g}", f"{row['trainable']:,}",
         report.show(row["val_loss"]), report.show(row["exact_match"], percent=True)]
        for row in rows])


def draw_heads(pyplot, rows):
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for series, marker, line in (("rank", "o", "-"), ("parameters", "s", "--")):
        part = [row for row in rows if row["series"] == series]
        report.error_bars(axes, [row["heads"] for row in part],
                          [row["val_loss"] for row in part],
                          marker=marker, linestyle=line, label=SERIES[series])
    axes.set_xticks(sorted({row["heads"] for row in rows}))
    axes.set_xlabel("heads (number of B matrices)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend()
    return figure


def parse_args(argv):
    p = common.parser("heads", __doc__, seeds=5, epochs=1, records=common.MIXED)
    p.add_argument("--heads", type=int, nargs="+", default=[1, 2, 3, 4, 8],
                   help="numbers of heads (1 2 3 4 8)")
    args = common.parse_args(p, argv)
    if min(args.heads) < 1:
        p.error("--heads must be at least 1")
    return args


def run(args):
    records, val = common.load_records(args)
    arms = methods(args)
    configs = {name: config for name, (_, _, config) in arms.items()}
    tried = common.tune({name: (config, [records]) for name, config in configs.items()}, args)
    rates = common.steady_rates(tried)
    runs = common.run_seeds(configs, rates, args, records, val)
    rows = [{"series": series, "heads": heads, "rank": config["rank"],
             "rate": rates[name], "trainable": runs[name][0]["parameters"]["trainable"],
             "val_loss": report.interval(common.values(runs[name])),
             "exact_match": report.interval(common.values(runs[name], "exact_match"))}
            for name, (series, heads, config) in arms.items()]
    losses = {(row["series"], row["heads"]): row["val_loss"]["values"] for row in rows}
    last = list(arms)[-1]
    common.publish(args, "heads", records, val, {"sweep": tried, "rows": rows},
                   tables=[make_table(rows)], again=common.rerun(last, runs[last], args),
                   claims=make_claims(losses, args.heads), more=[common.rates_table(tried)],
                   draw=lambda pyplot: draw_heads(pyplot, rows))


if __name__ == "__main__":
    sys.exit(common.main("heads", parse_args, run))
