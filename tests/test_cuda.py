"""What must hold on a CUDA card. Each check runs on the CPU as well where it means something there,
against the CPU itself, so that the checks are known to run before a card is at hand.

    python -m pytest -q tests/test_cuda.py          # on a machine with a card: some minutes
"""

import contextlib
import csv
import gc
import json
from functools import partial
from itertools import product
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cluster
import eval_mmlu
import train
from data.corpus import Sequence, encode_records, read_records
from hydralora import adapter_parameters, add_hydralora, hydra_layers
from model import ModelArgs, Transformer, generate
from support import evaluation
from support.base import load_model_and_adapter
from support.device import DTYPES, autocast
from support.memory import Watch, measure_step
from support.run_folder import Log
from tests.conftest import WORLD, in_step, interrupt

CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card here")
DEVICES = ["cpu", pytest.param("cuda", marks=CARD)]
# how far the loss of a short run may end from the CPU's in fp32, in nats
NEAR = {"fp32": 2e-3, "bf16": 0.05, "fp16": 0.05}
README_LOSS, README_NEAR = 0.0349, 0.01  # the whole first command, and how far a card may end

# the arguments of add_hydralora; full trains the base
METHODS = {"hydralora": {}, "lora": {"heads": 1}, "lora-split": {"share_a": False},
           "uniform": {"gate": "uniform"}, "attention": {"targets": ("wq", "wv", "output")},
           "full": None}
CHECKPOINT = {"kept": False, "checkpointed": True}


def cases(cpu, card):
    """The parameters of a test: these on the CPU, to know that it runs, those on a card."""
    return ([pytest.param("cpu", *case, id="-".join(["cpu", *case])) for case in cpu]
            + [pytest.param("cuda", *case, id="-".join(["cuda", *case]), marks=CARD)
               for case in card])


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """(path of 96 training records of the world, path of 32 validation records)."""
    folder = tmp_path_factory.mktemp("records")
    for name, count in (("train", 96), ("val", 32)):
        lines = [line for line in (WORLD / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
                 if '"tavi"' in line or '"classification"' in line]
        (folder / name).write_text("\n".join(lines[:count]), encoding="utf-8")
    return folder / "train", folder / "val"


@pytest.fixture
def command(records, monkeypatch):
    """The main command on these records. A and router start from the CPU's generator, whatever the
    device: on a GPU they would be drawn by its own, and the run would be another one."""
    original = train.add_hydralora

    def add(model, **settings):
        original(model, **settings)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in adapter_parameters(model).items():
                if not name.endswith("lora_B"):
                    bound = p.shape[-1] ** -0.5
                    p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))

    monkeypatch.setattr(train, "add_hydralora", add)
    monkeypatch.setitem(train.WORLD_RECIPE, "keep_data", None)  # nothing here asks for it
    return ["--heads", "3", "--rank", "8", "--data", str(records[0]), "--val-data",
            str(records[1]), "--batch-size", "8", "--epochs", "9", "--max-seq-len", "128"]


def result_of(folder):
    return json.loads((folder / "run.json").read_text())


def tensors_of(folder):
    return torch.load(folder / "adapter.pt", weights_only=True)["tensors"]


def distance(a, b):
    """The largest difference of two adapters' tensors, each by the size of its own tensor."""
    return max(((a[name] - b[name]).norm() / a[name].norm()).item() for name in a)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def reference(records, tmp_path_factory):
    """Keeps the CPU's fp32 run of the first test that makes it."""
    return {"folder": tmp_path_factory.mktemp("reference") / "run"}


