"""hydralora.py on models of transformers (requirements-optional.txt), docs/any-model.md, and
tools.to_transformers."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import distributed as dist

import eval_mmlu
from hydralora import (
    adapter_parameters,
    add_hydralora,
    hydra_layers,
    load_adapter,
    save_adapter,
)
from model import generate_ids
from tests.conftest import ROOT, WORLD
from tests.test_hydralora import filled
from tests.test_tools import make_adapter, refused, run, tokens, tuned
from tools import export_hf, to_transformers

PAGE = (ROOT / "docs" / "any-model.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
ALL = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def read(path):
    return torch.load(path, weights_only=True)


# ---------------------------------------------------------------- the installed file


@pytest.mark.slow
def test_the_wheel_holds_the_file_alone_and_it_imports_nothing_but_torch(tmp_path):
    pytest.importorskip("setuptools", "77", reason="builds the wheel without a network")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(
        ".*", "runs", "results", "world", "pictures"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", source, "-w", tmp_path, "--quiet",
                    "--no-index", "--no-deps", "--no-build-isolation"], check=True)
    wheel = zipfile.ZipFile(next(tmp_path.glob("hydralora-*.whl")))
    assert [name for name in wheel.namelist() if "dist-info" not in name] == ["hydralora.py"]
    wheel.extractall(tmp_path / "installed")
    code = """
