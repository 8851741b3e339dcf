"""Figure 3 of HydraLoRA: do the A matrices of LoRAs tuned apart converge, and not the B?

LoRA is tuned on three families apart, twice: all three from the same random A (the paper's
picture, which has one seed), and each from an A of its own (only training can then bring the A's
together). Compared layer by layer are A, B, the displacement of A from its start, and the update
B A; B starts at zero, so it is its own displacement. A's with a cosine of zero may still read
the same subspace: hence the overlap of the spaces that their rows and B's columns span.

    python -m experiments.figure3
"""

import statistics
import sys
from itertools import combinations, product

import torch

from experiments import common, report
from experiments.common import lora
from hydralora import hydra_layers
from support.evaluation import mean_cosine

PRIMARY = "the A's converge from different starts: over half of their row spaces is shared"
FAMILIES = ["extraction", "norvan", "arithmetic"]  # of the embedded world
STARTS = {"same": "the same random A", "different": "different random A's"}
PARTS = {"A at the start": "start", "A": "a", "B": "b", "displacement of A": "moved",
         "update B A": "update"}
SPACES = {"rows of A at the start": "start", "rows of A": "a", "columns of B": "b"}
PANELS = {"A": "a", "B": "b", "displacement of A": "moved"}
APART = 1000  # between the seeds of families that start from different A's
ALIKE = 0.5  # cosine or share that "converge" and "distinguishable" are measured against


def matrices(run):
    """{part: {layer: matrix}} of a finished run."""
    first = hydra_layers(common.starting_model(run["flags"])[0])
    last = hydra_layers(common.trained_model(run)[0])
    start = {name: layer.lora_A.detach() for name, layer in first.items()}
    a = {name: layer.lora_A.detach() for name, layer in last.items()}
    b = {name: layer.lora_B.detach()[0] for name, layer in last.items()}  # (1, O, R) -> (O, R)
    return {"start": start, "a": a, "b": b, "moved": {name: a[name] - start[name] for name in a},
            "update": {name: b[name] @ a[name] for name in a}}


def mean_over(families, part, likeness):
    """The mean over the layers of likeness(matrices of all families)."""
    return statistics.fmean(likeness([family[part][layer] for family in families])
                            for layer in families[0][part])


def overlap(matrices):
    """The share of the space spanned by the rows of one matrix (R, I) that lies in another's, the
    mean over all pairs: the mean squared cosine of the principal angles; 1: the same space, R / I
    by chance. Of matrices (O, R) that are taller than wide the columns are compared."""
    bases = [torch.linalg.qr(m if len(m) > m.shape[1] else m.T)[0] for m in matrices]
    return statistics.fmean(((a.T @ b).square().sum() / a.shape[1]).item()
                            for a, b in combinations(bases, 2))


def make_runs(args, rate, records, val):
    """{start: [[run of each family] of each seed]}; the first family's run serves both starts."""
    flags = {}
    for start, (i, family) in product(STARTS, enumerate(args.families)):
        flags[start, family] = common.run_flags(
            args, lora(args.rank), rate=rate,
            seed=args.first_seed + (APART * i if start == "different" else 0),
            records=common.of_families(records, [family]),
            val=common.of_families(val, [family]))
    runs = common.run_seeds(flags, args)
    return {start: list(zip(*(runs[start, family] for family in args.families)))
            for start in STARTS}


def make_claims(stats, shares):
    """stats and shares {start: {part: interval}}: cosines, and overlaps of spaces."""
    def above(stat, sign=1):
        return report.interval(sign * (value - ALIKE) for value in stat["values"])

    same, rows = stats["same"], shares["different"]
    return report.judge({
        PRIMARY: above(rows["a"]),
        "from different starts the A's row spaces share more than at the start":
            report.difference(rows["a"]["values"], rows["start"]["values"]),
        "the A's are alike from the same start (cosine above 0.5)": above(same["a"]),
        "the B's are distinguishable from the same start (cosine below 0.5)": above(same["b"], -1),
        "from the same start A's displacements are more alike than B's":
            report.difference(same["moved"]["values"], same["b"]["values"])}, PRIMARY, __file__)


