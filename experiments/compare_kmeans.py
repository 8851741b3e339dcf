"""kmeans of cluster.py beside scikit-learn's KMeans(n_init=10), in one process on the same data.

Three kinds of data, `--sets` of each, clustered into the number they were made of and into five
other numbers: how the inertias compare and how long both took. Needs scikit-learn, which nothing
else here does.

    python -m experiments.compare_kmeans             # quality and time, about a minute
    python -m experiments.compare_kmeans --elbow     # axes of the elbow, on a known number of blobs
    python -m experiments.compare_kmeans --large     # 15,000 records of width 4096, k from 1 to 10
"""

import argparse
import math
import time

import numpy as np
import torch

from cluster import find_elbow, kmeans

CLUSTERS = (2, 3, 5, 8, 12)


def draw_around(centres, m, rng):
    """m records around centres (k, F), every coordinate off by N(0, 1)."""
    return centres[rng.integers(len(centres), size=m)] + rng.normal(size=(m, centres.shape[1]))


def blobs(rng):
    """(records, the number of clusters they were made of)."""
    k = int(rng.integers(3, 11))
    return draw_around(rng.uniform(-10, 10, size=(k, rng.integers(2, 20))), 1500, rng), k


def overlapping(rng):
    k, spread = int(rng.integers(3, 9)), rng.choice([0.7, 1.5, 3.0])
    return draw_around(spread * rng.normal(size=(k, rng.integers(2, 30))), 2000, rng), k


def sparse(rng):
    """30 words a record from 200, half of them its topic's, half anybody's; rows of length one."""
    k = int(rng.integers(3, 9))
    topics = 0.5 * rng.dirichlet(np.full(200, 0.1), size=k) + 0.5 / 200
    counts = rng.multinomial(30, topics[rng.integers(k, size=1500)]).astype(float)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True), k


def compare(sets):
    from sklearn.cluster import KMeans

    print(f"{'data':14}{'k':12}{'runs':>5}{'ours/theirs: mean':>19}{'worst':>9}{'best':>9}"
          f"{'ours':>9}{'theirs':>9}")
    for make in (blobs, overlapping, sparse):
        rows = {"its own": [], "2 to 12": []}  # (ratio, our seconds, their seconds)
        for seed in range(sets):
            x, own = make(np.random.default_rng(seed))
            x = x.astype(np.float32)
            for k in [own, *CLUSTERS]:
                clock = time.perf_counter()
                inertia = kmeans(x, k, seed=seed)[2]
                between = time.perf_counter()
                ratio = inertia / KMeans(k, n_init=10, random_state=seed).fit(x).inertia_
                rows["its own" if k == own else "2 to 12"].append(
                    (ratio, between - clock, time.perf_counter() - between))
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
        curve = {k: kmeans(x, k, n_init=5)[2] for k in range(1, 11)}
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
    clock = time.perf_counter()
    for k in range(1, 11):
        inertia = kmeans(x, k)[2]
        print(f"k {k:2}  inertia {inertia:.5g}  {time.perf_counter() - clock:6.1f} s so far")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", type=int, default=20, help="data sets of each kind (20)")
    parser.add_argument("--elbow", action="store_true", help="compare the elbow's axes instead")
    parser.add_argument("--large", type=int, nargs="?", const=15000, metavar="RECORDS",
                        help="time so many records of width 4096 instead (15000)")
    args = parser.parse_args(argv)
    print(f"{torch.get_num_threads()} threads")
    if args.large:
        time_large(args.large)
    elif args.elbow:
        compare_elbows(args.sets)
    else:
        compare(args.sets)


if __name__ == "__main__":
    main()
