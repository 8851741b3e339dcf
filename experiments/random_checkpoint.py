"""A random checkpoint of LLaMA 2 7B's shape, and what it takes to load and train it.

    python -m experiments.random_checkpoint write --out random-7b --tokenizer tokenizer.model
    python -m experiments.random_checkpoint load --weights random-7b     # time and peak memory
    python -m experiments.random_checkpoint step --weights random-7b     # of one HydraLoRA step

Under torchrun `load` and `step` take --shard-base, and print the peak of each process.
With --quantize they hold the base in int8 or NF4.

Writes bf16 in Meta's layout, split over --shards files as Meta splits it, one tensor in
memory at a time: torch.save is given maps of a file that was filled tensor by tensor.
Peaks are this process's resident memory, pages of mapped files included (ru_maxrss), and
on Linux its private memory (RssAnon, read every 5 ms), less what it had before loading.
malloc keeps freed memory unless MALLOC_MMAP_THRESHOLD_=100000 is set: set it.
"""

import json
import shutil
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

import train
from experiments.steps import LLAMA_7B, random_batch, take_step
from hydralora import add_hydralora
from model import SPLIT_DIM, ModelArgs, Tokenizer, Transformer
from support import distributed
from support.base import load_model
from support.cli import Parser, run_script
from support.device import peak_resident
from support.quantize import add_quantize_flag


def part_shape(name, shape, shards):
    """A shard's part of a tensor: 1 / shards of the rows or columns, norms whole."""
    split = SPLIT_DIM.get(name.split(".")[-2])
    return [size // shards if axis == split else size for axis, size in enumerate(shape)]


def write(out, tokenizer, *, shards, layers, dim):
    out.mkdir(parents=True)
    params = {**LLAMA_7B, "n_layers": layers, "dim": dim, "n_heads": dim // 128,
              "vocab_size": Tokenizer(tokenizer).vocab_size}
    with torch.device("meta"):
        model = Transformer(ModelArgs(**params))
    generator = torch.Generator().manual_seed(0)
    for index in range(shards):
        shapes = {name: part_shape(name, p.shape, shards) for name, p in model.named_parameters()}
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        scratch = out / "scratch"
        weights = torch.from_file(str(scratch), shared=True, size=sum(sizes), dtype=torch.bfloat16)
        state = {name: part.view(shape)
                 for (name, shape), part in zip(shapes.items(), weights.split(sizes))}
        for part in state.values():
            if part.ndim == 1:
                part.fill_(1.0)
            else:
                part.normal_(std=0.02, generator=generator)
        torch.save(state, out / f"consolidated.{index:02d}.pth")
        del weights, state, part
        scratch.unlink()
    shutil.copyfile(tokenizer, out / "tokenizer.model")
    (out / "params.json").write_text(json.dumps(params) + "\n", encoding="utf-8")


def take_steps(model, tokens):
    """Two steps of HydraLoRA 3 x 8 as train.py takes them; the first warms up."""
    model.checkpoint_activations = True
    add_hydralora(model, rank=8, heads=3, dropout=train.PAPER_RECIPE["dropout"])
    optimizer = train.make_optimizer(model.train(), lr=train.PAPER_RECIPE["lr"])
    batch = random_batch(1, tokens, model.args.vocab_size)
    for _ in range(2):
        started = time.perf_counter()
        loss, norm = take_step(model, [batch] * distributed.world_size(), optimizer)
        print(f"{tokens} tokens, loss {loss.item():.3f}, gradient norm {norm.item():.3f}, "
              f"{time.perf_counter() - started:.1f} s", flush=True)


class PrivateMemory(threading.Thread):
    """From start() on, reads this process's private memory; None where /proc is not."""

    def __init__(self):
        super().__init__(daemon=True)
        self.first = self.peak = self.read()

    def read(self):
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return next((1024 * int(line.split()[1]) for line in lines
                     if line.startswith("RssAnon")), None)

    def run(self):
        while self.first is not None:
            self.peak = max(self.peak, self.read())
            time.sleep(0.005)


def print_peaks(command, weights, private):
    """The peak of each process; of this one also the private memory."""
    if private.first is not None:
        print(f"{command}: peak private memory {(private.peak - private.first) / 1e9:.3f} GB, "
              f"{(private.read() - private.first) / 1e9:.3f} GB at the end")
    shards = list(Path(weights).glob("consolidated.*.pth"))
    size, peaks = sum(path.stat().st_size for path in shards), [peak_resident()]
    if distributed.under_torchrun():
        peaks *= distributed.world_size()
        dist.all_gather_object(peaks, peak_resident())
    for peak in peaks:
        print(f"{command}: {len(shards)} shards of {size / 1e9:.2f} GB in all, peak resident "
              f"memory {peak / 1e9:.2f} GB, {peak / size:.3f} times the files")


def parse_args(argv):
    p = Parser("experiments.random_checkpoint", __doc__)
    p.add_argument("command", choices=["write", "load", "step"])
    p.add_argument("--out", type=Path, help="write: the folder to make")
    p.add_argument("--tokenizer", help="write: a tokenizer.model to copy into the folder")
    p.add_argument("--shards", type=int, default=1, help="write: files to split over (1)")
    p.add_argument("--layers", type=int, default=32, help="write: fewer for a trial (32)")
    p.add_argument("--dim", type=int, default=4096,
                   help="write: width, a multiple of 128 (4096)")
    p.add_argument("--weights", help="load, step: the folder")
    p.add_argument("--shard-base", action="store_true", help="load, step: shard the base (off)")
    add_quantize_flag(p)
    p.add_argument("--tokens", type=int, default=64, help="step: tokens of the sequence (64)")
    return p.parse_args(argv)


def run(args):
    started = time.perf_counter()
    if args.command == "write":
        write(args.out, args.tokenizer, shards=args.shards, layers=args.layers, dim=args.dim)
    else:
        with distributed.process_group("cpu", shard_base=args.shard_base):
            private = PrivateMemory()
            private.start()
            model, _ = load_model(args.weights, device="cpu", shard_base=args.shard_base,
                                  quantize=args.quantize)
            if args.command == "step":
                take_steps(model, args.tokens)
            print_peaks(args.command, args.weights, private)
    if distributed.rank() == 0:
        print(f"{args.command}: {time.perf_counter() - started:.1f} s in all")


def main(argv=None):
    return run_script("experiments.random_checkpoint", parse_args, run, argv,
                      memory="step with fewer --tokens needs less")


if __name__ == "__main__":
    sys.exit(main())
