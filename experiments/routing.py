"""Is the router of HydraLoRA used? Where tokens go, and what breaks when the gate is tampered with.

Of trained HydraLoRA adapters (those of table1): the mean gate by head, category and layer; its
entropy; the mutual information between head and category, beside what categories dealt at random
give; and the validation loss, after training, with the gate

    uniform      1 / N for every token
    constant     each layer's own mean gate, for every token
    shuffled     that of another token of 32 random records, the same one in every layer
    less head i  that head's weight zero in all layers, the others renormalised to sum to 1

    python -m experiments.routing    # 9 runs, which table1 has done; after it 8 minutes

Claims (sections 2.3 and 3.2): the heads specialise, the routing is used, every head is needed.
Shapes: M records, C categories, N heads, B batch, T tokens.
"""

import math
import statistics
import sys
from contextlib import ExitStack, contextmanager

import torch

import train
from data.corpus import collate, encode_records, length_batches
from experiments import common
from experiments.common import claim, difference, hydra, interval, show, signed
from hydralora import hydra_layers, load_adapter
from model import load_llama
from support.evaluation import batch_gates, gate_entropy, label_losses

BATCH = 32  # records whose tokens exchange their gates
DEALS = 20  # random deals of the categories behind the mutual information by chance


@contextmanager
def changed_gates(model, change):
    """Inside, the gate of every layer is change(layer name, its own gate (B, T, N))."""
    with ExitStack() as after:
        for name, layer in hydra_layers(model).items():
            def act(_, __, gate, name=name):
                return change(name, gate)
            after.callback(layer.gate_out.register_forward_hook(act).remove)
        yield model


@torch.no_grad()
def loss_with(model, batches, args, change):
    """Mean loss per target token; change(layer name, gate, real (B, T)) is the gate that acts."""
    total, count = 0.0, 0
    for batch in batches:
        real = collate(batch).real
        with changed_gates(model, lambda name, w, real=real: change(name, w, real)):
            losses, _ = label_losses(model, batch, args)
        total += losses.sum().item()
        count += len(losses)
    return total / count


def uniform(name, w, real):
    return torch.full_like(w, 1 / w.shape[-1])


def shuffled(name, w, real):
    """The gates of the real tokens, dealt anew; every layer of a batch deals alike."""
    own = w[real]  # (B, T, N) -> (real tokens, N)
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(0))
    dealt = w.clone()
    dealt[real] = own[order]
    return dealt


def without_head(head):
    def change(name, w, real):
        w = w.clone()
        w[..., head] = 0
        return w / w.sum(-1, keepdim=True).clamp_min(1e-12)
    return change


@torch.no_grad()
def gate_sums(model, batches, args, count):
    """({layer: (M, N) gates summed over a record's tokens}, tokens (M,), {layer: mean entropy of a
    token's gate, 1 = uniform})."""
    layers, tokens = hydra_layers(model), torch.zeros(count, dtype=torch.float64)
    sums = {name: torch.zeros(count, layer.settings.heads, dtype=torch.float64)
            for name, layer in layers.items()}
    entropy = dict.fromkeys(layers, 0.0)
    for batch in batches:
        gates, real = batch_gates(model, batch, args)
        records = [s.record for s in batch]
        tokens[records] = real.sum(1).double()
        for name, w in gates.items():
            w = w * real[..., None]
            sums[name][records] = w.sum(1).double()
            entropy[name] += gate_entropy(w)
    return sums, tokens, {name: total / tokens.sum().item() / math.log(layers[name].settings.heads)
                          for name, total in entropy.items()}


def by_category(values, categories):
    """(C, ...): rows of values summed by category, in alphabetical order."""
    names = sorted(set(categories))
    index = torch.tensor([names.index(category) for category in categories])
    return torch.zeros(len(names), *values.shape[1:], dtype=values.dtype).index_add(
        0, index, values)


def mutual_information(table):
    """Bits that row and column say of each other, of a table of counts or weights."""
    p = table.double() / table.sum()
    independent = p.sum(1, keepdim=True) * p.sum(0)
    return (p * (p / independent).log2()).nan_to_num(0).sum().item()


def information(sums, categories):
    """(mean over the layers, the same by chance) in bits, between head and category of a token."""
    def mean(labels):
        return statistics.fmean(mutual_information(by_category(own, labels))
                                for own in sums.values())

    generator = torch.Generator().manual_seed(0)
    deals = [torch.randperm(len(categories), generator=generator).tolist() for _ in range(DEALS)]
    return mean(categories), statistics.fmean(mean([categories[i] for i in deal]) for deal in deals)


