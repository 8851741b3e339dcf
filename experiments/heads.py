"""How many heads? One to eight, at constant rank and at a constant number of parameters.

HydraLoRA section 3.2 takes the number from k-means over the corpus. Each number of heads is tuned
and run alike, at rank 8 (more heads, more parameters) and at the rank that gives the parameters of
3 heads of rank 8, router included. One head is LoRA.

    python -m experiments.heads      # 75 runs; after table1 48, 19 minutes on two slow cores

Claims: more heads help at constant rank; at constant parameters; and k-means' number is ahead of
the best other one. The sweep and the runs at 1 head, 3 and k-means' are those of table1.
"""

import sys

from experiments import common
from experiments.common import claim, difference, hydra, interval, show

SERIES = {"rank": "constant rank", "parameters": "constant parameters"}


def configs_of(args):
    """{(series, heads): flags of train.py}."""
    wanted = common.count_trainable(args, 3, 8)
    configs = {}
    for heads in args.heads:
        configs["rank", heads] = hydra(heads)
        configs["parameters", heads] = hydra(heads, common.matched_rank(args, heads, wanted))
    return configs


def make_claims(losses, heads, chosen):
    """losses {(series, heads): [loss of each seed]}."""
    fewest, most = min(heads), max(heads)
    found = [claim(f"at {label} {most} heads are ahead of {fewest}",
                   difference(losses[key, fewest], losses[key, most]))
             for key, label in SERIES.items() if most > fewest]
    if chosen in heads and len(heads) > 1:
        others = [n for n in heads if n != chosen]
        for key, label in SERIES.items():
            best = min(others, key=lambda n: interval(losses[key, n])["mean"])
            found.append(claim(f"at {label} k-means' {chosen} heads are ahead of the best other "
                               f"number, {best}", difference(losses[key, best],
                                                             losses[key, chosen])))
    return found


def make_table(rows, chosen):
    return common.markdown(
        ["heads", "held constant", "rank", "rate", "trainable", "validation loss", "exact match"],
        [[f"{row['heads']}{' (k-means)' if row['heads'] == chosen else ''}",
          row["series"], row["rank"], f"{row['rate']:g}", f"{row['trainable']:,}",
          show(row["val_loss"]), show(row["exact_match"], percent=True)] for row in rows])


def draw_heads(pyplot, rows, chosen):
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for key, marker, line in (("rank", "o", "-"), ("parameters", "s", "--")):
        part = [row for row in rows if row["series"] == key]
        common.error_bars(axes, [row["heads"] for row in part], [row["val_loss"] for row in part],
                          marker=marker, linestyle=line, label=SERIES[key])
    axes.axvline(chosen, color="grey", linestyle=":", label=f"k-means: {chosen} heads")
    axes.set_xticks(sorted({row["heads"] for row in rows}))
    axes.set_xlabel("heads (number of B matrices)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend()
    return figure


def main(argv=None):
    p = common.parser("heads", __doc__, seeds=3, epochs=1, records=common.MIXED)
    p.add_argument("--heads", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8],
                   help="numbers of heads (1 2 3 4 6 8)")
    args, records, val = common.prepare(p, argv)
    if min(args.heads) < 1:
        p.error("--heads must be at least 1")
    chosen = common.kmeans_heads(args, records)
    print(f"k-means: {chosen} heads")
    configs = {f"{heads} heads at constant {key}": (key, heads, config)
               for (key, heads), config in configs_of(args).items()}
    tried = common.tune({name: (config, [records]) for name, (_, _, config) in configs.items()},
                        args)
    runs = common.run_seeds({name: config for name, (_, _, config) in configs.items()}, tried,
                            args, records, val)
    rows = [{"series": key, "heads": heads, "rank": config["rank"],
             "rate": common.best_rate(tried[name]),
             "trainable": runs[name][0]["parameters"]["trainable"],
             "val_loss": interval(common.values(runs[name])),
             "exact_match": interval(common.values(runs[name], "exact_match"))}
            for name, (key, heads, config) in configs.items()]
    losses = {(row["series"], row["heads"]): row["val_loss"]["values"] for row in rows}
    claims = make_claims(losses, args.heads, chosen)
    common.write_results(
        args, "heads", {"conditions": common.conditions(args, records, val),
                        "kmeans_heads": chosen, "sweep": tried, "rows": rows, "claims": claims},
        [make_table(rows, chosen), common.claims_table(claims), common.rates_table(tried)],
        lambda pyplot: draw_heads(pyplot, rows, chosen))
    return 0


if __name__ == "__main__":
    sys.exit(common.run_experiment("heads", main, None))
