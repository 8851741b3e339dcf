"""A checkpoint of LLaMA 2 7B's shape with random weights, and what it takes to load and train it.

    python -m experiments.random_checkpoint write --out random-7b --tokenizer tokenizer.model
    python -m experiments.random_checkpoint load --weights random-7b     # time and peak memory
    python -m experiments.random_checkpoint step --weights random-7b     # of one HydraLoRA step

Under torchrun `load` and `step` take --shard-base, and tell the peak of each process.

Writes bf16 in Meta's layout, split over --shards files as Meta splits it, one tensor in memory at a
time: torch.save is given maps of a file that was filled tensor by tensor. Peaks are this process's
resident memory, pages of mapped files included (ru_maxrss).
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist

import train
from data.corpus import Sequence
from model import SPLIT_DIM, ModelArgs, Tokenizer, Transformer
from support import distributed
from support.device import peak_resident

PARAMS = dict(dim=4096, n_layers=32, n_heads=32, vocab_size=32000, multiple_of=256, norm_eps=1e-5)

POOL = 2**22


def part_shape(name, shape, shards):
    """The shape of a tensor's part in one shard: a share of the rows or columns, norms whole."""
    split = SPLIT_DIM.get(name.split(".")[-2])
    return [size // shards if axis == split else size for axis, size in enumerate(shape)]


def write(args):
    out = Path(args.out)
    out.mkdir(parents=True)
    params = {**PARAMS, "n_layers": args.layers, "dim": args.dim, "n_heads": args.dim // 128}
    params["vocab_size"] = Tokenizer(args.tokenizer).vocab_size
    with torch.device("meta"):
        model = Transformer(ModelArgs(**params))
    # random enough for time and memory: every weight from a place of its own in one drawn pool
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    for index in range(args.shards):
        shapes = {name: part_shape(name, p.shape, args.shards)
                  for name, p in model.named_parameters()}
        total = sum(torch.Size(shape).numel() for shape in shapes.values())
        scratch = out / "scratch"
        weights = torch.from_file(str(scratch), shared=True, size=total, dtype=torch.bfloat16)
        state, start = {}, 0
        for name, shape in shapes.items():
            part = weights[start:start + torch.Size(shape).numel()].view(shape)
            start += part.numel()
            part.fill_(1.0) if len(shape) == 1 else fill(part, pool, start)
            state[name] = part
        torch.save(state, out / f"consolidated.{index:02d}.pth")
        del weights, state, part
        scratch.unlink()
    shutil.copyfile(args.tokenizer, out / "tokenizer.model")
    (out / "params.json").write_text(json.dumps(params) + "\n", encoding="utf-8")


def fill(part, pool, offset):
    flat = part.view(-1)
    for i in range(0, len(flat), len(pool)):
        piece = pool.roll((offset + i) * 7919 % len(pool))
        flat[i:i + len(pool)] = piece[:len(flat) - i]


def load(args):
    args.device = "cpu"
    with distributed.process_group(args):
        model, _ = distributed.load(args.weights, args)
        report(args)


def step(args):
    """One optimiser step of HydraLoRA 3 x 8 as train.py takes it, after a first one to warm up."""
    settings = train.parse_args(["--weights", args.weights, "--data", "-", "--dtype", "bf16",
                                 "--device", "cpu", "--checkpoint-activations"])
    settings.shard_base = args.shard_base
    with distributed.process_group(settings):
        take_steps(args, settings)


def take_steps(args, settings):
    model, _ = train.load_base(settings)
    train.add_adapters(model, settings)
    model.train()
    optimizer, scaler = train.make_optimizer(model, settings)
    batch = [Sequence(list(range(5, 6 + args.tokens)), args.tokens // 2, 0, "")]
    for _ in range(2):
        started = time.perf_counter()
        loss, norm = train.train_step(model, [batch] * distributed.world_size(), optimizer, scaler,
                                      settings)
        print(f"{args.tokens} tokens, loss {loss.item():.3f}, gradient norm {norm.item():.3f}, "
              f"{time.perf_counter() - started:.1f} s", flush=True)
    report(args)


def report(args):
    shards = list(Path(args.weights).glob("consolidated.*.pth"))
    size, peaks = sum(path.stat().st_size for path in shards), [peak_resident()]
    if distributed.under_torchrun():
        peaks *= distributed.world_size()
        dist.all_gather_object(peaks, peak_resident())
    for peak in peaks:
        print(f"{args.command}: {len(shards)} shards of {size / 1e9:.2f} GB in all, peak resident "
              f"memory {peak / 1e9:.2f} GB, {peak / size:.3f} times the files")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("command", choices=["write", "load", "step"])
    p.add_argument("--out", help="write: the folder to make")
    p.add_argument("--tokenizer", help="write: a tokenizer.model to put beside the weights")
    p.add_argument("--shards", type=int, default=1, help="write: files to split over (1)")
    p.add_argument("--layers", type=int, default=32, help="write: fewer for a trial (32)")
    p.add_argument("--dim", type=int, default=4096, help="write: width, a multiple of 128 (4096)")
    p.add_argument("--weights", help="load, step: the folder")
    p.add_argument("--shard-base", action="store_true", help="load, step: in parts (off)")
    p.add_argument("--tokens", type=int, default=64, help="step: of the one sequence (64)")
    args = p.parse_args(argv)
    started = time.perf_counter()
    {"write": write, "load": load, "step": step}[args.command](args)
    if distributed.rank():
        return
    print(f"{args.command}: {time.perf_counter() - started:.1f} s in all")


if __name__ == "__main__":
    main()
