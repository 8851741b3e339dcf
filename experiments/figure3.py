"""Figure 3 of HydraLoRA: do the A matrices of LoRAs tuned apart converge, and the B matrices not?

LoRA of rank 8 is tuned on three families apart, twice: all three from the same random A, which is
what one seed in three runs gives (the paper's picture), and each from an A of its own (the
objection to it: then nothing but training can bring the A's together). Compared layer by layer are
A, B, the displacement of A from its start, and the update B A. B starts at zero, so it is its own
displacement. Two A's with no cosine in common may still read the same subspace: so beside the
cosines stands the overlap of the spaces that their rows span (and B's columns), which a change of
basis does not touch.

    python -m experiments.figure3

Claims (Observation II): the A's converge, so that from different starts most of their row spaces is
shared; the B's are distinguishable; and A moves in more alike directions than B does.
"""

import statistics
import sys
from itertools import combinations

import torch
import torch.nn.functional as F

from experiments import common
from experiments.common import lora
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
from support.files import read_torch

PRIMARY = "the A's converge from different starts: over half of their row spaces is shared"
FAMILIES = ["extraction", "norvan", "arithmetic"]  # of the embedded world
STARTS = {"same": "the same random A", "different": "different random A's"}
PARTS = {"A at the start": "start", "A": "a", "B": "b", "displacement of A": "moved",
         "update B A": "update"}
SPACES = {"rows of A at the start": "start", "rows of A": "a", "columns of B": "b"}
APART = 1000  # between the seeds of families that start from different A's
ALIKE = 0.5  # cosine or share that "converge" and "distinguishable" are measured against
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def matrices(flags, folder):
    """{part: {layer: matrix}} of a finished run."""
    tensors = read_torch(folder / "adapter.pt", "an adapter of this project")["tensors"]
    start = {name: layer.lora_A.detach() for name, layer in common.starting_layers(flags).items()}
    a = {name: tensors[f"{name}.lora_A"] for name in start}
    b = {name: tensors[f"{name}.lora_B"][0] for name in start}  # (1, O, R) -> (O, R)
    return {"start": start, "a": a, "b": b, "moved": {name: a[name] - start[name] for name in a},
            "update": {name: b[name] @ a[name] for name in a}}


def mean_over(found, part, likeness):
    """likeness(matrix, matrix) over all pairs of families and all layers."""
    return statistics.fmean(likeness(one[part][name], other[part][name]).item()
                            for one, other in combinations(found, 2) for name in one[part])


def cosine(a, b):
    return F.cosine_similarity(a.flatten(), b.flatten(), dim=0)


def overlap(a, b):
    """How much of the space that the rows of one matrix (R, I) span lies in the other's: the mean
    squared cosine of the angles between the spaces; 1: the same, R / I by chance. Matrices (O, R)
    that are taller than wide have their columns compared."""
    one, other = (torch.linalg.qr(m if len(m) > m.shape[1] else m.T)[0] for m in (a, b))
    return (one.T @ other).square().sum() / one.shape[1]


def by_chance(matrices):
    """The mean overlap() of random matrices of the sizes of {layer: matrix}."""
    return statistics.fmean(min(m.shape) / max(m.shape) for m in matrices.values())


def make_runs(args, rate, records, val):
    """{(start, seed): [run of each family]}; the first family's run serves both."""
    keys = [(start, seed) for start in STARTS for seed in range(args.seeds)]
    flags = []
    for start, seed in keys:
        for i, family in enumerate(args.families):
            own = [[r for r in part if r["category"] == family] for part in (records, val)]
            flags.append(common.train_flags(
                args, lora(args.rank), rate=rate, epochs=args.epochs, data=own[0], val=own[1],
                seed=seed + (APART * i if start == "different" else 0)))
    runs = common.run_all(flags, args)
    common.check_converged(runs)
    count = len(args.families)
    return {key: runs[i * count:(i + 1) * count] for i, key in enumerate(keys)}


def make_claims(stats, shares):
    """stats and shares {start: {part: interval}}: cosines, and overlaps of spaces."""
    def above(stat, sign=1):
        return interval(sign * (value - ALIKE) for value in stat["values"])

    moved, b = (stats["same"][part]["values"] for part in ("moved", "b"))
    rows = shares["different"]
    return judged([
        claim(PRIMARY, above(rows["a"]), primary=True),
        claim("from different starts the A's row spaces share more than at the start",
              difference(rows["a"]["values"], rows["start"]["values"])),
        claim("the A's are alike from the same start (cosine above 0.5)",
              above(stats["same"]["a"])),
        claim("the B's are distinguishable from the same start (cosine below 0.5)",
              above(stats["same"]["b"], -1)),
        claim("from the same start A's displacements are more alike than B's",
              difference(moved, b))], __file__)


