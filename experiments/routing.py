"""Is the router of HydraLoRA used, and do its heads specialise? Where tokens go, with controls.

Of trained adapters (those of table1): the mean gate by head, category and layer, its entropy, and
the mutual information between head and category. The control is an untrained router in the same
trained layers: as it was drawn, and with the trained one's norm. Described, not claimed, is the
validation loss with a part changed, since removing any part of a jointly trained adapter hurts:
the gate 1 / N for every token (uniform), each layer's mean (constant), that of another token of
32 random records (shuffled), one head's zero and the others renormalised (less head i); and, for
comparison, a LoRA of the same size that loses a part of its rank.

    python -m experiments.routing    # no run of its own after table1

Shapes: M records, C categories, N heads, B batch, T tokens, I inputs of a layer.
"""

import math
import statistics
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F

from data.corpus import collate, encode_records, length_batches
from experiments import common, report
from experiments.common import hydra, lora
from hydralora import hydra_layers, record_gates
from support.evaluation import gate_entropy, target_logits

PRIMARY = "heads specialise: they say more of the category than an untrained router of their norm"
HYDRA, LORA = "HydraLoRA", "LoRA, matched"
BATCH = 32  # records whose tokens exchange their gates
DEALS = 20  # random deals of the categories behind the mutual information by chance


def make_batches(sequences):
    """Batches of random records, or the gates would be exchanged among records of like length.
    The records are numbered anew: one that did not fit leaves no gap."""
    numbered = [replace(sequence, record=i) for i, sequence in enumerate(sequences)]
    return length_batches(numbered, BATCH, torch.Generator().manual_seed(0), pool=1)


# ---------------------------------------------------------------- the loss of a changed adapter


@torch.no_grad()
def loss_with(model, batches, change):
    """Mean loss per target token with the gates change(layer name, gate (B, T, N), attention
    mask (B, T))."""
    total = 0.0
    count = 0
    for batch in map(collate, batches):
        with ExitStack() as hooks:
            for name, layer in hydra_layers(model).items():
                def act(_, __, gate, name=name, mask=batch.attention_mask):
                    return change(name, gate, mask)
                hooks.callback(layer.gate_out.register_forward_hook(act).remove)
            logits = target_logits(model, batch)
        total += F.cross_entropy(logits, batch.labels, reduction="sum").item()
        count += len(batch.labels)
    return total / count


def unchanged(name, gate, mask):
    return gate


def uniform_gate(name, gate, mask):
    return torch.full_like(gate, 1 / gate.shape[-1])


def constant_gate(sums, tokens):
    """Each layer's mean gate, of what gate_sums returns."""
    mean = {name: (own.sum(0) / tokens.sum()).float() for name, own in sums.items()}
    return lambda name, gate, mask: mean[name].expand_as(gate)


def shuffled(name, gate, mask):
    """The gates of the tokens that are not padding, permuted; alike in every layer."""
    own = gate[mask]  # (B, T, N) -> (tokens, N)
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(0))
    gate = gate.clone()
    gate[mask] = own[order]
    return gate


def without_head(head):
    def change(name, gate, mask):
        gate = gate.clone()
        gate[..., head] = 0
        return gate / gate.sum(-1, keepdim=True).clamp_min(1e-12)
    return change


@contextmanager
def less_rank(model, part, parts):
    """Within this context one of so many equal parts of every LoRA's rank is zero."""
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


def acting_gates(model, batch):
    """{layer name: gate (B, T, N)} of a forward pass."""
    with record_gates(model) as gates:
        model.hidden_states(batch.tokens)
    return gates


def gates_of(routers):
    """Like acting_gates, with the gates that these routers {layer name: (N, I)} would give for
    the inputs of the trained layers, whose own gates act."""
    def gates(model, batch):
        found = {}
        with ExitStack() as hooks:
            for name, layer in hydra_layers(model).items():
                def add(layer, inputs, name=name):
                    found[name] = layer.gate(F.linear(inputs[0], routers[name]))
                hooks.callback(layer.register_forward_pre_hook(add).remove)
            model.hidden_states(batch.tokens)
        return found
    return gates


