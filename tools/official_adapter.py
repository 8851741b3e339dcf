"""Adapters in the format of the paper's released code, to ours and back.

    python -m tools.official_adapter theirs adapter.pt --weights llama-2-7b     # theirs to ours
    python -m tools.official_adapter adapter.pt theirs --weights llama-2-7b     # ours to theirs

Tian et al., NeurIPS 2024, section 3.1. Their folder holds adapter_config.json (r,
lora_alpha, and lora_nums, the number of heads) and adapter_model.bin with, for every
adapted layer, the weights of lora_A (R, I), lora_B0 .. (O, R) and the router lora_route
(N, I), under Hugging Face's names and in its order of rows (hf_layout.py).

Shapes: N heads, R rank, I width in, O width out.
"""

import sys
from pathlib import Path

import torch

from data import WORLD
from hydralora import add_hydralora, hydra_layers, save_adapter
from support.base import load_adapter_file, load_model, print_quantize
from support.cli import Parser, run_script
from support.files import atomic_dir, read_json, write_file, write_json
from tools.hf_layout import (
    TARGETS,
    check_settings,
    check_shapes,
    check_values,
    hf_name,
    hf_rows,
    meta_rows,
    read_number,
    rotary_heads,
)
from tools.import_hf import read_bin

PREFIX = "base_model.model."  # PEFT puts it before the names of the model that it wraps
SUPPORTED = ("targets", "rank", "heads", "alpha", "dropout", "gate")  # by the authors' format
ALLOWED = {"enable_lora": [[], False, None], "modules_to_save": [[], None],  # in their config
           "fan_in_fan_out": [None, False], "bias": [None, "none"]}


def add_base_flags(p):
    """--weights, and --base for peft_config."""
    p.add_argument("--weights", type=Path, default=WORLD / "base",
                   help="folder of the base model in Meta's layout (the embedded world's)")
    p.add_argument("--base", help="where PEFT finds the base, in Hugging Face's layout: "
                   "base_model_name_or_path (the name of the --weights folder)")


def peft_config(config, base, **others):
    """An adapter_config.json: PEFT's keys, which the authors' code shares, and others."""
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "inference_mode": True, "r": config["rank"], "lora_alpha": config["alpha"],
            "lora_dropout": config["dropout"], "bias": "none", "fan_in_fan_out": False,
            "target_modules": [TARGETS[name] for name in config["targets"]], **others}


def official_tensors(model):
    """{their name: tensor} of the model's adapter. Without a router (one head, or the
    uniform gate) it gets one of zeros, which gives every head the weight 1/N."""
    tensors = {}
    for name, layer in hydra_layers(model).items():
        prefix, n_heads = PREFIX + hf_name(name), rotary_heads(name, model.args)
        router = layer.router
        if router is None:
            router = torch.zeros(layer.settings.heads, layer.base.in_features)
        tensors[f"{prefix}.lora_A.weight"] = layer.lora_A.detach()
        tensors[f"{prefix}.lora_route.weight"] = router.detach()
        for i, b in enumerate(layer.lora_B.detach()):
            tensors[f"{prefix}.lora_B{i}.weight"] = hf_rows(b, n_heads)
    return tensors


def read_settings(path, tensors):
    """The arguments of add_hydralora from an adapter_config.json, checked with the tensors."""
    config = read_json(path)
    if "lora_nums" not in config:
        raise ValueError(f"{path} has no lora_nums: an ordinary LoRA, not one of HydraLoRA's code")
    check_values(config, ALLOWED, path)
    names = {hf: meta for meta, hf in TARGETS.items()}
    modules = config.get("target_modules")
    if not isinstance(modules, list) or any(name not in list(names) for name in modules):
        raise ValueError(f"{path}: target_modules is {modules!r}: write a list of {list(names)}")
    rank, heads = read_number(config, "r", path), read_number(config, "lora_nums", path)
    # checked before layers of these sizes are made
    ranks = {len(t) for name, t in tensors.items() if name.endswith(".lora_A.weight") and t.ndim}
    counts = {name.split(".")[-2] for name in tensors if ".lora_B" in name}
    if ranks != {rank} or len(counts) != heads:
        raise ValueError(f"{path} has r {rank} and lora_nums {heads}; the tensors beside it have "
                         f"rank {sorted(ranks)} and {len(counts)} heads")
    dropout = config.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float):
        raise ValueError(f"{path}: lora_dropout is {dropout!r}, not a number")
    return dict(targets=tuple(names[name] for name in modules), rank=rank, heads=heads,
                alpha=float(read_number(config, "lora_alpha", path, whole=False)),
                dropout=float(dropout))


@torch.no_grad()
def fill(model, tensors, source):
    """Copies their tensors into the model's adapter, if all are there and fit."""
    check_shapes(official_tensors(model), tensors, source)
    for name, layer in hydra_layers(model).items():
        prefix, n_heads = PREFIX + hf_name(name), rotary_heads(name, model.args)
        layer.lora_A.copy_(tensors[f"{prefix}.lora_A.weight"])
        if layer.router is not None:  # the router of a single head does nothing
            layer.router.copy_(tensors[f"{prefix}.lora_route.weight"])
        for i, b in enumerate(layer.lora_B):
            b.copy_(meta_rows(tensors[f"{prefix}.lora_B{i}.weight"], n_heads))


def to_ours(source, out, weights):
    """Their folder -> adapter.pt, in fp32, with the base's fingerprint."""
    if out.exists():
        raise ValueError(f"{out} exists already: name another file, or move it away")
    model, _ = load_model(weights)
    tensors = read_bin(source / "adapter_model.bin")
    add_hydralora(model, **read_settings(source / "adapter_config.json", tensors))
    fill(model, tensors, source / "adapter_model.bin")
    write_file(out, lambda file: save_adapter(model, file))
    print(f"wrote {out}: {model.hydralora_config}")


def to_official(adapter, out, weights, base):
    """adapter.pt -> their folder, in fp32."""
    with atomic_dir(out) as folder:
        model, _ = load_model(weights)
        config = load_adapter_file(model, adapter)
        print_quantize(adapter, "none")
        check_settings(config, SUPPORTED, "the authors' format, without an A for every head,")
        tensors = official_tensors(model)
        write_file(folder / "adapter_model.bin", lambda file: torch.save(tensors, file))
        write_json(folder / "adapter_config.json", peft_config(
            config, base, lora_nums=config["heads"], blc_alpha=0.0, blc_weight=0.0,
            merge_weights=False, enable_lora=None, modules_to_save=None))
    print(f'wrote {out}: {len(tensors)} tensors, for the base model "{base}" (--base names '
          "another)")


def parse_args(argv):
    p = Parser("official_adapter.py", __doc__)
    p.add_argument("given", metavar="SRC", type=Path,
                   help="a folder in their format, or an adapter.pt of ours")
    p.add_argument("out", metavar="DST", type=Path, help="what to make: the other of the two")
    add_base_flags(p)
    return p.parse_args(argv)


def run(args):
    if args.given.is_dir():
        if args.base:
            raise ValueError(f"--base is written into their format; {args.out} has no place for it")
        to_ours(args.given, args.out, args.weights)
    else:
        args.adapter = args.given  # where support/diagnose.py looks
        to_official(args.given, args.out, args.weights, args.base or args.weights.resolve().name)


def main(argv=None):
    return run_script("official_adapter.py", parse_args, run, argv)


if __name__ == "__main__":
    sys.exit(main())
