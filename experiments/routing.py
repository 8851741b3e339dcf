"""Is the router of HydraLoRA used, and do its heads specialise? Where tokens go, with controls.

Of trained adapters (those of table1): the mean gate by head, category and layer, its entropy, and
the mutual information between head and category. The control is an untrained router in the same
trained layers: as it was drawn, and with the trained one's norm. Described, not claimed, is the
validation loss with a part changed, since removing any part of a jointly trained adapter hurts.

    python -m experiments.routing    # no run of its own after table1

Shapes: M records, C categories, N heads, B batch, T tokens, I inputs of a layer.
"""

import statistics
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from data.corpus import collate, encode_records, length_batches
from experiments import common, report
from experiments.common import hydra, lora
from hydralora import hydra_layers, record_gates
from support.evaluation import target_logits

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
    """One head's gate zero and the others renormalised."""
    def change(name, gate, mask):
        gate = gate.clone()
        gate[..., head] = 0
        return gate / gate.sum(-1, keepdim=True).clamp_min(1e-12)
    return change


# ---------------------------------------------------------------- what a gate says


@torch.no_grad()
def layer_inputs(model, batch):
    """{layer name: input (B, T, I)} of a forward pass."""
    found = {}
    with ExitStack() as hooks:
        for name, layer in hydra_layers(model).items():
            def add(_, inputs, name=name):
                found[name] = inputs[0]
            hooks.callback(layer.register_forward_pre_hook(add).remove)
        model.hidden_states(batch.tokens)
    return found


@torch.no_grad()
def gate_sums(model, batches, routers=None):
    """({layer: (M, N) gates summed over a record's tokens}, tokens (M,)). The gates are those that
    act, or those that other routers {layer: (N, I)} would give for the same inputs."""
    layers = hydra_layers(model)
    count = sum(map(len, batches))
    tokens = torch.zeros(count, dtype=torch.float64)
    sums = {name: torch.zeros(count, layer.settings.heads, dtype=torch.float64)
            for name, layer in layers.items()}
    for sequences in batches:
        batch = collate(sequences)
        records = [sequence.record for sequence in sequences]
        tokens[records] = batch.attention_mask.sum(1).double()
        for name, x in layer_inputs(model, batch).items():
            router = routers[name] if routers else layers[name].router
            gate = layers[name].gate(F.linear(x, router)) * batch.attention_mask[..., None]
            sums[name][records] = gate.sum(1).double()
    return sums, tokens


@torch.no_grad()
def effective_heads(model, batches):
    """1 / sum of w^2 of a token's gate w, its mean over tokens and layers: the number of heads
    that act, between 1 and N."""
    total, count = 0.0, 0
    for batch in map(collate, batches):
        with record_gates(model) as gates:
            model.hidden_states(batch.tokens)
        for gate in gates.values():
            acting = 1 / gate[batch.attention_mask].square().sum(-1)  # (tokens,)
            total += acting.sum().item()
            count += len(acting)
    return total / count


def mutual_information(table):
    """Bits that row and column say of each other, of a table of counts or weights."""
    p = table.double() / table.sum()
    independent = p.sum(1, keepdim=True) * p.sum(0)
    return (p * (p / independent).log2()).nan_to_num(0).sum().item()


def information(sums, categories):
    """(mean over the layers, the same by chance) in bits, between head and category of a
    token."""
    names = sorted(set(categories))
    belongs = F.one_hot(torch.tensor([names.index(name) for name in categories])).double()  # (M, C)

    def mean(belongs):
        return statistics.fmean(mutual_information(belongs.T @ own) for own in sums.values())

    generator = torch.Generator().manual_seed(0)
    chance = statistics.fmean(mean(belongs[torch.randperm(len(belongs), generator=generator)])
                              for _ in range(DEALS))
    return mean(belongs), chance


