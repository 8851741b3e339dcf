"""A base in int8 or NF4: the codes, what a step keeps, and what the scripts make of it."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import cluster
import eval_mmlu
import train
from data.corpus import read_records
from data.make.world import write_records
from experiments import quantized, random_checkpoint
from hydralora import (
    adapter_parameters,
    add_hydralora,
    base_fingerprint,
    load_adapter,
    save_adapter,
)
from model import load_llama, save_llama
from support import quantize
from support.base import load_model, load_model_and_adapter, trained_with
from support.evaluation import count_parameters
from support.memory import Watch
from support.quantize import KINDS, QuantizedLinear, normal_levels, quantize_blocks
from tests.conftest import WORLD, in_step, interrupt, status_of, tiny_model
from tools import generate, official_adapter, to_lora, to_transformers

# Dettmers et al. 2023, appendix E
PAPER = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
         -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
         0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
         0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def quantized_model(kind, seed=0):
    model = tiny_model(seed)
    quantize_blocks(model, kind)
    return model


# ---------------------------------------------------------------- the codes


def test_the_16_levels_are_those_of_the_paper():
    assert normal_levels().tolist() == pytest.approx(PAPER, abs=1e-6)
    assert 0.0 in normal_levels().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_becomes_the_nearest_level_times_the_largest_of_its_block(kind, dtype,
                                                                           monkeypatch):
    monkeypatch.setattr(quantize, "CHUNK", 200)  # the last chunk is a smaller one
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[2] = 0  # a block of zeros
    levels = PAPER if kind == "nf4" else [i / 127 for i in range(-127, 128)]
    size = 64 if kind == "nf4" else 96
    expected = []
    for block in weight.flatten().split(size):
        largest = block.abs().max().item()
        for value in block.tolist():
            expected.append(largest * min(levels, key=lambda level: abs(level * largest - value)))
    dense = QuantizedLinear(weight, kind).weight
    assert dense.shape == weight.shape and dense.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7  # two roundings to bf16
    assert dense.flatten().tolist() == pytest.approx(expected, rel=tolerance, abs=1e-6)
    assert not dense[2].any()


@pytest.mark.parametrize("kind, bits, error", [("int8", 8.02, 0.0082), ("nf4", 4.26, 0.092)])
def test_normal_weights_are_kept_in_so_many_bits_with_so_much_error(kind, bits, error):
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = QuantizedLinear(weight, kind)
    assert 8 * sum(b.nbytes for b in layer.buffers()) / weight.numel() == pytest.approx(
        bits, abs=0.01)
    off = (layer.weight.float() - weight.float()).norm() / weight.float().norm()
    assert off == pytest.approx(error, rel=0.02)


def test_nf4_refuses_a_layer_that_is_no_multiple_of_a_block():
    with pytest.raises(ValueError, match="nf4 takes blocks of 64 weights, and a layer of 3 x 5"):
        QuantizedLinear(torch.ones(3, 5), "nf4")
    assert torch.equal(QuantizedLinear(torch.ones(3, 5), "int8").weight, torch.ones(3, 5))


# ---------------------------------------------------------------- products and gradients


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_product_and_gradient_are_those_of_the_decoded_weight(kind, autocast):
    layer = QuantizedLinear(torch.randn(24, 32), kind)
    plain = nn.Linear(32, 24, bias=False).requires_grad_(False)
    plain.weight.copy_(layer.weight)
    x, y = (torch.linspace(-1, 1, 320).view(2, 5, 32).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, expected = layer(x), plain(y)
    assert torch.equal(out, expected) and out.dtype == expected.dtype
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    assert torch.allclose(x.grad, y.grad, rtol=1e-5, atol=1e-5 if not autocast else 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_weight_is_kept_for_the_backward_pass(kind):
    layers = nn.Sequential(*(QuantizedLinear(torch.randn(256, 256), kind) for _ in range(6)))
    x = torch.randn(2, 256, requires_grad=True)
    dense = 4 * 256 * 256
    with Watch() as watch:
        out = layers(x).sum()
        assert watch.now < dense / 4  # a few outputs of 2 x 256
        out.backward()
    assert watch.peak < 2 * dense  # of one layer at a time: the weight, and the codes as int32


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_on_a_quantised_base_whose_codes_stay(kind):
    model = quantized_model(kind)
    plain = tiny_model()
    assert add_hydralora(model) == add_hydralora(plain)
    assert count_parameters(model) == count_parameters(plain)
    before = {name: b.clone() for name, b in model.named_buffers()}
    optimizer = train.make_optimizer(model, lr=1e-2)
    x, losses = torch.randint(768, (4, 12), generator=torch.Generator().manual_seed(0)), []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert {type(p) for p in adapter_parameters(model).values()} == {nn.Parameter}
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert not [name for name, p in model.named_parameters()
                if p.requires_grad and "lora" not in name and "router" not in name]


# ---------------------------------------------------------------- loading


def two_shards(folder):
    random_checkpoint.main(["write", "--out", str(folder), "--shards", "2", "--layers", "2",
                            "--dim", "128", "--tokenizer",
                            str(WORLD / "base" / "tokenizer.model")])
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_quantised_as_it_is_read_one_tensor_at_a_time(kind, tmp_path, monkeypatch):
    folder = two_shards(tmp_path / "weights")
    read, most = [], 0
    init = QuantizedLinear.__init__

    def watched(layer, weight, kind):
        nonlocal most
        read.append(weakref.ref(weight))
        most = max(most, sum(r() is not None for r in read))
        init(layer, weight, kind)

    monkeypatch.setattr(QuantizedLinear, "__init__", watched)
    model, _ = load_model(folder, device="cpu", dtype=torch.float32, quantize=kind)
    assert len(read) == 2 * 7 and most <= 2  # the one, and the one before while names are bound
    dense, _ = load_llama(folder, dtype=torch.float32)
    quantize_blocks(dense, kind)
    x = torch.arange(20)[None]
    assert torch.equal(model(x), dense(x))
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert {b.element_size() for name, b in model.named_buffers() if "codes" in name} == {1}
    assert not any(b.is_meta for b in model.buffers())
    assert {layer.kind for layer in model.modules() if hasattr(layer, "kind")} == {kind}
    # embedding, head and norms stay as they are
    assert {name.split(".")[-2] for name, _ in model.named_parameters()} == {
        "tok_embeddings", "attention_norm", "ffn_norm", "norm", "output"}


def test_the_fingerprint_of_a_quantised_base_is_the_dense_ones():
    dense = base_fingerprint(tiny_model())
    for kind in KINDS:
        model = quantized_model(kind)
        assert base_fingerprint(model) == dense
        add_hydralora(model)
        assert base_fingerprint(model) == dense


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("now", ["none", *KINDS])
@pytest.mark.parametrize("before", ["none", *KINDS])
def test_an_adapter_loads_on_its_base_quantised_or_not(before, now, tmp_path):
    model = tiny_model() if before == "none" else quantized_model(before)
    add_hydralora(model)
    save_adapter(model, tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content.get("quantized", "none") == before
    assert ("quantized" in content) == (before != "none")  # older code reads dense ones
    load_adapter(tiny_model() if now == "none" else quantized_model(now), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(tiny_model(1) if now == "none" else quantized_model(now, 1),
                     tmp_path / "a.pt")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the tiny model, a few records, and a run on the model in NF4."""
    folder = tmp_path_factory.mktemp("quantised")
    save_llama(tiny_model(n_layers=1), WORLD / "base" / "tokenizer.model", folder / "weights")
    records = [r for r in read_records(WORLD / "train.jsonl") if r["category"] == "tavi"][:24]
    write_records(records, folder / "data.jsonl")
    assert train.main([*flags_of(folder), "--quantize", "nf4"]) == 0
    return folder


