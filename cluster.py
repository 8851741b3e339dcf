"""How many heads does a corpus want? k-means over its prompts, before any training.

HydraLoRA (Tian et al., NeurIPS 2024), section 3.2: the number N of B matrices is the number
of clusters at the elbow of the within-cluster sum of squares.
deviation: features are mean-pooled hidden states; --features tfidf is the paper's choice.

    python cluster.py                                           # the embedded world
    python cluster.py --weights llama-2-7b --data dolly.jsonl   # any other corpus

Shapes: M records, F features, k clusters, B batch, T tokens, D model width.
"""

import hashlib
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import WORLD
from data.corpus import (
    NO_CATEGORY,
    encode_prompts,
    length_batches,
    pad,
    prompt_text,
    read_files,
    split_weight,
)
from hydralora import base_fingerprint
from model import Tokenizer, read_params
from support.base import load_model, print_default_length
from support.cli import Parser, cell, check_min, progress, run_script
from support.cluster_scores import ari, contingency, keywords, nmi, silhouette
from support.device import DTYPES, pick_device, pick_dtype
from support.distributed import add_shard_flag, process_group, run_on_rank0
from support.files import check_tensors, read_torch, write_file, write_text
from support.quantize import add_quantize_flag

MAX_PIECES = 4096  # TF-IDF columns: 15,000 records stay below 250 MB
DRAWS = 4  # k-means: per new centroid; the record that lowers the inertia most is taken
TOLERANCE = 1e-4  # k-means: iterations end once the inertia falls by a smaller share
STABILITY_SEEDS = 3
SILHOUETTE_SAMPLE = 1000
# what the report calls weak evidence; bend: the elbow strength
WEAK_BELOW = {"bend": 0.1, "silhouette": 0.1, "stability": 0.8}


# ---------------------------------------------------------------- features


@torch.no_grad()
def hidden_features(model, sequences, *, layer, batch_size=16):
    """(M, D) fp32 on the CPU: the states of each prompt after `layer` blocks and the final
    norm, mean-pooled over its tokens, excluding padding and BOS (whose activations are far
    larger and would dominate). The final norm limits other outlier tokens. Raises
    ValueError if the model has no such layer."""
    n_layers = len(model.layers)
    if not 0 <= layer <= n_layers:
        raise ValueError(f"layer {layer} is not one of 0 (embeddings) to {n_layers}")
    device = model.tok_embeddings.weight.device
    features = torch.zeros(len(sequences), model.args.dim)
    batches = length_batches(sequences, batch_size)
    for batch in progress(batches, desc="prompts", unit="batch"):
        tokens, mask = pad([s.ids for s in batch], device)
        mask[:, 0] = False  # BOS
        h = model.hidden_states(tokens, n_layers=layer).float()  # (B, T, D)
        mean = h.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)
        features[[s.record for s in batch]] = mean.cpu()
    return features


def tfidf_features(sequences, vocab_size):
    """(M, up to MAX_PIECES): how often each piece occurs in a prompt, times
    log((1 + M) / (1 + records with it)) + 1, for the pieces found in the most records.
    Each row is then scaled to length one; otherwise long prompts would form a cluster."""
    n_records = torch.zeros(vocab_size)  # with each piece
    for sequence in sequences:
        n_records[sorted(set(sequence.ids[1:]))] += 1
    pieces = n_records.argsort(descending=True, stable=True)[:MAX_PIECES]
    x = torch.empty(len(sequences), len(pieces))
    for row, s in zip(x, sequences):
        row.copy_(torch.bincount(torch.tensor(s.ids[1:]), minlength=vocab_size)[pieces])
    x *= ((1 + len(sequences)) / (1 + n_records[pieces])).log() + 1
    return F.normalize(x, dim=1, out=x)


def normalise(x):
    """Subtracts the mean, since the component common to all rows is large and
    uninformative, and scales each row to length one. Of the ways that
    experiments/compare_clusters.py tried, this one's clusters fit the categories best. A
    row that differs from the mean by rounding alone becomes zero."""
    largest = x.norm(dim=1).max()
    x = x - x.mean(0)
    length = x.norm(dim=1, keepdim=True)
    return x / length.masked_fill(length < 1e-5 * largest, torch.inf)


