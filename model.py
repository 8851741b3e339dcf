"""LLaMA 2 in one file: the model, Meta's checkpoint layout, the tokenizer, generation.

Touvron et al. 2023, "Llama 2", section 2.2: a pre-norm transformer with RMSNorm, rotary
position embedding, SwiGLU and grouped-query attention. Parameter names and params.json
keys are Meta's, so the original files load as they are:

    model, tokenizer = load_llama("llama-2-7b")
    print(generate(model, tokenizer, ["The capital of France is"], max_new_tokens=8)[0])

Shapes: B batch, T tokens, S cache slots, D width, H heads, K key/value heads,
E head width, F feed-forward width, V vocabulary.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
    def ffn_dim(self) -> int:
        """2/3 of 4 * dim, rounded up, so SwiGLU's three matrices cost what two did."""
        hidden = int((self.ffn_dim_multiplier or 1) * int(2 * (4 * self.dim) / 3))
        return self.multiple_of * math.ceil(hidden / self.multiple_of)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, in fp32 inside, in the dtype of x outside."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):  # there it would return fp32
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """exp(i angle) (B, T, 1, E/2) in complex64: the angle of pair j at a position is
    position * theta^(-2j/E)."""
    pair = torch.arange(0, head_dim, 2, device=positions.device).float()
    angle = positions[..., None, None].float() * theta ** (-pair / head_dim)
    return torch.complex(angle.cos(), angle.sin())


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotates x (B, T, H, E): a pair (a, b) is the complex number a + ib, times the table's.
    Meta's layout pairs neighbours (0, 1), (2, 3), ..., Hugging Face's i with i + E/2.
    Weights in the other row order load without an error but generate gibberish."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, T, H, E/2)
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(E)) v: query head h reads key/value head h // (H / K)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_heads = args.n_heads
        self.n_kv_heads = args.n_kv_heads or args.n_heads
        self.head_dim = args.dim // args.n_heads
        self.wq = nn.Linear(args.dim, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, self.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(self.n_heads * self.head_dim, args.dim, bias=False)

    def forward(self, x, rotary, mask=None, cache=None, positions=None) -> Tensor:
        """(B, T, D) to (B, T, D), causal unless there is a mask. With a cache, (keys,
        values) of (B, S, K, E), new ones go to the slots at positions, and mask
        (B, 1, T, S) is True for the slots that a token may read."""
        q = self.wq(x).unflatten(-1, (self.n_heads, -1))  # (B, T, H, E)
        k = self.wk(x).unflatten(-1, (self.n_kv_heads, -1))  # (B, T, K, E)
        v = self.wv(x).unflatten(-1, (self.n_kv_heads, -1))
        q = apply_rotary(q, rotary)
        k = apply_rotary(k, rotary)
        if cache is not None:
            rows = torch.arange(len(x), device=x.device)[:, None]
            for stored, new in zip(cache, (k, v)):
                stored[rows, positions] = new.type_as(stored)
            k, v = (stored.type_as(k) for stored in cache)  # all slots; the mask picks
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H or K, T or S, E)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=self.n_kv_heads < self.n_heads)
        return self.wo(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: W2 (silu(W1 x) * W3 x)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)  # gate
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)  # down
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)  # up

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then the same with the feed-forward."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x, rotary, mask=None, cache=None, positions=None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, mask, cache, positions)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """Decoder-only LLaMA 2; its weights are random until init_weights or load_llama."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.checkpoint_activations = False  # True: recompute each block in backward
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)

    def init_weights(self, seed: int) -> None:
        """N(0, 0.02), divided by sqrt(2 n_layers) for wo and w2, which add to x."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("wo.weight", "w2.weight"))
                std = 0.02 / math.sqrt(2 * self.args.n_layers) if residual else 0.02
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits (B, T, V) of int64 tokens (B, T)."""
        return self.output(self.hidden_states(tokens))

    def hidden_states(self, tokens: Tensor, cache=None, positions=None,
                      n_layers=None) -> Tensor:
        """Hidden states (B, T, D) after n_layers blocks (None: all) and the final norm.
        Raises ValueError beyond max_seq_len.

        With a cache from make_cache, positions (B, T), or (1, T) for all rows alike, are
        the tokens' slots: keys and values go there, and a token reads every slot up to its
        own. Padding fills slots above; real tokens overwrite it before anything reads it."""
        end = tokens.shape[1] if cache is None else cache[0][0].shape[1]
        if end > self.args.max_seq_len:
            raise ValueError(f"{end} tokens do not fit max_seq_len {self.args.max_seq_len}")
        slots = torch.arange(end, device=tokens.device)
        positions = slots[None] if cache is None else positions
        mask = None if cache is None else (slots <= positions[..., None])[:, None]
        head_dim = self.args.dim // self.args.n_heads
        rotary = rotary_table(positions, head_dim, self.args.rope_theta)
        h = self.tok_embeddings(tokens)
        for i, layer in enumerate(self.layers[:n_layers]):
            if self.checkpoint_activations and torch.is_grad_enabled():
                # with use_reentrant=True no input requires grad, since the embedding is
                # frozen, so the adapters would get no gradient
                h = checkpoint(layer, h, rotary, use_reentrant=False)
            else:
                h = layer(h, rotary, mask, cache[i] if cache else None, positions)
        return self.norm(h)

    def make_cache(self, batch: int, slots: int) -> list[tuple[Tensor, Tensor]]:
        """An empty cache: (keys, values) per layer, (B, S, K, E) in the embedding's dtype."""
        n_kv_heads = self.args.n_kv_heads or self.args.n_heads
        shape = (batch, slots, n_kv_heads, self.args.dim // self.args.n_heads)
        new = self.tok_embeddings.weight.new_zeros
        return [(new(shape), new(shape)) for _ in self.layers]


# ------------------------------------------------------------ Meta's checkpoint layout
# Meta splits a weight over its shards by rows (0) or columns (1); norms are in each
SPLIT_DIM = {"tok_embeddings": 1, "wq": 0, "wk": 0, "wv": 0, "wo": 1,
             "w1": 0, "w2": 1, "w3": 0, "output": 0}


def read_params(directory: str | Path, max_seq_len: int | None = None) -> ModelArgs:
    """ModelArgs from params.json. Raises ValueError for a key that this model does not
    know, since it would change the model, and for a value that no LLaMA has."""
    path = Path(directory) / "params.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no params.json: give the folder of a checkpoint "
                         "in Meta's layout (params.json, consolidated.NN.pth, tokenizer.model)")
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error
    if not isinstance(params, dict):
        raise ValueError(f"{path} is not a JSON object: found {type(params).__name__}")
    params.pop("max_batch_size", None)  # Meta's own; it does not change the model
    unknown = sorted(params.keys() - vars(ModelArgs()).keys())
    if unknown:
        raise ValueError(f"{path} has keys this model does not know: {unknown}")
    args = ModelArgs(**params)
    check_args(args, path)
    return replace(args, max_seq_len=max_seq_len or args.max_seq_len)


