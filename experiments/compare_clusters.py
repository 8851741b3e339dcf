"""The measurements behind the defaults of cluster.py.

    python -m experiments.compare_clusters              # k-means and scikit-learn's, a minute
    python -m experiments.compare_clusters --large      # 15,000 records of width 4096, k 1 to 10
    python -m experiments.compare_clusters --elbow      # axes of the elbow, on known blobs
    python -m experiments.compare_clusters --layers     # layers and normalisations
    python -m experiments.compare_clusters --layers --weights stories260k --data dolly.jsonl

Without a flag, cluster.kmeans and scikit-learn's KMeans(n_init=10) run in one process on
the same data: `--sets` data sets of each of three kinds, clustered into the number of
clusters that they were made of and into five other numbers. Only this needs scikit-learn.
--layers prints, for every layer and four normalisations, the NMI of the clusters with the
categories, at as many clusters as there are categories, mean of three seeds. cluster.py
itself never looks at categories when it chooses.
"""

import argparse
import math
import time

import numpy as np
import torch
import torch.nn.functional as F

from cluster import find_elbow, hidden_features, kmeans, normalise, tfidf_features
from data import WORLD
from data.corpus import encode_prompts, read_records
from model import load_llama
from support.cluster_scores import contingency, nmi

CLUSTERS = (2, 3, 5, 8, 12)
NORMALISATIONS = {
    "plain": lambda x: x,
    "unit length": lambda x: F.normalize(x, dim=1),
    "centred, unit length": normalise,
    "standardised": lambda x: (x - x.mean(0)) / x.std(0).clamp(min=1e-6),
}


# ---------------------------------------------------------------- data


def draw_around(centres, m, rng):
    """m records around centres (k, F), every coordinate off by N(0, 1)."""
    return centres[rng.integers(len(centres), size=m)] + rng.normal(size=(m, centres.shape[1]))


def blobs(rng):
    """(records, the number of clusters that they were made of)."""
    k = int(rng.integers(3, 11))
    return draw_around(rng.uniform(-10, 10, size=(k, rng.integers(2, 20))), 1500, rng), k


def overlapping(rng):
    k, spread = int(rng.integers(3, 9)), rng.choice([0.7, 1.5, 3.0])
    return draw_around(spread * rng.normal(size=(k, rng.integers(2, 30))), 2000, rng), k


def sparse(rng):
    """30 of 200 words per record, half of them its topic's, half common; rows of length one."""
    k = int(rng.integers(3, 9))
    topics = 0.5 * rng.dirichlet(np.full(200, 0.1), size=k) + 0.5 / 200
    counts = rng.multinomial(30, topics[rng.integers(k, size=1500)]).astype(float)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True), k


# ---------------------------------------------------------------- measurements


def compare_kmeans(sets):
    from sklearn.cluster import KMeans

    print(f"{'data':14}{'k':12}{'runs':>5}{'ours/theirs: mean':>19}{'worst':>9}{'best':>9}"
          f"{'ours':>9}{'theirs':>9}")
    for make in (blobs, overlapping, sparse):
        rows = {"its own": [], "2 to 12": []}  # (ratio, our seconds, their seconds)
        for seed in range(sets):
            x, own = make(np.random.default_rng(seed))
            x = x.astype(np.float32)
            for k in [own, *CLUSTERS]:
                start = time.perf_counter()
                inertia = kmeans(x, k, seed=seed).inertia
                between = time.perf_counter()
                ratio = inertia / KMeans(k, n_init=10, random_state=seed).fit(x).inertia_
                rows["its own" if k == own else "2 to 12"].append(
                    (ratio, between - start, time.perf_counter() - between))
        for name, row in rows.items():
            ratio, ours, theirs = np.array(row).T
            print(f"{make.__name__:14}{name:12}{len(row):5}{ratio.mean():19.5f}{ratio.max():9.5f}"
                  f"{ratio.min():9.5f}{ours.sum():7.1f} s{theirs.sum():7.1f} s")


