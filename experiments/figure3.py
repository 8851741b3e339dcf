"""Figure 3 of HydraLoRA: do the A matrices of LoRAs tuned apart converge, and the B matrices not?

LoRA of rank 8 is tuned on three families apart, twice: all three from the same random A, which is
what one seed in three runs gives (the paper's picture), and each from an A of its own (the
objection to it: then nothing but training can bring the A's together). Compared layer by layer are
A, B, the displacement of A from its start, and the update B A, which no choice of basis changes. B
starts at zero, so it is its own displacement.

    python -m experiments.figure3    # 37 short runs, 10 minutes on two slow cores

Claims (Observation II): the A's converge: from different starts their cosine ends above 0.5; the
B's are distinguishable: from the same start their cosine stays below 0.5; and A moves in more alike
directions than B does.
"""

import statistics
import sys
from itertools import combinations

import torch
import torch.nn.functional as F

import train
from experiments import common
from experiments.common import claim, difference, interval, lora, show
from hydralora import hydra_layers
from support.files import read_torch

FAMILIES = ["extraction", "norvan", "arithmetic"]  # of the embedded world
STARTS = {"same": "the same random A", "different": "different random A's"}
PARTS = {"A at the start": "start", "A": "a", "B": "b", "displacement of A": "moved",
         "update B A": "update"}
APART = 1000  # between the seeds of families that start from different A's
ALIKE = 0.5  # the cosine that "converge" and "distinguishable" are measured against
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def starting_a(flags):
    """{layer: lora_A} as train.py drew it, by the same calls in the same order."""
    args = train.parse_args(flags)
    torch.manual_seed(args.seed)
    model, _ = train.load_base(args)
    train.add_adapters(model, args)
    return {name: layer.lora_A.detach() for name, layer in hydra_layers(model).items()}


def matrices(flags, folder):
    """{part: {layer: matrix}} of a finished run."""
    tensors = read_torch(folder / "adapter.pt", "an adapter of this project")["tensors"]
    start = starting_a(flags)
    a = {name: tensors[f"{name}.lora_A"] for name in start}
    b = {name: tensors[f"{name}.lora_B"][0] for name in start}  # (1, O, R) -> (O, R)
    return {"start": start, "a": a, "b": b, "moved": {name: a[name] - start[name] for name in a},
            "update": {name: b[name] @ a[name] for name in a}}


def mean_cosine(found, part):
    """Over all pairs of families and all layers."""
    return statistics.fmean(
        F.cosine_similarity(one[part][name].flatten(), other[part][name].flatten(), dim=0).item()
        for one, other in combinations(found, 2) for name in one[part])


def make_runs(args, rate, records, val):
    """{(start, seed): [(flags, folder) of each family]}; the first family's run serves both."""
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
    pairs = [(run["flags"], run["folder"]) for run in runs]
    count = len(args.families)
    return {key: pairs[i * count:(i + 1) * count] for i, key in enumerate(keys)}


def make_claims(stats):
    def above(stat, sign=1):
        return interval(sign * (value - ALIKE) for value in stat["values"])

    moved, b = (stats["same"][part]["values"] for part in ("moved", "b"))
    return [claim("the A's converge from different starts (cosine above 0.5)",
                  above(stats["different"]["a"])),
            claim("the A's are alike from the same start (cosine above 0.5)",
                  above(stats["same"]["a"])),
            claim("the B's are distinguishable from the same start (cosine below 0.5)",
                  above(stats["same"]["b"], -1)),
            claim("from the same start A's displacements are more alike than B's",
                  difference(moved, b))]


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
    runs = make_runs(args, common.best_rate(tried["LoRA"]), records, val)
    cosines, first = {start: {part: [] for part in PARTS.values()} for start in STARTS}, {}
    for (start, _), pairs in runs.items():
        found = [matrices(flags, folder) for flags, folder in pairs]
        first.setdefault(start, found)
        for part in PARTS.values():
            cosines[start][part].append(mean_cosine(found, part))
    stats = {start: {part: interval(of) for part, of in parts.items()}
             for start, parts in cosines.items()}
    claims = make_claims(stats)
    table = common.markdown(
        ["mean cosine between families", *(f"from {title}" for title in STARTS.values())],
        [[label, *(show(stats[start][part], 3) for start in STARTS)]
         for label, part in PARTS.items()])
    common.write_results(
        args, "figure3",
        {"conditions": common.conditions(args, records, val), "families": args.families,
         "rank": args.rank, "sweep": tried, "cosines": stats, "claims": claims},
        [table, common.claims_table(claims), common.rates_table(tried)],
        lambda pyplot: draw_figure3(pyplot, first, args.families))
    return 0


if __name__ == "__main__":
    sys.exit(common.run_experiment("figure3", main, None))