def check_args(args, path):
    """Raises ValueError for a value that no LLaMA has."""
    for name, value in vars(args).items():
        if value in (None, -1) and value == getattr(ModelArgs, name):
            continue  # n_kv_heads, ffn_dim_multiplier and vocab_size can be left open
        kind, types, largest = "whole number", (int,), 2**24
        if name in ("ffn_dim_multiplier", "norm_eps", "rope_theta"):
            kind, types, largest = "number", (int, float), 10**12
        if type(value) not in types or not 0 < value <= largest:
            raise ValueError(f"{path}: {name} must be a {kind} above 0 and up to {largest}, "
                             f"found {json.dumps(value):.40}")
    if args.dim % (2 * args.n_heads) or args.n_heads % (args.n_kv_heads or args.n_heads):
        raise ValueError(f"{path}: dim {args.dim} must be an even multiple of n_heads "
                         f"{args.n_heads}, and that a multiple of n_kv_heads "
                         f"{args.n_kv_heads}")
    if args.ffn_dim > 2**24:
        raise ValueError(f"{path}: feed-forward layers cannot be {args.ffn_dim:.3g} wide")


def open_shard(path: str | Path) -> dict[str, Tensor]:
    """{name: tensor} of one shard, memory-mapped, without LLaMA 1's rope.freqs. Raises
    ValueError unless all are plain tensors of floats whose values are in the file."""
    try:
        shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # half a dozen types, whose texts advise to trust the file
        raise ValueError(f"{path} is not a whole PyTorch checkpoint: it cannot be read, "
                         "holds something else, or is damaged") from error
    if not isinstance(shard, dict):
        raise ValueError(f"{path} holds no tensors by name: found {type(shard).__name__}")
    for name, t in shard.items():
        if not (isinstance(t, Tensor) and t.is_floating_point()
                and t.device.type == "cpu" and t.layout == torch.strided
                and t.nbytes <= t.untyped_storage().nbytes()):  # strides of 0 claim terabytes
            raise ValueError(f"{path}: {name!r} is {type(t).__name__}, not a plain tensor of "
                             "floating-point numbers")
    return {str(name): t for name, t in shard.items() if not str(name).endswith("rope.freqs")}


