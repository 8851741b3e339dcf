"""tools/ against transformers and peft themselves, where these are installed
(requirements-optional.txt)."""

import os
import shutil

import pytest
import torch

from model import load_llama, save_llama
from tests.conftest import WORLD
from tests.test_tools import (
    make_adapter,
    official_folder,
    run,
    same_bytes,
    tokens,
    tuned,
    write_weights,
)
from tools import export_hf, import_hf, official_adapter, to_lora

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
transformers = pytest.importorskip("transformers", reason="needs requirements-optional.txt")
safetensors = pytest.importorskip("safetensors.torch", reason="needs requirements-optional.txt")

TOKENIZER = WORLD / "base" / "tokenizer.model"
SHAPES = {  # heads, widths and ties as in the originals, scaled down
    "TinyLlama": dict(hidden_size=128, intermediate_size=352, num_attention_heads=8,
                      num_key_value_heads=1, num_hidden_layers=2, max_position_embeddings=64,
                      rms_norm_eps=1e-5),
    "SmolLM": dict(hidden_size=72, intermediate_size=192, num_attention_heads=9,
                   num_key_value_heads=3, num_hidden_layers=3, tie_word_embeddings=True,
                   rms_norm_eps=1e-5),
    "Llama 2": dict(hidden_size=64, intermediate_size=172, num_attention_heads=4,
                    num_hidden_layers=2, rms_norm_eps=1e-5),
    "an odd one": dict(hidden_size=64, intermediate_size=40, num_attention_heads=4,
                       num_key_value_heads=2, num_hidden_layers=1, rms_norm_eps=1e-3,
                       tie_word_embeddings=True,
                       rope_parameters={"rope_type": "default", "rope_theta": 333.0}),
}


def make_model(shape, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(vocab_size=768, initializer_range=0.15, **SHAPES[shape])
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # norms of one would hide one left out
        for p in model.parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1.5)
    return model


def save(model, folder, files=1, kind="safetensors"):
    """The folder that transformers writes, or the same in other files as it used to be; returns the
    state."""
    model.save_pretrained(folder)
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    state = safetensors.load_file(folder / "model.safetensors")
    if files > 1 or kind == "bin":
        (folder / "model.safetensors").unlink()
        write_weights(folder, state, files, kind)
    return state


