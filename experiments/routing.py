"""Is the router of HydraLoRA used, and do its heads specialise? Where tokens go, with controls.

Of trained adapters (those of table1): the mean gate by head, category and layer; its entropy; and
the mutual information between head and category. Its control is an untrained router, which reads
the same inputs of the same trained layers: as it was drawn, and with the trained one's norm.

Described, not claimed, is the validation loss with a trained part changed: what was trained
together is missed together. The gate is made

    uniform      1 / N for every token
    constant     each layer's own mean gate, for every token
    shuffled     that of another token of 32 random records, the same one in every layer
    less head i  that head's weight zero in all layers, the others renormalised to sum to 1

and beside it a LoRA of the same size loses a part of its rank. What a gate is worth that is absent
from the start is a row of table1: the gate uniform during training.

    python -m experiments.routing    # no run of its own after table1

Shapes: M records, C categories, N heads, B batch, T tokens.
"""

import math
import statistics
import sys
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F

from data.corpus import collate, encode_records, length_batches
from experiments import common
from experiments.common import hydra, lora
from experiments.report import (
    claim,
    claims_text,
    difference,
    interval,
    judged,
    markdown,
    show,
    signed,
    write_results,
)
from hydralora import hydra_layers
from support.evaluation import batch_gates, gate_entropy, label_losses

PRIMARY = "heads specialise: they say more of the category than an untrained router of their norm"
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
        real = collate(batch).attention_mask
        with changed_gates(model, lambda name, w, real=real: change(name, w, real)):
            losses, _ = label_losses(model, batch, args)
        total += losses.sum().item()
        count += len(losses)
    return total / count


def unchanged(name, w, real):
    return w


def uniform(name, w, real):
    return torch.full_like(w, 1 / w.shape[-1])


def constant(sums, tokens):
    """Each layer's mean gate, of what gate_sums returns."""
    mean = {name: (own.sum(0) / tokens.sum()).float() for name, own in sums.items()}
    return lambda name, w, real: mean[name].expand_as(w)


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


@contextmanager
def less_rank(model, part, parts):
    """Inside, this one of so many equal parts of every LoRA's rank is zero."""
    before = {layer: layer.lora_B.detach().clone() for layer in hydra_layers(model).values()}
    with torch.no_grad():
        for layer in before:
            layer.lora_B.tensor_split(parts, dim=-1)[part].zero_()
        try:
            yield
        finally:
            for layer, b in before.items():
                layer.lora_B.copy_(b)


# ---------------------------------------------------------------- what a gate says


def batches_of(sequences):
    """Pools of one batch: random records side by side, or the gates would stay among their like."""
    for place, sequence in enumerate(sequences):
        sequence.record = place  # a record that did not fit leaves no gap
    return length_batches(sequences, BATCH, torch.Generator().manual_seed(0), pool=1)


def gates_by(routers):
    """Like batch_gates, with the gates that these routers {layer name: (N, I)} would give for the
    inputs of the trained layers, whose own gates act."""
    def gates_of(model, batch, args):
        tokens, real = collate(batch)[:2]
        found = {}
        with ExitStack() as after:
            for name, layer in hydra_layers(model).items():
                def note(layer, inputs, name=name):
                    found[name] = layer.gate(F.linear(inputs[0], routers[name]))
                after.callback(layer.register_forward_pre_hook(note).remove)
            model.hidden_states(tokens)
        return found, real
    return gates_of


@torch.no_grad()
def gate_sums(model, batches, args, gates_of=batch_gates):
    """({layer: (M, N) gates summed over a record's tokens}, tokens (M,), {layer: mean entropy of a
    token's gate, 1 = uniform})."""
    layers, count = hydra_layers(model), sum(map(len, batches))
    tokens = torch.zeros(count, dtype=torch.float64)
    sums = {name: torch.zeros(count, layer.settings.heads, dtype=torch.float64)
            for name, layer in layers.items()}
    entropy = dict.fromkeys(layers, 0.0)
    for batch in batches:
        gates, real = gates_of(model, batch, args)
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


def untrained(run, layers):
    """{kind: {layer name: router}}: as it was drawn, and as long as the trained one."""
    start = {name: layer.router.detach() for name, layer in
             common.starting_layers(run["flags"]).items()}
    return {"as drawn": start,
            "of the trained norm": {name: router * layers[name].router.norm() / router.norm()
                                    for name, router in start.items()}}


