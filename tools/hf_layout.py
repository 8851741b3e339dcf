"""Hugging Face's layout of a LLaMA: names, the order of rows, safetensors.

The model is the same (Touvron et al. 2023, section 2.2); three things differ from Meta's
layout. Every tensor has another name. The rows of wq and wk are in another order, because
there rotary position embedding pairs row i of a head with row i + E/2 instead of its
neighbour. The files are safetensors, a public format, which is read and written here.

Shapes: H heads, E head width.
"""

import json
import math
import mmap
import os
import struct

import torch

from data.what_it_is import what_it_is
from hydralora import HydraSettings
from model import ModelArgs, Transformer, check_args
from support.diagnose import HF_TARGETS
from support.files import parse_json, wrap_disk_errors

# ---------------------------------------------------------------- names

OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
INNER = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
         "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
         "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
         "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm"}
# target of add_hydralora -> target_modules of an adapter_config.json
TARGETS = {meta: hf for hf, meta in HF_TARGETS.items()}


def hf_name(name):
    """model.layers.0.self_attn.q_proj for Meta's layers.0.attention.wq."""
    if not name.startswith("layers."):
        return OUTER[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{INNER[rest]}"


def tensor_names(names):
    """{Meta's name: Hugging Face's name}, such as layers.0.attention.wq.weight."""
    return {name: hf_name(name.removesuffix(".weight")) + ".weight" for name in names}


# ---------------------------------------------------------------- the order of rows


def rotary_heads(name, args):
    """The number of heads that the rows of a module or of its weight belong to; None if
    rotary position embedding does not act on them, so that both layouts agree."""
    heads = {"wq": args.n_heads, "wk": args.n_kv_heads or args.n_heads}
    return heads.get(name.removesuffix(".weight").split(".")[-1])


def meta_rows(rows, heads):
    """Puts rows (H * E, ...) from Hugging Face's order into Meta's: row i of a head's
    first half, then row i of its second half. With heads None all stay as they are."""
    if heads is None:
        return rows
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def hf_rows(rows, heads):
    """The inverse of meta_rows: the even rows of each head, then its odd rows."""
    if heads is None:
        return rows
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


# ---------------------------------------------------------------- settings and shapes


def read_number(config, key, path, *, default=None, whole=True):
    """A positive number of a config, or the default. Raises ValueError for anything else."""
    value = default if config.get(key) is None else config[key]
    kinds, limit = ((int,), 2**24) if whole else ((int, float), 2**40)
    if type(value) not in kinds or not 0 < value < limit:
        raise ValueError(f"{path}: {key} is {value!r}, not a number that a LLaMA can have")
    return value


def check_values(config, allowed, path):
    """Raises ValueError that names every key of a config whose value is not in its list in
    `allowed`; the last of the list is what the message asks for."""
    wrong = [f"{key} is {config[key]!r:.60}, not {values[-1]!r}" for key, values in allowed.items()
             if config.get(key) not in values]
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong)}: this cannot be used here")


def read_args(config, keys, path):
    """ModelArgs of a config that has these keys instead of the names of the fields, and
    "ffn_dim" for the width of the feed-forward layers. Raises ValueError as read_number."""
    def number(field, default=None, whole=True):
        return read_number(config, keys.get(field, field), path, default=default, whole=whole)

    dim, width, n_heads = number("dim"), number("ffn_dim"), number("n_heads")
    usual = int(2 * 4 * dim / 3)
    args = ModelArgs(
        dim=dim, n_layers=number("n_layers"), vocab_size=number("vocab_size"),
        n_heads=n_heads, n_kv_heads=number("n_kv_heads", n_heads),
        multiple_of=width,  # any smaller width is rounded up to it
        ffn_dim_multiplier=width / usual if usual > width else None,
        norm_eps=number("norm_eps", 1e-5, whole=False),
        rope_theta=number("rope_theta", 10000.0, whole=False), max_seq_len=number("max_seq_len"))
    check_args(args, path)
    return args