@pytest.mark.slow
@pytest.mark.parametrize("device, dtype", cases([["bf16"]], product(NEAR)))
def test_the_main_command_ends_near_the_cpus(command, reference, tmp_path, device, dtype):
    flags = [*command, "--max-steps", "25"]
    if not reference["folder"].exists():
        assert train.main([*flags, "--device", "cpu", "--dtype", "fp32", "--out",
                           str(reference["folder"])]) == 0
    assert train.main([*flags, "--device", device, "--dtype", dtype, "--out",
                       str(tmp_path / "run")]) == 0
    want, got = result_of(reference["folder"])["metrics"], result_of(tmp_path / "run")["metrics"]
    assert want["val_loss"] < 0.8 * want["val_loss_base"]
    assert got["val_loss_base"] == pytest.approx(want["val_loss_base"], abs=NEAR[dtype])
    assert got["val_loss"] == pytest.approx(want["val_loss"], abs=NEAR[dtype])
    rows = [[float(row["loss"]) for row in csv.DictReader(open(folder / "log.csv"))]
            for folder in (reference["folder"], tmp_path / "run")]
    assert rows[0][0] == pytest.approx(rows[1][0], abs=NEAR[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("device, dtype", cases([], product(NEAR)))
def test_the_first_command_of_the_readme_reaches_its_loss_on_a_card(tmp_path, device, dtype):
    assert train.main(["--heads", "3", "--rank", "8", "--device", device, "--dtype", dtype,
                       "--out", str(tmp_path / "run")]) == 0
    result = result_of(tmp_path / "run")
    assert result["metrics"]["val_loss"] == pytest.approx(README_LOSS, abs=README_NEAR)
    assert 0 < result["peak_gib"] < 4


def stopped_and_resumed(flags, folder, stop_at):
    """The adapter of a run that was stopped in that step, and resumed in the same folder."""
    with in_step(stop_at, interrupt):
        assert train.main([*flags, "--out", str(folder)]) == 130
    torch.rand(7, device=flags[flags.index("--device") + 1])  # another process would differ too
    assert train.main([*flags, "--out", str(folder), "--resume"]) == 0
    return tensors_of(folder)


@contextlib.contextmanager
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize("device, dtype", cases([["fp32"]], product(NEAR)))
def test_a_stopped_run_resumes_bit_for_bit(command, tmp_path, monkeypatch, device,
                                                       dtype):
    """With torch's deterministic algorithms, dropout and all."""
    flags = [*command, "--device", device, "--dtype", dtype, "--dropout", "0.2", "--max-steps", "7"]
    with deterministic(monkeypatch):
        assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
        resumed = stopped_and_resumed(flags, tmp_path / "run", stop_at=5)
    whole = tensors_of(tmp_path / "whole")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("device, dtype", cases([["fp32"]], product(NEAR)))
def test_by_default_resuming_adds_no_difference(command, tmp_path, device, dtype):
    """The backward pass of a card's fast attention adds up in an order that may change, so two
    whole runs may differ by rounding; a resumed run then differs no more than they do."""
    flags = [*command, "--device", device, "--dtype", dtype, "--dropout", "0.2", "--max-steps", "7"]
    for name in ("whole", "again"):
        assert train.main([*flags, "--out", str(tmp_path / name)]) == 0
    resumed = stopped_and_resumed(flags, tmp_path / "run", stop_at=5)
    whole = tensors_of(tmp_path / "whole")
    apart = distance(whole, tensors_of(tmp_path / "again"))
    print(f"{device}, {dtype}: two whole runs differ by {apart:.1e}, the resumed one from the "
          f"first by {distance(whole, resumed):.1e}")
    assert apart < 0.05 and distance(whole, resumed) <= 5 * apart


# ---------------------------------------------------------------- nothing waits


class Reads(TorchDispatchMode):
    """Raises at what would make a GPU's queue be waited for: a value or a count that Python reads.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1:2]))
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal",
                               "_unique2", "unique_dim", "repeat_interleave"):
            raise RuntimeError(f"{name} reads from the device")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def nothing_waits(device):
    """Within this context, waiting for the device raises RuntimeError."""
    if device == "cpu":
        with Reads():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
def test_a_wait_for_the_device_is_noticed(device):
    x = torch.ones(3, device=device)
    for read in (lambda: x.sum().item(), lambda: x[x > 0], lambda: bool(x[0] > 0)):
        with pytest.raises(RuntimeError), nothing_waits(device):
            read()
    with nothing_waits(device):
        x[torch.zeros_like(x, dtype=torch.long)].sum()


def prepared(device, dtype, settings, *, checkpoint, shape):
    """(model as train.py would train it, its optimizer, its scaler), of random weights."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**shape))
    model.init_weights(0)
    model.to(device, torch.float32 if settings is None else DTYPES[dtype])
    if settings is not None:
        add_hydralora(model, **settings)
    with torch.no_grad():
        for layer in hydra_layers(model).values():
            layer.lora_B.normal_(std=0.1)
    model.checkpoint_activations = checkpoint
    scaler = torch.amp.GradScaler(device, enabled=dtype == "fp16")
    return model.train(), train.make_optimizer(model, lr=2e-4), scaler


def batch_of(rows, tokens):
    """Sequences that make `tokens` positions per row, every one of them a target."""
    return [Sequence([5 + i % 700 for i in range(row, row + tokens + 1)], 1, row, "")
            for row in range(rows)]


@pytest.mark.parametrize("device, dtype, method, again", cases(
    product(["fp16"], METHODS, CHECKPOINT), product(NEAR, METHODS, CHECKPOINT)))
def test_nothing_between_two_logs_waits_for_the_device(tmp_path, device, dtype, method, again):
    shape = dict(dim=64, n_layers=2, n_heads=4, vocab_size=768, multiple_of=32, max_seq_len=128)
    model, optimizer, scaler = prepared(device, dtype, METHODS[method], shape=shape,
                                        checkpoint=CHECKPOINT[again])
    batches = [batch_of(2, 20), batch_of(1, 33)]
    losses = []

    def take_step(step):
        loss, norm = train.train_step(model, batches, optimizer, scaler, clip=1.0,
                                      precision=autocast(device, dtype))
        log.add(step, loss, norm, 1e-3, batches)
        losses.append(loss)

    with Log(tmp_path / "log.csv", 0, fp16=dtype == "fp16") as log:
        take_step(1)  # the first makes the optimizer's state and loads kernels
        with nothing_waits(device):
            for step in (2, 3, 4):
                take_step(step)
    assert len(losses) == 4 and all(torch.isfinite(loss).item() for loss in losses)


# ---------------------------------------------------------------- memory


SMALL = dict(dim=128, n_layers=3, n_heads=4, vocab_size=768, multiple_of=32, max_seq_len=512)
LARGE = dict(dim=1024, n_layers=4, n_heads=8, vocab_size=4096, multiple_of=256, max_seq_len=1024)


def peak_of_step(step, device):
    """Bytes that the step allocates at most, in addition to what a card holds before."""
    if device == "cpu":
        with Watch() as watch:
            step()
        return watch.peak
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.slow
@pytest.mark.parametrize("device, dtype, method, again", cases(
    product(["bf16"], ["hydralora"], CHECKPOINT),
    product(["fp32", "bf16"], METHODS, CHECKPOINT)))
def test_the_peak_of_a_step_is_what_dry_run_says_within_10_percent(device, dtype, method, again):
    """The second of two micro-batches finds the gradients of the first."""
    shape, length = (SMALL, 96) if device == "cpu" else (LARGE, 1024)

    def step(model, batches, optimizer):
        train.train_step(model, batches, optimizer, scaler, clip=1.0,
                         precision=autocast(device, dtype))

    model, optimizer, scaler = prepared(device, dtype, METHODS[method], shape=shape,
                                        checkpoint=CHECKPOINT[again])
    need = measure_step(ModelArgs(**shape), METHODS[method], dtype=dtype, quantize="none",
                        batch_size=2, length=length, checkpoint=CHECKPOINT[again], step=step,
                        make_optimizer=partial(train.make_optimizer, lr=2e-4))
    batches = [batch_of(2, length)] * 2
    step(model, batches, optimizer)
    before = need.weights + need.adapter + need.optimizer
    peak = before + peak_of_step(lambda: step(model, batches, optimizer), device)
    assert peak == pytest.approx(need.total, rel=0.1)


@contextlib.contextmanager
def scarce(device, monkeypatch):
    """Within this context, training finds too little memory; on a CPU the card's error is
    raised by hand."""
    if device == "cpu":
        def full(*arguments):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        monkeypatch.setattr(train, "target_logits", full)
        yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 48 * 2**20
    torch.cuda.set_per_process_memory_fraction(
        room / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("device", DEVICES)
def test_out_of_memory_is_one_line_and_status_1(command, tmp_path, monkeypatch, capsys, device):
    flags = [*command, "--batch-size", "96", "--max-steps", "2", "--out", str(tmp_path / "run")]
    with scarce(device, monkeypatch):
        assert train.main([*flags, "--device", device, "--dtype", "fp32"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("train.py: CUDA out of memory")
    assert "--checkpoint-activations needs less" in error


# ---------------------------------------------------------------- what else computes


@pytest.fixture(scope="module")
def adapter(records, tmp_path_factory):
    """An adapter of the world's base, trained for 25 steps on the CPU."""
    out = tmp_path_factory.mktemp("adapter") / "run"
    with mock.patch.dict(train.WORLD_RECIPE, keep_data=None):
        assert train.main(["--data", str(records[0]), "--val-data", str(records[1]), "--epochs",
                           "9", "--max-steps", "25", "--device", "cpu", "--dtype", "fp32",
                           "--out", str(out)]) == 0
    return out / "adapter.pt"


def tuned(adapter, device, dtype="fp32"):
    """(tuned model, tokenizer)."""
    return load_model_and_adapter(WORLD / "base", adapter, device=device, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_generation_gives_the_cpus_text(adapter, device):
    prompts = [record["instruction"] for record in read_records(WORLD / "val.jsonl")[:6]]
    for sampling in (dict(), dict(temperature=0.7, top_p=0.9, seed=3)):
        texts = [generate(*tuned(adapter, place), prompts, max_new_tokens=12, **sampling)
                 for place in ("cpu", device)]
        assert texts[0] == texts[1] and any(texts[0])


@pytest.mark.slow
@pytest.mark.parametrize("device, dtype", cases([["bf16"]], [["fp32"], ["bf16"]]))
def test_losses_and_routing_are_the_cpus(adapter, records, device, dtype):
    found, near = [], {"fp32": 1e-4, "bf16": 0.03}[dtype]
    for place, kind in (("cpu", "fp32"), (device, dtype)):
        model, tokenizer = tuned(adapter, place, kind)
        sequences = encode_records(read_records(records[1]), tokenizer, 128)[0]
        precision = autocast(place, kind)
        found.append((evaluation.evaluate(model, sequences, precision=precision)[""]["loss"],
                      evaluation.routing_report(model, sequences, precision=precision)))
    (want, routing), (got, other) = found
    assert got == pytest.approx(want, abs=near)
    for name, by_category in routing["gate"].items():
        assert other["entropy"][name] == pytest.approx(routing["entropy"][name], abs=near)
        for category, gate in by_category.items():
            assert other["gate"][name][category] == pytest.approx(gate, abs=near)


@pytest.mark.slow
@pytest.mark.parametrize("device, dtype", cases([["bf16"]], [["fp32"], ["bf16"]]))
def test_mmlus_scores_are_the_cpus(adapter, tmp_path, device, dtype):
    found, near = [], {"fp32": 1e-3, "bf16": 0.2}[dtype]
    for name, place, kind in (("a", "cpu", "fp32"), ("b", device, dtype)):
        assert eval_mmlu.main(["--adapter", str(adapter), "--limit", "3", "--device", place,
                               "--dtype", kind, "--out", str(tmp_path / name)]) == 0
        found.append(json.loads((tmp_path / name).read_text())["questions"])
    for a, b in zip(*found):
        assert b["logprobs"] == pytest.approx(a["logprobs"], abs=near)
        best = sorted(a["logprobs"])
        if best[-1] - best[-2] > 2 * near:
            assert a["prediction"] == b["prediction"]


@pytest.mark.parametrize("device", DEVICES)
def test_k_means_finds_the_cpus_clusters(device):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 24, generator=generator)
    x = centres[torch.randint(6, (400,), generator=generator)]
    x = x + 0.3 * torch.randn(400, 24, generator=generator)
    centroids, labels, inertia = cluster.kmeans(x, 6)
    others, theirs, lower = cluster.kmeans(x.to(device), 6)
    assert others.device.type == theirs.device.type == device
    assert lower == pytest.approx(inertia, rel=1e-5)
    assert (labels == theirs.cpu()).float().mean() > 0.99
    assert torch.allclose(centroids, others.cpu(), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_the_number_of_heads_is_the_cpus(records, tmp_path, device):
    found = []
    for place in ("cpu", device):
        out = tmp_path / f"{place}-{len(found)}.json"
        assert cluster.main(["--data", str(records[0]), "--k-max", "5", "--device", place,
                             "--out", str(out)]) == 0
        found.append(json.loads(out.read_text()))
    # on a card the features come from a base in bf16
    assert found[0]["k"] == found[1]["k"]
    assert list(found[1]["curve"].values()) == pytest.approx(
        list(found[0]["curve"].values()), rel=1e-6 if device == "cpu" else 0.02)
