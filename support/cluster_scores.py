"""How good is a clustering? Agreement with other labels, distances, the words that tell it apart.

    table = contingency(labels, categories)[2]
    print(nmi(table), ari(table), silhouette(distances, labels))

HydraLoRA section 3.2 judges by the elbow alone; cluster.py prints these beside it.
Shapes: M records, k clusters.
"""

import math
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F


def contingency(a, b):
    """(names of a, names of b, table): how many records have each pair of labels."""
    (rows, i), (columns, j) = (np.unique(labels, return_inverse=True) for labels in (a, b))
    table = np.zeros((len(rows), len(columns)), dtype=np.int64)
    np.add.at(table, (i, j), 1)
    return rows, columns, table


def nmi(table):
    """Normalised mutual information: I(a; b) over the mean of the entropies H(a) and H(b)."""
    p = table / table.sum()
    independent = p.sum(1, keepdims=True) * p.sum(0)
    shared = (p[p > 0] * np.log(p[p > 0] / independent[p > 0])).sum()
    entropies = [-(q[q > 0] * np.log(q[q > 0])).sum() for q in (p.sum(1), p.sum(0))]
    return float(shared / np.mean(entropies)) if sum(entropies) > 0 else 1.0


def ari(table):
    """Adjusted Rand index: pairs of records together in both labellings, less what chance gives,
    over the most there could be, less what chance gives. 1: the same labelling, 0: chance."""
    def pairs(n):
        return float((n * (n - 1) / 2).sum())

    both, a, b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = a * b / max(pairs(table.sum()), 1)
    return (both - chance) / ((a + b) / 2 - chance) if (a + b) / 2 != chance else 1.0


def silhouette(distances, labels):
    """Mean of (b - a) / max(a, b): a is a record's mean distance to the rest of its cluster, b that
    to the nearest other cluster. 0 for a cluster of one; None when there is only one cluster."""
    names, label = labels.unique(return_inverse=True)
    if len(names) < 2:
        return None
    members = F.one_hot(label).to(distances)  # (M, k)
    sums, sizes = distances @ members, members.sum(0)
    label = label[:, None]
    a = sums.gather(1, label) / (sizes[label] - 1).clamp(min=1)
    b = (sums / sizes).scatter(1, label, torch.inf).amin(1, keepdim=True)
    score = (b - a) / torch.maximum(a, b).clamp(min=1e-30)
    return score.masked_fill(sizes[label] == 1, 0).mean().item()


def keywords(words, inside, count=8):
    """The words with the largest p log(p / q), p their share of the records inside a cluster, q of
    those outside it (one record more there, so that q is not zero)."""
    here = Counter(word for own, i in zip(words, inside) if i for word in own)
    total = Counter(word for own in words for word in own)
    n, m = sum(inside), len(words) - sum(inside) + 1

    def score(word):
        p = here[word] / n
        return p * math.log(p * m / (total[word] - here[word] + 1))

    return [word for word in sorted(here, key=lambda w: (-score(w), w))[:count] if score(word) > 0]
