"""What the benchmarks share: shapes, batches, clocks, and a step of every method.

    base = random_base(SMOL)
    method = ours(base, rank=8, heads=3)
    batch = random_batch(2, 256, base.args.vocab_size)
    seconds = time_rounds({"HydraLoRA": lambda: method.step(batch)}, rounds=5)

The models are random and need no download. All methods train on the same base weights,
which they share; ours take their step by train.train_step.
"""

import gc
import math
import random
import statistics
import time
from unittest import mock

import torch
import torch.nn.functional as F

import train
from data.corpus import Sequence, collate, encode_records, read_records
from hydralora import HydraLinear, add_hydralora
from model import ModelArgs, Tokenizer, Transformer
from support.device import autocast
from support.evaluation import target_logits

# SmolLM-135M's shape with a head of its own: 143M weights, feed-forward width 1536
SMOL = dict(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, vocab_size=32000, multiple_of=256,
            max_seq_len=2048)
LLAMA_7B = dict(dim=4096, n_layers=32, n_heads=32, vocab_size=32000, multiple_of=256,
                max_seq_len=4096)
LLAMA_13B = {**LLAMA_7B, "dim": 5120, "n_layers": 40, "n_heads": 40}
ALPHA, DROPOUT, LR, CLIP = 32.0, 0.05, 1e-4, 1.0  # of every method
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)  # only fp16 needs one

# ---------------------------------------------------------------- models and batches


def random_base(shape, device="cpu", dtype=torch.float32):
    """A frozen Transformer of random weights, made on the device."""
    with torch.device("meta"):
        model = Transformer(ModelArgs(**shape)).to(dtype)
    model.to_empty(device=device).requires_grad_(False)
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.normal_(std=0.02)
        else:
            weight.fill_(1)
    return model


