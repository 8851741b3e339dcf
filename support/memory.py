"""What a training run will need, computed before it starts and before any weights are there.

    python train.py --dry-run --weights llama-2-7b --gpu-memory 24

needs no more than the folder's params.json. What autograd keeps for the backward pass is counted
tensor by tensor below; tests/test_memory.py compares the sums with what is alive in a real step.
Everything is linear in the tokens, since attention never keeps a (T, T) matrix, so the longest
sequence that fits is found by a division.

Letters: D width, F feed-forward width, V vocabulary, R rank, N heads; bytes throughout.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from hydralora import add_hydralora, hydra_layers
from model import Tokenizer, Transformer, read_params
from support.diagnose import explained, model_length
from support.evaluation import HEAD_CHUNK

GIB = 2**30
# Assumed, not computed: CUDA's context and libraries, and the allocator's loss to fragmentation.
CONTEXT, FRAGMENTATION = 1.0 * GIB, 0.05
NCCL = 0.5 * GIB  # assumed too, with several GPUs: the buffers of its channels
# of a base in parts: the block that computes, the one that arrives, and the buffer it arrives in
GATHERED = 3
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
ATTENTION = ("wq", "wk", "wv", "wo")


@dataclass
class Need:
    """Bytes of a run: what does not grow with the tokens, and what each token of a batch adds."""

    weights: int  # the base; with --method full in fp32, and it trains
    adapter: int
    gradients: int
    optimizer: int
    copies: int  # of trained weights in the products' dtype, made by autocast, kept for backward
    kept: int  # a token, from the forward pass to the backward pass
    working: int  # a token, at the worst moment of the backward pass, beside what is kept
    passing: int  # what the same moment needs whatever the tokens
    head: int  # logits of one chunk, in fp32: their logarithms and two gradients
    gathered: int = 0  # blocks of a base in parts, whole for a moment
    flat: int = 0  # gradients on their way to the other GPUs, when no activations are left
    context: float = CONTEXT

    def activations(self, tokens):
        return self.copies + tokens * self.kept

    def total(self, tokens):
        """The head is finished before a block's worst moment, so only the larger of them counts."""
        return self.standing() + max(self.flat, self.activations(tokens) + self.worst(tokens))

    def standing(self):
        return self.weights + self.gathered + self.adapter + self.gradients + self.optimizer

    def worst(self, tokens):
        return max(self.head, self.passing + tokens * self.working)

    def overhead(self, tokens):
        return self.context + self.total(tokens) * FRAGMENTATION

    def longest(self, memory, rows):
        """The longest sequence in batches of so many rows that fits so many bytes of a GPU; 0 when
        nothing does."""
        room = (memory - self.context) / (1 + FRAGMENTATION) - self.standing()
        if room < self.flat:
            return 0
        room -= self.copies
        by_block = (room - self.passing) / (self.kept + self.working)
        by_head = (room - self.head) / self.kept
        return max(0, int(min(by_block, by_head)) // rows)


def new_model(directory, settings):
    """The model of a run on the meta device: shapes without weights, with the adapters that
    add_hydralora(**settings) adds; None for --method full."""
    with explained(weights=directory):
        shape = read_params(directory)
        if shape.vocab_size == -1:  # Meta's own params.json; the embedding is not asked
            tokenizer = Path(directory) / "tokenizer.model"
            shape.vocab_size = Tokenizer(tokenizer).vocab_size if tokenizer.is_file() else 32000
    with torch.device("meta"):
        model = Transformer(shape)
    if settings:
        add_hydralora(model, **settings)
    return model


def branch_bytes(layer, size):
    """A token in one adapted layer, its input x apart: A x and its mask, the softmax and the gate,
    the gated ranks of all heads."""
    heads, rank, dropout = layer.settings.heads, layer.settings.rank, bool(layer.settings.dropout)
    ranks = layer.lora_A.flatten(0, -2).shape[0]  # R, or N * R when A is not shared
    routed = layer.router is not None  # a constant gate has no gradient: A x is not needed for it
    ax = ranks * size * (dropout + routed)
    ax += heads * size * (routed and not dropout)  # A x is a slice beside the scores
    return ax + 4 * heads * (1 + routed) + heads * rank * size


def block_bytes(model, size, first=False):
    """A token in one block: what the backward pass reads again. In the first block nothing trains
    below the adapters, and what stands before them keeps nothing."""
    args, full = model.args, not hydra_layers(model)
    adapted = {name.split(".")[-1]: layer for name, layer in hydra_layers(model).items()
               if name.startswith("layers.0.")}
    below = not first or full  # something trains below this block
    attends = below or adapted.keys() & {"wq", "wk", "wv"}
    heads = args.dim * size  # all heads' queries; the same for what attention puts out
    kv = 2 * heads * (args.n_kv_heads or args.n_heads) // args.n_heads
    norm = 4 * args.dim + 4  # its input in fp32 and 1 / rms
    total = 3 * args.ffn_dim * size  # w1 x, silu(w1 x), w3 x
    total += norm * (below + bool(below or adapted.keys() & set(ATTENTION)))
    if attends:
        total += 2 * heads + kv + 4 * args.n_heads  # q, k, v, output, the softmax's logarithm
    elif "wo" in adapted:
        total += heads
    if full:  # a norm's weight reads the normed input; autocast casts it for each linear layer anew
        total += 8 * args.dim + ((2 if size == 4 else 5) * args.dim + args.ffn_dim) * size
    for readers in ({"wq", "wk", "wv"}, {"w1", "w3"}):  # the same x is kept once
        total += args.dim * size if adapted.keys() & readers else 0
    total += args.ffn_dim * size if "w2" in adapted else 0
    return total + sum(branch_bytes(layer, size) for layer in adapted.values())


def working_bytes(model, size, block):
    """A token at the worst moment of the backward pass, beside what is kept: either SwiGLU's, with
    the gradients of its product and of both factors (w2's input, if it was kept, is free by then),
    in a block that was computed again where it is checkpointed; or the last norm's, with six
    tensors of the width in fp32."""
    shape = model.args
    adapted = {name.split(".")[-1] for name in hydra_layers(model)}
    factors = 2 if "w2" in adapted or not adapted else 3
    return max(block + factors * shape.ffn_dim * size + 2 * shape.dim * size, 24 * shape.dim)


def needs(model, args, *, checkpoint, head_chunk=HEAD_CHUNK):
    """The Need of a run, of each GPU of args.gpus, with or without --checkpoint-activations."""
    size, full = SIZES[args.dtype], args.method == "full"
    residual = 4 if full else size  # bytes a number in the stream between the blocks
    shape, vocab = model.args, model.args.vocab_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    ends = 2 * vocab * shape.dim + shape.dim  # embedding, head, last norm
    copy = 0 if size == 4 else size  # bytes a weight that trains has in the products' dtype, beside
    cast = copy * (trained - ends if full else trained)
    block = block_bytes(model, size)
    blocks = (shape.n_layers - 1) * block + block_bytes(model, size, first=True)
    # every run keeps the rotary table, the last norm, and the states at at most as many targets
    rest = 8 * shape.dim // shape.n_heads + 4 * shape.dim + 4 + shape.dim * residual
    rest += 4 * shape.dim if full else 0
    several = {}
    if (gpus := args.gpus or 1) > 1:
        several = dict(gathered=GATHERED * size * (frozen - ends) // shape.n_layers,
                       flat=8 * trained, context=CONTEXT + NCCL)
        frozen = ends + (frozen - ends) // gpus
    return Need(**several, weights=4 * trained if full else size * frozen,
                adapter=0 if full else 4 * trained, gradients=4 * trained, optimizer=8 * trained,
                copies=0 if checkpoint else cast,
                kept=rest + (shape.n_layers * shape.dim * residual if checkpoint else blocks),
                passing=cast // shape.n_layers if checkpoint else 0,
                working=working_bytes(model, size, block if checkpoint else 0),
                head=head_chunk * vocab * 12 + (vocab * shape.dim * (4 + copy) if full else 0))


def print_needs(args, settings, max_seq_len):
    """Prints what the run will need, with and without --checkpoint-activations, and the longest
    sequence that fits --gpu-memory. Reads params.json only. settings are the arguments of
    add_hydralora, max_seq_len is the recipe's."""
    model = new_model(args.weights, settings)
    length = args.max_seq_len or min(max_seq_len, model.args.max_seq_len)
    tokens = args.batch_size * length
    both = [needs(model, args, checkpoint=checkpoint, head_chunk=min(HEAD_CHUNK, tokens))
            for checkpoint in (False, True)]
    unit, name = (GIB, "GiB") if both[0].total(tokens) > GIB else (2**20, "MiB")
    print(f"{args.method}, base and products in {args.dtype}, batches of {args.batch_size} x "
          f"{length} tokens; {name}, computed and not run")
    if args.gpus:
        print(f"each of {args.gpus} GPUs with --shard-base: 1 / {args.gpus} of every block; "
              "embedding, head and adapters whole")
    print(f"{'':36}{'plain':>10}  --checkpoint-activations")

    def line(name, value):
        print(f"{name:36}" + "".join(f"{value(need) / unit:10.2f}" for need in both))

    line("base weights", lambda need: need.weights)
    if both[0].gathered:
        line(f"blocks gathered: {GATHERED} at most", lambda need: need.gathered)
    line("adapters and router, fp32", lambda need: need.adapter)
    line("their gradients, fp32", lambda need: need.gradients)
    line("AdamW's two moments, fp32", lambda need: need.optimizer)
    line("activations kept for backward", lambda need: need.activations(tokens))
    line("worst moment: head, or a block", lambda need: need.worst(tokens))
    if both[0].flat:
        line("or, after them: gradients to be sent", lambda need: need.flat)
    line("in all", lambda need: need.total(tokens))
    line("CUDA and fragmentation (assumed)", lambda need: need.overhead(tokens))
    line("a GPU needs", lambda need: need.total(tokens) + need.overhead(tokens))
    if args.gpu_memory:
        fits = [need.longest(args.gpu_memory * GIB, args.batch_size) for need in both]
        print(f"{f'longest sequence in {args.gpu_memory:g} GiB, tokens':36}"
              + "".join(f"{tokens if tokens else 'none':>10}" for tokens in fits)
              + f"  (the limit is {model_length(args.weights, model.args.max_seq_len)})")
    return both