def examine(run, val):
    """Everything that is measured of one trained adapter."""
    args = train.parse_args(run["flags"])
    model, tokenizer = load_llama(args.weights, dtype=torch.float32)
    load_adapter(model, run["folder"] / "adapter.pt")
    model.eval()
    limit = args.max_seq_len or min(train.MAX_SEQ_LEN, model.args.max_seq_len)
    sequences, report = encode_records(val, tokenizer, limit)
    for place, sequence in enumerate(sequences):
        sequence.record = place  # a record that did not fit leaves no gap
    # pools of one batch: random records side by side, or the gates would stay among their like
    batches = length_batches(sequences, BATCH, torch.Generator().manual_seed(0), pool=1)
    sums, tokens, entropy = gate_sums(model, batches, args, len(sequences))
    mean = {name: (own.sum(0) / tokens.sum()).float() for name, own in sums.items()}
    changes = {"learned": lambda name, w, real: w, "uniform": uniform,
               "constant": lambda name, w, real: mean[name].expand_as(w), "shuffled": shuffled}
    changes |= {f"less head {i + 1}": without_head(i) for i in range(args.heads)}
    categories = [sequence.category for sequence in sequences]
    found, chance = information(sums, categories)
    each = by_category(tokens, categories)[:, None]
    return {"loss": {key: loss_with(model, batches, args, change)
                     for key, change in changes.items()},
            "information": found, "by_chance": chance, "records": report,
            "entropy": sum(entropy.values()) / len(entropy),
            "gate": {name: (by_category(own, categories) / each).tolist()
                     for name, own in sums.items()},
            "categories": sorted(set(categories))}


def tables(found, heads):
    """[loss by what is done to the gate, routing], each a Markdown table."""
    def losses(key):
        return [one["loss"][key] for one in found]

    rows = []
    for key in found[0]["loss"]:
        change = None if key == "learned" else difference(losses(key), losses("learned"))
        rows.append([key, show(interval(losses(key))), signed(change)])
    rows.append(["the head missed least", *least(found)])
    says = {"entropy of a token's gate (1: uniform, 0: one head)": "entropy",
            "information of head and category (bits)": "information",
            "the same by chance (bits)": "by_chance"}
    return [common.markdown([f"gate of {heads} heads, after training", "validation loss",
                             "minus learned"], rows),
            common.markdown(["mean over the layers", "value"],
                            [[text, show(interval(one[key] for one in found))]
                             for text, key in says.items()])]


def least_costs(found):
    """Of each seed: (loss without the head that is missed least, loss with all)."""
    return [(min(loss for key, loss in one["loss"].items() if key.startswith("less head")),
             one["loss"]["learned"]) for one in found]


def least(found):
    without, whole = zip(*least_costs(found))
    return show(interval(without)), signed(difference(without, whole))


def make_claims(found):
    learned = [one["loss"]["learned"] for one in found]

    def costs(key):
        return difference([one["loss"][key] for one in found], learned)

    without, whole = zip(*least_costs(found))
    return [claim("the routing is used: a uniform gate costs loss", costs("uniform")),
            claim("more than fixed weights: a constant gate costs loss", costs("constant")),
            claim("it goes by the token: a shuffled gate costs loss", costs("shuffled")),
            claim("every head is needed: the one missed least costs loss",
                  difference(without, whole)),
            claim("heads specialise: they say more of the category than by chance (bits)",
                  difference([one["information"] for one in found],
                             [one["by_chance"] for one in found]))]


def draw_routing(pyplot, one):
    """Categories by heads, layer beside layer, of the first seed; darker is more."""
    names = list(one["gate"])
    whole = torch.cat([torch.tensor(one["gate"][name]) for name in names], dim=1)  # (C, layers * N)
    heads = len(one["gate"][names[0]][0])
    figure, axes = pyplot.subplots(figsize=(10, 3.6), layout="constrained")
    image = axes.imshow(whole.numpy(), aspect="auto", cmap="Greys", vmin=0, vmax=1)
    for i in range(1, len(names)):
        axes.axvline(i * heads - 0.5, color="tab:blue", linewidth=1)
    axes.set_yticks(range(len(whole)), [name or "all" for name in one["categories"]])
    axes.set_xticks([i * heads + (heads - 1) / 2 for i in range(len(names))],
                    [f"{name.split('.')[1]} {name.split('.')[-1]}" for name in names],
                    rotation=90, fontsize=8)
    axes.set_xlabel(f"layer and matrix, {heads} heads each")
    axes.set_ylabel("category")
    figure.colorbar(image, label="mean gate (0 to 1)")
    return figure


def main(argv=None):
    p = common.parser("routing", __doc__, seeds=5, epochs=1, records=common.MIXED)
    p.add_argument("--heads", type=int, default=3, help="of HydraLoRA, at rank 8 (3)")
    args, records, val = common.prepare(p, argv)
    if args.heads < 2:
        p.error("--heads must be at least 2: a single head has nothing to route")
    configs = {"HydraLoRA": hydra(args.heads)}
    tried = common.tune({name: (config, [records]) for name, config in configs.items()}, args)
    runs = common.run_seeds(configs, tried, args, records, val)["HydraLoRA"]
    found = [common.remember(run["folder"] / "routing.json", [BATCH, DEALS],
                             lambda run=run: examine(run, val)) for run in runs]
    claims = make_claims(found)
    common.write_results(
        args, "routing", {"conditions": common.conditions(args, records, val), "heads": args.heads,
                          "sweep": tried, "seeds": found, "claims": claims},
        [*tables(found, args.heads), common.claims_table(claims), common.rates_table(tried)],
        lambda pyplot: draw_routing(pyplot, found[0]))
    return 0


if __name__ == "__main__":
    sys.exit(common.run_experiment("routing", main, None))