def read_shards(directory: str | Path) -> dict[Path, dict[str, Tensor]]:
    """{path: {name: tensor}} of consolidated.00.pth, ... which must hold the same names."""
    paths = sorted(Path(directory).glob("consolidated.*.pth"))
    wanted = [f"consolidated.{i:02d}.pth" for i in range(len(paths))]
    if not paths or [path.name for path in paths] != wanted:
        raise ValueError(f"{directory} needs the shards consolidated.00.pth, "
                         "consolidated.01.pth, ... without a gap; found "
                         f"{[path.name for path in paths] or 'none'}")
    shards = {path: open_shard(path) for path in paths}
    names = [set(shard) for shard in shards.values()]
    differ = sorted(set.union(*names) - set.intersection(*names))
    if differ:
        raise ValueError(f"the shards of {directory} hold different tensors: {differ[:4]}")
    return shards


def merge_shards(shards, name):
    """One whole tensor from its parts; that of a single shard stays memory-mapped. Several
    shards are opened again for each tensor, so that the mapped pages can be released."""
    if len(shards) == 1:
        return next(iter(shards.values()))[name]
    parts = [open_shard(path)[name] for path in shards]
    split = SPLIT_DIM.get(name.split(".")[-2])
    try:
        return parts[0].clone() if split is None else torch.cat(parts, dim=split)
    except (RuntimeError, IndexError) as error:
        shapes = [tuple(part.shape) for part in parts]
        raise ValueError(f"the parts of {name} do not fit together: {shapes}") from error


def empty_model(args, tensors, directory):
    """The Transformer on the meta device. Raises ValueError unless its tensors have the
    names of these."""
    if args.vocab_size == -1:
        embedding = tensors.get("tok_embeddings.weight", torch.empty(1))  # refused below
        args.vocab_size = embedding.shape[0] if embedding.ndim else 1
    if args.n_layers > len(tensors):  # before so many layers are made
        raise ValueError(f"params.json in {directory} asks for {args.n_layers} layers, its "
                         f"shards hold {len(tensors)} tensors in all")
    with torch.device("meta"):
        model = Transformer(args)
    wanted = model.state_dict().keys()
    missing, extra = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    if missing or extra:
        raise ValueError(f"the tensors in {directory} do not fit its params.json: "
                         f"missing {missing[:4]}, extra {extra[:4]}")
    return model


def load_llama(directory: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None,
               max_seq_len: int | None = None,
               on_load: Callable | None = None) -> tuple[Transformer, "Tokenizer"]:
    """(Transformer, Tokenizer) of a folder in Meta's layout, in eval mode. Shards are merged
    tensor by tensor, so peak memory is one copy of the model plus one tensor. dtype=None keeps
    the stored dtype. on_load(model, copy) may return keep(name, tensor) -> {name: tensor}, what
    is kept of a tensor. Raises ValueError if config, tensors and tokenizer do not match."""
    args = read_params(directory, max_seq_len)
    tokenizer = Tokenizer(f"{directory}/tokenizer.model")
    shards = read_shards(directory)
    model = empty_model(args, next(iter(shards.values())), directory)
    if tokenizer.vocab_size > args.vocab_size:  # fewer are allowed: such rows are not drawn
        raise ValueError(f"the tokenizer in {directory} has {tokenizer.vocab_size} pieces, "
                         f"the embedding {args.vocab_size} rows: they do not belong "
                         "together, copy the model's own tokenizer.model there")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    keep = on_load(model, len(shards) > 1) if on_load else None
    state = {}
    for name, shape in shapes.items():
        tensor = merge_shards(shards, name)
        if tensor.shape != shape:
            raise ValueError(f"{name} in {directory} is {tuple(tensor.shape)}, "
                             f"its params.json asks for {tuple(shape)}")
        for part, kept in (keep(name, tensor) if keep else {name: tensor}).items():
            floats = dtype if kept.is_floating_point() else None  # codes stay integers
            state[part] = kept.to(device=device, dtype=floats or kept.dtype).contiguous()
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(on_load is None).eval(), tokenizer


def save_llama(model: Transformer, tokenizer_path: str | Path, directory: str | Path,
               dtype: torch.dtype | None = None) -> None:
    """Writes the model in Meta's layout, one shard, in a dtype (None: its own). Raises
    ValueError, with nothing written, if a weight is not finite. params.json is written
    last, so an incomplete folder is never mistaken for a checkpoint."""
    directory = Path(directory)
    tokenizer = Path(tokenizer_path).read_bytes()
    state = {name: p.detach().to("cpu", dtype) for name, p in model.named_parameters()}
    bad = [name for name, weight in state.items() if not weight.isfinite().all()]
    if bad:
        raise ValueError(f"{directory} is not written: {len(bad)} of {len(state)} tensors hold "
                         f"values that are not finite, {bad[0]} the first")
    params = {key: value for key, value in asdict(model.args).items() if value is not None}
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("params.json", "consolidated.00.pth"):  # a model may still read the old file
        (directory / name).unlink(missing_ok=True)
    (directory / "tokenizer.model").write_bytes(tokenizer)
    with open(directory / "consolidated.00.pth", "wb") as file:
        torch.save(state, file)
    text = json.dumps(params, indent=1) + "\n"
    (directory / "params.json").write_text(text, encoding="utf-8")


