"""A checkpoint of llama2.c becomes a folder in Meta's layout, which everything here reads.

    python -m tools.import_llama2c stories260K.pt tok512.model stories260K

karpathy/tinyllamas holds the smallest trained LLaMAs there are: the same model (Touvron et al.
2023, section 2.2) under Meta's names, as a file of torch.save (.pt, with model and model_args), or
as llama2.c's own (.bin): a header of 32-bit integers, then every tensor in fp32, one kind after the
other for all layers. Version 0 of .bin begins with the header, version 1 with the magic "ak42";
version 2, which is quantised, is refused.
"""

import os
import struct
import sys
from pathlib import Path

import torch

from model import ModelArgs, Tokenizer, Transformer
from support.cli import Parser, run_script
from support.files import check_tensors, misfits, new_folder, read_torch, write_llama
from support.weights import refuse_lfs_pointer

MAGIC, HEADER_BYTES = b"24ka", 256  # 0x616b3432, little-endian; of version 1
WEIGHTS = [f"attention.{name}" for name in ("wq", "wk", "wv", "wo")]
FEED_FORWARD = [f"feed_forward.{name}" for name in ("w1", "w2", "w3")]
ORDER = {  # of the tensors in a .bin, by its version; the names of layers stand for all layers
    0: ["tok_embeddings", "attention_norm", *WEIGHTS, "ffn_norm", *FEED_FORWARD, "norm", "rotary"],
    1: ["attention_norm", "ffn_norm", "norm", "tok_embeddings", *WEIGHTS, *FEED_FORWARD]}
DROPPED = ("freqs_cos", "freqs_sin")  # buffers of the rotary embedding, computed here


def model_args(dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len):
    """ModelArgs of a model whose feed-forward width is known, not computed."""
    usual = int(2 * 4 * dim / 3)
    # multiple_of = hidden_dim rounds any smaller width up to it
    return ModelArgs(dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads,
                     vocab_size=vocab_size, multiple_of=hidden_dim, max_seq_len=max_seq_len,
                     ffn_dim_multiplier=hidden_dim / usual if hidden_dim > usual else None)


def read_pt(path):
    """(ModelArgs, {name: tensor}) of a .pt; the tensors of a compiled model lose their prefix."""
    content = read_torch(path, "a checkpoint of llama2.c")
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise ValueError(f"{path} is not a checkpoint of llama2.c: it needs model and model_args")
    check_tensors(content["model"])
    tensors = {name.removeprefix("_orig_mod."): t for name, t in content["model"].items()}
    tensors = {name: t for name, t in tensors.items() if name not in DROPPED}
    given = content["model_args"]
    try:
        width = tensors["layers.0.feed_forward.w1.weight"].shape[0]
        args = model_args(given["dim"], width, given["n_layers"], given["n_heads"],
                          given.get("n_kv_heads") or given["n_heads"],
                          tensors["tok_embeddings.weight"].shape[0], given["max_seq_len"])
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint of llama2.c: {error!r}") from error
    tensors.setdefault("output.weight", tensors["tok_embeddings.weight"])
    return args, tensors


def read_header(path):
    """(version, ModelArgs, whether the output is the embedding, bytes before the tensors)."""
    with open(path, "rb") as file:
        start = file.read(HEADER_BYTES)
    version, at = 0, 0
    if start[:4] == MAGIC and len(start) == HEADER_BYTES:
        version, at = struct.unpack("<i", start[4:8])[0], 8
    if version not in ORDER or len(start) < at + 28:
        raise ValueError(f"{path} is not a .bin of llama2.c in version 0 or 1 (found {version}; "
                         "version 2 is quantised): export it in another one")
    *shape, vocab_size, longest = struct.unpack("<7i", start[at:at + 28])
    tied = start[at + 28] == 1 if version else vocab_size > 0
    if not all(0 < number < 2**24 for number in (*shape, abs(vocab_size), longest)):
        raise ValueError(f"{path} is not a .bin of llama2.c: its header says {shape}")
    return version, model_args(*shape, abs(vocab_size), longest), tied, HEADER_BYTES if at else 28


