"""A LLaMA from Hugging Face becomes a folder in Meta's layout, which everything here reads.

    python -m tools.import_hf TinyLlama-1.1B tinyllama     # then: train.py --weights tinyllama

SRC holds config.json, tokenizer.model and the weights, in one or several model*.safetensors or
pytorch_model*.bin. It is the same model (Touvron et al. 2023, section 2.2) under other names, with
one trap: the rows of wq and wk stand in another order (hf_layout.py). A model loaded without
putting them back runs, but its text makes no sense. The files are memory-mapped and copies go
through a scratch file, so a 7B model takes a few hundred MB of memory.
"""

import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from model import ModelArgs, Tokenizer, Transformer, save_llama
from support.cli import Parser, run_script
from support.diagnose import explained
from support.files import atomic_dir, placeholder_reason, read_json, wrap_disk_errors
from tools.hf_layout import (
    DTYPE_NAMES,
    meta_rows,
    read_number,
    read_safetensors,
    rotary_heads,
    tensor_names,
    write_safetensors,
)

# buffers of old checkpoints, computed here
DROPPED = tuple(f"rotary_emb.{name}" for name in ("inv_freq", "cos_cached", "sin_cached"))
LLAMA = (["LlamaForCausalLM"], ["LLaMAForCausalLM"])  # the second was the name until March 2023


def read_config(path):
    """(ModelArgs, whether the output layer is the embedding) of a Hugging Face config.json. What
    this model cannot do raises ValueError by its name."""
    config = read_json(path)
    check_architecture(config, path)

    def number(key, default=None, whole=True):
        return read_number(config, key, path, default=default, whole=whole)

    dim, width = number("hidden_size"), number("intermediate_size")
    n_heads = number("num_attention_heads")
    n_kv_heads = number("num_key_value_heads", n_heads)
    if dim % n_heads or n_heads % n_kv_heads or dim // n_heads % 2:
        raise ValueError(f"{path}: {dim} cannot be divided over {n_heads} heads and {n_kv_heads} "
                         "key/value heads")
    if number("head_dim", dim // n_heads) != dim // n_heads:
        raise ValueError(f"{path}: head_dim is {config['head_dim']}, this model's is always "
                         f"hidden_size / num_attention_heads, {dim // n_heads}")
    config["rope_theta"] = config.get("rope_theta") or rope(config).get("rope_theta")
    args = ModelArgs(dim=dim, n_layers=number("num_hidden_layers"), n_heads=n_heads,
                     n_kv_heads=n_kv_heads, vocab_size=number("vocab_size"),
                     **feed_forward(dim, width),
                     norm_eps=number("rms_norm_eps", 1e-6, whole=False),
                     rope_theta=number("rope_theta", 10000.0, whole=False),
                     max_seq_len=number("max_position_embeddings",
                                        number("max_sequence_length", 2048)))
    return args, bool(config.get("tie_word_embeddings", False))


def feed_forward(dim, width):
    """The keys of ModelArgs that give the feed-forward layers this width."""
    usual = int(2 * 4 * dim / 3)
    # multiple_of = width rounds any smaller width up to it
    return dict(multiple_of=width, ffn_dim_multiplier=width / usual if usual > width else None)


def rope(config):
    """What a config says of rotary embedding: rope_parameters since transformers 5, before that
    rope_scaling."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return found if isinstance(found, dict) else {"rope_type": found}


def check_architecture(config, path):
    kind, act = config.get("model_type"), config.get("hidden_act", "silu")
    scaling = rope(config).get("rope_type", rope(config).get("type", "default"))
    partial = rope(config).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    heads = config.get("architectures") or ["LlamaForCausalLM"]
    refused = {
        f"the architecture is {kind!r}, not 'llama'": kind != "llama",
        f"the model is {heads}, not LlamaForCausalLM": heads not in LLAMA,
        "the weights are quantised (quantization_config)": bool(config.get("quantization_config")),
        f"rope scaling is {scaling!r}": scaling != "default",
        f"partial_rotary_factor is {partial!r}": partial not in (None, 1),
        "attention_bias is set": bool(config.get("attention_bias")),
        "mlp_bias is set": bool(config.get("mlp_bias")),
        f"hidden_act is {act!r}, not 'silu'": act != "silu",
    }
    found = [what for what, bad in refused.items() if bad]
    if found:
        raise ValueError(f"{path}: {'; '.join(found)}: this model cannot do that, take a plain "
                         "LLaMA or Llama 2 checkpoint")


def read_bin(path):
    """{name: tensor} of a pytorch_model.bin, memory-mapped unless it was written before PyTorch
    1.6; a pickle that holds more than tensors raises ValueError and runs nothing."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True,
                             mmap=zipfile.is_zipfile(path))
    except Exception as error:  # half a dozen types, whose texts advise to trust the file
        reason = placeholder_reason(path) or "it holds something else, or is damaged or cut short"
        raise ValueError(f"{path} is not a file of tensors alone: {reason}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, not a dict of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: {name!r} is {type(tensor).__name__}, not a named tensor")
        if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{path}: {name!r} is {tensor.dtype}, {tensor.layout} on "
                             f"{tensor.device}; quantised, integer or sparse weights cannot be "
                             "used, take the checkpoint in float32, float16 or bfloat16")
    return tensors


