"""One folder, one run: support/hold.py, and the scripts that hold what they write."""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

import eval_mmlu
import train
from experiments import common
from model import save_llama
from support import lock as lock_module
from support.lock import began, file_lock, lives
from tests.conftest import ROOT, WORLD, tiny_model
from tests.test_robust import flags_of, snapshot

HOST = socket.gethostname()
ME = f"{os.getpid()}-{began(os.getpid())}-{HOST}"
THREE = ["adapter.pt", "log.csv", "run.json"]


def held(lock):
    return file_lock(lock, "it")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def dead_process():
    """The holder that a killed process would have left: its id, and when it began."""
    code = "import os; from support.lock import began; print(os.getpid(), began(os.getpid()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return "{}-{}-{}".format(*done.stdout.split(), HOST)


@pytest.fixture(scope="module")
def dead():
    return dead_process()


def left_by(holder, path):
    """A lock as it lies there when its holder cannot remove it."""
    path.mkdir(parents=True)
    (path / holder).touch()
    return path


# ---------------------------------------------------------------- the lock


def test_a_lock_leaves_nothing_not_even_the_folders_made_for_it(tmp_path):
    with held(tmp_path / "a" / "b" / "lock"):
        assert names(tmp_path / "a" / "b") == ["lock"]
        assert names(tmp_path / "a" / "b" / "lock") == [ME]
    assert names(tmp_path) == []
    (tmp_path / "mine").mkdir()  # empty, but not made for the lock
    with pytest.raises(KeyboardInterrupt), held(tmp_path / "mine" / "lock"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["mine"] and names(tmp_path / "mine") == []
    with held(tmp_path / "c" / "lock"):
        (tmp_path / "c" / "result").touch()
    assert names(tmp_path / "c") == ["result"]


def test_what_a_dead_process_left_holds_nothing(tmp_path, dead):
    assert not lives(dead)
    left_by(dead, tmp_path / "lock")
    left_by(dead, tmp_path / f"lock.{dead}")  # killed a moment before it had the lock
    (tmp_path / "lock.txt").touch()  # of somebody else
    (tmp_path / "empty.lock").mkdir()  # killed a moment after it had let go
    with held(tmp_path / "lock"), held(tmp_path / "empty.lock"):
        assert names(tmp_path) == ["empty.lock", "lock", "lock.txt"]
    assert names(tmp_path) == ["lock.txt"]


def test_a_process_id_that_was_given_away_again_holds_nothing(tmp_path):
    if began(os.getpid()) == "unknown":
        pytest.skip("only Linux tells when a process began")
    with pytest.raises(ValueError, match=f"it is held by process {os.getpid()} on {HOST}"), held(
            left_by(ME, tmp_path / "a" / "lock")):
        pass
    boot, tick = began(os.getpid()).split(".")
    for start in (f"{boot}.{int(tick) - 1}", f"00000000.{tick}"):  # earlier; before a restart
        with held(left_by(f"{os.getpid()}-{start}-{HOST}", tmp_path / start / "lock")):
            pass


def test_a_process_of_another_user_lives():
    assert lives(f"1-{began(1)}-{HOST}")


@pytest.mark.slow
def test_a_killed_process_that_nobody_has_waited_for_yet_holds_nothing(tmp_path):
    code = (f"import time; from support.lock import file_lock\n"
            f"with file_lock({str(tmp_path / 'lock')!r}, 'it'):\n"
            f"    print(1, flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(ValueError, match=f"held by process {holder.pid} on {HOST}, which writes"):
        with held(tmp_path / "lock"):
            pass
    holder.kill()
    if hasattr(os, "waitid"):
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays listed
    else:
        holder.wait()
    with held(tmp_path / "lock"):
        pass
    holder.communicate()
    assert names(tmp_path) == []


def test_a_lock_of_another_host_is_named_with_the_way_on(tmp_path, dead):
    path = left_by(dead.replace(HOST, "gpu-box-2"), tmp_path / "lock")
    with pytest.raises(ValueError, match=f"another machine, gpu-box-2: .* delete {path} if it has"):
        with held(path):
            pass
    assert names(tmp_path) == ["lock"] and len(names(path)) == 1


def test_where_an_open_file_cannot_be_renamed_its_holder_is_named(tmp_path, monkeypatch):
    """As on Windows, where no process is asked for."""
    path = left_by("12-unknown-" + HOST, tmp_path / "lock")
    monkeypatch.setattr(lock_module, "lives", lambda holder: False)
    monkeypatch.setattr(lock_module, "PAUSE", 0)

    def rename(*_):
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(lock_module.os, "rename", rename)
    with pytest.raises(ValueError, match=f"held by process 12 on {HOST}"), held(path):
        pass
    assert names(path) == ["12-unknown-" + HOST]


@pytest.mark.parametrize("place", ["file/run", "file/run/deeper"])
def test_where_no_lock_can_be_the_folder_is_named(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"{place} cannot be written .*name another place"), held(
            tmp_path / place / "lock"):
        pass


RACE = """
import os, signal, sys
from pathlib import Path
from support import lock as lock_module
folder, dead, many, rounds = Path(sys.argv[1]), sys.argv[2], 6, 40

def each(act):
    # act(round) in every one of many processes, which begin a round together; their answers
    pipes, children = [], []
    for _ in range(many):
        (go, start), (answer, say) = os.pipe(), os.pipe()
        children.append(os.fork())
        if not children[-1]:
            while True:
                os.write(say, act(int(os.read(go, 4))))
        pipes.append((start, answer))
    try:
        for number in range(rounds):
            yield number, lambda: [os.write(start, b"%4d" % number) for start, _ in pipes] and [
                os.read(answer, 1) for _, answer in pipes]
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)

kept = []

def takes(number):  # and holds for ever: the next round has another lock
    try:
        kept.append(lock.file_lock(folder / f"{number}" / "lock", "it"))
        kept[-1].__enter__()
        return b"1"
    except ValueError:
        return b"0"

def meets(number):  # takes and lets go, again and again; is anybody else inside?
    wins = 0
    for _ in range(30):
        try:
            with lock.file_lock(folder / "churn" / "lock", "it"):
                os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
                os.unlink(folder / "inside")
                wins += 1
        except FileExistsError:
            return b"2"
        except ValueError:
            pass
    return b"1" if wins else b"0"

for number, answers in each(takes):
    if number % 4:  # one of four has no lock yet
        (folder / f"{number}" / "lock").mkdir(parents=True)
        (folder / f"{number}" / "lock" / dead).touch()
    found = answers()
    assert sorted(found) == [b"0"] * (many - 1) + [b"1"], (number, found)
rounds = 5
for number, answers in each(meets):
    found = answers()
    assert b"2" not in found and b"1" in found, found
assert not os.path.exists(folder / "churn") or not os.listdir(folder / "churn")
"""


@pytest.mark.slow
def test_of_many_that_take_one_lock_dead_or_new_one_wins_and_nobody_meets_another_inside(
        tmp_path, dead):
    if not hasattr(os, "fork"):
        pytest.skip("only Unix forks")
    done = subprocess.run([sys.executable, "-c", RACE, tmp_path, dead], cwd=ROOT, timeout=120,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- train.py


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model and 60 records."""
    folder = tmp_path_factory.mktemp("lock")
    save_llama(tiny_model(n_layers=1), WORLD / "base" / "tokenizer.model", folder / "w")
    with open(WORLD / "train.jsonl", encoding="utf-8") as file:
        lines = [line for line in file if json.loads(line)["category"] == "tavi"][:60]
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def command(made, tmp_path):
    return flags_of(made / "w", made / "data.jsonl", tmp_path / "out")


START = """
import sys, time, train
print(flush=True), sys.stdin.readline()
step = train.train_step
train.train_step = lambda *arguments: time.sleep(float(sys.argv[1])) or step(*arguments)
sys.exit(train.main(sys.argv[2:]))
"""


def start(command, seconds=0.2):
    """A process that has imported train.py and begins when told; its steps take longer."""
    process = subprocess.Popen([sys.executable, "-c", START, str(seconds), *command], cwd=ROOT,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


@pytest.mark.slow
def test_of_three_runs_started_at_once_into_one_folder_one_runs_and_is_named_to_the_others(
        command, tmp_path):
    runs = [start([*command, *more]) for more in ([], ["--overwrite"], ["--lr", "0.02"])]
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    texts = {run: run.communicate() for run in runs}
    assert sorted(run.returncode for run in runs) == [0, 2, 2], texts
    winner = next(run for run in runs if run.returncode == 0)
    for run in set(runs) - {winner}:
        assert texts[run][1].count("\n") == 1 and texts[run][0] == ""
        assert f"out is held by process {winner.pid} on {HOST}, which writes there" in texts[run][1]
    assert names(tmp_path / "out") == THREE
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert settings["lr"] == (0.02 if winner is runs[2] else 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("saved, more", [(0, []), (0, ["--overwrite"]), (4, ["--overwrite"]),
                                         (4, ["--resume"])])
def test_after_a_kill_a_run_starts_at_once(command, tmp_path, capsys, saved, more):
    out = tmp_path / "out"
    run = start([*command, "--save-every", str(saved or 500)], 0.02 if saved else 60)
    run.stdin.write("\n")
    run.stdin.flush()
    while not (out / ("checkpoint.pt" if saved else ".lock")).exists():
        assert run.poll() is None, run.stderr.read()
    before = snapshot(out)
    if not saved:
        assert train.main([*command, *more]) == 2
        assert f"{out} is held by process {run.pid} on {HOST}, which" in capsys.readouterr().err
        assert snapshot(out).keys() - before.keys() <= {out / "log.csv"}  # the other's own
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert (out / ".lock").exists()
    if not saved and not more:
        (out / "log.csv").unlink(missing_ok=True)  # that a run began here is another refusal
    assert train.main([*command, *more]) == 0
    assert names(out) == THREE


def test_a_folder_that_another_host_holds_is_left_as_it_is(command, tmp_path, capsys):
    path = left_by("7-unknown-gpu2", tmp_path / "out" / ".lock")
    before = snapshot(tmp_path)
    for more in ([], ["--overwrite"], ["--resume"]):
        assert train.main([*command, *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "held by process 7 on another machine, gpu2" in error
        assert f"delete {path} if it has ended" in error and snapshot(tmp_path) == before
    (path / "7-unknown-gpu2").unlink()
    assert train.main(command) == 0 and names(tmp_path / "out") == THREE


def test_one_folder_under_two_names_is_one_folder(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "out")
    with held(tmp_path / "out" / ".lock"):
        assert train.main([*command, "--out", str(tmp_path / "alias")]) == 2
    assert f"alias is held by process {os.getpid()} on {HOST}" in capsys.readouterr().err


def test_a_refused_run_leaves_no_folder_and_no_file(command, tmp_path):
    for flags in (["--data", "absent"], ["--weights", "absent"], ["--resume"]):
        assert train.main([*command, *flags]) == 2
        assert names(tmp_path) == []


def test_dry_run_holds_nothing(command, tmp_path):
    with held(tmp_path / "out" / ".lock"):
        assert train.main([*command, "--dry-run"]) == 0


# ---------------------------------------------------------------- eval_mmlu.py, experiments


def test_a_second_evaluation_into_one_file_is_refused_and_leaves_the_partial_file(
        made, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "mmlu.json"
    flags = ["--weights", str(made / "w"), "--data", str(WORLD / "quiz"), "--shots", "0",
             "--limit", "2", "--device", "cpu", "--out", str(out)]
    inner, seen = eval_mmlu.letter_logprobs, []

    def meanwhile(*arguments):
        if not seen:  # half way, the same command is sent again
            seen.append(snapshot(tmp_path))
            capsys.readouterr()
            assert eval_mmlu.main(flags) == 2
            error = capsys.readouterr().err
            assert f"eval_mmlu.py: {out} is held by process {os.getpid()} on {HOST}, which" in error
            assert snapshot(tmp_path) == seen[0]
        return inner(*arguments)

    monkeypatch.setattr(eval_mmlu, "letter_logprobs", meanwhile)
    assert eval_mmlu.main(flags) == 0 and seen
    assert names(out.parent) == ["mmlu.json"]
    before = out.read_bytes()
    assert eval_mmlu.main([*flags, "--data", str(tmp_path)]) == 2  # a refusal leaves no lock
    assert names(out.parent) == ["mmlu.json"] and out.read_bytes() == before


def test_an_evaluation_that_cannot_start_leaves_no_folder(made, tmp_path):
    assert eval_mmlu.main(["--weights", str(made / "w"), "--data", str(tmp_path), "--device", "cpu",
                           "--out", str(tmp_path / "new" / "mmlu.json")]) == 2
    assert names(tmp_path) == []


def test_a_kept_run_is_computed_by_one_process(command, tmp_path, monkeypatch):
    folder, flags = tmp_path / "runs" / "lora-1", [*command]
    del flags[flags.index("--out"):flags.index("--out") + 2]
    with held(f"{folder}.lock"):
        with pytest.raises(ValueError, match=f"lora-1 is held by process {os.getpid()} on {HOST}"):
            common.train_once(flags, folder)
        assert names(tmp_path / "runs") == ["lora-1.lock"]
    with held(folder / ".lock"), pytest.raises(ValueError, match="lora-1 is held by"):
        common.train_once(flags, folder)  # train.py itself, started by hand
    common.train_once(flags, folder)
    assert names(folder) == THREE and names(tmp_path / "runs") == ["lora-1"]
    monkeypatch.setattr(train, "run_training", lambda args: pytest.fail("computed again"))
    with held(f"{folder}.lock"):
        common.train_once(flags, folder)  # to read it nobody needs to hold it


def test_what_another_process_has_just_ended_is_not_computed_again(tmp_path, monkeypatch):
    path, folder = tmp_path / "value.json", tmp_path / "lora-1"

    @contextlib.contextmanager
    def late(*_):  # the other one ends while this one comes to the lock
        common.write_json(path, {"key": common.digest("k"), "value": 3})
        folder.mkdir(exist_ok=True)
        (folder / "run.json").touch()
        yield

    monkeypatch.setattr(common, "file_lock", late)
    monkeypatch.setattr(train, "run_training", lambda args: pytest.fail("computed again"))
    assert common.remember(path, "k", lambda: pytest.fail("computed again")) == 3
    common.train_once([], folder)


def test_what_is_kept_is_computed_by_one_process(tmp_path):
    path = tmp_path / "runs" / "heads.json"
    with held(f"{path}.lock"), pytest.raises(ValueError, match="heads.json is held by process"):
        common.remember(path, "k", lambda: 1)
    assert common.remember(path, "k", lambda: 1) == 1 and names(path.parent) == ["heads.json"]
    with held(f"{path}.lock"):
        assert common.remember(path, "k", lambda: 2) == 1
    args = argparse.Namespace(runs=tmp_path / "runs")
    kept = common.keep_records([{"instruction": "a"}], args)
    assert names(kept.parent) == [kept.name]
