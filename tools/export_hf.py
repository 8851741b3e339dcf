"""A checkpoint in Meta's layout becomes a Hugging Face folder: import_hf.py reversed.

    python -m tools.export_hf runs/full my-llama       # what train.py --method full wrote

The same model (Touvron et al. 2023, section 2.2) for everything that reads transformers'
layout. Tensors are written one at a time; what import_hf.py took from a folder comes back
byte for byte. An output layer that equals the embedding is left out and tied, as Hugging
Face does. Without tokenizer_config.json AutoTokenizer would leave BOS out silently.
"""

import shutil
import sys
from pathlib import Path

import torch

from support.base import load_model, model_length, stated_length
from support.cli import Parser, run_script
from support.files import atomic_dir, write_json
from tools.hf_layout import hf_rows, rotary_heads, tensor_names, write_safetensors


def config_of(args, tokenizer, tied, dtype):
    """The config.json of a model, with keys that every version of transformers reads."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": args.dim, "intermediate_size": args.ffn_dim,
        "num_hidden_layers": args.n_layers, "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads or args.n_heads, "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len, "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta, "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": tied, "torch_dtype": str(dtype).split(".")[-1],
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def tokenizer_config_of(tokenizer):
    """The tokenizer_config.json by which AutoTokenizer knows the tokenizer. In
    transformers 5 its ids equal ours, except for texts that begin with a space."""
    piece = tokenizer.model.id_to_piece
    return {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
            "bos_token": piece(tokenizer.bos_id), "eos_token": piece(tokenizer.eos_id),
            "unk_token": piece(tokenizer.model.unk_id()), "legacy": False}


def export_folder(source, out):
    """Writes the checkpoint `source` to the new folder `out`, or raises and leaves nothing."""
    with atomic_dir(out) as folder:
        model, tokenizer = load_model(source)
        state = dict(model.named_parameters())
        dtype = state["tok_embeddings.weight"].dtype
        tied = torch.equal(state["output.weight"], state["tok_embeddings.weight"])
        if tied:
            del state["output.weight"]
        names = tensor_names(state)
        heads = {names[name]: rotary_heads(name, model.args) for name in state}
        write_safetensors(folder / "model.safetensors",
                          {names[name]: weight for name, weight in state.items()},
                          lambda name, weight: hf_rows(weight, heads[name]))
        write_json(folder / "config.json", config_of(model.args, tokenizer, tied, dtype))
        write_json(folder / "tokenizer_config.json", tokenizer_config_of(tokenizer))
        shutil.copyfile(Path(source) / "tokenizer.model", folder / "tokenizer.model")
    print(f"wrote {out}: {len(state)} tensors{', output tied to the embedding' if tied else ''}")
    if not stated_length(source):
        print(f"max_position_embeddings is {model_length(source, model.args.max_seq_len)}")


def parse_args(argv):
    p = Parser("export_hf.py", __doc__)
    p.add_argument("weights", metavar="SRC", type=Path, help="folder in Meta's layout")
    p.add_argument("out", metavar="DST", type=Path, help="Hugging Face folder to make")
    return p.parse_args(argv)


def main(argv=None):
    return run_script("export_hf.py", parse_args,
                      lambda args: export_folder(args.weights, args.out), argv)


if __name__ == "__main__":
    sys.exit(main())
