"""train.py: short real runs of every flag, and the claims about its loop."""

import csv
import json
import math
import traceback

import pytest
import torch
import torch.nn.functional as F

import train
from data.corpus import Sequence, cut_by_tokens, encode_records, load_train_val, read_records
from hydralora import adapter_parameters, add_hydralora, hydra_layers, load_adapter
from model import ModelArgs, Transformer, load_llama, save_llama
from support import evaluation
from support.device import autocast
from support.files import file_fingerprint
from tests.conftest import ROOT, WORLD, asset, in_step, interrupt, tiny_model

FP32 = autocast("cpu", "fp32")
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_llama(tiny_model(), WORLD / "base" / "tokenizer.model", folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """80 records of the world, two families of short sequences."""
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    lines = [line for line in open(WORLD / "train.jsonl", encoding="utf-8")
             if json.loads(line)["category"] in ("tavi", "classification")][:80]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def command(weights, data, tmp_path):
    """The arguments of a run of a few seconds; later flags win."""
    return ["--weights", str(weights), "--data", str(data), "--out", str(tmp_path / "out"),
            "--heads", "3", "--rank", "4", "--lr", "0.01", "--max-seq-len", "128",
            "--device", "cpu", "--batch-size", "8", "--grad-accum", "1", "--max-steps", "6",
            "--epochs", "9", "--dropout", "0"]


def run_json(tmp_path):
    return json.loads((tmp_path / "out" / "run.json").read_text())


def sequences(tokenizer, path, count):
    return encode_records(read_records(path)[:count], tokenizer, 128)[0]


# ---------------------------------------------------------------- settings


def test_without_weights_the_worlds_defaults_hold_and_with_weights_the_papers():
    args = train.parse_args(["--heads", "3", "--rank", "8"])
    assert args.weights == str(WORLD / "base") and args.val_data == str(WORLD / "val.jsonl")
    assert (args.heads, args.rank, args.lr) == (3, 8, train.WORLD_RECIPE["lr"])
    args = train.parse_args(["--weights", "w", "--data", "d"])
    got = (args.lr, args.epochs, args.batch_size, args.grad_accum, args.alpha, args.dropout,
           args.targets, args.val_data)
    assert got == (2e-4, 1, 1, 8, 32.0, 0.05, ["w1", "w2", "w3"], None)


def test_records_may_have_1024_tokens_unless_the_model_is_shorter(weights, data, tmp_path):
    save_llama(tiny_model(max_seq_len=4096), WORLD / "base" / "tokenizer.model", tmp_path / "long")
    for folder, longest in ((weights, 128), (tmp_path / "long", 1024)):
        args = train.parse_args(["--weights", str(folder), "--data", str(data), "--device", "cpu"])
        train.set_up(args)
        assert args.max_seq_len == longest


@pytest.mark.parametrize("flags, message", [
    (["--weights", "w"], "needs --data"), (["--rank", "0"], "--rank"),
    (["--heads", "0"], "--heads"), (["--heads", "many"], "--heads"),
    (["--method", "full", "--heads", "auto"], "auto"),
    (["--dropout", "1"], "--dropout"), (["--lr", "-1"], "--lr"),
    (["--lr", "nan"], "--lr"), (["--grad-accum", "0"], "--grad-accum"),
    (["--method", "lora", "--heads", "3"], "has heads 1, not 3"),
    (["--max-steps", "-1"], "--max-steps"),
    (["--method", "full", "--gate", "uniform"], "--gate"), (["--alpha", "inf"], "--alpha"),
    (["--method", "ia3"], "--method"), (["--dtype", "int8"], "--dtype"),
    (["--epochs", "0"], "--epochs"), (["--batch-size", "0"], "--batch-size"),
])
def test_impossible_settings_are_refused_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.strip().split("\n")[-1]


@pytest.mark.parametrize("flags, message", [
    (["--targets", "w1,wx"], "'wx'"), (["--weights", "absent"], "no folder absent"),
    (["--data", "absent"], "no data file"), (["--max-seq-len", "4096"], "--max-seq-len 4096"),
    (["--max-seq-len", "5"], "none of the"), (["--val-data", "SAME"], "is in the validation"),
    (["--out", "WEIGHTS"], "folder of the weights"), (["--resume"], "no checkpoint.pt"),
])
def test_bad_input_is_one_line_and_status_2(command, flags, message, capsys):
    places = {"SAME": command[3], "WEIGHTS": command[1]}
    assert train.main(command + [places.get(flag, flag) for flag in flags]) == 2
    error = capsys.readouterr().err.strip().split("\n")
    assert len(error) == 1 and message in error[0]


def test_a_gpu_that_is_not_there_is_refused(command, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(SystemExit):
        train.main(command + ["--device", "cuda"])
    assert "finds no CUDA device" in capsys.readouterr().err


def test_the_learning_rate_warms_up_and_falls_on_a_cosine_to_zero():
    rates = [train.learning_rate(step, 100, 1.0, 0.03) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[3] == 1.0 and rates[51] == pytest.approx(0.5, abs=0.01) and rates[99] < 1e-3
    assert all(a >= b for a, b in zip(rates[2:], rates[3:]))
    assert train.learning_rate(0, 1, 1.0, 0.03) == 1.0


# ---------------------------------------------------------------- whole runs


METHODS = {"hydralora": ["--method", "hydralora"], "lora": ["--method", "lora", "--heads", "1"],
           "lora-split": ["--method", "lora-split"], "uniform": ["--gate", "uniform"],
           "full": ["--method", "full", "--lr", "0.001"],
           "attention": ["--targets", "wq,wv", "--alpha", "8", "--dropout", "0.1"],
           "checkpointed": ["--checkpoint-activations"]}


@pytest.mark.parametrize("flags", METHODS.values(), ids=METHODS)
def test_every_method_trains_and_writes_its_files(command, flags, tmp_path, capsys):
    assert train.main(command + flags + ["--max-steps", "25"]) == 0
    result, out = run_json(tmp_path), capsys.readouterr().out
    metrics = result["metrics"]
    assert metrics["val_loss"] < metrics["val_loss_base"]
    assert set(metrics["categories"]) == {"tavi", "classification"}
    assert all(c["val_loss_base"] > 0 for c in metrics["categories"].values())
    assert "trainable parameters" in out and "exact match" in out
    rows = list(csv.DictReader(open(tmp_path / "out" / "log.csv")))
    assert [int(row["step"]) for row in rows] == list(range(1, 26))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    model, tokenizer = load_llama(command[1])
    if "full" in flags:
        assert files == {"run.json", "log.csv", "params.json", "consolidated.00.pth",
                         "tokenizer.model"}
        tuned, _ = load_llama(tmp_path / "out")
        assert not torch.equal(tuned.output.weight, model.output.weight)
        model = tuned
    else:
        assert files == {"run.json", "log.csv", "adapter.pt"}
        load_adapter(model, tmp_path / "out" / "adapter.pt")
    assert f"python -m tools.plot {tmp_path / 'out'} --out " in out.splitlines()[-1]
    # what was saved is what was measured
    args = train.parse_args(command + flags)
    val = load_train_val(args.data, args.val_data, share=train.VAL_SHARE, seed=args.seed,
                     strict=False)[1]
    val = encode_records(val, tokenizer, args.max_seq_len)[0]
    again = evaluation.evaluate(model, val, precision=FP32)
    assert again[""]["loss"] == pytest.approx(metrics["val_loss"], rel=1e-6)
    assert ("mean gate of each head" in out) == ("routing" in result) == (
        "full" not in flags and "lora" not in flags)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["hydralora", "full"])
def test_every_precision_trains(command, tmp_path, dtype, method):
    rate = "0.01" if method == "hydralora" else "0.001"
    flags = ["--dtype", dtype, "--method", method, "--lr", rate, "--max-steps", "25"]
    assert train.main(command + flags) == 0
    metrics = run_json(tmp_path)["metrics"]
    assert metrics["val_loss"] < 0.95 * metrics["val_loss_base"]


def test_the_same_seed_gives_the_same_adapter_and_another_does_not(command, tmp_path):
    def adapter(name, seed):
        assert train.main(command + ["--out", str(tmp_path / name), "--seed", seed]) == 0
        return torch.load(tmp_path / name / "adapter.pt", weights_only=True)["tensors"]

    a, b, c = adapter("a", "1"), adapter("b", "1"), adapter("c", "2")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


def test_val_data_is_used_as_it_is_and_never_trained_on(command, data, tmp_path, capsys):
    lines = data.read_text().splitlines(keepends=True)
    (tmp_path / "val.jsonl").write_text("".join(lines[:15]))
    assert train.main(command + ["--val-data", str(tmp_path / "val.jsonl")]) == 0
    result = run_json(tmp_path)
    assert result["data"]["val"]["records"] == 15
    assert "15 training records were removed" in capsys.readouterr().out
    assert result["data"]["train"]["records"] == 65


def test_heads_auto_asks_the_clustering_prints_its_choice_and_records_it(command, tmp_path, capsys):
    assert train.main(command + ["--heads", "auto"]) == 0
    result = run_json(tmp_path)
    k = result["clusters"]["k"]
    assert result["settings"]["heads"] == k >= 2
    assert f"heads: {k}" in capsys.readouterr().out
    config = torch.load(tmp_path / "out" / "adapter.pt", weights_only=True)["config"]
    assert config["heads"] == k


def test_run_json_records_settings_versions_and_fingerprints(command, tmp_path):
    assert train.main(command + ["--seed", "7"]) == 0
    result = run_json(tmp_path)
    assert result["settings"]["seed"] == 7 and result["settings"]["rank"] == 4
    assert result["versions"]["torch"] == torch.__version__
    assert {"data", "weights"} <= result["fingerprints"].keys()
    model, _ = load_llama(command[1])
    count = add_hydralora(model, rank=4)
    router = sum(layer.router.numel() for layer in hydra_layers(model).values())
    assert result["parameters"]["trainable"] == count
    assert result["parameters"]["trainable_without_router"] == count - router
    for by_category in result["routing"]["gate"].values():
        assert all(sum(gate) == pytest.approx(1) for gate in by_category.values())
    assert all(0 < e <= 1 + 1e-6 for e in result["routing"]["entropy"].values())


def test_a_folder_that_holds_a_run_is_kept_unless_overwrite_says_so(command, tmp_path, capsys):
    assert train.main(command) == 0
    before = (tmp_path / "out" / "adapter.pt").read_bytes()
    assert train.main(command + ["--seed", "1"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "out" / "adapter.pt").read_bytes() == before
    assert train.main(command + ["--overwrite", "--data", "absent"]) == 2  # nor by one that fails
    assert (tmp_path / "out" / "adapter.pt").read_bytes() == before
    assert train.main(command + ["--seed", "1", "--overwrite"]) == 0
    assert (tmp_path / "out" / "adapter.pt").read_bytes() != before


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stop_at", [1, 7, 11])  # the epoch ends at step 5
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(command, tmp_path, capsys, dtype,
                                                                 stop_at):
    flags = command + ["--dtype", dtype, "--dropout", "0.2", "--grad-accum", "2", "--max-steps",
                       "13", "--save-every", "0"]
    assert train.main(flags + ["--out", str(tmp_path / "whole")]) == 0
    with in_step(stop_at, interrupt):
        assert train.main(flags) == 130
    assert "--resume" in capsys.readouterr().out
    assert not (tmp_path / "out" / "run.json").exists()
    assert train.main(flags + ["--resume"]) == 0
    a, b = (torch.load(tmp_path / name / "adapter.pt", weights_only=True)["tensors"]
            for name in ("whole", "out"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = ([(row["step"], row["loss"], row["grad_norm"], row["lr"])
             for row in csv.DictReader(open(tmp_path / name / "log.csv"))]
            for name in ("whole", "out"))
    assert a == b and len(a) == 13
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_save_every_leaves_a_checkpoint_that_other_settings_may_not_resume(command, tmp_path,
                                                                           monkeypatch, capsys):
    original = train.train_step

    def dies(model, batches, optimizer, scaler, **settings):
        if len(optimizer.state) and next(iter(optimizer.state.values()))["step"] == 4:
            raise KeyboardInterrupt
        return original(model, batches, optimizer, scaler, **settings)

    monkeypatch.setattr(train, "train_step", dies)
    assert train.main(command + ["--save-every", "2"]) == 130
    state = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 4
    assert train.main(command + ["--resume", "--lr", "0.02"]) == 2
    assert "lr was 0.01, is 0.02" in capsys.readouterr().err


# ---------------------------------------------------------------- what tuning took


TEXTS = ["a small text", "another one, which is longer", "1 2 3 4"]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def loss_of_texts(model, tokenizer):
    """Token by token, each from the tokens before it."""
    losses = []
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for i in range(1, len(ids)):
            with torch.no_grad():
                logits = model(torch.tensor([ids[:i]]))[0, -1]
            losses.append(-logits.log_softmax(-1)[ids[i]].item())
    return sum(losses) / len(losses)


def test_the_loss_on_texts_to_keep_is_measured_before_and_after_and_printed(command, texts,
                                                                            tmp_path, capsys):
    assert train.main(command + ["--keep-data", str(texts)]) == 0
    result = run_json(tmp_path)
    kept = result["metrics"]["kept"]
    model, tokenizer = load_llama(command[1])
    assert kept["records"] == result["data"]["kept"]["records"] == 3
    assert kept["loss_base"] == pytest.approx(loss_of_texts(model, tokenizer), rel=1e-5)
    load_adapter(model, tmp_path / "out" / "adapter.pt")
    assert kept["loss"] == pytest.approx(loss_of_texts(model, tokenizer), rel=1e-5)
    assert kept["loss"] != kept["loss_base"]
    line = (f"kept: 3 texts that the base knows, loss {kept['loss_base']:.2f} -> "
            f"{kept['loss']:.2f}\n")
    assert line in capsys.readouterr().out
    assert result["settings"]["keep_data"] == str(texts)
    assert result["fingerprints"]["keep_data"] == file_fingerprint(texts)


def test_records_to_keep_are_measured_like_validation_records(command, data, tmp_path):
    lines = data.read_text().splitlines(keepends=True)
    (tmp_path / "val.jsonl").write_text("".join(lines[:15]))
    same = str(tmp_path / "val.jsonl")
    assert train.main(command + ["--val-data", same, "--keep-data", same]) == 0
    metrics = run_json(tmp_path)["metrics"]
    assert metrics["kept"] == {"loss": metrics["val_loss"], "loss_base": metrics["val_loss_base"],
                               "records": 15}


def test_only_the_embedded_world_has_texts_to_keep_of_its_own(command, tmp_path, capsys):
    assert train.parse_args([]).keep_data == str(WORLD / "keep.jsonl")
    assert train.parse_args(["--retention-data", "texts"]).keep_data == "texts"
    assert train.parse_args(command).keep_data is None
    assert train.main(command) == 0
    assert "kept" not in run_json(tmp_path)["metrics"]
    assert "kept:" not in capsys.readouterr().out


def test_a_resumed_run_keeps_the_first_figures_of_the_base(command, texts, tmp_path, monkeypatch,
                                                           capsys):
    flags = command + ["--keep-data", str(texts)]
    assert train.main(flags + ["--out", str(tmp_path / "whole")]) == 0
    evaluate_sets, measured = train.evaluate_sets, []
    monkeypatch.setattr(train, "evaluate_sets", lambda model, sets, args, name: (
        measured.append(name) or evaluate_sets(model, sets, args, name)))
    with in_step(2, interrupt):
        assert train.main(flags) == 130
    assert train.main(flags[:-2] + ["--resume"]) == 2
    assert "keep_data changed since" in capsys.readouterr().err
    assert train.main(flags + ["--resume"]) == 0
    assert measured == ["base", "tuned"]
    whole = json.loads((tmp_path / "whole" / "run.json").read_text())["metrics"]
    assert run_json(tmp_path)["metrics"] == whole


def test_texts_to_keep_without_a_text_are_refused_by_line(command, texts, capsys):
    texts.write_text(texts.read_text() + '{"words": "no"}\n')
    assert train.main(command + ["--keep-data", str(texts)]) == 2
    assert "texts.jsonl, line 4: no text under 'text'" in capsys.readouterr().err


def test_the_end_of_a_run_is_one_screen_of_100_columns(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "train", lambda *arguments, **settings: 0)
    monkeypatch.setattr(train, "evaluate", lambda model, sequences, **settings: {
        category: dict(loss=1.25, exact=0.5, records=120, tokens=9)
        for category in {"", *(s.category for s in sequences)}})
    monkeypatch.chdir(tmp_path)
    for method in ("hydralora", "full"):
        assert train.main(["--method", method, "--device", "cpu"]) == 0
        start, end = capsys.readouterr().out.split("\n\n", 1)
        assert max(map(len, end.splitlines())) <= 100
        assert len(end.splitlines()) <= 40
        tuned = {"full": "--weights runs/full", "hydralora": "--adapter runs/hydralora/adapter.pt"}
        order = ["exact match", "all  ", "kept: 120 texts that the base knows, loss 1.25 -> 1.25",
                 f"quiz: python eval_mmlu.py --shots 0 {tuned[method]}", "\nwrote "]
        places = [end.index(words) for words in order]
        assert places == sorted(places)
        assert ("mean gate of each head" in end) == (method == "hydralora")


# ---------------------------------------------------------------- what is refused


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(command, tmp_path, capsys,
                                                                  monkeypatch):
    original = train.train_step

    def poisoned(*arguments, **settings):
        loss, norm = original(*arguments, **settings)
        return loss * math.nan, norm

    monkeypatch.setattr(train, "train_step", poisoned)
    assert train.main(command) == 2
    assert "loss nan" in capsys.readouterr().err.strip().split("\n")[-1]
    assert not (tmp_path / "out" / "adapter.pt").exists()


# ---------------------------------------------------------------- the loop


def test_from_main_to_backward_there_are_five_functions(command, monkeypatch):
    seen, original = [], torch.Tensor.backward

    def backward(*arguments, **settings):
        frames = [frame for frame in traceback.extract_stack()
                  if frame.filename.startswith(str(ROOT)) and "tests" not in frame.filename]
        seen.append([frame.name for frame in frames if ".venv" not in frame.filename])
        return original(*arguments, **settings)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    assert train.main(command) == 0
    assert seen == [["main", "run_script", "run", "train", "train_step"]] * 6


def test_adapters_on_the_head_alone_train(command, tmp_path):
    assert train.main(command + ["--targets", "output", "--max-steps", "25"]) == 0
    metrics = run_json(tmp_path)["metrics"]
    assert metrics["val_loss"] < metrics["val_loss_base"]


@pytest.fixture
def adapted(weights, data):
    """(model with adapters, 16 sequences, tokenizer)."""
    torch.manual_seed(0)
    model, tokenizer = load_llama(weights)
    add_hydralora(model, rank=4)
    return model, sequences(tokenizer, data, 16), tokenizer


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def step(model, batches, optimizer, clip=1.0, precision=FP32):
    return train.train_step(model, batches, optimizer, NO_SCALER, clip=clip, precision=precision)


def test_the_head_runs_at_the_targets_only_and_gives_what_the_whole_forward_gives(adapted):
    model, batch, _ = adapted
    seen = []
    model.output.register_forward_hook(lambda m, inputs, out: seen.append(len(inputs[0])))
    with torch.no_grad():
        losses, correct = evaluation.score_targets(model, batch, FP32)
    mean, _ = step(model, [batch], torch.optim.SGD(trained(model), lr=0.0))
    n_targets = sum(s.n_targets for s in batch)
    assert seen == [n_targets, n_targets] and len(losses) == n_targets
    assert mean.item() == pytest.approx(losses.mean().item(), rel=1e-5)
    assert mean.untyped_storage().nbytes() == 4  # the log keeps it
    row = 0
    for s in batch:  # the slow twin: one sequence, every position
        whole = model(torch.tensor([s.ids]))[0]
        for i in range(s.response_start, len(s.ids)):
            want = F.cross_entropy(whole[i - 1], torch.tensor(s.ids[i]))
            assert losses[row].item() == pytest.approx(want.item(), abs=1e-3)
            assert correct[row] == (whole[i - 1].argmax() == s.ids[i])
            row += 1


def test_every_tensor_of_a_step_is_made_where_the_model_is(adapted):
    _, batch, tokenizer = adapted
    with torch.device("meta"):  # stands in for a GPU: an operand left on the CPU raises here too
        model = Transformer(ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=8,
                                      vocab_size=tokenizer.vocab_size))
    add_hydralora(model, rank=4)
    devices = []
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    optimizer.register_step_pre_hook(
        lambda *_: devices.extend(p.grad.device.type for p in trained(model)))
    step(model, [batch], optimizer)
    assert set(devices) == {"meta"}


def test_accumulation_equals_one_batch_though_the_parts_differ_in_targets(adapted):
    model, batch, _ = adapted
    batch = sorted(batch, key=lambda s: s.n_targets)
    start = [p.detach().clone() for p in trained(model)]
    updates = []
    for size in (16, 4):
        with torch.no_grad():
            for parameter, value in zip(trained(model), start):
                parameter.copy_(value)
        optimizer = torch.optim.SGD(trained(model), lr=1.0)
        loss, norm = step(model, [batch[i:i + size] for i in range(0, 16, size)], optimizer)
        updates.append((loss, norm, [p.detach().clone() for p in trained(model)]))
    (loss, norm, a), (loss4, norm4, b) = updates
    assert loss.item() == pytest.approx(loss4.item(), rel=1e-5)
    assert norm.item() == pytest.approx(norm4.item(), rel=1e-4)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b))


@pytest.mark.parametrize("clip", [1.0, 0.25, 0])
def test_the_gradient_is_clipped_to_the_norm_asked_for_and_0_is_off(adapted, clip):
    model, batch, _ = adapted
    for layer in hydra_layers(model).values():
        layer.scale *= 100
    before = [p.detach().clone() for p in trained(model)]
    _, norm = step(model, [batch], torch.optim.SGD(trained(model), lr=1.0), clip=clip)
    moved = math.sqrt(sum((p - q).square().sum().item()
                          for p, q in zip(trained(model), before)))
    assert norm > 1 and moved == pytest.approx(clip or norm.item(), rel=1e-3)


@pytest.mark.parametrize("method, flags, betas, decay", [
    ("hydralora", [], (0.9, 0.999), 0), ("full", [], (0.9, 0.999), 0),
    ("hydralora", ["--weight-decay", "0.1", "--betas", "0.8,0.9"], (0.8, 0.9), 0.1)])
def test_the_optimiser_holds_exactly_what_trains(command, monkeypatch, method, flags, betas,
                                                 decay):
    held = []
    original = torch.optim.AdamW

    def spy(parameters, **settings):
        parameters = list(parameters)
        held.append((parameters, settings))
        return original(parameters, **settings)

    models = []
    load = train.load_base
    monkeypatch.setattr(train, "load_base", lambda args: models.append(load(args)) or models[-1])
    monkeypatch.setattr(torch.optim, "AdamW", spy)
    assert train.main(command + ["--method", method, "--max-steps", "1", *flags]) == 0
    model, ((parameters, settings),) = models[0][0], held
    want = (list(adapter_parameters(model).values()) if method == "hydralora"
            else list(model.parameters()))
    assert {id(p) for p in parameters} == {id(p) for p in want} and len(parameters) == len(want)
    assert settings["betas"] == betas and settings["weight_decay"] == decay


@pytest.mark.slow
def test_exact_match_is_what_greedy_decoding_would_give(weights, data):
    model, tokenizer = load_llama(weights)
    model.requires_grad_(True)
    batch = sequences(tokenizer, data, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):  # until some responses are right and some are wrong
        step(model, [batch], optimizer)
    right = 0
    with torch.no_grad():
        for s in batch:
            ids = s.ids[:s.response_start]
            while len(ids) < len(s.ids) and ids == s.ids[:len(ids)]:
                ids = ids + [model(torch.tensor([ids]))[0, -1].argmax().item()]
            right += ids == s.ids
    assert 0 < right < len(batch)
    found = evaluation.evaluate(model, batch, precision=FP32)
    assert found[""]["exact"] == right / len(batch)


def test_validation_loss_is_the_mean_over_tokens_whatever_the_batches(adapted):
    model, batch, _ = adapted
    whole = evaluation.evaluate(model, batch, precision=FP32)
    parts = evaluation.evaluate(model, batch, precision=FP32, tokens=60)
    total = sum(row["loss"] * row["tokens"] for name, row in whole.items() if name)
    assert whole[""]["loss"] == pytest.approx(total / whole[""]["tokens"], rel=1e-6)
    for name in whole:
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


def test_routing_reads_real_tokens_only(adapted):
    model, batch, _ = adapted
    together = evaluation.routing_report(model, batch, precision=FP32)
    apart = evaluation.routing_report(model, batch, precision=FP32, tokens=1)  # no padding
    for name, by_category in together["gate"].items():
        for category, gate in by_category.items():
            assert gate == pytest.approx(apart["gate"][name][category], abs=1e-5)
        assert together["entropy"][name] == pytest.approx(apart["entropy"][name], abs=1e-5)


@pytest.mark.parametrize("mode", [True, False])
def test_evaluating_leaves_the_mode_of_the_model_as_it_was(adapted, mode):
    model, batch, _ = adapted
    model.train(mode)
    evaluation.evaluate(model, batch, precision=FP32)
    evaluation.routing_report(model, batch, precision=FP32)
    assert {module.training for module in model.modules()} == {mode}


# ---------------------------------------------------------------- evaluation during the run


def test_evaluating_during_the_run_changes_no_byte_of_it(command, texts, tmp_path, capsys):
    flags = command + ["--dropout", "0.2", "--keep-data", str(texts)]
    assert train.main(flags + ["--out", str(tmp_path / "without")]) == 0
    assert train.main(flags + ["--eval-every", "2"]) == 0
    a, b = (tmp_path / name / "adapter.pt" for name in ("without", "out"))
    assert a.read_bytes() == b.read_bytes()
    rows = list(csv.DictReader(open(tmp_path / "out" / "log.csv")))
    columns = ("val_loss", "exact_match", "kept_loss")
    assert [all(row[name] for name in columns) for row in rows] == [False, True] * 3
    assert not any(row[name] for row in rows[::2] for name in columns)
    metrics = run_json(tmp_path)["metrics"]
    assert float(rows[-1]["val_loss"]) == metrics["val_loss"]
    assert float(rows[-1]["kept_loss"]) == metrics["kept"]["loss"]
    table = capsys.readouterr().out.split("kept loss\n")[1].splitlines()[:3]
    assert [int(line.split()[0]) for line in table] == [2, 4, 6]


def test_the_best_adapter_of_the_run_is_kept_beside_the_last(command, tmp_path, monkeypatch):
    # from the third step on the loss is climbed: the first evaluation is the best
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: 0.01 if step < 2 else -0.01)
    assert train.main(command + ["--eval-every", "2"]) == 0
    rows = list(csv.DictReader(open(tmp_path / "out" / "log.csv")))
    losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    args = train.parse_args(command)
    val = load_train_val(args.data, None, share=train.VAL_SHARE, seed=0, strict=False)[1]
    found = []
    for name in ("adapter-best.pt", "adapter.pt"):
        model, tokenizer = load_llama(command[1])
        load_adapter(model, tmp_path / "out" / name)
        val_set = encode_records(val, tokenizer, args.max_seq_len)[0]
        rows = evaluation.evaluate(model, val_set, precision=FP32)
        found.append(rows[""]["loss"])
    assert found == pytest.approx([min(losses), losses[-1]], rel=1e-6) and found[0] < found[1]


def test_a_log_without_evaluations_gets_their_columns_when_the_run_is_resumed(command, tmp_path):
    with in_step(3, interrupt):
        assert train.main(command) == 130
    log = tmp_path / "out" / "log.csv"
    old = [row[:5] for row in csv.reader(open(log))]  # as 7f47de1 wrote it
    log.write_text("".join(",".join(row) + "\r\n" for row in old))
    assert train.main(command + ["--resume", "--eval-every", "5"]) == 0
    rows = list(csv.DictReader(open(log)))
    assert [bool(row["val_loss"]) for row in rows] == [False] * 4 + [True, False]
    assert [row["loss"] for row in rows[:3]] == [row[1] for row in old[1:]]


# ---------------------------------------------------------------- resuming


def test_each_parameter_group_keeps_its_own_peak_rate(command, tmp_path, monkeypatch):
    original = train.make_optimizer

    def lora_plus(model, *, lr, **settings):
        optimizer = original(model, lr=lr, **settings)
        group = optimizer.param_groups[0]
        of_b = [p for name, p in adapter_parameters(model).items() if name.endswith("lora_B")]
        numbers = {id(p) for p in of_b}
        group["params"] = [p for p in group["params"] if id(p) not in numbers]
        optimizer.add_param_group({"params": of_b, "lr": 4 * lr, "peak_lr": 4 * lr})
        return optimizer

    monkeypatch.setattr(train, "make_optimizer", lora_plus)
    seen = []
    monkeypatch.setattr(train, "save_checkpoint", lambda path, step, facts, model, optimizer,
                        scaler: seen.append([group["lr"] for group in optimizer.param_groups]))
    assert train.main(command + ["--max-steps", "5", "--save-every", "1"]) == 0
    assert len(seen) == 5 and all(b == pytest.approx(4 * a) for a, b in seen)
    monkeypatch.undo()
    monkeypatch.setattr(train, "make_optimizer", lora_plus)
    with in_step(3, interrupt):
        assert train.main(command + ["--out", str(tmp_path / "again"), "--max-steps", "5"]) == 130
    assert train.main(command + ["--out", str(tmp_path / "again"), "--max-steps", "5",
                                 "--resume"]) == 0
    a, b = (torch.load(tmp_path / name / "adapter.pt", weights_only=True)["tensors"]
            for name in ("out", "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_moments_saved_in_another_layout_are_read_right(command, tmp_path):
    """7f47de1 kept lora_B as a transposed view, and its checkpoints hold the moments so."""
    flags = command + ["--dropout", "0.2"]
    assert train.main(flags + ["--out", str(tmp_path / "whole")]) == 0
    with in_step(3, interrupt):
        assert train.main(flags) == 130
    path = tmp_path / "out" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    for entry in state["optimizer"]["state"].values():
        for name, value in entry.items():
            if value.ndim == 3:
                entry[name] = value.transpose(0, 1).contiguous().transpose(0, 1)
    torch.save(state, path)
    assert train.main(flags + ["--resume"]) == 0
    a, b = (torch.load(tmp_path / name / "adapter.pt", weights_only=True)["tensors"]
            for name in ("whole", "out"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_setting_that_a_checkpoint_lacks_had_its_default(command, tmp_path, capsys):
    with in_step(3, interrupt):
        assert train.main(command) == 130
    path = tmp_path / "out" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    for name in ("clip", "warmup", "betas", "weight_decay", "gate"):
        del state["settings"][name]
    del state["init"]  # nor had it --init-adapter
    torch.save(state, path)
    assert train.main(command + ["--resume", "--clip", "0.5", "--warmup", "0.1"]) == 2
    assert "clip was 1.0, is 0.5, warmup was 0.03, is 0.1: give" in capsys.readouterr().err
    assert train.main(command + ["--resume"]) == 0


@pytest.mark.parametrize("change, reason", [
    (lambda state: state[0].pop("exp_avg"), "other names"),
    (lambda state: state.pop(0), "other parameters"),
    (lambda state: state[0].update(exp_avg=state[0]["exp_avg"].double()), "dtypes"),
    (lambda state: state[0].update(exp_avg=state[0]["exp_avg"][:1]), "shapes"),
    (lambda state: state[0].update(exp_avg=torch.zeros(1).expand(state[0]["exp_avg"].shape)),
     "plain tensor"),
])
def test_an_optimizer_state_of_another_making_is_refused(command, tmp_path, capsys, change, reason):
    with in_step(2, interrupt):
        assert train.main(command) == 130
    path = tmp_path / "out" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    change(state["optimizer"]["state"])
    torch.save(state, path)
    assert train.main(command + ["--resume"]) == 2
    assert reason in capsys.readouterr().err


# ---------------------------------------------------------------- real data on a real model


@pytest.mark.slow
def test_stories260k_learns_dolly_in_a_few_steps(tmp_path):
    lines = []
    with open(asset("dolly/databricks-dolly-15k.jsonl"), encoding="utf-8") as file:
        for line in file:
            if len(line) < 400:
                lines.append(line)
    (tmp_path / "dolly.jsonl").write_text("".join(lines[:400]), encoding="utf-8")
    flags = ["--weights", str(asset("stories260k")), "--data", str(tmp_path / "dolly.jsonl"),
             "--heads", "3", "--rank", "8", "--max-steps", "20", "--lr", "0.003", "--device", "cpu",
             "--max-seq-len", "512", "--out", str(tmp_path / "out")]
    assert train.main(flags) == 0
    metrics = run_json(tmp_path)["metrics"]
    assert metrics["val_loss"] < metrics["val_loss_base"] - 0.1


# ---------------------------------------------------------------- which records make a step


def plan(sequences, **changes):
    settings = dict(batch_size=1, grad_accum=8, epochs=2, max_steps=0, seed=3)
    return train.plan_steps(sequences, **{**settings, **changes})


def records_of(steps):
    return [sorted(s.record for batch in step for s in batch) for step in steps]


def test_which_records_make_a_step_does_not_depend_on_how_they_are_cut(adapted):
    batch = adapted[1] * 5  # 80 records
    batch = [Sequence(s.ids, s.response_start, i, s.category) for i, s in enumerate(batch)]
    by_one, by_eight = plan(batch), plan(batch, batch_size=8, grad_accum=1)
    by_tokens = plan(batch, micro_tokens=100)
    shared = plan(batch, micro_tokens=100, ranks=4)
    assert records_of(by_one) == records_of(by_eight) == records_of(by_tokens) == records_of(shared)
    assert {len(step) for step in by_one} == {8} and {len(step) for step in by_eight} == {1}
    assert len(by_one) > len([s for s in by_tokens if len(s) < 8]) > 0
    assert all(len(step) >= 4 for step in shared)
    world = plan(batch, batch_size=8, grad_accum=1, order=1)
    assert records_of(world) == records_of(by_eight)  # the embedded world's order is as it was
    assert records_of(plan(batch, order=1)) != records_of(by_one)


def test_a_step_cut_otherwise_is_the_same_step_within_rounding(adapted):
    model, batch, _ = adapted
    batch = sorted(batch, key=lambda s: len(s.ids), reverse=True)[:8]
    start = [p.detach().clone() for p in trained(model)]
    results = []
    for batches in ([batch], [[s] for s in batch], cut_by_tokens(batch, 100)):
        with torch.no_grad():
            for parameter, value in zip(trained(model), start):
                parameter.copy_(value)
        loss, norm = step(model, batches, torch.optim.SGD(trained(model), lr=1.0))
        results.append((loss.item(), norm.item(), torch.cat([p.detach().flatten()
                                                             for p in trained(model)])))
    for loss, norm, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert norm == pytest.approx(results[0][1], rel=1e-4)
        assert torch.allclose(weights, results[0][2], atol=1e-5)


def test_a_run_of_before_is_resumed_in_its_own_order_of_records(command, tmp_path, monkeypatch):
    flags = command + ["--batch-size", "2", "--grad-accum", "4"]
    monkeypatch.setattr(train, "ORDER", 1)
    assert train.main(flags + ["--out", str(tmp_path / "whole")]) == 0
    with in_step(3, interrupt):
        assert train.main(flags) == 130
    monkeypatch.undo()
    path = tmp_path / "out" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    for name in ("order", "micro_tokens"):
        del state["settings"][name]
    torch.save(state, path)
    assert train.main(flags + ["--resume", "--micro-tokens", "500"]) == 0
    a, b = (torch.load(tmp_path / name / "adapter.pt", weights_only=True)["tensors"]
            for name in ("whole", "out"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert run_json(tmp_path)["settings"]["order"] == 1
