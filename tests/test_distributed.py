"""Several processes are one run: real torchrun on a tiny model, against one process."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import cluster
import eval_mmlu
import train
from model import save_llama
from support import distributed
from support.device import pick_device
from tests.conftest import ROOT, WORLD, tiny_model
from tests.test_model import write_shards

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

STEPS = 20
TIGHT = 1e-4  # reversing the batches of each step in one process moves adapters by 3e-5


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny checkpoint, the same in two shards, and 80 records."""
    folder = tmp_path_factory.mktemp("distributed")
    save_llama(tiny_model(), WORLD / "base" / "tokenizer.model", folder / "weights")
    write_shards(tiny_model(), folder / "shards", [1, 1])
    lines = [line for line in open(WORLD / "train.jsonl", encoding="utf-8")
             if json.loads(line)["category"] in ("tavi", "classification")][:80]
    (folder / "data.jsonl").write_text("".join(lines[:62]), encoding="utf-8")
    (folder / "val.jsonl").write_text("".join(lines[62:]), encoding="utf-8")
    return folder


def flags(place, out, *more):
    return ["--weights", str(place / "weights"), "--data", str(place / "data.jsonl"),
            "--val-data", str(place / "val.jsonl"), "--out", str(place / out), "--heads", "3",
            "--rank", "4", "--lr", "0.01", "--max-seq-len", "128", "--device", "cpu",
            "--batch-size", "4", "--grad-accum", "1", "--max-steps", str(STEPS), "--epochs", "9",
            "--dropout", "0", *more]


