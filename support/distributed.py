"""One run by several processes, which torchrun starts: what each computes, how all end together.

    torchrun --nproc-per-node 4 train.py --weights llama-2-7b --data FILE --heads 3 --rank 8

All read the same data and plan the same steps. Each takes every n-th batch of a step, and the
gradients are added up, so that all have the same adapters after it. With --shard-base each holds
1 / n of every block of the frozen base. Process 0 prints and writes. A process that was started
alone goes through none of this. docs/distributed.md says how it works.
"""

import os
import signal
import sys
import time
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

from model import load_llama

WAIT = timedelta(minutes=10)  # for another process, before it counts as lost
GRACE = 10  # seconds in which process 0 says why all end, before another process says it


def add_shard_flag(parser):
    parser.add_argument("--shard-base", action="store_true",
                        help="under torchrun, each process holds its share of the base (off)")


def under_torchrun():
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def world_size():
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1


def rank():
    """This process's number, from 0."""
    return int(os.environ["RANK"]) if under_torchrun() else 0


def set_local_device(name):
    """Makes "cuda" mean this process's own GPU. ValueError where there are not enough."""
    if under_torchrun() and name.startswith("cuda"):
        wanted, found = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if name != "cuda" or wanted > found:
            raise ValueError(f"--nproc-per-node {wanted} needs {wanted} GPUs, one a process, and "
                             f"--device cuda or none; found {found} and --device {name}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


@contextmanager
def process_group(args):
    """Inside, the processes of torchrun can reach one another: by NCCL what is on GPUs, by gloo the
    rest. All but process 0 print nothing. ValueError for --shard-base without torchrun."""
    if not under_torchrun():
        if args.shard_base:
            raise ValueError("--shard-base shares the base among processes: start them with "
                             "torchrun --nproc-per-node N in place of python")
        yield
        return
    gpu = args.device.startswith("cuda")
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=WAIT)
    with (open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout),
          detect_lost_ranks()):
        idle = world_size() - getattr(args, "grad_accum", world_size())
        if idle > 0:
            print(f"--grad-accum {args.grad_accum}: {idle} of {world_size()} processes have "
                  f"nothing to do; with --grad-accum {world_size()} and a smaller --batch-size "
                  "they have")
        yield
    dist.destroy_process_group()


@contextmanager
def detect_lost_ranks():
    """Inside, a process that is lost is a ConnectionError in process 0, and the end of others."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        ignore_signals()
        if rank():
            sys.exit(1)
        raise ConnectionError("another process of this run has ended, or did not answer for "
                              f"{WAIT.seconds // 60} minutes") from error


# ---------------------------------------------------------------- a step


def local_batches(batches, count):
    """Yields (batch, count) of this process's batches of a step: every n-th of them, as many as
    every other process has, since the processes of a shared base run in step. One that has no batch
    left repeats the last, divided by infinity in place of count. Dropout's generator is seeded for
    every batch, so that the masks depend neither on the number of processes nor on who does what.
    """
    if world_size() == 1:
        yield from ((batch, count) for batch in batches)
        return
    seeds, common = torch.randint(2**62, [len(batches)]).tolist(), torch.get_rng_state()
    for i in range(rank(), rank() + len(batches), world_size()):
        last = min(i, len(batches) - 1)
        torch.manual_seed(seeds[last])
        yield batches[last], count if i == last else float("inf")
    torch.set_rng_state(common)


def all_reduce_gradients(parameters, loss):
    """Puts the sum of all processes' gradients in place, by one flat buffer; returns that of their
    losses. An overflow in one of them, which fp16's scaler looks for, is in all of them then."""
    if world_size() == 1:
        return loss
    flat = torch.cat([loss[None], *(p.grad.flatten() for p in parameters)])
    dist.all_reduce(flat)
    loss, *sums = flat.split([1, *(p.numel() for p in parameters)])
    for parameter, total in zip(parameters, sums):
        parameter.grad.copy_(total.view_as(parameter))
    return loss[0]


def map_across_ranks(batches, compute):
    """Yields (batch, compute(batch)) for every batch in order, the same to all processes, of which
    each has computed every n-th."""
    if world_size() == 1:
        yield from ((batch, compute(batch)) for batch in batches)
        return
    for i in range(0, len(batches), world_size()):
        results = [None] * world_size()
        dist.all_gather_object(results, compute(batches[min(i + rank(), len(batches) - 1)]))
        yield from zip(batches[i:i + world_size()], results)


def run_on_rank0(work):
    """What work() returns in process 0, which alone calls it; what it refuses, all refuse."""
    if world_size() == 1:
        return work()
    answer = [None, None]
    if rank() == 0:
        try:
            answer[0] = work()
        except (ValueError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1]:
        raise answer[1]
    return answer[0]


# ---------------------------------------------------------------- the end


def all_reduce_signals(signals):
    """The signals that this process, or another one, had caught when all were asked, so that all
    stop after the same step. They are added to the list of what this one has caught."""
    if world_size() == 1:
        return signals
    number = torch.tensor(signals[0] if signals else 0)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    shared = [number.item()] if number else []
    signals += shared
    return shared


def ignore_signals():
    """Ignores further signals: torchrun sends one to all once a process has ended, and one more
    after Ctrl-C, to processes that are ending already."""
    if under_torchrun():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def wait_for_rank0_error():
    """Of the processes that end for one and the same reason, process 0 says it. Another one waits
    here, and torchrun ends it once process 0 has ended; else the reason is its own."""
    if rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE)


# ---------------------------------------------------------------- the base


def load(directory, args, **settings):
    """load_llama on args.device. With --shard-base no process ever holds the whole model."""
    if not getattr(args, "shard_base", False):
        return load_llama(directory, device=args.device, **settings)
    model, tokenizer = load_llama(directory, device=args.device, shard=shard, **settings)
    with torch.no_grad():  # FSDP learns from the first pass which blocks there are: all of them
        model.hidden_states(torch.zeros(1, 1, dtype=torch.long, device=args.device))
    return model, tokenizer


def shard(model, copy):
    """Divides each block of a model on the meta device among the processes; embedding, head, last
    norm and the adapters to come stay whole. A block is gathered when it computes, and freed again.
    Returns cut(name, tensor), the part of a tensor that this process holds; with copy, whole
    tensors are not those of a mapped file, and go when their parts have been copied."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor

    kind = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    mesh = init_device_mesh(kind, (world_size(),))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    wanted = dict(model.named_parameters())
    whole = {weight for weight in wanted.values() if not isinstance(weight, DTensor)}
    fully_shard(model, mesh=mesh, ignored_params=whole)
    register_fsdp_forward_method(model, "hidden_states")

    def cut(name, tensor):
        weight = wanted[name]
        if weight in whole:
            return tensor
        rows = -(-len(tensor) // world_size())  # the last processes may have fewer
        part = tensor[rank() * rows:(rank() + 1) * rows]
        return DTensor.from_local(part.clone() if copy else part, mesh, weight.placements,
                                  run_check=False, shape=weight.shape, stride=weight.stride())
    return cut
