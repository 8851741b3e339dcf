"""LLaMA 2 in one file: the model, Meta's checkpoint layout, the tokenizer, generation.

Touvron et al. 2023, "Llama 2", section 2.2: a pre-norm transformer with RMSNorm, rotary position
embedding, SwiGLU and grouped-query attention. Parameter names and params.json keys are Meta's, so
the original files load as they are:

    model, tokenizer = load_llama("llama-2-7b")
    print(generate(model, tokenizer, ["The capital of France is"], max_new_tokens=8)[0])

Shapes: B batch, T tokens, S cache slots, D width, H heads, K key/value heads, E head width,
F feed-forward width, V vocabulary.
"""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class ModelArgs:
    """The keys of Meta's params.json, plus rope_theta and max_seq_len."""
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    vocab_size: int = -1  # -1: taken from the embedding when a checkpoint is loaded
    multiple_of: int = 256  # the feed-forward width is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 4096

    @property
    def ffn_dim(self):
        """Two thirds of 4 * dim, so that SwiGLU's three matrices cost what two did, rounded up."""
        hidden = int((self.ffn_dim_multiplier or 1) * int(2 * (4 * self.dim) / 3))
        return self.multiple_of * math.ceil(hidden / self.multiple_of)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, the division in fp32 whatever the dtype of x."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


def rotary_table(positions, head_dim, theta):
    """(cos, sin), each (B, T, 1, E) in fp32, of the angle position * theta^(-2i/E) of pair i. Each
    stands twice, once for each number of the pair; the first sin is negated, as is wanted below."""
    pair = torch.arange(0, head_dim, 2, device=positions.device).float()
    angle = positions[..., None, None].float() * theta ** (-pair / head_dim)  # (B, T, 1, E/2)
    angle = torch.stack([-angle, angle], -1).flatten(-2)
    return angle.cos(), angle.sin()


