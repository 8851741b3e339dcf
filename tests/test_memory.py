"""What a step keeps, copies and waits for; the formula of --dry-run against what is alive."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from data.corpus import Sequence, collate
from experiments import benchmark, compare_dropout, random_checkpoint
from hydralora import (
    HydraLinear,
    adapter_parameters,
    hydra_layers,
)
from model import ModelArgs, Transformer, load_llama, save_llama
from support import evaluation
from support.device import DTYPES, autocast
from support.memory import GIB, needs, new_model
from tests.conftest import WORLD, Watch, tiny_model

SCALER = torch.amp.GradScaler("cpu", enabled=False)
SHAPE = dict(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=768, multiple_of=32,
             max_seq_len=512)


def settings(*flags):
    return train.parse_args(["--weights", "-", "--data", "-", "--device", "cpu", *flags])


def prepared(*flags, **shape):
    """(model as train.py would train it, its settings)."""
    args = settings(*flags)
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**{**SHAPE, **shape}))
    model.init_weights(0)
    if args.method != "full":
        model.to(DTYPES[args.dtype])
    train.add_adapters(model, args)
    with torch.no_grad():
        for layer in hydra_layers(model).values():
            layer.lora_B.normal_()
    model.checkpoint_activations = args.checkpoint_activations
    return model.train(), args


def hidden_states_of(model, sequences, args):
    """The forward pass of a step up to the head, at the labels' places."""
    batch = collate(sequences, args.device)
    with autocast(args):
        return model.hidden_states(batch.tokens).flatten(0, 1)[batch.target_index], batch.labels


def batch_of(rows, tokens):
    """Sequences that make `tokens` positions a row, every one of them a target."""
    return [Sequence([5 + i % 700 for i in range(row, row + tokens + 1)], 1, row, "")
            for row in range(rows)]


# ---------------------------------------------------------------- the head in chunks


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("method", ["hydralora", "full"])
def test_head_and_loss_in_chunks_give_the_loss_and_the_gradients_of_the_whole(method, chunk,
                                                                              monkeypatch):
    model, args = prepared("--method", method, "--dropout", "0")
    batch = batch_of(2, 20)
    tokens, _, places, labels = collate(batch)
    logits = model(tokens).flatten(0, 1)[places]
    want = F.cross_entropy(logits, labels, reduction="sum") / 40
    gradients = torch.autograd.grad(want, train.trainable(model))
    monkeypatch.setattr(train, "HEAD_CHUNK", chunk)
    got = train.backward(model, batch, 40, SCALER, args)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    for parameter, gradient in zip(train.trainable(model), gradients):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("run", ["train", "evaluate"])
def test_logits_of_more_than_a_chunk_never_exist(run, monkeypatch):
    model, args = prepared()
    monkeypatch.setattr(train, "HEAD_CHUNK", 16)
    monkeypatch.setattr(evaluation, "HEAD_CHUNK", 16)
    rows = []
    model.output.register_forward_hook(lambda m, x, out: rows.append(len(out)))
    if run == "train":
        train.backward(model, batch_of(2, 20), 40, SCALER, args)
    else:
        args.batch_size = 2
        evaluation.evaluate(model, batch_of(2, 20), args, "")
    assert rows == [16, 16, 8]


def test_evaluation_takes_no_more_rows_at_a_time_than_training():
    sequences = batch_of(20, 4)
    args = settings("--batch-size", "3")
    assert max(map(len, evaluation.eval_batches(sequences, args))) == 3
    args.batch_size = 100
    assert max(map(len, evaluation.eval_batches(sequences, args))) == evaluation.EVAL_BATCH


# ---------------------------------------------------------------- what a step does not do


def test_no_weight_of_the_base_is_copied_in_a_step():
    model, args = prepared("--dtype", "bf16")
    shapes = {tuple(w.shape) for name, w in model.named_parameters()
              if w.ndim == 2 and name not in adapter_parameters(model)}
    shapes |= {shape[::-1] for shape in shapes}
    with Watch() as watch:
        train.backward(model, batch_of(2, 20), 40, SCALER, args)
    assert {"mm", "_to_copy"} <= {name for name, _ in watch.made}
    assert not [made for made in watch.made if made[1] in shapes]


