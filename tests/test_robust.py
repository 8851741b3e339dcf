"""Never lose a run, never train on the wrong thing: kills, full disks, NaN, hostile files."""

import contextlib
import csv
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import cluster
import eval_mmlu
import pytest
import torch
import train
from conftest import ROOT, WORLD, tiny_model
from data import runs
from data.corpus import encode_records, hold_out, read_records
from data.files import check_tensors, read_torch, weights_fingerprint, write_file
from data.questions import encode_prompt, read_questions
from hydralora import add_hydralora, load_adapter, save_adapter
from model import Tokenizer, load_llama, read_params, save_llama

TOKENIZER = WORLD / "base" / "tokenizer.model"


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust") / "weights"
    save_llama(tiny_model(), TOKENIZER, folder)
    return folder


@pytest.fixture(scope="session")
def lines():
    """60 short records of the world."""
    with open(WORLD / "train.jsonl", encoding="utf-8") as file:
        return [line for line in file if json.loads(line)["category"] == "past"][:60]


@pytest.fixture
def data(tmp_path, lines):
    (tmp_path / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "data.jsonl"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def command(weights, data, out):
    """A run of 12 steps in well under a second; an epoch has 8 steps, the last of one batch."""
    return ["--weights", str(weights), "--data", str(data), "--out", str(out), "--heads", "2",
            "--rank", "2", "--lr", "0.01", "--max-seq-len", "128", "--device", "cpu",
            "--batch-size", "4", "--grad-accum", "2", "--epochs", "9", "--max-steps", "12",
            "--dropout", "0.2", "--save-every", "4"]


def at_step(monkeypatch, number, act, before=True):
    """act() just before the step of that number, counted over all the runs of a test, or after."""
    original, count = train.train_step, []

    def step(*arguments):
        count.append(1)
        if before and len(count) == number:
            act()
        result = original(*arguments)
        if not before and len(count) == number:
            act()
        return result

    monkeypatch.setattr(train, "train_step", step)


def stop(number=signal.SIGINT):
    return lambda: os.kill(os.getpid(), number)


def final(out):
    """The bytes of what a run leaves to use, and its log without the speed."""
    names = [name for name in ("adapter.pt", "consolidated.00.pth") if (out / name).exists()]
    rows = [row[:4] for row in csv.reader(open(out / "log.csv", encoding="utf-8"))]
    return [(name, (out / name).read_bytes()) for name in names], rows


def error_line(capsys):
    """The one line on standard error, apart from the bars of a run that had begun."""
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n")
             if ".py: " in line]
    assert len(lines) == 1, lines
    return lines[0]


# ---------------------------------------------------------------- stop and go on


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_full_fine_tuning_resumes_bit_for_bit_and_names_its_original_base(
        command, out, tmp_path, monkeypatch, dtype):
    flags = command + ["--method", "full", "--dtype", dtype, "--lr", "0.001", "--save-every", "0"]
    assert train.main(flags + ["--out", str(tmp_path / "whole")]) == 0
    at_step(monkeypatch, 3, stop())
    at_step(monkeypatch, 8, stop(signal.SIGTERM))  # the last step of the epoch
    assert train.main(flags) == 130
    assert train.main(flags + ["--resume"]) == 143
    at_step(monkeypatch, 3, stop())  # step 11
    assert train.main(flags + ["--resume"]) == 130
    assert train.main(flags + ["--resume"]) == 0
    assert final(out) == final(tmp_path / "whole")
    prints = [json.loads((folder / "run.json").read_text())["fingerprints"]
              for folder in (out, tmp_path / "whole")]
    assert prints[0] == prints[1] and prints[0]["weights"] == weights_fingerprint(command[1])
    assert prints[0]["tuned"] == weights_fingerprint(out) != prints[0]["weights"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["base", "first", "last", "tuned", "routing", "saving", "end"])