def apply_rotary(x, table):
    """Rotates x (B, T, H, E) in fp32: a pair (a, b) becomes (a cos - b sin, b cos + a sin). Meta's
    layout pairs neighbours (0, 1), (2, 3), ...; Hugging Face's pairs i with i + E/2. A model with
    rows in the other order loads without an error, and its text makes no sense."""
    (cos, sin), x32 = table, x.float()
    a, b = x32.unflatten(-1, (-1, 2)).split(1, -1)  # (B, T, H, E/2, 1)
    return torch.addcmul(x32 * cos, torch.cat([b, a], -1).flatten(-2), sin).type_as(x)


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.n_heads = args.n_heads
        self.n_kv_heads = args.n_kv_heads or args.n_heads
        self.head_dim = args.dim // args.n_heads
        self.wq = nn.Linear(args.dim, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(self.n_heads * self.head_dim, args.dim, bias=False)

    def forward(self, x, rotary, mask=None, cache=None, positions=None):
        q = apply_rotary(self.wq(x).unflatten(-1, (self.n_heads, -1)), rotary)  # (B, T, H, E)
        k = apply_rotary(self.wk(x).unflatten(-1, (self.n_kv_heads, -1)), rotary)  # (B, T, K, E)
        v = self.wv(x).unflatten(-1, (self.n_kv_heads, -1))
        if cache is not None:
            rows = torch.arange(len(x), device=x.device)[:, None]
            for slots, new in zip(cache, (k, v)):  # (B, S, K, E)
                slots[rows, positions] = new.type_as(slots)
            k, v = (slots.type_as(k) for slots in cache)  # all slots; the mask picks
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T or S, E)
        # grouped: query head h reads key/value head h // (H / K)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=self.n_kv_heads < self.n_heads)
        return self.wo(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)  # gate
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)  # down
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)  # up

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x, rotary, mask=None, cache=None, positions=None):
        x = x + self.attention(self.attention_norm(x), rotary, mask, cache, positions)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """Decoder-only LLaMA 2; weights are random until init_weights or load_llama sets them."""

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.checkpoint_activations = False  # True: recompute each block in the backward pass
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)

    def init_weights(self, seed):
        """N(0, 0.02), the two projections into the residual divided by sqrt(2 n_layers)."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("wo.weight", "w2.weight"))
                std = 0.02 / math.sqrt(2 * self.args.n_layers) if residual else 0.02
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, tokens):
        """Next-token logits (B, T, V) of int64 tokens (B, T)."""
        return self.output(self.hidden_states(tokens))

    def hidden_states(self, tokens, cache=None, positions=None):
        """Hidden states (B, T, D) after the final norm; raises ValueError beyond max_seq_len.

        With a cache from make_cache, positions (B, T), or (1, T) for all rows alike, say where each
        token stands: its keys go to that slot, and it attends to every slot up to its own. Padding
        fills slots above; real tokens overwrite it before anything reads it."""
        end = tokens.shape[1] if cache is None else cache[0][0].shape[1]
        if end > self.args.max_seq_len:
            raise ValueError(f"{end} tokens do not fit max_seq_len {self.args.max_seq_len}")
        slots = torch.arange(end, device=tokens.device)
        positions = slots[None] if cache is None else positions
        mask = None if cache is None else (slots <= positions[..., None])[:, None]  # (B, 1, T, S)
        rotary = rotary_table(positions, self.args.dim // self.args.n_heads, self.args.rope_theta)
        h = self.tok_embeddings(tokens)
        for i, layer in enumerate(self.layers):
            if self.checkpoint_activations and torch.is_grad_enabled():
                # reentrant, it would see nothing that trains (the embedding) and give no gradient
                h = checkpoint(layer, h, rotary, use_reentrant=False)
            else:
                h = layer(h, rotary, mask, cache[i] if cache else None, positions)
        return self.norm(h)

    def make_cache(self, batch, slots):
        """An empty cache: (keys, values) a layer, each (B, S, K, E) in the embedding's dtype."""
        shape = (batch, slots, self.args.n_kv_heads or self.args.n_heads,
                 self.args.dim // self.args.n_heads)
        new = self.tok_embeddings.weight.new_zeros
        return [(new(shape), new(shape)) for _ in self.layers]


# ---------------------------------------------------------------- Meta's checkpoint layout
# Meta splits a weight over the shards by rows (0) or columns (1); the norms are whole in each
SPLIT_DIM = {"tok_embeddings": 1, "wq": 0, "wk": 0, "wv": 0, "wo": 1,
             "w1": 0, "w2": 1, "w3": 0, "output": 0}


def read_params(directory, max_seq_len=None):
    """ModelArgs from params.json. ValueError for a key that this model does not know, since it
    would change the model, and for a value that no LLaMA has."""
    path = Path(directory) / "params.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no params.json: give the folder of a checkpoint in "
                         "Meta's layout (params.json, consolidated.NN.pth, tokenizer.model)")
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error
    if not isinstance(params, dict):
        raise ValueError(f"{path} is not a JSON object: found {type(params).__name__}")
    params.pop("max_batch_size", None)  # Meta's program has it, the model does not change with it
    if unknown := set(params) - {field.name for field in fields(ModelArgs)}:
        raise ValueError(f"{path} has keys this model does not know: {sorted(unknown)}")
    args = ModelArgs(**params)
    for field in fields(args):
        value, whole = getattr(args, field.name), field.type in (int, int | None)
        absent = field.default in (None, -1) and value == field.default
        kinds, most = ((int,), 2**24) if whole else ((int, float), 10**12)
        if not absent and (type(value) not in kinds or not 0 < value <= most):
            raise ValueError(f"{path}: {field.name} must be a {'whole ' * whole}number above 0 and "
                             f"up to {most}, found {json.dumps(value):.40}")
    if args.dim % (2 * args.n_heads) or args.n_heads % (args.n_kv_heads or args.n_heads):
        raise ValueError(f"{path}: dim {args.dim} must be an even multiple of n_heads "
                         f"{args.n_heads}, and that a multiple of n_kv_heads {args.n_kv_heads}")
    return replace(args, max_seq_len=max_seq_len or args.max_seq_len)


def open_shard(path):
    """{name: tensor} of one shard, memory-mapped, without rope.freqs, which LLaMA 1 has in every
    layer. ValueError for anything but dense floating-point tensors whose values all stand in the
    file: strides of zero could claim a terabyte. hydralora.py has such checks of its own."""
    try:
        shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # half a dozen types, whose texts advise to trust the file
        raise ValueError(f"{path} is not a whole PyTorch checkpoint: it cannot be read, holds "
                         "something else, or is damaged") from error
    if not isinstance(shard, dict):
        raise ValueError(f"{path} holds no tensors by name: found {type(shard).__name__}")
    for name, t in shard.items():
        if not (isinstance(t, torch.Tensor) and t.is_floating_point() and t.device.type == "cpu" and
                t.layout == torch.strided and t.nbytes <= t.untyped_storage().nbytes()):
            raise ValueError(f"{path}: {name!r} is {type(t).__name__}, not a plain tensor of "
                             "floating-point numbers")
    return {str(name): t for name, t in shard.items() if not str(name).endswith("rope.freqs")}


