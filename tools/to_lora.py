"""HydraLoRA to one ordinary LoRA in PEFT's format, for servers that know nothing else.

    python -m tools.to_lora adapter.pt lora --weights llama-2-7b --constant calibrated --data FILE

Tian et al., NeurIPS 2024, section 3.1: under a gate w that does not depend on the token,
sum_i w_i B_i A is one LoRA with B = sum_i w_i B_i. So one head and the uniform gate are exported
exactly. A learned gate cannot be: --constant says what takes its place, 1/N or each layer's mean
gate on the data, and the validation loss before and after says what that costs.

Shapes: N heads, R rank, I width in, O width out.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from data import WORLD
from data.corpus import encode_records, read_records, train_val_split
from hydralora import HydraLinear, adapters_disabled, hydra_layers, load_adapter
from model import load_llama
from support.cli import Parser, run_script
from support.device import add_device_flags, pick_device, pick_dtype
from support.diagnose import explained
from support.evaluation import EVAL_BATCH, evaluate, routing_report
from support.files import atomic_dir, write_json
from support.run_folder import load_model_and_adapter
from tools.hf_layout import (
    TARGETS,
    check_settings,
    hf_name,
    hf_rows,
    rotary_heads,
    write_safetensors,
)
from tools.official_adapter import BASE_HELP, PREFIX, base_name
from train import MAX_SEQ_LEN, VAL_SHARE

# what flatten turns into one LoRA
SETTINGS_HELD = ("targets", "rank", "heads", "alpha", "dropout", "gate", "share_a")


@torch.no_grad()
def flatten(model, gates):
    """Replaces every HydraLinear by the LoRA that it is under the constant gate (N) of its name in
    gates. LoRA (Split) becomes one of rank N * R: its A stacked, its gated B side by side."""
    config = model.hydralora_config
    for name, layer in hydra_layers(model).items():
        b = gates[name][:, None, None] * layer.lora_B  # (N, O, R)
        b = b.sum(0) if config["share_a"] else b.transpose(0, 1).flatten(1)  # (O, R or N * R)
        rank = b.shape[1]
        lora = HydraLinear(layer.base, rank=rank, heads=1,
                           alpha=config["alpha"] * rank / config["rank"])
        lora.lora_A.copy_(layer.lora_A.flatten(0, -2))  # (R or N * R, I)
        lora.lora_B.copy_(b[None])
        model.set_submodule(name, lora)
    model.hydralora_config = {**config, "heads": 1, "share_a": True, "rank": rank,
                              "alpha": config["alpha"] * rank / config["rank"]}


def write_lora(model, folder, base):
    """Writes the adapter of a model with one head as PEFT's adapter_model.safetensors and
    adapter_config.json."""
    config, tensors = model.hydralora_config, {}
    for name, layer in hydra_layers(model).items():
        prefix, n_heads = PREFIX + hf_name(name), rotary_heads(name, model.args)
        tensors[f"{prefix}.lora_A.weight"] = layer.lora_A.cpu()
        tensors[f"{prefix}.lora_B.weight"] = hf_rows(layer.lora_B[0], n_heads).cpu()
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "inference_mode": True, "r": config["rank"], "lora_alpha": config["alpha"],
        "lora_dropout": config["dropout"], "bias": "none", "fan_in_fan_out": False,
        "target_modules": [TARGETS[name] for name in config["targets"]]})


def ties_output(model):
    """Whether the output layer's weights equal the embedding's."""
    output = hydra_layers(model)["output"].base.weight
    return torch.equal(output, model.tok_embeddings.weight)


def read_sequences(args, tokenizer, longest):
    """(sequences to calibrate on, or None; sequences to validate on). Without --val-data a share of
    --data is held out as train.py does it with seed 0, or the embedded world's are taken."""
    data = read_records(args.data) if args.data else None
    if args.val_data:
        val = read_records(args.val_data)
    elif data:
        data, val = train_val_split(data, VAL_SHARE, seed=0)
    elif args.weights.resolve() == WORLD / "base":
        val = read_records(WORLD / "val.jsonl")
    else:
        raise ValueError("the loss before and after is measured on records: give --val-data FILE")

    def encode(records):
        # one category, so that routing_report gives one mean gate for all
        return [replace(s, category="") for s in encode_records(records, tokenizer, longest)[0]]

    return data and encode(data), encode(val)


