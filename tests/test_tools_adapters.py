"""tools.official_adapter, tools.to_lora, and tools.generate with prompts. test_tools_hf.py compares
with transformers and peft."""

import json
import os
import re
import sys

import pytest
import torch

from model import generate, load_llama
from tests.conftest import WORLD
from tests.test_tools import (
    greedy,
    make_adapter,
    official_folder,
    refused,
    run,
    safetensors_bytes,
    slow_answer,
    slow_gates,
    tokens,
    tuned,
    without,
)
from tools import export_hf, hf_layout, import_hf, official_adapter, to_lora
from tools import generate as talk

# ---------------------------------------------------------------- official_adapter


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj", "lm_head")


@pytest.mark.parametrize("targets, dtype", [
    (("gate_proj", "down_proj", "up_proj"), torch.bfloat16), (ALL, torch.float32)], ids=str)
def test_their_adapter_comes_back_exactly_from_our_format(model, weights, tmp_path, targets, dtype):
    before = official_folder(tmp_path / "theirs", model, targets, dtype=dtype)
    for source, out in [("theirs", "ours.pt"), ("ours.pt", "again")]:
        assert run(official_adapter, tmp_path / source, tmp_path / out, "--weights", weights) == 0
    after = torch.load(tmp_path / "again" / "adapter_model.bin", weights_only=True)
    assert before.keys() == after.keys() and after.popitem()[1].dtype == torch.float32
    assert all(torch.equal(before[name].float(), tensor) for name, tensor in after.items())
    want, got = (json.loads((tmp_path / name / "adapter_config.json").read_text())
                 for name in ("theirs", "again"))
    assert got == {**want, "base_model_name_or_path": "weights"}


@pytest.mark.parametrize("settings", [{"heads": 1}, {"heads": 3, "gate": "uniform"}], ids=str)
def test_an_adapter_without_a_router_gets_one_that_does_nothing(weights, tmp_path, settings):
    make_adapter(weights, tmp_path / "a.pt", **settings)
    run(official_adapter, tmp_path / "a.pt", tmp_path / "theirs", "--weights", weights)
    assert run(official_adapter, tmp_path / "theirs", tmp_path / "b.pt", "--weights", weights) == 0
    a, b = tuned(weights, tmp_path / "a.pt"), tuned(weights, tmp_path / "b.pt")
    assert torch.allclose(a(tokens(1, 9)), b(tokens(1, 9)), atol=1e-5)


def rename(tensors, old, new):
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("config, change, message", [
    ({"lora_nums": None}, None, "lora_nums is None"),
    ({"r": 10**7}, None, "has r 10000000 and lora_nums 3; .* rank .4. and 3 heads"),
    ({"lora_nums": 5}, None, "lora_nums 5; the tensors beside it have rank .4. and 3 heads"),
    ({"lora_alpha": None}, None, "lora_alpha is None"),
    ({"lora_dropout": "0.1"}, None, "lora_dropout is '0.1'"),
    ({"lora_dropout": 1.5}, None, "dropout must be in"),
    ({"target_modules": "all-linear"}, None, "target_modules is 'all-linear'"),
    ({"target_modules": ["gate_proj", "c_attn"]}, None, "c_attn"),
    ({"target_modules": ["gate_proj", "up_proj"]}, None, "fit its config: missing .., extra"),
    ({"bias": "all"}, None, "bias is 'all'"),
    ({"modules_to_save": ["embed_tokens"]}, None, "modules_to_save is"),
    ({"fan_in_fan_out": True}, None, "fan_in_fan_out is True"),
    ({}, lambda t: without(t, next(iter(t))), r"missing \['.*lora_A.weight'\], extra \[\]"),
    ({}, lambda t: rename(t, "layers.1.", "layers.7."), "missing .*layers.1.* extra .*layers.7"),
    ({}, lambda t: {name: x[..., :8] for name, x in t.items()}, r"\(4, 8\), .* asks for \(4, 32\)"),
    ({}, lambda t: {name: x.to(torch.int8) for name, x in t.items()}, "not a plain tensor"),
])
def test_a_foreign_adapter_is_refused_with_its_reason(model, weights, tmp_path, capsys, config,
                                                      change, message):
    tensors = official_folder(tmp_path / "theirs", model, **config)
    if change:
        torch.save(change(tensors), tmp_path / "theirs" / "adapter_model.bin")
    argv = [tmp_path / "theirs", tmp_path / "a.pt", "--weights", weights]
    assert re.search(message, refused(capsys, official_adapter, *argv))
    assert sorted(os.listdir(tmp_path)) == ["theirs", "weights"]