def draw_figure3(pyplot, found, families):
    """t-SNE of w1 and w3 of every layer, whose matrices are of one size, for {start: matrices
    of each family}."""
    from sklearn.manifold import TSNE
    figure, axes = pyplot.subplots(2, len(PANELS), figsize=(10, 6.5), layout="constrained")
    for row, start in zip(axes, STARTS):
        for axis, (label, part) in zip(row, PANELS.items()):
            layers = [name for name in found[start][0][part] if not name.endswith("w2")]
            points = torch.stack([family[part][name].flatten() for family in found[start]
                                  for name in layers]).numpy()
            flat = TSNE(perplexity=min(5, len(points) - 1), init="pca",
                        random_state=0).fit_transform(points)
            for i, family in enumerate(families):
                x, y = flat[i * len(layers):(i + 1) * len(layers)].T
                marker, _ = report.STYLES[i % len(report.STYLES)]
                axis.scatter(x, y, marker=marker, s=30, alpha=0.7, label=family)
            axis.set(title=f"{label}, {start} start", xlabel="t-SNE 1 (no unit)",
                     ylabel="t-SNE 2 (no unit)")
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(families))
    return figure


def parse_args(argv):
    p = common.parser("figure3", __doc__, seeds=5, epochs=4, sweep_epochs=4)
    p.add_argument("--families", nargs="+", default=FAMILIES,
                   help=f"categories of the data ({' '.join(FAMILIES)})")
    p.add_argument("--rank", type=int, default=8, help="rank of LoRA (8)")
    return common.parse_args(p, argv)


def run(args):
    records, val = common.load_records(args)
    known = common.families(records) & common.families(val)
    if not set(args.families) <= known or len(set(args.families)) < 2:
        raise ValueError(f"--families needs two or more of {', '.join(sorted(known))}")
    by_family = [common.of_families(records, [family]) for family in args.families]
    tried = common.tune({"LoRA": (lora(args.rank), by_family)}, args)
    runs = make_runs(args, tried["LoRA"]["rate"], records, val)
    found = {start: [[matrices(run) for run in seed] for seed in seeds]
             for start, seeds in runs.items()}
    first = {start: seeds[0] for start, seeds in found.items()}

    def intervals(parts, likeness):
        return {start: {part: report.interval(mean_over(seed, part, likeness) for seed in seeds)
                        for part in parts.values()} for start, seeds in found.items()}

    cosines = intervals(PARTS, lambda matrices: mean_cosine(torch.stack(matrices)))
    overlaps = intervals(SPACES, overlap)
    chance = {part: statistics.fmean(min(m.shape) / max(m.shape) for m in by_layer.values())
              for part, by_layer in first["same"][0].items() if part in SPACES.values()}
    again = common.rerun(f"LoRA on {args.families[0]}", [seed[0] for seed in runs["same"]], args)
    titles = [f"from {text}" for text in STARTS.values()]
    cosine_table = report.markdown(
        ["mean cosine between families", *titles],
        [[label, *(report.show(cosines[start][part], 3) for start in STARTS)]
         for label, part in PARTS.items()])
    overlap_table = report.markdown(
        ["overlap of spaces", *titles, "by chance"],
        [[label, *(report.show(overlaps[start][part], 3) for start in STARTS),
          f"{chance[part]:.3f}"] for label, part in SPACES.items()])
    common.publish(args, "figure3", records, val,
                   {"families": args.families, "rank": args.rank, "sweep": tried,
                    "cosines": cosines, "overlaps": overlaps, "overlaps_by_chance": chance},
                   tables=[cosine_table, overlap_table], again=again,
                   claims=make_claims(cosines, overlaps),
                   draw=lambda pyplot: draw_figure3(pyplot, first, args.families))


if __name__ == "__main__":
    sys.exit(common.main("figure3", parse_args, run))