def read_shards(directory):
    """{path: state dict} of consolidated.00.pth, .01.pth, ..., which must hold the same keys."""
    paths = sorted(Path(directory).glob("consolidated.*.pth"))
    wanted = [f"consolidated.{i:02d}.pth" for i in range(len(paths))]
    if not paths or [path.name for path in paths] != wanted:
        raise ValueError(f"{directory} needs the shards consolidated.00.pth, consolidated.01.pth, "
                         f"... without a gap; found {[path.name for path in paths] or 'none'}")
    shards = {path: open_shard(path) for path in paths}
    keys = [set(shard) for shard in shards.values()]
    if differ := set.union(*keys) - set.intersection(*keys):
        raise ValueError(f"the shards of {directory} hold different tensors: {sorted(differ)[:4]}")
    return shards


def merge_shards(shards, name):
    """One whole tensor from its parts; that of a single shard stays memory-mapped. Several shards
    are mapped anew for each tensor: pages that were read count as memory while their map lives."""
    if len(shards) == 1:
        return next(iter(shards.values()))[name]
    parts = [open_shard(path)[name] for path in shards]
    split = SPLIT_DIM.get(name.split(".")[-2])
    try:
        return parts[0].clone() if split is None else torch.cat(parts, dim=split)
    except (RuntimeError, IndexError) as error:
        shapes = [tuple(part.shape) for part in parts]
        raise ValueError(f"the shards' parts of {name} do not fit together: {shapes}") from error


def load_llama(directory, *, device="cpu", dtype=None, max_seq_len=None, shard=None):
    """(Transformer, Tokenizer) of a folder in Meta's layout, its shards merged tensor by tensor, so
    the peak is one copy and one tensor. dtype None keeps the file's. shard(model, copy) may return
    cut(name, tensor), which keeps a part. ValueError where what is there does not fit together."""
    args, tokenizer = read_params(directory, max_seq_len), Tokenizer(f"{directory}/tokenizer.model")
    shards = read_shards(directory)
    held = next(iter(shards.values()))
    if args.vocab_size == -1:  # an embedding that is missing is named below
        args.vocab_size = held.get("tok_embeddings.weight", torch.empty(1)).shape[:1].numel()
    if args.n_layers > len(held):  # before so many layers are made
        raise ValueError(f"params.json in {directory} asks for {args.n_layers} layers, its shards "
                         f"hold {len(held)} tensors in all")
    with torch.device("meta"):
        model = Transformer(args)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, extra = sorted(set(shapes) - set(held)), sorted(set(held) - set(shapes))
    if missing or extra:
        raise ValueError(f"the tensors in {directory} do not fit its params.json: "
                         f"missing {missing[:4]}, extra {extra[:4]}")
    if tokenizer.vocab_size > args.vocab_size:  # a row without a piece is never drawn
        raise ValueError(f"the tokenizer in {directory} has {tokenizer.vocab_size} pieces, the "
                         f"embedding {args.vocab_size} rows: they do not belong together, copy "
                         "the model's own tokenizer.model there")
    state, cut = {}, shard(model, len(shards) > 1) if shard else lambda name, whole: whole
    for name, shape in shapes.items():
        tensor = merge_shards(shards, name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} in {directory} is {tuple(tensor.shape)}, "
                             f"its params.json asks for {shape}")
        state[name] = cut(name, tensor).to(device=device, dtype=dtype or tensor.dtype)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(shard is None), tokenizer


