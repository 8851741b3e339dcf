"""Two processes of one thread against one of them: the same steps, side by side in one run.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m experiments.scaling

Process 0 takes a step alone while the others wait, then all take the same step together, and so on;
medians of the rounds. Processor time is the longest of any process: where other work runs on the
machine it says what the clock would. The model is six of the 30 layers of experiments/benchmark.py.
"""

import argparse
import statistics
import time
from unittest import mock

import torch
import torch.distributed as dist

import train
from data.corpus import Sequence
from experiments.benchmark import SCALER, SIZE
from hydralora import add_hydralora
from model import ModelArgs, Transformer
from support import distributed


def timed_step(model, batches, optimizer, args):
    """(seconds, the longest processor seconds of any process that took part)."""
    wall, processor = time.perf_counter(), time.process_time()
    train.train_step(model, batches, optimizer, SCALER, args)
    return time.perf_counter() - wall, time.process_time() - processor


def measure(options, args):
    """{"one": [(seconds, processor seconds)], "all": the same}, a pair of each round."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(n_layers=options.layers, **SIZE))
    model.init_weights(0)
    add_hydralora(model)
    optimizer, _ = train.make_optimizer(model.train(), args)
    rows = torch.randint(5, SIZE["vocab_size"], (2 * distributed.world_size(), options.tokens))
    # targets are the second half of a row
    batches = [[Sequence(row.tolist(), options.tokens // 2, 0, "")] for row in rows]
    found = {"one": [], "all": []}
    for _ in range(options.rounds + 1):
        dist.barrier()
        if distributed.rank() == 0:
            with mock.patch.object(distributed, "processes", lambda: 1):
                found["one"].append(timed_step(model, batches, optimizer, args))
        dist.barrier()
        times = [None] * distributed.world_size()
        dist.all_gather_object(times, timed_step(model, batches, optimizer, args))
        found["all"].append(tuple(map(max, zip(*times))))
    return {name: rows[1:] for name, rows in found.items()}, rows.numel()  # the first warms up


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rounds", type=int, default=7, help="pairs of steps (7)")
    p.add_argument("--layers", type=int, default=6, help="of the model (6)")
    p.add_argument("--tokens", type=int, default=256, help="of a row (256)")
    options = p.parse_args(argv)
    args = train.parse_args(["--weights", "-", "--data", "-", "--device", "cpu", "--dtype", "fp32"])
    with distributed.process_group(args):
        found, tokens = measure(options, args)
        if distributed.rank():
            return
        print(f"{'':16}{'seconds':>9}{'tokens/s':>10}{'processor s':>13}")
        medians = {}
        for name, rows in found.items():
            wall, processor = medians[name] = [statistics.median(column) for column in zip(*rows)]
            count = 1 if name == "one" else distributed.world_size()
            print(f"{count:2} {'process' if count == 1 else 'processes':13}{wall:9.3f}"
                  f"{tokens / wall:10.0f}{processor:13.3f}")
        wall, processor = (one / several for one, several in zip(medians["one"], medians["all"]))
        print(f"times as fast: {wall:.2f} by the clock, {processor:.2f} by processor time")


if __name__ == "__main__":
    main()