def test_a_file_that_is_neither_adapter_is_refused(model, weights, tmp_path, capsys):
    def attempt(source, out="out", *flags):
        return refused(capsys, official_adapter, source, tmp_path / out, "--weights", weights,
                       *flags)

    assert "adapter_model.bin: No such file or directory" in attempt(weights)
    assert "is not an adapter of this project" in attempt(weights / "consolidated.00.pth")
    assert "there is no adapter at" in attempt(tmp_path / "absent.pt")
    make_adapter(weights, tmp_path / "split.pt", share_a=False)
    assert "an A for every head" in attempt(tmp_path / "split.pt")
    official_folder(tmp_path / "theirs", model)
    assert "exists already" in attempt(tmp_path / "theirs", "split.pt")
    assert "--base is written into their format" in attempt(tmp_path / "theirs", "a.pt", "--base",
                                                            "x")
    config = tmp_path / "theirs" / "adapter_config.json"
    config.write_text('{"peft_type": "LORA", "r": 4}')
    assert "no lora_nums: an ordinary LoRA" in attempt(tmp_path / "theirs")
    config.unlink()
    assert "there is no" in attempt(tmp_path / "theirs")


# ---------------------------------------------------------------- to_lora


def merged(weights, lora, folder):
    """The model with an exported LoRA added to its weights, in Hugging Face's layout."""
    run(export_hf, weights, folder / "hf")
    state = hf_layout.read_safetensors(folder / "hf" / "model.safetensors")
    config = json.loads((lora / "adapter_config.json").read_text())
    tensors = hf_layout.read_safetensors(lora / "adapter_model.safetensors")
    for name in state:
        place = "base_model.model." + name.removesuffix(".weight")
        if f"{place}.lora_A.weight" in tensors:
            state[name] = state[name] + config["lora_alpha"] / config["r"] * (
                tensors[f"{place}.lora_B.weight"] @ tensors[f"{place}.lora_A.weight"])
    (folder / "hf" / "model.safetensors").write_bytes(safetensors_bytes(state))
    run(import_hf, folder / "hf", folder / "merged")
    return load_llama(folder / "merged")[0]


TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


@pytest.mark.parametrize("settings", [
    {"heads": 1}, {"heads": 1, "alpha": 5.0}, {"heads": 3, "gate": "uniform"},
    {"heads": 3, "gate": "uniform", "share_a": False}], ids=str)
def test_one_head_and_the_uniform_gate_are_exported_exactly(weights, tmp_path, capsys, settings):
    path = make_adapter(weights, tmp_path / "a.pt", TARGETS, **settings)
    assert run(to_lora, path, tmp_path / "lora", "--weights", weights) == 0
    assert "exact: " in capsys.readouterr().out
    want = tuned(weights, path)(tokens(2, 9))
    got = merged(weights, tmp_path / "lora", tmp_path)(tokens(2, 9))
    assert torch.allclose(got, want, atol=1e-4 * want.abs().max().item())


RECORDS = [{"instruction": f"What is {i} plus {i}?", "response": f"It is {2 * i}.",
            "category": "ab"[i % 2]}
           for i in range(40)]


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)))
    return path