def test_below_the_first_adapter_there_are_no_gradients():
    model, args = prepared()
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(("wo", "ffn_norm")):
            module.register_forward_hook(
                lambda m, x, out, name=name: seen.update({name: out.requires_grad}))
    hidden_states_of(model, batch_of(2, 20), args)
    first = {name for name in seen if name.startswith("layers.0.")}
    assert len(first) == 2 and not any(seen[name] for name in first)
    assert all(seen[name] for name in seen.keys() - first)


def test_a_whole_step_never_waits_for_the_device(monkeypatch):
    args = settings("--batch-size", "2")
    args.device = "meta"  # stands in for a GPU: reading a value back raises here
    with torch.device("meta"):
        model = Transformer(ModelArgs(**SHAPE))
    train.add_adapters(model, args)
    optimizer = torch.optim.AdamW(train.trainable(model), foreach=True)
    monkeypatch.setattr(train, "autocast", lambda args: contextlib.nullcontext())  # meta has none
    loss, norm = train.train_step(model, [batch_of(2, 20)] * 2, optimizer, SCALER, args)
    assert loss.is_meta and norm.is_meta
    with pytest.raises(Exception, match="meta"):
        loss.item()


def test_eight_heads_keep_at_most_half_more_for_the_backward_pass_than_one():
    assert benchmark.kept_bytes(8) <= 1.5 * benchmark.kept_bytes(1)


# ---------------------------------------------------------------- the formula


FLAGS = {"plain": [], "eight heads": ["--heads", "8"], "attention": ["--targets", "wq,wv"],
         "mixed": ["--targets", "wo,w2"], "split": ["--method", "lora-split"],
         "lora": ["--method", "lora", "--dropout", "0"], "full": ["--method", "full"],
         "uniform": ["--gate", "uniform"]}