def test_a_signal_at_any_moment_loses_nothing(command, out, tmp_path, monkeypatch, capsys, moment,
                                              number):
    assert train.main(command + ["--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patched:
        def interrupt_call(module, name, wanted=lambda *arguments: True):
            original = getattr(module, name)

            def call(*arguments, **settings):
                if wanted(*arguments):
                    os.kill(os.getpid(), number)
                return original(*arguments, **settings)

            patched.setattr(module, name, call)

        if moment in ("first", "last"):
            at_step(patched, 1 if moment == "first" else 12, stop(number))
        elif moment in ("base", "tuned"):
            interrupt_call(train, "evaluate", lambda *arguments: arguments[-1] == moment)
        elif moment == "routing":
            interrupt_call(train, "routing")
        else:
            interrupt_call(train, "save_adapter" if moment == "saving" else "write_file")
        capsys.readouterr()
        assert train.main(command) == 128 + number
    printed = capsys.readouterr()
    assert not (out / "run.json").exists() and not list(out.glob("*.tmp"))
    if moment == "base":
        assert not out.exists() and "stopped before training" in printed.err
        assert train.main(command) == 0
    else:
        assert f"of step {1 if moment == 'first' else 12}; the same command with --resume" in (
            printed.out)
        assert train.main(command + ["--resume"]) == 0
    assert final(out) == final(tmp_path / "whole")
    assert sorted(path.name for path in out.iterdir()) == ["adapter.pt", "log.csv", "run.json"]


def test_a_signal_during_clustering_stops_and_a_resumed_run_keeps_its_heads(
        command, out, tmp_path, monkeypatch, capsys):
    flags = command + ["--heads", "auto"]
    assert train.main(flags + ["--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(cluster, "kmeans", lambda *a, **k: stop(signal.SIGTERM)())
        assert train.main(flags) == 143
    assert "stopped before training" in error_line(capsys) and not out.exists()
    at_step(monkeypatch, 5, stop())
    assert train.main(flags) == 130
    monkeypatch.setattr(train, "choose_heads", lambda *a, **k: pytest.fail("chosen again"))
    assert train.main(flags + ["--resume"]) == 0
    assert final(out) == final(tmp_path / "whole")
    clusters = [json.loads((folder / "run.json").read_text())["clusters"]
                for folder in (out, tmp_path / "whole")]
    assert clusters[0] == clusters[1]


KILLS = """
import os, random, signal, sys, time
from contextlib import redirect_stderr, redirect_stdout
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import torch
torch.set_num_threads(1)
import train, data.files
folder, command = sys.argv[3], sys.argv[4:]

def die_at(module, name, number):
    original, seen = getattr(module, name), []
    def call(*arguments):
        seen.append(1)
        if len(seen) == number and name == "save":  # half a checkpoint is in its temporary file
            original(*arguments)
            arguments[1].flush()
            os.truncate(arguments[1].name, arguments[1].tell() // 2)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)
    setattr(module, name, call)

def child(out, *flags, kill_at=None):
    pid = os.fork()
    if not pid:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        if kill_at:
            die_at(*kill_at)
        os._exit(train.main([*command, "--out", out, *flags]))
    return pid

def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
    train.main([*command, "--out", os.path.join(folder, "warm")])  # all that torch imports late
start = time.perf_counter()
whole = os.path.join(folder, "whole")
assert wait(child(whole)) == 0
seconds = time.perf_counter() - start
want = open(os.path.join(whole, "adapter.pt"), "rb").read()
generator, done = random.Random(0), {"whole": 0, "none": 0, "checkpoint": 0, "torn": 0}
moments = [generator.random() for _ in range(20)]
exact = [(module, name, number) for number in (2, 6)
         for module, name in ((os, "fsync"), (os, "replace"), (torch, "save"))]
for i, moment in enumerate([*moments, *exact]):
    out = os.path.join(folder, str(i))
    if isinstance(moment, float):
        pid = child(out)
        time.sleep(moment * seconds)
        os.kill(pid, signal.SIGKILL)
        status = wait(pid)
        assert status in (0, -signal.SIGKILL), status
    else:
        status = wait(child(out, kill_at=moment))
        assert status == -signal.SIGKILL, (moment, status)
    held = os.listdir(out) if os.path.exists(out) else []
    done["torn"] += any(name.endswith(".tmp") for name in held)
    if "checkpoint.pt" in held:
        done["checkpoint"] += 1
        assert wait(child(out, "--resume")) == 0, (i, held)
    elif "run.json" in held:
        done["whole"] += 1
    else:
        done["none"] += 1
        assert wait(child(out, "--overwrite")) == 0, (i, held)
    assert open(os.path.join(out, "adapter.pt"), "rb").read() == want, (i, moment)
    assert sorted(os.listdir(out)) == ["adapter.pt", "log.csv", "run.json"], os.listdir(out)
print(done)
"""


def test_killed_at_20_random_moments_and_amid_writing_every_run_ends_in_the_same_adapter(
        command, tmp_path):
    run = subprocess.run([sys.executable, "-c", KILLS, ROOT, ROOT / "data", tmp_path, *command,
                          "--save-every", "1", "--max-steps", "8"], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    done = eval(run.stdout.strip().split("\n")[-1])
    assert done["checkpoint"] >= 10 and done["torn"] >= 5, done


# ---------------------------------------------------------------- writes that fail


@contextlib.contextmanager
def file_size_limit(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_disk(path):
    """Whatever is written to path from now on meets a full disk."""
    Path(f"{path}.tmp").symlink_to("/dev/full")


@pytest.mark.parametrize("fails", ["limit", "full"])
def test_a_write_that_fails_half_way_keeps_the_former_checkpoint(command, out, tmp_path, capsys,
                                                                 monkeypatch, fails):
    if fails == "full" and not Path("/dev/full").exists():
        pytest.skip("only Linux has /dev/full")
    assert train.main(command + ["--out", str(tmp_path / "whole")]) == 0
    limit = contextlib.ExitStack()
    with monkeypatch.context() as patched, limit:
        at_step(patched, 7, lambda: full_disk(out / "checkpoint.pt") if fails == "full"
                else limit.enter_context(file_size_limit(20_000)))
        capsys.readouterr()
        assert train.main(command) == 2
    line = error_line(capsys)
    assert "checkpoint.pt cannot be written" in line and "make room" in line
    assert f"the last good checkpoint is {out / 'checkpoint.pt'}, of step 4" in line
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "log.csv"]
    assert train.main(command + ["--resume"]) == 0
    assert final(out) == final(tmp_path / "whole")


def test_a_disk_that_is_full_at_the_end_leaves_all_that_was_trained(command, out, monkeypatch,
                                                                    capsys):
    with monkeypatch.context() as patched:
        at_step(patched, 12, lambda: full_disk(out / "adapter.pt"))
        assert train.main(command) == 2
    assert "adapter.pt cannot be written" in (line := error_line(capsys)) and "of step 12" in line
    assert train.main(command + ["--resume"]) == 0 and (out / "run.json").exists()


@contextlib.contextmanager
def nobody():
    """Root may write anywhere: inside, this process is a user who may not."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_became_read_only_keeps_what_it_holds():
    folder = Path(tempfile.mkdtemp())  # where another user can come, too
    try:
        write_file(folder / "a", lambda file: file.write(b"former"))
        (folder / "a").chmod(0o644)
        folder.chmod(0o555)
        with nobody(), pytest.raises(OSError, match="a cannot be written .*make room or name"):
            write_file(folder / "a", lambda file: file.write(b"new"))
        assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("a", b"former")]
        with nobody(), pytest.raises(ValueError, match="read-only or no folder"):
            runs.check_out(train.parse_args(["--out", str(folder / "run")]))
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_any_file_that_cannot_be_finished_leaves_the_former_one(tmp_path):
    def half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    write_file(tmp_path / "a", lambda file: file.write(b"former"))
    (tmp_path / "a.tmp").write_bytes(b"left by a kill, longer than what comes")
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a", half)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"former"
    write_file(tmp_path / "a", lambda file: file.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def call(*arguments, name=name, original=original):
            place = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else ""
            calls.append((name, Path(place).name))
            return original(*arguments)

        monkeypatch.setattr(os, name, call)
    if not Path("/proc/self/fd").exists():
        pytest.skip("only Linux tells which file a descriptor is")
    write_file(tmp_path / "a", lambda file: file.write(b"x"))
    assert calls == [("fsync", "a.tmp"), ("replace", ""), ("fsync", tmp_path.name)]


def test_a_full_checkpoint_folder_is_never_half_new(weights, tmp_path):
    folder = tmp_path / "w"
    shutil.copytree(weights, folder)
    with file_size_limit(20_000), pytest.raises(OSError, match="cannot be written"):
        save_llama(tiny_model(seed=1), TOKENIZER, folder)
    with pytest.raises(ValueError, match="no params.json"):
        load_llama(folder)
    save_llama(tiny_model(seed=1), TOKENIZER, folder)  # over files that a model has mapped
    assert torch.equal(load_llama(folder)[0].output.weight, tiny_model(seed=1).output.weight)


# ---------------------------------------------------------------- not finite


def spoil_loss(monkeypatch, number, count=1):
    """Steps from that number on have a loss and a gradient that are NaN, `count` of them."""
    original, seen = train.F.cross_entropy, []

    def cross_entropy(logits, targets, reduction):
        loss = original(logits, targets, reduction=reduction)
        if reduction == "sum":
            seen.append(1)  # two batches a step
            if number <= (len(seen) + 1) // 2 < number + count:
                loss = loss * math.nan
        return loss

    monkeypatch.setattr(train.F, "cross_entropy", cross_entropy)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_nan_stops_the_run_naming_step_records_and_checkpoint_and_is_never_saved(
        command, out, lines, data, monkeypatch, capsys, dtype):
    data.write_text("\n" + "".join(lines), encoding="utf-8")  # line 1 is empty
    steps = []
    original = train.train_step
    monkeypatch.setattr(train, "train_step",
                        lambda model, batches, *rest: steps.append(batches) or original(
                            model, batches, *rest))
    spoil_loss(monkeypatch, 6)
    assert train.main(command + ["--dtype", dtype]) == 2
    line = error_line(capsys)
    assert "step 6: loss nan, gradient norm nan" in line and "start anew with a lower --lr" in line
    assert f"the last good checkpoint is {out / 'checkpoint.pt'}, of step 4" in line
    kept, _ = hold_out(read_records(data), train.VAL_SHARE, 0)
    numbers = [read_records(data).index(kept[s.record]) + 2 for b in steps[5] for s in b]
    assert f"on {', '.join(f'line {i}' for i in numbers)}: " in line
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4 and all(t.isfinite().all() for t in state["tensors"].values())
    assert not (out / "adapter.pt").exists()
    rows = list(csv.DictReader(open(out / "log.csv")))
    assert len(rows) == 6 and rows[-1]["loss"] == "nan"


def test_fp16_skips_a_step_that_is_not_finite_and_goes_on(command, out, monkeypatch):
    spoil_loss(monkeypatch, 6)
    flags = command + ["--dtype", "fp16", "--save-every", "5"]
    scales = []
    original = runs.save_checkpoint

    def save(path, args, prints, model, optimizer, scaler, step, *rest):
        scales.append(scaler.get_scale())
        original(path, args, prints, model, optimizer, scaler, step, *rest)

    monkeypatch.setattr(train, "save_checkpoint", save)
    assert train.main(flags) == 0
    assert scales == [2**16, 2**15, 2**15]
    tensors = torch.load(out / "adapter.pt", weights_only=True)["tensors"]
    assert all(t.isfinite().all() for t in tensors.values())
    rows = list(csv.DictReader(open(out / "log.csv")))
    assert [row["step"] for row in rows if not math.isfinite(float(row["grad_norm"]))] == ["6"]


def test_fp16_that_skips_for_ever_stops_also_when_resumed_half_way(command, out, monkeypatch,
                                                                    capsys):
    flags = command + ["--dtype", "fp16", "--max-steps", "50", "--save-every", "5"]
    spoil_loss(monkeypatch, 3, count=100)
    at_step(monkeypatch, 15, stop())
    assert train.main(flags) == 130
    assert train.main(flags + ["--resume"]) == 2
    line = error_line(capsys)
    assert "step 22: fp16 has skipped 20 steps in a row" in line and "bf16 or fp32" in line


def test_what_is_not_finite_is_never_written_nor_loaded(model, tmp_path):
    add_hydralora(model)
    save_adapter(model, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    with torch.no_grad():
        model.layers[1].feed_forward.w2.router[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"a.pt: 1 of 18 tensors .* layers.1.feed_forward.w2.rout"):
        save_adapter(model, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == whole
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    args = train.parse_args(["--device", "cpu"])
    with pytest.raises(ValueError, match="b.pt: 1 of .* not finite"):
        runs.save_checkpoint(tmp_path / "b.pt", args, {}, model, optimizer, torch.amp.GradScaler(
            "cpu", enabled=False), 1, {}, None)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    content["tensors"]["layers.0.feed_forward.w1.lora_A"][0, 0] = math.nan
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="not finite, layers.0.feed_forward.w1.lora_A"):
        load_adapter(tiny_model(), tmp_path / "a.pt")
    other = tiny_model()
    with torch.no_grad():
        other.norm.weight[3] = math.nan
    with pytest.raises(ValueError, match="norm.weight the first"):
        save_llama(other, TOKENIZER, tmp_path / "w")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt"]


def test_a_base_that_gives_nan_is_refused_before_training(command, out, weights, tmp_path, capsys):
    bad = shutil.copytree(weights, tmp_path / "bad")
    shard = torch.load(bad / "consolidated.00.pth", weights_only=True)
    shard["norm.weight"][0] = math.nan
    torch.save(shard, bad / "consolidated.00.pth")
    assert train.main(command + ["--weights", str(bad)]) == 2
    assert "validation loss of the base model is nan" in error_line(capsys) and not out.exists()


def test_the_loop_reads_losses_back_once_in_ten_steps(command, monkeypatch):
    waits, steps, flushes = [], [], []
    for name in ("item", "tolist", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name,
                            lambda self, original=original: waits.append(1) or original(self))
    train_step, flush = train.train_step, runs.Log.flush

    def step(*arguments):
        before = len(waits)
        result = train_step(*arguments)
        steps.append(len(waits) - before)
        return result

    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(runs.Log, "flush", lambda log: flushes.append(len(steps)) or flush(log))
    assert train.main(command + ["--max-steps", "25", "--save-every", "0"]) == 0
    assert steps == [0] * 25 and flushes == [10, 20, 25] and waits
