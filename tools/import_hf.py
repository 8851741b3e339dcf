"""A LLaMA from Hugging Face becomes a folder in Meta's layout, for every --weights.

    python -m tools.import_hf TinyLlama-1.1B tinyllama     # then: train.py --weights tinyllama

It is the same model (Touvron et al. 2023, section 2.2) under other names, with one trap:
the rows of wq and wk are in another order (hf_layout.py). A model loaded without putting
them back runs, but generates gibberish. The files are memory-mapped and copies go through
a scratch file, so a 7B model takes a few hundred MB of memory.
"""

import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from data.what_it_is import what_it_is
from model import Tokenizer, save_llama
from support.cli import Parser, printable, run_script
from support.diagnose import is_cut_short
from support.files import (
    atomic_dir,
    check_tensors,
    read_json,
    read_torch,
    wrap_disk_errors,
)
from tools import hf_layout

# buffers of old checkpoints, computed here
DROPPED = tuple(f"rotary_emb.{name}" for name in ("inv_freq", "cos_cached", "sin_cached"))
KEYS = {"dim": "hidden_size", "ffn_dim": "intermediate_size", "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
        "norm_eps": "rms_norm_eps", "max_seq_len": "max_position_embeddings"}
ALLOWED = {  # values of settings that other architectures have
    "model_type": ["llama"], "hidden_act": [None, "silu"],
    # the former was the name until March 2023
    "architectures": [None, [], ["LLaMAForCausalLM"], ["LlamaForCausalLM"]],
    "rope_type": [None, "default"], "partial_rotary_factor": [None, 1],
    "attention_bias": [None, False], "mlp_bias": [None, False], "quantization_config": [{}, None]}

# ---------------------------------------------------------------- config.json


