"""One run by several processes, which torchrun starts: what each computes, how all end together.

    torchrun --nproc-per-node 4 train.py --weights llama-2-7b --data FILE --heads 3 --rank 8

All ranks read the same data and plan the same steps. Each takes every n-th batch of a step, and
the gradients are added up, so all have the same adapters afterwards. With --shard-base each rank
holds 1 / n of every block of the frozen base. Rank 0 prints and writes. Without torchrun none of
this runs. docs/distributed.md explains it.
"""

import os
import signal
import sys
import time
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

WAIT = timedelta(minutes=30)  # for another rank, which may write 81 GB meanwhile
GRACE = 10  # seconds that rank 0 has to print why all end, before another rank prints it
LOST = ("closed by peer", "reset by peer", "broken pipe", "timed out", "timeout")


def add_shard_flag(parser):
    parser.add_argument("--shard-base", action="store_true",
                        help="under torchrun, shard the frozen base over the processes (off)")


def under_torchrun():
    """Whether torchrun started this process, and not one that it started."""
    return {"TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK"} <= os.environ.keys()


def world_size():
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1


def rank():
    """This process's number, from 0."""
    return int(os.environ["RANK"]) if under_torchrun() else 0


def set_local_device(name):
    """Makes "cuda" mean this process's own GPU. Raises ValueError if there are too few."""
    if under_torchrun() and name.startswith("cuda"):
        wanted, found = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if name != "cuda" or wanted > found:
            raise ValueError(f"--nproc-per-node {wanted} needs {wanted} GPUs, one per process, and "
                             f"--device cuda or none; found {found} and --device {name}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


@contextmanager
def process_group(device, shard_base=False):
    """A context in which the processes of torchrun reach one another: NCCL for tensors on GPUs,
    gloo otherwise. Only rank 0 prints. Raises ValueError for shard_base without torchrun."""
    if not under_torchrun():
        if shard_base:
            raise ValueError("--shard-base shares the base among processes: start them with "
                             "torchrun --nproc-per-node N instead of python")
        yield
        return
    gpu = device.startswith("cuda")
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=WAIT)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
        yield
    dist.destroy_process_group()


# ---------------------------------------------------------------- a step


def local_batches(batches):
    """Yields (batch, weight) for this rank's batches of a step: every n-th of them, and as many as
    on every other rank, since the ranks of a sharded base run in step. A rank that has none left
    repeats the last batch with weight 0; otherwise the weight is 1. Dropout's generator is seeded
    per batch, so the masks depend neither on the number of ranks nor on which rank draws them."""
    if world_size() == 1:
        yield from ((batch, 1) for batch in batches)
        return
    seeds = torch.randint(2**62, [len(batches)]).tolist()
    common = torch.get_rng_state()
    for i in range(rank(), rank() + len(batches), world_size()):
        last = min(i, len(batches) - 1)
        torch.manual_seed(seeds[last])
        yield batches[last], int(i == last)
    torch.set_rng_state(common)


def all_reduce_gradients(parameters, loss):
    """Replaces the gradients by their sum over all ranks, through one flat buffer, and returns the
    sum of the losses. An overflow on one rank, which fp16's scaler looks for, is on all of them
    afterwards."""
    if world_size() == 1:
        return loss
    flat = torch.cat([loss[None], *(p.grad.flatten() for p in parameters)])
    dist.all_reduce(flat)
    loss, *sums = flat.split([1, *(p.numel() for p in parameters)])
    for parameter, total in zip(parameters, sums):
        parameter.grad.copy_(total.view_as(parameter))
    return loss[0].clone()  # a view would keep the whole buffer alive in the log


def map_across_ranks(batches, compute):
    """Yields (batch, compute(batch)) for every batch in order, on every rank; each rank computes
    every n-th of them."""
    if world_size() == 1:
        yield from ((batch, compute(batch)) for batch in batches)
        return
    for i in range(0, len(batches), world_size()):
        results = [None] * world_size()
        mine = batches[min(i + rank(), len(batches) - 1)]
        dist.all_gather_object(results, compute(mine))
        yield from zip(batches[i:i + world_size()], results)


def from_rank0(tensor):
    """Rank 0's values of a tensor that every rank has."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def run_on_rank0(work):
    """Runs work() on rank 0 only and broadcasts its result; if it raises ValueError or OSError,
    every rank raises it."""
    if world_size() == 1:
        return work()
    result, error = None, None
    if rank() == 0:
        try:
            result = work()
        except (ValueError, OSError) as refused:
            error = refused
    answer = [result, error]
    dist.broadcast_object_list(answer)
    result, error = answer
    if error:
        raise error
    return result


# ---------------------------------------------------------------- signals and the end


def all_reduce_signals(signals):
    """The number of the first signal in the list of any rank, 0 if there is none, so that all
    ranks stop after the same step."""
    number = signals[0] if signals else 0
    if world_size() == 1:
        return number
    number = torch.tensor(number)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def group_error(error):
    """What an error of the process group means, in a line that holds its cause; None for any
    other error."""
    if not isinstance(error, RuntimeError):
        return None
    cause = " ".join(str(error).split())[:300]
    if not (isinstance(error, dist.DistError) or "gloo" in cause):
        return None
    if any(words in cause.lower() for words in LOST):
        return ("another process of this run has ended, or did not answer for "
                f"{WAIT.seconds // 60} minutes: {cause}")
    return f"the processes of this run cannot work together: {cause}"


def wait_for_rank0_error():
    """If all ranks end for the same reason, only rank 0 prints it. Another rank waits here, and
    torchrun ends it once rank 0 has ended; otherwise the reason is its own."""
    if rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE)
