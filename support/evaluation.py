"""Losses, exact matches and routing of a model on sequences, and the tables that show them.

    losses = evaluate(model, sequences, args, "tuned")
    report = routing_report(model, sequences, args)

args needs device, dtype and batch_size, as train.py's settings have them.
Shapes: B batch, T tokens, M labels, N heads, D model width.
"""

import math
from itertools import combinations

import torch
import torch.nn.functional as F

from data import QUIZ_SHOTS, WORLD
from data.corpus import collate, length_batches
from hydralora import adapter_parameters, hydra_layers, record_gates
from support.cli import progress
from support.device import autocast
from support.distributed import map_across_ranks

EVAL_BATCH = 16  # most records at a time
HEAD_CHUNK = 256  # labels whose logits exist at a time: (256, 32000) in fp32 are 33 MB


def eval_batches(sequences, args):
    """Longest first, of no more rows than in training: what fits in memory there fits here."""
    return length_batches(sequences, min(EVAL_BATCH, args.batch_size))


def label_losses(model, sequences, args):
    """(loss (M,), hit (M,)): of every label, and whether it is the most likely token. The head runs
    at the labels' places only, chunk by chunk, so that logits of (M, V) never exist."""
    batch = collate(sequences, args.device)
    with autocast(args):
        h = model.hidden_states(batch.tokens).flatten(0, 1)[batch.target_index]  # (M, D)
    losses, hits = [], []
    for part, labels in zip(h.split(HEAD_CHUNK), batch.labels.split(HEAD_CHUNK)):
        with autocast(args):
            logits = model.output(part).float()
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        hits.append(logits.argmax(-1) == labels)
    return torch.cat(losses), torch.cat(hits)


@torch.no_grad()
def evaluate(model, sequences, args, name):
    """{category: {loss, exact, records, tokens}} and the total under "". Loss is the mean per
    label. Exact: greedy decoding would give the response and its EOS token by token, which one
    forward pass tells, since every step of it would be fed the true prefix. Raises ValueError for a
    model whose loss is not finite: such a model is of no use, and JSON has no NaN."""
    model.eval()
    sums = {}
    batches = eval_batches(sequences, args)
    scored = map_across_ranks(
        batches, lambda batch: [x.cpu() for x in label_losses(model, batch, args)])
    for batch, (losses, hits) in progress(scored, total=len(batches), desc=name, leave=False):
        sizes = [s.n_targets for s in batch]
        for s, loss, hit in zip(batch, losses.split(sizes), hits.split(sizes)):
            for category in {"", s.category}:
                row = sums.setdefault(category, dict(loss=0.0, exact=0, records=0, tokens=0))
                row["loss"] += loss.sum(dtype=torch.float64).item()
                row["exact"] += hit.all().item()
                row["records"] += 1
                row["tokens"] += len(loss)
    for row in sums.values():
        row["loss"] /= row["tokens"]
        row["exact"] /= row["records"]
    if not math.isfinite(sums[""]["loss"]):
        raise ValueError(f"the validation loss of the {name} model is {sums['']['loss']}: try "
                         "--dtype fp32, or other weights")
    return sums


def measure(model, held, args, name):
    """{"val": evaluate's rows, and "kept" where there are such texts}."""
    return {part: evaluate(model, sequences, args, name) for part, sequences in held.items()}


# ---------------------------------------------------------------- routing


@torch.no_grad()
def batch_gates(model, sequences, args):
    """({layer: gate (B, T, N)} on the CPU, real (B, T)) of one forward pass over a list of
    sequences; layers without a router have the constant gate."""
    batch = collate(sequences, args.device)
    with record_gates(model) as gates, autocast(args):
        h = model.hidden_states(batch.tokens)
        if "output" in hydra_layers(model):  # the head costs much: only where it is adapted
            model.output(h)
    return {name: w.cpu() for name, w in gates.items()}, batch.attention_mask.cpu()


def gate_entropy(w):
    """Sum over the tokens of the entropy of w (..., N), in nats."""
    return -(w * w.clamp_min(1e-12).log()).sum().item()


def row_gates(model, sequences, args):
    """[(tokens, {layer: (sum of the gate (N), sum of its entropy)})] over each sequence's real
    tokens."""
    gates, real = batch_gates(model, sequences, args)
    sums = [(row.sum().item(), {}) for row in real]
    for name, weights in gates.items():
        for w, row, (_, of) in zip(weights, real, sums):
            of[name] = w[row].sum(0), gate_entropy(w[row])
    return sums


def most_specialised_layer(gates):
    """The layer of {layer: gates (rows, N)} whose rows differ most. Heads of different layers have
    nothing to do with each other, so a table or a picture is of one layer."""
    return max(gates, key=lambda name: gates[name].std(0, correction=0).mean().item())


