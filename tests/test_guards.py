"""What is foreign stays outside: files that are none, bombs, outputs that would destroy, foreign
text. support/files.py, support/cli.py; each guard in one place, tried by kind."""

import argparse
import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch

import cluster
import eval_mmlu
import train
from data.corpus import Sequence
from hydralora import add_hydralora, load_adapter, save_adapter
from model import load_llama
from support import cli, files, output, run_folder
from support.evaluation import check_routing
from support.jsonl_resume import read_partial
from support.lock import file_lock
from tests.conftest import ROOT, WORLD, tiny_model
from tools import generate, routing_page


@pytest.fixture
def adapter(tmp_path):
    model = tiny_model()
    add_hydralora(model, rank=2)
    save_adapter(model, tmp_path / "adapter.pt")
    return tmp_path / "adapter.pt"


@pytest.fixture
def data(tmp_path):
    lines = (WORLD / "val.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data.jsonl").write_text("".join(lines[:12]))
    return tmp_path / "data.jsonl"


def refused(capsys, main, *argv, status=2):
    """The one line of a refusal."""
    capsys.readouterr()
    try:
        assert main([str(word) for word in argv]) == status
    except SystemExit as error:  # by the parser
        assert error.code == status
    line, = capsys.readouterr().err.splitlines()
    return line


# ---------------------------------------------------------------- outputs


def fifo(path):
    os.mkfifo(path)


def link_to_nothing(path):
    path.symlink_to("nothing")


def loop(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [fifo, link_to_nothing, loop])
def test_what_is_no_file_is_neither_read_nor_replaced(tmp_path, capsys, make, data):
    make(tmp_path / "x")
    for act in (files.check_output, lambda path: files.write_file(path, lambda file: None),
                lambda path: files.read_torch(path, "a file")):
        with pytest.raises(OSError, match="no regular file|leads nowhere"):
            act(tmp_path / "x")
    for flags in (["--data", tmp_path / "x"], ["--data", data, "--out", tmp_path / "x"],
                  ["--data", data, "--cache", tmp_path / "x"]):
        assert "x is " in refused(capsys, cluster.main, *flags)
    assert (tmp_path / "x").is_fifo() or (tmp_path / "x").is_symlink()


@pytest.mark.parametrize("name", ["data", "weights", "cache", "linked", "hard link", "adapter",
                                  "the page's adapter", "answers"])
def test_no_output_replaces_an_input_and_it_is_told_before_any_work(
        weights, adapter, data, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr("support.base.load_llama", lambda *a, **k: pytest.fail("worked first"))
    (tmp_path / "linked").symlink_to(data)
    os.link(data, tmp_path / "hard")
    clusters = ["--weights", weights, "--data", data, "--out"]
    main, argv, path = {
        "data": (cluster.main, clusters, data),
        "weights": (cluster.main, clusters, weights / "params.json"),
        "cache": (cluster.main, ["--cache", tmp_path / "new", *clusters], tmp_path / "new"),
        "linked": (cluster.main, clusters, tmp_path / "linked"),
        "hard link": (cluster.main, clusters, tmp_path / "hard"),
        "adapter": (eval_mmlu.main, ["--adapter", adapter, "--out"], adapter),
        "the page's adapter": (routing_page.main, ["hi", "--adapter", adapter, "--out"], adapter),
        "answers": (generate.main, ["--weights", weights, "--data", data, "--out"], data)}[name]
    before = path.read_bytes() if path.exists() else None
    assert "name another" in refused(capsys, main, *argv, path)
    assert (path.read_bytes() if path.exists() else None) == before


def test_a_link_to_a_file_is_written_through_and_nothing_else_of_the_users_is_touched(tmp_path):
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to("old")
    (tmp_path / "old.tmp").write_text("mine")
    files.write_text(tmp_path / "link", "new")
    files.write_text(tmp_path / ("x" * 255), "long")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "old").read_text() == "new"
    assert (tmp_path / "old.tmp").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "old", "old.tmp", "x" * 255]


