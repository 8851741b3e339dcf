"""What the method did: losses, exact match and routing of a model, and the tables that show them.

    precision = autocast("cpu", "fp32")
    rows = evaluate(model, sequences, precision=precision)
    report = routing_report(model, sequences, precision=precision)

HydraLoRA, sections 3.2 and 4. train.py prints these before and after a run.
Shapes: B batch, T tokens, M target tokens, N heads, D model width, V vocabulary.
"""

import math
from itertools import combinations

import torch
import torch.nn.functional as F

from data.corpus import collate, cut_by_tokens
from hydralora import adapter_parameters, hydra_layers, record_gates
from support.cli import cell, progress
from support.distributed import map_across_ranks
from support.quantize import QuantizedLinear

EVAL_TOKENS = 2048  # positions per forward pass, whatever the micro-batches of training are
TOTAL = ""  # the key of all categories together


def target_logits(model, batch):
    """Next-token logits (M, V) in fp32 at the target tokens of a Batch only: the head is the
    largest matrix product, and most positions of a batch are prompt."""
    h = model.hidden_states(batch.tokens).flatten(0, 1)  # (B * T, D)
    return model.output(h[batch.target_index]).float()


# ---------------------------------------------------------------- loss and exact match


def score_targets(model, sequences, precision):
    """(loss (M,), correct (M,)) on the CPU: the loss of each target token of a batch, and whether
    it is the most likely token."""
    batch = collate(sequences, model.tok_embeddings.weight.device)
    with precision:
        logits = target_logits(model, batch)
    losses = F.cross_entropy(logits, batch.labels, reduction="none")
    correct = logits.argmax(-1) == batch.labels
    return losses.cpu(), correct.cpu()


@torch.no_grad()
def evaluate(model, sequences, *, precision, name="model", tokens=EVAL_TOKENS):
    """{category: {loss, exact, records, tokens}}, and the same of all records under TOTAL.

    loss is the mean per target token, in nats. exact is the share of exact matches: greedy
    decoding would give the response and its EOS token by token. One forward pass decides that,
    since every step of the decoding would be fed the true prefix. Raises ValueError if the loss is
    not finite: JSON has no NaN, and such a model is of no use."""
    was_training = model.training
    model.eval()
    sums = {}
    batches = cut_by_tokens(sequences, tokens)  # the longest first: it fails at once or fits
    scored = map_across_ranks(batches, lambda batch: score_targets(model, batch, precision))
    for batch, (losses, correct) in progress(scored, total=len(batches), desc=name, leave=False):
        sizes = [s.n_targets for s in batch]
        for s, loss, right in zip(batch, losses.split(sizes), correct.split(sizes)):
            for category in {TOTAL, s.category}:
                row = sums.setdefault(category, dict(loss=0.0, exact=0, records=0, tokens=0))
                row["loss"] += loss.sum(dtype=torch.float64).item()
                row["exact"] += right.all().item()
                row["records"] += 1
                row["tokens"] += len(loss)
    model.train(was_training)
    for row in sums.values():
        row["loss"] /= row["tokens"]
        row["exact"] /= row["records"]
    if not math.isfinite(sums[TOTAL]["loss"]):
        raise ValueError(f"the validation loss of the {name} model is {sums[TOTAL]['loss']}: try "
                         "--dtype fp32, or other weights")
    return sums


# ---------------------------------------------------------------- routing


@torch.no_grad()
def batch_gates(model, sequences, precision):
    """({layer: gate (B, T, N)}, attention mask (B, T)) on the CPU, of one forward pass over a list
    of sequences. Layers without a router have the constant gate."""
    batch = collate(sequences, model.tok_embeddings.weight.device)
    with record_gates(model) as gates, precision:
        h = model.hidden_states(batch.tokens)
        if "output" in hydra_layers(model):  # the head is expensive: only if it is adapted
            model.output(h)
    return {name: w.cpu() for name, w in gates.items()}, batch.attention_mask.cpu()


def gate_entropy(w):
    """Entropy of the gates w (..., N) in nats, summed over the tokens."""
    return -(w * w.clamp_min(1e-12).log()).sum().item()


