"""cluster.py: k-means against its slow twins, the features, the choice, the script as a user."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch

import cluster
from cluster import (
    add_centroids,
    ari,
    choose_heads,
    contingency,
    find_elbow,
    hidden_features,
    keywords,
    kmeans,
    lloyd,
    nmi,
    silhouette,
    tfidf_features,
)
from data.corpus import encode_prompts, read_records
from support.memory import Watch
from tests.conftest import WORLD, asset, tiny_model

LAYERS = 2  # of tiny_model


def blobs(centres=((0, 0), (9, 0), (0, 9), (9, 9)), each=30, spread=0.5, seed=0):
    """(x, which blob each row came from), the rows shuffled."""
    rng = np.random.default_rng(seed)
    which = rng.permutation(np.repeat(np.arange(len(centres)), each))
    return np.array(centres)[which] + spread * rng.normal(size=(len(which), 2)), which


def overlapping(m=400, f=6, k=5, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(k, f))
    return centres[rng.integers(k, size=m)] + rng.normal(size=(m, f))


def sparse(m=600, f=150, k=6, seed=0):
    """Word counts of short texts on k topics, each row of length one."""
    rng = np.random.default_rng(seed)
    topics = rng.dirichlet(np.full(f, 0.1), size=k)
    x = np.stack([rng.multinomial(30, 0.5 * topics[rng.integers(k)] + 0.5 / f) for _ in range(m)])
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def slow_inertia(x, centroids, labels):
    return sum(sum((float(a) - float(b)) ** 2 for a, b in zip(row, centroids[label]))
               for row, label in zip(x, labels))


def record(instruction, context="", category=""):
    return {"instruction": instruction, "context": context, "response": "yes", "category": category}


FAMILIES = {"sum": "What is {} plus 4?", "norvan": "How do you say the {} dog in Norvan?",
            "card": "Fill in the card: name={}; job=tailor; town=Quito."}


def family_records(each=12):
    return [record(text.format(i), category=name)
            for i in range(each) for name, text in FAMILIES.items()]


def write_data(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


# ---------------------------------------------------------------- k-means


def test_separated_blobs_are_recovered_and_numbered_by_size():
    x, which = blobs()
    x, which = x[which != 2], which[which != 2]
    x = np.concatenate([x, x[which == 3][:7]])  # one blob is larger
    centroids, labels, inertia = kmeans(x, 3)
    assert ari(contingency(labels[:90], which)[2]) == 1
    assert np.bincount(labels).tolist() == [37, 30, 30]
    for j in range(3):
        np.testing.assert_allclose(centroids[j], x[labels == j].mean(0), rtol=1e-12)
    assert inertia == pytest.approx(slow_inertia(x, centroids, labels))


def test_lloyd_is_the_textbook_loop():
    x = overlapping(m=60, f=3, k=4)
    centroids = x[:4].copy()
    for _ in range(3):
        labels = [min(range(4), key=lambda j: sum((row - centroids[j]) ** 2)) for row in x]
        inertia = slow_inertia(x, centroids, labels)
        centroids = np.stack([np.mean([row for row, own in zip(x, labels) if own == j], axis=0)
                              for j in range(4)])
    found = lloyd(torch.tensor(x), torch.tensor(x[:4]), max_iter=3)
    assert found.labels.tolist() == labels
    assert found.inertia == pytest.approx(inertia)
    np.testing.assert_allclose(found.centroids, centroids, rtol=1e-9)


@pytest.mark.parametrize("make", [overlapping, sparse])
def test_inertia_never_rises(make):
    x = torch.tensor(make())
    start = torch.cat([x[:1], x[:1] + 100 + torch.arange(7)[:, None]])  # seven begin empty
    inertias = [lloyd(x, start, max_iter).inertia for max_iter in range(1, 12)]
    assert inertias == sorted(inertias, reverse=True) and inertias[0] > inertias[5]


def test_an_empty_cluster_takes_the_farthest_record():
    x = torch.tensor([[0.0], [1.0], [2.0], [50.0]])
    centroids, labels, _ = lloyd(x, torch.tensor([[1.0], [900.0]]), max_iter=20)
    assert centroids.flatten().tolist() == [1.0, 50.0] and labels.tolist() == [0, 0, 0, 1]


def test_a_new_centroid_is_the_best_of_draws_by_squared_distance():
    x = torch.tensor(overlapping(m=50, f=2))
    found = add_centroids(x, x[:1], 5, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    slow = [x[0]]
    while len(slow) < 5:
        weights = [min((row - centroid).square().sum() for centroid in slow) for row in x]
        drawn = torch.multinomial(torch.stack(weights), cluster.DRAWS, replacement=True,
                                  generator=generator)
        slow.append(min(x[drawn], key=lambda new: sum(
            min(weight, (row - new).square().sum()) for row, weight in zip(x, weights))))
    torch.testing.assert_close(found, torch.stack(slow))


def test_half_of_the_starts_draw_one_centroid_of_the_best_again(monkeypatch):
    first = []

    def watched(x, centroids, *rest):
        first.append(centroids)
        return add_centroids(x, centroids, *rest)

    monkeypatch.setattr(cluster, "add_centroids", watched)
    kmeans(blobs()[0], 4, n_init=3)
    assert [len(centroids) for centroids in first] == [1, 1, 1, 3, 3, 3]
    assert len({str(centroids) for centroids in first[3:]}) == 3  # each time another one


def test_the_same_seed_gives_the_same_answer():
    x = overlapping(m=500, f=2, k=9, seed=3)
    runs = [kmeans(x, 12, seed=seed, n_init=1) for seed in (1, 1, 2)]
    assert all(np.array_equal(a, b) for a, b in zip(runs[0], runs[1]))
    assert not np.array_equal(runs[0].labels, runs[2].labels)


def test_more_starts_and_more_iterations_are_not_worse():
    x = overlapping(m=500, f=2, k=9, seed=1)
    few, many = kmeans(x, 12, n_init=1).inertia, kmeans(x, 12, n_init=20).inertia
    short = kmeans(x, 12, n_init=1, max_iter=1).inertia
    assert many < few < short


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.float32, torch.float64,
                                  torch.float16])
def test_the_input_keeps_its_kind_and_its_values(kind):
    x, _ = blobs()
    x = torch.tensor(x, dtype=kind) if isinstance(kind, torch.dtype) else x.astype(kind)
    before = x.clone() if torch.is_tensor(x) else x.copy()
    centroids, labels, inertia = kmeans(x, 3)
    assert (x == before).all()
    assert type(centroids) is type(labels) is type(x) and isinstance(inertia, float)
    assert centroids.shape == (3, 2) and labels.shape == (120,)
    assert inertia == pytest.approx(slow_inertia(x, centroids, labels), rel=1e-5)


def test_data_far_from_the_origin_loses_nothing():
    x, which = blobs()
    centroids, labels, inertia = kmeans(x + 1e6, 4)
    assert ari(contingency(labels, which)[2]) == 1
    assert inertia == pytest.approx(kmeans(x, 4)[2], rel=1e-6)
    assert inertia == pytest.approx(slow_inertia(x + 1e6, centroids, labels))


def test_a_view_or_a_list_is_as_good_as_an_array():
    x, _ = blobs()
    labels = kmeans(np.ascontiguousarray(x[::-1]), 4)[1]
    assert np.array_equal(kmeans(x[::-1], 4)[1], labels)
    assert np.array_equal(kmeans(x[::-1].tolist(), 4)[1], labels)


@pytest.mark.parametrize("rows, k", [
    ([[0.1, 2.0]] * 7, 5),  # one distinct point
    ([[0.0], [0.0], [1.0], [1.0], [5.0]], 5),  # three of them
    ([[3.0, 4.0]], 1), ([[1.0, 0.0], [1.0, 7.0], [1.0, 8.0]], 2)])  # one record; a constant feature
def test_duplicates_give_a_finite_answer(rows, k):
    x = np.array(rows)
    centroids, labels, inertia = kmeans(x, k)
    assert np.isfinite(centroids).all() and centroids.shape == (k, x.shape[1])
    assert ((labels >= 0) & (labels < k)).all()
    exact = k >= len(np.unique(x, axis=0))
    assert inertia == pytest.approx(0.0 if exact else 0.5, abs=1e-20)


@pytest.mark.parametrize("x, k", [
    (np.ones((3, 2)), 0), (np.ones((3, 2)), 4), (np.ones(3), 1), (np.ones((0, 2)), 1),
    (np.array([[1.0], [np.nan]]), 1), (np.array([[1.0], [np.inf]]), 2),
    (np.array([[1e30], [0.0]], dtype=np.float32), 1)])
def test_impossible_input_is_refused(x, k):
    with pytest.raises(ValueError):
        kmeans(x, k)


@pytest.mark.parametrize("make, k", [(lambda: blobs()[0], 4), (lambda: blobs(each=100)[0], 3),
                                     (lambda: overlapping(m=2000, f=12), 5),
                                     (lambda: overlapping(m=2000, f=2), 9), (sparse, 6)])
def test_kmeans_is_as_good_as_scikit_learn(make, k):
    sklearn = pytest.importorskip("sklearn.cluster", reason="scikit-learn is not installed")
    x = make()
    theirs = sklearn.KMeans(k, n_init=10, random_state=0).fit(x).inertia_
    assert kmeans(x, k)[2] <= 1.005 * theirs


# ---------------------------------------------------------------- features


@pytest.fixture
def sequences(tokenizer):
    texts = ["one", "a rather longer prompt about nothing", "two words", "short", "and again one"]
    return encode_prompts([record(text) for text in texts], tokenizer, 64)[0]


@torch.no_grad()
def slow_features(model, sequence):
    """One prompt alone: the mean of the last states of its tokens after BOS."""
    h = model.hidden_states(torch.tensor([sequence.ids]))[0]
    return torch.stack([h[i] for i in range(1, len(sequence.ids))]).mean(0)


def test_pooling_ignores_padding_and_batches(model, sequences):
    alone = torch.stack([slow_features(model, sequence) for sequence in sequences])
    for batch_size in (1, 2, 5):
        found = hidden_features(model, sequences, layer=LAYERS, batch_size=batch_size)
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    turned = hidden_features(model, sequences[::-1], layer=LAYERS, batch_size=3)
    torch.testing.assert_close(turned, alone, rtol=1e-5, atol=1e-5)  # by record, not by place


@pytest.mark.parametrize("layer", [0, 1])
def test_the_states_of_a_layer_are_those_of_a_shorter_model(sequences, layer):
    model, shorter = tiny_model(n_layers=3), tiny_model(n_layers=layer)
    shorter.load_state_dict({name: value for name, value in model.state_dict().items()
                             if name in shorter.state_dict()})
    found = hidden_features(model, sequences, layer=layer, batch_size=2)
    torch.testing.assert_close(found[0], slow_features(shorter, sequences[0]))


def test_tfidf_is_the_loop_over_pieces(sequences, tokenizer, monkeypatch):
    found = tfidf_features(sequences, tokenizer.vocab_size)
    texts = [sequence.ids[1:] for sequence in sequences]
    having = [sum(piece in text for text in texts) for piece in range(tokenizer.vocab_size)]
    pieces = sorted(range(tokenizer.vocab_size), key=lambda piece: -having[piece])
    slow = [[text.count(piece) * (math.log(6 / (1 + having[piece])) + 1) for piece in pieces]
            for text in texts]
    np.testing.assert_allclose(found, [[v / math.hypot(*row) for v in row] for row in slow],
                               rtol=1e-5)
    monkeypatch.setattr(cluster, "MAX_PIECES", 3)
    kept = tfidf_features(sequences, tokenizer.vocab_size)
    torch.testing.assert_close(kept, torch.nn.functional.normalize(found[:, :3], dim=1))


def test_long_prompts_keep_their_start_and_are_counted(tokenizer):
    records = [record("one two three four five six"), record("one")]
    whole, none = encode_prompts(records, tokenizer, 64)
    cut, shortened = encode_prompts(records, tokenizer, 4)
    assert none == 0 and shortened == 1
    assert [s.ids for s in cut] == [s.ids[:4] for s in whole]
    assert whole[0].ids[0] == tokenizer.bos_id and tokenizer.eos_id not in whole[0].ids


# ---------------------------------------------------------------- measures


def test_nmi_of_a_hand_computed_table():
    table = contingency(["a", "a", "a", "b", "b", "b"], ["x", "x", "y", "y", "y", "y"])[2]
    assert table.tolist() == [[2, 1], [0, 3]]
    # entropies: rows 1/2, 1/2: ln 2; columns 1/3, 2/3: ln 3 - 2/3 ln 2
    # shared: 1/3 ln((1/3)/(1/6)) + 1/6 ln((1/6)/(1/3)) + 1/2 ln((1/2)/(1/3))
    shared = math.log(2) / 3 - math.log(2) / 6 + math.log(1.5) / 2
    assert nmi(table) == pytest.approx(
        2 * shared / (math.log(2) + math.log(3) - 2 / 3 * math.log(2)))


def test_nmi_and_ari_at_their_ends():
    same, independent = np.array([[3, 0], [0, 5]]), np.array([[4, 4], [4, 4]])
    assert nmi(same) == pytest.approx(1) and ari(same) == pytest.approx(1)
    assert nmi(independent) == pytest.approx(0, abs=1e-12) and ari(independent) < 0.01
    assert nmi(np.array([[7]])) == ari(np.array([[7]])) == ari(np.array([[1]])) == 1
    assert nmi(np.array([[3, 4]])) == ari(np.array([[3, 4]])) == 0


def test_ari_counts_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.integers(3, size=30), rng.integers(4, size=30)
    pairs = list(combinations(range(30), 2))
    both = sum(a[i] == a[j] and b[i] == b[j] for i, j in pairs)
    in_a, in_b = (sum(labels[i] == labels[j] for i, j in pairs) for labels in (a, b))
    chance = in_a * in_b / len(pairs)
    expected = (both - chance) / ((in_a + in_b) / 2 - chance)
    assert ari(contingency(a, b)[2]) == pytest.approx(expected)


def test_silhouette_is_the_loop_over_records():
    x = torch.tensor(overlapping(m=40, f=3))
    labels = torch.tensor(np.random.default_rng(0).integers(3, size=40))
    labels[7] = 5  # a cluster of one counts as 0; no record has label 3 or 4
    scores = []
    for i in range(40):
        mean = {j: torch.stack([(x[i] - x[o]).norm() for o in range(40)
                                if o != i and labels[o] == j]).mean()
                for j in labels.unique().tolist() if j != 5 or i != 7}
        own = mean.pop(int(labels[i]), None)
        scores.append(0 if own is None else
                      (min(mean.values()) - own) / max(own, min(mean.values())))
    assert silhouette(torch.cdist(x, x), labels) == pytest.approx(float(sum(scores) / 40))
    assert silhouette(torch.cdist(x, x), labels * 0) is None
    assert silhouette(torch.zeros(4, 4), torch.tensor([0, 0, 1, 1])) == 0


@pytest.mark.parametrize("inertias, k", [
    ([100, 50, 25, 24, 23, 22], 3),  # halves twice, then hardly falls
    ([100, 90, 80, 10, 9, 8, 7], 4),
    ([100, 20, 19, 18, 17, 16], 2),
    ([64, 32, 16, 8, 4], 1),  # straight on a logarithmic axis
    ([100, 95, 90, 5], 4),  # steeper and steeper: the elbow is not before the end
    ([100, 40, 10, 0, 0, 0], 4),  # as many clusters as distinct records
    ([100, 1e-12, 1e-30], 2),  # the same, and rounding
    ([0, 0, 0], 1), ([5], 1), ([5, 3], 1)])
def test_the_elbow_of_hand_made_curves(inertias, k):
    found, strengths = find_elbow(dict(enumerate(inertias, start=1)))
    assert found == k
    assert list(strengths) == list(range(1, len(inertias) + 1))
    assert all(math.isfinite(strength) for strength in strengths.values())


def test_elbow_strengths_of_a_hand_computed_curve():
    # heights log2: 4, 1, 0: at k = 2 the line stands at 2, the curve at 1, the axis is 4 high
    assert find_elbow({1: 16.0, 2: 2.0, 3: 1.0})[1] == pytest.approx({1: 0, 2: 0.25, 3: 0})


def test_keywords_are_frequent_inside_and_rare_outside():
    words = [{"the", "cat"}, {"the", "cat"}, {"the", "dog"}, {"the", "fox"}]
    # cat: p 1, q (0 + 1) / (2 + 1); the: p 1, q (2 + 1) / 3, so log(p / q) is 0
    assert keywords(words, [True, True, False, False]) == ["cat"]
    assert keywords(words, [True] * 4) == []


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize("features", ["hidden", "tfidf"])
def test_three_families_ask_for_three_heads(model, tokenizer, features):
    result = choose_heads(family_records(), model, tokenizer, k_max=6, features=features)
    assert result["k"] == 3 and result["categories"]["nmi"] == pytest.approx(1)
    assert result["labels"] == [result["labels"][i % 3] for i in range(36)]
    assert sorted(map(sorted, result["categories"]["table"])) == [[0, 0, 12]] * 3
    assert [c["size"] for c in result["clusters"]] == [12] * 3 and result["weak"] == []
    norvan = result["clusters"][result["labels"][1]]
    assert {"norvan", "dog"} <= set(norvan["words"])
    assert all(central["record"] % 3 == 1 for central in norvan["central"])


def test_the_central_records_are_nearest_to_the_centroid():
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
    clusters = cluster.Clusters(torch.tensor([[2.1]]), torch.zeros(5, dtype=torch.long), 0.0)
    described, = cluster.describe([record(f"text {i}") for i in range(5)], x, clusters)
    assert [central["record"] for central in described["central"]] == [2, 3, 1]


def test_categories_have_no_say_in_the_choice(model, tokenizer):
    records = family_records()
    plain = choose_heads([{**r, "category": ""} for r in records], model, tokenizer, k_max=5)
    named = choose_heads(records, model, tokenizer, k_max=5)
    assert "categories" not in plain
    assert {key: named[key] for key in plain} == plain


@pytest.mark.parametrize("features", ["hidden", "tfidf"])
def test_weak_evidence_is_called_weak(model, tokenizer, features, capsys):
    same = [record("the same words every time")] * 23
    result = choose_heads(same, model, tokenizer, features=features)
    assert set(result["curve"].values()) == {0}
    assert result["k"] == 1 and result["weak"] == ["bend", "silhouette"]
    cluster.print_report(result)
    assert "weak evidence (elbow strength below 0.1, silhouette below 0.1)" in (
        capsys.readouterr().out)


@pytest.mark.slow
def test_the_embedded_worlds_families_are_found_again(tokenizer):
    records = read_records(WORLD / "train.jsonl")[:1200]
    result = choose_heads(records, None, tokenizer, features="tfidf", max_seq_len=512)
    assert result["categories"]["nmi"] >= 0.8


# ---------------------------------------------------------------- the script


def run_script(tmp_path, *flags, records=None):
    """(exit status, content of the JSON file) of a run on a few records of the world."""
    data = write_data(tmp_path / "data.jsonl", records or family_records())
    out = tmp_path / "c.json"
    try:
        status = cluster.main(["--data", str(data), "--out", str(out), *flags])
    except SystemExit as refused:
        status = refused.code
    return status, json.loads(out.read_text()) if out.exists() else None


def test_the_script_prints_what_it_writes(tmp_path, capsys):
    status, content = run_script(tmp_path, "--k-max", "5", "--device", "cpu", "--batch-size", "4",
                                 "--layer", "2", "--seed", "3", "--max-seq-len", "12")
    printed = capsys.readouterr().out
    assert status == 0 and f"heads: {content['k']}," in printed
    assert list(content["curve"]) == list("12345") and len(content["labels"]) == 36
    assert set(content["labels"]) == set(range(content["k"]))
    settings = {"layer": 2, "seed": 3, "k_max": 5, "max_seq_len": 12, "batch_size": 4,
                "features": "hidden", "device": "cpu"}
    assert settings.items() <= content["settings"].items()
    assert content["shortened"] > 0 and f"{content['shortened']} cut" in printed
    for name in ("curve", "bend", "silhouette", "stability"):
        for value in content[name].values():
            shown = "-" if value is None else f"{value:{'.5g' if name == 'curve' else '.3f'}}"
            assert f" {shown} " in printed
    assert f"NMI {content['categories']['nmi']:.3f}" in printed


def test_seed_and_layer_have_an_effect(tmp_path):
    runs = [run_script(tmp_path, "--k-max", "4", *flags)[1] for flags in
            ([], ["--seed", "5"], ["--layer", "0"], ["--features", "tfidf"])]
    assert len({json.dumps([r["curve"], r["stability"]]) for r in runs}) == 4
    assert [r["settings"]["layer"] for r in runs] == [4, 4, 0, None]  # two thirds of 6 blocks


def test_cached_features_are_used_again(tmp_path, monkeypatch, capsys):
    cache = str(tmp_path / "features.pt")
    first = run_script(tmp_path, "--k-max", "3", "--cache", cache)
    monkeypatch.setattr(cluster, "hidden_features", lambda *a, **k: pytest.fail("computed again"))
    assert run_script(tmp_path, "--k-max", "3", "--cache", cache) == first
    for flags in (["--layer", "1"], ["--features", "tfidf"], ["--max-seq-len", "5"]):
        assert run_script(tmp_path, "--cache", cache, *flags)[0] == 2
        assert "features of other data, weights or settings" in capsys.readouterr().err
    (tmp_path / "features.pt").write_bytes(b"broken")
    assert run_script(tmp_path, "--cache", cache)[0] == 2
    assert "features.pt is not a feature file" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--layer", "9"], "layer 9 is not one of 0 (embeddings) to 6"),
    (["--batch-size", "0"], "--batch-size must be at least 1"),
    (["--max-seq-len", "1"], "--max-seq-len must be at least 2"),
    (["--out", "absent/c.json"], "absent/c.json is a folder, or in a folder that does not"),
    (["--data", "empty.jsonl"], "holds no records"),
    (["--data", "blank.jsonl"], "has an empty instruction")])
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "empty.jsonl", [])
    write_data(tmp_path / "blank.jsonl", [record("  ")])
    assert run_script(tmp_path, *flags) == (2, None)
    lines = [line for line in capsys.readouterr().err.splitlines() if "cluster.py:" in line]
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("features", ["hidden", "tfidf"])
def test_one_record_and_duplicates_give_a_valid_result(tmp_path, features):
    status, content = run_script(tmp_path, "--features", features, records=[record("alone")])
    assert status == 0 and content["k"] == 1 and content["curve"] == {"1": 0.0}
    records = [record("this one"), record("another, quite different")] * 3
    status, content = run_script(tmp_path, "--features", features, records=records)
    assert status == 0 and content["labels"] in ([0, 1] * 3, [1, 0] * 3)
    assert list(content["curve"]) == list("123456") and "NaN" not in json.dumps(content)


def test_dolly_runs_with_a_real_model(tmp_path, capsys):
    lines = asset("dolly/databricks-dolly-15k.jsonl").read_text(encoding="utf-8").split("\n")
    (tmp_path / "dolly.jsonl").write_text("\n".join(lines[:60]), encoding="utf-8")
    status, content = run_script(tmp_path, "--data", str(tmp_path / "dolly.jsonl"), "--k-max", "4",
                                 "--weights", str(asset("stories260k")), "--max-seq-len", "128")
    assert status == 0 and 1 <= content["k"] <= 4 and len(content["labels"]) == 60
    assert np.sum(content["categories"]["table"]) == 60


def alive_peak(work):
    """The most bytes of tensors made by work() that were alive at one time."""
    with Watch() as watch:
        work()
    return watch.peak


def test_tfidf_and_kmeans_hold_little_more_than_their_matrix(tokenizer):
    sequences, _ = encode_prompts(read_records(WORLD / "val.jsonl")[:500] * 4, tokenizer, 64)
    matrix = len(sequences) * tokenizer.vocab_size * 4
    assert tfidf_features(sequences, tokenizer.vocab_size).nbytes == matrix
    assert alive_peak(lambda: tfidf_features(sequences, tokenizer.vocab_size)) < 1.1 * matrix
    wide = torch.rand(200, 20000)
    assert alive_peak(lambda: kmeans(wide, 2, n_init=2)) < 2.1 * wide.nbytes