SHAPES = [dict(flags=flags, shape=dict()) for flags in FLAGS.values()] + [
    dict(flags=[], shape=dict(n_kv_heads=4, dim=128, ffn_dim_multiplier=2.0, n_layers=2))]


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [[], ["--checkpoint-activations"]], ids=["kept", "again"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", SHAPES, ids=[*FLAGS, "wide"])
def test_the_formula_gives_the_bytes_that_are_alive_within_10_percent(case, dtype, checkpoint):
    model, args = prepared("--dtype", dtype, *case["flags"], *checkpoint, **case["shape"])
    tokens, batch = 2 * 96, batch_of(2, 96)
    need = needs(model, args, checkpoint=bool(checkpoint), head_chunk=tokens)
    with Watch() as watch:
        states = hidden_states_of(model, batch, args)
    assert watch.now == pytest.approx(need.activations(tokens), rel=0.1)
    del states
    train.backward(model, batch, 1, SCALER, args)  # from here on there are gradients
    with Watch() as watch:
        train.backward(model, batch, 1, SCALER, args)
    assert watch.peak == pytest.approx(need.activations(tokens) + need.worst(tokens), rel=0.1)


def test_the_formula_counts_every_weight_gradient_and_moment_in_its_own_dtype():
    model, args = prepared("--dtype", "bf16")
    need = needs(model, args, checkpoint=False)
    optimizer = torch.optim.AdamW(train.trainable(model), fused=True)
    train.train_step(model, [batch_of(2, 8)], optimizer, SCALER, args)
    trained = sum(p.nbytes for p in train.trainable(model))
    moments = sum(value.nbytes for state in optimizer.state.values()
                  for value in state.values() if value.ndim)
    assert need.weights == sum(p.nbytes for p in model.parameters()) - trained
    assert (need.adapter, need.gradients, need.optimizer) == (trained, trained, moments)


@pytest.fixture
def seven(tmp_path):
    """Meta's own params.json of LLaMA 2 7B, and nothing else: no weights, no tokenizer."""
    (tmp_path / "params.json").write_text(json.dumps(dict(
        dim=4096, n_layers=32, n_heads=32, vocab_size=-1, multiple_of=256, norm_eps=1e-5)))
    return tmp_path


@pytest.mark.parametrize("flags", [[], ["--gpus", "2"]], ids=str)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_longest_sequence_fits_and_one_token_more_does_not(seven, checkpoint, flags):
    args = train.parse_args(["--dry-run", "--weights", str(seven), "--gpu-memory", "24", *flags])
    need = needs(new_model(seven, train.adapter_settings(args)), args, checkpoint=checkpoint)
    for rows in (1, 3):
        for memory in (18 * GIB, 24 * GIB, 80 * GIB):
            longest = need.longest(memory, rows)
            fits = [need.total(rows * t) + need.overhead(rows * t) <= memory
                    for t in (longest, longest + 1)]
            assert longest > 0 and fits == [True, False]
    assert need.longest((5 if flags else 8) * GIB, 1) == 0


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_a_shared_base_is_counted_block_by_block_and_what_stays_whole_is_whole(seven, gpus):
    args = train.parse_args(["--dry-run", "--weights", str(seven), "--gpus", str(gpus)])
    alone = train.parse_args(["--dry-run", "--weights", str(seven), "--dtype", args.dtype])
    model, size = new_model(seven, train.adapter_settings(args)), DTYPES[args.dtype].itemsize
    shared, whole = (needs(model, a, checkpoint=True) for a in (args, alone))
    block = size * sum(p.numel() for name, p in model.layers[0].named_parameters()
                       if "lora" not in name and "router" not in name)
    ends = size * sum(p.numel() for name, p in model.named_parameters() if "layers" not in name)
    assert whole.weights == ends + 32 * block and whole.gathered == whole.flat == 0
    assert shared.weights == pytest.approx(ends + 32 * block / gpus, abs=size)
    assert shared.gathered == 3 * block and shared.flat == 8 * sum(
        p.numel() for p in adapter_parameters(model).values())
    assert (shared.adapter, shared.kept, shared.worst(99)) == (
        whole.adapter, whole.kept, whole.worst(99))


def test_dry_run_says_what_each_of_several_gpus_holds(seven, capsys):
    assert train.main(["--dry-run", "--weights", str(seven), "--gpus", "4"]) == 0
    out = capsys.readouterr().out
    assert "each of 4 GPUs with --shard-base: 1 / 4 of every block" in out
    assert "blocks gathered: 3 at most" in out and "gradients to be sent" in out


def test_dry_run_answers_from_params_json_alone_and_writes_nothing(seven, capsys, monkeypatch):
    monkeypatch.chdir(seven)
    assert train.main(["--dry-run", "--weights", str(seven), "--gpu-memory", "24"]) == 0
    out = capsys.readouterr().out
    assert "base and products in bf16" in out and "computed and not run" in out
    line = next(line for line in out.splitlines() if line.startswith("longest sequence in 24 GiB"))
    plain, again = line.split("tokens")[1].split()[:2]
    assert 1024 < int(plain) < int(again)
    assert "(the limit is 4096, a default, since" in line and "max_seq_len" in line
    assert "12.55" in out  # 6,738,415,616 weights of two bytes
    assert [path.name for path in seven.iterdir()] == ["params.json"]


def test_dry_run_of_a_run_that_trains_everything_does_not_fit_a_small_gpu(seven, capsys):
    assert train.main(["--dry-run", "--weights", str(seven), "--gpu-memory", "80",
                       "--method", "full"]) == 0
    assert "none" in capsys.readouterr().out.splitlines()[-1]


def test_dry_run_reads_the_shipped_world_too(capsys):
    assert train.main(["--dry-run"]) == 0
    assert "MiB, computed and not run" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--gpu-memory", "24"], "--gpu-memory"), (["--dry-run", "--gpu-memory", "0"], "--gpu-memory"),
    (["--dry-run", "--heads", "auto"], "--heads auto"), (["--gpus", "2"], "--gpus"),
    (["--dry-run", "--gpus", "0"], "--gpus"), (["--dry-run", "--shard-base"], "--gpus N"),
    (["--dry-run", "--gpus", "2", "--method", "full"], "--method full")])