def logits(hf, ids):
    with torch.no_grad():
        return hf(ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_imported_model_has_transformers_logits_and_comes_back_byte_for_byte(
        tmp_path, shape, files, kind):
    hf, ids = make_model(shape), tokens(2, 40)
    before = save(hf, tmp_path / "hf", files, kind)
    assert run(import_hf, tmp_path / "hf", tmp_path / "meta") == 0
    with torch.no_grad():
        ours = load_llama(tmp_path / "meta")[0](ids)
    assert (ours - logits(hf, ids)).abs().max() < 1e-4
    assert ours.std() > 0.3  # logits that could differ

    assert run(export_hf, tmp_path / "meta", tmp_path / "back") == 0
    assert same_bytes(before, safetensors.load_file(tmp_path / "back" / "model.safetensors"))
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(logits(again, ids), logits(hf, ids))


def test_transformers_tokenizer_gives_our_ids_after_export(tmp_path, tokenizer):
    pytest.importorskip("google.protobuf", reason="transformers needs it for a tokenizer.model")
    run(export_hf, WORLD / "base", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("What is 3 plus 4?", "naïve 😀\nnext line", "two  spaces"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)


# ---------------------------------------------------------------- adapters


def apply_formula(hf, tensors, alpha, rank, heads):
    """y += (alpha / r) * sum_i w_i B_i A x on every module of transformers' model that has them."""
    def adapt(place):
        def hook(_, inputs, y):
            x = inputs[0]
            w = (x @ tensors[f"{place}.lora_route.weight"].T).softmax(-1)
            z = x @ tensors[f"{place}.lora_A.weight"].T
            for i in range(heads):
                b = tensors[f"{place}.lora_B{i}.weight"]
                y = y + alpha / rank * w[..., i:i + 1] * (z @ b.T)
            return y
        return hook

    for name, module in hf.named_modules():
        if f"base_model.model.{name}.lora_A.weight" in tensors:
            module.register_forward_hook(adapt(f"base_model.model.{name}"))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("targets", [("gate_proj", "up_proj", "down_proj"),
                                     ("q_proj", "k_proj", "v_proj", "o_proj")], ids=str)
def test_their_adapter_gives_the_logits_of_the_formula_in_their_layout(
        model, tmp_path, targets, heads):
    save_llama(model, TOKENIZER, tmp_path / "meta")
    run(export_hf, tmp_path / "meta", tmp_path / "hf")
    hf, ids = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval(), tokens(2, 20)
    tensors = official_folder(tmp_path / "theirs", model, targets, heads=heads)
    assert run(official_adapter, tmp_path / "theirs", tmp_path / "a.pt",
               "--weights", tmp_path / "meta") == 0
    base = logits(hf, ids)
    apply_formula(hf, tensors, alpha=8, rank=4, heads=heads)
    want = logits(hf, ids)
    with torch.no_grad():
        got = tuned(tmp_path / "meta", tmp_path / "a.pt")(ids)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert (want - base).abs().max() > 0.1 * base.abs().max()


def peft_model(tmp_path):
    peft = pytest.importorskip("peft", reason="needs requirements-optional.txt")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    return peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()


@pytest.fixture
def hf_weights(tmp_path):
    save(make_model("TinyLlama"), tmp_path / "hf")
    run(import_hf, tmp_path / "hf", tmp_path / "meta")
    return tmp_path / "meta"


def check_against_peft(tmp_path, weights, adapter, model=None):
    """Asserts that a model of PEFT has the logits of our adapter; returns them."""
    ids = tokens(2, 20)
    with torch.no_grad():
        want = tuned(weights, adapter)(ids)
    got = logits(model or peft_model(tmp_path), ids)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    return want


ALL = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


@pytest.mark.slow
@pytest.mark.parametrize("targets, settings", [
    (ALL, {"heads": 1}), (("w1", "w2", "w3"), {"heads": 1, "alpha": 5.5}),
    (ALL, {"heads": 3, "gate": "uniform"}),
    (("wq", "w2"), {"heads": 2, "gate": "uniform", "share_a": False})], ids=str)
def test_the_exported_lora_has_our_logits_in_peft(hf_weights, tmp_path, targets, settings):
    path = make_adapter(hf_weights, tmp_path / "a.pt", targets, **settings)
    assert run(to_lora, path, tmp_path / "lora", "--weights", hf_weights) == 0
    check_against_peft(tmp_path, hf_weights, path)


@pytest.mark.slow
def test_pefts_automatic_classes_find_the_base(hf_weights, tmp_path):
    peft = pytest.importorskip("peft", reason="needs requirements-optional.txt")
    path = make_adapter(hf_weights, tmp_path / "a.pt", ALL, heads=1)
    assert run(to_lora, path, tmp_path / "lora", "--weights", hf_weights, "--base",
               tmp_path / "hf") == 0
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()
    check_against_peft(tmp_path, hf_weights, path, model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_lora_on_a_tied_output_is_right_unmerged_and_wrong_merged(tmp_path, capsys):
    """Why to_lora warns instead of refusing: its LoRA is right as long as it is not merged."""
    pytest.importorskip("peft", reason="needs requirements-optional.txt")
    save(make_model("SmolLM"), tmp_path / "hf")
    run(import_hf, tmp_path / "hf", tmp_path / "meta")
    path = make_adapter(tmp_path / "meta", tmp_path / "a.pt", ("output",), heads=1)
    assert run(to_lora, path, tmp_path / "lora", "--weights", tmp_path / "meta") == 0
    assert "use it unmerged" in capsys.readouterr().out
    theirs = peft_model(tmp_path)
    want = check_against_peft(tmp_path, tmp_path / "meta", path, theirs)
    merged = logits(theirs.merge_and_unload(), tokens(2, 20))
    assert (merged - want).abs().max() > 0.1 * want.abs().max()
