"""tools.import_hf and tools.export_hf, hostile files, and helpers that the other tests of tools/
share. test_tools_hf.py compares with transformers and peft."""

import json
import os
import re
import struct
import threading
from pathlib import Path

import pytest
import torch

from hydralora import adapter_parameters, add_hydralora, hydra_layers, load_adapter, save_adapter
from model import generate, load_llama
from tests.conftest import WORLD, file_size_limit, status_of, tiny_model
from tools import export_hf, hf_layout, import_hf, official_adapter, to_lora

TOKENIZER = WORLD / "base" / "tokenizer.model"
HF_NAMES = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
            "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
            "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
            "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm"}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
          "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 768, "max_position_embeddings": 128,
          "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu"}


def tokens(*shape, seed=0):
    return torch.randint(3, 768, shape, generator=torch.Generator().manual_seed(seed))


def halves(weight, heads):
    """Hugging Face's row order, row by row: a head's even rows first."""
    size = len(weight) // heads
    order = [head * size + row for head in range(heads)
             for row in [*range(0, size, 2), *range(1, size, 2)]]
    return weight[order]


def hf_state(model):
    """The tensors of a model under Hugging Face's names and in its row order, by a slow twin."""
    state = {}
    for name, weight in model.state_dict().items():
        if name.endswith("wq.weight"):
            weight = halves(weight, 4)
        if name.endswith("wk.weight"):
            weight = halves(weight, 2)
        for ours, theirs in HF_NAMES.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        name = "model." + name if name.startswith("layers.") else name
        for ours, theirs in (("tok_embeddings.", "model.embed_tokens."), ("output.", "lm_head.")):
            name = name.replace(ours, theirs)
        state["model.norm.weight" if name == "norm.weight" else name] = weight.clone()
    return state


def safetensors_bytes(state):
    """A safetensors file, put together by hand."""
    header, data = {}, b""
    for name, weight in state.items():
        raw = weight.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": {torch.float32: "F32", torch.bfloat16: "BF16"}[weight.dtype],
                        "shape": list(weight.shape), "data_offsets": [len(data), len(data + raw)]}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_hf(folder, state, files=1, kind="safetensors", **config):
    """A Hugging Face folder that holds the state in so many files."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    write_weights(folder, state, files, kind)
    return folder


def write_weights(folder, state, files, kind):
    names = list(state)
    stem, end = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    for i in range(files):
        name = f"{stem}-{i + 1:05d}-of-{files:05d}.{end}" if files > 1 else f"{stem}.{end}"
        part = {key: state[key] for key in names[i::files]}
        if kind == "safetensors":
            (folder / name).write_bytes(safetensors_bytes(part))
        else:
            # before PyTorch 1.6 there was no archive
            torch.save(part, folder / name, _use_new_zipfile_serialization=kind == "bin")


@pytest.fixture
def hf(model, tmp_path):
    return write_hf(tmp_path / "hf", hf_state(model))


def make_adapter(weights, path, targets=("w1", "w2", "w3"), rank=4, heads=3, seed=0, **settings):
    """An adapter.pt whose every tensor matters."""
    model, _ = load_llama(weights)
    add_hydralora(model, targets=targets, rank=rank, heads=heads, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in adapter_parameters(model).items():
            p.copy_(torch.randn(p.shape, generator=generator) * (2 if "router" in name else 0.3))
    save_adapter(model, path)
    return path


def tuned(weights, path):
    model, _ = load_llama(weights, dtype=torch.float32)
    load_adapter(model, path)
    return model.eval()


@torch.no_grad()
def official_folder(folder, model, targets=("gate_proj", "down_proj", "up_proj"), heads=3, rank=4,
                    alpha=8, seed=0, dtype=torch.float32, **config):
    """An adapter as the paper's code saves it, with random tensors."""
    generator, folder = torch.Generator().manual_seed(seed), Path(folder)
    folder.mkdir()
    tensors = {}
    for name, weight in hf_state(model).items():
        module = name.removesuffix(".weight")
        if module.split(".")[-1] in targets:
            out, wide = weight.shape
            shapes = {"lora_A": (rank, wide), "lora_route": (heads, wide),
                      **{f"lora_B{i}": (out, rank) for i in range(heads)}}
            for part, shape in shapes.items():
                tensors[f"base_model.model.{module}.{part}.weight"] = (
                    torch.randn(shape, generator=generator) * 0.3).to(dtype)
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
        "lora_nums": heads, "lora_dropout": 0.05, "target_modules": list(targets), "bias": "none",
        "blc_alpha": 0.0, "blc_weight": 0.0, "fan_in_fan_out": False, "enable_lora": None,
        "merge_weights": False, "modules_to_save": None, "inference_mode": True, **config}))
    return tensors