def test_a_question_that_makes_no_sense_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(flags)
    assert message in capsys.readouterr().err.strip().split("\n")[-1]


# ---------------------------------------------------------------- loading, and the experiments


def test_no_shard_stays_mapped_when_several_were_merged(tmp_path):
    save_llama(tiny_model(), WORLD / "base" / "tokenizer.model", tmp_path)
    whole = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    for index in range(2):
        part = {name: w if w.ndim == 1 else w.chunk(2, random_checkpoint.SPLIT_DIM[
            name.split(".")[-2]])[index].clone() for name, w in whole.items()}
        torch.save(part, tmp_path / f"consolidated.{index:02d}.pth")
    model, _ = load_llama(tmp_path)
    assert all(torch.equal(w, whole[name]) for name, w in model.named_parameters())
    maps = Path("/proc/self/maps")
    if maps.exists():  # Linux
        assert str(tmp_path) not in maps.read_text()


@pytest.mark.parametrize("shards", ["1", "2"])
def test_the_random_checkpoint_is_written_loaded_and_trained(tmp_path, shards, capsys):
    out = str(tmp_path / "random")
    random_checkpoint.main(["write", "--out", out, "--shards", shards, "--layers", "1", "--dim",
                            "128", "--tokenizer", str(WORLD / "base" / "tokenizer.model")])
    random_checkpoint.main(["load", "--weights", out])
    random_checkpoint.main(["step", "--weights", out, "--tokens", "8"])
    text = capsys.readouterr().out
    assert f"load: {shards} shards" in text and "8 tokens, loss" in text
    model, _ = load_llama(out)
    assert model.output.weight.dtype == torch.bfloat16
    assert 0.015 < model.output.weight.float().std() < 0.025


@pytest.mark.slow
def test_the_benchmark_measures_every_part(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "FRAMEWORKS", False)
    monkeypatch.setitem(benchmark.SIZE, "vocab_size", 1000)
    monkeypatch.setattr("experiments.growth.LENGTHS", (8, 16))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    result = benchmark.main([
        "--parts", "step,memory,dolly,growth,compile", "--repeats", "1", "--layers", "1",
        "--tokens", "8", "--data", str(WORLD / "val.jsonl"), "--tokenizer",
        str(WORLD / "base" / "tokenizer.model"), "--batch-size", "2", "--batches", "2",
        "--json", str(tmp_path / "b.json"), "--picture", str(tmp_path / "growth.svg")])
    assert json.loads((tmp_path / "b.json").read_text())["weights"] == result["weights"]
    assert result["growth"].keys() == {"heads", "rank", "length"}
    assert "<polyline" in (tmp_path / "growth.svg").read_text()
    assert sum(result["step"]["profile"].values()) == pytest.approx(1)
    assert "over the floor" in capsys.readouterr().out


def test_a_mask_on_x_and_one_on_a_x_are_the_same_layer_without_dropout():
    torch.manual_seed(0)
    layer = HydraLinear(nn.Linear(12, 20, bias=False), rank=4, heads=3)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(5, 12)
    with compare_dropout.masked_on_x():
        masked = layer(x)
    assert torch.allclose(layer(x), masked, atol=1e-6)


@pytest.mark.slow
def test_the_masks_are_compared_on_the_world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = train.load_train_val
    monkeypatch.setattr(train, "load_train_val", lambda *args, **settings: tuple(
        part[:8] for part in read(*args, **settings)))
    losses = compare_dropout.main(["--dropout", "0.2", "--epochs", "1", "--max-steps", "1",
                                   "--seeds", "1"])
    assert {len(values) for values in losses.values()} == {1} and len(losses) == 2