def loss_of(model, tokenizer, records):
    """Mean over the response's tokens, record by record."""
    total = count = 0
    for record in records:
        ids = tokenizer.encode(record["instruction"], eos=True)
        new = tokenizer.encode(record["response"], bos=False, eos=True)
        with torch.no_grad():
            logp = model(torch.tensor([ids + new]))[0].log_softmax(-1)
        total -= sum(logp[len(ids) - 1 + i, token].item() for i, token in enumerate(new))
        count += len(new)
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("share_a", [True, False])
@pytest.mark.parametrize("gate", ["uniform", "calibrated"])
def test_several_heads_become_one_lora_whose_printed_loss_is_its_own(
        weights, tokenizer, records, tmp_path, capsys, gate, share_a):
    path = make_adapter(weights, tmp_path / "a.pt", TARGETS, share_a=share_a)
    argv = [path, tmp_path / "lora", "--weights", weights, "--constant", gate, "--val-data",
            records, "--dtype", "fp32", "--device", "cpu"]
    assert run(to_lora, *argv, *(["--data", records] if gate == "calibrated" else [])) == 0
    found = re.search(r"base (\S+), HydraLoRA (\S+), this LoRA (\S+) ", capsys.readouterr().out)
    base, before, after = map(float, found.groups())
    assert base == pytest.approx(loss_of(load_llama(weights)[0], tokenizer, RECORDS), abs=2e-4)
    assert before == pytest.approx(loss_of(tuned(weights, path), tokenizer, RECORDS), abs=2e-4)
    model = merged(weights, tmp_path / "lora", tmp_path)
    assert after == pytest.approx(loss_of(model, tokenizer, RECORDS), abs=2e-3)


def test_the_calibrated_gate_is_the_mean_over_every_token_of_the_data(
        weights, tokenizer, records, tmp_path):
    path = make_adapter(weights, tmp_path / "a.pt", ("w1",))
    run(to_lora, path, tmp_path / "lora", "--weights", weights, "--constant", "calibrated",
        "--data", records, "--val-data", records)
    model, seen = tuned(weights, path), []
    layer = model.layers[0].feed_forward.w1
    layer.register_forward_hook(lambda _, x, y: seen.append((layer.router @ x[0][0].T).softmax(0)))
    for record in RECORDS:
        ids = tokenizer.encode(record["instruction"], eos=True)
        ids += tokenizer.encode(record["response"], bos=False)  # its EOS is predicted, never read
        model(torch.tensor([ids]))
    w = torch.cat(seen, 1).mean(1)
    want = sum(w[i] * layer.lora_B[i] for i in range(3))
    got = hf_layout.read_safetensors(tmp_path / "lora" / "adapter_model.safetensors")
    assert torch.allclose(got["base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight"], want,
                          atol=1e-6)


def test_a_learned_gate_is_not_exported_without_a_constant(weights, records, tmp_path, capsys):
    path = make_adapter(weights, tmp_path / "a.pt")

    def attempt(*more):
        return refused(capsys, to_lora, path, tmp_path / "lora", "--weights", weights, *more)

    said = attempt()
    assert "3 heads and a router, which no single LoRA equals: choose --constant uniform" in said
    assert "--constant calibrated needs --data FILE" in attempt("--constant", "calibrated")
    assert "give --val-data FILE" in attempt("--constant", "uniform")
    assert "no data file" in attempt("--constant", "uniform", "--val-data", tmp_path / "absent")
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "records.jsonl", "weights"]


def test_without_val_data_a_share_of_the_data_is_held_out(weights, records, tmp_path, capsys):
    path = make_adapter(weights, tmp_path / "a.pt")
    run(to_lora, path, tmp_path / "lora", "--weights", weights, "--constant", "calibrated",
        "--data", records)
    assert "validation loss on 2 records" in capsys.readouterr().out  # 5 % of 40


# ---------------------------------------------------------------- generate


@pytest.fixture
def adapter(weights, tmp_path):
    return make_adapter(weights, tmp_path / "a.pt", dropout=0.5)


def spoken(capsys, *argv):
    assert run(talk, *argv) == 0
    return capsys.readouterr().out


def test_a_raw_prompt_streams_what_generate_returns(weights, adapter, tokenizer, capsys):
    prompts = ["the cook", "the old cook"]
    out = spoken(capsys, *prompts, "--weights", weights, "--adapter", adapter, "--raw",
                 "--max-new-tokens", 6, "--dtype", "fp32", "--device", "cpu")
    want = generate(tuned(weights, adapter), tokenizer, prompts, max_new_tokens=6)
    assert out == "".join(f"> {prompt}\nadapter:  {text}\n\n"
                          for prompt, text in zip(prompts, want))
    assert want[0].startswith(" ")  # a piece carries its own space