@torch.no_grad()
def gate_sums(model, batches, gates=acting_gates):
    """({layer: (M, N) gates summed over a record's tokens}, tokens (M,), {layer: mean entropy of
    a token's gate, 1 = uniform})."""
    heads = {name: layer.settings.heads for name, layer in hydra_layers(model).items()}
    count = sum(map(len, batches))
    tokens = torch.zeros(count, dtype=torch.float64)
    sums = {name: torch.zeros(count, n, dtype=torch.float64) for name, n in heads.items()}
    entropy = dict.fromkeys(heads, 0.0)
    for sequences in batches:
        batch = collate(sequences)
        records = [sequence.record for sequence in sequences]
        tokens[records] = batch.attention_mask.sum(1).double()
        for name, gate in gates(model, batch).items():
            gate = gate * batch.attention_mask[..., None]
            sums[name][records] = gate.sum(1).double()
            entropy[name] += gate_entropy(gate)
    most = {name: tokens.sum().item() * math.log(n) for name, n in heads.items()}
    return sums, tokens, {name: entropy[name] / most[name] for name in heads}


def by_category(values, categories):
    """(C, ...): rows of values summed by category, in alphabetical order."""
    names = sorted(set(categories))
    index = torch.tensor([names.index(category) for category in categories])
    sums = torch.zeros(len(names), *values.shape[1:], dtype=values.dtype)
    return sums.index_add(0, index, values)


def mutual_information(table):
    """Bits that row and column say of each other, of a table of counts or weights."""
    p = table.double() / table.sum()
    independent = p.sum(1, keepdim=True) * p.sum(0)
    return (p * (p / independent).log2()).nan_to_num(0).sum().item()


def information(sums, categories):
    """(mean over the layers, the same by chance) in bits, between head and category of a
    token."""
    def mean(labels):
        return statistics.fmean(mutual_information(by_category(own, labels))
                                for own in sums.values())

    generator = torch.Generator().manual_seed(0)
    deals = [torch.randperm(len(categories), generator=generator) for _ in range(DEALS)]
    chance = statistics.fmean(mean([categories[i] for i in deal.tolist()]) for deal in deals)
    return mean(categories), chance


def untrained_routers(run, layers):
    """{kind: {layer name: router}}: as it was drawn, and scaled to the trained one's norm."""
    start = hydra_layers(common.starting_model(run["args"])[0])
    drawn = {name: layer.router.detach() for name, layer in start.items()}
    scaled = {name: router * layers[name].router.norm() / router.norm()
              for name, router in drawn.items()}
    return {"as drawn": drawn, "of the trained norm": scaled}


def examine(run, val):
    """Everything that is measured of one trained adapter of HydraLoRA."""
    model, tokenizer = common.trained_model(run)
    sequences, counts = encode_records(val, tokenizer, run["settings"]["max_seq_len"])
    batches = make_batches(sequences)
    categories = [sequence.category for sequence in sequences]
    sums, tokens, entropy = gate_sums(model, batches)
    changes = {"learned": unchanged, "uniform": uniform_gate,
               "constant": constant_gate(sums, tokens), "shuffled": shuffled}
    changes |= {f"less head {i + 1}": without_head(i) for i in range(run["settings"]["heads"])}
    found, chance = information(sums, categories)
    control = {}
    for kind, routers in untrained_routers(run, hydra_layers(model)).items():
        control[kind], _ = information(gate_sums(model, batches, gates_of(routers))[0],
                                       categories)
    per_category = by_category(tokens, categories)[:, None]
    return {"loss": {key: loss_with(model, batches, change) for key, change in changes.items()},
            "information": found, "by_chance": chance, "untrained": control, "records": counts,
            "entropy": statistics.fmean(entropy.values()),
            "gate": {name: (by_category(own, categories) / per_category).tolist()
                     for name, own in sums.items()},
            "categories": sorted(set(categories))}


def examine_lora(run, val, parts):
    """The control of "less head": {"whole", "less part 1" and so on: loss} of a trained LoRA."""
    model, tokenizer = common.trained_model(run)
    batches = make_batches(encode_records(val, tokenizer, run["settings"]["max_seq_len"])[0])
    losses = {"whole": loss_with(model, batches, unchanged)}
    for part in range(parts):
        with less_rank(model, part, parts):
            losses[f"less part {part + 1}"] = loss_with(model, batches, unchanged)
    return {"loss": losses}


# ---------------------------------------------------------------- what is written