def weight_files(source):
    """(paths, function that reads one) of the weights in a folder, safetensors before pickles."""
    for index, pattern, read in [
            ("model.safetensors.index.json", "model*.safetensors", read_safetensors),
            ("pytorch_model.bin.index.json", "pytorch_model*.bin", read_bin)]:
        names = {path.name for path in source.glob(pattern)}
        if (source / index).is_file():
            wanted = read_json(source / index).get("weight_map")
            if not isinstance(wanted, dict) or not all(
                    isinstance(name, str) and Path(name).name == name for name in wanted.values()):
                raise ValueError(f"{source / index} has no weight_map of plain file names")
            missing = sorted(set(wanted.values()) - names)
            if missing:
                raise ValueError(f"{source} lacks {missing[:4]}, which its index names: get them")
            names = set(wanted.values())
        if names:
            return [source / name for name in sorted(names)], read
    raise ValueError(f"{source} holds no model*.safetensors and no pytorch_model*.bin: give the "
                     "folder of a Hugging Face checkpoint")


def read_weights(source):
    """{Hugging Face's name: tensor} of all files of a folder, memory-mapped."""
    paths, read = weight_files(source)
    weights = {}
    for path in paths:
        tensors = read(path)
        twice = sorted(set(weights) & set(tensors))
        if twice:
            raise ValueError(f"{path} repeats {twice[:4]} of another file: keep one set of files")
        weights.update(tensors)
    return {name: t for name, t in weights.items() if not name.endswith(DROPPED)}


def check_weights(weights, args, tied, source):
    """{our name: tensor as it is in the files}, every name and shape checked."""
    if tied and "model.embed_tokens.weight" in weights:
        shared = weights["model.embed_tokens.weight"]
        own = weights.get("lm_head.weight", shared)
        if own.dtype != shared.dtype or not torch.equal(own, shared):
            raise ValueError(f"{source} ties its output to the embedding (tie_word_embeddings) but "
                             "holds another lm_head.weight: correct config.json")
        weights["lm_head.weight"] = shared
    if args.n_layers > len(weights):  # before a model of that many layers is laid out
        raise ValueError(f"{source} holds {len(weights)} tensors, too few for the {args.n_layers} "
                         "layers of its config.json: is a file missing?")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(args).named_parameters()}
    names = tensor_names(shapes)
    missing = sorted(set(names.values()) - set(weights))
    extra = sorted(set(weights) - set(names.values()))
    if missing or extra:
        raise ValueError(f"the tensors in {source} do not fit its config.json: missing "
                         f"{missing[:4]}, extra {extra[:4]}; is a file missing, or another model's "
                         "among them? A bias has no place in this model")
    for name, shape in shapes.items():
        found = weights[names[name]].shape
        if found != shape:
            raise ValueError(f"{names[name]} in {source} is {tuple(found)}, its config.json asks "
                             f"for {tuple(shape)}")
    return {name: weights[names[name]] for name in shapes}


def in_meta_order(state, args, tied, scratch):
    """The state with wq and wk in Meta's order. What cannot be written as it lies in its file is
    copied to the scratch file and mapped from there: the pages can leave memory again."""
    def must_copy(name, tensor):
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        # a tied output layer becomes a tensor of its own: here nothing ties it
        return rotary_heads(name, args) or (tied and name == "output.weight") or not whole

    copied = {name: tensor for name, tensor in state.items() if must_copy(name, tensor)}
    write_safetensors(scratch, copied, lambda name, w: meta_rows(w, rotary_heads(name, args)))
    return {**state, **read_safetensors(scratch)}