def routing_report(model, sequences, args):
    """Where the tokens went: {"gate": {layer: {category: mean gate (N)}}} over the real tokens of
    the sequences, "entropy" {layer: mean entropy of the gate, 1 = uniform} and "cosine_b" {layer:
    mean cosine between two B matrices}."""
    model.eval()
    layers = hydra_layers(model)
    heads = next(iter(layers.values())).settings.heads
    gate, entropy, tokens = {name: {} for name in layers}, dict.fromkeys(layers, 0.0), {}
    batches = eval_batches(sequences, args)
    summed = map_across_ranks(batches, lambda batch: row_gates(model, batch, args))
    for batch, rows in progress(summed, total=len(batches), desc="routing", leave=False):
        for s, (count, gates) in zip(batch, rows):
            tokens[s.category] = tokens.get(s.category, 0) + count
            for name, (weights, nats) in gates.items():
                gate[name][s.category] = gate[name].get(s.category, 0) + weights
                entropy[name] += nats
    count = sum(tokens.values())
    return {
        "gate": {name: {c: (total / tokens[c]).tolist() for c, total in sorted(by.items())}
                 for name, by in gate.items()},
        "entropy": {name: total / count / math.log(heads) for name, total in entropy.items()},
        "cosine_b": {name: mean_cosine(layer.lora_B) for name, layer in layers.items()},
    }


def mean_cosine(matrices):
    """Mean cosine over all pairs of matrices (N, ...), each taken as one vector."""
    pairs = list(combinations(matrices.detach().flatten(1), 2))
    return sum(F.cosine_similarity(a, b, dim=0).item() for a, b in pairs) / len(pairs)


# ---------------------------------------------------------------- what is printed and written


def count_parameters(model):
    """{trainable, trainable_without_router, base}: numbers of weights."""
    adapter = adapter_parameters(model)
    router = sum(p.numel() for name, p in adapter.items() if name.endswith(".router"))
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in adapter.values())
    return {"trainable": total, "trainable_without_router": total - router, "base": base}


def print_start(args, counts, data):
    """Every setting, how much trains, how many records there are."""
    print("\n".join(f"{key:24}{value}" for key, value in vars(args).items()))
    share = counts["trainable"] / counts["base"]
    print(f"{'trainable parameters':24}{counts['trainable']:,} ({share:.2%} of the base's "
          f"{counts['base']:,}); without the router {counts['trainable_without_router']:,}")
    for name, part in data.items():
        print(f"{name + ' records':24}{part['records']} ({part['shortened']} shortened, "
              f"{part['skipped']} too long and skipped)")
    print()


def metrics(before, after):
    """val_loss, val_loss_base and the exact matches, in total and per category; kept: {loss,
    loss_base, records} of --keep-data, where there is any."""
    def pair(category):
        a, b = before["val"][category], after["val"][category]
        return {"val_loss": b["loss"], "val_loss_base": a["loss"], "exact_match": b["exact"],
                "exact_match_base": a["exact"], "records": b["records"]}

    result = {**pair(""), "categories": {c: pair(c) for c in sorted(after["val"]) if c}}
    if "kept" in after:
        a, b = before["kept"][""], after["kept"][""]
        result["kept"] = {"loss": b["loss"], "loss_base": a["loss"], "records": b["records"]}
    return result


def print_losses(before, after, out, args):
    """The losses and exact matches of both, category by category; how to ask the embedded quiz;
    the loss on what is to be kept."""
    print(f"\n{'':33}{'loss (nats a token)':>20}{'answers all right':>20}\n"
          f"{'category':24}{'records':>9}{'base':>11}{'tuned':>9}{'base':>11}{'tuned':>9}")
    for category in sorted(before["val"], key=lambda name: (name == "", name)):
        a, b = before["val"][category], after["val"][category]
        print(f"{category or 'all':24}{a['records']:9}{a['loss']:11.4f}{b['loss']:9.4f}"
              f"{a['exact']:11.1%}{b['exact']:9.1%}")
    if args.weights == str(WORLD / "base"):
        tuned = f"--weights {out}" if args.method == "full" else f"--adapter {out / 'adapter.pt'}"
        print(f"\nquiz: python eval_mmlu.py --shots {QUIZ_SHOTS} {tuned}")
    if "kept" in after:
        a, b = before["kept"][""], after["kept"][""]
        print(f"kept: {b['records']} texts, loss {a['loss']:.2f} -> {b['loss']:.2f}")


def print_routing(report):
    """The mean gate per category in the most divided layer, then the signs of a collapsed router:
    weights that are all alike, and heads that are alike."""
    def mean(values):
        return sum(values.values()) / len(values)

    gate = report["gate"]
    name = most_specialised_layer({layer: torch.tensor(list(by.values()))
                                   for layer, by in gate.items()})
    heads = len(next(iter(gate[name].values())))
    print(f"\nweight of each head, in the layer where it differs most ({name})")
    print(f"{'category':24}" + "".join(f"{f'head {i + 1}':>9}" for i in range(heads)))
    for category, weights in gate[name].items():
        print(f"{category or 'all':24}" + "".join(f"{w:9.3f}" for w in weights))
    print(f"over all layers: the weights are {mean(report['entropy']):.0%} even (100%: all equal), "
          f"the heads {mean(report['cosine_b']):.0%} alike")
