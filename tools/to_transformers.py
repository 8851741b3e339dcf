"""An adapter moves to transformers' LLaMA and back, still an adapter.pt.

    python -m tools.to_transformers adapter.pt for-hf.pt --weights llama-2-7b
    python -m tools.to_transformers for-hf.pt adapter.pt --weights llama-2-7b --back

The method does not change, so nothing is lost: B, A and router have Hugging Face's names,
the rows of B for wq and wk are in its order (hf_layout.py), and the fingerprint is that of
the model which tools.export_hf, or the hub's own conversion, makes of the same folder.
load_adapter(hf_model, "for-hf.pt") takes it; docs/any-model.md goes on from there.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from data import WORLD
from hydralora import add_hydralora, hydra_layers, save_adapter
from support.base import load_adapter_file, load_model, print_quantize, trained_with
from support.cli import Parser, run_script
from support.files import write_file
from tools.hf_layout import TARGETS, hf_name, hf_rows, meta_rows, rotary_heads


def hf_modules(model):
    """The weights of a Transformer under the names and in the order of rows that they have
    in transformers' LlamaForCausalLM: what an adapter needs of one."""
    root = nn.Module()
    for name, module in model.named_modules():
        if not hasattr(module, "weight"):
            continue
        copy = nn.Module()
        if isinstance(module, nn.Linear):
            copy = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        rows = hf_rows(module.weight.detach(), rotary_heads(name, model.args))
        copy.weight = nn.Parameter(rows, requires_grad=False)
        parent, path = root, hf_name(name).split(".")
        for part in path[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(path[-1], copy)
    return root


@torch.no_grad()
def convert(adapter, out, weights, back):
    """Writes the adapter for the other of the two models. Raises ValueError, with nothing
    written, if it was trained on another base."""
    if out.exists():
        raise ValueError(f"{out} exists already: name another file, or move it away")
    meta, _ = load_model(weights)
    hf = hf_modules(meta)
    source, target = (hf, meta) if back else (meta, hf)
    names = {theirs: ours for ours, theirs in TARGETS.items()} if back else TARGETS
    config = load_adapter_file(source, adapter)
    print_quantize(adapter, "none")
    before = trained_with(adapter)
    if before != "none":
        target.quantized = before  # nothing is; the new file says it as well
    targets = [names[name] for name in config["targets"]]
    add_hydralora(target, **{**config, "targets": targets})
    hf_layers = hydra_layers(hf)
    for name, layer in hydra_layers(meta).items():
        heads = rotary_heads(name, meta.args)
        pair = [layer, hf_layers[hf_name(name)]]
        old, new = reversed(pair) if back else pair
        new.lora_A.copy_(old.lora_A)
        if old.router is not None:
            new.router.copy_(old.router)
        for old_b, new_b in zip(old.lora_B, new.lora_B):
            new_b.copy_((meta_rows if back else hf_rows)(old_b, heads))
    write_file(out, lambda file: save_adapter(target, file))
    print(f"wrote {out}: for {'our model' if back else 'transformers'}, targets "
          f"{','.join(targets)}")


def parse_args(argv):
    p = Parser("to_transformers.py", __doc__)
    p.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter.pt to convert")
    p.add_argument("out", metavar="OUT", type=Path, help="file to make")
    p.add_argument("--weights", type=Path, default=WORLD / "base",
                   help="folder of the base model in Meta's layout (the embedded world's)")
    p.add_argument("--back", action="store_true",
                   help="from transformers' names to ours (from ours to transformers')")
    return p.parse_args(argv)


def run(args):
    convert(args.adapter, args.out, args.weights, args.back)


def main(argv=None):
    return run_script("to_transformers.py", parse_args, run, argv)


if __name__ == "__main__":
    sys.exit(main())
