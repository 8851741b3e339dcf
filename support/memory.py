"""What a run needs of a GPU, measured before it starts and before any weights are there.

    python train.py --dry-run --weights llama-2-7b --gpu-memory 24

reads params.json alone. One step of the real code runs on fake tensors, which have
shapes and dtypes but no values, while Watch counts the bytes that are alive. So a fork
of the layer, the loss or the optimizer is measured like the rest. The fake tensors are
a CPU's: those of CUDA need a CUDA build, and on the meta device attention takes a path
that keeps two (T, T) matrices per head.
"""

import weakref
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # not public: imported only here
from torch.utils._python_dispatch import TorchDispatchMode

from data.corpus import Sequence
from hydralora import add_hydralora
from model import Tokenizer, Transformer, read_params
from support.device import DTYPES
from support.quantize import KINDS, quantize_blocks

GIB = 2**30
MOST_LAYERS, MOST_POSITIONS = 10_000, 2**24  # beyond any GPU; measuring would take for ever
# Assumed, not measured:
CONTEXT = 1.0 * GIB  # CUDA's context and libraries
FRAGMENTATION = 0.05  # the allocator's loss
NCCL = 0.5 * GIB  # with several GPUs, the buffers of its channels
# whole blocks of a sharded base: one computes, one arrives, and the buffer it arrives in
GATHERED = 3


def storages(values):
    """Yields the storage of every tensor in values, lists of tensors included."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage()
        elif isinstance(value, (list, tuple)):
            yield from storages(value)


class Watch(TorchDispatchMode):
    """Counts, within this context, the bytes of new tensors that are alive: now, peak."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.alive = {}  # id of a storage: its bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = {id(storage) for storage in storages([*args, *kwargs.values()])}
        for storage in storages([out]):
            if id(storage) not in inputs and id(storage) not in self.alive:
                self.alive[id(storage)] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, id(storage))
        return out

    def freed(self, key):
        self.now -= self.alive.pop(key)


@dataclass
class Need:
    """Bytes that a run needs on each of its GPUs."""
    weights: int  # the base; with --method full in fp32, and it trains
    gathered: int  # blocks of a sharded base that are whole for a moment
    adapter: int
    gradients: int
    optimizer: int
    activations: int  # alive after the last block and norm
    transient: int  # in addition, at the worst moment of the step
    flat: int  # gradients on their way to other GPUs, when no activations are left
    context: float  # assumed

    def __post_init__(self):
        self.fixed = (self.weights + self.gathered + self.adapter + self.gradients
                      + self.optimizer)
        # linear in a batch's tokens, since fused attention keeps no (T, T) matrix
        self.growing = self.activations + self.transient
        self.total = self.fixed + max(self.flat, self.growing)
        self.overhead = self.context + FRAGMENTATION * self.total
        self.gpu = self.total + self.overhead


ROWS = {  # of the printed table; what is 0 is left out
    "weights": "base weights",
    "gathered": f"blocks gathered: {GATHERED} at most",
    "adapter": "adapters and router, fp32",
    "gradients": "their gradients, fp32",
    "optimizer": "optimizer state (AdamW's moments)",
    "activations": "activations kept for backward",
    "transient": "worst moment: head, or a block",
    "flat": "or, after them: gradients to be sent",
    "total": "in all",
    "overhead": "CUDA and fragmentation (assumed)",
    "gpu": "a GPU needs",
}


def measure_step(shape, settings, *, make_optimizer, step, dtype, batch_size, length,
                 checkpoint, gpus=1, quantize=None):
    """The Need of a training step on batch_size x length tokens, each of them a target.

    shape is a ModelArgs, settings are the arguments of add_hydralora (None: the whole
    model trains, in fp32). make_optimizer(model) and step(model, batches, optimizer) are
    train.py's, for a CPU."""
    if shape.n_layers > MOST_LAYERS or batch_size * length > MOST_POSITIONS:
        raise ValueError(f"{shape.n_layers} layers, batches of {batch_size:.3g} x {length} tokens: "
                         f"at most {MOST_LAYERS} and {MOST_POSITIONS} tokens are measured")
    watch = Watch()
    marks = [0]

    def mark(*_):
        marks.append(watch.now)

    with FakeTensorMode(), watch:
        model = Transformer(replace(shape, max_seq_len=length))
        if settings is not None:
            for weight in model.parameters():
                weight.data = weight.data.to(DTYPES[dtype])
        if quantize in KINDS:
            quantize_blocks(model, quantize)
        mark()  # base weights
        if settings is not None:
            add_hydralora(model, **settings)
        mark()  # adapters and router
        for parameter in model.parameters():
            if parameter.requires_grad:  # a step's second micro-batch finds gradients
                parameter.grad = torch.zeros_like(parameter)
        mark()  # gradients
        optimizer = make_optimizer(model)
        optimizer.step()
        mark()  # optimizer state
        watch.peak = watch.now
        model.norm.register_forward_hook(mark)  # activations
        model.checkpoint_activations = checkpoint
        batch = [Sequence([0] * (length + 1), 1, 0, "")] * batch_size
        step(model.train(), [batch], optimizer)

    weights, adapter, gradients, optimizer, activations, transient = (
        after - before for before, after in pairwise([*marks[:6], watch.peak]))
    gathered = 0
    flat = 0
    context = CONTEXT
    if gpus > 1:  # embedding, head and adapters are whole on each
        blocks = sum(p.nbytes for p in model.layers.parameters() if not p.requires_grad)
        weights -= blocks - blocks // gpus
        gathered = GATHERED * blocks // shape.n_layers
        flat = 2 * gradients
        context += NCCL
    return Need(weights, gathered, adapter, gradients, optimizer, activations, transient,
                flat, context)


def longest_sequence(memory, length, need, measure):
    """The longest sequence that fits so many bytes of a GPU; 0 if none does. need is that
    of this length; measure(length) is asked for one more, near the answer."""
    room = (memory - need.context) / (1 + FRAGMENTATION) - need.fixed
    if room < need.flat:
        return 0
    near = max(1, int(length * room / need.growing))
    if near == length:
        return length
    per_token = (measure(near).growing - need.growing) / (near - length)
    return max(0, int(length + (room - need.growing) / per_token))


def read_shape(directory):
    """The ModelArgs of a checkpoint folder whose weights need not be there yet."""
    shape = read_params(directory)
    if shape.vocab_size == -1:  # Meta's own params.json
        path = Path(directory) / "tokenizer.model"
        shape.vocab_size = Tokenizer(path).vocab_size if path.is_file() else 32000
    return shape


def print_needs(measure, length, *, gpu_memory, limit):
    """Prints measure(length, checkpoint) for both values of checkpoint, and the longest
    sequence that fits gpu_memory GiB (None: not asked) in addition to the model's limit."""
    both = {checkpoint: measure(length, checkpoint) for checkpoint in (False, True)}
    unit, name = (GIB, "GiB") if both[False].total > GIB else (2**20, "MiB")
    print(f"{f'{name}, measured on fake tensors':36}{'plain':>10}  --checkpoint-activations")
    for field, label in ROWS.items():
        plain, again = (getattr(need, field) / unit for need in both.values())
        if plain or again:
            print(f"{label:36}{plain:10.2f}{again:10.2f}")
    if gpu_memory:
        plain, again = (longest_sequence(gpu_memory * GIB, length, need,
                                         partial(measure, checkpoint=checkpoint))
                        for checkpoint, need in both.items())
        print(f"{f'longest sequence in {gpu_memory:g} GiB, tokens':36}{plain or 'none':>10}"
              f"{again or 'none':>10}  (the limit is {limit})")
