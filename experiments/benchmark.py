"""How fast a step is and what it costs: ours, the least it could be, and the known frameworks.

A random LLaMA of the 135M class (30 layers of width 576) takes training steps by every method in
turn, in one process, several rounds; the table shows medians and their ratios. With one thread a
step is timed by the processor time of this process, so other work on the machine hardly counts;
with more threads by the clock on the wall.

    OMP_NUM_THREADS=1 python -m experiments.benchmark --json benchmark.json

transformers and peft are compared with when they are installed (requirements-optional.txt). Dolly's
real lengths need --data and --tokenizer; without them the lengths are drawn to be like Dolly's.
"""

import argparse
import importlib.util
import platform
import random
import statistics
import time

import torch
import torch.nn.functional as F

import train
from data.corpus import Sequence, collate, encode_records, length_batches, read_records
from experiments.compare_dropout import masked_on_x
from experiments.growth import draw_growth, measure_growth
from hydralora import HydraLinear, add_hydralora, hydra_layers
from model import ModelArgs, Tokenizer, Transformer
from support.files import write_json

SIZE = dict(dim=576, n_heads=9, n_kv_heads=3, multiple_of=256, vocab_size=32000,  # FFN 1536
            max_seq_len=2048)
ALPHA, DROPOUT = 32.0, 0.05
PARTS = ("step", "memory", "dolly", "growth", "compile")
SCALER = torch.amp.GradScaler("cpu", enabled=False)
FRAMEWORKS = all(importlib.util.find_spec(name) for name in ("transformers", "peft"))


def clock():
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


# ---------------------------------------------------------------- the methods, one step each


class Ours:
    """This project's step on the base's own weights: hydralora.py and train.py as they are."""

    def __init__(self, base, *, flags=(), **settings):
        with torch.device("meta"):
            self.model = Transformer(base.args)
        self.model.load_state_dict(base.state_dict(), assign=True)  # shared, never copied
        add_hydralora(self.model, alpha=ALPHA, **{**dict(dropout=DROPOUT), **settings})
        self.model.train()
        self.args = train.parse_args(["--weights", "-", "--data", "-", "--device", "cpu", *flags])
        self.model.checkpoint_activations = self.args.checkpoint_activations
        self.optimizer = torch.optim.AdamW(train.trainable(self.model), lr=1e-4, weight_decay=0.0,
                                           fused=True)

    def step(self, batch):
        train.train_step(self.model, [batch], self.optimizer, SCALER, self.args)


class MaskOnX(Ours):
    """The dropout mask on x, at full width in every adapted layer."""

    def step(self, batch):
        with masked_on_x():
            super().step(batch)


class HeadEverywhere(Ours):
    """Head and loss at every position and at once, as is usual."""

    def step(self, batch):
        tokens, _, places, wanted = collate(batch)
        labels = torch.full((tokens.numel(),), -100)
        labels[places] = wanted
        F.cross_entropy(self.model(tokens).flatten(0, 1), labels).backward()
        torch.nn.utils.clip_grad_norm_(train.trainable(self.model), train.CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class PlainOptimizer(Ours):
    """AdamW one tensor and one operation at a time."""

    def __init__(self, base, **settings):
        super().__init__(base, **settings)
        self.optimizer = torch.optim.AdamW(train.trainable(self.model), lr=1e-4, weight_decay=0.0,
                                           foreach=False, fused=False)


class Floor(Ours):
    """The least that training below the first layer costs: the frozen model forward, head and loss
    at the targets, and the gradient with respect to the activations alone, from the loss down to
    the embedding's output. No adapter, no weight's gradient, no optimiser."""

    def __init__(self, base, flags=()):
        super().__init__(base, rank=1, heads=1, flags=flags)
        for name, layer in hydra_layers(self.model).items():
            self.model.set_submodule(name, layer.base)
        embedding = self.model.tok_embeddings
        embedding.register_forward_hook(lambda _, __, out: out.requires_grad_())

    def step(self, batch):
        train.backward(self.model, batch, 1, SCALER, self.args)


class Framework:
    """A model of `transformers` with its own loss, AdamW fused, the gradient clipped as ours is."""

    def __init__(self, model, step):
        self.model, self.take = model, step
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                           lr=1e-4, weight_decay=0.0, fused=True)

    def step(self, batch):
        self.take(self.model, batch, self.optimizer, train.CLIP)


