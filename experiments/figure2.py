"""Figure 2 of HydraLoRA: does a mixed corpus widen the gap between low rank and full fine-tuning?

The corpus goes from one family to all of them at a constant number of records. For each number of
families the families are dealt into groups of that size, each family into one group, by the seed;
every group is a corpus of its own, tested on its own families. The mean over the groups thus weighs
every family alike at every point, and all methods see the same groups and seeds.

    python -m experiments.figure2

Claims (section 2.2): LoRA's gap to full fine-tuning grows with the number of families; HydraLoRA's
gap on the mix of all families is smaller than LoRA's; and it grows less. Growth scatters so much
from seed to seed that with fewer than five nothing is claimed of it.
"""

import random
import statistics
import sys

from experiments import common
from experiments.common import FULL, hydra, lora
from experiments.report import (
    claim,
    claims_text,
    difference,
    error_bars,
    interval,
    judged,
    markdown,
    show,
    signed,
    write_results,
)

PRIMARY = "HydraLoRA's gap to full fine-tuning grows less than that of LoRA, matched"
GROWTH_SEEDS = 5  # at least, for a claim on growth
LINES = {"LoRA r8": ("o", "-"), "LoRA, matched": ("s", "--"), "HydraLoRA 3x8": ("D", "-.")}
SWEPT = 2  # groups that the learning rate is chosen on, at each number of families


def methods(args):
    return {"full": FULL, "LoRA r8": lora(8), "LoRA, matched": lora(common.matched_rank(args)),
            "HydraLoRA 3x8": hydra(3)}


def sizes(count):
    """Of so many families: one, the largest divisor between, all; every family is then dealt."""
    return sorted({1, *[n for n in range(1, count + 1) if count % n == 0][-2:]})


def deal(families, size, seed):
    """The families in groups of `size`, each in one; the last ones of an odd deal are left out."""
    families = sorted(families)
    random.Random(f"{seed} {size}").shuffle(families)
    return [sorted(families[i:i + size]) for i in range(0, len(families) - size + 1, size)]


def corpus(records, group, total, seed):
    """`total` records in equal parts from the families of a group; raises ValueError where a family
    has too few."""
    chosen = []
    for family in group:
        own = [record for record in records if record["category"] == family]
        if len(own) < total // len(group):
            raise ValueError(f"{family} has {len(own)} records, {total // len(group)} are wanted: "
                             "give a smaller --total")
        chosen += common.draw_records(own, total // len(group), seed)
    return chosen


def of_group(val, group):
    return [record for record in val if record["category"] in group]


def make_runs(args, configs, tried, records, val):
    """{(name, size, seed): [run of each group]}."""
    keys, flags = [], []
    for name, config in configs.items():
        for size in args.families:
            for seed in range(args.seeds):
                for group in deal({r["category"] for r in records}, size, seed):
                    keys.append((name, size, seed))
                    flags.append(common.train_flags(
                        args, config, rate=common.steady_rate(tried[f"{name}, {size}"]), seed=seed,
                        epochs=args.epochs, data=corpus(records, group, args.total, seed),
                        val=of_group(val, group)))
    runs = common.run_all(flags, args)
    common.check_converged(runs)
    found = {}
    for key, run in zip(keys, runs):
        found.setdefault(key, []).append(run)
    return found


def make_claims(gaps, sizes, seeds):
    """gaps {(name, size): [loss minus full's, of each seed]}."""
    first, last = min(sizes), max(sizes)
    growth = {name: [b - a for a, b in zip(gaps[name, first], gaps[name, last])] for name in LINES}
    found = [claim(f"HydraLoRA's gap on {last} families is smaller than that of {name}",
                   difference(gaps[name, last], gaps["HydraLoRA 3x8", last]))
             for name in ("LoRA r8", "LoRA, matched")]
    if seeds >= GROWTH_SEEDS and first < last:
        found = [claim(PRIMARY, difference(growth["LoRA, matched"], growth["HydraLoRA 3x8"]),
                       primary=True), *found,
                 claim("HydraLoRA's gap grows less than that of LoRA r8",
                       difference(growth["LoRA r8"], growth["HydraLoRA 3x8"])),
                 *(claim(f"{name}'s gap is wider on {last} families than on {first}",
                         interval(growth[name])) for name in ("LoRA r8", "LoRA, matched"))]
    return judged(found, __file__)


def draw_figure2(pyplot, stats, sizes, total):
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (name, (marker, line)) in enumerate(LINES.items()):
        beside = [size + 0.06 * (i - 1) for size in sizes]  # or the bars would hide each other
        error_bars(axes, beside, [stats[name, size] for size in sizes], marker=marker,
                   linestyle=line, label=name)
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xticks(sizes)
    axes.set_xlabel(f"families in a corpus of {total} records")
    axes.set_ylabel("loss minus full fine-tuning's\n(nats per token)")
    axes.legend()
    return figure


def main(argv=None):
    p = common.parser("figure2", __doc__, seeds=5, epochs=2, sweep_epochs=2)
    p.add_argument("--total", type=int, default=600, help="records of every corpus (600)")
    p.add_argument("--families", type=int, nargs="+",
                   help="numbers of families (one, the largest divisor of all, all)")
    args, records, val = common.prepare(p, argv)
    families = {record["category"] for record in records}
    args.families = args.families or sizes(len(families))
    if not 1 <= min(args.families) <= max(args.families) <= len(families):
        raise ValueError(f"--families must be from 1 to the {len(families)} categories of the data")
    configs = methods(args)
    tried = common.tune({f"{name}, {size}": (config, [corpus(records, group, args.total, seed=0)
                                                      for group in deal(families, size, 0)[:SWEPT]])
                         for name, config in configs.items() for size in args.families}, args)
    runs = make_runs(args, configs, tried, records, val)
    losses = {key: statistics.fmean(common.values(groups)) for key, groups in runs.items()}
    gaps = {(name, size): [losses[name, size, seed] - losses["full", size, seed]
                           for seed in range(args.seeds)]
            for name in LINES for size in args.families}
    stats = {key: interval(gap) for key, gap in gaps.items()}
    full = {size: interval(losses["full", size, seed] for seed in range(args.seeds))
            for size in args.families}
    claims = make_claims(gaps, args.families, args.seeds)
    last = max(args.families)
    again = common.rerun(f"HydraLoRA 3x8 on {last} families",
                         [run for seed in range(args.seeds)
                          for run in runs["HydraLoRA 3x8", last, seed]], args)
    table = markdown(
        ["families", "loss of full fine-tuning", *(f"{name} minus full" for name in LINES)],
        [[size, show(full[size]), *(signed(stats[name, size]) for name in LINES)]
         for size in args.families])
    write_results(
        args, "figure2",
        {"conditions": common.conditions(args, records, val), "total": args.total, "sweep": tried,
         "full": full, "gaps": {name: {size: stats[name, size] for size in args.families}
                                for name in LINES}, "rerun": again, "claims": claims},
        [table, common.rerun_text(again), claims_text(claims), common.rates_table(tried)],
        lambda pyplot: draw_figure2(pyplot, stats, args.families, args.total))
    return 0


if __name__ == "__main__":
    sys.exit(common.run_experiment("figure2", main, None))