def examine(run, val):
    """Everything that is measured of one trained adapter of HydraLoRA."""
    model, tokenizer, args, limit = common.trained_model(run)
    sequences, report = encode_records(val, tokenizer, limit)
    batches, categories = batches_of(sequences), [s.category for s in sequences]
    sums, tokens, entropy = gate_sums(model, batches, args)
    changes = {"learned": unchanged, "uniform": uniform, "constant": constant(sums, tokens),
               "shuffled": shuffled}
    changes |= {f"less head {i + 1}": without_head(i) for i in range(args.heads)}
    found, chance = information(sums, categories)
    control = {kind: information(gate_sums(model, batches, args, gates_by(routers))[0],
                                 categories)[0]
               for kind, routers in untrained(run, hydra_layers(model)).items()}
    each = by_category(tokens, categories)[:, None]
    return {"loss": {key: loss_with(model, batches, args, change)
                     for key, change in changes.items()},
            "information": found, "by_chance": chance, "untrained": control, "records": report,
            "entropy": sum(entropy.values()) / len(entropy),
            "gate": {name: (by_category(own, categories) / each).tolist()
                     for name, own in sums.items()},
            "categories": sorted(set(categories))}


def examine_lora(run, val, parts):
    """The control of "less head": {"whole", "less part 1" and so on: loss} of one trained LoRA."""
    model, tokenizer, args, limit = common.trained_model(run)
    batches = batches_of(encode_records(val, tokenizer, limit)[0])
    losses = {"whole": loss_with(model, batches, args, unchanged)}
    for part in range(parts):
        with less_rank(model, part, parts):
            losses[f"less part {part + 1}"] = loss_with(model, batches, args, unchanged)
    return {"loss": losses}


def loss_rows(found):
    """Loss by what is done to a trained adapter, the least harm of a removed part last."""
    whole, *changed = found[0]["loss"]
    seeds = [{**one["loss"], "the one missed least": min(
        loss for key, loss in one["loss"].items() if key.startswith("less"))} for one in found]
    learned = [one[whole] for one in seeds]
    return [[whole, show(interval(learned)), "-"]] + [
        [key, show(interval(one[key] for one in seeds)),
         signed(difference([one[key] for one in seeds], learned))]
        for key in (*changed, "the one missed least")]


def tables(found, control, heads):
    """[loss by what is done to the gate, the same of LoRA, routing], each a Markdown table."""
    says = {"entropy of a token's gate (1: uniform, 0: one head)": lambda one: one["entropy"],
            "information of head and category (bits)": lambda one: one["information"],
            **{f"the same of an untrained router, {kind} (bits)":
               lambda one, kind=kind: one["untrained"][kind] for kind in found[0]["untrained"]},
            "the same by chance (bits)": lambda one: one["by_chance"]}
    return [markdown([f"gate of {heads} heads, after training", "validation loss",
                      "minus learned"], loss_rows(found)),
            markdown([f"LoRA, matched, its rank in {heads} parts", "validation loss",
                      "minus whole"], loss_rows(control)),
            markdown(["mean over the layers", "value"],
                     [[text, show(interval(map(value, found)))] for text, value in says.items()])]


def make_claims(found):
    def above(kind):
        return difference([one["information"] for one in found],
                          [one["untrained"][kind] for one in found])

    return judged([claim(PRIMARY, above("of the trained norm"), primary=True),
                   claim("heads say more of the category than the router as it was drawn (bits)",
                         above("as drawn"))], __file__)


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
    configs = {"HydraLoRA": hydra(args.heads), "LoRA, matched": lora(common.matched_rank(args))}
    tried = common.tune({name: (config, [records]) for name, config in configs.items()}, args)
    runs = common.run_seeds(configs, tried, args, records, val)
    found = [common.remember(run["folder"] / "routing.json", [BATCH, DEALS],
                             lambda run=run: examine(run, val)) for run in runs["HydraLoRA"]]
    control = [common.remember(run["folder"] / "routing.json", [BATCH, args.heads],
                               lambda run=run: examine_lora(run, val, args.heads))
               for run in runs["LoRA, matched"]]
    again, claims = common.rerun("HydraLoRA", runs["HydraLoRA"], args), make_claims(found)
    write_results(
        args, "routing", {"conditions": common.conditions(args, records, val), "heads": args.heads,
                          "sweep": tried, "seeds": found, "control": control, "rerun": again,
                          "claims": claims},
        [*tables(found, control, args.heads), common.rerun_text(again), claims_text(claims),
         common.rates_table(tried)],
        lambda pyplot: draw_routing(pyplot, found[0]))
    return 0


if __name__ == "__main__":
    sys.exit(common.run_experiment("routing", main, None))
