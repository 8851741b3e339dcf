"""The choices that people argue over: other routers, gates, losses, rates and scales, one by one.

    python -m experiments.choices --part a        # one letter, some 40 minutes on two cores
    python -m experiments.choices                 # all of them

Each variant is HydraLoRA 3x8 (or what its claim names) with one thing changed, as a fork would: a
subclass of the layer, a hook on its gate, another step. On the embedded world, each with a sweep
of its own, on the feed-forward layers and on wq,wv. The same command started a second time, on
another core, takes the runs that the first has not begun.
"""

import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import train
from data.corpus import collate, encode_records, train_val_split
from experiments import common, report
from experiments.common import SCALE
from hydralora import HydraLinear, hydra_layers, record_gates
from model import load_llama
from support import files
from support.evaluation import target_logits

PRIMARY = "wq,wv: HydraLoRA 3x8 ahead of the same with a frozen random router"
LAYERS = {"feed-forward": ("w1", "w2", "w3"), "wq,wv": ("wq", "wv")}
HYDRA, MATCHED, RANDOM = "HydraLoRA 3x8", "LoRA, matched", "frozen random router"
DROPOUT = 0.1  # of (c)
SPREAD = 2.0  # standard deviation of the scores behind drawn gates: as uneven as learned ones


# ---------------------------------------------------------------- the layers of a fork


class RouterOnRank(HydraLinear):
    """The router reads A x: the dimension in the paper's equation. router (N, R)."""

    def project(self, x):
        z = F.linear(x, self.lora_A)
        return z, F.linear(z, self.router)


class DropoutPerHead(HydraLinear):
    """A uniform gate, whose heads differ by a dropout mask on x of their own."""

    def project(self, x):
        heads = self.settings.heads
        z = [F.linear(F.dropout(x, DROPOUT, self.training), self.lora_A) for _ in range(heads)]
        return torch.cat(z, -1), x.new_zeros(*x.shape[:-1], heads)


class TopK(HydraLinear):
    """The k largest weights; renormalised, but for k = 1, where a weight of 1 would leave the
    router without a gradient."""

    def gate(self, scores):
        w = super().gate(scores)
        w = w * torch.zeros_like(w).scatter(-1, w.topk(self.k, -1).indices, 1)
        return w if self.k == 1 else w / w.sum(-1, keepdim=True)


# ---------------------------------------------------------------- what a variant changes
# change(model, lr) returns arguments of common.train_here


def become(kind, model, lr, **attributes):
    """Every layer becomes one of a subclass."""
    for layer in hydra_layers(model).values():
        layer.__class__ = kind
        vars(layer).update(attributes)
    return {}


def router_on_rank(model, lr):
    for layer in hydra_layers(model).values():
        shape, bound = (layer.settings.heads, layer.settings.rank), layer.settings.rank ** -0.5
        layer.router = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
    return become(RouterOnRank, model, lr)


def freeze(name, model, lr):
    """lora_A or the router stays as it was drawn."""
    for layer in hydra_layers(model).values():
        getattr(layer, name).requires_grad_(False)
    return {}


def drawn_gates(model, lr):
    """A gate for each position and layer, the same whatever the token."""
    generator = torch.Generator().manual_seed(0)
    for layer in hydra_layers(model).values():
        scores = torch.randn(model.args.max_seq_len, layer.settings.heads, generator=generator)
        drawn = (SPREAD * scores).softmax(-1)

        def act(_, __, gate, drawn=drawn):
            return drawn[:gate.shape[1]].expand_as(gate)

        layer.gate_out.register_forward_hook(act)
    return {}


def gates_of_another(model, lr):
    """Each record has the gates of the one before it in its batch, position by position."""
    for layer in hydra_layers(model).values():
        layer.gate_out.register_forward_hook(lambda _, __, gate: gate.roll(1, 0))
    return {}


def balance(gates, mask):
    """N * sum of the squares of the heads' mean weights over the tokens, the mean over the layers:
    1 if all heads have the same share. gates {layer: (B, T, N)}, mask (B, T)."""
    means = torch.stack([gate[mask].mean(0) for gate in gates.values()])  # (layers, N)
    return (means.shape[1] * means.square().sum(-1)).mean()


