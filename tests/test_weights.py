"""Checkpoints and adapters as people have them: other layouts, missing parts, published files."""

import json
import shutil
import struct

import pytest
import torch

import cluster
import eval_mmlu
import train
from hydralora import add_hydralora, save_adapter
from model import SPLIT_DIM, Tokenizer, generate, load_llama, save_llama
from support.weights import shown_length
from tests.conftest import WORLD, asset, tiny_model
from tools import export_hf, import_hf, import_llama2c, official_adapter, to_lora
from tools import generate as talk

TOKENIZER = WORLD / "base" / "tokenizer.model"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 13476925163\n"


@pytest.fixture
def data(tmp_path):
    lines = (WORLD / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:24]), encoding="utf-8")
    return tmp_path / "few.jsonl"


@pytest.fixture
def refusals(weights, data, tmp_path, capsys):
    """The lines in which every script that loads weights refuses a folder."""
    adapter = tmp_path / "mine.pt"
    model, _ = load_llama(weights)
    add_hydralora(model)
    save_adapter(model, adapter)

    def attempt(folder):
        folder = str(folder)
        calls = [(train, ["--weights", folder, "--data", str(data), "--device", "cpu", "--out",
                          str(tmp_path / "run")]),
                 (train, ["--weights", folder, "--dry-run", "--device", "cpu"]),
                 (cluster, ["--weights", folder, "--data", str(data), "--device", "cpu", "--out",
                            str(tmp_path / "c.json")]),
                 (eval_mmlu, ["--weights", folder, "--device", "cpu", "--out",
                              str(tmp_path / "m.json")]),
                 (talk, ["Say it.", "--weights", folder, "--device", "cpu"]),
                 (export_hf, [folder, str(tmp_path / "hf")]),
                 (official_adapter, [str(adapter), str(tmp_path / "theirs"), "--weights", folder]),
                 (to_lora, [str(adapter), str(tmp_path / "lora"), "--weights", folder])]
        lines = []
        for module, flags in calls:
            capsys.readouterr()
            status = module.main(flags)
            lines.append(capsys.readouterr().err)
            if "--dry-run" in flags and not status:
                lines.pop()  # it reads params.json alone
            else:
                assert status == 2 and lines[-1].count("\n") == 1, lines[-1]
            assert "weights_only" not in lines[-1:] and "torch.save" not in "".join(lines)
        return lines
    return attempt


def rewrite(folder, change):
    path = folder / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    path.unlink()
    torch.save(change(state) or state, path)


def half(state):
    return {name: t.chunk(2, SPLIT_DIM[name.split(".")[-2]])[0].clone()
            if name.split(".")[-2] in SPLIT_DIM else t for name, t in state.items()}


DAMAGE = {
    "absent": (lambda f: shutil.rmtree(f), "does not exist", "hub are not fetched"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), "is a file: give the folder"),
    "hugging face": (lambda f: ((f / "params.json").unlink(), (f / "config.json").write_text("{}")),
                     "Hugging Face's layout", "tools.import_hf"),
    "llama2.c": (lambda f: ((f / "params.json").unlink(), (f / "stories.pt").write_text("x")),
                 "tools.import_llama2c"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}") and (
        f / "params.json").unlink(), "PEFT's format", "official_adapter"),
    "pointer": (lambda f: (f / "consolidated.00.pth").write_text(POINTER),
                "consolidated.00.pth is a Git LFS pointer", "git lfs pull"),
    "pointer of the tokenizer": (lambda f: (f / "tokenizer.model").write_text(POINTER),
                                 "tokenizer.model is a Git LFS pointer"),
    "half": (lambda f: rewrite(f, half), "consolidated.01.pth is missing"),
    "a quarter": (lambda f: rewrite(f, lambda s: half(half(s))),
                  "consolidated.01.pth, consolidated.02.pth, consolidated.03.pth are missing")}


@pytest.mark.parametrize("case", DAMAGE)
def test_every_script_names_what_a_folder_really_holds(weights, refusals, tmp_path, case):
    damage, *words = DAMAGE[case]
    folder = shutil.copytree(weights, tmp_path / "given")
    damage(folder)
    lines = refusals(folder)
    assert len(lines) >= 7
    for line in lines:
        assert all(word in line for word in words), line


@pytest.mark.parametrize("make, words", [
    (lambda p: (p / "a.pt").write_text(POINTER) and p / "a.pt", ["Git LFS pointer"]),
    (lambda p: p / "absent.pt", ["absent.pt is not an adapter", "No such file"]),
    (lambda p: p, ["is a folder without an adapter.pt"]),
    (lambda p: (p / "adapter.pt").write_text("x") and p, ["give the file", "adapter.pt"]),
    (lambda p: (p / "adapter_config.json").write_text('{"r": 8}') and p, ["PEFT's format"]),
    (lambda p: (p / "adapter_config.json").write_text('{"lora_nums": 3}') and p,
     ["HydraLoRA's own code", "python -m tools.official_adapter"]),
    (lambda p: ((p / "adapter_config.json").write_text('{"lora_nums": 3}'),
                (p / "adapter_model.bin").write_text("x")) and p / "adapter_model.bin",
     ["tools.official_adapter"])], ids=range(7))