import sys, torch
before = set(sys.modules)
import hydralora
print(hydralora.__file__, set(sys.modules) - before - sys.stdlib_module_names)"""
    installed = tmp_path / "installed"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)})
    assert done.stdout.split() == [str(installed / "hydralora.py"), "{'hydralora'}"]


# ---------------------------------------------------------------- models of transformers


SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4,
             num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=128,
             pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3)
MODELS = {
    "Llama": ("LlamaConfig", {}, FEED_FORWARD),
    "Llama, tied": ("LlamaConfig", dict(tie_word_embeddings=True), ("lm_head", "q_proj")),
    "Qwen 3": ("Qwen3Config", dict(head_dim=8, tie_word_embeddings=True), FEED_FORWARD),
    "Mistral": ("MistralConfig", dict(sliding_window=8), ("q_proj", "v_proj")),
    "Gemma 2": ("Gemma2Config", dict(head_dim=8, sliding_window=8), FEED_FORWARD),
    "Phi 3": ("Phi3Config", {}, ("gate_up_proj", "down_proj")),
}


def random_model(name, seed=0):
    transformers = pytest.importorskip("transformers", reason="needs requirements-optional.txt")
    config, changes, _ = MODELS[name]
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**{**SIZES, **changes})).eval()


def adapted(name, seed=0, **settings):
    """The model with adapters that matter."""
    model = random_model(name)
    torch.manual_seed(seed)
    add_hydralora(model, targets=MODELS[name][2], **settings)
    for layer in hydra_layers(model).values():
        filled(layer).lora_B.data.mul_(0.1)
    return model


def ids(*shape):
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(0))


def logits(model, x):
    with torch.no_grad():
        return model(x).logits


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_the_base_and_its_adapter_makes_it_the_tuned_one(name, tmp_path):
    model, x = adapted(name), ids(2, 12)
    base, want = logits(random_model(name), x), logits(model, x)
    model.save_pretrained(tmp_path)
    save_adapter(model, tmp_path / "adapter.pt")
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and torch.equal(logits(again, x), base)
    assert set(report["unexpected_keys"]) == adapter_parameters(model).keys()
    load_adapter(again, tmp_path / "adapter.pt")
    assert torch.equal(logits(again, x), want) and not torch.allclose(base, want)
    load_adapter(random_model(name).bfloat16(), tmp_path / "adapter.pt")
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(random_model(name, seed=1), tmp_path / "adapter.pt")


@pytest.mark.parametrize("name", MODELS)
def test_generated_tokens_depend_neither_on_the_cache_nor_on_padding_to_the_left(name):
    model, x = adapted(name), ids(2, 12)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), x], 1)

    def new(x, **settings):
        return model.generate(x, max_new_tokens=8, do_sample=False, **settings)[:, -8:]

    want = new(x, use_cache=False)
    assert torch.equal(new(x), want)
    assert torch.equal(new(padded, attention_mask=(padded > 0).long()), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_give_the_same_gradients(reentrant):
    def gradients(checkpointed):
        model = adapted("Llama", dropout=0.2).train()
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable",
                             model.gradient_checkpointing_enable)  # before transformers 5.24
            enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        model(ids(2, 12), labels=ids(2, 12)).loss.backward()
        return {name: p.grad for name, p in adapter_parameters(model).items()}

    plain, again = gradients(False), gradients(True)
    assert all(torch.equal(plain[name], again[name]) and plain[name].any() for name in plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_cast_after_adding_trains_and_has_nearly_the_same_logits(dtype):
    model, x = adapted("Llama"), ids(2, 12)
    before = logits(model, x)
    model.to(dtype)
    assert (logits(model, x).float() - before).abs().max() < 0.05 * before.abs().max()
    model(x, labels=x).loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter_parameters(model).values())


def test_an_offloaded_base_is_refused_in_words(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    model = accelerate.cpu_offload(random_model("Llama"), execution_device=torch.device("cpu"))
    add_hydralora(model, targets=FEED_FORWARD)
    with pytest.raises(ValueError, match="the adapter is on the meta device"):
        model(ids(2, 12))
    with pytest.raises(ValueError, match="embed_tokens.weight is on the meta device or offloaded"):
        save_adapter(model, tmp_path / "a.pt")


def test_layers_of_gpt2_are_refused_by_name():
    transformers = pytest.importorskip("transformers", reason="needs requirements-optional.txt")
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match=r"called \['transformer.h.0.attn.c_attn'\]"):
        add_hydralora(transformers.AutoModelForCausalLM.from_config(config), targets=("c_attn",))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_trainer_resumes_bit_for_bit(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs requirements-optional.txt")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    data = [{"input_ids": row, "labels": row} for row in ids(12, 10)]

    def trained(resume=None):
        model = adapted(name, dropout=0.1)
        args = transformers.TrainingArguments(
            tmp_path / "out", max_steps=4, save_steps=2, per_device_train_batch_size=2,
            learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True)
        transformers.Trainer(model, args, train_dataset=data).train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole, resumed = trained(), trained(tmp_path / "out" / "checkpoint-2")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


# ---------------------------------------------------------------- tools.to_transformers


@pytest.mark.parametrize("settings", [
    dict(targets=ALL), dict(targets=("wk", "w2"), share_a=False, dropout=0.1),
    dict(targets=("wq",), gate="uniform", heads=2), dict(targets=("w1",), heads=1)], ids=str)
def test_an_adapter_comes_back_from_transformers_names_exactly(weights, tmp_path, settings):
    make_adapter(weights, tmp_path / "a.pt", **settings)
    assert run(to_transformers, tmp_path / "a.pt", tmp_path / "hf.pt", "--weights", weights) == 0
    assert run(to_transformers, tmp_path / "hf.pt", tmp_path / "back.pt", "--weights", weights,
               "--back") == 0
    before, after = read(tmp_path / "a.pt"), read(tmp_path / "back.pt")
    assert before["config"] == after["config"] and before["base"] == after["base"]
    assert before["tensors"].keys() == after["tensors"].keys()
    assert all(torch.equal(t, after["tensors"][name]) for name, t in before["tensors"].items())


@pytest.mark.parametrize("tied", [False, True])
def test_the_converted_adapter_has_our_logits_and_tokens_in_transformers(
        model, weights, tmp_path, tokenizer, tied):
    transformers = pytest.importorskip("transformers", reason="needs requirements-optional.txt")
    if tied:  # export_hf then leaves the output layer out
        checkpoint = torch.load(weights / "consolidated.00.pth", weights_only=True)
        checkpoint["output.weight"] = checkpoint["tok_embeddings.weight"].clone()
        torch.save(checkpoint, weights / "consolidated.00.pth")
    # at alpha 32 so random an adapter makes 4e-4 of a change of 2e-7 in the embedding
    make_adapter(weights, tmp_path / "a.pt", ALL, alpha=4)
    ours, x = tuned(weights, tmp_path / "a.pt"), tokens(2, 20)
    run(export_hf, weights, tmp_path / "hf")
    run(to_transformers, tmp_path / "a.pt", tmp_path / "hf.pt", "--weights", weights)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.tie_word_embeddings == tied
    base = logits(theirs, x)
    load_adapter(theirs, tmp_path / "hf.pt")
    with torch.no_grad():
        want = ours(x)
    assert (logits(theirs, x) - want).abs().max() < 1e-4 * want.abs().max()
    assert (want - base).abs().max() > 0.1 * base.abs().max()
    new = theirs.generate(x[:1], max_new_tokens=12, do_sample=False)[0, 20:].tolist()
    assert generate_ids(ours, tokenizer, x[:1].tolist(), max_new_tokens=12) == [
        [token for token in new if token != tokenizer.eos_id]]


def test_an_adapter_of_another_base_or_of_the_other_layout_is_not_converted(
        weights, tmp_path, capsys):
    make_adapter(weights, tmp_path / "a.pt")
    argv = [tmp_path / "a.pt", tmp_path / "out.pt"]
    assert "another base model" in refused(capsys, to_transformers, *argv)
    assert "no linear layer is called" in refused(capsys, to_transformers, *argv, "--weights",
                                                  weights, "--back")
    (tmp_path / "out.pt").touch()
    assert "exists already" in refused(capsys, to_transformers, *argv, "--weights", weights)


# ---------------------------------------------------------------- the page


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A folder with what the page's commands make, and a dict to run its blocks in."""
    pytest.importorskip("transformers", reason="needs requirements-optional.txt")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    pytest.importorskip("google.protobuf", reason="transformers needs it for a tokenizer.model")
    monkeypatch.chdir(tmp_path)
    run(export_hf, WORLD / "base", "my-llama")
    make_adapter(WORLD / "base", "a.pt")
    run(to_transformers, "a.pt", "for-hf.pt")
    return {}