class Tokenizer:
    """LLaMA's sentencepiece tokenizer: byte fallback, digits apart, BOS 1 and EOS 2."""

    def __init__(self, path: str | Path):
        try:
            # its bytes, since sentencepiece takes no path that is not UTF-8
            proto = Path(path).read_bytes()
            self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except Exception as error:
            raise ValueError(f"there is no tokenizer at {path}, or it is not a sentencepiece "
                             "model: copy the model's own there") from error
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path} has no BOS or no EOS, so it is no LLaMA tokenizer")
        self.vocab_size = self.model.vocab_size()

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids of the text, with BOS in front and EOS behind if asked for."""
        text.encode()  # half a surrogate pair is refused, by UnicodeEncodeError
        return self.model.encode(text, add_bos=bos, add_eos=eos)

    def decode(self, ids: list[int]) -> str:
        """The text of the ids; BOS, EOS and ids beyond the pieces have none."""
        return self.model.decode([i for i in ids if i < self.vocab_size])


# ------------------------------------------------------------ generation


def sample(logits: Tensor, temperature: float, top_p: float, generators: list) -> Tensor:
    """The next token (B,) from logits (B, V): the most likely at temperature 0, else
    drawn from the smallest set of tokens whose probabilities reach top_p, each row by its
    own generator."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits.float() / temperature).softmax(-1).cpu().sort(-1, descending=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0  # the most likely token always stays
    drawn = torch.cat([torch.multinomial(row, 1, generator=generator)
                       for row, generator in zip(probs, generators)])
    return order.gather(-1, drawn[:, None])[:, 0].to(logits.device)


@torch.no_grad()
def generate_tokens(model: Transformer, tokenizer: Tokenizer, ids: list[list[int]], *,
                    max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
                    seed: int = 0, choose=sample) -> Iterator[list[int | None]]:
    """Yields, step by step, the next token of every row of ids (BOS included), or None
    after the row's EOS. Ends when all rows have, or after max_new_tokens. Each row has its
    own generator with the same seed, so the rest of the batch does not matter. choose is
    called as sample is. Raises ValueError if a row and its completion could exceed
    max_seq_len."""
    if not ids:
        return
    device = model.tok_embeddings.weight.device
    lengths = torch.tensor([len(row) for row in ids], device=device)
    width = max(map(len, ids))
    # padded on the right: a row's tokens never see what comes after them
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=device)
    cache = model.make_cache(len(ids), width + max_new_tokens)
    generators = [torch.Generator().manual_seed(seed) for _ in ids]
    positions = torch.arange(width, device=device).expand(len(ids), -1)
    last = lengths - 1  # index of each row's newest token in the current input
    done = torch.zeros(len(ids), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        h = model.hidden_states(tokens, cache, positions)
        h = h[torch.arange(len(ids), device=device), last]  # (B, D)
        logits = model.output(h)[:, :tokenizer.vocab_size]  # not of rows without a piece
        tokens = choose(logits, temperature, top_p, generators)[:, None]
        done |= tokens[:, 0] == tokenizer.eos_id
        if done.all():
            return
        yield [None if end else token
               for token, end in zip(tokens[:, 0].tolist(), done.tolist())]
        positions, last = (lengths + step)[:, None], torch.zeros_like(last)


def generate_ids(model: Transformer, tokenizer: Tokenizer, ids: list[list[int]],
                 **sampling) -> list[list[int]]:
    """The new tokens of each row of ids, without its EOS; arguments of generate_tokens."""
    new = [[] for _ in ids]
    for tokens in generate_tokens(model, tokenizer, ids, **sampling):
        for row, token in zip(new, tokens):
            if token is not None:
                row.append(token)
    return new


def generate(model: Transformer, tokenizer: Tokenizer, prompts: list[str],
             **sampling) -> list[str]:
    """Completions of prompts of unequal length, each ended by EOS (left out) or by
    max_new_tokens. Takes what generate_tokens takes."""
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    new = generate_ids(model, tokenizer, ids, **sampling)
    # a piece carries its own leading space: decode the whole and cut the prompt off
    return [tokenizer.decode(prompt + row)[len(tokenizer.decode(prompt)):]
            for prompt, row in zip(ids, new)]
