"""How many heads? One to eight, at constant rank and at a constant number of parameters.

Each number of heads is tuned and run alike, at rank 8 (more heads, more parameters) and at the
rank that gives the parameters of 3 heads of rank 8, router included. One head is LoRA.

    python -m experiments.heads      # after table1, whose runs it shares
"""

import sys

from experiments import common, report
from experiments.common import hydra

PRIMARY = "at constant parameters the most heads are ahead of the fewest"


def methods(args):
    """{name: (series, settings)}."""
    found = {}
    for heads in args.heads:
        ranks = {"rank": 8, "parameters": common.matched_rank(args, heads)}
        for series, rank in ranks.items():
            name = f"{heads} head{'s' if heads > 1 else ''} at constant {series}"
            found[name] = (series, hydra(heads, rank))
    return found


def make_claims(rows):
    losses = {(row["series"], row["heads"]): row["val_loss"]["values"] for row in rows}
    heads = [row["heads"] for row in rows]
    fewest, most = min(heads), max(heads)
    if fewest == most:
        return []
    gains = {series: report.loss_difference(losses[series, fewest], losses[series, most])
             for series in ("rank", "parameters")}
    return report.judge({PRIMARY: gains["parameters"],
                         f"at constant rank {most} heads are ahead of {fewest}": gains["rank"]},
                        PRIMARY, __file__)


def make_table(rows):
    header = ["heads", "held constant", "rank", "rate", "trainable", "validation loss",
              "exact match"]
    return report.markdown(header, [
        [row["heads"], row["series"], row["rank"], row["rate"], row["trainable"], row["val_loss"],
         report.show(row["exact_match"], percent=True)] for row in rows])


def draw_heads(pyplot, rows):
    lines = {}
    for series in ("rank", "parameters"):
        part = [row for row in rows if row["series"] == series]
        lines[f"constant {series}"] = ([row["heads"] for row in part],
                                       [row["val_loss"] for row in part])
    axes = report.line_chart(pyplot, lines, "heads (number of B matrices)",
                             "validation loss (nats per token)")
    axes.set_xticks(sorted({row["heads"] for row in rows}))
    return axes.figure


def parse_args(argv):
    p = common.parser("heads", __doc__, seeds=5, epochs=1, records=common.MIXED)
    p.add_argument("--heads", type=int, nargs="+", default=[1, 2, 3, 4, 8],
                   help="numbers of heads (1 2 3 4 8)")
    return common.parse_args(p, argv)


def run(args):
    records, val = common.load_records(args)
    arms = methods(args)
    configs = {name: config for name, (_, config) in arms.items()}
    tried, runs = common.tune_and_run(configs, args, records, val)
    rows = []
    for name, (series, config) in arms.items():
        heads = runs[name][0]["settings"]["heads"]
        rows.append({"series": series, "heads": heads, "rank": config["rank"],
                     **common.make_row(runs[name], ["val_loss", "exact_match"])})
    last = list(arms)[-1]
    common.publish(args, "heads", records, val, {"sweep": tried, "rows": rows},
                   tables=[make_table(rows)], again=common.rerun(last, runs[last], args),
                   claims=make_claims(rows), draw=lambda pyplot: draw_heads(pyplot, rows))


if __name__ == "__main__":
    sys.exit(common.main("heads", parse_args, run))
