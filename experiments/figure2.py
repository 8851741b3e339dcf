"""Figure 2 of HydraLoRA: does a mixed corpus widen the gap of low rank to full fine-tuning?

The corpus goes from one family to all of them at a constant number of records. For each number
of families the families are dealt by the seed into groups of that size, each family into one
group; every group is a corpus of its own, tested on its own families. The mean over the groups
thus weighs every family alike at every point, and all methods see the same groups and seeds.

    python -m experiments.figure2
"""

import random
import sys
from itertools import product

from experiments import common, report
from experiments.common import FULL, hydra, lora

PRIMARY = "HydraLoRA's gap to full fine-tuning grows less than that of LoRA, matched"
GROWTH_SEEDS = 5  # at least, for a claim on growth
HYDRA = "HydraLoRA 3x8"
LORAS = ("LoRA r8", "LoRA, matched")
LINES = (*LORAS, HYDRA)
SWEPT = 2  # groups that the learning rate is chosen on, at each number of families


def methods(args):
    return {"full": FULL, "LoRA r8": lora(8), "LoRA, matched": lora(common.matched_rank(args)),
            HYDRA: hydra(3)}


def sizes(count):
    """Of so many families: one, the largest divisor between, all; every family is then dealt."""
    return sorted({1, *[n for n in range(1, count + 1) if count % n == 0][-2:]})


def deal(families, size, seed):
    """The families in groups of `size`, each in one; the rest of an odd deal is left out."""
    families = sorted(families)
    random.Random(f"{seed} {size}").shuffle(families)
    return [sorted(families[i:i + size]) for i in range(0, len(families) - size + 1, size)]


def corpus(records, group, total, seed):
    """`total` records in equal parts from the families of a group. Raises ValueError if a
    family has too few."""
    wanted = total // len(group)
    chosen = []
    for family in group:
        own = common.of_families(records, [family])
        if len(own) < wanted:
            raise ValueError(f"{family} has {len(own)} records, {wanted} are wanted: give a "
                             "smaller --total")
        chosen += common.draw_records(own, wanted, seed)
    return chosen


def make_runs(args, configs, rates, records, val):
    """{(name, size, seed): [run of each group]}."""
    flags = {}
    for name, size, seed in product(configs, args.families, range(args.seeds)):
        for group in deal(common.families(records), size, seed):
            flags[name, size, seed, tuple(group)] = common.run_flags(
                args, configs[name], rate=rates[f"{name}, {size}"],
                seed=args.first_seed + seed,
                records=corpus(records, group, args.total, seed),
                val=common.of_families(val, group))
    runs = {}
    for (name, size, seed, _), run in common.run_all(flags, args).items():
        runs.setdefault((name, size, seed), []).append(run)
    return runs


def make_claims(losses, sizes, seeds):
    """losses {(name, size): [loss of each seed]}."""
    first, last = min(sizes), max(sizes)
    gaps = {(name, size): [a - b for a, b in zip(losses[name, size], losses["full", size])]
            for name in LINES for size in sizes}
    growth = {name: report.difference(gaps[name, last], gaps[name, first]) for name in LINES}
    found = {f"HydraLoRA's gap on {last} families is smaller than that of {name}":
             report.loss_difference(losses[name, last], losses[HYDRA, last]) for name in LORAS}
    if seeds >= GROWTH_SEEDS and first < last:
        less = {name: report.difference(growth[name]["values"], growth[HYDRA]["values"])
                for name in LORAS}
        wider = {f"{name}'s gap is wider on {last} families than on {first}": growth[name]
                 for name in LORAS}
        found = {PRIMARY: less["LoRA, matched"], **found,
                 "HydraLoRA's gap grows less than that of LoRA r8": less["LoRA r8"], **wider}
    return report.judge(found, PRIMARY, __file__)


def draw_figure2(pyplot, gaps, sizes, total):
    lines = {name: ([size + shift for size in sizes], [gaps[name, size] for size in sizes])
             for name, shift in zip(LINES, (-0.06, 0, 0.06))}  # or the bars would hide each other
    axes = report.line_chart(pyplot, lines, f"families in a corpus of {total} records",
                             "loss minus full fine-tuning's\n(nats per token)")
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xticks(sizes)
    return axes.figure


def parse_args(argv):
    p = common.parser("figure2", __doc__, seeds=5, epochs=2, sweep_epochs=2)
    p.add_argument("--total", type=int, default=600, help="records per corpus (600)")
    p.add_argument("--families", type=int, nargs="+",
                   help="numbers of families (one, the largest divisor of all, all)")
    return common.parse_args(p, argv)


def run(args):
    records, val = common.load_records(args)
    families = common.families(records)
    args.families = args.families or sizes(len(families))
    last = max(args.families)
    if min(args.families) < 1 or last > len(families):
        raise ValueError(f"--families must be from 1 to the {len(families)} categories of the "
                         "data")
    configs = methods(args)
    groups = {size: [corpus(records, group, args.total, seed=0)
                     for group in deal(families, size, 0)[:SWEPT]] for size in args.families}
    tried = common.tune({f"{name}, {size}": (config, groups[size])
                         for name, config in configs.items() for size in args.families}, args)
    runs = make_runs(args, configs, common.chosen_rates(tried), records, val)
    seeds = range(args.seeds)
    losses = {(name, size): [common.mean_loss(runs[name, size, seed]) for seed in seeds]
              for name in configs for size in args.families}
    full = {size: report.interval(losses["full", size]) for size in args.families}
    gaps = {(name, size): report.difference(losses[name, size], losses["full", size])
            for name in LINES for size in args.families}
    last_runs = [run for seed in seeds for run in runs[HYDRA, last, seed]]
    again = common.rerun(f"{HYDRA} on {last} families", last_runs, args)
    table = report.markdown(
        ["families", "loss of full fine-tuning", *(f"{name} minus full" for name in LINES)],
        [[size, full[size], *(report.show(gaps[name, size], sign="+") for name in LINES)]
         for size in args.families])
    content = {"total": args.total, "sweep": tried, "full": full,
               "gaps": {name: {size: gaps[name, size] for size in args.families}
                        for name in LINES}}
    common.publish(args, "figure2", records, val, content, tables=[table], again=again,
                   claims=make_claims(losses, args.families, args.seeds),
                   draw=lambda pyplot: draw_figure2(pyplot, gaps, args.families, args.total))


if __name__ == "__main__":
    sys.exit(common.main("figure2", parse_args, run))
