"""How many heads does a corpus want? k-means over its prompts, before any training.

HydraLoRA (Tian et al., NeurIPS 2024), section 3.2: the number N of B matrices is the number of
clusters at the elbow of the within-cluster sum of squares. Here it yields N and nothing else.
deviation: features are mean-pooled hidden states; --features tfidf is the paper's own choice.

    python cluster.py                                            # the embedded world
    python cluster.py --weights llama-2-7b --data dolly.jsonl    # any other corpus

Shapes: M records, F features, k clusters, S starts, B batch, T tokens, D model width.
"""

import hashlib
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import WORLD
from data.corpus import encode_prompts, length_batches, pad, prompt_text, read_records
from hydralora import base_fingerprint
from model import Tokenizer, read_params
from support.cli import Parser, add_strict_flag, check_min, progress, run_script
from support.cluster_scores import ari, contingency, keywords, nmi, silhouette
from support.device import DTYPES, pick_device, pick_dtype
from support.diagnose import explained, print_default_length
from support.distributed import add_shard_flag, load, process_group, run_on_rank0
from support.files import check_tensors, read_torch, write_file, write_text

MAX_PIECES = 4096  # TF-IDF columns: 15,000 records stay below 250 MB
# k-means: records drawn for each new centroid; a start stops when an iteration gains less than this
# share, and only the best of the starts goes to the end
CENTROID_DRAWS, START_TOLERANCE = 4, 3e-3
STABILITY_SEEDS, SILHOUETTE_SAMPLE = 3, 1000
WEAK_BELOW = {"bend": 0.1, "silhouette": 0.1, "stability": 0.8}  # the text then says "weak"


# ---------------------------------------------------------------- features


@torch.no_grad()
def hidden_features(model, sequences, *, layer, batch_size):
    """(M, D) fp32 on the CPU: the states of each prompt after `layer` blocks and the final norm,
    averaged over its own tokens: no padding, and no BOS, whose states are far larger than any
    other's. The final norm keeps any other large state from deciding the average."""
    if not 0 <= layer <= len(model.layers):
        raise ValueError(f"layer {layer} is not one of 0 (embeddings) to {len(model.layers)}")
    device = model.tok_embeddings.weight.device
    features = torch.zeros(len(sequences), model.args.dim)
    whole, model.layers = model.layers, model.layers[:layer]
    try:
        for batch in progress(length_batches(sequences, batch_size), desc="prompts", unit="batch"):
            tokens, own = pad([s.ids for s in batch], device)
            h = model.hidden_states(tokens).float()  # (B, T, D)
            own[:, 0] = False  # BOS
            h = h.masked_fill(~own[..., None], 0).sum(1) / own.sum(1, keepdim=True)
            features[[s.record for s in batch]] = h.cpu()
    finally:
        model.layers = whole
    return features


def tfidf_features(sequences, vocab_size):
    """(M, up to MAX_PIECES): how often each piece occurs in a prompt, times
    log((1 + M) / (1 + records with it)) + 1. Each row is then scaled to length one, since long
    prompts would form a cluster otherwise. The pieces found in the most records are kept."""
    found = torch.zeros(vocab_size)
    for sequence in sequences:
        found[sorted(set(sequence.ids[1:]))] += 1
    kept = found.argsort(descending=True, stable=True)[:MAX_PIECES]
    x = torch.empty(len(sequences), len(kept))  # all that follows happens in this one matrix
    for row, s in zip(x, sequences):
        row.copy_(torch.bincount(torch.tensor(s.ids[1:]), minlength=vocab_size)[kept])
    x *= ((1 + len(sequences)) / (1 + found[kept])).log() + 1
    return F.normalize(x, dim=1, out=x)


def normalise(x):
    """Hidden states less their mean, then each row scaled to length one: what all rows share is
    large and says nothing. Of the ways tried (experiments/compare_layers.py), the clusters of this
    one fit the categories best. A row that differs from the mean by rounding alone is zero."""
    x, largest = x - x.mean(0), x.norm(dim=1).max()
    length = x.norm(dim=1, keepdim=True)
    return x / length.masked_fill(length < 1e-5 * largest, torch.inf)