def untrained_routers(run, layers):
    """{kind: {layer name: router}}: as it was drawn, and scaled to the trained one's norm."""
    start = hydra_layers(common.starting_model(run["flags"])[0])
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
    sums, tokens = gate_sums(model, batches)
    changes = {"learned": unchanged, "uniform": uniform_gate,
               "constant": constant_gate(sums, tokens), "shuffled": shuffled}
    changes |= {f"less head {i + 1}": without_head(i) for i in range(run["settings"]["heads"])}
    found, chance = information(sums, categories)
    control = {}
    for kind, routers in untrained_routers(run, hydra_layers(model)).items():
        control[kind], _ = information(gate_sums(model, batches, routers)[0], categories)
    trained = run["routing"]  # what train.py measured on the same records
    return {"loss": {key: loss_with(model, batches, change) for key, change in changes.items()},
            "information": found, "by_chance": chance, "untrained": control, "records": counts,
            "entropy": statistics.fmean(trained["entropy"].values()),
            "effective": effective_heads(model, batches),
            "gate": {name: list(by.values()) for name, by in trained["gate"].items()},
            "categories": sorted(set(categories))}


@torch.no_grad()
def examine_lora(run, val, parts):
    """The control of "less head": {"whole", "less part 1" and so on: loss} of a trained LoRA that
    loses one of so many equal parts of its rank."""
    model, tokenizer = common.trained_model(run)
    batches = make_batches(encode_records(val, tokenizer, run["settings"]["max_seq_len"])[0])
    losses = {"whole": loss_with(model, batches, unchanged)}
    for part in range(parts):
        model, _ = common.trained_model(run)
        for layer in hydra_layers(model).values():
            layer.lora_B.tensor_split(parts, dim=-1)[part].zero_()
        losses[f"less part {part + 1}"] = loss_with(model, batches, unchanged)
    return {"loss": losses}


# ---------------------------------------------------------------- what is written


def loss_table(header, found):
    """Losses of a trained adapter with a part changed; last, that of the part whose removal
    hurts least."""
    losses = [dict(one["loss"]) for one in found]
    for one in losses:
        one["the one missed least"] = min(loss for key, loss in one.items()
                                          if key.startswith("less"))
    columns = {key: [one[key] for one in losses] for key in losses[0]}
    whole, *changed = columns
    rows = [[whole, report.interval(columns[whole]), None]]
    for key in changed:
        change = report.difference(columns[key], columns[whole])
        rows.append([key, report.interval(columns[key]), report.show(change, sign="+")])
    return report.markdown([header, "validation loss", f"minus {whole}"], rows)


def routing_table(found):
    rows = [["entropy of a token's gate (1: uniform, 0: one head)",
             [one["entropy"] for one in found]],
            ["effective heads of a token, 1 / sum of w^2", [one["effective"] for one in found]],
            ["information of head and category (bits)", [one["information"] for one in found]],
            *([f"the same of an untrained router, {kind} (bits)",
               [one["untrained"][kind] for one in found]] for kind in found[0]["untrained"]),
            ["the same by chance (bits)", [one["by_chance"] for one in found]]]
    return report.markdown(["mean over the layers", "value"],
                           [[text, report.interval(own)] for text, own in rows])


def make_claims(found):
    def above(kind):
        return report.difference([one["information"] for one in found],
                                 [one["untrained"][kind] for one in found])

    return report.judge({
        PRIMARY: above("of the trained norm"),
        "heads say more of the category than the router as it was drawn (bits)": above("as drawn")},
        PRIMARY, __file__)


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
    return common.parse_args(p, argv, heads=2)


def run(args):
    records, val = common.load_records(args)
    configs = {HYDRA: hydra(args.heads), LORA: lora(common.matched_rank(args))}
    tried, runs = common.tune_and_run(configs, args, records, val)

    found = [common.cached(run["folder"] / "routing.json", partial(examine, run, val))
             for run in runs[HYDRA]]
    control = [common.cached(run["folder"] / f"routing-{args.heads}.json",
                             partial(examine_lora, run, val, args.heads)) for run in runs[LORA]]
    common.publish(args, "routing", records, val,
                   {"heads": args.heads, "sweep": tried, "seeds": found, "control": control},
                   tables=[loss_table(f"gate of {args.heads} heads, after training", found),
                           loss_table(f"LoRA, matched, its rank in {args.heads} parts", control),
                           routing_table(found)],
                   again=common.rerun(HYDRA, runs[HYDRA], args), claims=make_claims(found),
                   draw=lambda pyplot: draw_routing(pyplot, found[0]))


if __name__ == "__main__":
    sys.exit(common.main("routing", parse_args, run))