def balanced_step(model, batches, optimizer, scaler, *, clip, precision, weight):
    """train.train_step of one micro-batch, with the balance in the loss; nothing is clipped."""
    [sequences] = batches
    batch = collate(sequences)
    with record_gates(model) as gates:
        loss = F.cross_entropy(target_logits(model, batch), batch.labels)
        (loss + weight * balance(gates, batch.attention_mask)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), torch.zeros(())


def balanced(weight, model, lr):
    return {"step": partial(balanced_step, weight=weight)}


def lora_plus(ratio, model, lr):
    """B's rate is ratio times that of A and the router."""
    optimizer = train.make_optimizer(model, lr=lr)
    [group] = optimizer.param_groups
    b = {id(layer.lora_B) for layer in hydra_layers(model).values()}
    rest = [p for p in group["params"] if id(p) not in b]
    groups = [{"params": rest, "peak_lr": lr}, {
        "params": [p for p in group["params"] if id(p) in b], "peak_lr": ratio * lr}]
    return {"optimizer": torch.optim.AdamW(groups, lr=lr, betas=train.BETAS, weight_decay=0.0,
                                           fused=True)}


CHANGES = {
    RANDOM: partial(freeze, "router"), "gates drawn per position": drawn_gates,
    "gates of another record": gates_of_another, "router on A x": router_on_rank,
    "A frozen": partial(freeze, "lora_A"),
    "uniform gate, dropout per head": partial(become, DropoutPerHead),
    "top 1": partial(become, TopK, k=1), "top 2": partial(become, TopK, k=2),
    **{f"balance loss {weight:g}": partial(balanced, weight) for weight in (1e-4, 1e-2, 1.0)},
    **{f"B's rate times {ratio}": partial(lora_plus, ratio) for ratio in (4, 16)}}


# ---------------------------------------------------------------- arms and claims


def shape(heads, rank, **more):
    return {"heads": heads, "rank": rank, "alpha": SCALE * rank, **more}


def variants(matched):
    """{part: {name: (reference, settings, change or None)}}; a reference is without a change."""
    hydra, lora = shape(3, 8), shape(1, matched)

    def root(heads, rank):  # alpha / sqrt(r) of the authors' alpha, for the layer's alpha / r
        return {**shape(heads, rank), "alpha": 32 * rank ** 0.5}

    def of(settings, reference, *names):
        return {f"{reference}, {name}": (reference, settings, name) for name in names}

    return {
        "gate": of(hydra, HYDRA, RANDOM, "gates drawn per position", "gates of another record"),
        "a": of(hydra, HYDRA, "router on A x"),
        "b": {**of(hydra, HYDRA, "A frozen"), **of(lora, MATCHED, "A frozen")},
        "c": of({**hydra, "gate": "uniform"}, HYDRA, "uniform gate, dropout per head"),
        "d": {**of(hydra, HYDRA, "top 1", "top 2"), **of(shape(8, 8), "HydraLoRA 8x8", "top 2")},
        "e": of(hydra, HYDRA, *(name for name in CHANGES if name.startswith("balance"))),
        "f": {**of(hydra, HYDRA, "B's rate times 4", "B's rate times 16"),
              **of(lora, MATCHED, "B's rate times 4", "B's rate times 16")},
        "g": {f"{name}, alpha / sqrt(r)": (name, root(heads, rank), None)
              for name, (heads, rank) in {"LoRA r8": (1, 8), "LoRA r32": (1, 32), HYDRA: (3, 8),
                                          "HydraLoRA 3x32": (3, 32)}.items()}}


def make_arms(parts, matched):
    """{(name, layers): {"settings", "change"}} of the parts and of what they are compared with;
    matched {layers: rank}."""
    found = {}
    for layers, targets in LAYERS.items():
        known = {HYDRA: shape(3, 8), MATCHED: shape(1, matched[layers]),
                 "HydraLoRA 8x8": shape(8, 8), "LoRA r8": shape(1, 8), "LoRA r32": shape(1, 32),
                 "HydraLoRA 3x32": shape(3, 32)}
        for part in parts:
            for name, (reference, settings, change) in variants(matched[layers])[part].items():
                for arm, own, changed in ((reference, known[reference], None),
                                          (name, settings, change)):
                    found[arm, layers] = {"settings": {**own, "targets": list(targets)},
                                          "change": changed}
    return found