def flags_of(folder, out="run"):
    return ["--weights", str(folder / "weights"), "--data", str(folder / "data.jsonl"),
            "--device", "cpu", "--max-seq-len", "100", "--max-steps", "4", "--rank", "2",
            "--out", str(folder / out)]


def test_run_json_and_the_adapter_say_how_the_base_was_quantised(place):
    run = json.loads((place / "run" / "run.json").read_text())
    assert run["settings"]["quantize"] == "nf4"
    model, _ = load_llama(place / "weights")
    assert run["parameters"]["base"] == sum(p.numel() for p in model.parameters())
    content = torch.load(place / "run" / "adapter.pt", weights_only=True)
    assert content["quantized"] == "nf4"


def test_the_losses_are_those_of_the_quantised_base(place, tmp_path, capsys):
    assert train.main(flags_of(place, str(tmp_path / "dense"))) == 0
    runs = [json.loads((folder / "run.json").read_text())
            for folder in (place / "run", tmp_path / "dense")]
    quantised, dense = (run["metrics"]["val_loss_base"] for run in runs)
    assert 0 < abs(quantised - dense) < 0.1 * dense
    assert runs[1]["settings"]["quantize"] == "none"


@pytest.mark.parametrize("flags, now", [([], "nf4"), (["--quantize", "int8"], "int8"),
                                        (["--quantize", "none"], "none")])