def sum_gates(model, sequences, precision):
    """[(tokens, {layer: (sum of the gates (N), sum of their entropies)})], one per sequence."""
    gates, mask = batch_gates(model, sequences, precision)
    sums = []
    for row, real in enumerate(mask):
        own = {name: w[row][real] for name, w in gates.items()}  # (tokens, N)
        sums.append((int(real.sum()),
                     {name: (w.sum(0), gate_entropy(w)) for name, w in own.items()}))
    return sums


def most_specialised_layer(gates):
    """The layer of {layer: gates (rows, N)} whose rows differ most. Heads of different layers have
    nothing to do with each other, so a table or a picture shows one layer."""
    return max(gates, key=lambda name: gates[name].std(0, correction=0).mean().item())


def routing_report(model, sequences, *, precision, tokens=EVAL_TOKENS):
    """{"gate": {layer: {category: mean gate per token (N)}}, "entropy": {layer: mean entropy of
    the gate, 1: uniform}, "cosine_b": {layer: mean cosine between two B matrices}}, of the layers
    with several heads."""
    was_training = model.training
    model.eval()
    layers = {name: layer for name, layer in hydra_layers(model).items()
              if layer.settings.heads > 1}
    gate = {name: {} for name in layers}
    entropy = dict.fromkeys(layers, 0.0)
    counts = {}  # of tokens
    batches = cut_by_tokens(sequences, tokens)  # the longest first: it fails at once or fits
    summed = map_across_ranks(batches, lambda batch: sum_gates(model, batch, precision))
    for batch, rows in progress(summed, total=len(batches), desc="routing", leave=False):
        for s, (count, sums) in zip(batch, rows):
            counts[s.category] = counts.get(s.category, 0) + count
            for name in layers:
                weights, nats = sums[name]
                gate[name][s.category] = gate[name].get(s.category, 0) + weights
                entropy[name] += nats
    model.train(was_training)
    total_count = sum(counts.values())
    return {
        "gate": {name: {c: (total / counts[c]).tolist() for c, total in sorted(by.items())}
                 for name, by in gate.items()},
        "entropy": {name: entropy[name] / total_count / math.log(layer.settings.heads)
                    for name, layer in layers.items()},
        "cosine_b": {name: mean_cosine(layer.lora_B) for name, layer in layers.items()},
    }


def check_routing(report):
    """Raises ValueError unless a report that was read from a file is as routing_report makes it:
    the same categories in every layer, gates from 0 to 1, an entropy for each layer."""
    try:
        gate, entropy = report["gate"], report["entropy"]
        families = list(next(iter(gate.values())))
        "".join([*gate, *families]).encode()
        for layer, rows in gate.items():
            values = torch.tensor([[*rows[family], entropy[layer]] for family in families])
            good = values.ndim == 2 and values.min() >= 0 and values.max() < 1.01
            if not good or len(rows) > len(families):
                raise ValueError
    except (AttributeError, KeyError, RuntimeError, StopIteration, TypeError, ValueError):
        raise ValueError("its routing is damaged") from None


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
    base += sum(layer.in_features * layer.out_features for layer in model.modules()
                if isinstance(layer, QuantizedLinear))
    return {"trainable": total, "trainable_without_router": total - router, "base": base}


def print_start(facts):
    """Every setting that is on, how much trains, how many records there are."""
    settings, parameters = facts["settings"], facts["parameters"]
    for key, value in settings.items():
        if value is not None and value is not False:
            print(f"{key:24}{value}")
    share = parameters["trainable"] / parameters["base"]
    print(f"{'trainable parameters':24}{parameters['trainable']:,} ({share:.2%} of the base's "
          f"{parameters['base']:,}); without the router "
          f"{parameters['trainable_without_router']:,}")
    for name, part in facts["data"].items():
        print(f"{name + ' records':24}{part['records']} ({part['shortened']} shortened, "
              f"{part['skipped']} too long and skipped)")
    idle = settings["processes"] - settings["grad_accum"]
    if idle > 0 and not settings["micro_tokens"]:
        print(f"--grad-accum {settings['grad_accum']}: {idle} of {settings['processes']} "
              f"processes have nothing to do; give --grad-accum {settings['processes']} and a "
              "smaller --batch-size")
    print()