def read_bin(path):
    """(ModelArgs, {name: tensor}, mapped from the file) of a .bin."""
    version, args, tied, start = read_header(path)
    dim, width, head_dim = args.dim, args.ffn_dim, args.dim // args.n_heads
    kv, vocab = head_dim * args.n_kv_heads, args.vocab_size
    shapes = {"tok_embeddings": (vocab, dim), "output": (vocab, dim), "norm": (dim,),
              "attention_norm": (dim,), "ffn_norm": (dim,), "rotary": (args.max_seq_len, head_dim),
              "attention.wq": (dim, dim), "attention.wk": (kv, dim), "attention.wv": (kv, dim),
              "attention.wo": (dim, dim), "feed_forward.w1": (width, dim),
              "feed_forward.w2": (dim, width), "feed_forward.w3": (width, dim)}
    names = []
    for kind in [*ORDER[version], *([] if tied else ["output"])]:
        inner = kind in ("attention_norm", "ffn_norm") or "." in kind
        names += [f"layers.{i}.{kind}" for i in range(args.n_layers)] if inner else [kind]
    sizes = [shapes[name.split(".", 2)[-1]] for name in names]
    wanted = start + 4 * sum(torch.Size(size).numel() for size in sizes)
    if wanted != os.path.getsize(path):
        raise ValueError(f"{path} has {os.path.getsize(path)} bytes, its header asks for {wanted}: "
                         "get it again")
    numbers = torch.from_file(str(path), size=wanted // 4, dtype=torch.float32)[start // 4:]
    parts = numbers.split([torch.Size(size).numel() for size in sizes])
    tensors = {f"{name}.weight": part.view(size)
               for name, part, size in zip(names, parts, sizes) if name != "rotary"}
    tensors.setdefault("output.weight", tensors["tok_embeddings.weight"])
    return args, tensors


def import_checkpoint(source, tokenizer, out):
    """Writes the checkpoint to the new folder `out`. Raises ValueError or OSError, leaving nothing
    behind."""
    for path in (source, tokenizer):
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        refuse_lfs_pointer(path)
    with new_folder(out) as folder:
        args, tensors = (read_bin if source.suffix == ".bin" else read_pt)(source)
        pieces = Tokenizer(tokenizer).vocab_size
        if pieces > args.vocab_size:
            raise ValueError(f"{tokenizer} has {pieces} pieces, the embedding of {source} "
                             f"{args.vocab_size} rows: they do not belong together")
        with torch.device("meta"):
            model = Transformer(args)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        if wrong := misfits(shapes, tensors):
            raise ValueError(f"{source} does not fit its own header: {wrong[:4]} missing, extra or "
                             "mis-shaped")
        model.load_state_dict({name: tensors[name] for name in shapes}, assign=True)
        write_llama(model, tokenizer, folder)
    print(f"wrote {out}: {args.n_layers} layers, width {args.dim}, vocabulary {args.vocab_size}, "
          f"{args.max_seq_len} tokens; give it to --weights")


def main(argv=None):
    p = Parser("import_llama2c.py", __doc__)
    p.add_argument("source", metavar="SRC", type=Path, help="a .pt or .bin of llama2.c")
    p.add_argument("tokenizer", metavar="TOKENIZER", type=Path, help="its tokenizer.model")
    p.add_argument("out", metavar="DST", type=Path, help="folder to make, in Meta's layout")
    args = p.parse_args(argv)
    return run_script("import_llama2c.py",
                      lambda: import_checkpoint(args.source, args.tokenizer, args.out), argv,
                      stopped="interrupted; nothing was written",
                      memory="a machine with more memory can")


if __name__ == "__main__":
    sys.exit(main())