def draw_figure3(pyplot, found, families):
    """t-SNE of w1 and w3 of every layer, whose matrices are of one size; None without the tool."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        print("no picture: scikit-learn is not here (pip install -r requirements-optional.txt)")
        return None
    panels = {"A": "a", "B": "b", "displacement of A": "moved"}
    figure, axes = pyplot.subplots(2, len(panels), figsize=(10, 6.5), layout="constrained")
    for row, start in zip(axes, STARTS):
        for axis, (label, part) in zip(row, panels.items()):
            names = [name for name in found[start][0][part] if not name.endswith("w2")]
            points = torch.stack([own[part][name].flatten() for own in found[start]
                                  for name in names]).numpy()
            axis.set_title(f"{label}, {start} start", fontsize=10)
            if not points.std(0).any():
                axis.text(0.5, 0.5, "all points are one", ha="center")  # t-SNE would divide by zero
                continue
            flat = TSNE(perplexity=min(5, len(points) - 1), init="pca",
                        random_state=0).fit_transform(points)
            for i, family in enumerate(families):
                own = flat[i * len(names):(i + 1) * len(names)]
                axis.scatter(own[:, 0], own[:, 1], marker=MARKERS[i % len(MARKERS)], s=30,
                             alpha=0.7, label=family)
            axis.set_xlabel("t-SNE 1 (no unit)")
            axis.set_ylabel("t-SNE 2 (no unit)")
    lines, labels = axes[0][1].get_legend_handles_labels()  # the B matrices move in any run
    figure.legend(lines, labels, loc="outside lower center", ncols=len(families))
    return figure


def main(argv=None):
    p = common.parser("figure3", __doc__, seeds=5, epochs=4, sweep_epochs=4)
    p.add_argument("--families", nargs="+", default=FAMILIES,
                   help=f"categories of the data ({' '.join(FAMILIES)})")
    p.add_argument("--rank", type=int, default=8, help="of LoRA (8)")
    args, records, val = common.prepare(p, argv)
    known = {record["category"] for record in records} & {record["category"] for record in val}
    if not set(args.families) <= known or len(set(args.families)) < 2:
        raise ValueError(f"--families needs two or more of {', '.join(sorted(known))}")
    tried = common.tune({"LoRA": (lora(args.rank), [
        [r for r in records if r["category"] == family] for family in args.families])}, args)
    runs = make_runs(args, common.steady_rate(tried["LoRA"]), records, val)
    values, first = {}, {}
    for (start, _), own in runs.items():
        found = [matrices(run["flags"], run["folder"]) for run in own]
        first.setdefault(start, found)
        for likeness, parts in ((cosine, PARTS), (overlap, SPACES)):
            for part in parts.values():
                values.setdefault((likeness, start, part), []).append(
                    mean_over(found, part, likeness))
    stats, shares = ({start: {part: interval(values[likeness, start, part])
                              for part in parts.values()} for start in STARTS}
                     for likeness, parts in ((cosine, PARTS), (overlap, SPACES)))
    claims = make_claims(stats, shares)
    again = common.rerun(f"LoRA on {args.families[0]}",
                         [own[0] for (start, _), own in runs.items() if start == "same"], args)
    chance = {part: by_chance(first["same"][0][part]) for part in SPACES.values()}
    titles = [f"from {text}" for text in STARTS.values()]
    cosines = markdown(["mean cosine between families", *titles],
                       [[label, *(show(stats[start][part], 3) for start in STARTS)]
                        for label, part in PARTS.items()])
    overlaps = markdown(["overlap of spaces", *titles, "by chance"],
                        [[label, *(show(shares[start][part], 3) for start in STARTS),
                          f"{chance[part]:.3f}"] for label, part in SPACES.items()])
    write_results(
        args, "figure3",
        {"conditions": common.conditions(args, records, val), "families": args.families,
         "rank": args.rank, "sweep": tried, "cosines": stats, "overlaps": shares,
         "overlaps_by_chance": chance, "rerun": again, "claims": claims},
        [cosines, overlaps, common.rerun_text(again), claims_text(claims),
         common.rates_table(tried)],
        lambda pyplot: draw_figure3(pyplot, first, args.families))
    return 0


if __name__ == "__main__":
    sys.exit(common.run_experiment("figure3", main, None))