def model_without_storage(args, n_tensors, source):
    """A Transformer of these ModelArgs on the meta device. Raises ValueError if it has
    more layers than the source has tensors: a damaged config can ask for a million."""
    if args.n_layers > n_tensors:
        raise ValueError(f"{source} holds {n_tensors} tensors, too few for the {args.n_layers} "
                         "layers of its config: a file or a layer is missing")
    with torch.device("meta"):
        return Transformer(args)


def check_shapes(wanted, tensors, source):
    """Raises ValueError unless the two, {name: tensor}, have the same names and shapes."""
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(f"the tensors in {source} do not fit its config: missing {missing[:4]}, "
                         f"extra {extra[:4]}")
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(f"{name} in {source} is {tuple(tensors[name].shape)}, its config asks "
                             f"for {tuple(tensor.shape)}")


def check_settings(config, supported, form):
    """Raises ValueError if a setting that a format cannot hold differs from its default."""
    for name, value in config.items():
        if name not in supported and value != getattr(HydraSettings, name, None):
            raise ValueError(f"{name} is {value!r}, which {form} cannot hold; it holds "
                             f"{', '.join(supported)}")


# ---------------------------------------------------------------- safetensors

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                      "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def read_safetensors(path):
    """{name: tensor} of a safetensors file, memory-mapped: read when they are used.

    The file is the header's length (8 bytes, little-endian), the header (JSON: name,
    dtype, shape, first and last byte of each tensor) and the tensors' bytes, without
    gap or overlap. Raises ValueError for a file that is anything else, and for any
    dtype but F64, F32, F16 and BF16.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(what_it_is(path) or f"{path} ({size} bytes) is not a whole "
                             "safetensors file: it is something else, or cut short; get it again")
        header = parse_json(file.read(length), f"the header of {path}")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    header.pop("__metadata__", None)
    entries = sorted(parse_entry(name, entry, path) for name, entry in header.items())
    ends = [0, *(stop for _, stop, *_ in entries)]
    if [*(start for start, *_ in entries), size - 8 - length] != ends:
        raise ValueError(f"{path} is damaged or cut short: its tensors do not fill its "
                         f"{size - 8 - length} bytes without gap or overlap; get it again")
    tensors = {}
    for start, stop, name, dtype, shape in entries:
        flat = torch.empty(0, dtype=dtype)  # frombuffer cannot read nothing
        if stop > start:
            flat = torch.frombuffer(data, dtype=dtype, count=math.prod(shape),
                                    offset=8 + length + start)
        tensors[name] = flat.view(shape)
    return tensors


def parse_entry(name, entry, path):
    """(first byte, last byte, name, dtype, shape) of a tensor, from its entry in a header."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)
            and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in shape + offsets)
            and math.prod(max(n, 1) for n in shape) < 2**60):
        raise ValueError(f"{path} is damaged: {name!r} has no dtype, shape and data_offsets")
    if dtype not in SAFETENSORS_DTYPES:
        raise ValueError(f"{path}: {name!r} is {dtype!r}; quantised or integer weights cannot be "
                         "used, take the checkpoint in F32, F16 or BF16")
    start, stop = offsets
    count = math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize
    if stop - start != count:
        raise ValueError(f"{path} is damaged: {name!r} with {count} bytes of {dtype} {shape} has "
                         f"the offsets {offsets}")
    return start, stop, name, SAFETENSORS_DTYPES[dtype], shape


def write_safetensors(path, tensors, convert=lambda name, tensor: tensor):
    """Writes convert(name, tensor) of every tensor, one converted copy at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is in {tensor.dtype}, which is not written here")
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # spaces, so that the data is aligned
    with wrap_disk_errors(path), open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            data = convert(name, tensor.detach()).contiguous().flatten()
            file.write(data.view(torch.uint8).numpy())