def methods(base):
    """{name: method} of the step table."""
    hydra = dict(rank=8, heads=3)
    found = {"HydraLoRA 3 x 8": Ours(base, **hydra), "LoRA r24": Ours(base, rank=24, heads=1),
             "floor": Floor(base), "  mask on x": MaskOnX(base, **hydra),
             "  head at every position": HeadEverywhere(base, **hydra),
             "  optimiser not fused": PlainOptimizer(base, **hydra)}
    if FRAMEWORKS:
        found["looped HydraLoRA 3 x 8"], found["PEFT LoRA r24"] = frameworks(base)
    return found


def frameworks(base):
    from experiments.frameworks import looped_hydra, peft_lora, train_step
    common = dict(alpha=ALPHA, dropout=DROPOUT)
    return (Framework(looped_hydra(base.args, rank=8, heads=3, **common), train_step),
            Framework(peft_lora(base.args, rank=24, **common), train_step))


# ---------------------------------------------------------------- step: batch 2 x 256


def random_batch(rows, tokens, seed=0):
    """Sequences that make `tokens` positions a row, the loss on the second half (Dolly: 0.45)."""
    numbers = random.Random(seed)
    ids = [[numbers.randrange(3, SIZE["vocab_size"]) for _ in range(tokens + 1)]
           for _ in range(rows)]
    return [Sequence(row, tokens // 2 + 1, i, "") for i, row in enumerate(ids)]


def measure_steps(base, tokens, repeats):
    """{method: seconds of each round}; a first round of each is not counted."""
    batch = random_batch(2, tokens)
    # without the last token: transformers shifts the labels itself
    whole = [Sequence(s.ids[:-1], s.response_start, s.record, "") for s in batch]
    seconds = {}
    found = methods(base)
    for turn in range(repeats + 1):
        for name, method in found.items():
            started = clock()
            method.step(whole if isinstance(method, Framework) else batch)
            if turn:
                seconds.setdefault(name, []).append(clock() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = seconds["HydraLoRA 3 x 8"]  # compared round by round, as neighbours in time
    ratio = {name: statistics.median(a / b for a, b in zip(ours, values))
             for name, values in seconds.items()}
    print(f"\nstep, 2 x {tokens} tokens{'':9}seconds   tokens/s   HydraLoRA's time against it")
    for name, value in medians.items():
        print(f"{name:28}{value:9.3f}{2 * tokens / value:11.0f}{ratio[name]:15.2f}")
    print("indented: HydraLoRA 3 x 8 with one choice undone")
    return {"seconds": seconds, "profile": profile(found["HydraLoRA 3 x 8"], batch),
            "bounds": bounds(ratio)}


def bounds(ratio):
    """[[claim, value, relation, bound]] of HydraLoRA's time over that of the others."""
    claims = {"LoRA r24": ("HydraLoRA 3 x 8 over LoRA r24, time", "<=", 1.10),
              "floor": ("HydraLoRA 3 x 8 over the floor, time", "<=", 1.20),
              "looped HydraLoRA 3 x 8": ("HydraLoRA over the looped one, tokens/s", ">=", 1.8),
              "PEFT LoRA r24": ("HydraLoRA over PEFT's LoRA r24, tokens/s", ">=", 1.1)}
    return [[claim, ratio[name] if relation == "<=" else 1 / ratio[name], relation, bound]
            for name, (claim, relation, bound) in claims.items() if name in ratio]


def profile(method, batch):
    """{where: share of a step's time}, on a GPU of the time that its kernels take. A matrix product
    is the head's if a side of it is the vocabulary, an adapter's if a side of it is at most 64
    wide, else the base's."""
    vocab, gpu = method.model.args.vocab_size, method.args.device != "cpu"
    with torch.profiler.profile(record_shapes=True) as record:
        method.step(batch)
    share = {}
    for event in record.key_averages(group_by_input_shape=True):
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel: the operation that launched it has its time
        sides = {side for shape in event.input_shapes for side in shape}
        name = event.key
        if name in ("aten::mm", "aten::addmm", "aten::bmm"):
            where = ("head: products" if vocab in sides else
                     "adapters: products" if min(sides) <= 64 else "base: products")
        elif "attention" in name:
            where = "attention"
        elif "softmax" in name or "nll_loss" in name:
            where = "softmax of loss and gate"
        elif "dropout" in name or "bernoulli" in name:
            where = "dropout"
        elif "adam" in name or "foreach" in name:
            where = "optimiser, clipping"
        else:
            where = "the rest: norms, SwiGLU, rotary, additions"
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        share[where] = share.get(where, 0) + spent
    total = sum(share.values())
    share = {k: v / total for k, v in sorted(share.items(), key=lambda item: -item[1])}
    print("\nwhere the time of a HydraLoRA step goes (profiled)")
    for where, part in share.items():
        print(f"{where:45}{part:7.1%}")
    return share


# ---------------------------------------------------------------- memory: what the branch keeps


def kept_bytes(heads, tokens=512, inputs=576, outputs=1536):
    """Bytes that one adapted layer keeps for the backward pass beside its own weights."""
    torch.manual_seed(0)
    layer = HydraLinear(torch.nn.Linear(inputs, outputs, bias=False), rank=8, heads=heads,
                        dropout=DROPOUT).train()
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(torch.randn(tokens, inputs, requires_grad=True))
    del y  # alive until here, so that no address was used twice
    return sum(kept.values())


def measure_memory():
    kept = {heads: kept_bytes(heads) for heads in (1, 2, 4, 8, 16)}
    print("\nbytes kept for the backward pass by one adapted layer, 512 tokens, 576 -> 1536")
    for heads, size in kept.items():
        print(f"{heads:3} heads{size / 2**20:9.2f} MiB{size / kept[1]:8.2f}")
    return {"kept": kept, "bounds": [["bytes kept, 8 heads over 1", kept[8] / kept[1], "<=", 1.5]]}


# ---------------------------------------------------------------- dolly: records a second


def dolly_sequences(args):
    """Encoded records: real ones, or random ones whose lengths are spread like Dolly's."""
    if args.data and args.tokenizer:
        tokenizer = Tokenizer(args.tokenizer)
        return encode_records(read_records(args.data), tokenizer, 1024)[0]
    numbers = random.Random(0)
    lengths = [min(1024, max(16, round(numbers.lognormvariate(4.9, 0.85)))) for _ in range(4000)]
    return [Sequence([5] * n, max(2, n // 2), i, "") for i, n in enumerate(lengths)]


def stand_ins(batches, count, offset):
    """`count` batches at even steps through the epoch's batches in order of their padded width,
    so that a few stand for all."""
    ordered = sorted(batches, key=lambda batch: max(len(s.ids) for s in batch))
    return [ordered[int((i + offset) / count * len(ordered))] for i in range(count)]


def measure_dolly(base, args):
    sequences = dolly_sequences(args)
    size = args.batch_size
    grouped = length_batches(sequences, size, torch.Generator().manual_seed(0))
    order = random.Random(0).sample(sequences, len(sequences))
    shuffled = [order[i:i + size] for i in range(0, len(order) - size + 1, size)]
    runs = {"HydraLoRA 3 x 8, our loop": (Ours(base, rank=8, heads=3), grouped)}
    if FRAMEWORKS:
        runs["PEFT LoRA r24, random padded batches"] = (frameworks(base)[1], shuffled)
    rates = {name: [] for name in runs}
    for turn in range(args.repeats):
        for name, (method, batches) in runs.items():
            chosen = stand_ins(batches, args.batches, (turn + 0.5) / args.repeats)
            if not turn:
                method.step(chosen[0])  # warm
            started = clock()
            for batch in chosen:
                method.step(batch)
            rates[name].append(sum(map(len, chosen)) / (clock() - started))
    kind = "Dolly's" if args.data and args.tokenizer else "drawn"
    print(f"\n{kind} lengths, batches of {size}{'':12}records/s   positions a record")
    for name, (_, batches) in runs.items():
        width = statistics.mean(max(len(s.ids) for s in batch) for batch in batches)
        print(f"{name:38}{statistics.harmonic_mean(rates[name]):9.2f}{width:16.0f}")
    # every round holds as many records, so this is all records over all seconds
    ours, *others = [statistics.harmonic_mean(values) for values in rates.values()]
    claim = f"our loop over PEFT's padded batches, records/s ({kind} lengths)"
    return {"rates": rates, "bounds": [[claim, ours / other, ">=", 1.5] for other in others]}


# ---------------------------------------------------------------- compile: does it pay?


def measure_compile(base, tokens, repeats):
    """Steps of one length with and without torch.compile; with many lengths it compiles more."""
    plain, compiled = (Ours(base, rank=8, heads=3) for _ in range(2))
    compiled.model.hidden_states = torch.compile(compiled.model.hidden_states)
    batch, seconds = random_batch(2, tokens), {"plain": [], "compiled": []}
    started = time.perf_counter()
    compiled.step(batch)
    first = time.perf_counter() - started
    for _ in range(repeats + 1):
        for name, method in (("plain", plain), ("compiled", compiled)):
            started = clock()
            method.step(batch)
            seconds[name].append(clock() - started)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print(f"\ntorch.compile: {medians['plain']:.3f} s a step without, {medians['compiled']:.3f} s "
          f"with, {medians['compiled'] / medians['plain']:.2f} times; the first took {first:.0f} s")
    return {"seconds": seconds, "first": first}


# ---------------------------------------------------------------- the command


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--parts", default=",".join(PARTS[:-1]),
                   help="what to measure (%(default)s; compile is slow and needs a C++ compiler)")
    p.add_argument("--repeats", type=int, default=7, help="rounds over the methods (7)")
    p.add_argument("--layers", type=int, default=30, help="of the model; fewer for a trial (30)")
    p.add_argument("--tokens", type=int, default=256, help="of a row of the step (256)")
    p.add_argument("--data", help="Dolly's JSON lines, for its real lengths (lengths like them)")
    p.add_argument("--tokenizer", help="a tokenizer.model of 32,000 pieces, for the same")
    p.add_argument("--batch-size", type=int, default=4, help="records a batch of Dolly (4)")
    p.add_argument("--batches", type=int, default=4, help="batches a round of Dolly (4)")
    p.add_argument("--json", help="write every figure to this file (none)")
    p.add_argument("--picture", help="write the growth as an SVG picture to this file (none)")
    args = p.parse_args(argv)
    args.parts = args.parts.split(",")
    if unknown := set(args.parts) - set(PARTS):
        p.error(f"--parts knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    return args


def main(argv=None):
    args = parse_args(argv)
    base = Transformer(ModelArgs(**SIZE, n_layers=args.layers))
    base.init_weights(0)
    weights = sum(w.numel() for w in base.parameters())
    print(f"{weights:,} weights in fp32, torch {torch.__version__}, {torch.get_num_threads()} "
          f"threads, {platform.machine()}; rounds: {args.repeats}; frameworks "
          f"{'measured' if FRAMEWORKS else 'not installed, left out'}")
    result = {"weights": weights, "torch": torch.__version__, "threads": torch.get_num_threads()}
    if "step" in args.parts:
        result["step"] = measure_steps(base, args.tokens, args.repeats)
    if "memory" in args.parts:
        result["memory"] = measure_memory()
    if "dolly" in args.parts:
        result["dolly"] = measure_dolly(base, args)
    if "growth" in args.parts:
        result["growth"] = measure_growth(lambda **s: Ours(base, **s).step, random_batch, clock,
                                          tokens=args.tokens, repeats=args.repeats)
        if args.picture:
            draw_growth(result["growth"], args.picture)
    if "compile" in args.parts:
        result["compile"] = measure_compile(base, args.tokens, args.repeats)
    found = [row for part in PARTS if part in result for row in result[part].get("bounds", [])]
    print(f"\n{'bound':75}{'measured':>9}")
    for claim, value, relation, bound in found:
        holds = value <= bound if relation == "<=" else value >= bound
        print(f"{claim:60}{relation:>6} {bound:<8.2f}{value:9.2f}  "
              f"{'holds' if holds else 'NOT MET'}")
    if args.json:
        write_json(args.json, result)
    return result


if __name__ == "__main__":
    main()