def cached(path, key, records, compute):
    """compute(), features of so many records, kept in the file at path (None: not kept) under
    a key of its inputs. Raises ValueError if the file has another key."""
    if path is None:
        return compute()
    key = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    if run_on_rank0(lambda: Path(path).exists()):
        content = read_torch(path, "a feature file")
    else:
        content = {"key": key, "features": compute()}
        write_file(path, lambda file: torch.save(content, file))
    if not isinstance(content, dict) or content.get("key") != key:
        raise ValueError(f"{path} holds the features of other data, weights or settings: "
                         "give another --cache, or delete it")
    check_tensors({"features": content.get("features")})
    x = content["features"]
    if x.ndim != 2 or len(x) != records or x.dtype != torch.float32:
        raise ValueError(f"{path} holds {tuple(x.shape)} in {x.dtype}, not fp32 features of "
                         f"{records} records: delete it")
    return x


# ---------------------------------------------------------------- k-means


class Clusters(NamedTuple):
    centroids: torch.Tensor  # (k, F), that of the largest cluster first
    labels: torch.Tensor  # (M,): the cluster of each record
    inertia: float  # sum of the records' squared distances to their centroids


def square_distances(x, centroids):
    """(M, k): |x|^2 - 2 x.c + |c|^2, all by one product."""
    x2 = x.norm(dim=1, keepdim=True).square()
    return (x2 - 2 * (x @ centroids.T) + centroids.square().sum(1)).clamp(min=0)


def add_centroids(x, centroids, k, generator):
    """k-means++ (Arthur and Vassilvitskii 2007): centroids (j, F) grow to k. A new one is
    a record, drawn in proportion to its squared distance to the nearest centroid."""
    nearest = square_distances(x, centroids).amin(1)  # (M,)
    while len(centroids) < k:
        weights = nearest.cpu() if nearest.any() else torch.ones(len(x))
        drawn = torch.multinomial(weights, DRAWS, replacement=True, generator=generator)
        records = x[drawn.to(x.device)]
        distances = torch.minimum(square_distances(x, records), nearest[:, None])
        best = distances.sum(0).argmin()
        nearest = distances[:, best]
        centroids = torch.cat([centroids, records[best][None]])
    return centroids


def lloyd(x, centroids, max_iter):
    """Lloyd's algorithm: assign each record to its nearest centroid, move each centroid to
    the mean of its records, repeat. The centroid of an empty cluster moves to the record
    that is farthest from its own, so the inertia never rises."""
    inertia = math.inf
    for _ in range(max_iter):
        distances, labels = square_distances(x, centroids).min(1)
        sizes = labels.bincount(minlength=len(centroids))
        sums = torch.zeros_like(centroids).index_add_(0, labels, x)
        centroids = sums / sizes.clamp(min=1)[:, None]
        empty = sizes == 0
        centroids[empty] = x[distances.topk(int(empty.sum())).indices]
        before = inertia
        inertia = distances.sum().item()
        if before - inertia <= TOLERANCE * inertia:
            break
    return Clusters(centroids, labels, inertia)


def kmeans(x, k, *, seed=0, n_init=10, max_iter=300):
    """The best Clusters of x (M, F), an array or a tensor; centroids and labels are of the
    same kind. n_init starts are by k-means++; n_init more begin at the best so far, with
    one centroid drawn again, and find minima that the others miss (docs/heads.md). Raises
    ValueError unless 1 <= k <= M and all values are finite."""
    points = x.detach() if torch.is_tensor(x) else torch.from_numpy(np.array(x))
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    if points.ndim != 2 or not 1 <= k <= len(points) or min(n_init, max_iter) < 1:
        raise ValueError(f"k-means of {tuple(points.shape)} needs records by features, k "
                         f"from 1 to the number of records, and a start; k is {k}")
    centre = points.mean(0)
    z = points - centre  # far from the origin square_distances would be inexact
    if not z.norm().square().isfinite():
        raise ValueError("the data holds values that are not finite or too large to square")
    generator = torch.Generator().manual_seed(seed)
    best = None
    for start in range(2 * n_init if k > 1 else 1):
        if start < n_init:
            first = z[torch.randint(len(z), (1,), generator=generator)]
        else:
            first = best.centroids[torch.arange(k) != start % k]
        found = lloyd(z, add_centroids(z, first, k, generator), max_iter)
        if best is None or found.inertia < best.inertia:
            best = found
    del z  # as large as x
    by_size = best.labels.bincount(minlength=k).argsort(descending=True, stable=True)
    centroids = best.centroids[by_size] + centre
    labels = by_size.argsort()[best.labels]
    inertia = (points - centroids[labels]).square().sum().item()
    if not torch.is_tensor(x):
        centroids, labels = centroids.numpy(), labels.numpy()
    return Clusters(centroids, labels, inertia)


