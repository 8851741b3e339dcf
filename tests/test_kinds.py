"""What people do with it: results first, files known everywhere, the surroundings kept out."""

import gzip
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import warnings

import pytest
import torch

import cluster
import eval_mmlu
import train
from data import prepare_mmlu
from data.records import read_records
from data.what_it_is import what_it_is
from hydralora import HydraSettings, add_hydralora, hydra_layers, save_adapter
from model import Tokenizer, generate, load_llama, save_llama
from support import cli, run_folder
from tests.conftest import ROOT, WORLD, in_step, interrupt, status_of, tiny_model
from tools import export_hf, hf_layout, import_hf, import_llama2c, official_adapter, plot
from tools import generate as talk

TOKENIZER = WORLD / "base" / "tokenizer.model"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def records(count, category=lambda i: "ab"[i % 2]):
    return [{"instruction": f"Count to {i}.", "response": f"It is {i}.", "category": category(i)}
            for i in range(count)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds") / "w"
    save_llama(tiny_model(n_layers=1), TOKENIZER, folder)
    return folder


@pytest.fixture
def command(base, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", records(24))
    return ["--weights", str(base), "--data", str(data), "--device", "cpu", "--batch-size", "4",
            "--grad-accum", "1", "--max-steps", "2", "--out", str(tmp_path / "run")]


def refused(capsys, main, *flags):
    """The one line with which a script refuses the flags."""
    capsys.readouterr()
    assert status_of(main, flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# ---------------------------------------------------------------- 1: results, then print


@pytest.mark.slow
@pytest.mark.parametrize("script, shell", [
    ("train", "PYTHONIOENCODING=cp1252 python {} > /dev/null"),
    ("cluster", "PYTHONUNBUFFERED=1 python {} | true"), ("generate", "python {} >&- 2>&-"),
    ("eval", "PYTHONIOENCODING=ascii python -OO {} | true")])
def test_no_way_of_printing_loses_a_result(base, tmp_path, script, shell):
    data = write_lines(tmp_path / "d.jsonl", records(24, lambda i: "\u6570\u5b66\u8bd7"[i % 3]))
    flags = f"--weights {base} --device cpu --out {tmp_path / 'out'}"
    words = {"train": f"train.py {flags} --data {data} --max-steps 1 --batch-size 4",
             "cluster": f"cluster.py {flags} --data {data} --k-max 2",
             "generate": f"-m tools.generate {flags} --data {data} --max-new-tokens 2",
             "eval": f"eval_mmlu.py {flags} --shots 0 --limit 1"}[script]
    line = shell.format(words).replace("python", sys.executable)
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "out" / "run.json" if script == "train" else tmp_path / "out").is_file()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_what_the_output_cannot_show_is_replaced_and_a_closed_pipe_is_no_error(encoding):
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print("a\u6570b\udcffc", file=cli.Output(shown), flush=True)
    middle = "\u6570" if encoding == "utf-8" else "?"
    assert shown.buffer.getvalue().decode(encoding).strip() == f"a{middle}b?c"
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding=encoding, buffering=1) as closed:
        output = cli.Output(closed)
        for _ in range(3):
            print("lost", file=output, flush=True)
    print("lost", file=cli.Output(None))


@pytest.mark.parametrize("main, module, name, out", [
    (train.main, train.evaluation, "print_losses", "adapter.pt"),
    (cluster.main, cluster, "print_report", ""), (talk.main, talk, "print_exact", ""),
    (eval_mmlu.main, eval_mmlu, "print_summary", "")])
def test_a_result_is_written_before_it_is_printed(command, tmp_path, monkeypatch, main, module,
                                                  name, out):
    def fail(*arguments):
        raise OSError("no print")

    monkeypatch.setattr(module, name, fail)
    flags = command
    if main is not train.main:
        flags = [*command[:6], "--out", str(tmp_path / "run")]
        flags += {cluster.main: ["--k-max", "1"], talk.main: ["--max-new-tokens", "1"]}.get(
            main, ["--data", str(WORLD / "quiz"), "--shots", "0", "--limit", "1"])
    assert main(flags) == 2
    assert (tmp_path / "run" / out).is_file()


# ---------------------------------------------------------------- 2: a file is known


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234567\n"
FOREIGN = {  # what a file may be instead
    "Git LFS pointer": POINTER, "web page": b"\n<!DOCTYPE html><html>",
    "web page ": b'<?xml version="1.0"?><Error>', "compressed with gzip": gzip.compress(b"x" * 99),
    "compressed with bzip2": b"BZh91AY", "compressed with zstd": b"\x28\xb5\x2f\xfd12",
    "tokenizer of Llama 3": b"IQ== 0\r\nIg== 1\r\n",
    "tekken": b'{"config": {"pattern": "a+", "num_vocab_tokens": 9}}',
    "tokenizer.json": b'{"version": "1.0", "truncation": null, "added_tokens": []}'}


@pytest.mark.parametrize("words", FOREIGN)
def test_every_reader_says_what_a_file_is_instead(command, base, tmp_path, capsys, words):
    bad = tmp_path / "bad"
    bad.write_bytes(FOREIGN[words])
    weights = tmp_path / "weights"
    weights.mkdir()
    for path in base.iterdir():
        (weights / path.name).write_bytes(path.read_bytes())
    (weights / "tokenizer.model").write_bytes(FOREIGN[words])
    adapter = ["--weights", base, "--adapter", bad, "--device", "cpu"]
    export_hf.main([str(base), str(tmp_path / "hf")])
    lines = [refused(capsys, train.main, *command, "--data", bad),
             refused(capsys, train.main, *command, "--weights", weights),
             refused(capsys, train.main, *command, "--init-adapter", bad),
             refused(capsys, cluster.main, "--data", bad),
             refused(capsys, cluster.main, "--weights", weights, "--features", "tfidf"),
             refused(capsys, eval_mmlu.main, *adapter),
             refused(capsys, talk.main, "hi", *adapter),
             refused(capsys, prepare_mmlu.main, "--source", bad, "--out", tmp_path / "m"),
             refused(capsys, import_hf.main, tmp_path / "hf", tmp_path / "n", "--tokenizer", bad),
             refused(capsys, import_llama2c.main, bad, TOKENIZER, tmp_path / "n"),
             refused(capsys, official_adapter.main, bad, tmp_path / "n", "--weights", base)]
    assert all(words.strip() in line for line in lines), lines


def test_links_to_nothing_folders_and_caches_of_the_other_layout_are_known(command, base, tmp_path,
                                                                           capsys):
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "1f"
    snapshot.mkdir(parents=True)
    for path in base.iterdir():
        (snapshot / path.name).symlink_to(path)
    (snapshot / "consolidated.00.pth").unlink()
    (snapshot / "consolidated.00.pth").symlink_to("../../blobs/gone")
    line = refused(capsys, talk.main, "hi", "--weights", snapshot)
    assert "consolidated.00.pth is a link to ../../blobs/gone" in line and "again" in line
    line = refused(capsys, import_hf.main, tmp_path / "hub" / "models--a--b", tmp_path / "new")
    assert f"{snapshot} is in Meta's layout already: give it to --weights" in line
    line = refused(capsys, train.main, *command, "--data", snapshot)
    assert "is a folder: give a file in it" in line and "params.json" in line
    assert what_it_is(tmp_path / "absent") is None and what_it_is(TOKENIZER) is None
    assert not [path for path in [*WORLD.rglob("*.*"), *base.iterdir()] if what_it_is(path)]


def test_a_checkpoint_of_a_run_is_named_and_no_flag_that_a_script_lacks(command, base, tmp_path,
                                                                       capsys):
    with in_step(1, interrupt):
        assert train.main(command) == 130
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    for line in (refused(capsys, talk.main, "hi", "--weights", base, "--adapter", checkpoint),
                 refused(capsys, train.main, *command, "--init-adapter", checkpoint)):
        assert "is a checkpoint of a run" in line and "--resume" in line
    assert "a stopped run" in refused(capsys, train.main, *command, "--weights", tmp_path / "run")
    assert "--resume" in refused(capsys, import_llama2c.main, checkpoint, TOKENIZER, tmp_path / "n")
    save_adapter(adapted(base), tmp_path / "run" / "adapter.pt")
    line = refused(capsys, train.main, *command, "--weights", tmp_path / "run")
    assert "adapter.pt to --init-adapter" in line
    line = refused(capsys, talk.main, "hi", "--weights", tmp_path / "run")
    assert "adapter.pt to --adapter" in line
    line = refused(capsys, cluster.main, "--weights", tmp_path / "run")
    assert "holds an adapter, not a model: give the folder of its base" in line and (
        "--adapter" not in line)


def adapted(base, **settings):
    model, _ = load_llama(base)
    add_hydralora(model, **settings)
    for layer in hydra_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    return model


# ---------------------------------------------------------------- 3: damage inside a file


def damaged(path, tensor):
    """The file of torch.save with other bytes in this tensor."""
    content = path.read_bytes()
    number = tensor.contiguous().numpy().tobytes()[8:40]
    assert content.count(number) == 1
    path.write_bytes(content.replace(number, bytes(32)))


def test_other_bytes_in_an_adapter_a_checkpoint_or_a_bin_are_found_by_their_checksum(
        command, base, tmp_path, capsys):
    with in_step(1, interrupt):
        assert train.main(command) == 130
    path = tmp_path / "run" / "checkpoint.pt"
    name = "layers.0.feed_forward.w1.lora_A"
    damaged(path, torch.load(path, weights_only=True)["tensors"][name])
    assert "is damaged" in refused(capsys, train.main, *command, "--resume")
    adapter = tmp_path / "a.pt"
    save_adapter(adapted(base), adapter)
    damaged(adapter, torch.load(adapter, weights_only=True)["tensors"][name])
    for main, flags in [(talk.main, ["hi", "--weights", base, "--adapter", adapter]),
                        (train.main, [*command, "--init-adapter", adapter]),
                        (official_adapter.main, [adapter, tmp_path / "n", "--weights", base])]:
        assert "is damaged" in refused(capsys, main, *flags)
    assert export_hf.main([str(base), str(tmp_path / "hf")]) == 0
    state = hf_layout.read_safetensors(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(state, path := tmp_path / "hf" / "pytorch_model.bin")
    damaged(path, state["model.layers.0.mlp.up_proj.weight"])
    assert "is damaged" in refused(capsys, import_hf.main, tmp_path / "hf", tmp_path / "n")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(base, tmp_path, capsys, value):
    state = torch.load(base / "consolidated.00.pth", weights_only=True)
    state["layers.0.feed_forward.w3.weight"].view(-1)[5] = value
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in ("params.json", "tokenizer.model"):
        (bad / name).write_bytes((base / name).read_bytes())
    torch.save(state, bad / "consolidated.00.pth")
    new = tmp_path / "new"
    for main, flags in [(talk.main, ["hi", "--weights", bad]), (export_hf.main, [bad, new]),
                        (eval_mmlu.main, ["--weights", bad, "--limit", 1, "--out", new]),
                        (cluster.main, ["--weights", bad, "--out", new]),
                        (train.main, ["--weights", bad, "--data", "data/world/val.jsonl"])]:
        assert "layers.0.feed_forward.w3.weight the first" in refused(capsys, main, *flags)
    assert not new.exists()


def test_tensors_of_zeros_are_counted_and_named(base, tmp_path, capsys):
    assert export_hf.main([str(base), str(tmp_path / "hf")]) == 0
    path = tmp_path / "hf" / "model.safetensors"
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes(len(content) - half))  # whose end never arrived
    assert import_hf.main([str(tmp_path / "hf"), str(tmp_path / "new")]) == 0
    found = re.search(r"warning: (\d+) of the 12 tensors .* all zeros, (\S+)",
                      capsys.readouterr().out)
    zeros = [name for name, t in hf_layout.read_safetensors(path).items() if not t.any()]
    assert int(found[1]) == len(zeros) and found[2].rstrip(",") in zeros


# ---------------------------------------------------------------- 4: cheap refusals first


@pytest.mark.parametrize("flags, words", [
    (["--targets", "q_proj, v_proj"], "q_proj is wq here, v_proj is wv here"),
    (["--targets", "gate_proj,wq"], "gate_proj is w1 here"),
    (["--targets", ","], "names with commas"), (["--keep-data", "none"], "no data file at none"),
    (["--val-data", "none"], "no data file at none"), (["--rank", "9999"], "--rank 9999")])
def test_what_is_cheap_to_refuse_is_refused_before_clustering_and_loading(
        command, capsys, monkeypatch, flags, words):
    monkeypatch.setattr(train, "load_base", lambda args: pytest.fail("loaded"))
    assert words in refused(capsys, train.main, *command, "--heads", "auto", *flags)


def test_a_resumed_run_with_other_settings_is_refused_before_the_base_is_loaded(
        command, capsys, monkeypatch):
    with in_step(1, interrupt):
        assert train.main(command) == 130
    monkeypatch.setattr(train, "load_base", lambda args: pytest.fail("loaded"))
    line = refused(capsys, train.main, *command, "--resume", "--max-steps", 4)
    assert "max_steps was 2, is 4" in line and "train longer" in line
    assert "heads was 3, is auto" in refused(capsys, train.main, *command, "--resume", "--heads",
                                             "auto")


def test_blanks_and_repetitions_between_commas_do_no_harm(command):
    assert train.parse_args([*command, "--targets", " w1, w2,w1 ,"]).targets == ["w1", "w2"]
    assert eval_mmlu.parse_args(["--subjects", "a , b,a"]).subjects == ["a", "b"]


def test_a_setting_without_effect_is_not_recorded(command, tmp_path):
    assert train.main([*command, "--method", "full", "--rank", "64", "--max-steps", "1"]) == 0
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert not settings.keys() & {"targets", *vars(HydraSettings())}


# ---------------------------------------------------------------- 5 and 8: names and labels


@pytest.mark.parametrize("category, label", [
    (3, "3"), (True, "true"), (False, "false"), (["a", 1], '["a", 1]'), ({}, "{}"),
    (0.5, "0.5"), (math.nan, "NaN"), ("\ud800x", "?x"), (None, ""), (" \n", "")])
def test_a_category_is_a_label_whatever_its_type(tmp_path, category, label):
    path = write_lines(tmp_path / "a.jsonl", records(3, lambda i: category))
    assert [record["category"] for record in read_records(path)] == [label] * 3


@pytest.mark.parametrize("nothing", [None, [], {}, math.nan, False, " \n", [""], [None]])
@pytest.mark.parametrize("name", ["context", "input"])
def test_what_is_no_context_is_none_and_what_is_not_read_makes_nothing_unusable(
        tmp_path, name, nothing):
    row = {**records(1)[0], name: nothing, "system": 5, "history": {"a": 1}, "note": [1]}
    [record] = read_records(write_lines(tmp_path / "a.jsonl", [row]), strict=True)
    assert record["context"] == "" and not record.keys() & {"system", "history"}
    row = {**row, "context": "Here.", "input": 5, "output": 7}
    [record] = read_records(write_lines(tmp_path / "a.jsonl", [row]), strict=True)
    assert record["context"] == "Here."


NAMES = ["", "all", "a name of so many words that it is longer than a column", "two\nlines\tand",
         "\u4ed3\u5e93" * 9, "e\u0301", "$x$"]


def test_all_rows_of_a_table_are_as_wide_and_their_records_add_up(command, tmp_path, capsys):
    val = write_lines(tmp_path / "val.jsonl", records(21, lambda i: NAMES[i % len(NAMES)]))
    assert train.main([*command, "--val-data", str(val)]) == 0
    out = capsys.readouterr().out
    table = out[out.index("category"):].split("\n\n")[0].splitlines()[1:]
    assert {cli.columns(line) for line in table} == {cli.columns(table[0])}
    counts = [int(re.search(r"  +(\d+)  ", line)[1]) for line in table]
    assert counts == [3] * len(NAMES) + [21]
    assert [line.split()[0] for line in table if "all" in line] == ['"all"', "all"]
    gates = out[out.index("mean gate"):].split("over all layers")[0].splitlines()[1:]
    assert len({cli.columns(line) for line in gates}) == 1 and "(none)" in "".join(gates)
    result = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(result["metrics"]["categories"]) == {name or "(none)" for name in NAMES}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot.main([str(tmp_path / "run"), "--out", str(tmp_path / "a.png")]) == 0
    read = plot.read_run(tmp_path / "run")
    assert read.tuned[""] != read.tuned["all"] and "not in matplotlib's font" in (
        capsys.readouterr().out)
    assert max(cli.columns(plot.tick_label(name)) for name in read.tuned) <= 24 + 2  # \$


def test_a_printed_command_can_be_pasted(command, tmp_path, capsys):
    out = tmp_path / "my runs; a"
    assert train.main([*command, "--out", str(out)]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "to see it: " in line]
    words = shlex.split(line.removeprefix("to see it: "))
    assert words == ["python", "-m", "tools.plot", str(out), "--out", str(out / "plot.png")]


# ---------------------------------------------------------------- 6: compared by digest


def result(path, right, **settings):
    questions = [{"subject": "art", "index": i, "answer": "A", "prediction": "AB"[i >= right]}
                 for i in range(8)]
    path.write_text(json.dumps({"settings": settings, "questions": questions}))
    return path


@pytest.mark.parametrize("other, words", [
    ({"data_digest": "x"}, "not on the same questions"),
    ({"questions_digest": "x", "shots": 5}, "not on the same questions"),
    ({"data_digest": "x", "shots": 5}, None), ({"dtype": "bf16"}, None),
    ({"quantize": "nf4"}, None)])
def test_other_questions_are_not_compared_and_other_settings_are_named(tmp_path, capsys, other,
                                                                       words):
    same = dict(data_digest="d", questions_digest="q", shots=0, dtype="fp32", quantize="none")
    a, b = result(tmp_path / "a.json", 3, **same), result(tmp_path / "b.json", 5, **same | other)
    if words:
        assert words in refused(capsys, eval_mmlu.main, "--compare", a, b)
        return
    assert eval_mmlu.main(["--compare", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert all(len(re.findall(f"^{name} ", out, re.M)) == 1 for name in other)


def test_a_run_is_resumed_with_its_files_in_another_place_and_says_what_rounds_otherwise(
        command, base, tmp_path, capsys, monkeypatch):
    with in_step(1, interrupt):
        assert train.main(command) == 130
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    for path in [*base.iterdir(), tmp_path / "data.jsonl"]:
        (elsewhere / path.name).write_bytes(path.read_bytes())
    versions = run_folder.versions()
    monkeypatch.setattr(run_folder, "versions", lambda: {**versions, "threads": 64, "torch": "9"})
    flags = ["--weights", str(elsewhere), "--data", str(elsewhere / "data.jsonl"), "--resume"]
    assert train.main([*command, *flags]) == 0
    out = capsys.readouterr().out
    assert f"the run had threads {versions['threads']} and continues with 64" in out
    assert f"torch {versions['torch']} and continues with 9" in out
    line = refused(capsys, train.main, *command, "--resume")
    assert "has ended" in line and f"--init-adapter {tmp_path / 'run' / 'adapter.pt'}" in line


# ---------------------------------------------------------------- 7: the surroundings


@pytest.mark.slow
def test_a_picture_does_not_depend_on_the_users_own_matplotlib(tmp_path):
    own = {"MPLBACKEND": "of_a_notebook", "MATPLOTLIBRC": str(tmp_path / "rc")}
    (tmp_path / "rc").write_text("text.usetex: True\nbackend: nothing\nfigure.dpi: many\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.csv").write_text("step,loss,grad_norm,lr,tokens_per_second\n"
                                              "1,2.0,1.0,0.1,9\n2,1.0,1.0,0.1,9\n")
    for name, more in (("a", {}), ("b", own)):
        done = subprocess.run([sys.executable, "-m", "tools.plot", tmp_path / "run", "--out",
                               tmp_path / f"{name}.png"], cwd=ROOT, env={**os.environ, **more},
                              capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_path_that_the_shell_left_with_a_tilde_is_in_the_home_folder(command, tmp_path,
                                                                       monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = train.parse_args(["--out=~/x", "--weights=~/w", "--data", "~/a.jsonl:0.5", "~/b.jsonl"])
    assert (args.out, args.weights) == (f"{tmp_path}/x", f"{tmp_path}/w")
    assert args.data == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    assert talk.parse_args(["~/ is what?", "--adapter=~/a.pt"]).prompts == ["~/ is what?"]
    assert str(talk.parse_args(["--adapter=~/a.pt"]).adapter) == f"{tmp_path}/a.pt"


def test_an_error_of_the_system_names_operation_and_path(command, capsys, monkeypatch):
    def fail(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(run_folder.os, "fsync", fail)
    capsys.readouterr()
    assert train.main(command) == 2
    assert "log.csv cannot be written (Input/output error)" in capsys.readouterr().err
    error = OSError(22, "Invalid argument", "x.bin")
    assert cli.system_words(error) == "x.bin: Invalid argument, in run"


def test_a_tokenizer_is_read_from_a_path_that_is_no_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\xfe"
    try:
        os.mkdir(path)
    except OSError:
        pytest.skip("this file system has UTF-8 names alone")
    folder = os.fsdecode(path)
    with open(f"{folder}/tokenizer.model", "wb") as file:
        file.write(TOKENIZER.read_bytes())
    assert Tokenizer(f"{folder}/tokenizer.model").vocab_size == Tokenizer(TOKENIZER).vocab_size


@pytest.mark.slow
def test_a_tool_started_as_a_file_says_how_it_is_started():
    done = subprocess.run([sys.executable, "tools/generate.py", "hi"], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode and done.stderr.count("\n") == 1
    assert "`python -m tools.generate`" in done.stderr


# ---------------------------------------------------------------- 9: nothing unsaid


def test_an_answer_that_was_cut_says_so_and_is_counted(base, tmp_path, capsys, monkeypatch):
    data, out = write_lines(tmp_path / "d.jsonl", records(3)), tmp_path / "a.jsonl"
    monkeypatch.setattr(talk, "generate_ids", lambda model, tokenizer, ids, **sampling: [
        [5] * (3 if i else 4) for i, _ in enumerate(ids)])
    flags = ["--weights", str(base), "--data", str(data), "--out", str(out), "--device", "cpu"]
    assert talk.main([*flags, "--max-new-tokens", "4"]) == 0
    cut = [json.loads(line)["cut"] for line in out.read_text().splitlines()]
    assert sorted(cut) == [False, False, True]
    assert "1 of 3 answers were cut at --max-new-tokens 4" in capsys.readouterr().out


def test_a_loaded_model_answers_without_dropout(base, tmp_path):
    save_adapter(adapted(base, dropout=0.5), tmp_path / "a.pt")
    model, tokenizer = load_llama(base)
    train.load_adapter(model, tmp_path / "a.pt")
    assert not any(module.training for module in model.modules())
    answers = [generate(model, tokenizer, ["Count."], max_new_tokens=8) for _ in range(2)]
    assert answers[0] == answers[1]