def cached(path, key, compute):
    """What compute() returns, kept in the file at path; a file with another key is refused."""
    if path is None:
        return compute()
    key = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    if run_on_rank0(lambda: Path(path).exists()):
        content = read_torch(path, "a feature file")
    else:
        content = {"key": key, "features": compute()}
        write_file(path, lambda file: torch.save(content, file))
    if not isinstance(content, dict) or content.keys() != {"key", "features"}:
        raise ValueError(f"{path} is not a feature file: delete it, or give another --cache")
    check_tensors({"features": content["features"]})
    if content["key"] != key:
        raise ValueError(f"{path} holds the features of other data, weights or settings: "
                         "give another --cache, or delete it")
    return content["features"]


# ---------------------------------------------------------------- k-means


def square_distances(x, x2, centroids):
    """(C, M): |x|^2 - 2 c.x + |c|^2 for centroids (C, F) and x2 = |x|^2 (M,), in one product."""
    d = torch.addmm(x2, centroids, x.T, alpha=-2)
    return d.add_(centroids.square().sum(1)[:, None]).clamp_(min=0)


def add_centroids(x, x2, centroids, k, generator):
    """k-means++ (Arthur and Vassilvitskii 2007), the greedy form: centroids (S, j, F) grow to k.
    Each new one is a record, the best of CENTROID_DRAWS drawn by their squared distance to the
    nearest centroid."""
    starts = torch.arange(len(centroids), device=x.device)
    near = square_distances(x, x2, centroids.flatten(0, 1)).unflatten(0, (len(starts), -1)).amin(1)
    while centroids.shape[1] < k:
        mass = near.cumsum(1, dtype=torch.float64)  # (S, M)
        draw = torch.rand(len(starts), CENTROID_DRAWS, generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(mass, draw.to(x.device) * mass[:, -1:], right=True)
        drawn = drawn.clamp_(max=len(x) - 1)  # (S, CENTROID_DRAWS); all mass zero: the last record
        d = square_distances(x, x2, x[drawn.flatten()]).unflatten(0, drawn.shape)
        d = torch.minimum(d, near[:, None])  # (S, CENTROID_DRAWS, M)
        best = d.sum(2).argmin(1)
        near = d[starts, best]
        centroids = torch.cat([centroids, x[drawn[starts, best]][:, None]], dim=1)
    return centroids


def lloyd(x, x2, centroids, *, tol, max_iter):
    """(centroids (S, k, F), labels (S, M), inertias (iterations, S)): S starts side by side.

    Assign each record to its nearest centroid, move each centroid to its records' mean; stop when
    no start's inertia falls by more than tol of itself (tol 0: when nothing changes any more). An
    empty cluster moves to the record farthest from its centroid, so the inertia never rises.
    """
    starts, k = centroids.shape[:2]
    inertias = []
    for _ in range(max_iter):
        d = square_distances(x, x2, centroids.flatten(0, 1)).unflatten(0, (starts, k))
        near, labels = d.min(1)  # (S, M)
        inertias.append(near.sum(1, dtype=torch.float64))
        if len(inertias) > 1 and (inertias[-2] - inertias[-1] <= tol * inertias[-1]).all():
            break
        members = torch.zeros_like(d).scatter_(1, labels[:, None], 1)  # (S, k, M), one-hot
        sizes = members.sum(2, keepdim=True)
        centroids = (members.flatten(0, 1) @ x).unflatten(0, (starts, k)) / sizes.clamp(min=1)
        for start, empty in enumerate(sizes[..., 0] == 0):
            centroids[start, empty] = x[near[start].topk(int(empty.sum())).indices]
    return centroids, labels, torch.stack(inertias)


def mean_of(x):
    """The mean record of x (M, F), taken of the differences to the first record, so that it is
    exact where all records are equal. x is used up."""
    first = x[0].clone()
    return first + x.sub_(first).mean(0)


def in_parts(x):
    """The rows of x (M, F) in parts of at most 40 MiB, for sums whose terms need a copy. (What is
    over 32 MiB goes back to the system at once; much smaller parts would add up.)"""
    return x.split(max(1, 10 * 2**20 // max(1, x.shape[1])))


def best_start(x, x2, centroids, k, *, generator, max_iter):
    """((k, F), inertia) of the best of S starts, each grown to k centroids and run some way."""
    centroids = add_centroids(x, x2, centroids, k, generator)
    centroids, _, inertias = lloyd(x, x2, centroids, tol=START_TOLERANCE, max_iter=max_iter)
    best = inertias[-1].argmin()
    return centroids[best], inertias[-1, best]


def kmeans(x, k, *, seed=0, n_init=10, max_iter=300):
    """(centroids (k, F), labels (M,), inertia) of x (M, F), an array or a tensor; the two come back
    as the same kind. Raises ValueError unless 1 <= k <= M and all of x is finite.

    n_init starts go part of the way; then so do n_init copies of the best, each with another
    centroid taken out and seeded anew; the best of all goes to the end. The products are fp32, on
    data moved to the origin; centroids and inertia are computed at last from x itself.
    """
    points = x.detach() if torch.is_tensor(x) else torch.from_numpy(np.array(x))
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    if points.ndim != 2 or not 1 <= k <= len(points) or min(n_init, max_iter) < 1:
        raise ValueError(f"k-means of {tuple(points.shape)} needs records by features, k from 1 to "
                         f"the number of records and at least one start; k is {k}")
    centre = mean_of(points.clone())
    z = (points - centre).float()
    z2 = torch.cat([part.square().sum(1) for part in in_parts(z)])
    if not z2.isfinite().all():
        raise ValueError("the data holds values that are not finite, or too large to square")
    generator = torch.Generator().manual_seed(seed)
    settings = dict(generator=generator, max_iter=max_iter)
    n_init = n_init if k > 1 else 1  # one cluster has one solution
    first = torch.randint(len(z), (n_init, 1), generator=generator).to(z.device)
    best, inertia = best_start(z, z2, z[first], k, **settings)
    if k > 1:
        taken_out = torch.arange(n_init, device=z.device)[:, None] % k
        kept = torch.arange(k, device=z.device) != taken_out  # (S, k)
        starts = best.expand(n_init, k, -1)[kept].unflatten(0, (n_init, k - 1))
        again, lower = best_start(z, z2, starts, k, **settings)
        best = again if lower < inertia else best
    centroids, labels, _ = lloyd(z, z2, best[None], tol=0, max_iter=max_iter)
    centroids, labels, inertia = centroids[0].to(points) + centre, labels[0], 0.0
    del z  # as large as the data
    for j in labels.unique().tolist():
        centroids[j] = mean_of(points[labels == j])
        inertia += sum((part - centroids[j]).square().sum(dtype=torch.float64).item()
                       for part in in_parts(points[labels == j]))
    if not torch.is_tensor(x):
        centroids, labels = centroids.numpy(), labels.numpy()
    return centroids, labels, inertia


# ---------------------------------------------------------------- which k?


def find_elbow(curve):
    """(k, bends): how far log inertia lies below the straight line from the curve's first point to
    its last, both axes scaled to 0..1, for every k; and the elbow, the k where that is largest.

    deviation: the logarithm. On 100 sets of 2 to 9 known blobs the plain curve's elbow came 1.8
    clusters too early, this one 1.1 (python -m experiments.compare_kmeans --elbow --sets 100).
    """
    first, last = min(curve), max(curve)
    height = {k: math.log(max(inertia, 1e-12 * curve[first])) if curve[first] else 0.0
              for k, inertia in curve.items()}
    drop = height[first] - height[last]
    if drop <= 0:
        return first, dict.fromkeys(curve, 0.0)  # identical records
    bends = {k: 1 - (k - first) / (last - first) - (height[k] - height[last]) / drop for k in curve}
    k = max(bends, key=bends.get)
    if k == first and min(bends.values()) < -1e-9:
        k = last  # the curve still grows steeper: its elbow lies beyond its end
    return k, bends


def gather_evidence(x, k_max, seed):
    """(clusterings {k: (centroids, labels)}, evidence {name: {k: value}}) for k from 1 to k_max."""
    sample = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    sample = sample[:SILHOUETTE_SAMPLE]
    distances = torch.cdist(x[sample], x[sample], compute_mode="donot_use_mm_for_euclid_dist")
    found, evidence = {}, {"curve": {}, "silhouette": {}, "stability": {}}
    for k in progress(range(1, k_max + 1), desc="k-means", unit="k"):
        centroids, labels, inertia = kmeans(x, k, seed=seed)
        others = [kmeans(x, k, seed=seed + s, n_init=1)[1] for s in range(1, STABILITY_SEEDS + 1)]
        found[k] = centroids, labels
        evidence["curve"][k] = inertia
        evidence["silhouette"][k] = silhouette(distances, labels[sample])
        evidence["stability"][k] = float(np.mean([ari(contingency(labels, other)[2])
                                                  for other in others]))
    return found, evidence


# ---------------------------------------------------------------- the answer


def describe(records, x, centroids, labels):
    """For each cluster its size, its three most central records and its most telling words."""
    words = [set(re.findall(r"\w+", prompt_text(record).lower())) for record in records]
    clusters = []
    for j, centroid in enumerate(centroids):
        members = (labels == j).nonzero()[:, 0]
        far = torch.cat([(part - centroid).norm(dim=1) for part in in_parts(x)])
        order = far[members].argsort(stable=True)[:3]
        clusters.append({
            "size": len(members),
            "words": keywords(words, (labels == j).tolist()) if len(members) else [],
            "central": [{"record": i, "instruction": shorten(records[i]["instruction"])}
                        for i in members[order].tolist()]})
    return clusters


def choose_heads(records, model, tokenizer, *, k_max=10, seed=0, features="hidden", layer=None,
                 batch_size=16, max_seq_len=None, cache=None):
    """The answer for a list of records and everything behind it, ready for JSON; result["k"] is the
    number of heads. A model is needed for features="hidden" only. Records are numbered from 0."""
    k_max = min(k_max, len(records))
    max_seq_len = max_seq_len or model.args.max_seq_len
    sequences, shortened = encode_prompts(records, tokenizer, max_seq_len)
    ids = [sequence.ids for sequence in sequences]
    if features == "hidden":
        # two thirds of the depth did well on both corpora of experiments/compare_layers.py
        layer = math.ceil(2 * len(model.layers) / 3) if layer is None else layer
        key = [features, layer, ids, base_fingerprint(model)]
        x = normalise(cached(cache, key, lambda: hidden_features(
            model, sequences, layer=layer, batch_size=batch_size)))
    else:
        layer = None
        x = cached(cache, [features, ids], lambda: tfidf_features(sequences, tokenizer.vocab_size))
    found, evidence = gather_evidence(x, k_max, seed)
    k, evidence["bend"] = find_elbow(evidence["curve"])
    centroids, labels = found[k]
    largest_first = labels.bincount(minlength=k).argsort(descending=True, stable=True)
    centroids, labels = centroids[largest_first], largest_first.argsort()[labels]
    result = {"k": k, **evidence, "labels": labels.tolist(),
              "settings": {"features": features, "layer": layer, "width": x.shape[1],
                           "k_max": k_max, "seed": seed, "max_seq_len": max_seq_len},
              "records": len(records), "shortened": shortened,
              "weak": [name for name, least in WEAK_BELOW.items()
                       if (evidence[name][k] or 0) < least],
              "clusters": describe(records, x, centroids, labels)}
    if any(record["category"] for record in records):
        clusters, categories, table = contingency(labels, [r["category"] for r in records])
        result["categories"] = {"names": categories.tolist(), "table": table.tolist(),
                                "nmi": nmi(table), "ari": ari(table)}
    return result


def shorten(text, width=64):
    text = " ".join(text.split())
    return text if len(text) <= width else text[:width - 3] + "..."


def print_report(result):
    """What choose_heads found: the curve, the choice and its evidence, the clusters."""
    k, curve = result["k"], result["curve"]
    print("\n".join(f"{name:14}{value}" for name, value in result["settings"].items()))
    print(f"{'records':14}{result['records']}, {result['shortened']} cut to max_seq_len\n")
    print(f"{'k':>2}{'inertia':>12}{'bend':>8}{'silhouette':>12}{'stability':>11}")
    for i in curve:
        width = result["silhouette"][i]
        width = "-" if width is None else f"{width:.3f}"
        bar = "#" * round(30 * curve[i] / (curve[1] or 1))
        print(f"{i:2}{curve[i]:12.5g}{result['bend'][i]:8.3f}{width:>12}"
              f"{result['stability'][i]:11.3f}  {bar}{'  <- chosen' if i == k else ''}")
    print("bend: how far log inertia lies below the straight line between the curve's ends, scaled "
          f"to 1\nsilhouette: on {min(SILHOUETTE_SAMPLE, result['records'])} records; stability: "
          f"mean ARI with {STABILITY_SEEDS} single starts of other seeds\n")
    print(f"heads: {k}, where the bend is largest")
    if result["weak"]:
        limits = ", ".join(f"{name} below {WEAK_BELOW[name]}" for name in result["weak"])
        print(f"the evidence is weak ({limits}): other numbers of heads are about as good")
    for j, cluster in enumerate(result["clusters"], start=1):
        print(f"\ncluster {j}: {cluster['size']} records; telling words: "
              + " ".join(cluster["words"]))
        for record in cluster["central"]:
            print(f"  {record['record']:6}  {record['instruction']}")
    if "categories" in result:
        found = result["categories"]
        print(f"\n{'category':24}" + "".join(f"{j:>7}" for j in range(1, len(found["table"]) + 1)))
        for name, counts in zip(found["names"], zip(*found["table"])):
            print(f"{name or '(none)':24}" + "".join(f"{count:7}" for count in counts))
        print(f"NMI {found['nmi']:.3f} (shared information over mean entropy), ARI "
              f"{found['ari']:.3f} (pairs kept together or apart, 0: chance)")


def parse_args(argv):
    p = Parser("cluster.py", __doc__)
    p.add_argument("--weights", default=str(WORLD / "base"),
                   help="checkpoint folder in Meta's layout (the embedded world's)")
    p.add_argument("--data", default=str(WORLD / "train.jsonl"),
                   help="records, JSON lines or array (the embedded world's)")
    add_strict_flag(p)
    p.add_argument("--features", default="hidden", choices=["hidden", "tfidf"],
                   help="hidden states of the base, or the paper's TF-IDF of its pieces (hidden)")
    p.add_argument("--layer", type=int, help="blocks the states passed, 0: none (two thirds)")
    p.add_argument("--k-max", type=int, default=10, help="largest number of clusters (10)")
    p.add_argument("--seed", type=int, default=0, help="of k-means and the sample (0)")
    p.add_argument("--batch-size", type=int, default=16, help="prompts a forward pass (16)")
    p.add_argument("--max-seq-len", type=int, help="a prompt's tokens, the rest is cut (model's)")
    p.add_argument("--device", help="cpu, mps (in fp32), cuda (in bf16) (cuda where there is one)")
    add_shard_flag(p)
    p.add_argument("--cache", help="file that keeps the features for the next run (off)")
    p.add_argument("--out", default="clusters.json", help="file to write (clusters.json)")
    return p.parse_args(argv)


def check_paths_and_numbers(args):
    """Refuses what would only fail after the long part."""
    check_min(args, k_max=1, batch_size=1, max_seq_len=2)
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {args.seed}")
    for path in (args.out, args.cache):
        if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise ValueError(f"{path} is a folder, or in a folder that does not exist: name a file")


def cluster_records(args):
    check_paths_and_numbers(args)
    args.device = pick_device(args.device)
    with process_group(args), explained(weights=args.weights, data=[args.data]):
        records = read_records(args.data, strict=args.strict)
        max_seq_len = read_params(args.weights, args.max_seq_len).max_seq_len
        if args.features == "hidden":
            model, tokenizer = load(args.weights, args, max_seq_len=max_seq_len,
                                    dtype=DTYPES[pick_dtype(None, args.device)])
        else:
            model, tokenizer = None, Tokenizer(Path(args.weights) / "tokenizer.model")
        records.print_remarks(args.data)
        print_default_length(args.weights, max_seq_len, args.max_seq_len)
        result = choose_heads(records, model, tokenizer, k_max=args.k_max, seed=args.seed,
                              features=args.features, layer=args.layer, batch_size=args.batch_size,
                              max_seq_len=max_seq_len, cache=args.cache)
        result["settings"].update(weights=args.weights, data=args.data, device=args.device,
                                  batch_size=args.batch_size, cache=args.cache)
        result.update(records.report)
        print_report(result)
        write_text(args.out, json.dumps(result))
        print(f"\nwrote {args.out}")


def main(argv=None):
    args = parse_args(argv)
    return run_script("cluster.py", lambda: cluster_records(args), argv,
                      stopped="interrupted; nothing new was written: start again",
                      memory="a smaller --batch-size or --max-seq-len needs less")


if __name__ == "__main__":
    sys.exit(main())
