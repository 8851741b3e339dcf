"""The same training steps by several processes of one thread, and by one of them.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m experiments.scaling

Rank 0 takes a step alone while the others wait, then all take the same step together,
and so on; medians of the rounds. Processor time is the longest of any process: if other
work runs on the machine, it shows what the clock would without it. The model is six of
the 30 layers of experiments/benchmark.py.
"""

import sys
import time
from statistics import median
from unittest import mock

import torch.distributed as dist

from experiments.steps import SMOL, ours, random_base, random_batch, take_step
from support import distributed
from support.cli import Parser, run_script


def timed_step(method, batches):
    """(seconds, processor seconds) of one step of these micro-batches."""
    wall, processor = time.perf_counter(), time.process_time()
    take_step(method.model, batches, method.optimizer)
    return time.perf_counter() - wall, time.process_time() - processor


def measure(method, batches, rounds):
    """{"one", "all": [(seconds, processor seconds) of each round, at the slowest]}."""
    found = {"one": [], "all": []}
    for _ in range(rounds + 1):
        dist.barrier()
        if distributed.rank() == 0:
            with mock.patch.object(distributed, "world_size", lambda: 1):
                found["one"].append(timed_step(method, batches))
        dist.barrier()
        times = [None] * distributed.world_size()
        dist.all_gather_object(times, timed_step(method, batches))
        found["all"].append(tuple(map(max, zip(*times))))
    return {name: rows[1:] for name, rows in found.items()}  # the first warms up


def parse_args(argv):
    p = Parser("experiments.scaling", __doc__)
    p.add_argument("--rounds", type=int, default=7, help="pairs of steps (7)")
    p.add_argument("--layers", type=int, default=6, help="layers of the model (6)")
    p.add_argument("--tokens", type=int, default=256, help="tokens per row (256)")
    return p.parse_args(argv)


def run(args):
    processes = distributed.world_size()
    with distributed.process_group("cpu"):
        method = ours(random_base({**SMOL, "n_layers": args.layers}), rank=8, heads=3)
        rows = random_batch(2 * processes, args.tokens, SMOL["vocab_size"])
        found = measure(method, [[row] for row in rows], args.rounds)
        print(f"{'':16}{'seconds':>9}{'tokens/s':>10}{'processor s':>13}")
        medians = []
        for name, times in found.items():
            if not times:  # another rank than 0 takes no step alone
                continue
            wall, processor = (median(column) for column in zip(*times))
            medians.append((wall, processor))
            label = "1 process" if name == "one" else f"{processes} processes"
            speed = len(rows) * args.tokens / wall
            print(f"{label:16}{wall:9.3f}{speed:10.0f}{processor:13.3f}")
        if distributed.rank() == 0:
            wall, processor = (one / several for one, several in zip(*medians))
            print(f"times as fast: {wall:.2f} by the clock, {processor:.2f} by processor time")


def main(argv=None):
    return run_script("experiments.scaling", parse_args, run, argv,
                      memory="fewer --layers need less")


if __name__ == "__main__":
    sys.exit(main())