def test_what_is_given_as_an_adapter_is_named(weights, tmp_path, capsys, make, words):
    (tmp_path / "given").mkdir()
    given = make(tmp_path / "given")
    for module, flags in ((talk, ["Say it."]), (eval_mmlu, ["--limit", "1"])):
        status = module.main([*flags, "--weights", str(weights), "--adapter", str(given),
                              "--device", "cpu"])
        line = capsys.readouterr().err
        assert status == 2 and line.count("\n") == 1 and all(word in line for word in words), line


def test_the_rotary_buffers_of_llama_1_are_dropped_by_name(weights):
    before = load_llama(weights)[0].output.weight.clone()
    rewrite(weights, lambda s: {**s, "rope.freqs": torch.ones(4), **{
        f"layers.{i}.attention.inner_attention.rope.freqs": torch.ones(4) for i in range(2)}})
    assert torch.equal(load_llama(weights)[0].output.weight, before)
    rewrite(weights, lambda s: {**s, "layers.0.attention.freqs": torch.ones(4)})
    with pytest.raises(ValueError, match="extra .*attention.freqs"):
        load_llama(weights)


@pytest.mark.parametrize("extra", [1, 2000])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_rows_without_a_piece_are_loaded_never_drawn_and_decoded_to_nothing(
        tmp_path, extra, temperature):
    model = tiny_model(vocab_size=768 + extra)
    with torch.no_grad():  # the last row is by far the likeliest
        model.output.weight[-1] = 0
        model.norm.weight.fill_(1)
        model.output.weight[-1] = 50 * model.output.weight[:768].mean(0)
    save_llama(model, TOKENIZER, tmp_path / "w")
    model, tokenizer = load_llama(tmp_path / "w")
    text = generate(model, tokenizer, ["Say it.", ""], max_new_tokens=20, temperature=temperature)
    assert len(text) == 2
    assert tokenizer.decode([768, *tokenizer.encode("yes"), 768 + extra - 1]) == "yes"


def test_a_length_that_params_json_does_not_name_is_called_a_default(weights, data, tmp_path,
                                                                     capsys):
    model, _ = load_llama(weights)
    assert shown_length(model.args, weights) == "128"
    params = json.loads((weights / "params.json").read_text())
    del params["max_seq_len"]
    (weights / "params.json").write_text(json.dumps(params))
    words = f"4096 (a default: {weights}/params.json names no max_seq_len; write the model's own"
    run = ["--weights", str(weights), "--device", "cpu"]
    assert train.main([*run, "--data", str(data), "--max-seq-len", "9999", "--out",
                       str(tmp_path / "o")]) == 2
    assert words in capsys.readouterr().err
    assert talk.main(["a", *run, "--max-new-tokens", "5000"]) == 2
    assert words in capsys.readouterr().err
    assert train.main(["--dry-run", *run, "--gpu-memory", "1"]) == 0
    assert words in capsys.readouterr().out
    (weights / "params.json").write_text(json.dumps({**params, "max_seq_len": 2048}))
    assert train.main([*run, "--data", str(data), "--max-seq-len", "9999", "--out",
                       str(tmp_path / "o")]) == 2
    assert "more than the model's 2048: give less" in capsys.readouterr().err


# ---------------------------------------------------------------- llama2.c


def write_bin(model, path, version, tied):
    """What llama2.c's export writes, written here after the format's description."""
    args, layers = model.args, model.layers
    vocab = args.vocab_size if tied or version else -args.vocab_size
    header = struct.pack("<7i", args.dim, args.ffn_dim, args.n_layers, args.n_heads,
                         args.n_kv_heads, vocab, args.max_seq_len)
    norms = [[b.attention_norm.weight for b in layers], [b.ffn_norm.weight for b in layers]]
    attention = [getattr(b.attention, n).weight for n in ("wq", "wk", "wv", "wo") for b in layers]
    ffn = [getattr(b.feed_forward, n).weight for n in ("w1", "w2", "w3") for b in layers]
    rotary = torch.zeros(args.max_seq_len * args.dim // args.n_heads)
    if version:
        header = struct.pack("<Ii", 0x616b3432, version) + header + bytes([tied])
        header = header.ljust(256, b"\0")
        order = [*norms[0], *norms[1], model.norm.weight, model.tok_embeddings.weight, *attention,
                 *ffn]
    else:
        order = [model.tok_embeddings.weight, *norms[0], *attention, *norms[1], *ffn,
                 model.norm.weight, rotary]
    order += [] if tied else [model.output.weight]
    path.write_bytes(header + b"".join(t.detach().float().numpy().tobytes() for t in order))


def write_pt(model, path):
    args = model.args
    state = {f"_orig_mod.{name}": t for name, t in model.state_dict().items()}
    torch.save({"model": {**state, "_orig_mod.freqs_cos": torch.ones(3)}, "model_args": dict(
        dim=args.dim, n_layers=args.n_layers, n_heads=args.n_heads, n_kv_heads=args.n_kv_heads,
        vocab_size=args.vocab_size, multiple_of=4, max_seq_len=args.max_seq_len, dropout=0.0),
        "iter_num": 7, "optimizer": {}}, path)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("form", ["pt", "bin 0", "bin 1"])
def test_a_checkpoint_of_llama2c_is_the_model_bit_for_bit(tmp_path, form, tied):
    model = tiny_model(n_layers=3, multiple_of=24)
    if tied:
        model.output.weight = model.tok_embeddings.weight
    source = tmp_path / f"stories.{form.split()[0]}"
    if form == "pt":
        write_pt(model, source)
    else:
        write_bin(model, source, int(form[-1]), tied)
    assert import_llama2c.main([str(source), str(TOKENIZER), str(tmp_path / "w")]) == 0
    loaded, _ = load_llama(tmp_path / "w")
    assert loaded.args.max_seq_len == 128 and loaded.args.ffn_dim == model.args.ffn_dim
    state = model.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in loaded.state_dict().items())