def test_mmlu_takes_the_adapters_own_base_unless_told(place, flags, now, tmp_path, capsys):
    adapter = place / "run" / "adapter.pt"
    assert eval_mmlu.main(["--weights", str(place / "weights"), "--adapter", str(adapter),
                           "--shots", "0", "--limit", "1", "--max-seq-len", "100", "--device",
                           "cpu", "--out", str(tmp_path / "m.json"), *flags]) == 0
    line = (f"{adapter} was trained with --quantize nf4; the base here is loaded with --quantize "
            f"{now}")
    assert capsys.readouterr().out.count(line) == 1
    result = json.loads((tmp_path / "m.json").read_text())
    assert result["settings"]["quantize"] == now


def test_a_stopped_evaluation_is_not_continued_on_another_base(place):
    digests = {kind: eval_mmlu.base_digest(load_model_and_adapter(
        place / "weights", None, device="cpu", dtype="fp32", quantize=kind)[0])
        for kind in ("none", *KINDS)}
    assert len(set(digests.values())) == 3
    model, _ = load_llama(place / "weights", dtype=torch.float32)
    assert digests["none"] == eval_mmlu.digest(base_fingerprint(model))  # as it always was


def test_generate_takes_the_adapters_own_base(place, capsys):
    adapter = str(place / "run" / "adapter.pt")
    flags = ["Say it.", "--weights", str(place / "weights"), "--adapter", adapter, "--device",
             "cpu", "--max-new-tokens", "2"]
    assert generate.main(flags) == 0
    assert "--quantize nf4; the base here is loaded with --quantize nf4" in capsys.readouterr().out
    assert generate.main([*flags, "--quantize", "none"]) == 0
    assert "the base here is loaded with --quantize none" in capsys.readouterr().out


@pytest.mark.parametrize("tool", [to_lora, official_adapter])
def test_an_export_says_what_the_adapter_was_trained_on(tool, place, tmp_path, capsys):
    assert train.main([*flags_of(place, str(tmp_path / "lora")), "--quantize", "int8", "--method",
                       "lora"]) == 0
    assert tool.main([str(tmp_path / "lora" / "adapter.pt"), str(tmp_path / "out"), "--weights",
                      str(place / "weights")]) == 0
    assert "was trained with --quantize int8" in capsys.readouterr().out


def test_an_adapter_for_transformers_and_back_keeps_what_it_was_trained_on(place, tmp_path,
                                                                           capsys):
    weights = ["--weights", str(place / "weights")]
    there, back = str(tmp_path / "there.pt"), str(tmp_path / "back.pt")
    assert to_transformers.main([str(place / "run" / "adapter.pt"), there, *weights]) == 0
    assert to_transformers.main([there, back, *weights, "--back"]) == 0
    assert capsys.readouterr().out.count("was trained with --quantize nf4") == 2
    assert trained_with(there) == trained_with(back) == "nf4"


def test_cluster_reads_the_states_of_the_quantised_base(place, tmp_path, capsys):
    flags = ["--weights", str(place / "weights"), "--data", str(place / "data.jsonl"), "--device",
             "cpu", "--k-max", "2", "--out", str(tmp_path / "c.json")]
    curves = []
    for kind in ("none", "nf4"):
        assert cluster.main([*flags, "--quantize", kind]) == 0
        result = json.loads((tmp_path / "c.json").read_text())
        assert result["settings"]["quantize"] == kind
        curves.append(result["curve"]["1"])
    assert 0 < abs(curves[0] - curves[1]) < 0.1 * curves[0]
    # features kept for one base are not taken for the other
    cache = ["--cache", str(tmp_path / "features.pt")]
    assert cluster.main([*flags, *cache, "--quantize", "nf4"]) == 0
    assert cluster.main([*flags, *cache, "--quantize", "int8"]) == 2
    assert "give another --cache" in capsys.readouterr().err


# ---------------------------------------------------------------- resuming, and what is refused


def adapter_of(folder):
    return torch.load(folder / "adapter.pt", weights_only=True)["tensors"]


