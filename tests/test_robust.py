"""Never lose a run, never train on the wrong thing: kills, full disks, NaN, hostile files."""

import contextlib
import csv
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import cluster
import eval_mmlu
import train
from data.corpus import encode_records, read_records, train_val_split
from data.mmlu import encode_prompt, read_questions
from hydralora import add_hydralora, load_adapter, save_adapter
from model import SPLIT_DIM, load_llama, save_llama
from support import base, evaluation, files, run_folder
from support.files import check_output, weights_fingerprint, write_file, write_llama
from tests.conftest import ROOT, WORLD, file_size_limit, tiny_model

TOKENIZER = WORLD / "base" / "tokenizer.model"


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust") / "weights"
    save_llama(tiny_model(n_layers=1), TOKENIZER, folder)
    return folder


@pytest.fixture(scope="session")
def lines():
    """60 short records of the world."""
    with open(WORLD / "train.jsonl", encoding="utf-8") as file:
        return [line for line in file if json.loads(line)["category"] == "tavi"][:60]


@pytest.fixture
def data(tmp_path, lines):
    (tmp_path / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "data.jsonl"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def flags_of(weights, data, out):
    """A run of 12 steps in well under a second; an epoch has 8 steps, the last of one batch."""
    return ["--weights", str(weights), "--data", str(data), "--out", str(out), "--heads", "2",
            "--rank", "2", "--lr", "0.01", "--max-seq-len", "128", "--device", "cpu",
            "--batch-size", "4", "--grad-accum", "2", "--epochs", "9", "--max-steps", "12",
            "--dropout", "0.2", "--save-every", "4"]


@pytest.fixture
def command(weights, data, out):
    return flags_of(weights, data, out)


@pytest.fixture(scope="session")
def uninterrupted(weights, lines, tmp_path_factory):
    """What the command leaves when nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    assert train.main(flags_of(weights, folder / "data.jsonl", folder / "out")) == 0
    return final(folder / "out")


def at_step(monkeypatch, number, act, before=True):
    """act() just before the step of that number, counted over all the runs of a test, or after."""
    original, count = train.train_step, []

    def step(*arguments, **settings):
        count.append(1)
        if before and len(count) == number:
            act()
        result = original(*arguments, **settings)
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["base", "first", "last", "tuned", "routing", "saving", "end"])
def test_a_signal_at_any_moment_loses_nothing(command, out, uninterrupted, monkeypatch, capsys,
                                              moment, number):
    with monkeypatch.context() as patched:
        def interrupt_call(module, name, wanted=lambda settings: True):
            original = getattr(module, name)

            def call(*arguments, **settings):
                if wanted(settings):
                    os.kill(os.getpid(), number)
                return original(*arguments, **settings)

            patched.setattr(module, name, call)

        if moment in ("first", "last"):
            at_step(patched, 1 if moment == "first" else 12, stop(number))
        elif moment in ("base", "tuned"):
            interrupt_call(train, "evaluate", lambda settings: settings["name"] == moment)
        elif moment == "routing":
            interrupt_call(evaluation, "routing_report")
        elif moment == "saving":
            interrupt_call(run_folder, "save_adapter")
        else:
            interrupt_call(run_folder, "write_json")
        capsys.readouterr()
        assert train.main(command) == 128 + number
    printed = capsys.readouterr()
    assert not (out / "run.json").exists() and not list(out.glob("*.tmp"))
    if moment == "base":
        assert not out.exists() and "stopped before training" in printed.err
        assert train.main(command) == 0
    else:
        step = 1 if moment == "first" else 12
        assert f"of step {step}; rerun the same command with --resume" in printed.out + printed.err
        assert train.main(command + ["--resume"]) == 0
    assert final(out) == uninterrupted
    assert sorted(path.name for path in out.iterdir()) == ["adapter.pt", "log.csv", "run.json"]


def test_a_closed_terminal_stops_a_run_like_ctrl_c_and_further_signals_change_nothing(
        command, out, uninterrupted, monkeypatch, capsys):
    hint = run_folder.resume_hint

    def disturbed(folder):
        stop()()
        stop(signal.SIGTERM)()
        return hint(folder)

    with monkeypatch.context() as patched:
        at_step(patched, 3, stop(signal.SIGHUP))
        at_step(patched, 3, stop(signal.SIGTERM))  # around it: the first
        patched.setattr(run_folder, "resume_hint", disturbed)
        capsys.readouterr()
        assert train.main(command) == 128 + signal.SIGTERM  # the first one's
    assert "stopped; the last good checkpoint is" in capsys.readouterr().out
    assert train.main(command + ["--resume"]) == 0
    assert final(out) == uninterrupted


def test_a_signal_while_an_error_is_told_does_not_hide_it(command, monkeypatch, capsys):
    hint = run_folder.resume_hint
    with monkeypatch.context() as patched:
        spoil_loss(patched, 6)
        patched.setattr(run_folder, "resume_hint", lambda out: stop(signal.SIGTERM)() or hint(out))
        capsys.readouterr()
        assert train.main(command) == 2
    line = error_line(capsys)
    assert "step 6: loss nan" in line and "the last good checkpoint is" in line


@pytest.mark.parametrize("error, status, text", [
    (torch.distributed.DistBackendError("NCCL error: /dev/shm is too small"),
     2, "cannot work together: NCCL error: /dev/shm is too small"),
    (torch.distributed.DistBackendError("NCCL error: out of memory"), 1, "out of memory"),
    (RuntimeError("[gloo] Connection closed by peer [::1]:5"), 2,
     "another process of this run has ended"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), 1,
     "CUBLAS_STATUS_ALLOC_FAILED"),
])
def test_an_error_of_the_group_or_of_a_full_card_is_told_with_its_cause(
        command, monkeypatch, capsys, error, status, text):
    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr(train, "train_step", fail)
    assert train.main(command) == status
    assert text in error_line(capsys)


def test_a_script_that_is_called_leaves_the_signals_as_they_were_and_works_in_a_thread(
        command, out):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)]
    with ThreadPoolExecutor() as pool:
        assert pool.submit(train.main, command + ["--max-steps", "1"]).result() == 0
    assert (out / "adapter.pt").exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)] == before


def test_a_signal_that_is_ignored_stays_so(command, out, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        at_step(monkeypatch, 1, stop(signal.SIGHUP))
        assert train.main(command + ["--max-steps", "2"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
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
    monkeypatch.setattr(cluster, "choose_heads", lambda *a, **k: pytest.fail("chosen again"))
    assert train.main(flags + ["--resume"]) == 0
    assert final(out) == final(tmp_path / "whole")
    clusters = [json.loads((folder / "run.json").read_text())["clusters"]
                for folder in (out, tmp_path / "whole")]
    assert clusters[0] == clusters[1]


KILLS = """
import json, os, random, shutil, signal, sys, threading, time
from contextlib import redirect_stderr, redirect_stdout
import torch, tqdm
torch.set_num_threads(1)
import train
tqdm.tqdm.set_lock(threading.RLock())  # a killed fork could hold the usual one
folder, command = sys.argv[1], sys.argv[2:]

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
        while True:
            pid = child(out)
            time.sleep(moment * seconds)
            os.kill(pid, signal.SIGKILL)
            status = wait(pid)
            if status == -signal.SIGKILL:
                break
            shutil.rmtree(out)  # it had ended before: the machine is faster than it was
            seconds *= 0.7
    else:
        status = wait(child(out, kill_at=moment))
        assert status == -signal.SIGKILL, (moment, status)
    held = os.listdir(out) if os.path.exists(out) else []
    done["torn"] += any("-unfinished-" in name for name in held)
    if "checkpoint.pt" in held:
        done["checkpoint"] += 1
        assert wait(child(out, "--resume")) == 0, (i, held)
    elif "run.json" in held:  # killed after all was written
        done["whole"] += 1
        if ".lock.pid" in held:  # just before it released the lock, which locks nothing
            assert wait(child(out, "--overwrite")) == 0, (i, held)
    else:
        done["none"] += 1
        assert wait(child(out, "--overwrite")) == 0, (i, held)
    assert open(os.path.join(out, "adapter.pt"), "rb").read() == want, (i, moment)
    assert sorted(os.listdir(out)) == ["adapter.pt", "log.csv", "run.json"], os.listdir(out)
print(json.dumps(done))
"""


@pytest.mark.slow
def test_killed_at_20_random_moments_and_amid_writing_every_run_ends_in_the_same_adapter(
        command, tmp_path):
    run = subprocess.run([sys.executable, "-c", KILLS, tmp_path, *command, "--save-every", "1",
                          "--max-steps", "6", "--targets", "w1"], cwd=ROOT,
                         capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    done = json.loads(run.stdout)
    assert done["checkpoint"] >= 4 and done["torn"] >= 4, done  # the exact kills see to that


# ---------------------------------------------------------------- writes that fail


def full_disk(patched, path):
    """Whatever is written to path from now on meets a full disk."""
    inner = files.scratch_folder

    @contextlib.contextmanager
    def scratch_folder(wanted):
        with inner(wanted) as folder:
            if wanted == path:
                (folder / path.name).symlink_to("/dev/full")
            yield folder

    patched.setattr(files, "scratch_folder", scratch_folder)


@pytest.mark.parametrize("fails", ["limit", "full"])
def test_a_write_that_fails_half_way_keeps_the_former_checkpoint(command, out, uninterrupted,
                                                                 capsys, monkeypatch, fails):
    if fails == "full" and not Path("/dev/full").exists():
        pytest.skip("only Linux has /dev/full")
    limit = contextlib.ExitStack()
    with monkeypatch.context() as patched, limit:
        at_step(patched, 7, lambda: full_disk(patched, out / "checkpoint.pt") if fails == "full"
                else limit.enter_context(file_size_limit(20_000)))
        capsys.readouterr()
        assert train.main(command) == 2
    line = error_line(capsys)
    assert "checkpoint.pt cannot be written" in line and "make room" in line
    assert f"the last good checkpoint is {out / 'checkpoint.pt'}, of step 4" in line
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "log.csv"]
    assert train.main(command + ["--resume"]) == 0
    assert final(out) == uninterrupted


def test_a_disk_that_is_full_at_the_end_leaves_all_that_was_trained(command, out, monkeypatch,
                                                                    capsys):
    with monkeypatch.context() as patched:
        at_step(patched, 12, lambda: full_disk(patched, out / "adapter.pt"))
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
            check_output(folder / "run")
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_any_file_that_cannot_be_finished_leaves_the_former_one(tmp_path):
    def half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    write_file(tmp_path / "a", lambda file: file.write(b"former"))
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
    assert calls == [("fsync", "a"), ("replace", ""), ("fsync", tmp_path.name)]


def test_a_full_checkpoint_folder_is_never_half_new(weights, tmp_path):
    folder = tmp_path / "w"
    shutil.copytree(weights, folder)
    with file_size_limit(20_000), pytest.raises(OSError, match="cannot be written"):
        write_llama(tiny_model(seed=1), TOKENIZER, folder)
    former = load_llama(weights)[0].output.weight
    assert torch.equal(load_llama(folder)[0].output.weight, former)
    write_llama(tiny_model(seed=1), TOKENIZER, folder)  # over files that a model has mapped
    assert torch.equal(load_llama(folder)[0].output.weight, tiny_model(seed=1).output.weight)


# ---------------------------------------------------------------- not finite


def spoil_loss(monkeypatch, number, count=1):
    """Steps from that number on have a loss and a gradient that are NaN, `count` of them."""
    cross_entropy, train_step, steps = train.F.cross_entropy, train.train_step, []

    def spoiled(logits, targets, reduction):
        loss = cross_entropy(logits, targets, reduction=reduction)
        in_training = reduction == "sum" and number <= len(steps) < number + count
        return loss * math.nan if in_training else loss

    def counted(*arguments, **settings):
        steps.append(1)
        return train_step(*arguments, **settings)

    monkeypatch.setattr(train.F, "cross_entropy", spoiled)
    monkeypatch.setattr(train, "train_step", counted)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_nan_stops_the_run_naming_step_records_and_checkpoint_and_is_never_saved(
        command, out, lines, data, monkeypatch, capsys, dtype):
    data.write_text("\n" + "".join(lines), encoding="utf-8")  # line 1 is empty
    steps = []
    original = train.train_step
    monkeypatch.setattr(train, "train_step",
                        lambda model, batches, *rest, **settings: steps.append(batches) or original(
                            model, batches, *rest, **settings))
    spoil_loss(monkeypatch, 6)
    assert train.main(command + ["--dtype", dtype]) == 2
    line = error_line(capsys)
    assert "step 6: loss nan, gradient norm nan" in line and "start again with a lower --lr" in line
    assert f"the last good checkpoint is {out / 'checkpoint.pt'}, of step 4" in line
    kept, _ = train_val_split(read_records(data), train.VAL_SHARE, 0)
    numbers = [read_records(data).index(kept[s.record]) + 2 for b in steps[5] for s in b]
    assert f"on {', '.join(f'line {i}' for i in numbers)} of the training data: " in line
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4 and all(t.isfinite().all() for t in state["tensors"].values())
    assert not (out / "adapter.pt").exists()
    rows = list(csv.DictReader(open(out / "log.csv")))
    assert len(rows) == 6 and rows[-1]["loss"] == "nan"


def test_fp16_skips_a_step_that_is_not_finite_and_goes_on(command, out, monkeypatch):
    spoil_loss(monkeypatch, 6)
    flags = command + ["--dtype", "fp16", "--save-every", "5"]
    scales = []
    original = train.save_checkpoint

    def save(path, step, facts, model, optimizer, scaler):
        scales.append(scaler.get_scale())
        original(path, step, facts, model, optimizer, scaler)

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
    with pytest.raises(ValueError, match=r"a.pt: .*not a finite one .*w2.router"):
        save_adapter(model, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == whole
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="b.pt: 1 of .* not finite"):
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        facts = dict.fromkeys(("settings", "versions", "fingerprints", "clusters"), {})
        facts["losses"] = {"base": {}}
        run_folder.save_checkpoint(tmp_path / "b.pt", 1, facts, model, optimizer, scaler)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    content["tensors"]["layers.0.feed_forward.w1.lora_A"][0, 0] = math.nan
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"not finite\): layers.0.feed_forward.w1.lora_A"):
        load_adapter(tiny_model(), tmp_path / "a.pt")
    other = tiny_model()
    with torch.no_grad():
        other.norm.weight[3] = math.nan
    with pytest.raises(ValueError, match="norm.weight the first"):
        save_llama(other, TOKENIZER, tmp_path / "w")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt"]


def test_the_loop_reads_losses_back_once_in_ten_steps(command, monkeypatch):
    waits, steps, flushes = [], [], []
    for name in ("item", "tolist", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name,
                            lambda self, original=original: waits.append(1) or original(self))
    train_step, flush = train.train_step, run_folder.Log.flush

    def step(*arguments, **settings):
        before = len(waits)
        result = train_step(*arguments, **settings)
        steps.append(len(waits) - before)
        return result

    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(run_folder.Log, "flush",
                        lambda log: flushes.append(len(steps)) or flush(log))
    assert train.main(command + ["--max-steps", "25", "--save-every", "0"]) == 0
    assert steps == [0] * 25 and flushes == [10, 20, 25] and waits


# ---------------------------------------------------------------- hostile files


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_evil(path, trap, form):
    content = {"config": Evil(trap), "step": 1}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.fixture(scope="session")
def made(weights, lines, tmp_path_factory):
    """A folder with all that a user may have: weights w, data.jsonl, quiz, a finished run, a
    stopped one, and an adapter without its run.json."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(weights, folder / "w")
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    for part, count in (("dev", 3), ("test", 2)):
        (folder / "quiz" / part).mkdir(parents=True)
        with open(folder / "quiz" / part / f"art_{part}.csv", "w", newline="") as file:
            csv.writer(file).writerows([[f"{i} + 1?", i, i + 1, 7, "None", "B"]
                                        for i in range(count)])
    flags = ["--weights", "w", "--data", "data.jsonl", "--heads", "2", "--rank", "2", "--device",
             "cpu", "--max-seq-len", "128", "--max-steps", "4", "--batch-size", "4", "--dropout",
             "0", "--grad-accum", "2"]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert train.main(flags + ["--out", "run"]) == 0
        at_step(patched, 2, stop())
        assert train.main(flags + ["--out", "stopped"]) == 130
    (folder / "free").mkdir()
    shutil.copy(folder / "run" / "adapter.pt", folder / "free" / "mine.pt")
    return folder, flags


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of what was made, and the working directory of the test."""
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


MAINS = {"train.py": train.main, "cluster.py": cluster.main, "eval_mmlu.py": eval_mmlu.main}


def call(script, made, flags):
    """(exit status, standard error) of a script on what was made, with more flags."""
    base = {"train.py": made[1] + ["--out", "new"],
            "cluster.py": ["--weights", "w", "--data", "data.jsonl", "--k-max", "2", "--device",
                           "cpu"],
            "eval_mmlu.py": ["--weights", "w", "--data", "quiz", "--shots", "1", "--device", "cpu",
                             "--out", "mmlu.json"]}[script]
    errors = io.StringIO()
    with (contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()),
          warnings.catch_warnings()):
        warnings.simplefilter("error")  # a warning would be another line
        try:
            status = MAINS[script](base + flags)
        except SystemExit as stopped:
            status = stopped.code
    return status, errors.getvalue()


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# how torch and sentencepiece speak
LIBRARY_TEXT = re.compile("weights_only|torch.save|torch.load|Stream|zip archive|ModelProto|Errno")


def assert_refused(script, made, place, flags, words):
    before = snapshot(place)
    status, errors = call(script, made, flags)
    assert status == 2, errors
    assert errors.count("\n") == 1 and errors.startswith(f"{script}: "), errors
    assert all(word in errors for word in words), errors
    assert not LIBRARY_TEXT.search(errors), errors
    assert snapshot(place) == before


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("script, name, flags, word", [
    ("train.py", "w/consolidated.00.pth", [], "not a whole PyTorch checkpoint"),
    ("eval_mmlu.py", "free/mine.pt", ["--adapter", "free/mine.pt"], "not an adapter"),
    ("train.py", "stopped/checkpoint.pt", ["--out", "stopped", "--resume"], "not a checkpoint"),
    ("cluster.py", "features.pt", ["--cache", "features.pt"], "not a feature file")])
def test_a_malicious_pickle_runs_nothing(made, place, form, script, name, flags, word):
    write_evil(place / name, place / "trap", form)
    assert_refused(script, made, place, flags, [name, word])
    assert not (place / "trap").exists()
    with contextlib.suppress(Exception):  # the trap works: this is what a careless load would do
        torch.load(place / name, weights_only=False)
    assert (place / "trap").exists()


def text(name, content):
    return lambda place: (place / name).write_text(content, encoding="utf-8")


def data_bytes(name, content):
    return lambda place: (place / name).write_bytes(content)


def truncate(name):
    return lambda place: os.truncate(place / name, (place / name).stat().st_size // 2)


def remove(name):
    return lambda place: (place / name).unlink()


def change(name, act):
    """act on the content of a file of torch.save."""
    def do(place):
        content = torch.load(place / name, weights_only=True)
        act(content)
        torch.save(content, place / name)
    return do


def params(**values):
    def do(place):
        path = place / "w" / "params.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return do


def other_tokenizer(place):
    """One of a hundred pieces more."""
    import sentencepiece
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{i} apples and pears" for i in range(3000)]), vocab_size=900,
        model_writer=written, model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
        character_coverage=1.0, minloglevel=2, num_threads=1, max_sentencepiece_length=20)
    (place / "w" / "tokenizer.model").write_bytes(written.getvalue())


def nothing(place):
    pass


def pointer(*names):
    """Git LFS pointers instead of the files."""
    def do(place):
        for name in names:
            (place / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:"
                                      f"{'0' * 64}\nsize 13476925163\n")
    return do


def split_shard(count, keep):
    """The weights in so many shards, of which some are there."""
    def do(place):
        state = torch.load(place / SHARD, weights_only=True)
        (place / SHARD).unlink()
        for i in keep:
            torch.save({name: t if (dim := SPLIT_DIM.get(name.split(".")[-2])) is None
                        else t.chunk(count, dim)[i].clone() for name, t in state.items()},
                       place / "w" / f"consolidated.{i:02d}.pth")
    return do


def folder_of(**files):
    """A folder `other` with these files, {name with __ for a dot: text}."""
    def do(place):
        (place / "other").mkdir()
        for name, content in files.items():
            (place / "other" / name.replace("__", ".")).write_text(content)
    return do


def spoil(name):
    """Noise in the middle of an archive whose ends are whole."""
    def do(place):
        content = bytearray((place / name).read_bytes())
        content[20:400] = random.Random(0).randbytes(380)
        (place / name).write_bytes(content)
    return do


def inner(place):
    shutil.copytree(place / "w", place / "hub" / "snapshots" / "1a2b")


def tokenizer_above(place):
    (place / "w" / "tokenizer.model").rename(place / "tokenizer.model")


def unsaid_length(place):
    path = place / "w" / "params.json"
    values = json.loads(path.read_text())
    del values["max_seq_len"]
    path.write_text(json.dumps(values))


GOOD = '{"instruction": "a", "response": "b"}\n'
SHARD, ADAPTER = "w/consolidated.00.pth", "free/mine.pt"
KEY = "layers.0.feed_forward.w1.lora_A"
RESUME = ["--out", "stopped", "--resume"]
T, C, E = "train.py", "cluster.py", "eval_mmlu.py"
BAD = {
    "weights absent": (T, nothing, ["--weights", "absent"], "there is no folder absent",
                       "names of a hub are not fetched"),
    "weights empty": (T, lambda place: (place / "empty").mkdir(), ["--weights", "empty"],
                      "give the folder of a checkpoint"),
    "weights are a file": (T, nothing, ["--weights", "data.jsonl"], "data.jsonl is a file"),
    "shard missing": (T, remove(SHARD), [], "needs the shards consolidated.00.pth", "found none"),
    "shard gap": (T, lambda place: (place / SHARD).rename(place / "w" / "consolidated.02.pth"), [],
                  "without a gap", "consolidated.02.pth"),
    "shard truncated": (T, truncate(SHARD), [], "consolidated.00.pth is not a whole"),
    "shard empty": (T, data_bytes(SHARD, b""), [], "not a whole PyTorch checkpoint"),
    "shard is text": (T, text(SHARD, "version https://git-lfs"), [], "not a whole PyTorch"),
    "shard is a list": (T, lambda place: torch.save([1], place / SHARD), [], "found list"),
    "shard holds numbers": (T, change(SHARD, lambda s: s.update({"norm.weight": 3})), [],
                            "'norm.weight' is int, not a plain tensor"),
    "shard holds integers": (T, change(SHARD, lambda s: s.update(
        {"norm.weight": torch.ones(32, dtype=torch.int8)})), [], "not a plain tensor"),
    "shard claims a terabyte": (T, change(SHARD, lambda s: s.update(
        {"norm.weight": torch.ones(1).expand(2**38)})), [], "not a plain tensor"),
    "shard of hugging face": (T, change(SHARD, lambda s: s.update(
        {"model.norm.weight": s.pop("norm.weight")})), [], "missing ['norm.weight']"),
    "shard mis-shaped": (T, change(SHARD, lambda s: s.update({"norm.weight": torch.ones(31)})), [],
                         "norm.weight in w is (31,)"),
    "params broken": (T, text("w/params.json", '{"dim": 32,'), [], "params.json is not a JSON obj"),
    "params a list": (T, text("w/params.json", "[]"), [], "found list"),
    "params at odds": (T, params(dim=64), [], "its params.json asks for"),
    "params negative": (T, params(n_layers=-1), [], "n_layers must be a whole number"),
    "params of text": (T, params(dim="32"), [], "dim must be a whole number", '"32"'),
    "params huge": (T, params(dim=10**30), [], "dim must be a whole number"),
    "params of many layers": (T, params(n_layers=4000), [], "asks for 4000 layers"),
    "params without numbers": (T, params(norm_eps=math.nan), [], "norm_eps must be a number"),
    "params odd": (T, params(n_heads=5), [], "even multiple of n_heads 5"),
    "params unknown": (T, params(rope_scaling=8), [], "keys this model does not know"),
    "tokenizer missing": (T, remove("w/tokenizer.model"), [], "there is no tokenizer at"),
    "tokenizer broken": (T, text("w/tokenizer.model", "x"), [], "not a sentencepiece model"),
    "weights are a pointer": (T, pointer(SHARD), [], "consolidated.00.pth is a Git LFS pointer",
                              "13,476,925,163 bytes", "git lfs pull"),
    "params a pointer": (T, pointer("w/params.json"), [], "params.json is a Git LFS pointer"),
    "checkpoint a pointer": (T, pointer("stopped/checkpoint.pt"), RESUME, "is a Git LFS pointer"),
    "shard of old PyTorch": (T, lambda place: torch.save(
        torch.load(place / SHARD, weights_only=True), place / SHARD,
        _use_new_zipfile_serialization=False), [], "PyTorch before 1.6"),
    "second shard missing": (T, split_shard(2, [0]), [], "consolidated.01.pth is missing from w",
                             "1/2 of every tensor"),
    "shards missing": (E, split_shard(8, [0]), [],
                       "consolidated.01.pth to consolidated.07.pth are missing from w"),
    "last shards missing": (C, split_shard(4, [0, 1, 2]), [], "consolidated.03.pth is missing"),
    "first shard missing": (T, split_shard(2, [1]), [], "consolidated.00.pth is missing from w"),
    "shard between missing": (T, split_shard(4, [0, 2, 3]), [], "consolidated.01.pth is missing"),
    "a name of a hub": (T, nothing, ["--weights", "meta-llama/Llama-2-7b"],
                        "there is no folder meta-llama/Llama-2-7b", "are not fetched"),
    "a name of a hub, clustered": (C, nothing, ["--weights", "meta-llama/Llama-2-7b"],
                                   "there is no folder meta-llama/Llama-2-7b", "are not fetched"),
    "dry run of nothing": (T, nothing, ["--dry-run", "--weights", "absent"], "no folder absent"),
    "weights are a file of hugging face": (T, folder_of(config__json="{}", a__safetensors="x"), [
        "--weights", "other/a.safetensors"], "python -m tools.import_hf other"),
    "quiz a pointer": (E, pointer("quiz/test/art_test.csv"), [], "art_test.csv is a Git LFS"),
    "weights are a shard": (T, nothing, ["--weights", SHARD], "is a file: give its folder, w"),
    "weights of hugging face": (T, folder_of(config__json="{}"), ["--weights", "other"],
                                "python -m tools.import_hf other"),
    "weights of hugging face, scored": (E, folder_of(model__safetensors="x"),
                                        ["--weights", "other"], "python -m tools.import_hf other"),
    "weights of hugging face, clustered": (C, folder_of(pytorch_model__bin="x"), [
        "--weights", "other"], "python -m tools.import_hf other"),
    "weights of llama2.c": (T, folder_of(tok512__model="x", stories260K__pt="x"),
                            ["--weights", "other"], "python -m tools.import_llama2c"),
    "weights are a file of llama2.c": (T, text("a.bin", "x"), ["--weights", "a.bin"],
                                       "python -m tools.import_llama2c a.bin"),
    "weights are a run": (T, nothing, ["--weights", "run"], "run/adapter.pt to --init-adapter"),
    "weights of llama.cpp": (T, folder_of(a__gguf="x"), ["--weights", "other"], "GGUF"),
    "weights in a hub's cache": (T, inner, ["--weights", "hub"],
                                 "hub/snapshots/1a2b has: give that folder"),
    "tokenizer in the folder above": (T, tokenizer_above, [], "in the folder above: copy it"),
    "length beyond the default": (T, unsaid_length, ["--max-seq-len", "8192"],
                                  "4096, a default", "w/params.json has no max_seq_len"),
    "adapter is whole, the shard is not": (E, text(SHARD, "x"), ["--adapter", ADAPTER],
                                           "consolidated.00.pth is not a whole PyTorch"),
    "adapter damaged within": (E, spoil(ADAPTER), ["--adapter", ADAPTER], "mine.pt is not an",
                               "damaged"),
    "adapter is a folder": (E, nothing, ["--adapter", "run"], "give run/adapter.pt"),
    "adapter is any folder": (E, nothing, ["--adapter", "quiz"], "a folder without an adapter.pt"),
    "adapter of a stopped run": (E, nothing, ["--adapter", "stopped/adapter.pt"], "--resume"),
    "adapter of the authors": (E, folder_of(adapter_config__json='{"lora_nums": 3}'), [
        "--adapter", "other"], "python -m tools.official_adapter other adapter.pt"),
    "adapter of PEFT": (E, folder_of(adapter_config__json="{}", adapter_model__safetensors="x"), [
        "--adapter", "other/adapter_model.safetensors"], "an ordinary LoRA",
        "tools.official_adapter"),
    "adapter of PEFT, renamed": (E, lambda place: torch.save(
        {"base_model.model.lm_head.lora_A.weight": torch.ones(2)}, place / "a.pt"),
        ["--adapter", "a.pt"], "PEFT's layout", "tools.official_adapter"),
    "tokenizer of another vocabulary": (T, other_tokenizer, [], "do not belong together"),
    "data missing": (T, nothing, ["--data", "absent"], "there is no data file at absent"),
    "data a folder": (T, nothing, ["--data", "quiz"], "quiz is a folder: give a file in it",
                      "dev, test"),
    "data empty": (T, text("data.jsonl", " \n"), [], "holds no records"),
    "data not UTF-8": (T, data_bytes("data.jsonl", b'{"instruction": "\xff"}'), [], "not UTF-8"),
    "data with a broken line": (T, text("data.jsonl", GOOD * 2 + '{"instr'), [], "line 3 is not"),
    "data too deep": (T, text("data.jsonl", GOOD + "[" * 99999), [], "line 2 is not valid JSON"),
    "data without instruction": (T, text("data.jsonl", GOOD + '{"response": "b"}'), [],
                                 "line 2 needs a text under 'instruction'"),
    "data without response": (T, text("data.jsonl", GOOD + '{"instruction": "b"}'), [],
                              "line 2 needs a text under 'response' or 'output'"),
    "data with an empty response": (T, text("data.jsonl", GOOD + GOOD.replace('"b"', '""')), [],
                                    "line 2 has an empty response"),
    "data with a number": (T, text("data.jsonl", GOOD + GOOD.replace('"b"', "5")), [],
                           "line 2", "found int"),
    "data that is no object": (T, text("data.jsonl", GOOD + "7"), [], "line 2 is not a JSON obj"),
    "data with half a surrogate": (T, text("data.jsonl", GOOD + GOOD.replace("a\"", "\\ud800\"")),
                                   [], "line 2 has half a surrogate pair"),
    "data of one record": (T, text("data.jsonl", GOOD), [], "one record, which cannot be split"),
    "data too long": (T, text("data.jsonl", GOOD.replace('"a', f'"{"a" * 500}') + GOOD.replace(
        '"a', f'"{"c" * 500}')), [],
                      "none of the 1 records fits max_seq_len 128"),
    "data all in validation": (T, nothing, ["--val-data", "data.jsonl"], "is in the valid"),
    "validation missing": (T, nothing, ["--val-data", "absent"], "there is no data file at absent"),
    "weights without data": (T, nothing, [], "--weights needs --data"),
    "rank 0": (T, nothing, ["--rank", "0"], "--rank must be at least 1"),
    "rank huge": (T, nothing, ["--rank", "1" + "0" * 12], "is more than any layer in w is wide"),
    "heads 0": (T, nothing, ["--heads", "0"], "--heads: must be auto or a number"),
    "heads beyond numbers": (T, nothing, ["--heads", "9" * 5000], "--heads: must be auto"),
    "heads of LoRA": (T, nothing, ["--method", "lora"], "--method lora has heads 1, not 2"),
    "gate of LoRA": (T, nothing, ["--method", "lora", "--heads", "1", "--gate", "uniform"],
                     "--gate uniform requires several heads"),
    "heads auto for full": (T, nothing, ["--method", "full", "--heads", "auto"], "--heads auto"),
    "target unknown": (T, nothing, ["--targets", "w1,gate_proj"], "['gate_proj']", "there are"),
    "dropout 1": (T, nothing, ["--dropout", "1"], "--dropout must be at least 0 and below 1"),
    "rate negative": (T, nothing, ["--lr", "-1"], "--lr must be positive"),
    "alpha 0": (T, nothing, ["--alpha", "0"], "--alpha must be positive"),
    "accumulation 0": (T, nothing, ["--grad-accum", "0"], "--grad-accum must be at least 1"),
    "length beyond the model": (T, nothing, ["--max-seq-len", "999"], "more than the 128"),
    "seed negative": (T, nothing, ["--seed", "-1"], "--seed must be from 0"),
    "flag unknown": (T, nothing, ["--hedas", "2"], "--hedas", "--help"),
    "flag abbreviated": (T, nothing, ["--over"], "--over"),
    "flag of text": (T, nothing, ["--epochs", "many"], "--epochs", "many"),
    "choice unknown": (T, nothing, ["--method", "dora"], "'dora'", "lora-split"),
    "device unknown": (T, nothing, ["--device", "abacus"], "--device abacus cannot be used"),
    "device without values": (T, nothing, ["--device", "meta"], "--device meta cannot be used"),
    "out taken": (T, nothing, ["--out", "run"], "run already holds a run", "--overwrite"),
    "out stopped": (T, nothing, ["--out", "stopped"], "continue it with --resume"),
    "out under a file": (T, nothing, ["--out", "data.jsonl/run"], "data.jsonl/run cannot be"),
    "out is the weights": (T, nothing, ["--out", "w", "--overwrite"], "is the folder of the weigh"),
    "out is other weights": (T, lambda place: shutil.copytree(place / "w", place / "w2"),
                             ["--out", "w2", "--overwrite"], "so it is no run"),
    "resume and overwrite": (T, nothing, [*RESUME, "--overwrite"], "mutually exclusive"),
    "resume nothing": (T, nothing, ["--resume"], "new holds no checkpoint.pt"),
    "resume a finished run": (T, nothing, ["--out", "run", "--resume"], "the run in run has ended",
                              "--init-adapter run/adapter.pt"),
    "resume with other settings": (T, nothing, [*RESUME, "--lr", "0.5", "--rank", "3"],
                                   "lr was 0.0002, is 0.5, rank was 2, is 3"),
    "resume with other data": (T, text("data.jsonl", GOOD + GOOD.replace("b", "c")), RESUME,
                               "--resume: data changed"),
    "resume with other weights": (T, change(SHARD, lambda s: s["norm.weight"].mul_(2)), RESUME,
                                  "--resume: weights changed"),
    "resume with another tokenizer": (T, lambda place: (place / "w/tokenizer.model").write_bytes(
        (place / "w/tokenizer.model").read_bytes() + b"\x1a\x00"), RESUME, "tokenizer changed"),
    "checkpoint truncated": (T, truncate("stopped/checkpoint.pt"), RESUME, "not a checkpoint"),
    "checkpoint is an adapter": (T, lambda place: shutil.copy(
        place / ADAPTER, place / "stopped/checkpoint.pt"), RESUME, "not a checkpoint", "'base'"),
    "checkpoint with other tensors": (T, change("stopped/checkpoint.pt", lambda s: s["tensors"].pop(
        KEY)), RESUME, "does not fit this run"),
    "checkpoint with another optimiser": (T, change("stopped/checkpoint.pt", lambda s: s[
        "optimizer"]["state"][0].update(exp_avg=torch.zeros(3))), RESUME,
        "other names, shapes or dtypes"),
    "checkpoint with damaged random numbers": (T, change("stopped/checkpoint.pt", lambda s: s
        .update(rng=torch.zeros(3))), RESUME, "it is damaged; start again with --overwrite"),
    "checkpoint of NaN": (T, change("stopped/checkpoint.pt", lambda s: s["tensors"][KEY].fill_(
        math.nan)), RESUME, "not finite"),
    "adapter missing": (E, nothing, ["--adapter", "absent.pt"],
                        "there is no adapter at absent.pt", "not fetched"),
    "adapter missing from its run": (E, remove("run/adapter.pt"), ["--adapter", "run/adapter.pt"],
                                     "there is no adapter at run/adapter.pt"),
    "adapter is text": (E, nothing, ["--adapter", "data.jsonl"], "not an adapter", "or is damaged"),
    "weights of the quiz absent": (E, nothing, ["--weights", "absent", "--adapter",
                                                "run/adapter.pt"], "there is no folder absent"),
    "adapter truncated": (E, truncate(ADAPTER), ["--adapter", ADAPTER], "is not an adapter"),
    "adapter is a shard": (E, nothing, ["--adapter", SHARD], "is not an adapter"),
    "adapter of another model": (E, change(SHARD, lambda s: s["norm.weight"].mul_(2)),
                                 ["--adapter", ADAPTER], "another base model"),
    "adapter of another shape": (E, change(ADAPTER, lambda a: a["tensors"].update(
        {KEY: torch.zeros(2, 31)})), ["--adapter", ADAPTER], KEY),
    "adapter with a key missing": (E, change(ADAPTER, lambda a: a["tensors"].pop(KEY)),
                                   ["--adapter", ADAPTER], KEY, "(missing, unexpected"),
    "adapter with a key more": (E, change(ADAPTER, lambda a: a["tensors"].update(
        more=torch.zeros(1))), ["--adapter", ADAPTER], "more"),
    "adapter of NaN": (E, change(ADAPTER, lambda a: a["tensors"][KEY].fill_(math.nan)),
                       ["--adapter", ADAPTER], "not finite"),
    "adapter that asks for a terabyte": (E, change(ADAPTER, lambda a: a["config"].update(
        rank=10**11)), ["--adapter", ADAPTER], "do not match its config"),
    "adapter not of its run": (E, change("run/adapter.pt", lambda a: a["tensors"][KEY].mul_(2)),
                               ["--adapter", "run/adapter.pt"], "adapter: not what the run.json"),
    "run.json broken": (E, text("run/run.json", "{"), ["--adapter", "run/adapter.pt"],
                        "is not the run.json of a run"),
    "quiz missing": (E, nothing, ["--data", "absent"], "absent has no test/SUBJECT_test.csv"),
    "quiz not UTF-8": (E, data_bytes("quiz/test/art_test.csv", b"\xff"), [], "not UTF-8"),
    "quiz of five columns": (E, text("quiz/test/art_test.csv", "a,1,2,3,A\n"), [], "row 1: 5 col"),
    "shots beyond the quiz": (E, nothing, ["--shots", "9"], "has 3 rows, --shots asks for 9"),
    "type of shots": (E, nothing, ["--shots", "x"], "--shots"),
    "device of the quiz": (E, nothing, ["--device", "abacus"], "--device abacus cannot be used"),
    "partial of another file": (E, text("mmlu.json.partial", "3\n"), [], "mmlu.json.partial"),
    "compare with a list": (E, text("a.json", "[" * 9999), ["--compare", "a.json", "a.json"],
                            "a.json is not a result"),
    "compare nothing": (E, text("a.json", '{"settings": {}, "questions": []}'),
                        ["--compare", "a.json", "a.json"], "a.json is not a result"),
    "cluster too many": (C, nothing, ["--k-max", "0"], "--k-max must be at least 1"),
    "cluster a broken file": (C, text("data.jsonl", "{"), [], "line 1 is not valid JSON"),
    "cluster into a folder": (C, nothing, ["--out", "w"], "w is a folder"),
    "cluster on no device": (C, nothing, ["--device", "abacus"], "--device abacus cannot be used"),
    "cluster with other features": (C, lambda place: torch.save(
        {"key": "x", "features": torch.zeros(2)}, place / "f.pt"), ["--cache", "f.pt"], "f.pt"),
    "cluster with seed -1": (C, nothing, ["--seed", "-1"], "--seed must be from 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line_that_helps_and_nothing_is_written(made, place, case):
    script, prepare, flags, *words = BAD[case]
    prepare(place)
    if case == "weights without data":
        made = made[0], ["--weights", "w"]
    assert_refused(script, made, place, flags, words)


@pytest.mark.parametrize("script, flags", [
    (T, ["--data", "absent"]), (C, ["--data", "absent"]), (E, ["--adapter", "absent"])])
def test_debug_shows_the_traceback_and_keeps_the_line_and_the_status(made, place, script, flags):
    status, errors = call(script, made, flags)
    assert status == 2 and "Traceback" not in errors
    status, debugged = call(script, made, [*flags, "--debug"])
    assert status == 2 and debugged.startswith("Traceback") and debugged.endswith(errors)


@pytest.mark.parametrize("script", MAINS)
def test_memory_that_runs_out_is_one_line_and_a_bug_keeps_its_traceback(made, place, script,
                                                                         monkeypatch):
    def fail(error):
        def load(*arguments, **settings):
            raise error
        return load

    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
                  RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory"),
                  RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)."),
                  RuntimeError("CUDA error: out of memory\nSearch for cudaErrorMemoryAllocation")):
        monkeypatch.setattr(base, "load_llama", fail(error))
        status, errors = call(script, made, [])
        assert status == 1 and errors.count("\n") == 1
        assert "needs less" in errors or "smaller --batch-size" in errors
    monkeypatch.setattr(base, "load_llama", fail(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        call(script, made, [])


@pytest.mark.parametrize("script, module, name, line", [
    (C, cluster, "kmeans", "interrupted; nothing new was written"),
    (E, eval_mmlu, "letter_logprobs", "stopped; rerun the same command to continue")])
def test_sigterm_stops_the_other_scripts_as_ctrl_c_does(made, place, monkeypatch, script, module,
                                                        name, line):
    monkeypatch.setattr(module, name, lambda *a, **k: stop(signal.SIGTERM)())
    status, errors = call(script, made, [])
    assert status == 143 and errors.strip().split("\n")[-1].startswith(f"{script}: {line}")

def test_a_partial_file_with_a_foreign_line_is_refused(made, place, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(eval_mmlu, "letter_logprobs", lambda *a, **k: stop()())
        assert call(E, made, [])[0] == 130
    head = (place / "mmlu.json.partial").read_text()
    for foreign in ('{"subject": "art", "index": 0}', "3", '{"subject": [], "index": 0}'):
        (place / "mmlu.json.partial").write_text(head + foreign + "\n")
        assert_refused(E, made, place, [], ["mmlu.json.partial is not of a stopped run"])


def test_a_run_whose_log_is_gone_or_torn_goes_on(made, place):
    want = (place / "run" / "adapter.pt").read_bytes()
    rows = (place / "run" / "log.csv").read_text().splitlines()
    shutil.copytree("stopped", "torn")
    (place / "torn" / "log.csv").write_text("\r\n".join(rows[:3]) + "\r\n3,0.5")
    (place / "stopped" / "log.csv").unlink()
    for folder, first in (("stopped", "3"), ("torn", "1")):
        assert call(T, made, ["--out", folder, "--resume"])[0] == 0
        assert (place / folder / "adapter.pt").read_bytes() == want
        assert [row[0] for row in csv.reader(open(place / folder / "log.csv"))] == [
            "step", *"1234"["1234".index(first):]]


def test_activations_may_be_recomputed_from_the_checkpoint_on(made, place, monkeypatch):
    base = json.loads((place / "run" / "run.json").read_text())["fingerprints"]["adapter"]
    assert call(T, made, [*RESUME, "--checkpoint-activations"])[0] == 0
    result = json.loads((place / "stopped" / "run.json").read_text())
    assert result["settings"]["checkpoint_activations"]
    assert result["fingerprints"]["adapter"] == base


def test_a_length_that_is_a_default_does_not_become_the_tuned_models_own(made, place, capsys):
    for folder in ("stated", "unsaid"):
        if folder == "unsaid":
            unsaid_length(place)
        assert train.main([*made[1], "--method", "full", "--max-steps", "1", "--out", folder]) == 0
    stated, unsaid = (json.loads((place / folder / "params.json").read_text())
                      for folder in ("stated", "unsaid"))
    assert stated.pop("max_seq_len") == 128 and stated == unsaid
    assert load_llama(place / "unsaid")[0].args.max_seq_len == 4096
    capsys.readouterr()
    assert cluster.main(["--weights", "unsaid", "--data", "data.jsonl", "--k-max", "1", "--device",
                         "cpu", "--out", "c.json"]) == 0
    assert "prompts may have 4096, a default" in capsys.readouterr().out
    assert train.main([*made[1], "--weights", "unsaid", "--heads", "auto", "--out", "auto"]) == 0
    assert "prompts may have 4096, a default" in capsys.readouterr().out


def test_a_tokenizer_much_smaller_than_the_embedding_is_asked_about(made, place, capsys):
    for rows, warned in ((800, False), (2000, True)):
        save_llama(tiny_model(n_layers=1, vocab_size=rows), TOKENIZER, place / "w")
        assert train.main([*made[1], "--out", f"{rows}"]) == 0
        want = f"warning: {rows - 768} of the embedding's {rows} rows have no piece"
        assert (want in capsys.readouterr().out) == warned


# ---------------------------------------------------------------- fingerprints


def test_the_run_beside_an_adapter_and_beside_tuned_weights_is_compared(made, place, capsys):
    run = ["--adapter", "run/adapter.pt"]
    assert call(E, made, run)[0] == 0
    shard = torch.load(SHARD, weights_only=True)  # the same weights, another file
    torch.save(dict(reversed(shard.items())), SHARD)
    assert eval_mmlu.main(["--weights", "w", "--data", "quiz", "--shots", "1", "--device", "cpu",
                           "--out", "b.json", *run]) == 0
    assert "warning: w holds other files" in capsys.readouterr().out
    assert call(T, made, ["--method", "full", "--out", "full"])[0] == 0
    tuned = ["--weights", "full", "--out", "c.json"]
    assert call(E, made, tuned)[0] == 0
    shutil.copy(SHARD, "full/consolidated.00.pth")
    status, errors = call(E, made, tuned)
    assert status == 2 and "full are not those that its run.json describes" in errors


def test_the_fingerprint_of_large_shards_sees_every_tensor(tmp_path):
    shard = {f"t{i}": torch.zeros(2**19) for i in range(9)}  # 18 MiB: sampled, not read whole
    (tmp_path / "params.json").write_text("{}")
    seen = set()
    for name in shard:
        shard[name][12345] = 1.0
        torch.save(shard, tmp_path / "consolidated.00.pth")
        seen.add(weights_fingerprint(tmp_path))
    assert len(seen) == 9


def test_shared_records_are_counted_and_removed_from_training(made, place, capsys):
    lines = (place / "data.jsonl").read_text().splitlines(keepends=True)
    (place / "val.jsonl").write_text("".join(lines[:7]) + GOOD)
    (place / "data.jsonl").write_text("".join(lines + lines[:2]))
    assert train.main(made[1] + ["--out", "new", "--val-data", "val.jsonl"]) == 0
    assert "9 training records were removed" in capsys.readouterr().out
    assert json.loads((place / "new/run.json").read_text())["data"]["train"]["records"] == 53


# ---------------------------------------------------------------- two thousand surprises


def random_json(r, depth=0):
    kinds = ["int", "huge", "float", "text", "none", "bool"] + ["list", "dict"] * (depth < 3)
    kind = r.choice(kinds)
    if kind in ("list", "dict"):
        items = [random_json(r, depth + 1) for _ in range(r.randrange(4))]
        return items if kind == "list" else {random_text(r): item for item in items}
    return {"int": r.randrange(-9, 99), "huge": r.choice([2**31, 2**63, -2**64, 10**40]),
            "float": r.choice([math.nan, math.inf, -math.inf, 1e308, 0.5, -0.0]),
            "text": random_text(r), "none": None, "bool": r.random() < 0.5}[kind]


def random_text(r):
    letters = "aB1,.\"\\\n\r\t\0 \u2028\ud800é中😀"
    return "".join(r.choice(letters) for _ in range(r.randrange(9)))


def random_bytes(r, seed=b""):
    """Noise, or a real file cut, with some bytes changed or with noise in it."""
    noise = r.randbytes(r.randrange(200))
    if not seed or r.random() < 0.2:
        return noise
    changed = bytearray(seed)
    for _ in range(r.choice([0, 1, 3, 30])):
        changed[r.randrange(len(changed))] = r.randrange(256)
    at = r.randrange(len(changed))
    return bytes(r.choice([changed, changed[:at], changed[:at] + noise + changed[at:]]))


def mutated(r, value):
    """A JSON value or content of torch.save with some part replaced, dropped or added."""
    if isinstance(value, dict) and value and r.random() < 0.9:
        key = r.choice(list(value))
        act = r.random()
        if act < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if act < 0.2:
            return {**value, random_text(r): random_json(r)}
        return {**value, key: mutated(r, value[key])}
    if isinstance(value, torch.Tensor) and r.random() < 0.7:
        return r.choice([value.flatten(), value.reshape(-1)[:1], value.double(), value.char(),
                         value.to(torch.complex64), value.to_sparse(), value * math.nan,
                         value.new_zeros(1).expand(2**40), value.to("meta")])
    return random_json(r)


def dumps(r, value):
    return json.dumps(value, ensure_ascii=r.random() < 0.5).encode("utf-8", "surrogatepass")


FUZZ = 500  # of each of the four kinds


@pytest.fixture
def only_refusals():
    """Runs a case: it may pass or raise ValueError or OSError, nothing else, and quickly."""
    def run(kind, i, act):
        def late(*_):
            raise AssertionError(f"{kind} {i} hangs")
        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(20)
        try:
            act()
            return 1
        except (ValueError, OSError):
            return 0
        except Exception as error:
            raise AssertionError(f"{kind} {i}: {error!r}") from error
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    return run


def test_any_data_file_is_read_or_refused(tmp_path, tokenizer, lines, only_refusals):
    path, passed = tmp_path / "data.jsonl", 0
    for i in range(FUZZ):
        r = random.Random(i)
        rows = [json.loads(line) for line in r.sample(lines, 2)]
        content = r.choice([
            lambda: random_bytes(r, "".join(lines[:2]).encode()), lambda: dumps(r, random_json(r)),
            lambda: dumps(r, [mutated(r, row) for row in rows]),
            lambda: b"\n".join(dumps(r, mutated(r, row)) for row in rows)])()
        path.write_bytes(content)
        passed += only_refusals("data", i, lambda: encode_records(
            read_records(path), tokenizer, 64))
    assert 10 < passed < FUZZ


def test_any_csv_is_read_or_refused(made, place, tokenizer, only_refusals):
    path, passed = place / "quiz" / "test" / "art_test.csv", 0
    whole = path.read_bytes()

    def read():
        questions, examples = read_questions(place / "quiz", shots=1)
        for row in questions["art"]:
            encode_prompt(tokenizer, "art", examples["art"], row, 128)

    for i in range(FUZZ):
        r = random.Random(i)
        rows = [[random_text(r) if r.random() < 0.3 else "x" for _ in range(r.choice([5, 6, 6, 6]))]
                for _ in range(2)]
        text = "\n".join(",".join(row[:5] + ["A"] * (len(row) > 5)) for row in rows)
        content = r.choice([random_bytes(r, whole), dumps(r, random_json(r)),
                            text.encode("utf-8", "surrogatepass")])
        path.write_bytes(content)
        passed += only_refusals("csv", i, read)
    assert 10 < passed < FUZZ


def test_any_params_json_is_read_or_refused(made, place, only_refusals):
    path, passed = place / "w" / "params.json", 0
    whole = json.loads(path.read_text())
    for i in range(FUZZ):
        r = random.Random(i)
        content = r.choice([lambda: random_bytes(r, json.dumps(whole).encode()),
                            lambda: dumps(r, random_json(r)),
                            lambda: dumps(r, mutated(r, mutated(r, whole)))])()
        path.write_bytes(content)
        passed += only_refusals("params", i, lambda: load_llama(place / "w"))
    assert 10 < passed < FUZZ


@pytest.mark.slow
def test_any_adapter_is_loaded_or_refused(made, place, only_refusals):
    path, passed = place / ADAPTER, 0
    whole, content = path.read_bytes(), torch.load(path, weights_only=True)
    models = [load_llama(place / "w")[0]]
    names = list(models[0].state_dict())

    def load():
        try:
            load_adapter(models[-1], path)
        except ValueError:
            assert list(models[-1].state_dict()) == names  # the model as it was
            raise
        assert all(tensor.isfinite().all() for tensor in models[-1].state_dict().values())
        models.append(load_llama(place / "w")[0])

    for i in range(FUZZ):
        r = random.Random(i)
        if r.random() < 0.4:
            path.write_bytes(random_bytes(r, whole))
        else:
            torch.save(r.choice([random_json(r), mutated(r, content), mutated(r, content)]), path)
        passed += only_refusals("adapter", i, load)
    assert 10 < passed < FUZZ


@pytest.mark.slow
def test_any_checkpoint_is_resumed_or_refused(made, place):
    whole = {path.name: path.read_bytes() for path in (place / "stopped").iterdir()}
    content, statuses = torch.load("stopped/checkpoint.pt", weights_only=True), []
    keys = sorted(content)
    for i in range(4 * len(keys)):
        r, key = random.Random(i), keys[i % len(keys)]
        torch.save({**content, key: mutated(r, content[key])}, "stopped/checkpoint.pt")
        status, errors = call(T, made, RESUME)
        assert status in (0, 2) and errors.count("train.py: ") == (status == 2), (i, errors)
        statuses.append(status)
        for path in (place / "stopped").iterdir():
            path.unlink()
        for name, content_of in whole.items():
            (place / "stopped" / name).write_bytes(content_of)
    assert statuses.count(2) > len(keys)


def test_the_scripts_themselves_refuse_surprises_in_one_line(made, place):
    cases = [(T, "data.jsonl", []), (E, "quiz/test/art_test.csv", []), (T, "w/params.json", []),
             (E, ADAPTER, ["--adapter", ADAPTER]), (T, "stopped/checkpoint.pt", RESUME),
             (C, "w/params.json", ["--features", "tfidf"]), (T, SHARD, [])]
    for i, (script, name, flags) in enumerate(cases * 6):
        whole = (place / name).read_bytes()
        (place / name).write_bytes(random_bytes(random.Random(i)))
        assert_refused(script, made, place, flags, [])
        (place / name).write_bytes(whole)
