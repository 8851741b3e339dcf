"""The Hugging Face layout of a LLaMA, as far as the tools need it: names, row order, safetensors.

The model is the same (Touvron et al. 2023, section 2.2); three things differ from Meta's layout.
Every tensor has another name; the rows of wq and wk stand in another order, because there rotary
position embedding pairs row i of a head with i + E/2 in place of its neighbour; and the files are
safetensors, a public format of one JSON header and raw bytes, which is read and written here.

    weights = read_safetensors("TinyLlama-1.1B/model.safetensors")     # {name: mapped tensor}

Shapes: H heads, E head width.
"""

import json
import math
import mmap
import os
import struct

import torch

from hydralora import HydraSettings
from support.files import parse_json, placeholder_reason

# ---------------------------------------------------------------- names

OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
INNER = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
         "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
         "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
         "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm"}
# target of add_hydralora -> target_modules of an adapter_config.json
TARGETS = {meta.split(".")[-1]: hf.split(".")[-1] for meta, hf in {**INNER, **OUTER}.items()
           if meta.split(".")[-1] in ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output")}


def hf_name(name):
    """Hugging Face's name of a module of ours: layers.0.attention.wq is their
    model.layers.0.self_attn.q_proj."""
    if not name.startswith("layers."):
        return OUTER[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{INNER[rest]}"


def tensor_names(names):
    """{ours: Hugging Face's} of weights such as layers.0.attention.wq.weight."""
    return {name: hf_name(name.removesuffix(".weight")) + ".weight" for name in names}


# ---------------------------------------------------------------- the order of rows


def rotary_heads(name, args):
    """How many heads the rows of a module or its weight belong to; None where rotary position
    embedding does not touch them and both layouts agree."""
    heads = {"wq": args.n_heads, "wk": args.n_kv_heads or args.n_heads}
    return heads.get(name.removesuffix(".weight").split(".")[-1])


def meta_rows(rows, heads):
    """Rows (H * E, ...) in Hugging Face's order, put into Meta's: of each head's two halves, first
    with first, second with second. heads None: as they are."""
    if heads is None:
        return rows
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def hf_rows(rows, heads):
    """The inverse of meta_rows: each head's even rows, then its odd ones."""
    if heads is None:
        return rows
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


# ---------------------------------------------------------------- files


SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def check_settings(config, held, form):
    """Raises ValueError for an adapter's setting that a format cannot hold: one that is not in
    `held` and differs from its default."""
    for name, value in config.items():
        if name not in held and value != getattr(HydraSettings, name):
            raise ValueError(f"{name} is {value!r}, for which {form} has no place; it holds "
                             f"{', '.join(held)}")


def read_number(config, key, path, *, default=None, whole=True):
    """A positive number of a config, the default where it has none; anything else, or a number
    that no LLaMA has, raises ValueError."""
    value = config.get(key)
    value = default if value is None else value
    kinds, limit = ((int,), 2**24) if whole else ((int, float), 2**40)
    if type(value) not in kinds or not 0 < value < limit:
        raise ValueError(f"{path}: {key} is {value!r}, not a number that a LLaMA can have")
    return value


def read_safetensors(path):
    """{name: tensor} of a safetensors file, each memory-mapped: nothing is read before it is used.

    The file is the header's length (8 bytes, little-endian), the header (JSON: name, dtype, shape,
    first and last byte of each tensor) and the tensors' bytes, without gap or overlap. Raises
    ValueError for a file that is anything else, and for any dtype but F32, F16 and BF16.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        if size < 8 or length > size - 8:
            raise ValueError(placeholder_reason(path) or f"{path} ({size} bytes) is not a whole "
                             "safetensors file: it is something else, or cut short; get it again")
        header = parse_json(file.read(length), f"the header of {path}")
        header.pop("__metadata__", None)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if header else b""
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: first_byte(item[1])):
        dtype, shape, (start, stop) = check_entry(name, entry, path)
        if start != end:
            raise ValueError(f"{path} is damaged: {name!r} starts at byte {start}, what stands "
                             f"before it ends at {end}; get the file again")
        end = stop
        if 8 + length + end > size:
            raise ValueError(f"{path} is cut short: {name!r} ends {8 + length + end - size} bytes "
                             "after the file; get it again")
        if stop > start:
            flat = torch.frombuffer(data, dtype=dtype, count=math.prod(shape),
                                    offset=8 + length + start)
            tensors[name] = flat.view(shape)
        else:
            tensors[name] = torch.empty(shape, dtype=dtype)
    if 8 + length + end != size:
        raise ValueError(f"{path} is damaged: {size - 8 - length - end} bytes after its last "
                         "tensor; get it again")
    return tensors


def first_byte(entry):
    """Where a header entry's tensor starts; what cannot be told stands first, to be refused."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return offsets[0] if is_sizes(offsets) and offsets else -1


def is_sizes(value):
    """Whether value is a list of whole numbers, none negative."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def check_entry(name, entry, path):
    """(dtype, shape, [first byte, last]) of one entry of a safetensors header, or ValueError."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not is_sizes(shape) or not is_sizes(offsets):
        raise ValueError(f"{path} is damaged: {name!r} has no dtype, shape and data_offsets")
    if dtype not in SAFETENSORS_DTYPES:
        raise ValueError(f"{path}: {name!r} is {dtype!r}; quantised or integer weights cannot be "
                         "used, take the checkpoint in F32, F16 or BF16")
    count = math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != count:
        raise ValueError(f"{path} is damaged: {name!r} with {count} bytes of {dtype} {shape} has "
                         f"the offsets {offsets}")
    return SAFETENSORS_DTYPES[dtype], shape, offsets


def write_safetensors(path, tensors, convert=lambda name, tensor: tensor):
    """Writes {name: tensor} as a safetensors file. convert(name, tensor), of the same shape and
    dtype, is taken when its turn comes, so that no two converted copies are ever held."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # spaces, so that the data is aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            data = convert(name, tensor.detach()).contiguous().flatten()
            file.write(data.view(torch.uint8).numpy())