def test_compare_answers_an_instruction_with_the_base_and_with_the_adapter(
        weights, adapter, tokenizer, capsys):
    out = spoken(capsys, "What is 3?", "--weights", weights, "--adapter", adapter, "--compare",
                 "--max-new-tokens", 9)
    base = slow_answer(load_llama(weights)[0], tokenizer, "What is 3?", 9)
    base = base.replace("\x7f", "\\x7f")  # on a terminal it would act
    with_adapter = slow_answer(tuned(weights, adapter), tokenizer, "What is 3?", 9)
    assert out == f"> What is 3?\nbase:     {base}\nadapter:  {with_adapter}\n\n"
    assert base != with_adapter
    assert spoken(capsys, "What is 3?", "--weights", weights, "--max-new-tokens", 9) == (
        f"> What is 3?\nanswer:   {base}\n\n")


def test_chat_answers_each_prompt_after_the_turns_before_it_in_the_layout_of_training(
        weights, adapter, tokenizer, capsys):
    prompts, ids, want = ["What is 3?", "And 4?", "a cook"], [tokenizer.bos_id], ""
    model = tuned(weights, adapter)
    for prompt in prompts:
        ids += tokenizer.encode(prompt, bos=False, eos=True)
        new = greedy(model, tokenizer, ids, 5)
        want += f"> {prompt}\nadapter:  {talk.text_of(tokenizer, new)}\n\n"
        ids += [*new, tokenizer.eos_id]
    flags = ["--weights", weights, "--adapter", adapter, "--max-new-tokens", 5]
    assert spoken(capsys, *prompts, "--chat", *flags) == want
    assert spoken(capsys, *prompts, *flags) != want
    assert "--chat needs prompts" in refused(capsys, talk, "one", "--chat", "--raw", *flags)
    assert "exceed the 128" in refused(capsys, talk, *["one"] * 30, "--chat", *flags)


def test_a_character_is_printed_when_its_last_byte_is_known(tokenizer):
    ids = tokenizer.encode("naïve 😀!", bos=False)
    pieces = talk.text_pieces(tokenizer, ids)
    assert "".join(pieces) == "naïve 😀!" and "😀" in pieces and "" in pieces
    assert talk.text_of(tokenizer, ids[:-2]) == "naïve "  # the last byte of the 😀 is missing
    before = tokenizer.encode("the old")
    assert talk.text_pieces(tokenizer, tokenizer.encode("cook", bos=False), before)[0][0] == " "


def test_show_routing_marks_each_token_by_its_strongest_head(
        weights, adapter, tokenizer, capsys, monkeypatch):
    model, prompt = tuned(weights, adapter), tokenizer.encode("What is 3?", eos=True)
    new = greedy(model, tokenizer, prompt, 6)
    gates = slow_gates(model, prompt + new)
    layer = max(gates, key=lambda name: gates[name].std(0).mean())
    argv = ["What is 3?", "--weights", weights, "--adapter", adapter, "--show-routing",
            "--max-new-tokens", 6]
    out = spoken(capsys, *argv)
    assert "\033[" not in out  # not a terminal
    legend, text = out.split("\n\n")[1].split("\n", 1)
    assert f"in {layer}," in legend and "[1]head 1 [2]head 2 [3]head 3" in legend
    heads, want, last = gates[layer].argmax(-1).tolist(), "", None
    pieces = [*talk.text_pieces(tokenizer, prompt), *talk.text_pieces(tokenizer, new)]
    for i, (head, piece) in enumerate(zip(heads, pieces, strict=True)):
        want += " | " if i == len(prompt) else ""
        if piece:
            want += f"[{head + 1}]{piece}" if head != last else piece
            last = head
    assert text == want
    for name, gate in gates.items():
        row = "".join(f"{w:9.3f}" for w in gate.mean(0).tolist())
        assert f"{name:32}{row}\n" in out

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    coloured = spoken(capsys, *argv)
    assert f"\033[{talk.COLOURS[0]}mhead 1\033[0m" in coloured
    painted = coloured.split("\n\n")[1].split("\n", 1)[1]
    marked = re.findall(r"\033\[(\d+)m([^\033]*)\033\[0m", painted)
    assert "".join(piece for _, piece in marked) == re.sub(r"\[\d\]| \| ", "", text)
    monkeypatch.setenv("NO_COLOR", "")
    assert spoken(capsys, *argv) == out