WRITER = """
import sys, time
from support.files import atomic_dir, write_file
def wait(file):
    print("here", flush=True)
    time.sleep(60)
if sys.argv[1] == "file":
    write_file(sys.argv[2], wait)
with atomic_dir(sys.argv[2]):
    wait(None)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_left_goes_with_the_next_and_a_living_ones_stays(tmp_path, kind):
    def write():
        if kind == "file":
            return files.write_text(tmp_path / "x", "new")
        with files.atomic_dir(tmp_path / "x"):
            pass

    writer = subprocess.Popen([sys.executable, "-c", WRITER, kind, tmp_path / "x"], cwd=ROOT,
                              stdout=subprocess.PIPE)
    try:
        writer.stdout.readline()
        left, = tmp_path.iterdir()
        write()
        assert sorted(path.name for path in tmp_path.iterdir()) == [left.name, "x"]
        (tmp_path / "x").unlink() if kind == "file" else (tmp_path / "x").rmdir()
    finally:
        writer.kill()
        writer.wait()
    write()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_file_system_that_syncs_no_folder_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(number):
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(22, "Invalid argument")
        fsync(number)

    monkeypatch.setattr(os, "fsync", only_files)
    files.write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "new"


# ---------------------------------------------------------------- inputs


def nested_list():
    value = "lol"
    for _ in range(40):
        value = [value, value]
    return value


def rewritten(path, change, method=zipfile.ZIP_STORED):
    """Writes the zip anew with change(name, bytes) of every entry."""
    with zipfile.ZipFile(path) as old:
        entries = {name: change(name, old.read(name)) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", method) as new:
        for name, content in entries.items():
            new.writestr(name, content)


def deflated(path):
    rewritten(path, lambda name, content: content, zipfile.ZIP_DEFLATED)


def flipped(path):
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + 200] ^= 1
    path.write_bytes(content)


def nested(path):
    content = torch.load(path, weights_only=True)
    content["config"]["gate"] = nested_list()
    torch.save(content, path)


def expanded(path):
    content = torch.load(path, weights_only=True)
    content["tensors"] = {name: torch.zeros(1).expand(tensor.shape)
                          for name, tensor in content["tensors"].items()}
    torch.save(content, path)


def doubles(path):
    content = torch.load(path, weights_only=True)
    content["tensors"] = {name: tensor.double() + 1e300
                          for name, tensor in content["tensors"].items()}
    torch.save(content, path)


@pytest.mark.parametrize("spoil", [deflated, flipped, nested])
def test_a_file_that_torch_would_read_wrongly_or_without_end_is_refused(adapter, weights, capsys,
                                                                        spoil):
    spoil(adapter)
    with pytest.raises(ValueError, match="is not an adapter"):
        files.read_torch(adapter, "an adapter")
    flags = ["--weights", weights, "--adapter", adapter, "--limit", 1]
    assert "adapter.pt is not an adapter" in refused(capsys, eval_mmlu.main, *flags)
    assert "adapter.pt is not an adapter" in refused(  # also where nothing else reads it first
        capsys, eval_mmlu.main, *flags, "--quantize", "none")


@pytest.mark.parametrize("spoil", [expanded, doubles])
def test_an_adapter_whose_numbers_are_not_there_or_beyond_fp32_is_refused(adapter, spoil):
    spoil(adapter)
    with pytest.raises(ValueError, match="its tensors do not match"):
        load_adapter(tiny_model(), adapter)


def test_overlapping_weights_are_copied_before_they_train(weights):
    path = weights / "consolidated.00.pth"
    tensors = {name: torch.full([t.numel()], 0.01).as_strided(t.shape, [0] * t.ndim, t.numel() - 1)
               for name, t in torch.load(path, weights_only=True).items()}
    torch.save(tensors, path)
    model, _ = load_llama(weights)
    assert all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    OSError(12, "Cannot allocate memory")])
@pytest.mark.parametrize("reader", ["adapter", "weights", "--init-adapter"])
def test_too_little_memory_is_not_called_damage(weights, adapter, data, capsys, monkeypatch, error,
                                                reader):
    load = torch.load

    def tight(path, **settings):
        if (str(path) == str(adapter)) == (reader != "weights"):
            raise error
        return load(path, **settings)

    monkeypatch.setattr(torch, "load", tight)
    main, flags = (train.main, ["--data", data, "--init-adapter"]) if reader[0] == "-" else (
        eval_mmlu.main, ["--limit", 1, "--adapter"])
    line = refused(capsys, main, "--weights", weights, *flags, adapter, status=1)
    assert "memory" in line and "damaged" not in line


@pytest.mark.parametrize("change", [
    {"params": [1, 0]}, {"amsgrad": True}, {"maximize": True}, {"eps": 1e-3}, {"betas": (0.5, 0.5)},
    {"weight_decay": 0.5}], ids=str)
def test_an_optimizer_state_of_another_optimizer_is_refused(change, tmp_path):
    model = torch.nn.Linear(3, 3)
    optimizer = train.make_optimizer(model, lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = optimizer.state_dict()
    run_folder.load_moments(train.make_optimizer(model, lr=1e-3), saved, tmp_path)
    saved["param_groups"][0].update(change)
    with pytest.raises(ValueError, match="another optimizer"):
        run_folder.load_moments(train.make_optimizer(model, lr=1e-3), saved, tmp_path)


# ---------------------------------------------------------------- what was read is what is named


def command(weights, data, out, *more):
    return ["--weights", str(weights), "--data", str(data), "--val-data", str(data.parent / "val"),
            "--rank", "2", "--max-steps", "2", "--lr", "1e-3", "--out", str(out), *more]


@pytest.fixture
def other(data, tmp_path):
    """Other data, to stand instead of the data."""
    (tmp_path / "val").write_text(data.read_text().replace("a", "b"))
    rows = [{**json.loads(line), "response": "other"} for line in data.read_text().splitlines()]
    (tmp_path / "other").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "other"


def test_data_replaced_while_heads_are_counted_is_not_what_run_json_names(
        weights, data, other, tmp_path, monkeypatch):
    read, choose = files.file_fingerprint(data), cluster.choose_heads

    def replace(*args, **settings):
        os.replace(other, data)
        return choose(*args, **{**settings, "k_max": 2})

    monkeypatch.setattr(cluster, "choose_heads", replace)
    assert train.main(command(weights, data, tmp_path / "run", "--heads", "auto")) == 0
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["fingerprints"]["data"]
    assert recorded == read != files.file_fingerprint(data)


def test_data_replaced_while_it_is_read_is_refused(weights, data, other, tmp_path, monkeypatch,
                                                   capsys):
    encode = train.encode_records

    def replace(*args):
        if other.exists():
            os.replace(other, data)
        return encode(*args)

    monkeypatch.setattr(train, "encode_records", replace)
    line = refused(capsys, train.main, *command(weights, data, tmp_path / "run"))
    assert "changed while" in line and not (tmp_path / "run").exists()


def test_weights_changed_while_they_are_mapped_give_no_result(weights, tmp_path, monkeypatch,
                                                              capsys):
    answer = eval_mmlu.answer_questions

    def change(model, *args, **settings):
        found = answer(model, *args, **settings)
        with torch.no_grad():
            model.output.weight.zero_()  # as the pages of an overwritten file are
        return found

    monkeypatch.setattr(eval_mmlu, "answer_questions", change)
    line = refused(capsys, eval_mmlu.main, "--weights", weights, "--limit", 1, "--out",
                   tmp_path / "x.json")
    assert "changed while" in line and not list(tmp_path.glob("x.json*"))


# ---------------------------------------------------------------- bounds


def test_a_million_epochs_begin_at_once_and_the_steps_are_those_of_a_list():
    sequences = [Sequence(list(range(3 + i % 5)), 1, i, "") for i in range(30)]
    few, many = (train.plan_steps(sequences, batch_size=2, grad_accum=2, epochs=epochs,
                                  max_steps=0, seed=3) for epochs in (3, 10**6))
    assert len(few) == 24 and len(many) == 8 * 10**6
    assert [*few] == [many[i] for i in range(24)] and many[10**6]
    assert [*few] != [*few][:8] * 3
    with pytest.raises(IndexError):
        few[24]


@pytest.mark.parametrize("main, flags, words", [
    (generate.main, ["hi", "--temperature", "nan"], "--temperature must be at least 0"),
    (generate.main, ["hi", "--temperature", "1e-40"], "--temperature above 0"),
    (generate.main, ["hi", "--temperature", "1", "--top-p", "1e-300"], "--top-p"),
    (generate.main, ["hi", "--seed", str(2**70)], "--seed must be"),
    (generate.main, ["a\udcff"], "surrogates not allowed"),
    (train.main, ["--dry-run", "--gpu-memory", "inf"], "--gpu-memory"),
    (train.main, ["--dry-run", "--gpu-memory", "1e308"], "--gpu-memory"),
    (train.main, ["--dry-run", "--batch-size", "1" + "0" * 400], "--batch-size must be"),
    (train.main, ["--dry-run", "--batch-size", "1" + "0" * 12], "tokens are measured"),
    (eval_mmlu.main, ["--device", "hpu"], "--device hpu cannot be used"),
    (eval_mmlu.main, ["--device", "mkldnn"], "--device mkldnn cannot be used")])
def test_what_asks_for_more_than_there_is_gets_one_line(weights, capsys, main, flags, words):
    assert words in refused(capsys, main, "--weights", weights, *flags)


@pytest.mark.parametrize("change, words", [
    ({"n_layers": 2**24}, "at most 10000"), ({"ffn_dim_multiplier": 1e12}, "cannot be")])
def test_a_dry_run_of_an_impossible_model_is_refused_at_once(weights, capsys, change, words):
    params = json.loads((weights / "params.json").read_text())
    (weights / "params.json").write_text(json.dumps({**params, **change}))
    assert words in refused(capsys, train.main, "--dry-run", "--weights", weights)


@pytest.mark.parametrize("features", [torch.tensor(1.0), torch.zeros(9, 4), torch.zeros(13, 4),
                                      torch.zeros(12, 4).half()], ids=lambda x: str(list(x.shape)))
def test_a_feature_file_of_the_right_key_and_another_shape_is_refused(tmp_path, features):
    path = tmp_path / "cache.pt"
    assert cluster.cached(path, ["key"], 12, lambda: torch.ones(12, 4)).shape == (12, 4)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "features": features}, path)
    with pytest.raises(ValueError, match="not fp32 features of 12 records"):
        cluster.cached(path, ["key"], 12, lambda: pytest.fail("computed"))


# ---------------------------------------------------------------- what is left lying about


def test_only_rows_of_a_stopped_run_bar_the_next_and_a_file_of_the_users_stays(tmp_path):
    path = tmp_path / "x.partial"

    def read():
        return read_partial(path, {"a": 1}, columns={"i": int}, name=("i",))

    path.write_text('{"a": 2}\n')
    assert read() == {}
    path.write_text('{"a": 2}\n{"i": 1}\n')
    with pytest.raises(ValueError, match="another a"):
        read()
    path.write_text("my notes\n")
    with pytest.raises(ValueError, match="not of a stopped run"):
        read()


@pytest.mark.parametrize("make", [lambda path: path.write_text("my notes"), fifo, loop,
                                  lambda path: path.mkdir()])
def test_a_foreign_thing_in_place_of_the_lock_is_named_and_stays(tmp_path, make):
    path = tmp_path / ".lock.pid"
    make(path)
    with pytest.raises(ValueError, match="no lock of this project"):
        with file_lock(tmp_path / ".lock", "it"):
            pass
    assert os.path.lexists(path) and (not path.is_file() or path.read_text() == "my notes")


def test_an_empty_line_costs_a_log_no_row_and_a_huge_field_is_one_line(tmp_path):
    path = tmp_path / "log.csv"
    text = ",".join(run_folder.COLUMNS) + "\r\n" + "1" + ",2" * 7 + "\r\n"
    path.write_text("\r\n" + text)
    assert [row["step"] for row in run_folder.read_log(path)] == ["1"]
    path.write_text(text + "9," + "x" * 200_000 + "\r\n")
    with pytest.raises(ValueError, match="field larger"):
        run_folder.read_log(path)


GATE = {"w1": {"a": [0.5, 0.5], "b": [0.1, 0.9]}, "w2": {"a": [0.5, 0.5], "b": [0.2, 0.8]}}


@pytest.mark.parametrize("report", [
    [1], {"gate": []}, {"gate": [1]}, {"gate": {}, "entropy": {}}, {"gate": GATE, "entropy": {}},
    {"gate": {"w1": {}}, "entropy": {"w1": 1}}, {"gate": {"w1": {"a": [7]}}, "entropy": {"w1": 1}},
    {"gate": {"w1": {"a": [0.5, 0.5], "b": [1]}}, "entropy": {"w1": 1}},
    {"gate": {**GATE, "w2": {"c": [1, 0]}}, "entropy": {"w1": 1, "w2": 1}},
    {"gate": {"w1": {"\ud800": [1]}}, "entropy": {"w1": 1}}], ids=str)
def test_an_edited_routing_report_is_refused(report):
    check_routing({"gate": GATE, "entropy": {"w1": 1, "w2": 0.5}})
    with pytest.raises(ValueError):
        check_routing(report)


def test_a_foreign_text_is_part_of_its_line_and_no_more():
    assert output.printable("a\x1b[2J\nb\u202e é 中") == "a\\x1b[2J\\nb\\u202e é 中"
    assert len(output.printable("n" * 10**7)) < 220
    line = output.one_line(ValueError("what is wrong: " + "x" * 10**7 + "\x1b: what to do"))
    assert line.startswith("what is wrong: ") and line.endswith("\\x1b: what to do")
    assert len(line) < 1300


def test_a_child_of_torchrun_that_is_no_rank_runs_alone(monkeypatch):
    from support import distributed
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert distributed.world_size() == 1 and distributed.rank() == 0


def test_every_flag_that_names_an_input_is_looked_at():
    parsers = [train.make_parser()]
    named = {action.dest for parser in parsers for action in parser._actions
             if isinstance(action, argparse.Action) and action.metavar and "FILE" in action.metavar}
    assert named <= {*cli.INPUTS, "out"}


def test_weights_in_float8_are_looked_at_too():
    values = torch.tensor([1.0, float("nan")])
    files.check_finite({"w": values[:1].to(torch.float8_e4m3fn)}, "x")
    with pytest.raises(ValueError, match="not finite"):
        files.check_finite({"w": values.to(torch.float8_e4m3fn)}, "x")