@pytest.mark.parametrize("damage, words", [
    (lambda p: p.write_bytes(p.read_bytes()[:-4]), "its header asks for"),
    (lambda p: p.write_bytes(b"abc"), "not a .bin of llama2.c"),
    (lambda p: p.write_bytes(struct.pack("<Ii", 0x616b3432, 2).ljust(300, b"\1")), "quantised"),
    (lambda p: p.write_text(POINTER), "Git LFS pointer"), (lambda p: p.unlink(), "there is no file")
], ids=range(5))
def test_a_damaged_file_of_llama2c_is_refused_and_leaves_nothing(tmp_path, capsys, damage, words):
    source = tmp_path / "stories.bin"
    write_bin(tiny_model(), source, 0, True)
    damage(source)
    before = sorted(tmp_path.iterdir())
    assert import_llama2c.main([str(source), str(TOKENIZER), str(tmp_path / "w")]) == 2
    assert words in (line := capsys.readouterr().err) and line.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_stories260k_as_published_tells_its_story(tmp_path):
    """The public .pt and tok512.model, made again from the folder in Meta's layout."""
    folder = asset("stories260k")
    model, _ = load_llama(folder, dtype=torch.float32)
    write_pt(model, tmp_path / "stories260K.pt")
    shutil.copy(folder / "tokenizer.model", tmp_path / "tok512.model")
    assert import_llama2c.main([str(tmp_path / "stories260K.pt"), str(tmp_path / "tok512.model"),
                                str(tmp_path / "stories260K")]) == 0
    again, tokenizer = load_llama(tmp_path / "stories260K")
    want = (folder / "expected_greedy.txt").read_text(encoding="utf-8")
    assert want.startswith(generate(again, tokenizer, [""], max_new_tokens=40)[0].strip()[:80])


# ---------------------------------------------------------------- Hugging Face


def test_import_knows_the_first_spellings_and_names_what_it_leaves_behind(weights, tmp_path,
                                                                          capsys):
    model = tiny_model(vocab_size=770)
    save_llama(model, TOKENIZER, tmp_path / "meta")
    assert export_hf.main([str(tmp_path / "meta"), str(tmp_path / "hf")]) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["max_position_embeddings"]
    config |= {"architectures": ["LLaMAForCausalLM"], "max_sequence_length": 99,
               "eos_token_id": 769}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "added_tokens.json").write_text('{"<|im_start|>": 768, "<|im_end|>": 769}')
    capsys.readouterr()
    assert import_hf.main([str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    out = capsys.readouterr().out
    assert "2 rows more than the tokenizer has pieces" in out
    assert "added_tokens.json is not carried over (<|im_start|>, <|im_end|>)" in out
    assert "eos_token_id 769 is beyond the tokenizer's pieces" in out
    assert load_llama(tmp_path / "ours")[0].args.max_seq_len == 99
    assert Tokenizer(tmp_path / "ours" / "tokenizer.model").vocab_size == 768


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model"])
def test_a_pointer_in_a_hugging_face_folder_is_named(weights, tmp_path, capsys, name):
    assert export_hf.main([str(weights), str(tmp_path / "hf")]) == 0
    (tmp_path / "hf" / name).write_text(POINTER)
    assert import_hf.main([str(tmp_path / "hf"), str(tmp_path / "ours")]) == 2
    assert f"{name} is a Git LFS pointer" in capsys.readouterr().err


def test_a_pointer_in_place_of_data_is_named(tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text(POINTER)
    assert train.main(["--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "o")]) == 2
    assert "d.jsonl is a Git LFS pointer" in capsys.readouterr().err
