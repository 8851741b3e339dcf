"""experiments/: every script in a short real run, its figures against a second way to them."""

import re

import pytest

from experiments import compare_kmeans, compare_layers
from tests.conftest import WORLD, asset


def numbers(line):
    return [float(word) for word in re.findall(r"-?\d+\.\d+", line)]


@pytest.mark.slow
def test_compare_kmeans_sets_ours_beside_scikit_learn(capsys):
    pytest.importorskip("sklearn.cluster", reason="scikit-learn is not installed")
    compare_kmeans.main(["--sets", "1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if " s" in line]
    assert [line.split()[0] for line in lines] == sum(
        ([name] * 2 for name in ("blobs", "overlapping", "sparse")), [])
    for line in lines:
        mean, worst, best, ours, theirs = numbers(line)
        assert best <= mean <= worst < 1.05 and min(ours, theirs) >= 0


def test_compare_kmeans_counts_known_blobs_on_both_axes(capsys):
    compare_kmeans.main(["--elbow", "--sets", "2"])
    plain, logarithmic = capsys.readouterr().out.splitlines()[1:]
    assert plain.startswith("plain") and logarithmic.startswith("logarithmic")
    assert all("of 2" in line and numbers(line)[1] >= abs(numbers(line)[0])
               for line in (plain, logarithmic))


def test_compare_kmeans_times_k_from_1_to_10(capsys):
    compare_kmeans.main(["--large", "60"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [int(line[1]) for line in lines] == list(range(1, 11))
    inertias = [float(line[3]) for line in lines]
    assert inertias[0] > inertias[-1]


@pytest.mark.slow
def test_compare_layers_has_a_row_for_tfidf_and_every_layer(capsys):
    compare_layers.main(["--weights", str(WORLD / "base"), "--data", str(WORLD / "val.jsonl"),
                         "--records", "24", "--max-seq-len", "128"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["tfidf", *map(str, range(7))]
    assert all(0 <= value <= 1 for row in rows for value in numbers(row))


@pytest.mark.slow
def test_another_models_layers_are_compared_as_well(capsys):
    compare_layers.main(["--weights", str(asset("stories260k")), "--data",
                         str(WORLD / "val.jsonl"), "--records", "20"])
    assert len(capsys.readouterr().out.splitlines()) == 8