def loss_table(header, found):
    """Losses of a trained adapter with a part changed; last, that of the part whose removal
    hurts least."""
    losses = [dict(one["loss"]) for one in found]
    for one in losses:
        removed = [loss for key, loss in one.items() if key.startswith("less")]
        one["the one missed least"] = min(removed)
    whole, *changed = losses[0]
    trained = [one[whole] for one in losses]
    rows = [[whole, report.show(report.interval(trained)), "-"]]
    for key in changed:
        own = [one[key] for one in losses]
        rows.append([key, report.show(report.interval(own)),
                     report.signed(report.difference(own, trained))])
    return report.markdown([header, "validation loss", f"minus {whole}"], rows)


def routing_table(found):
    values = {"entropy of a token's gate (1: uniform, 0: one head)": "entropy",
              "information of head and category (bits)": "information"}
    rows = [[text, [one[key] for one in found]] for text, key in values.items()]
    for kind in found[0]["untrained"]:
        rows.append([f"the same of an untrained router, {kind} (bits)",
                     [one["untrained"][kind] for one in found]])
    rows.append(["the same by chance (bits)", [one["by_chance"] for one in found]])
    return report.markdown(["mean over the layers", "value"],
                           [[text, report.show(report.interval(own))] for text, own in rows])


def make_claims(found):
    def above(kind):
        return report.difference([one["information"] for one in found],
                                 [one["untrained"][kind] for one in found])

    secondary = "heads say more of the category than the router as it was drawn (bits)"
    return report.judge([report.claim(PRIMARY, above("of the trained norm"), primary=True),
                         report.claim(secondary, above("as drawn"))], __file__)


def draw_routing(pyplot, one):
    """Categories by heads, layer after layer, of the first seed; darker is more."""
    names = list(one["gate"])
    gates = torch.cat([torch.tensor(one["gate"][name]) for name in names], dim=1)  # (C, layers * N)
    heads = gates.shape[1] // len(names)
    figure, axes = pyplot.subplots(figsize=(10, 3.6), layout="constrained")
    image = axes.imshow(gates.numpy(), aspect="auto", cmap="Greys", vmin=0, vmax=1)
    for i in range(1, len(names)):
        axes.axvline(i * heads - 0.5, color="tab:blue", linewidth=1)
    axes.set_yticks(range(len(gates)), [name or "all" for name in one["categories"]])
    axes.set_xticks([i * heads + (heads - 1) / 2 for i in range(len(names))],
                    [f"{name.split('.')[1]} {name.split('.')[-1]}" for name in names],
                    rotation=90, fontsize=8)
    axes.set_xlabel(f"layer and matrix, {heads} heads each")
    axes.set_ylabel("category")
    figure.colorbar(image, label="mean gate (0 to 1)")
    return figure


def parse_args(argv):
    p = common.parser("routing", __doc__, seeds=5, epochs=1, records=common.MIXED)
    p.add_argument("--heads", type=int, default=3, help="heads of HydraLoRA, at rank 8 (3)")
    args = common.parse_args(p, argv)
    if args.heads < 2:
        p.error("--heads must be at least 2: a single head has nothing to route")
    return args


def run(args):
    records, val = common.load_records(args)
    configs = {HYDRA: hydra(args.heads), LORA: lora(common.matched_rank(args))}
    tried = common.tune({name: (config, [records]) for name, config in configs.items()}, args)
    runs = common.run_seeds(configs, common.steady_rates(tried), args, records, val)

    def examine_all(name, key, examine):
        return [common.cached(run["folder"] / "routing.json", key, lambda run=run: examine(run))
                for run in runs[name]]

    found = examine_all(HYDRA, [BATCH, DEALS], lambda run: examine(run, val))
    control = examine_all(LORA, [BATCH, args.heads], lambda run: examine_lora(run, val, args.heads))
    common.publish(args, "routing", records, val,
                   {"heads": args.heads, "sweep": tried, "seeds": found, "control": control},
                   tables=[loss_table(f"gate of {args.heads} heads, after training", found),
                           loss_table(f"LoRA, matched, its rank in {args.heads} parts", control),
                           routing_table(found)],
                   again=common.rerun(HYDRA, runs[HYDRA], args), claims=make_claims(found),
                   more=[common.rates_table(tried)],
                   draw=lambda pyplot: draw_routing(pyplot, found[0]))


if __name__ == "__main__":
    sys.exit(common.main("routing", parse_args, run))