def find_tokenizer(source, given):
    """The path of the tokenizer.model to import; ValueError where there is none."""
    path = Path(given or source / "tokenizer.model")
    if not path.is_file():
        other = "has tokenizer.json but no" if (source / "tokenizer.json").is_file() else "has no"
        raise ValueError(
            f"{source} {other} tokenizer.model, the sentencepiece file that this project reads: "
            "take it from the model's original repository, or name it with --tokenizer; a model "
            "that never had one (SmolLM, Llama 3) cannot be used here" if not given else
            f"--tokenizer: there is no file {path}")
    return path


def check_tokenizer(path, rows):
    """The tokenizer of an embedding with so many rows; load_llama refuses the same. Rows without a
    piece are allowed, in any number."""
    if reason := placeholder_reason(path):
        raise ValueError(reason)
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > rows:
        raise ValueError(f"{path} has {tokenizer.vocab_size} pieces, the embedding {rows} rows: "
                         "they do not belong together")
    return tokenizer


def added_tokens(source):
    """{id: text} of the tokens that a folder adds to its tokenizer.model. A file that cannot be
    read adds none: nothing that is imported depends on it."""
    added = {}
    for name, key in (("added_tokens.json", None), ("tokenizer_config.json",
                                                    "added_tokens_decoder")):
        with suppress(ValueError):
            content = read_json(source / name)
            if key is None:
                added.update({id: text for text, id in content.items() if type(id) is int})
            elif isinstance(content.get(key), dict):
                added.update({int(id): token["content"] for id, token in content[key].items()
                              if id.isdecimal() and isinstance(token, dict)
                              and isinstance(token.get("content"), str)})
    return added


def print_left_out(source, tokenizer):
    """Names what the folder says beyond the tokenizer's pieces, and what follows from it."""
    pieces = tokenizer.vocab_size
    added = {id: text for id, text in added_tokens(source).items() if id >= pieces}
    if added:
        names = ", ".join(f"{text} {id}" for id, text in sorted(added.items())[:4])
        print(f"not carried over: {len(added)} added tokens without a piece in tokenizer.model "
              f"({names}{', ...' if len(added) > 4 else ''}): here their text is encoded letter by "
              "letter, and generation never draws their rows")
    ends = read_json(source / "config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    other = [end for end in ends if end not in (None, tokenizer.eos_id)]
    if other:
        print(f"not carried over: eos_token_id {', '.join(map(str, other))}: here a text ends at "
              f"the tokenizer's own EOS, {tokenizer.eos_id}; a model that was trained to end with "
              "the other goes on until --max-new-tokens")


def import_folder(source, out, tokenizer=None):
    """Writes the checkpoint of the folder `source` to the new folder `out` in Meta's layout; every
    number stays as it is, in its dtype. Raises ValueError or OSError, leaving nothing behind."""
    source = Path(source)
    with explained(source=source), atomic_dir(out) as folder:
        if not (source / "config.json").is_file():
            raise ValueError(f"{source} has no config.json: give the folder of a Hugging Face "
                             "checkpoint (config.json, model*.safetensors, tokenizer.model)")
        args, tied = read_config(source / "config.json")
        tokenizer = find_tokenizer(source, tokenizer)
        print_left_out(source, check_tokenizer(tokenizer, args.vocab_size))
        state = check_weights(read_weights(source), args, tied, source)
        print(f"{source}: {args.n_layers} layers, width {args.dim}, feed-forward {args.ffn_dim}, "
              f"{args.n_heads} heads on {args.n_kv_heads}, vocabulary {args.vocab_size}, "
              f"{sum(map(torch.numel, state.values())):,} weights", flush=True)
        with torch.device("meta"):
            model = Transformer(args)
        state = in_meta_order(state, args, tied, folder.parent / "scratch")
        model.load_state_dict(state, assign=True)
        with wrap_disk_errors(out):
            save_llama(model, tokenizer, folder)
    print(f"wrote {out}: give it to --weights")


def main(argv=None):
    p = Parser("import_hf.py", __doc__)
    p.add_argument("source", metavar="SRC", type=Path, help="folder of a Hugging Face checkpoint")
    p.add_argument("out", metavar="DST", type=Path, help="folder to make, in Meta's layout")
    p.add_argument("--tokenizer", type=Path, help="tokenizer.model (the one in SRC)")
    args = p.parse_args(argv)
    return run_script("import_hf.py",
                      lambda: import_folder(args.source, args.out, args.tokenizer), argv,
                      stopped="interrupted; nothing was written",
                      memory="a machine with more memory can")


if __name__ == "__main__":
    sys.exit(main())
