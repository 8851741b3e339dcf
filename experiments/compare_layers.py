"""Which layer, and which normalisation: the measurement behind the defaults of cluster.py.

For every layer and four ways to normalise, k-means with as many clusters as the data has
categories; printed is the NMI with the categories, the mean over three seeds. cluster.py itself
never looks at categories when it chooses.

    python -m experiments.compare_layers --records 1500
    python -m experiments.compare_layers --weights stories260k --data dolly.jsonl --records 1500
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F

from cluster import hidden_features, kmeans, normalise, tfidf_features
from data import WORLD
from data.corpus import encode_prompts, read_records
from model import load_llama
from support.cluster_scores import contingency, nmi

NORMALISATIONS = {
    "plain": lambda x: x,
    "unit length": lambda x: F.normalize(x, dim=1),
    "centred, unit length": normalise,
    "standardised": lambda x: (x - x.mean(0)) / x.std(0).clamp(min=1e-6),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", default=str(WORLD / "base"), help="checkpoint folder")
    parser.add_argument("--data", default=str(WORLD / "train.jsonl"), help="with categories")
    parser.add_argument("--records", type=int, default=1500, help="drawn from the data (1500)")
    parser.add_argument("--max-seq-len", type=int, default=512, help="tokens of a prompt (512)")
    args = parser.parse_args(argv)
    model, tokenizer = load_llama(args.weights, dtype=torch.float32, max_seq_len=args.max_seq_len)
    records = read_records(args.data)
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0))
    records = [records[i] for i in order[:args.records].tolist()]
    sequences, _ = encode_prompts(records, tokenizer, args.max_seq_len)
    categories = [record["category"] for record in records]
    print(f"{'features':10}" + "".join(f"{name:>22}" for name in NORMALISATIONS))
    for layer in ["tfidf", *range(len(model.layers) + 1)]:
        if layer == "tfidf":
            x = tfidf_features(sequences, tokenizer.vocab_size)
        else:
            x = hidden_features(model, sequences, layer=layer, batch_size=16)
        row = []
        for normalisation in NORMALISATIONS.values():
            found = [kmeans(normalisation(x), len(set(categories)), seed=s)[1] for s in range(3)]
            row.append(np.mean([nmi(contingency(labels, categories)[2]) for labels in found]))
        print(f"{layer!s:10}" + "".join(f"{value:22.3f}" for value in row))


if __name__ == "__main__":
    main()
