"""experiments/compare_clusters.py in short real runs."""

import re

import pytest

from experiments import compare_clusters
from tests.conftest import WORLD


def numbers(line):
    return [float(word) for word in re.findall(r"-?\d+\.\d+", line)]


def lines_of(capsys, *flags):
    """What the script prints after the line with the number of threads."""
    compare_clusters.main([str(flag) for flag in flags])
    return capsys.readouterr().out.splitlines()[1:]


@pytest.mark.slow
def test_kmeans_is_compared_with_scikit_learn(capsys):
    pytest.importorskip("sklearn.cluster", reason="scikit-learn is not installed")
    _, *rows = lines_of(capsys, "--sets", 1)
    assert [row.split()[0] for row in rows] == sum(
        ([name] * 2 for name in ("blobs", "overlapping", "sparse")), [])
    for row in rows:
        mean, worst, best, ours, theirs = numbers(row)
        assert best <= mean <= worst < 1.05 and min(ours, theirs) >= 0


def test_the_elbow_is_compared_on_both_axes(capsys):
    plain, logarithmic = lines_of(capsys, "--elbow", "--sets", 2)
    assert plain.startswith("plain") and logarithmic.startswith("logarithmic")
    assert all("of 2" in line and numbers(line)[1] >= abs(numbers(line)[0])
               for line in (plain, logarithmic))


def test_wide_data_are_timed_for_k_from_1_to_10(capsys):
    lines = [line.split() for line in lines_of(capsys, "--large", 40)]
    assert [int(line[1]) for line in lines] == list(range(1, 11))
    assert float(lines[0][3]) > float(lines[-1][3])


@pytest.mark.slow
def test_tfidf_and_every_layer_are_compared(capsys):
    header, *rows = lines_of(capsys, "--layers", "--data", WORLD / "val.jsonl",
                             "--records", 20, "--max-seq-len", 128)
    assert [row.split()[0] for row in rows] == ["tfidf", *map(str, range(7))]
    assert all(0 <= value <= 1 for row in rows for value in numbers(row))