def constant_gates(model, calibration, args):
    """{layer: gate (N)}: 1/N, or the mean over every token of the calibration sequences."""
    layers = hydra_layers(model)
    if calibration is None:
        return {name: layer.lora_B.new_full((layer.settings.heads,), 1 / layer.settings.heads)
                for name, layer in layers.items()}
    mean = routing_report(model, calibration, args)["gate"]
    return {name: torch.tensor(mean[name][""], device=layer.lora_B.device)
            for name, layer in layers.items()}


def approximate(args):
    """(model with one head in place of several, the line that says what that cost)."""
    model, tokenizer = load_model_and_adapter(args)
    longest = min(MAX_SEQ_LEN, model.args.max_seq_len)
    calibration, val = read_sequences(args, tokenizer, longest)

    def loss(name):
        return evaluate(model, val, args, name)[""]["loss"]

    with adapters_disabled(model):
        base = loss("base")
    before = loss("HydraLoRA")
    used = calibration if args.constant == "calibrated" else None
    flatten(model, constant_gates(model, used, args))
    after = loss("one LoRA")
    return model, (f"validation loss on {len(val)} records: base {base:.4f}, HydraLoRA "
                   f"{before:.4f}, this LoRA {after:.4f} (--constant {args.constant}, not exact)")


def export(args):
    """adapter.pt -> PEFT's folder; a learned gate without --constant raises ValueError."""
    if args.constant == "calibrated" and not args.data:
        raise ValueError("--constant calibrated needs --data FILE, the records to take the mean "
                         "gate on")
    args.device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, args.device)
    with atomic_dir(args.out) as folder:
        with explained(weights=args.weights, adapter=args.adapter):
            model, _ = load_llama(args.weights)
            config = load_adapter(model, args.adapter)
        check_settings(config, SETTINGS_HELD, "an ordinary LoRA")
        routed = any(layer.router is not None for layer in hydra_layers(model).values())
        if routed and not args.constant:
            raise ValueError(f"{args.adapter} has {config['heads']} heads and a router, which no "
                             "single LoRA equals: choose --constant uniform, or --constant "
                             "calibrated --data FILE, and read what it costs")
        if routed:
            model, report = approximate(args)
        else:
            flatten(model, constant_gates(model, None, args))
            report = f"exact: {'one head' if config['heads'] == 1 else 'its gate is uniform'}"
        write_lora(model, folder, base_name(args))
    config = model.hydralora_config
    print(report)
    if "output" in config["targets"] and ties_output(model):
        print("warning: the base's output layer equals its embedding. Hugging Face ties the two, "
              "and merging this LoRA would change both: use it unmerged")
    print(f"wrote {args.out}: rank {config['rank']}, alpha {config['alpha']:g}, "
          f"{len(hydra_layers(model))} layers, for the base {base_name(args)} (--base names "
          "another)")


def main(argv=None):
    p = Parser("to_lora.py", __doc__)
    p.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter.pt of train.py")
    p.add_argument("out", metavar="DST", type=Path, help="folder to make, in PEFT's format")
    p.add_argument("--weights", type=Path, default=WORLD / "base",
                   help="the base model, a folder in Meta's layout (the embedded world's)")
    p.add_argument("--constant", choices=["uniform", "calibrated"],
                   help="the constant gate: 1/N, or the mean on --data (none: refuse if needed)")
    p.add_argument("--base", help=BASE_HELP)
    p.add_argument("--data", type=Path, help="records to calibrate the gate on (none)")
    p.add_argument("--val-data", type=Path,
                   help="records for the loss (5 %% of --data, else the embedded world's)")
    add_device_flags(p)
    args = p.parse_args(argv)
    args.max_seq_len, args.batch_size = None, EVAL_BATCH
    return run_script("to_lora.py", lambda: export(args), argv,
                      stopped="interrupted; nothing was written",
                      memory="--dtype bf16 needs less")


if __name__ == "__main__":
    sys.exit(main())