@torch.no_grad()
def greedy(model, tokenizer, ids, count):
    """The new tokens by a slow twin without cache or batch: always the most likely token."""
    new = []
    for _ in range(count):
        token = model(torch.tensor([ids + new]))[0, -1].argmax().item()
        if token == tokenizer.eos_id:
            break
        new.append(token)
    return new


def slow_answer(model, tokenizer, prompt, count=6, raw=False):
    """The text of the answer to a prompt, or with raw of its continuation."""
    ids = tokenizer.encode(prompt, eos=not raw)
    before = ids if raw else []
    text = tokenizer.decode(before + greedy(model, tokenizer, ids, count))
    return text[len(tokenizer.decode(before)):].rstrip("\ufffd")


@torch.no_grad()
def slow_gates(model, ids):
    """{layer: gate (T, N)} by a loop over the tokens."""
    seen = {}
    handles = [layer.register_forward_hook(lambda layer, x, _, name=name: seen.update(
        {name: torch.stack([(layer.router @ row).softmax(0) for row in x[0][0]])}))
        for name, layer in hydra_layers(model).items()]
    model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


def run(tool, *argv):
    """The exit status of a tool."""
    return status_of(tool.main, argv)


def refused(capsys, tool, *argv):
    """The one line with which a tool refuses its arguments."""
    assert run(tool, *argv) == 2
    err = capsys.readouterr().err
    name = Path(tool.__file__).name
    assert err.startswith(f"{name}: ") and err.count("\n") == 1, err
    return err


# ---------------------------------------------------------------- import_hf, export_hf


def same_bytes(before, after):
    """Whether two {name: tensor} hold the same bytes in the same dtypes."""
    return before.keys() == after.keys() and all(
        before[name].dtype == after[name].dtype
        and torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
        for name in before)


@pytest.mark.parametrize("files, kind", [
    (1, "safetensors"), (3, "safetensors"), (1, "bin"), (3, "bin"), (1, "old bin")])
def test_an_imported_model_is_the_model_bit_for_bit(model, tmp_path, files, kind):
    folder = write_hf(tmp_path / "hf", hf_state(model), files, kind)
    assert run(import_hf, folder, tmp_path / "meta") == 0
    loaded, tokenizer = load_llama(tmp_path / "meta")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))
    assert torch.equal(loaded(tokens(2, 9)), model(tokens(2, 9)))
    assert tokenizer.vocab_size == 768 and loaded.args.max_seq_len == 128
    assert sorted(os.listdir(tmp_path)) == ["hf", "meta"]  # no scratch file left


def test_an_exported_model_holds_the_bytes_and_dtypes_that_were_imported(model, tmp_path):
    state = {name: weight if weight.ndim == 1 else weight.bfloat16()
             for name, weight in hf_state(model).items()}
    folder = write_hf(tmp_path / "hf", state)
    assert run(import_hf, folder, tmp_path / "meta") == 0
    assert run(export_hf, tmp_path / "meta", tmp_path / "back") == 0
    assert same_bytes(state, hf_layout.read_safetensors(tmp_path / "back" / "model.safetensors"))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: config[key] for key in CONFIG} == CONFIG and not config["tie_word_embeddings"]
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()
    loaded, _ = load_llama(tmp_path / "meta")
    assert loaded.norm.weight.dtype == torch.float32
    assert loaded.layers[0].attention.wq.weight.dtype == torch.bfloat16


