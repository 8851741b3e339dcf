"""Shared by the tests: paths, a tiny random model, and how to run a script as a user would."""

import contextlib
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch

import train
from data import WORLD
from model import ModelArgs, Tokenizer, Transformer, save_llama

# Several processes of many threads each slow one another down; these tests need no more than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
torch.set_num_threads(1)  # of this one

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT.parent / "shared" / "assets"  # real models and data, where somebody put them


def asset(name):
    """The path of a real file, or a skip that says which one is absent."""
    path = ASSETS / name
    if not path.exists():
        pytest.skip(f"{name} is not in {ASSETS}")
    return path


@contextlib.contextmanager
def file_size_limit(size):
    """Inside, every file that this process writes ends at so many bytes, its own output too."""
    resource = pytest.importorskip("resource", reason="only Unix limits the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tiny_args(**changes):
    return ModelArgs(**{**dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=768,
                               multiple_of=8, max_seq_len=128), **changes})


def tiny_model(seed=0, **changes):
    model = Transformer(tiny_args(**changes))
    model.init_weights(seed)
    with torch.no_grad():  # large enough for every path to matter in a comparison
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def weights(model, tmp_path):
    """A checkpoint folder of the tiny model."""
    save_llama(model, WORLD / "base" / "tokenizer.model", tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(WORLD / "base" / "tokenizer.model")


@contextlib.contextmanager
def in_step(number, act):
    """Inside, act() is called at the start of that training step, counted from 1."""
    original, taken = train.train_step, []

    def counted(*arguments, **settings):
        taken.append(1)
        if len(taken) == number:
            act()
        return original(*arguments, **settings)

    with mock.patch.object(train, "train_step", counted):
        yield


def status_of(main, flags):
    """The exit status of a script, also if its flags are refused."""
    try:
        return main([str(flag) for flag in flags])
    except SystemExit as end:
        return end.code


def interrupt():
    """Ctrl-C to this process."""
    os.kill(os.getpid(), signal.SIGINT)
