"""What tests/test_distributed.py has torchrun start: several runs one after another, since starting
Python and torch takes longer than any of them.

    torchrun --standalone --nproc-per-node 2 tests/distributed_runs.py JOBS

JOBS is a JSON file, [[name, argument, ...], ...]: each name is a function below. What it returns in
each process goes to JOBS.NUMBER.RANK.json. A run is a fork of the process that torchrun started.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # once, and not in every fork
import torch.distributed as dist
import torch.distributed.fsdp

import cluster
import eval_mmlu
import train
from data.corpus import encode_records, read_records
from experiments import scaling
from hydralora import add_hydralora, base_fingerprint
from model import generate
from support import distributed, evaluation
from support.base import load_model
from support.device import autocast
from tests.conftest import in_step
from tools import generate as talk


def run(script, *argv):
    """The exit status of a script."""
    return {"train": train, "eval_mmlu": eval_mmlu, "cluster": cluster, "talk": talk}[script].main(
        list(argv))


def last():
    """Whether this is the last of the processes."""
    return distributed.rank() == distributed.world_size() - 1


def run_stopped_at(step, *argv):
    """train.py, whose last process gets SIGTERM within the given step."""
    with in_step(int(step), lambda: last() and os.kill(os.getpid(), signal.SIGTERM)):
        return train.main(list(argv))


def run_silent_at(step, *argv):
    """train.py, whose last process sleeps within the given step for longer than others wait."""
    with (in_step(int(step), lambda: last() and time.sleep(8)),
          mock.patch.object(distributed, "WAIT", timedelta(seconds=4))):
        try:
            return train.main(list(argv))
        except SystemExit as end:
            return end.code


def look(weights, data):
    """Of a shared base: which bytes this process holds, and whether the model is that of one
    process in what it computes, in what it is known by, and with and without adapters."""
    settings = dict(precision=autocast("cpu", "fp32"))
    with distributed.process_group("cpu", shard_base=True):
        model, tokenizer = load_model(weights, device="cpu", shard_base=True)
        whole, _ = load_model(weights, device="cpu")
        held = {name: p.to_local() if hasattr(p, "to_local") else p
                for name, p in model.named_parameters()}
        found = {"fingerprint": base_fingerprint(model) == base_fingerprint(whole),
                 "held": {name: p.nbytes for name, p in held.items()},
                 "behind": {name: p.untyped_storage().nbytes() for name, p in held.items()},
                 "frozen": not any(p.requires_grad for p in model.parameters())}
        both = []
        for one in (model, whole):
            torch.manual_seed(0)
            add_hydralora(one)
            val, _ = encode_records(read_records(data)[:7], tokenizer, 128)
            both.append([evaluation.evaluate(one, val, **settings),
                         evaluation.routing_report(one, val, **settings),
                         generate(one, tokenizer, ["Name it.", "A"], max_new_tokens=4)])
        found["equal"] = both[0] == both[1]
    return found


def talk_with_ties(*argv):
    """tools.generate, in which every process takes a token of its own for the most likely."""
    texts = []

    def text_of(tokenizer, tokens, before=()):
        texts.append(list(tokens))
        return ""

    def own(logits, *settings):
        return torch.full((len(logits),), 40 + distributed.rank())

    with mock.patch.object(talk, "sample", own), mock.patch.object(talk, "text_of", text_of):
        talk.main(list(argv))
    return texts[-1]


def scaling_steps(*argv):
    """How many steps of training the benchmark takes in this process."""
    taken, original = [], train.train_step
    def counted(*given, **settings):
        taken.append(1)
        return original(*given, **settings)

    with mock.patch.object(train, "train_step", counted):
        scaling.main(list(argv))
    return len(taken)


def meet(name, backend, *, timeout, init=dist.init_process_group):
    """init_process_group, at a place of its own for every run."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    init(backend, timeout=timeout, store=dist.PrefixStore(name, store), rank=distributed.rank(),
         world_size=distributed.world_size())


def main():
    distributed.GRACE = 0  # torchrun ends nothing here
    for i, (name, *arguments) in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        if child := os.fork():
            if os.waitpid(child, 0)[1]:
                sys.exit(f"{name} failed")
            continue
        with mock.patch.object(dist, "init_process_group", partial(meet, str(i))):
            result = globals()[name](*arguments)
        Path(f"{sys.argv[1]}.{i}.{distributed.rank()}.json").write_text(json.dumps(result))
        sys.exit(0)


if __name__ == "__main__":
    main()
