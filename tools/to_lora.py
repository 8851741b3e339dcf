"""HydraLoRA to one ordinary LoRA in PEFT's format, for servers that know nothing else.

    python -m tools.to_lora adapter.pt lora --weights llama-2-7b --constant calibrated --data FILE

Tian et al., NeurIPS 2024, section 3.1: under a gate w that does not depend on the token,
sum_i w_i B_i A is one LoRA with B = sum_i w_i B_i. So one head and the uniform gate are
exported exactly. A learned gate can only be approximated, by 1/N or by its mean on data.

Shapes: N heads, R rank, I width in, O width out.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from data import WORLD
from data.corpus import encode_records, read_records, train_val_split
from hydralora import HydraLinear, adapters_disabled, hydra_layers
from support.base import (
    load_adapter_file,
    load_model,
    load_model_and_adapter,
    print_quantize,
)
from support.cli import Parser, run_script
from support.device import add_device_flags, autocast, pick_device, pick_dtype
from support.evaluation import TOTAL, evaluate, routing_report
from support.files import atomic_dir, write_json
from tools.generate import has_router
from tools.hf_layout import check_settings, write_safetensors
from tools.official_adapter import add_base_flags, official_tensors, peft_config
from train import MAX_SEQ_LEN, VAL_SHARE

# what flatten turns into one LoRA
SUPPORTED = ("targets", "rank", "heads", "alpha", "dropout", "gate", "share_a")


@torch.no_grad()
def flatten(model, gates):
    """Replaces every HydraLinear by the LoRA that it is under the constant gate (N) of
    its name in gates, or under 1/N. LoRA (Split) becomes one of rank N * R: its A stacked,
    its gated B side by side."""
    config = model.hydralora_config
    for name, layer in hydra_layers(model).items():
        heads = len(layer.lora_B)
        gate = torch.tensor(gates.get(name) or [1 / heads] * heads)
        b = gate.to(layer.lora_B)[:, None, None] * layer.lora_B  # (N, O, R)
        b = b.sum(0) if config["share_a"] else b.transpose(0, 1).flatten(1)  # (O, R or N * R)
        rank = b.shape[1]
        alpha = config["alpha"] * rank / config["rank"]  # alpha / rank stays
        lora = HydraLinear(layer.base, rank=rank, heads=1, alpha=alpha)
        lora.lora_A.copy_(layer.lora_A.flatten(0, -2))  # (R or N * R, I)
        lora.lora_B.copy_(b[None])
        model.set_submodule(name, lora)
    model.hydralora_config = {**config, "heads": 1, "share_a": True, "rank": rank, "alpha": alpha}


def write_lora(model, folder, base):
    """Writes the adapter of a model with one head in PEFT's format."""
    tensors = {name.replace(".lora_B0.", ".lora_B."): tensor.cpu()
               for name, tensor in official_tensors(model).items() if ".lora_route." not in name}
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", peft_config(model.hydralora_config, base))


def read_sequences(args, tokenizer, longest):
    """(sequences to calibrate on, or None; sequences to validate on). Without
    --val-data a share of --data is held out as train.py does with seed 0, or the
    embedded world's are taken."""
    data = read_records(args.data) if args.data else None
    if args.val_data:
        val = read_records(args.val_data)
    elif data:
        data, val = train_val_split(data, VAL_SHARE, seed=0)
    elif args.weights.resolve() == WORLD / "base":
        val = read_records(WORLD / "val.jsonl")
    else:
        raise ValueError("the losses are measured on records: give --val-data FILE")

    def encode(records):
        # one category, so that routing_report gives one mean gate for all
        return [replace(s, category=TOTAL) for s in encode_records(records, tokenizer, longest)[0]]

    return data and encode(data), encode(val)


def approximate(args):
    """(model with one head instead of several, a line about what that cost)."""
    model, tokenizer = load_model_and_adapter(args.weights, args.adapter, device=args.device,
                                              dtype=args.dtype)
    longest = min(MAX_SEQ_LEN, model.args.max_seq_len)
    calibration, val = read_sequences(args, tokenizer, longest)
    settings = {"precision": autocast(args.device, args.dtype)}

    def loss(name):
        return evaluate(model, val, **settings, name=name)[TOTAL]["loss"]

    with adapters_disabled(model):
        base = loss("base")
    before = loss("HydraLoRA")
    gates = {}
    if args.constant == "calibrated":
        found = routing_report(model, calibration, **settings)["gate"]
        gates = {name: means[TOTAL] for name, means in found.items()}
    flatten(model, gates)
    after = loss("one LoRA")
    return model, (f"validation loss on {len(val)} records: base {base:.4f}, HydraLoRA "
                   f"{before:.4f}, this LoRA {after:.4f} (--constant {args.constant}, not exact)")


def run(args):
    """adapter.pt -> PEFT's folder. A learned gate without --constant is refused."""
    args.device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, args.device)
    base = args.base or args.weights.resolve().name
    with atomic_dir(args.out) as folder:
        model, _ = load_model(args.weights)
        config = load_adapter_file(model, args.adapter)
        check_settings(config, SUPPORTED, "an ordinary LoRA")
        if has_router(model):
            if not args.constant:
                raise ValueError(f"{args.adapter} has {config['heads']} heads and a router, which "
                                 "no single LoRA equals: choose --constant uniform, or --constant "
                                 "calibrated --data FILE, which print what the difference costs")
            model, report = approximate(args)
        else:
            print_quantize(args.adapter, "none")
            flatten(model, {})
            report = f"exact: {'one head' if config['heads'] == 1 else 'its gate is uniform'}"
        write_lora(model, folder, base)
    print(report)
    output = hydra_layers(model).get("output")
    if output is not None and torch.equal(output.base.weight, model.tok_embeddings.weight):
        print("warning: the base's output layer equals its embedding. Hugging Face ties the two, "
              "and merging this LoRA would change both: use it unmerged")
    config = model.hydralora_config
    print(f"wrote {args.out}: rank {config['rank']}, alpha {config['alpha']:g}, "
          f'{len(hydra_layers(model))} layers, for the base model "{base}" (--base names '
          "another)")


def parse_args(argv):
    p = Parser("to_lora.py", __doc__)
    p.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter.pt of train.py")
    p.add_argument("out", metavar="DST", type=Path, help="folder to make, in PEFT's format")
    add_base_flags(p)
    p.add_argument("--constant", choices=["uniform", "calibrated"],
                   help="constant gate: 1/N, or the mean on --data (none: refuse if needed)")
    p.add_argument("--data", type=Path, help="records to calibrate the gate on (none)")
    p.add_argument("--val-data", type=Path,
                   help="records for the loss (5 %% of --data, else the embedded world's)")
    add_device_flags(p)
    args = p.parse_args(argv)
    if args.constant == "calibrated" and not args.data:
        p.error("--constant calibrated needs --data FILE, the records to take the mean gate on")
    return args


def main(argv=None):
    return run_script("to_lora.py", parse_args, run, argv, memory="--dtype bf16 needs less")


if __name__ == "__main__":
    sys.exit(main())