@pytest.mark.slow
def test_every_block_of_the_page_runs_and_what_it_says_of_trainer_holds(page, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for block in BLOCKS:
            if "import lm_eval" not in block:
                exec(block, page)
            if "resume_from_checkpoint" in block:
                whole, resumed = page["model"].state_dict(), page["again"].state_dict()
                assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    finally:
        dist.destroy_process_group()

    # the last model holds the converted adapter: training goes on, and comes back here
    x, model = tokens(2, 20), page["model"]
    before = logits(model, x)
    assert (before - tuned(WORLD / "base", "a.pt")(x)).abs().max() < 0.02
    page["make_trainer"](model).train()
    command = re.search(r"`python -m tools.to_transformers (.*--back)`", PAGE).group(1)
    run(to_transformers, *command.split())
    after = tuned(WORLD / "base", "back.pt")(x)
    assert (logits(model.eval(), x) - after).abs().max() < 0.02
    assert (before - after).abs().max() > 0.2


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="needs lm-eval")
def test_lm_evaluation_harness_predicts_as_eval_mmlu(page):
    for block in (BLOCKS[0], BLOCKS[-2], BLOCKS[-1]):
        exec(block, page)
    flags = ["--shots", "0", "--adapter", "a.pt", "--dtype", "fp32", "--out", "ours.json"]
    assert eval_mmlu.main(flags) == 0
    with open("ours.json", encoding="utf-8") as file:
        ours = [question["prediction"] for question in json.load(file)["questions"]]
    samples = page["results"]["samples"]["quiz"]
    theirs = ["ABCD"[max(range(4), key=lambda i: sample["filtered_resps"][i][0])]
              for sample in samples]
    assert theirs == ours