def random_batch(rows, tokens, vocab_size, seed=0):
    """A batch of `tokens` positions per row, the second half targets (Dolly: 0.45)."""
    numbers = random.Random(seed)
    batch = []
    for row in range(rows):
        ids = [numbers.randrange(3, vocab_size) for _ in range(tokens + 1)]
        batch.append(Sequence(ids, tokens // 2 + 1, row, ""))
    return batch


def dolly_sequences(data=None, tokenizer=None):
    """Dolly's records encoded; without the paths, random ones of similar lengths."""
    if data and tokenizer:
        return encode_records(read_records(data), Tokenizer(tokenizer), 1024)[0]
    numbers = random.Random(0)
    lengths = [min(1024, max(16, round(numbers.lognormvariate(4.9, 0.85)))) for _ in range(4000)]
    return [Sequence([5] * n, max(2, n // 2), i, "") for i, n in enumerate(lengths)]


def evenly_chosen(batches, count, offset=0.5):
    """`count` of an epoch's batches, at even distances in the order of their width."""
    ordered = sorted(batches, key=lambda batch: max(len(s.ids) for s in batch))
    return [ordered[int((i + offset) / count * len(ordered))] for i in range(count)]


def positions(batches):
    """The positions that a model computes for these batches, padding not counted."""
    return sum(len(s.ids) - 1 for batch in batches for s in batch)


# ---------------------------------------------------------------- clocks and memory


def wait(device):
    if device != "cpu":
        torch.cuda.synchronize(device)


def seconds_of(work, device="cpu"):
    """Seconds that work() takes on the device. On one CPU thread they are this
    process's processor time, which other work on the machine hardly changes."""
    one_thread = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    wait(device)
    started = clock()
    work()
    wait(device)
    return clock() - started


def time_rounds(works, rounds, device="cpu", budget=math.inf):
    """{name: seconds of each round} of {name: work}. Every work() runs once per round,
    so that a slow moment of the machine hits all of them. No round begins after
    `budget` seconds."""
    seconds = {name: [] for name in works}
    started = time.perf_counter()
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(seconds_of(work, device))
        if time.perf_counter() - started > budget:
            break
    return seconds


def medians(seconds):
    return {name: statistics.median(values) for name, values in seconds.items()}


def time_ratios(seconds, name):
    """{other: how many times as long `name` takes}, round by round; {} without it."""
    if name not in seconds:
        return {}
    return {other: statistics.median(a / b for a, b in zip(seconds[name], values))
            for other, values in seconds.items()}


def extra_peak(work, device):
    """Bytes that work() allocates on a GPU at most, in addition to those of before;
    None on a CPU, where torch does not count them."""
    wait(device)
    if device == "cpu":
        work()
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def free():
    """Gives the GPU back what nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()


# ---------------------------------------------------------------- a step of every method


class Method:
    """What trains in a benchmark. One with a step of its own replaces `step`."""

    def __init__(self, model, optimizer=None):
        self.model = model
        self.optimizer = optimizer

    def step(self, batch):
        """One optimiser step on a list of sequences, as train.py takes it."""
        take_step(self.model, [batch], self.optimizer)

    def steps(self, batches):
        for batch in batches:
            self.step(batch)

    def resident(self):
        """Bytes between two steps: weights, adapters, the optimiser's state."""
        states = self.optimizer.state.values() if self.optimizer else []
        return (sum(p.nbytes for p in self.model.parameters())
                + sum(value.nbytes for state in states for value in state.values()
                      if torch.is_tensor(value)))


def take_step(model, batches, optimizer):
    """One step as train.py takes it, of several micro-batches."""
    return train.train_step(model, batches, optimizer, NO_SCALER, clip=CLIP,
                            precision=precision_of(model))


def precision_of(model):
    """Autocast to the dtype of the base's weights."""
    weight = model.output.weight
    dtype = "fp32" if weight.dtype == torch.float32 else "bf16"
    return autocast(str(weight.device), dtype)


def on_base(base, checkpoint=False):
    """Another Transformer on the base's own weights."""
    with torch.device("meta"):
        model = Transformer(base.args)
    model.load_state_dict(base.state_dict(), assign=True)
    model.checkpoint_activations = checkpoint
    return model.requires_grad_(False).train()


def ours(base, *, rank, heads, checkpoint=False):
    """HydraLoRA, or with one head LoRA, as hydralora.py and train.py have it."""
    return adapted(on_base(base, checkpoint), rank=rank, heads=heads)


def adapted(model, *, rank, heads):
    add_hydralora(model, rank=rank, heads=heads, alpha=ALPHA, dropout=DROPOUT)
    return Method(model.train(), train.make_optimizer(model, lr=LR))


def floor(base, checkpoint=False):
    """The least that training below the first layer costs: the frozen model forward,
    head and loss at the targets, and the gradient of the activations from the loss down
    to the embedding's output. No adapter, no weight's gradient, no optimiser."""
    method = Method(on_base(base, checkpoint))
    method.model.tok_embeddings.register_forward_hook(lambda _, __, out: out.requires_grad_())

    def step(sequences):
        batch = collate(sequences, base.output.weight.device)
        with precision_of(base):
            logits = target_logits(method.model, batch)
        F.cross_entropy(logits, batch.labels).backward()

    method.step = step
    return method


OURS = "HydraLoRA 3 x 8"


# ---------------------------------------------------------------- ours with one choice undone


def project_masked_on_x(layer, x):
    """HydraLinear.project with the dropout mask on x instead of A x, at full width in
    every layer; the router reads x without it."""
    masked = F.dropout(x, layer.settings.dropout, layer.training)
    return F.linear(masked, layer.lora_A.flatten(0, -2)), F.linear(x, layer.router)


def mask_on_x(base):
    method = ours(base, rank=8, heads=3)

    def step(batch):
        with mock.patch.object(HydraLinear, "project", project_masked_on_x):
            take_step(method.model, [batch], method.optimizer)

    method.step = step
    return method


def head_everywhere(base):
    """Head and loss at every position, as is usual."""
    method = ours(base, rank=8, heads=3)
    trained = [p for p in method.model.parameters() if p.requires_grad]

    def step(sequences):
        batch = collate(sequences)
        labels = torch.full((batch.tokens.numel(),), -100)
        labels[batch.target_index] = batch.labels
        F.cross_entropy(method.model(batch.tokens).flatten(0, 1), labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        method.optimizer.step()
        method.optimizer.zero_grad(set_to_none=True)

    method.step = step
    return method


def optimizer_not_fused(base):
    """AdamW one tensor and one operation at a time."""
    method = ours(base, rank=8, heads=3)
    trained = [p for p in method.model.parameters() if p.requires_grad]
    method.optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, foreach=False,
                                         fused=False)
    return method


VARIANTS = {"HydraLoRA, mask on x": mask_on_x,
            "HydraLoRA, head at every position": head_everywhere,
            "HydraLoRA, optimiser not fused": optimizer_not_fused}