# ---------------------------------------------------------------- which k?


@dataclass
class Evidence:
    """For one k."""
    clusters: Clusters
    silhouette: float | None  # None for one cluster
    stability: float  # mean ARI with single starts of other seeds


def gather_evidence(x, k_max, seed):
    """{k: Evidence} for k from 1 to k_max."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(x), generator=generator)[:SILHOUETTE_SAMPLE]
    exact = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(x[sample], x[sample], compute_mode=exact)
    evidence = {}
    for k in progress(range(1, k_max + 1), desc="k-means", unit="k"):
        clusters = kmeans(x, k, seed=seed)
        scores = []
        for other in range(seed + 1, seed + 1 + STABILITY_SEEDS):
            labels = kmeans(x, k, seed=other, n_init=1).labels
            scores.append(ari(contingency(clusters.labels, labels)[2]))
        evidence[k] = Evidence(clusters, silhouette(distances, clusters.labels[sample]),
                               float(np.mean(scores)))
    return evidence


def find_elbow(curve):
    """(k, strengths) of an inertia curve {k: inertia}. strengths {k: number} is Kneedle's
    difference curve (Satopaa et al. 2011): how far log inertia lies below the straight
    line from the first point to the last, both axes scaled to 0..1. k is its maximum.

    deviation: the logarithm. On 100 sets of 2 to 9 known blobs the plain curve's elbow was
    1.8 clusters off, this one 1.1 (experiments.compare_clusters --elbow --sets 100).
    """
    first, last = min(curve), max(curve)
    height = {k: math.log(max(inertia, 1e-12 * curve[first])) if curve[first] else 0.0
              for k, inertia in curve.items()}
    drop = height[first] - height[last]
    if drop <= 0:
        return first, dict.fromkeys(curve, 0.0)  # identical records
    strengths = {k: 1 - (k - first) / (last - first) - (height[k] - height[last]) / drop
                 for k in curve}
    k = max(strengths, key=strengths.get)
    if k == first and min(strengths.values()) < -1e-9:
        k = last  # the curve still grows steeper: its elbow lies beyond its end
    return k, strengths


# ---------------------------------------------------------------- the answer


def describe(records, x, clusters):
    """Per cluster: its size, its keywords and its three most central records."""
    words = [set(re.findall(r"\w+", prompt_text(record).lower())) for record in records]
    described = []
    for j, centroid in enumerate(clusters.centroids):
        inside = clusters.labels == j
        members = inside.nonzero()[:, 0]
        order = (x[members] - centroid).norm(dim=1).argsort(stable=True)
        central = [{"record": i, "instruction": shorten(records[i]["instruction"])}
                   for i in members[order[:3]].tolist()]
        described.append({"size": len(members), "central": central,
                          "words": keywords(words, inside.tolist())})
    return described


def shorten(text, width=64):
    text = " ".join(text.split())
    return text if len(text) <= width else text[:width - 3] + "..."


def prompt_features(sequences, model, vocab_size, *, features="hidden", layer=None,
                    batch_size=16, cache=None):
    """(x (M, F), layer) of encoded prompts. layer None: two thirds of the depth, which did
    well on both corpora of experiments/compare_clusters.py."""
    ids = [sequence.ids for sequence in sequences]
    if features == "tfidf":
        x = cached(cache, [features, ids], len(ids),
                   lambda: tfidf_features(sequences, vocab_size))
        return x, None
    layer = math.ceil(2 * len(model.layers) / 3) if layer is None else layer
    key = [features, layer, ids, base_fingerprint(model)]
    if hasattr(model, "quantized"):  # it has the base's fingerprint and other states
        key.append(model.quantized)
    x = cached(cache, key, len(ids), lambda:
               hidden_features(model, sequences, layer=layer, batch_size=batch_size))
    return normalise(x), layer


def choose_heads(records, model, tokenizer, *, k_max=10, seed=0, max_seq_len=None,
                 features="hidden", **settings):
    """The answer for a list of records and everything behind it, ready for JSON;
    result["k"] is the number of heads. Only features="hidden" needs a model. Other
    settings are those of prompt_features. Records are numbered from 0."""
    max_seq_len = max_seq_len or model.args.max_seq_len
    sequences, shortened = encode_prompts(records, tokenizer, max_seq_len)
    x, layer = prompt_features(sequences, model, tokenizer.vocab_size,
                               features=features, **settings)
    k_max = min(k_max, len(records))
    evidence = gather_evidence(x, k_max, seed)
    curve = {k: found.clusters.inertia for k, found in evidence.items()}
    k, strengths = find_elbow(curve)
    clusters = evidence[k].clusters
    result = {"k": k, "labels": clusters.labels.tolist(), "curve": curve, "bend": strengths,
              "silhouette": {k: found.silhouette for k, found in evidence.items()},
              "stability": {k: found.stability for k, found in evidence.items()},
              "settings": {"features": features, "layer": layer, "width": x.shape[1],
                           "k_max": k_max, "seed": seed, "max_seq_len": max_seq_len},
              "records": len(records), "shortened": shortened,
              "clusters": describe(records, x, clusters)}
    result["weak"] = [name for name, least in WEAK_BELOW.items()
                      if (result[name][k] or 0) < least]
    categories = [record["category"] for record in records]
    if any(categories):
        _, names, table = contingency(clusters.labels, categories)
        result["categories"] = {"names": names.tolist(), "table": table.tolist(),
                                "nmi": nmi(table), "ari": ari(table)}
    return result


def print_report(result):
    """What choose_heads found: the curve, the choice and its evidence, the clusters."""
    k, curve = result["k"], result["curve"]
    for name, value in result["settings"].items():
        print(f"{name:14}{value}")
    print(f"{'records':14}{result['records']}, {result['shortened']} cut to max_seq_len")
    print(f"\n{'k':>2}{'inertia':>12}{'elbow':>8}{'silhouette':>12}{'stability':>11}")
    for i in curve:
        width = result["silhouette"][i]
        width = "-" if width is None else f"{width:.3f}"
        bar = "#" * round(30 * curve[i] / (curve[1] or 1))
        print(f"{i:2}{curve[i]:12.5g}{result['bend'][i]:8.3f}{width:>12}"
              f"{result['stability'][i]:11.3f}  {bar}{'  <- chosen' if i == k else ''}")
    print("elbow: strength, how far log inertia lies below the straight line between the "
          "curve's ends,\n  scaled to 1; silhouette: on "
          f"{min(SILHOUETTE_SAMPLE, result['records'])} records; stability: mean ARI with "
          f"{STABILITY_SEEDS} single starts of other seeds\n")
    print(f"heads: {k}, where the elbow strength is largest")
    if result["weak"]:
        limits = ", ".join(f"{name} below {WEAK_BELOW[name]}" for name in result["weak"])
        limits = limits.replace("bend", "elbow strength")
        print(f"weak evidence ({limits}): other numbers of heads would be about as good")
    for j, cluster in enumerate(result["clusters"], start=1):
        print(f"\ncluster {j}: {cluster['size']} records; keywords:", *cluster["words"])
        for record in cluster["central"]:
            print(f"  {record['record']:6}  {record['instruction']}")
    if "categories" in result:
        print_categories(**result["categories"])


def print_categories(names, table, nmi, ari):
    print(f"\n{'category':24}" + "".join(f"{j:>7}" for j in range(1, len(table) + 1)))
    for name, counts in zip(names, zip(*table)):
        print(cell(name or NO_CATEGORY) + "".join(f"{count:7}" for count in counts))
    print(f"NMI {nmi:.3f} (mutual information over mean entropy), ARI {ari:.3f} (pairs kept "
          "together or apart, 0: chance)")


# ---------------------------------------------------------------- the script


def run(args):
    with process_group(args.device, args.shard_base):
        records = read_files(args.data, strict=args.strict)
        max_seq_len = read_params(args.weights, args.max_seq_len).max_seq_len
        if args.features == "hidden":
            dtype = DTYPES[pick_dtype(None, args.device)]
            model, tokenizer = load_model(args.weights, device=args.device, dtype=dtype,
                                          max_seq_len=max_seq_len, shard_base=args.shard_base,
                                          quantize=args.quantize)
        else:
            model = None
            tokenizer = Tokenizer(Path(args.weights) / "tokenizer.model")
        print_default_length(args.weights, max_seq_len, args.max_seq_len)
        result = choose_heads(records, model, tokenizer, k_max=args.k_max, seed=args.seed,
                              max_seq_len=max_seq_len, features=args.features,
                              layer=args.layer, batch_size=args.batch_size,
                              cache=args.cache)
        result["settings"].update(weights=args.weights, data=args.data, device=args.device,
                                  batch_size=args.batch_size,
                                  cache=args.cache and str(args.cache),
                                  quantize=args.quantize or "none")
        result.update(records.report)
        write_text(args.out, json.dumps(result))
        print_report(result)
        print(f"\nwrote {args.out}")


def parse_args(argv):
    p = Parser("cluster.py", __doc__)
    p.add_argument("--weights", default=str(WORLD / "base"),
                   help="checkpoint folder in Meta's layout (the embedded world's)")
    p.add_argument("--data", nargs="+", default=[str(WORLD / "train.jsonl")],
                   metavar="FILE[:WEIGHT]", help="records, JSON lines or array, as for train.py; "
                   "each counts once, whatever the weight (the embedded world's)")
    p.add_argument("--strict", action="store_true", help="refuse a record that cannot be "
                   "trained on, instead of skipping and counting it (off)")
    p.add_argument("--features", default="hidden", choices=["hidden", "tfidf"],
                   help="hidden states of the base, or the paper's TF-IDF (hidden)")
    p.add_argument("--layer", type=int,
                   help="blocks before the states are taken, 0: none (two thirds)")
    p.add_argument("--k-max", type=int, default=10, help="largest number of clusters (10)")
    p.add_argument("--seed", type=int, default=0,
                   help="random seed of k-means and of the silhouette's sample (0)")
    p.add_argument("--batch-size", type=int, default=16,
                   help="prompts per forward pass (16)")
    p.add_argument("--max-seq-len", type=int,
                   help="tokens per prompt, a longer one loses its end (the model's)")
    p.add_argument("--device",
                   help="cpu, mps (in fp32), cuda (in bf16) (cuda if there is one)")
    add_quantize_flag(p)
    add_shard_flag(p)
    p.add_argument("--cache", type=Path,
                   help="file that keeps the features for the next run (none)")
    p.add_argument("--out", type=Path, default="clusters.json",
                   help="file to write (clusters.json)")
    args = p.parse_args(argv)
    try:
        check_min(args, k_max=1, batch_size=1, max_seq_len=2)
        args.data = [split_weight(text)[0] for text in args.data]
        args.device = pick_device(args.device)
    except ValueError as error:
        p.error(str(error))
    if not 0 <= args.seed < 2**32:
        p.error(f"--seed must be from 0 to 2**32 - 1, got {args.seed}")
    for path in (args.out, args.cache):  # writing would fail only after clustering
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            p.error(f"{path} is a folder, or in a folder that does not exist: name a file")
    return args


def main(argv=None):
    return run_script("cluster.py", parse_args, run, argv,
                      stopped="interrupted; nothing new was written: start again",
                      memory="a smaller --batch-size or --max-seq-len needs less")


if __name__ == "__main__":
    sys.exit(main())