def metrics(losses):
    """val_loss and exact_match, in total and per category, and kept: {loss, records} of --keep-data
    if there is any. losses: {"base", perhaps "before", "tuned": what evaluate_sets found}; a name
    that ends in _base or _before is of that model, one without is of the tuned model."""
    suffix = {name: "" if name == "tuned" else f"_{name}" for name in losses}

    def compare(part, category, keys):
        found = {f"{new}{suffix[name]}": parts[part][category][key]
                 for name, parts in losses.items() for key, new in keys.items()}
        return {**found, "records": losses["tuned"][part][category]["records"]}

    keys = {"loss": "val_loss", "exact": "exact_match"}
    categories = categories_of(losses)
    result = {**compare("val", TOTAL, keys),
              "categories": {c: compare("val", c, keys) for c in categories}}
    if "kept" in losses["tuned"]:
        result["kept"] = compare("kept", TOTAL, {"loss": "loss"})
    return result


def categories_of(losses):
    """The categories of the validation records, in alphabetical order. (A run that began with an
    older version has no losses of the records without one.)"""
    return sorted(set.intersection(*(set(parts["val"]) for parts in losses.values())) - {TOTAL})


def row_name(category):
    """The first cell of a category's row; one that is called all is not the total."""
    if category == TOTAL:
        return cell("all")
    return cell('"all"' if category == "all" else category)


def print_losses(losses):
    """Loss and exact match of each model per category, then the loss on --keep-data. losses is as
    in metrics."""
    wide = 9 * (len(losses) - 1)
    print(f"\n{'':33}{'loss (nats per token)':>{13 + wide}}{'exact match':>{11 + wide}}")
    names = "".join(f"{name:>9}" for name in losses)
    print(f"{'category':24}{'records':>9}    {names}  {names}")
    for category in [*categories_of(losses), TOTAL]:
        rows = [parts["val"][category] for parts in losses.values()]
        print(f"{row_name(category)}{rows[0]['records']:9}    "
              + "".join(f"{row['loss']:9.4f}" for row in rows) + "  "
              + "".join(f"{row['exact']:9.1%}" for row in rows))
    if "kept" in losses["base"]:
        rows = [parts["kept"][TOTAL] for parts in losses.values()]
        print(f"kept: {rows[0]['records']} texts that the base knows, loss "
              + " -> ".join(f"{row['loss']:.2f}" for row in rows))


def print_history(rows):
    """The evaluations during a run, of the rows of its log.csv."""
    rows = [row for row in rows if row["val_loss"]]
    if rows:
        print(f"\n{'step':>8}{'val loss':>11}{'exact match':>13}{'kept loss':>11}")
    for row in rows:
        kept = f"{float(row['kept_loss']):11.4f}" if row["kept_loss"] else ""
        print(f"{row['step']:>8}{float(row['val_loss']):11.4f}"
              f"{float(row['exact_match']):13.1%}{kept}")


def print_routing(report):
    """The mean gate per category in the most specialised layer, then the two signs of a collapsed
    router: an even gate, and heads that are alike."""
    def mean(values):
        return sum(values.values()) / len(values)

    gate = report["gate"]
    name = most_specialised_layer({layer: torch.tensor(list(by.values()))
                                   for layer, by in gate.items()})
    heads = len(next(iter(gate[name].values())))
    print(f"\nmean gate of each head, in the layer where it differs most ({name})")
    print(f"{'category':24}" + "".join(f"{f'head {i + 1}':>9}" for i in range(heads)))
    for category, weights in gate[name].items():
        print(row_name(category) + "".join(f"{w:9.3f}" for w in weights))
    print(f"over all layers: gate entropy {mean(report['entropy']):.2f} of uniform, mean cosine "
          f"between heads {mean(report['cosine_b']):.2f}")
