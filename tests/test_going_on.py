"""An adapter that is trained further, and training on several files: --init-adapter, --data."""

import csv
import json

import pytest
import torch

import cluster
import train
from data.corpus import length_batches
from hydralora import add_hydralora, save_adapter
from model import load_llama, save_llama
from support.files import file_fingerprint
from tests.conftest import WORLD, in_step, interrupt, status_of, tiny_model

FAMILIES = ("tavi", "classification")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny base, 40 records of each of two families, and an adapter trained on the first."""
    folder = tmp_path_factory.mktemp("stages")
    save_llama(tiny_model(n_layers=1), WORLD / "base" / "tokenizer.model", folder / "weights")
    lines = (WORLD / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    for family in FAMILIES:
        own = [line for line in lines if json.loads(line)["category"] == family][:40]
        (folder / f"{family}.jsonl").write_text("".join(own), "utf-8")
    assert train.main([*flags(folder, "tavi"), "--heads", "2", "--rank", "4", "--alpha", "8",
                       "--targets", "w1,w3", "--out", str(folder / "first")]) == 0
    return folder


def flags(place, *data):
    """The arguments of a run of a second or two; later flags win."""
    return ["--weights", str(place / "weights"), "--device", "cpu", "--max-seq-len", "128",
            "--batch-size", "8", "--grad-accum", "1", "--max-steps", "6", "--epochs", "9",
            "--lr", "0.01", "--dropout", "0", "--data",
            *(str(place / f"{name}.jsonl") + end for name, end in map(split_end, data))]


def split_end(text):
    name, colon, weight = text.partition(":")
    return name, colon + weight


def going_on(place, *data):
    return [*flags(place, *data), "--init-adapter", str(place / "first" / "adapter.pt")]


def run_json(folder):
    return json.loads((folder / "run.json").read_text())


def tensors(folder):
    return torch.load(folder / "adapter.pt", weights_only=True)["tensors"]


# ---------------------------------------------------------------- an adapter trained further


def test_a_second_stage_starts_from_the_weights_and_settings_of_the_first(place, tmp_path, capsys):
    texts = tmp_path / "keep.jsonl"
    texts.write_text('{"text": "a small text"}\n')
    command = [*going_on(place, "classification"), "--val-data", str(place / "tavi.jsonl"),
               "--keep-data", str(texts)]
    assert train.main([*command, "--out", str(tmp_path / "still"), "--lr", "1e-30"]) == 0
    first, still = tensors(place / "first"), tensors(tmp_path / "still")
    assert first.keys() == still.keys()
    assert all(torch.equal(first[name], still[name]) for name in first)
    out = capsys.readouterr().out
    assert train.main([*command, "--out", str(tmp_path / "run")]) == 0
    assert not all(torch.equal(first[name], tensor)
                   for name, tensor in tensors(tmp_path / "run").items())
    result = run_json(tmp_path / "run")
    expected = dict(method="hydralora", heads=2, rank=4, alpha=8.0, targets=["w1", "w3"])
    assert expected.items() <= result["settings"].items()
    assert result["fingerprints"]["init_adapter"] == file_fingerprint(place / "first/adapter.pt")
    # the base is the base, and before is the adapter as it came
    metrics, unchanged = result["metrics"], run_json(tmp_path / "still")["metrics"]
    for row, same in [(metrics, unchanged), (metrics["categories"]["tavi"],
                                             unchanged["categories"]["tavi"])]:
        assert row["val_loss_before"] == same["val_loss_before"] == same["val_loss"]
        assert row["exact_match_before"] == same["exact_match"]
        assert row["val_loss_base"] == same["val_loss_base"] > row["val_loss_before"]
        assert row["val_loss"] != row["val_loss_before"]
    kept = metrics["kept"]
    assert kept["loss_before"] == unchanged["kept"]["loss"] != kept["loss_base"]
    [names] = [line for line in out.splitlines() if line.startswith("category")
               and "tuned" in line]
    assert names.split()[2:] == ["base", "before", "tuned"] * 2
    [row] = [line.split() for line in out.splitlines() if line.startswith("all ")]
    assert row[2:5] == [f"{unchanged[f'val_loss{end}']:.4f}" for end in ("_base", "_before", "")]
    kept = " -> ".join(f"{unchanged['kept'][f'loss{end}']:.2f}" for end in ("_base", "_before", ""))
    assert f"loss {kept}\n" in out


def test_a_run_without_init_adapter_has_no_third_column(place):
    assert not [key for key in run_json(place / "first")["metrics"] if key.endswith("_before")]
    assert "init_adapter" not in run_json(place / "first")["fingerprints"]


@pytest.mark.parametrize("more, message", [
    (["--rank", "8"], "has rank 4, not 8: drop --rank"), (["--heads", "3"], "has heads 2, not 3"),
    (["--heads", "auto"], "has heads 2, not auto"), (["--alpha", "32"], "has alpha 8.0, not 32.0"),
    (["--gate", "uniform"], "has gate learned, not uniform"), (["--dropout", "0.1"], "dropout 0.0"),
    (["--targets", "w1"], "has targets w1,w3, not w1"), (["--method", "lora"], "has method hydra"),
    (["--method", "full"], "has method hydralora, not full"),
    (["--init-adapter", "absent.pt"], "there is no adapter at absent.pt"),
    (["--init-adapter", "DATA"], "tavi.jsonl is not an adapter of this project"),
    (["--out", "FIRST"], "is in --out"),
], ids=str)
def test_what_contradicts_the_adapter_is_refused_in_one_line(place, more, message, capsys):
    paths = {"FIRST": place / "first", "DATA": place / "tavi.jsonl"}
    more = [str(paths.get(word, word)) for word in more]
    assert status_of(train.main, [*going_on(place, "tavi"), *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]


def test_flags_that_agree_with_the_adapter_are_taken(place):
    args = train.parse_args([*going_on(place, "tavi"), "--rank", "4", "--method", "hydralora"])
    assert args.rank == 4 and args.method == "hydralora"


def test_an_adapter_of_another_base_is_refused(place, tmp_path, capsys):
    model = tiny_model(seed=1, n_layers=1)
    add_hydralora(model, heads=2)
    save_adapter(model, tmp_path / "other.pt")
    assert train.main([*flags(place, "tavi"), "--init-adapter", str(tmp_path / "other.pt"),
                       "--out", str(tmp_path / "run")]) == 2
    assert "another base model" in capsys.readouterr().err


@pytest.mark.parametrize("method", [name for name in train.METHODS if name != "full"])
def test_every_method_is_recognised_by_its_adapter(place, method, tmp_path):
    command = [*flags(place, "tavi"), "--method", method]
    model, _ = load_llama(place / "weights")
    settings = train.adapter_settings(train.parse_args(command))
    add_hydralora(model, **settings)
    save_adapter(model, tmp_path / "a.pt")
    args = train.parse_args([*flags(place, "tavi"), "--init-adapter", str(tmp_path / "a.pt")])
    assert args.method == method and train.adapter_settings(args) == settings


def test_a_resumed_second_stage_equals_the_uninterrupted_one(place, tmp_path, capsys, monkeypatch):
    command = going_on(place, "tavi", "classification:0.5")
    assert train.main([*command, "--out", str(tmp_path / "whole")]) == 0
    command += ["--out", str(tmp_path / "run")]
    with in_step(4, interrupt):
        assert train.main(command) == 130
    for other, message in [
            (flags(place, "tavi", "classification:0.5"), "alpha was 8.0, is 32.0"),
            (going_on(place, "tavi", "classification:2"), "data_weights was [1.0, 0.5], is [1.0"),
            (going_on(place, "tavi", "classification"), "data_weights was [1.0, 0.5], is None"),
            (going_on(place, "classification", "tavi:0.5"), "data, data_2 changed since")]:
        assert train.main([*other, "--out", str(tmp_path / "run"), "--resume"]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(train, "load_adapter", lambda *_: pytest.fail("read again"))
    assert train.main([*command, "--resume"]) == 0
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "run")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert run_json(tmp_path / "run")["metrics"] == run_json(tmp_path / "whole")["metrics"]


def test_another_init_adapter_is_refused_when_resuming(place, tmp_path, capsys):
    adapter = tmp_path / "adapter.pt"
    adapter.write_bytes((place / "first" / "adapter.pt").read_bytes())
    command = [*flags(place, "tavi"), "--init-adapter", str(adapter), "--out",
               str(tmp_path / "run")]
    with in_step(2, interrupt):
        assert train.main(command) == 130
    content = torch.load(adapter, weights_only=True)
    next(iter(content["tensors"].values())).mul_(2)
    torch.save(content, adapter)
    capsys.readouterr()
    assert train.main([*command, "--resume"]) == 2
    assert "init_adapter changed since" in capsys.readouterr().err


def test_damaged_losses_of_the_init_adapter_are_refused_when_resuming(place, tmp_path, capsys):
    command = [*going_on(place, "tavi"), "--out", str(tmp_path / "run")]
    with in_step(2, interrupt):
        assert train.main(command) == 130
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["init"]["val"][""]["loss"] = float("nan")
    torch.save(state, path)
    assert train.main([*command, "--resume"]) == 2
    assert "its losses are damaged" in capsys.readouterr().err


# ---------------------------------------------------------------- several files


def test_one_file_keeps_its_order_of_records_and_weight_1_changes_nothing(place, tmp_path):
    sequences = train.set_up(train.parse_args(flags(place, "tavi"))).sequences
    steps = train.plan_steps(sequences, batch_size=4, grad_accum=1, epochs=2, max_steps=0, seed=3)
    before = [length_batches(sequences, 4, torch.Generator().manual_seed(3000 + epoch))
              for epoch in range(2)]
    assert [batch for [batch] in steps] == before[0] + before[1]
    command = [*flags(place, "tavi:1"), "--heads", "2", "--rank", "4", "--alpha", "8",
               "--targets", "w1,w3", "--out", str(tmp_path / "run")]
    assert train.main(command) == 0
    assert (tmp_path / "run" / "adapter.pt").read_bytes() == (
        place / "first" / "adapter.pt").read_bytes()


def test_a_mixture_has_its_weights_fingerprints_and_categories_in_run_json(place, tmp_path):
    bare = tmp_path / "bare.jsonl"
    records = map(json.loads, (place / "classification.jsonl").read_text().splitlines())
    bare.write_text("".join(json.dumps({**record, "category": ""}) + "\n" for record in records))
    command = [*flags(place, "tavi:1.5"), f"{bare}:0.25", "--epochs", "2", "--max-steps", "0",
               "--heads", "2", "--out", str(tmp_path / "run")]
    assert train.main(command) == 0
    result = run_json(tmp_path / "run")
    settings, found = result["settings"], result["fingerprints"]
    assert settings["data"] == [str(place / "tavi.jsonl"), str(bare)]
    assert settings["data_weights"] == [1.5, 0.25]
    assert found["data"] == file_fingerprint(place / "tavi.jsonl")
    assert found["data_2"] == file_fingerprint(bare)
    # two records of each file are held out: 38 + 19 + 10 records an epoch, in batches of 8
    metrics = result["metrics"]["categories"]
    assert {name: row["records"] for name, row in metrics.items()} == {"tavi": 2, "bare": 2}
    steps = list(csv.DictReader(open(tmp_path / "run" / "log.csv")))
    assert len(steps) == 2 * -(-(38 + 19 + 10) // 8)
    assert result["data"]["train"]["records"] == 76


def test_the_heads_are_counted_over_every_record_once_in_the_order_of_files(
        place, tmp_path, capsys):
    data = flags(place, "tavi:3", "classification:0.5")
    paths = data[data.index("--data"):]
    assert cluster.main([*paths, "--features", "tfidf", "--k-max", "5", "--weights",
                         str(place / "weights"), "--out", str(tmp_path / "c.json")]) == 0
    content = json.loads((tmp_path / "c.json").read_text())
    labels = content["labels"]
    assert len(labels) == content["records"] == 80 and content["k"] > 1
    assert set(labels[:40]).isdisjoint(labels[40:])  # the families have no words in common
    assert content["settings"]["data"] == [str(place / f"{name}.jsonl") for name in FAMILIES]
    assert train.main([*data, "--heads", "auto", "--rank", "2", "--max-steps", "1",
                       "--out", str(tmp_path / "run")]) == 0
    assert len(run_json(tmp_path / "run")["clusters"]["labels"]) == 76  # without validation
    assert cluster.main([*paths[:2], "absent.jsonl:2"]) == 2
    assert "no data file at absent.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("data, message", [
    ("tavi:0", "a weight must be above 0"), ("absent:2", "no data file at"),
    ("tavi:half", "no data file at"), ("one:9", "one.jsonl has one record, which cannot be")])
def test_a_weight_or_a_file_that_cannot_be_is_refused_in_one_line(place, data, message, capsys):
    (place / "one.jsonl").write_text('{"instruction": "a", "response": "b"}')
    assert status_of(train.main, flags(place, "classification", data)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