def save_llama(model, tokenizer_path, directory, dtype=None):
    """Writes the model in Meta's layout, one shard, in a dtype (None: its own), for load_llama.
    ValueError, with nothing written, where a weight is not finite. params.json comes last, so a
    folder that was not finished is not taken for a checkpoint."""
    directory, tokenizer = Path(directory), Path(tokenizer_path).read_bytes()
    state = {name: weight.detach().to("cpu", dtype) for name, weight in model.named_parameters()}
    if bad := [name for name, weight in state.items() if not weight.isfinite().all()]:
        raise ValueError(f"{directory} is not written: {len(bad)} of {len(state)} tensors hold "
                         f"values that are not finite, {bad[0]} the first")
    params = {key: value for key, value in asdict(model.args).items() if value is not None}
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("params.json", "consolidated.00.pth"):  # a model may still read the old file
        (directory / name).unlink(missing_ok=True)
    (directory / "tokenizer.model").write_bytes(tokenizer)
    with open(directory / "consolidated.00.pth", "wb") as file:
        torch.save(state, file)
    (directory / "params.json").write_text(json.dumps(params, indent=1) + "\n", encoding="utf-8")


class Tokenizer:
    """LLaMA's sentencepiece tokenizer: byte fallback, digits apart, BOS 1 and EOS 2."""

    def __init__(self, path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            raise ValueError(f"there is no tokenizer at {path}, or it is not a sentencepiece "
                             "model: copy the model's own there") from error
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path} has no BOS or no EOS, so it is no LLaMA tokenizer")
        self.vocab_size = self.model.vocab_size()

    def encode(self, text, bos=True, eos=False):
        """Token ids of the text, with BOS in front and EOS behind where asked for."""
        return [self.bos_id] * bos + self.model.encode(text) + [self.eos_id] * eos

    def decode(self, ids):
        """The text of the ids; BOS, EOS and ids beyond the pieces have none."""
        return self.model.decode([i for i in ids if i < self.vocab_size])


# ---------------------------------------------------------------- generation


def sample(logits, temperature, top_p, generators):
    """The next token (B,) from logits (B, V): the most likely at temperature 0, else drawn from the
    smallest set of tokens whose probabilities reach top_p, each row by its own generator."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits.float() / temperature).softmax(-1).cpu().sort(-1, descending=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0  # the most likely token always stays
    drawn = torch.cat([torch.multinomial(row, 1, generator=generator)
                       for row, generator in zip(probs, generators)])
    return order.gather(-1, drawn[:, None])[:, 0].to(logits.device)


@torch.no_grad()
def generate_tokens(model, tokenizer, ids, *, max_new_tokens, temperature=0.0, top_p=1.0, seed=0):
    """Yields, step by step, the next token of every row of ids (lists of tokens, BOS included): a
    list, None where a row has met its EOS. Ends when all have, or after max_new_tokens. Each row
    has its own generator with the same seed, so the rest of the batch does not matter. ValueError
    when a row and its completion could exceed max_seq_len."""
    device = model.tok_embeddings.weight.device
    lengths = torch.tensor([len(row) for row in ids], device=device)
    width = int(lengths.max())
    # padded on the right: a row's tokens never see what comes after them
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=device)
    cache = model.make_cache(len(ids), width + max_new_tokens)
    generators = [torch.Generator().manual_seed(seed) for _ in ids]
    positions = torch.arange(width, device=device).expand(len(ids), -1)
    last = lengths - 1  # which token of the current input is each row's newest
    done = torch.zeros(len(ids), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        h = model.hidden_states(tokens, cache, positions)
        h = h[torch.arange(len(ids), device=device), last]  # (B, D)
        logits = model.output(h)[:, :tokenizer.vocab_size]  # not of rows without a piece
        tokens = sample(logits, temperature, top_p, generators)[:, None]
        done |= tokens[:, 0] == tokenizer.eos_id
        if done.all():
            return
        yield [None if end else token for token, end in zip(tokens[:, 0].tolist(), done.tolist())]
        positions, last = (lengths + step)[:, None], torch.zeros_like(last)


def generate(model, tokenizer, prompts, **sampling):
    """Completions of prompts of unequal length, each ended by EOS (left out) or max_new_tokens.
    Takes max_new_tokens, temperature, top_p and seed as generate_tokens does."""
    if not prompts:
        return []
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    new = [[] for _ in prompts]
    for tokens in generate_tokens(model, tokenizer, ids, **sampling):
        for row, token in zip(new, tokens):
            if token is not None:
                row.append(token)
    # a piece carries its own leading space: decode the whole and cut the prompt off
    return [tokenizer.decode(prompt + row)[len(tokenizer.decode(prompt)):]
            for prompt, row in zip(ids, new)]