def test_a_tied_output_becomes_a_tensor_of_its_own_and_is_tied_again_by_export(model, tmp_path):
    state = hf_state(model)
    del state["lm_head.weight"]
    run(import_hf, write_hf(tmp_path / "hf", state, tie_word_embeddings=True), tmp_path / "meta")
    loaded, _ = load_llama(tmp_path / "meta")
    assert torch.equal(loaded.output.weight, loaded.tok_embeddings.weight)
    with torch.no_grad():  # full fine-tuning must not change both at once
        loaded.output.weight.add_(1)
    assert torch.equal(loaded.tok_embeddings.weight, model.tok_embeddings.weight)
    run(export_hf, tmp_path / "meta", tmp_path / "back")
    assert "lm_head.weight" not in hf_layout.read_safetensors(
        tmp_path / "back" / "model.safetensors")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("change, name, value", [
    *(({"hidden_size": dim, "intermediate_size": width}, "ffn_dim", width) for dim, width in [
        (256, 88), (256, 8), (256, 1000), (4096, 11008), (8192, 28672), (4096, 14336), (264, 7)]),
    ({"rope_theta": 100000000}, "rope_theta", 1e8), ({"rope_theta": None}, "rope_theta", 1e4),
    ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
     "rope_theta", 2e4),
    ({"max_sequence_length": 99}, "max_seq_len", 128),
    ({"max_sequence_length": 99, "max_position_embeddings": None}, "max_seq_len", 99)])
def test_widths_rotary_base_and_length_are_read_from_old_and_new_configs(
        tmp_path, change, name, value):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **change}))
    args, _ = import_hf.read_config(tmp_path / "config.json")
    assert getattr(args, name) == value


def test_the_first_conversions_of_llama_are_read_without_their_rotary_buffers(
        model, tmp_path, capsys):
    state = hf_state(model)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["model.layers.0.self_attn.rotary_emb.cos_cached"] = torch.ones(1, 1, 8, 8)
    config = {"architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1}
    assert run(import_hf, write_hf(tmp_path / "hf", state, **config), tmp_path / "meta") == 0
    loaded, tokenizer = load_llama(tmp_path / "meta")
    assert torch.equal(loaded(tokens(1, 5)), model(tokens(1, 5))) and tokenizer.eos_id == 2
    assert "eos_token_id 1: here a text ends at the tokenizer's own EOS, 2" in (
        capsys.readouterr().out)


def widened(state, rows):
    """The tensors of a model with so many rows more than the tokenizer has pieces."""
    return {name: torch.cat([w, w[:rows]]) if name in ("model.embed_tokens.weight",
                                                       "lm_head.weight") else w
            for name, w in state.items()}


@pytest.mark.parametrize("where, rows", [("added_tokens.json", 2), ("tokenizer_config.json", 700)])
def test_added_tokens_that_are_not_carried_over_are_named(model, tmp_path, capsys, where, rows):
    folder = write_hf(tmp_path / "hf", widened(hf_state(model), rows), vocab_size=768 + rows,
                      eos_token_id=769)
    added = {"<|im_start|>": 768, "<|im_end|>": 769}
    if where == "tokenizer_config.json":
        added = {"added_tokens_decoder": {str(id): {"content": t} for t, id in added.items()}}
    (folder / where).write_text(json.dumps(added))
    assert run(import_hf, folder, tmp_path / "meta") == 0
    out = capsys.readouterr().out
    assert "not carried over: 2 added tokens" in out and "<|im_start|> 768, <|im_end|> 769" in out
    assert "they are never generated" in out
    assert "not carried over: eos_token_id 769" in out and "--max-new-tokens" in out
    loaded, tokenizer = load_llama(tmp_path / "meta")  # load allows what import allows
    assert loaded.args.vocab_size == 768 + rows and tokenizer.vocab_size == 768
    assert len(generate(loaded, tokenizer, ["a"], max_new_tokens=3, temperature=9.0)) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"a": "b"}', '{"a": true}'])
def test_an_unreadable_file_of_added_tokens_does_not_stop_the_import(hf, tmp_path, capsys, content):
    for name in ("added_tokens.json", "tokenizer_config.json"):
        (hf / name).write_text(content)
    assert run(import_hf, hf, tmp_path / "meta") == 0
    assert "not carried over" not in capsys.readouterr().out


def test_a_tensor_that_is_part_of_a_larger_one_is_written_alone(model, tmp_path):
    state, fused = hf_state(model), torch.zeros(100000)
    norm = state["model.norm.weight"]
    fused[:len(norm)] = norm
    state["model.norm.weight"] = fused[:len(norm)]
    run(import_hf, write_hf(tmp_path / "hf", state, kind="bin"), tmp_path / "meta")
    size = (tmp_path / "meta" / "consolidated.00.pth").stat().st_size
    assert size < sum(p.nbytes for p in model.parameters()) + 50000
    assert torch.equal(load_llama(tmp_path / "meta")[0].norm.weight, norm)


