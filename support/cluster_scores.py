"""How good is a clustering? Agreement with other labels, distances, keywords.

    table = contingency(labels, categories)[2]
    print(nmi(table), ari(table), silhouette(distances, labels))

HydraLoRA section 3.2 judges by the elbow alone; cluster.py prints these as well.
Shapes: M records, k clusters.
"""

import math
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F


def contingency(a, b):
    """(names of a, names of b, table): how many records have each pair of labels."""
    rows, i = np.unique(a, return_inverse=True)
    columns, j = np.unique(b, return_inverse=True)
    table = np.zeros((len(rows), len(columns)), dtype=np.int64)
    np.add.at(table, (i, j), 1)
    return rows, columns, table


def entropy(p):
    return -(p[p > 0] * np.log(p[p > 0])).sum()


def nmi(table):
    """Normalised mutual information: I(a; b) over the mean of the entropies H(a), H(b)."""
    p = table / table.sum()
    h_a, h_b = entropy(p.sum(1)), entropy(p.sum(0))
    mutual = h_a + h_b - entropy(p)
    return float(2 * mutual / (h_a + h_b)) if h_a + h_b > 0 else 1.0


def ari(table):
    """Adjusted Rand index: the number of pairs together in both labellings, less its
    expectation by chance, over its maximum less the same. 1: equal, 0: chance."""
    def pairs(n):
        return float((n * (n - 1) / 2).sum())

    both, a, b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = a * b / max(pairs(table.sum()), 1)
    maximum = (a + b) / 2
    return (both - chance) / (maximum - chance) if maximum != chance else 1.0


def silhouette(distances, labels):
    """Mean of (b - a) / max(a, b) over the records: a is the mean distance to the rest of
    its cluster, b that to the nearest other cluster. 0 for a cluster of one; None if there
    is only one cluster. distances (M, M), labels (M,)."""
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
    """The words with the largest p log(p / q). p is the share of the records inside a
    cluster that have the word, q that of those outside (and of one more record, so that q
    is not zero). words: a set per record; inside: a bool per record."""
    here = Counter(word for own, i in zip(words, inside) if i for word in own)
    total = Counter(word for own in words for word in own)
    n_inside = sum(inside)
    n_outside = len(words) - n_inside + 1

    def score(word):
        p = here[word] / n_inside
        q = (total[word] - here[word] + 1) / n_outside
        return p * math.log(p / q)

    best = sorted(here, key=lambda word: (-score(word), word))[:count]
    return [word for word in best if score(word) > 0]