def read_config(path):
    """(ModelArgs, whether the output layer is the embedding) of a config.json."""
    config = {key: value for key, value in read_json(path).items() if value is not None}
    # the rotary part is rope_parameters since transformers 5, before that rope_scaling
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"type": rope}
    config = {"rms_norm_eps": 1e-6, "rope_type": rope.get("type"),
              "max_position_embeddings": config.get("max_sequence_length", 2048), **rope, **config}
    hf_layout.check_values(config, ALLOWED, path)
    args = hf_layout.read_args(config, KEYS, path)
    if config.get("head_dim", args.dim // args.n_heads) != args.dim // args.n_heads:
        raise ValueError(f"{path}: head_dim is {config['head_dim']}, this model's is always "
                         f"hidden_size / num_attention_heads, {args.dim // args.n_heads}")
    return args, bool(config.get("tie_word_embeddings", False))


# ---------------------------------------------------------------- weights


def read_pickle(path, kind):
    """The content of a file of torch.save, memory-mapped unless it was written before
    PyTorch 1.6. Raises ValueError for other files, and runs nothing in them."""
    if is_cut_short(path):
        raise ValueError(f"{path} is not {kind}: it is cut short, get it again")
    return read_torch(path, kind, mmap=zipfile.is_zipfile(path), crc=True)


def plain_tensors(tensors, path):
    """The tensors, {name: tensor}, that a file held. Raises ValueError for any others."""
    try:
        check_tensors(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; take the checkpoint in float32, float16 or "
                         "bfloat16") from error
    return tensors


def read_bin(path):
    """{name: tensor} of a pytorch_model.bin."""
    return plain_tensors(read_pickle(path, "a file of tensors alone"), path)


def print_zeros(tensors, source):
    """Prints a warning that counts the tensors that are all zeros. A download that stopped can
    have its full size; what never arrived is zero."""
    zeros = [name for name, tensor in tensors.items() if tensor.numel() and not tensor.any()]
    if zeros:
        print(f"warning: {len(zeros)} of the {len(tensors)} tensors in {source} are all zeros, "
              f"{', '.join(zeros[:3])} the first: was it downloaded whole?")


def read_weights(source):
    """{Hugging Face's name: tensor} of a folder's safetensors, or of its pickles if it
    has none. check_shapes tells whether all are there, so no index is read."""
    paths, read = sorted(source.glob("model*.safetensors")), hf_layout.read_safetensors
    if not paths:
        paths, read = sorted(source.glob("pytorch_model*.bin")), read_bin
    if not paths:
        raise ValueError(f"{source} holds no model*.safetensors and no pytorch_model*.bin: give "
                         "the folder of a Hugging Face checkpoint")
    weights = {}
    for path in paths:
        tensors = read(path)
        twice = sorted(set(weights) & set(tensors))
        if twice:
            raise ValueError(f"{path} repeats {twice[:4]} of another file: keep one set of files")
        weights.update(tensors)
    return {name: t for name, t in weights.items() if not name.endswith(DROPPED)}


def untie(weights, source):
    """Adds the output layer of a model that shares its embedding's weights with it."""
    shared = weights.get("model.embed_tokens.weight")
    if shared is None:  # reported with all other missing tensors
        return
    if not torch.equal(weights.setdefault("lm_head.weight", shared), shared):
        raise ValueError(f"{source} ties its output to the embedding (tie_word_embeddings) but "
                         "holds another lm_head.weight: correct config.json")


def in_meta_order(state, args, tied, scratch):
    """The state with wq and wk in Meta's order. Tensors that change are copied to a
    scratch file and mapped from there, so that their pages can leave memory."""
    def must_copy(name, tensor):
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        # a tied output layer becomes a tensor of its own: here nothing ties it
        return hf_layout.rotary_heads(name, args) or (tied and name == "output.weight") or not whole

    copied = {name: tensor for name, tensor in state.items() if must_copy(name, tensor)}
    hf_layout.write_safetensors(scratch, copied, lambda name, weight: hf_layout.meta_rows(
        weight, hf_layout.rotary_heads(name, args)))
    return {**state, **hf_layout.read_safetensors(scratch)}


# ---------------------------------------------------------------- tokenizer


def check_tokenizer(path, rows):
    """The tokenizer. Raises ValueError if it has more pieces than the embedding has rows."""
    if reason := what_it_is(path):
        raise ValueError(reason)
    if not path.is_file():
        raise ValueError(f"there is no {path}, the sentencepiece file that is read here: take it "
                         "from the model's original repository; a model with nothing but "
                         "tokenizer.json (SmolLM, Llama 3) cannot be used")
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > rows:
        raise ValueError(f"{path} has {tokenizer.vocab_size} pieces, the embedding {rows} rows: "
                         "they do not belong together")
    return tokenizer


def added_tokens(source):
    """{id: text} of the tokens that a folder adds; an unreadable file adds none."""
    added = {}
    with suppress(ValueError):
        content = read_json(source / "added_tokens.json")
        added.update({id: text for text, id in content.items() if type(id) is int})
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        content = read_json(source / "tokenizer_config.json")["added_tokens_decoder"]
        added.update({int(id): token["content"] for id, token in content.items()})
    return added


def print_left_out(source, tokenizer):
    """Prints which tokens the tokenizer lacks, and what follows from it."""
    pieces = tokenizer.vocab_size
    added = {id: text for id, text in added_tokens(source).items() if id >= pieces}
    if added:
        names = ", ".join(f"{printable(text, 40)} {id}" for id, text in sorted(added.items())[:4])
        more = ", ..." if len(added) > 4 else ""
        print(f"not carried over: {len(added)} added tokens without a piece in tokenizer.model "
              f"({names}{more}): their text is encoded letter by letter, and they are never "
              "generated")
    ends = read_json(source / "config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    other = [end for end in ends if end not in (None, tokenizer.eos_id)]
    if other:
        print(f"not carried over: eos_token_id {', '.join(map(str, other))}: here a text ends at "
              f"the tokenizer's own EOS, {tokenizer.eos_id}; a model that was trained to end with "
              "another token continues until --max-new-tokens")


# ---------------------------------------------------------------- the run


def describe(args):
    return (f"{args.n_layers} layers, width {args.dim}, feed-forward {args.ffn_dim}, "
            f"{args.n_heads} heads on {args.n_kv_heads}, vocabulary {args.vocab_size}")


def import_folder(source, out, tokenizer):
    """Writes the checkpoint `source` to the new folder `out`, or raises and leaves nothing."""
    with atomic_dir(out) as folder:
        args, tied = read_config(source / "config.json")
        tokenizer = tokenizer or source / "tokenizer.model"
        print_left_out(source, check_tokenizer(tokenizer, args.vocab_size))
        weights = read_weights(source)
        if tied:
            untie(weights, source)
        model = hf_layout.model_without_storage(args, len(weights), source)
        names = hf_layout.tensor_names(model.state_dict())
        wanted = {names[name]: weight for name, weight in model.state_dict().items()}
        hf_layout.check_shapes(wanted, weights, source)
        print(f"{source}: {describe(args)}, "
              f"{sum(w.numel() for w in weights.values()):,} weights", flush=True)
        print_zeros(weights, source)
        state = {name: weights[hf] for name, hf in names.items()}
        state = in_meta_order(state, args, tied, folder.parent / "scratch")
        model.load_state_dict(state, assign=True)
        with wrap_disk_errors(out):
            save_llama(model, tokenizer, folder)
    print(f"wrote {out}: give it to --weights")


def parse_args(argv):
    p = Parser("import_hf.py", __doc__)
    p.add_argument("source", metavar="SRC", type=Path, help="folder of a Hugging Face checkpoint")
    p.add_argument("out", metavar="DST", type=Path, help="folder to make, in Meta's layout")
    p.add_argument("--tokenizer", type=Path, help="path of tokenizer.model (the one in SRC)")
    return p.parse_args(argv)


def main(argv=None):
    return run_script("import_hf.py", parse_args, lambda args: import_folder(
        args.source, args.out, args.tokenizer), argv)


if __name__ == "__main__":
    sys.exit(main())