def make_claims(parts, runs):
    """Every variant ahead of its reference; for the gates the learned one is."""
    found = {}
    for layers in LAYERS:
        for part in parts:
            for name, (reference, *_) in variants(1)[part].items():
                a, b = (common.values(runs[arm, layers]) for arm in (reference, name))
                change = name.removeprefix(f"{reference}, ")
                if part == "gate":
                    text = f"{layers}: {reference} ahead of the same with {change}"
                    text = PRIMARY if (layers, change) == ("wq,wv", RANDOM) else text
                    found[text] = report.loss_difference(b, a)
                else:
                    found[f"{layers}: {name} ahead of {reference}"] = report.loss_difference(a, b)
    return report.judge(found, PRIMARY, __file__)


# ---------------------------------------------------------------- runs


def compute(spec, model, parts, **options):
    """A run; its loss on the held-out records may be None: not finite."""
    training, measured = parts[spec["part"]]

    def measure():
        try:
            return common.measure_here(model, measured)
        except ValueError:
            if spec["part"] != "sweep":
                raise
            return {"val_loss": None}

    return common.run_here(spec, model, training, measure, CHANGES.get(spec["change"]), **options)


def make_table(rows):
    return report.markdown(
        ["variant", "layers", "rate", "trainable", "validation loss"],
        [[row["name"], row["layers"], row["rate"], row["trainable"], row["val_loss"]]
         for row in rows])


def parse_args(argv):
    p = common.parser("choices", __doc__, seeds=5, epochs=1, records=common.MIXED, rates=None,
                      sweep_epochs=None)
    common.add_rates_flag(p, common.RATES)
    p.add_argument("--part", nargs="+", choices=variants(1), default=list(variants(1)),
                   help="the variants to run: the gate's controls, or a letter (all)")
    return common.parse_args(p, argv)


def run(args):
    torch.set_num_threads(1)
    records, val = common.load_records(args)
    model, tokenizer = load_llama(args.weights, dtype=torch.float32)
    longest = args.max_seq_len or min(train.MAX_SEQ_LEN, model.args.max_seq_len)
    training, held_out = train_val_split(records, common.SHARE, seed=0)
    parts = {part: [encode_records(own, tokenizer, longest)[0] for own in pair]
             for part, pair in (("sweep", (training, held_out)), ("val", (records, val)))}
    arms = make_arms(args.part, {layers: common.matched_rank(args, targets=",".join(targets))
                                 for layers, targets in LAYERS.items()})
    fixed = {"weights": files.weights_fingerprint(args.weights), "epochs": args.epochs,
             "max_steps": args.max_steps,
             "records": files.digest([[s.ids for s in own] for pair in parts.values()
                                      for own in pair])}

    seeds = range(args.first_seed, args.first_seed + args.seeds)
    tried, runs = common.tune_and_run_here(
        arms, args, seeds, fixed, args.runs / "choices",
        partial(compute, model=model, parts=parts, max_steps=args.max_steps, epochs=args.epochs))
    rows = [{"name": name, "layers": layers, **common.make_row(runs[name, layers], ["val_loss"])}
            for name, layers in arms]
    claims = make_claims(args.part, runs)
    tried = {", ".join(arm): own for arm, own in tried.items()}
    conditions = {**common.conditions(args, records, val), "parts": args.part}
    names = [f"{row['name']}, {row['layers']}" for row in rows]
    report.write_results(
        args, "choices",
        {"conditions": conditions, "data": {part: [len(own) for own in pair]
                                            for part, pair in parts.items()},
         "configs": {", ".join(arm): own for arm, own in arms.items()}, "sweep": tried,
         "rows": rows, "claims": claims},
        [make_table(rows), report.claims_text(claims), common.rates_table(tried)],
        lambda pyplot: report.points_chart(
            pyplot, names, {"validation loss": [row["val_loss"] for row in rows]}))


if __name__ == "__main__":
    sys.exit(common.main("choices", parse_args, run))