def test_a_tokenizer_can_be_named(hf, tmp_path, capsys):
    (hf / "tokenizer.model").rename(tmp_path / "mine.model")
    for flags in ([], ["--tokenizer", tmp_path / "absent"]):
        assert "the sentencepiece file" in refused(capsys, import_hf, hf, tmp_path / "meta", *flags)
    assert run(import_hf, hf, tmp_path / "meta", "--tokenizer", tmp_path / "mine.model") == 0
    assert load_llama(tmp_path / "meta")[1].vocab_size == 768


def anonymous_memory():
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status")
    if not status.exists() or "RssAnon" not in status.read_text():
        pytest.skip("only Linux tells anonymous memory apart")
    return int(re.search(r"RssAnon:\s*(\d+)", status.read_text())[1]) * 1024


@pytest.mark.slow
def test_import_keeps_neither_the_model_nor_copies_of_its_rows_in_memory(hf, tmp_path):
    run(import_hf, hf, tmp_path / "first")  # PyTorch imports more at its first use
    # 96 MiB of wq and wk, 96 MiB of wv and wo
    model = tiny_model(dim=1024, n_layers=12, n_kv_heads=4, ffn_dim_multiplier=0.003)
    folder = write_hf(tmp_path / "large", {}, hidden_size=1024, intermediate_size=8,
                      num_hidden_layers=12, num_key_value_heads=4)
    hf_layout.write_safetensors(folder / "model.safetensors", hf_state(model))
    assert sum(p.nbytes for p in model.parameters()) > 192 * 2**20
    del model
    start = peak = anonymous_memory()
    stop = threading.Event()

    def watch():
        nonlocal peak
        while not stop.wait(0.001):
            peak = max(peak, anonymous_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        assert run(import_hf, folder, tmp_path / "meta") == 0
    finally:
        stop.set()
        thread.join()
    assert peak - start < 48 * 2**20


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("change, message", [
    ({"model_type": "mistral"}, "model_type is 'mistral', not 'llama'"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear', not 'default'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
    ({"rope_scaling": "dynamic"}, "rope_type is 'dynamic'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
     "hidden_act is 'gelu', not 'silu'; attention_bias is True, not False; mlp_bias is True"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*gptq"),
    ({"head_dim": 16}, "head_dim is 16"),
    ({"num_attention_heads": 5}, "an even multiple of n_heads 5"),
    ({"num_key_value_heads": 3}, "a multiple of n_kv_heads 3"),
    ({"hidden_size": "32"}, "hidden_size is '32'"),
    ({"num_hidden_layers": 10**30}, "num_hidden_layers is 1000"),
    ({"num_hidden_layers": 10**6}, "holds 21 tensors, too few for the 1000000 layers"),
    ({"rms_norm_eps": float("nan")}, "it holds NaN"),
    ({"rope_theta": float("inf")}, "it holds Infinity"),
    ({"intermediate_size": None}, "intermediate_size is None"),
    ({"vocab_size": 700}, "768 pieces, the embedding 700 rows"),
    ({"vocab_size": 769}, r"embed_tokens.weight in .* is \(768, 32\), .* asks for \(769"),
    ({"intermediate_size": 96}, r"gate_proj.weight in .* is \(88, 32\)"),
    ({"tie_word_embeddings": True}, "ties its output to the embedding .* another lm_head"),
])
def test_a_model_of_another_kind_is_refused_by_name(model, tmp_path, capsys, change, message):
    folder = write_hf(tmp_path / "hf", hf_state(model), **change)
    assert re.search(message, refused(capsys, import_hf, folder, tmp_path / "meta"))
    assert os.listdir(tmp_path) == ["hf"]


def without(state, name):
    return {key: weight for key, weight in state.items() if key != name}


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 13476925163\n"
NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


def text(name, content):
    """Damage: a file of the folder that holds this text."""
    return lambda folder, state: (folder / name).write_text(content)


def moved(old, new):
    """Damage: a file under another name."""
    def damage(folder, state):
        (folder / new).parent.mkdir(exist_ok=True)
        (folder / old).rename(folder / new)
    return damage


def weights_of(change, name="model.safetensors", **config):
    """Damage: other tensors, in this file alone."""
    def damage(folder, state):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(safetensors_bytes(change(state)))
        (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return damage


def cut_short(folder, state):
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    os.truncate(folder / "pytorch_model.bin", 9999)


@pytest.mark.parametrize("damage, message", [
    (moved("config.json", "config.txt"), "there is no .*config.json"),
    (text("config.json", LFS), "config.json is a Git LFS .*git lfs pull"),
    (text("tokenizer.model", LFS), "tokenizer.model is a Git LFS pointer"),
    (cut_short, "not a file of tensors alone: it is cut short, get it again"),
    (weights_of(lambda s: without(s, NORM), "model-00001-of-00003.safetensors"),
     r"lacks \['model-00002-of-00003.safetensors', 'model-00003-of-00003.safetensors'\]: get them"),
    (moved("config.json", "params.json"), "in Meta's layout already"),
    (moved("config.json", "adapter_config.json"), "official_adapter"),
    (moved("config.json", "in/config.json"), "hf/in has: give that folder"),
    (text("config.json", "{"), "config.json is not valid JSON"),
    (text("config.json", "[" * 100000), "config.json is not valid JSON"),
    (text("config.json", "[]"), "not a JSON object but list"),
    (lambda f, s: (f / "config.json").write_bytes(b"\xff\xfe{}"), "config.json is not valid JSON"),
    (text("config.json", '{"rms_norm_eps": 1e999, "model_type": "llama"}'), "is None, not a"),
    (moved("model.safetensors", "weights"), "holds no model.*give the folder"),
    (text("tokenizer.model", "x"), "not a sentencepiece model"),
    (lambda f, s: (f / "model-2.safetensors").write_bytes(safetensors_bytes(s)), "repeats"),
    (weights_of(lambda s: without(s, "model.embed_tokens.weight"), tie_word_embeddings=True),
     r"missing \['model.embed_tokens.weight'\]"),
    (weights_of(lambda s: {**s, "lm_head.weight": s["lm_head.weight"].bfloat16()},
                tie_word_embeddings=True), "holds another lm_head.weight"),
    (weights_of(lambda s: without(s, UP)), rf"missing \['{UP}'\], extra \[\]"),
    (weights_of(lambda s: {**s, BIAS: torch.zeros(32)}), rf"missing \[\], extra \['{BIAS}'\]"),
])
def test_a_damaged_folder_is_refused_with_its_remedy(model, hf, tmp_path, capsys, damage, message):
    damage(hf, hf_state(model))
    assert re.search(message, refused(capsys, import_hf, hf, tmp_path / "meta"))
    assert os.listdir(tmp_path) == ["hf"]


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def headed(header, data=bytes(8)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("content, message", [
    (b"", "not a whole safetensors file"),
    (LFS.encode(), "is a Git LFS pointer"),
    (struct.pack("<Q", 2**63) + b"{}", "not a whole safetensors file"),
    (headed(b'{"a": {}, "a": {}}'), "it holds a name twice"),
    (headed({"a": 1}), "'a' has no dtype, shape and data_offsets"),
    (headed({"a": {**ONE, "dtype": ["F32"]}}), "'a' has no dtype"),
    (headed({"a": {**ONE, "shape": [-2]}}), "'a' has no dtype"),
    (headed({"a": {**ONE, "shape": [True, 2]}}), "'a' has no dtype"),
    (headed({"a": {**ONE, "data_offsets": [-8, 0]}}), "'a' has no dtype"),
    (headed({"a": {**ONE, "data_offsets": [8, 0]}}), "has the offsets"),
    (headed({"a": {**ONE, "data_offsets": []}}), "'a' has no dtype"),
    (headed({"a": {**ONE, "shape": [3]}}), "12 bytes of F32"),
    (headed({"a": {**ONE, "dtype": "I8", "shape": [8]}}), "quantised or integer"),
    (headed({"a": ONE})[:-1], "do not fill its 7 bytes"),
    (headed({"a": ONE}, bytes(12)), "do not fill its 12 bytes"),
    (headed({"a": {**ONE, "data_offsets": [2**62, 2**62 + 8]}}), "do not fill its 8 bytes"),
    (headed({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, bytes(12)), "gap or overlap"),
])
def test_a_hostile_safetensors_file_is_refused_in_one_line(hf, tmp_path, capsys, content, message):
    (hf / "model.safetensors").write_bytes(content)
    assert re.search(message, refused(capsys, import_hf, hf, tmp_path / "meta"))
    assert os.listdir(tmp_path) == ["hf"]


def test_an_unaligned_file_and_an_empty_tensor_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(headed(b' {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
                            b'"b": {"dtype": "F32", "shape": [0, 3], "data_offsets": [8, 8]}}',
                            struct.pack("<2f", 1.5, -2.0)))
    read = hf_layout.read_safetensors(path)
    assert read["a"].tolist() == [1.5, -2.0] and read["b"].shape == (0, 3)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("content, message", [
    (lambda path: {"a": Evil(path)}, "not a file of tensors alone"),
    (lambda path: [torch.zeros(1)], "found list"),
    (lambda path: {"a": torch.zeros(2, dtype=torch.int8)}, "a is not a plain tensor of floating"),
    (lambda path: {"a": torch.ones(2).to_sparse()}, "a is not a plain tensor"),
    (lambda path: {"a": torch.ones(2, device="meta")}, "a is not a plain tensor"),
    (lambda path: {"a": 1}, "'a' is int, not a tensor"),
    (lambda path: {1: torch.zeros(2)}, "1 is Tensor, not a tensor"),
])
def test_a_pickle_that_holds_more_than_tensors_is_refused_and_runs_nothing(
        tmp_path, capsys, content, message):
    folder = write_hf(tmp_path / "hf", {}, kind="bin")
    torch.save(content(tmp_path / "owned"), folder / "pytorch_model.bin")
    assert message in refused(capsys, import_hf, folder, tmp_path / "meta")
    assert os.listdir(tmp_path) == ["hf"]


def test_an_existing_destination_is_left_alone(hf, weights, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    adapter = make_adapter(weights, tmp_path / "adapter.pt")
    for tool, argv in [(import_hf, [hf, out]), (export_hf, [weights, out]),
                       (official_adapter, [adapter, out, "--weights", weights]),
                       (to_lora, [adapter, out, "--weights", weights, "--constant", "uniform"])]:
        assert "exists already" in refused(capsys, tool, *argv)
    assert os.listdir(out) == ["mine"]
    assert "there is no folder" in refused(capsys, import_hf, hf, tmp_path / "absent" / "out")
    assert "are not fetched" in refused(capsys, import_hf, "huggyllama/llama-7b", tmp_path / "new")
    for tool in (export_hf, import_hf):
        assert "is a file" in refused(capsys, tool, hf / "config.json", tmp_path / "new")


def test_export_says_when_the_length_is_a_default(weights, tmp_path, capsys):
    params = json.loads((weights / "params.json").read_text())
    (weights / "params.json").write_text(json.dumps({**params, "max_seq_len": 4096}))
    run(export_hf, weights, tmp_path / "a")
    assert "default" not in capsys.readouterr().out
    del params["max_seq_len"]
    (weights / "params.json").write_text(json.dumps(params))
    run(export_hf, weights, tmp_path / "b")
    assert "max_position_embeddings is 4096, a default" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_leaves_nothing(hf, weights, tmp_path, capsys):
    adapter = make_adapter(weights, tmp_path / "adapter.pt", rank=64, heads=1)
    run(official_adapter, adapter, tmp_path / "theirs", "--weights", weights)
    names = sorted(os.listdir(tmp_path))
    out = tmp_path / "out"
    for tool, argv in [(import_hf, [hf, out]), (export_hf, [weights, out]),
                       (official_adapter, [adapter, out, "--weights", weights]),
                       (official_adapter, [tmp_path / "theirs", out, "--weights", weights]),
                       (to_lora, [adapter, out, "--weights", weights])]:
        with file_size_limit(20_000):  # as on a full disk
            line = refused(capsys, tool, *argv)
        assert re.search("File too large|disk full", line)
        assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("module, place", [
    (hf_layout, "write_safetensors"), (import_hf, "save_llama")])
def test_ctrl_c_leaves_nothing_and_exits_130(hf, tmp_path, capsys, monkeypatch, module, place):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, place, interrupted)
    assert run(import_hf, hf, tmp_path / "meta") == 130
    assert capsys.readouterr().err == "import_hf.py: interrupted; nothing was written\n"
    assert os.listdir(tmp_path) == ["hf"]