def test_a_resumed_run_takes_the_checkpoints_base_and_ends_alike(place, tmp_path, capsys):
    flags = flags_of(place, str(tmp_path / "again"))
    with in_step(2, interrupt):
        assert train.main([*flags, "--quantize", "nf4"]) == 130
    for other in ("none", "int8"):
        assert train.main([*flags, "--resume", "--quantize", other]) == 2
        assert f"quantize was nf4, is {other}" in capsys.readouterr().err
    assert train.main([*flags, "--resume"]) == 0
    whole, resumed = adapter_of(place / "run"), adapter_of(tmp_path / "again")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_an_adapter_is_trained_further_on_the_base_it_had(place, tmp_path, capsys):
    flags = [*flags_of(place, str(tmp_path / "further"))[:-4], "--init-adapter",
             str(place / "run" / "adapter.pt")]
    assert train.main([*flags, "--out", str(tmp_path / "further")]) == 0
    run = json.loads((tmp_path / "further" / "run.json").read_text())
    assert run["settings"]["quantize"] == "nf4"
    assert train.main([*flags, "--out", str(tmp_path / "dense"), "--quantize", "none"]) == 0
    out = capsys.readouterr().out
    for now in ("nf4", "none"):
        assert out.count(f"--quantize nf4; the base here is loaded with --quantize {now}\n") == 1
    # a resumed run asks its checkpoint instead
    assert train.parse_args([*flags, "--resume"]).quantize is None


def test_a_checkpoint_of_before_is_resumed_on_the_dense_base(place, tmp_path, capsys):
    flags = flags_of(place, str(tmp_path / "old"))
    with in_step(2, interrupt):
        assert train.main(flags) == 130
    state = torch.load(tmp_path / "old" / "checkpoint.pt", weights_only=True)
    assert state["settings"].pop("quantize") == "none"
    torch.save(state, tmp_path / "old" / "checkpoint.pt")
    assert train.main([*flags, "--resume", "--quantize", "nf4"]) == 2
    assert "quantize was none, is nf4" in capsys.readouterr().err
    assert train.main([*flags, "--resume"]) == 0


@pytest.mark.parametrize("flags", [["--method", "full"], ["--dry-run", "--gpus", "2"]])
def test_a_base_that_trains_or_is_sharded_is_not_quantised(flags, capsys):
    assert status_of(train.main, [*flags, "--quantize", "int8"]) == 2
    assert "--quantize int8 holds a frozen base whole" in capsys.readouterr().err


def test_a_quantised_base_is_not_sharded(place):
    with pytest.raises(ValueError, match="--shard-base cannot share out a base in nf4"):
        load_model_and_adapter(place / "weights", place / "run" / "adapter.pt", device="cpu",
                               dtype="fp32", shard_base=True)


def test_the_head_can_be_adapted_on_a_quantised_base(place, tmp_path):
    out = tmp_path / "head"
    assert train.main([*flags_of(place, str(out)), "--quantize", "nf4", "--targets",
                       "output"]) == 0
    model, _ = load_model_and_adapter(place / "weights", out / "adapter.pt", device="cpu",
                                      dtype="fp32")
    assert type(model.output.base) is nn.Linear
    assert isinstance(model.layers[0].feed_forward.w1, QuantizedLinear)


# ---------------------------------------------------------------- the experiment


def stat(low, high):
    return {"mean": (low + high) / 2, "low": low, "high": high}


@pytest.mark.parametrize("interval, expected", [
    (stat(-0.004, 0.005), "equal"), (stat(0.001, 0.005), "equal"), (stat(0.001, 0.007), "behind"),
    (stat(-0.007, -0.001), "ahead"), (stat(-0.007, 0.005), "undecided"),
    (stat(-0.001, 0.007), "undecided"), ({"mean": 0, "low": None, "high": None}, "undecided")])
def test_equal_is_an_interval_within_the_margin_on_both_sides(interval, expected):
    assert quantized.verdict(interval, 0.006) == expected


@pytest.mark.slow
def test_the_experiment_on_a_quantised_base_runs(tmp_path, place, monkeypatch):
    monkeypatch.setattr(quantized.steps, "SMOL", {**quantized.steps.SMOL, "n_layers": 1,
                                                  "dim": 72, "vocab_size": 100})
    assert quantized.run(quantized.parse_args(
        ["--weights", str(place / "weights"), "--data", str(place / "data.jsonl"), "--seeds", "2",
         "--max-steps", "1", "--max-seq-len", "100", "--rounds", "1", "--runs",
         str(tmp_path / "runs"), "--out", str(tmp_path), "--margin", "1e6", "--name", "other"])
        ) is None
    result = json.loads((Path(tmp_path) / "other.json").read_text())
    assert {claim["verdict"] for claim in result["claims"]} == {"equal"}  # within such a margin
    assert [row["quantize"] for row in result["rows"]] == ["none", "int8", "nf4"]
    assert result["claims"][0]["claim"] == quantized.PRIMARY
    assert result["seconds"].keys() == {"none", "int8", "nf4"}