def compare_elbows(sets):
    """How far the elbow of the plain and of the logarithmic curve is from 2 to 9 known blobs."""
    errors = {"plain": [], "logarithmic": []}
    for seed in range(sets):
        rng = np.random.default_rng(seed)
        known, width = int(rng.integers(2, 10)), int(rng.choice([5, 20, 60]))
        centres = rng.choice([0.7, 1.0, 1.5, 3.0]) * rng.normal(size=(known, width))
        x = centres[rng.choice(known, p=rng.dirichlet(np.full(known, 5)), size=600)]
        x = x + rng.normal(size=x.shape)
        curve = {k: kmeans(x, k, n_init=5).inertia for k in range(1, 11)}
        plain = {k: math.exp(inertia / curve[1]) for k, inertia in curve.items()}
        errors["plain"].append(find_elbow(plain)[0] - known)
        errors["logarithmic"].append(find_elbow(curve)[0] - known)
    for axis, error in errors.items():
        error = np.array(error)
        print(f"{axis:12} mean {error.mean():+.2f}, mean distance {abs(error).mean():.2f}, "
              f"exact {(error == 0).mean():.0%} of {sets}")


def time_large(records):
    generator = torch.Generator().manual_seed(0)
    centres = 0.3 * torch.randn(12, 4096, generator=generator)
    x = torch.randn(records, 4096, generator=generator)
    x += centres[torch.randint(12, (records,), generator=generator)]
    start = time.perf_counter()
    for k in range(1, 11):
        inertia = kmeans(x, k).inertia
        print(f"k {k:2}  inertia {inertia:.5g}  {time.perf_counter() - start:6.1f} s so far")


def compare_layers(weights, data, n_records, max_seq_len):
    model, tokenizer = load_llama(weights, dtype=torch.float32, max_seq_len=max_seq_len)
    records = read_records(data)
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0))
    records = [records[i] for i in order[:n_records].tolist()]
    sequences, _ = encode_prompts(records, tokenizer, max_seq_len)
    categories = [record["category"] for record in records]
    k = len(set(categories))
    print(f"{'features':10}" + "".join(f"{name:>22}" for name in NORMALISATIONS))
    for layer in ["tfidf", *range(len(model.layers) + 1)]:
        if layer == "tfidf":
            x = tfidf_features(sequences, tokenizer.vocab_size)
        else:
            x = hidden_features(model, sequences, layer=layer)
        row = f"{layer!s:10}"
        for change in NORMALISATIONS.values():
            found = [kmeans(change(x), k, seed=seed).labels for seed in range(3)]
            agreement = np.mean([nmi(contingency(labels, categories)[2]) for labels in found])
            row += f"{agreement:22.3f}"
        print(row)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", type=int, default=20, help="data sets of each kind (20)")
    parser.add_argument("--large", type=int, nargs="?", const=15000, metavar="RECORDS",
                        help="time so many records of width 4096 instead (15000)")
    parser.add_argument("--elbow", action="store_true", help="compare the elbow's axes instead")
    parser.add_argument("--layers", action="store_true",
                        help="compare layers and normalisations instead")
    parser.add_argument("--weights", default=str(WORLD / "base"),
                        help="with --layers: checkpoint folder (the embedded world's)")
    parser.add_argument("--data", default=str(WORLD / "train.jsonl"),
                        help="with --layers: records with categories (the embedded world's)")
    parser.add_argument("--records", type=int, default=1500,
                        help="with --layers: number of records, drawn from the data (1500)")
    parser.add_argument("--max-seq-len", type=int, default=512,
                        help="with --layers: tokens per prompt (512)")
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    print(f"{threads} thread{'s' if threads > 1 else ''}")
    if args.large:
        time_large(args.large)
    elif args.elbow:
        compare_elbows(args.sets)
    elif args.layers:
        compare_layers(args.weights, args.data, args.records, args.max_seq_len)
    else:
        compare_kmeans(args.sets)


if __name__ == "__main__":
    main()