def start(processes, script, *argv, **settings):
    """torchrun, in a process group of its own, so that a signal to it is one to all."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(processes), script, *map(str, argv)], cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, **settings)


@contextlib.contextmanager
def started(processes, script, *argv):
    """A torchrun that is gone afterwards, whatever happens."""
    process = start(processes, script, *argv)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run_jobs(processes, folder, jobs):
    """[[result of each process] of each job], the output of all."""
    path = folder / f"jobs-{processes}.json"
    path.write_text(json.dumps(jobs))
    with started(processes, "tests/distributed_runs.py", path) as process:
        out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return [[json.loads((folder / f"{path.name}.{i}.{rank}.json").read_text())
             for rank in range(processes)] for i in range(len(jobs))], out + err


def tensors(folder):
    return torch.load(folder / "adapter.pt", weights_only=True)["tensors"]


def moved(a, b):
    """The largest difference between two adapters, which training has moved by far more."""
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys() and max(t.abs().max() for t in one.values()) > 0.1
    return max((one[name] - other[name]).abs().max().item() for name in one)


def run_of(folder):
    return json.loads((folder / "run.json").read_text())


def log_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return [[float(row[key]) for key in ("step", "loss", "grad_norm", "lr")]
                for row in csv.DictReader(file)]


# name: flags of a run by one process and by several. 62 records in batches of 4 are 16 batches an
# epoch: by three of them a step, the last step of an epoch has one
RUNS = {"accum1": [], "accum3": ["--grad-accum", "3"],
        "sharded": ["--grad-accum", "3", "--shard-base"],
        "sharded1": ["--shard-base", "--checkpoint-activations"]}
SINGLE = {"accum1": "accum1", "accum3": "accum3", "sharded": "accum3", "sharded1": "accum1"}


@pytest.fixture(scope="module")
def alone(place):
    """The runs by one process."""
    for name in set(SINGLE.values()):
        assert train.main(flags(place, f"alone-{name}", *RUNS[name])) == 0
    return place


@pytest.fixture(scope="module")
def two(place, alone):
    """Everything that two processes do: {name: result of each}, and what they print."""
    model = ["--weights", str(place / "weights"), "--device", "cpu"]
    mmlu = [*model, "--shots", "1", "--limit", "3", "--max-seq-len", "128",
            "--adapter", str(place / "alone-accum1" / "adapter.pt"), "--shard-base"]
    plan = {name: ["run", "train", *flags(place, f"two-{name}", *more)]
            for name, more in RUNS.items()}
    few = ["--max-steps", "5"]
    dropped = ["--dropout", "0.1", "--grad-accum", "2", "--max-steps", "12"]
    auto = ["--heads", "auto", "--max-steps", "2"]
    plan |= {
        "full": ["run", "train", *flags(place, "two-full", "--method", "full", *few)],
        "fp16": ["run", "train", *flags(place, "two-fp16", "--dtype", "fp16", *few)],
        "auto": ["run", "train", *flags(place, "two-auto", *auto, "--shard-base")],
        "whole": ["run", "train", *flags(place, "two-whole", *dropped)],
        "stopped": ["run_stopped_at", "5", *flags(place, "two-stopped", *dropped)],
        "resumed": ["run", "train", *flags(place, "two-stopped", *dropped, "--resume")],
        "other": ["run_stopped_at", "5", *flags(place, "two-other", *dropped)],
        "held": ["run", "train", *flags(place, "two-whole")],
        "silent": ["run_silent_at", "5", *flags(place, "two-silent", "--save-every", "3")],
        "look": ["look", str(place / "shards"), str(place / "val.jsonl")],
        "mmlu": ["run", "eval_mmlu", *mmlu, "--out", str(place / "two-mmlu.json")],
        "cluster": ["run", "cluster", *model, "--data", str(place / "data.jsonl"), "--k-max", "4",
                    "--shard-base", "--cache", str(place / "two-features"),
                    "--out", str(place / "two-clusters.json")],
        "talk": ["run", "talk", "Say it.", *model, "--max-new-tokens", "3", "--shard-base"],
        "ties": ["talk_with_ties", "Say it.", *model, "--max-new-tokens", "3", "--shard-base"],
        "scaling": ["scaling_steps", "--rounds", "2", "--layers", "1", "--tokens", "8"]}
    results, printed = run_jobs(2, place, list(plan.values()))
    return dict(zip(plan, results)), printed


@pytest.fixture(scope="module")
def three(place, alone):
    plan = {name: ["run", "train", *flags(place, f"three-{name}", *more)]
            for name, more in RUNS.items() if name in ("accum1", "sharded")}
    plan["look"] = ["look", str(place / "weights"), str(place / "val.jsonl")]
    results, printed = run_jobs(3, place, list(plan.values()))
    return dict(zip(plan, results)), printed


# ---------------------------------------------------------------- the same run


@pytest.mark.slow
@pytest.mark.parametrize("processes, name", [
    *(("two", name) for name in RUNS), ("three", "accum1"), ("three", "sharded")])
def test_several_processes_train_the_adapter_of_one(processes, name, place, request):
    results, _ = request.getfixturevalue(processes)
    assert set(results[name]) == {0}
    single, several = place / f"alone-{SINGLE[name]}", place / f"{processes}-{name}"
    assert moved(single, several) < TIGHT
    one, other = log_of(single), log_of(several)
    assert len(one) == STEPS
    for a, b in zip(one, other):
        assert a == pytest.approx(b, rel=1e-3)
    a, b = run_of(single), run_of(several)
    assert b["settings"]["processes"] == {"two": 2, "three": 3}[processes]
    assert b["data"] == a["data"] and b["fingerprints"].keys() == a["fingerprints"].keys()
    for key in ("val_loss", "val_loss_base", "exact_match", "exact_match_base"):
        assert b["metrics"][key] == pytest.approx(a["metrics"][key], abs=1e-5)
    assert b["metrics"]["records"] == a["metrics"]["records"]
    # of the base, where no rounding of the training enters, the figures are the very same
    assert b["metrics"]["val_loss_base"] == a["metrics"]["val_loss_base"]
    assert sorted(path.name for path in several.iterdir()) == ["adapter.pt", "log.csv", "run.json"]


@pytest.mark.slow
def test_a_sharded_base_is_known_by_the_same_values(two, three, place):
    bases = [torch.load(place / folder / "adapter.pt", weights_only=True)["base"]
             for folder in ("alone-accum1", "two-sharded", "three-sharded")]
    assert bases[0] == bases[1] == bases[2]


@pytest.mark.slow
def test_full_fine_tuning_and_fp16_run_in_several_processes_too(two, place):
    results, _ = two
    assert results["full"] == [0, 0] and results["fp16"] == [0, 0]
    assert train.main(flags(place, "alone-full", "--method", "full", "--max-steps", "5")) == 0
    assert train.main(flags(place, "alone-fp16", "--dtype", "fp16", "--max-steps", "5")) == 0
    shards = [torch.load(place / folder / "consolidated.00.pth", weights_only=True)
              for folder in ("alone-full", "two-full")]
    assert max((shards[0][name] - shards[1][name]).abs().max() for name in shards[0]) < TIGHT
    assert moved(place / "alone-fp16", place / "two-fp16") < 0.05
    losses = [run_of(place / f"{name}-fp16")["metrics"]["val_loss"] for name in ("alone", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


@pytest.mark.slow
def test_heads_auto_is_chosen_once_and_is_what_one_process_chooses(two, place):
    assert two[0]["auto"] == [0, 0]
    assert train.main(flags(place, "alone-auto", "--heads", "auto", "--max-steps", "2")) == 0
    a, b = run_of(place / "alone-auto"), run_of(place / "two-auto")
    assert a["clusters"]["labels"] == b["clusters"]["labels"]
    assert a["settings"]["heads"] == b["settings"]["heads"] == a["clusters"]["k"]


@pytest.mark.slow
def test_the_benchmark_takes_its_rounds_and_one_more_to_warm_up(two):
    results, printed = two
    assert results["scaling"] == [3 + 3, 3]  # the first process takes each step alone as well
    assert printed.count("times as fast: ") == 1


@pytest.mark.slow
def test_only_the_first_process_prints(two, place):
    results, printed = two
    for name in ("two-accum1", "two-sharded"):
        assert printed.count(f"adapter.pt, run.json and log.csv to {place / name}\n") == 1
    assert printed.count("answer: ") == 2  # of two commands
    assert printed.count("--grad-accum 1: 1 of 2 processes have nothing to do") > 1


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bytes_dropout_included(two, place):
    results, printed = two
    assert results["stopped"] == [143, 143] and results["resumed"] == [0, 0]
    assert printed.count(f"stopped; the last good checkpoint is "
                         f"{place / 'two-stopped' / 'checkpoint.pt'}, of step 5;") == 1
    whole, resumed = place / "two-whole", place / "two-stopped"
    assert (whole / "adapter.pt").read_bytes() == (resumed / "adapter.pt").read_bytes()
    assert log_of(whole) == log_of(resumed)
    assert "round differently" not in printed


@pytest.mark.slow
def test_another_number_of_processes_goes_on_and_says_that_it_rounds_differently(
        two, place, capsys):
    assert two[0]["other"] == [143, 143]
    assert train.main(flags(place, "two-other", "--dropout", "0.1", "--grad-accum", "2",
                            "--max-steps", "12", "--resume")) == 0
    assert "started with 2 processes and continues with 1: they round differently" in (
        capsys.readouterr().out)
    assert len(log_of(place / "two-other")) == 12


@pytest.mark.slow
def test_what_process_0_refuses_all_refuse_and_one_says(two, place):
    results, printed = two
    assert results["held"] == [2, 2]
    assert printed.count(f"{place / 'two-whole'} already holds a run") == 2  # see GRACE
    assert printed.count(f"train.py: {place / 'two-whole'} already holds a run") == 1


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_waited_for_only_so_long(two, place):
    results, printed = two
    assert results["silent"] == [2, 1]  # the second finds nobody when it wakes up
    assert printed.count("did not answer") == 1
    assert f"checkpoint is {place / 'two-silent' / 'checkpoint.pt'}, of step 3;" in printed


# ---------------------------------------------------------------- the base in parts


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["two", "three"])
def test_each_process_holds_its_share_of_the_base_which_computes_as_the_whole(
        processes, place, request):
    results, _ = request.getfixturevalue(processes)
    number = len(results["look"])
    sizes = {name: p.numel() * 4 for name, p in tiny_model().named_parameters()}
    for found in results["look"]:
        assert found["fingerprint"] and found["frozen"] and found["equal"]
        assert found["held"].keys() == sizes.keys()
        for name, held in found["held"].items():
            rows = len(tiny_model().get_parameter(name))
            most = -(-rows // number) * sizes[name] // rows if "layers" in name else sizes[name]
            assert held <= most, name
            # what was merged of several files is no view of the whole
            assert processes == "three" or found["behind"][name] == most, name
    for name in sizes:
        held = [found["held"][name] for found in results["look"]]
        assert sum(held) == sizes[name] * (1 if "layers" in name else number)


@pytest.mark.slow
def test_scores_clusters_and_answers_of_a_sharded_base_are_those_of_one_process(
        two, place, capsys):
    results, printed = two
    assert results["mmlu"] == results["cluster"] == results["talk"] == [0, 0]
    model = ["--weights", str(place / "weights"), "--device", "cpu"]
    assert eval_mmlu.main([*model, "--shots", "1", "--limit", "3", "--max-seq-len", "128",
                           "--adapter", str(place / "alone-accum1" / "adapter.pt"),
                           "--out", str(place / "alone-mmlu.json")]) == 0
    a, b = (json.loads((place / f"{name}-mmlu.json").read_text()) for name in ("alone", "two"))
    assert a == b
    assert cluster.main([*model, "--data", str(place / "data.jsonl"), "--k-max", "4",
                         "--out", str(place / "alone-clusters.json")]) == 0
    a, b = (json.loads((place / f"{name}-clusters.json").read_text()) for name in ("alone", "two"))
    assert (a["k"], a["labels"], a["curve"]) == (b["k"], b["labels"], b["curve"])
    capsys.readouterr()
    from tools import generate
    assert generate.main(["Say it.", *model, "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip() in printed


@pytest.mark.slow
def test_the_processes_of_a_sharded_base_go_on_with_the_token_that_rank_0_takes(two):
    assert two[0]["ties"] == [[40, 40, 40], [40, 40, 40]]


# ---------------------------------------------------------------- the end


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["other", "all"])
def test_a_killed_process_or_a_signal_ends_all_in_time_and_the_checkpoint_stands(place, victim):
    out = place / f"ended-{victim}"
    argv = flags(place, out.name, "--max-steps", "5000", "--epochs", "2000", "--save-every", "10",
                 "--grad-accum", "2", "--shard-base")
    with started(2, "train.py", *argv) as process:
        wait_for(out / "checkpoint.pt", process)
        if victim == "all":
            process.send_signal(signal.SIGTERM)
        else:
            os.kill(max(children(process.pid)), signal.SIGKILL)
        began = time.monotonic()
        printed, err = process.communicate(timeout=120)
        assert time.monotonic() - began < 60
    assert process.returncode != 0
    lines = [line for line in (printed + err).splitlines() if "the last good checkpoint is" in line]
    assert len(lines) == 1, printed + err
    assert f"{out / 'checkpoint.pt'}, of step" in lines[0]
    assert lines[0].startswith("stopped; " if victim == "all" else "train.py: another process")
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert f"of step {state['step']};" in lines[0]
    assert not (out / ".lock.pid").exists() and not (out / "run.json").exists()


def wait_for(path, process):
    until = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None and time.monotonic() < until, path
        time.sleep(0.05)


def children(pid):
    """The processes that one has started."""
    path = f"/proc/{pid}/task/{pid}/children"
    if not os.path.exists(path):
        pytest.skip("only Linux tells whose child a process is")
    with open(path) as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.slow
def test_more_processes_than_gpus_are_refused_in_one_line(place):
    if torch.cuda.device_count() > 1:
        pytest.skip("there are two GPUs here")
    with started(2, "train.py", *flags(place, "refused", "--device", "cuda")) as process:
        printed, err = process.communicate(timeout=300)
    lines = [line for line in (printed + err).splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1 and "--nproc-per-node 2 needs 2 GPUs" in lines[0], printed + err
    assert "exitcode  : 2" in err and not (place / "refused").exists()


@pytest.mark.parametrize("name, local, message", [
    ("cuda", 4, "--nproc-per-node 4 needs 4 GPUs, one per process"),
    ("cuda:1", 2, "--device cuda:1"),
    ("cuda", 2, None), ("cpu", 4, None)])
def test_every_process_takes_the_gpu_of_its_number(monkeypatch, name, local, message):
    taken = []
    for key, value in {"TORCHELASTIC_RUN_ID": "a", "LOCAL_RANK": "1", "RANK": "5",
                       "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": str(local)}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    if message:
        with pytest.raises(ValueError, match=message):
            distributed.set_local_device(name)
    else:
        distributed.set_local_device(name)
    assert taken == ([1] if name == "cuda" and not message else [])


# ---------------------------------------------------------------- one process


def test_one_process_is_told_what_several_are_for(place, capsys):
    assert train.main(flags(place, "never", "--shard-base")) == 2
    assert "torchrun --nproc-per-node N" in capsys.readouterr().err
    assert eval_mmlu.main(["--weights", str(place / "weights"), "--shard-base", "--device", "cpu",
                           "--out", str(place / "never.json")]) == 2
    assert "torchrun --nproc-per-node N" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(flags(place, "never", "--method", "full", "--heads", "1", "--shard-base"))
    assert "--method full" in capsys.readouterr().err


@pytest.mark.parametrize("length", range(1, 9))
def test_a_step_is_shared_so_that_every_batch_counts_once_and_all_take_as_many(
        monkeypatch, length):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    masks = []
    for processes in range(2, 5):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        drawn, passes = {}, []
        for rank in range(processes):
            monkeypatch.setenv("RANK", str(rank))
            torch.manual_seed(0)
            taken = [(batch, weight, torch.rand(1).item())
                     for batch, weight in distributed.local_batches(list(range(length)))]
            passes.append(len(taken))
            assert {weight for _, weight, _ in taken} <= {0, 1}
            for batch, weight, draw in taken:
                assert weight == 0 or batch not in drawn
                drawn[batch] = draw
            after = torch.rand(1).item()
            torch.manual_seed(0)
            torch.randint(2**62, [length])
            assert after == torch.rand(1).item()  # the common generator is alike everywhere
        assert sorted(drawn) == list(range(length)) and set(passes) == {-(-length // processes)}
        masks.append(drawn)
    assert masks[0] == masks[1] == masks[2]  # whoever takes a batch, and however many there are


def test_one_process_shares_nothing_and_waits_for_nobody():
    assert list(distributed.local_batches([1, 2])) == [(1, 1), (2, 1)]
    assert list(distributed.map_across_ranks([1, 2], str)) == [(1, "1"), (2, "2")]
    assert distributed.run_on_rank0(lambda: 3) == 3
    loss = torch.tensor(1.0)
    assert distributed.all_reduce_gradients([], loss) is loss
    assert pick_device("cpu") == "cpu" and distributed.world_size() == 1 and distributed.rank() == 0
