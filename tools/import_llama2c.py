"""A checkpoint of llama2.c becomes a folder in Meta's layout, for every --weights.

    python -m tools.import_llama2c stories260K.pt tok512.model stories260K

It is the same model (Touvron et al. 2023, section 2.2) under Meta's names. SRC is what
train.py of karpathy/llama2.c saves (.pt), or its export.py for run.c (.bin): the legacy
file or version 1, both in fp32. An output layer that is tied to the embedding becomes a
tensor of its own, since nothing ties it here. The model is held in memory once.
"""

import os
import struct
import sys
from dataclasses import replace
from pathlib import Path

import torch

from model import save_llama
from support.cli import Parser, run_script
from support.files import atomic_dir, wrap_disk_errors
from tools.hf_layout import check_shapes, model_without_storage, read_args
from tools.import_hf import check_tokenizer, describe, plain_tensors, print_zeros, read_pickle

COMPILED = "_orig_mod."  # torch.compile puts it before every name
TABLES = ("freqs_cos", "freqs_sin")  # of rotary embedding, computed here
MAGIC = 0x616b3432  # "ak42" begins every .bin but the legacy one
HEADER = ("dim", "ffn_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
# the order of the tensors in a .bin; a name within a layer means that tensor of every layer
ATTENTION = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
LEGACY = ("tok_embeddings", "attention_norm", *ATTENTION, "ffn_norm", *FEED_FORWARD, "norm",
          *TABLES)
VERSION_1 = ("attention_norm", "ffn_norm", "norm", "tok_embeddings", *ATTENTION, *FEED_FORWARD)


def read_pt(path):
    """(ModelArgs, {name: tensor}) of a .pt, which holds the state of training too."""
    content = read_pickle(path, "a checkpoint of llama2.c")
    found = content if isinstance(content, dict) else {}
    if not isinstance(found.get("model"), dict) or not isinstance(found.get("model_args"), dict):
        raise ValueError(f"{path} is not a checkpoint of llama2.c: it has no model and model_args")
    tensors = plain_tensors(found["model"], path)
    state = {name.removeprefix(COMPILED): tensor.clone() for name, tensor in tensors.items()
             if not name.endswith(TABLES)}
    w1 = state.get("layers.0.feed_forward.w1.weight")
    if w1 is None or w1.ndim != 2:
        raise ValueError(f"{path} has no layers.0.feed_forward.w1.weight (width, dim)")
    return read_args({**found["model_args"], "ffn_dim": len(w1)}, {}, path), state


def read_header(path):
    """(ModelArgs, order of the tensors, whether output is tied, first byte) of a .bin."""
    with open(path, "rb") as file:
        head = file.read(256).ljust(256, b"\0")
    magic, version = struct.unpack("<Ii", head[:8])
    if magic == MAGIC and version != 1:
        raise ValueError(f"{path} is of version {version}, which is quantised or unknown: take the "
                         ".pt, or export it with --version 1")
    at, order, start = (8, VERSION_1, 256) if magic == MAGIC else (0, LEGACY, 28)
    params = dict(zip(HEADER, struct.unpack("<7i", head[at:at + 28])))
    # the legacy file says it by the sign of the vocabulary
    tied = bool(head[36]) if magic == MAGIC else params["vocab_size"] > 0
    params["vocab_size"] = abs(params["vocab_size"])
    return read_args(params, {}, path), order, tied, start


def tensors_in_order(args, order):
    """Yields (name, shape) of every tensor of a .bin."""
    block = model_without_storage(replace(args, n_layers=1), 1, "one block")
    shapes = {name.removesuffix(".weight"): p.shape for name, p in block.named_parameters()}
    for name in order:
        if name in TABLES:
            yield name, torch.Size([args.max_seq_len, args.dim // args.n_heads // 2])
        elif name in shapes:
            yield f"{name}.weight", shapes[name]
        else:
            for i in range(args.n_layers):
                yield f"layers.{i}.{name}.weight", shapes[f"layers.0.{name}"]


def read_bin(path):
    """(ModelArgs, {name: tensor}) of a .bin: a header, then fp32 without gap."""
    args, order, tied, start = read_header(path)
    size, state, at = os.path.getsize(path), {}, start // 4
    values = torch.from_file(str(path), size=size // 4, dtype=torch.float32)
    for name, shape in tensors_in_order(args, order if tied else (*order, "output")):
        end = at + shape.numel()
        if end > len(values):
            raise ValueError(f"{path} ends before {name}: it is cut short, or not of llama2.c")
        if name not in TABLES:
            state[name] = values[at:end].view(shape).clone()
        at = end
    if 4 * at != size:
        raise ValueError(f"{path} has {size - 4 * at} bytes after its last tensor: it is damaged, "
                         "or not of llama2.c")
    if tied:
        state["output.weight"] = state["tok_embeddings.weight"].clone()
    return args, state


def import_checkpoint(source, tokenizer, out):
    """Writes the checkpoint `source` to the new folder `out`, or raises and leaves nothing."""
    with atomic_dir(out) as folder:
        if tokenizer.suffix == ".bin":
            raise ValueError(f"{tokenizer} is run.c's form of a tokenizer: give the .model file")
        args, state = (read_bin if source.suffix == ".bin" else read_pt)(source)
        check_tokenizer(tokenizer, args.vocab_size)
        model = model_without_storage(args, len(state), source)
        check_shapes(model.state_dict(), state, source)
        print_zeros(state, source)
        model.load_state_dict(state, assign=True)
        with wrap_disk_errors(out):
            save_llama(model, tokenizer, folder)
    print(f"{source}: {describe(args)}, made for {args.max_seq_len} tokens\n"
          f"wrote {out}: give it to --weights")


def parse_args(argv):
    p = Parser("import_llama2c.py", __doc__)
    p.add_argument("checkpoint", metavar="SRC", type=Path,
                   help="checkpoint of llama2.c, .pt or .bin")
    p.add_argument("tokenizer", metavar="TOKENIZER", type=Path,
                   help="its sentencepiece file, such as tok512.model")
    p.add_argument("out", metavar="DST", type=Path, help="folder to make, in Meta's layout")
    return p.parse_args(argv)


def main(argv=None):
    return run_script("import_llama2c.py", parse_args, lambda args: import_checkpoint(
        args.checkpoint, args.tokenizer, args.out), argv)


if __name__ == "__main__":
    sys.exit(main())