def test_without_flags_the_first_commands_adapter_answers_records_of_the_world(
        tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "make it with `python train.py --heads 3 --rank 8`" in refused(capsys, talk)
    (tmp_path / "runs" / "hydralora").mkdir(parents=True)
    make_adapter(WORLD / "base", tmp_path / "runs" / "hydralora" / "adapter.pt", rank=8)
    monkeypatch.setattr(talk, "FAMILIES_SHOWN", 2)
    out = spoken(capsys, "--max-new-tokens", 4)
    assert out.count("> ") == out.count("\nexpected: ") == out.count("\nadapter:  ") == 2


def test_generate_refuses_impossible_flags_in_one_line(weights, adapter, tmp_path, capsys):
    def attempt(*argv):
        return refused(capsys, talk, "one", *argv)

    ours = ("--weights", weights, "--adapter", adapter)
    one = make_adapter(weights, tmp_path / "one.pt", heads=1)
    assert "exceed the 128 of the model in" in attempt("--weights", weights,
                                                        "--max-new-tokens", 126)
    params = json.loads((weights / "params.json").read_text())
    del params["max_seq_len"]
    (weights / "params.json").write_text(json.dumps(params))
    assert "exceed 4096, a default, since" in attempt("--weights", weights,
                                                      "--max-new-tokens", 4096)
    assert "exceed --max-seq-len 8: shorten" in attempt("--weights", weights, "--max-new-tokens", 6,
                                              "--max-seq-len", 8)
    assert "--compare needs --adapter" in attempt("--weights", weights, "--compare")
    assert "--show-routing needs --adapter" in attempt("--weights", weights, "--show-routing")
    assert "has no router" in attempt("--weights", weights, "--adapter", one, "--show-routing")
    assert "there is no adapter at" in attempt("--adapter", tmp_path / "absent.pt")
    assert "another base model" in attempt("--adapter", adapter)
    assert "has no params.json" in attempt("--weights", tmp_path)
    assert "--device nonsense cannot be used" in attempt(*ours, "--device", "nonsense")
    assert "--temperature must be at least 0" in attempt(*ours, "--temperature", -1)
    assert "--top-p must be above 0" in attempt(*ours, "--top-p", 0)
    assert "give a prompt" in refused(capsys, talk, *ours)


def test_generate_runs_in_bf16(weights, adapter, capsys):
    assert "adapter:" in spoken(capsys, "one", "--weights", weights, "--adapter", adapter,
                                "--dtype", "bf16", "--max-new-tokens", 2)


@pytest.mark.parametrize("tool", [official_adapter, to_lora])
def test_the_adapters_config_names_the_base(weights, tmp_path, capsys, tool):
    make_adapter(weights, tmp_path / "a.pt", heads=1)
    for flags, want in (([], "weights"), (["--base", "me/my-llama"], "me/my-llama")):
        out = tmp_path / f"out {len(flags)}"
        assert run(tool, tmp_path / "a.pt", out, "--weights", weights, *flags) == 0
        assert f'for the base model "{want}" (--base names another)' in capsys.readouterr().out
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == want


def test_a_lora_on_a_tied_output_gets_a_warning(weights, tmp_path, capsys):
    make_adapter(weights, tmp_path / "a.pt", ("output",), heads=1)
    run(to_lora, tmp_path / "a.pt", tmp_path / "one", "--weights", weights)
    assert "warning" not in capsys.readouterr().out
    shard = torch.load(weights / "consolidated.00.pth", weights_only=True)
    (weights / "consolidated.00.pth").unlink()
    torch.save({**shard, "output.weight": shard["tok_embeddings.weight"].clone()},
               weights / "consolidated.00.pth")
    make_adapter(weights, tmp_path / "a.pt", ("output",), heads=1)
    run(to_lora, tmp_path / "a.pt", tmp_path / "two", "--weights", weights)
    assert "warning: the base's output layer equals its embedding" in capsys.readouterr().out
