"""tools/import_llama2c.py: files as llama2.c writes them, made by hand, become the model."""

import os
import re
import struct

import pytest
import torch

from model import load_llama
from tests.conftest import WORLD, asset, file_size_limit, tiny_model
from tests.test_tools import Evil, refused, run, tokens
from tools import import_llama2c

TOKENIZER = WORLD / "base" / "tokenizer.model"
SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len")
BLOCK = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"]
WIDE = ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]


def tied_model(**changes):
    model = tiny_model(**changes)
    with torch.no_grad():
        model.output.weight.copy_(model.tok_embeddings.weight)
    return model


def write_pt(model, path, compiled=False, **shape):
    """What llama2.c's train.py saves: the output tied to the embedding, the optimiser beside it."""
    state = {("_orig_mod." if compiled else "") + name: t for name, t in model.state_dict().items()}
    shape = {**{name: getattr(model.args, name) for name in SHAPE}, "dropout": 0.0, **shape}
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
                "model_args": shape, "iter_num": 100000, "best_val_loss": torch.tensor(1.3),
                "config": {"out_dir": "out", "compile": True}}, path)
    return path


def floats(*tensors):
    return b"".join(t.detach().float().contiguous().numpy().tobytes() for t in tensors)


def of_layers(model, names):
    return [model.get_parameter(f"layers.{i}.{name}.weight") for name in names
            for i in range(model.args.n_layers)]


def numbers(model, vocab):
    args = model.args
    return struct.pack("<7i", args.dim, args.ffn_dim, args.n_layers, args.n_heads, args.n_kv_heads,
                       vocab, args.max_seq_len)


def write_legacy(model, path, tied):
    """The .bin of llama2.c's first export: the vocabulary's sign says whether the output is
    tied, and tables of rotary embedding come before an output of its own."""
    args = model.args
    tables = torch.full((2, args.max_seq_len, args.dim // args.n_heads // 2), 0.5)
    path.write_bytes(numbers(model, args.vocab_size if tied else -args.vocab_size) + floats(
        model.tok_embeddings.weight, *of_layers(model, ["attention_norm", *BLOCK]),
        *of_layers(model, ["ffn_norm", *WIDE]), model.norm.weight, tables,
        *([] if tied else [model.output.weight])))
    return path


def write_version_1(model, path, tied, version=1):
    head = struct.pack("<Ii", 0x616b3432, version) + numbers(model, model.args.vocab_size)
    path.write_bytes((head + bytes([tied])).ljust(256, b"\0") + floats(
        *of_layers(model, ["attention_norm", "ffn_norm"]), model.norm.weight,
        model.tok_embeddings.weight, *of_layers(model, [*BLOCK, *WIDE]),
        *([] if tied else [model.output.weight])))
    return path


WRITERS = {
    "pt": lambda model, path, tied: write_pt(model, path.with_suffix(".pt")),
    "compiled": lambda model, path, tied: write_pt(model, path.with_suffix(".pt"), compiled=True),
    "legacy": lambda model, path, tied: write_legacy(model, path.with_suffix(".bin"), tied),
    "version 1": lambda model, path, tied: write_version_1(model, path.with_suffix(".bin"), tied)}


@pytest.mark.parametrize("kind", ["tied", "untied", "stories260K"])
@pytest.mark.parametrize("form", WRITERS)
def test_an_imported_checkpoint_is_the_model_bit_for_bit(tmp_path, form, kind):
    model, pieces = tiny_model() if kind == "untied" else tied_model(), TOKENIZER
    with torch.no_grad():  # norms of one would hide two that changed places
        for p in model.parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1.5)
    if kind == "stories260K":
        model, _ = load_llama(asset("stories260k"), max_seq_len=512)
        pieces = asset("stories260k") / "tokenizer.model"
    path = WRITERS[form](model, tmp_path / "a", kind != "untied")
    assert run(import_llama2c, path, pieces, tmp_path / "meta") == 0
    loaded, tokenizer = load_llama(tmp_path / "meta")
    ids = tokens(2, 9) % tokenizer.vocab_size
    assert torch.equal(loaded(ids), model(ids))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))
    assert loaded.args.max_seq_len == model.args.max_seq_len
    with torch.no_grad():  # full fine-tuning must not change both at once
        loaded.output.weight.add_(1)
    assert torch.equal(loaded.tok_embeddings.weight, model.tok_embeddings.weight)
    assert sorted(os.listdir(tmp_path)) == [path.name, "meta"]


def of_pt(change=lambda state: None, **shape):
    def write(path):
        path = write_pt(tied_model(), path.with_suffix(".pt"), **shape)
        content = torch.load(path, weights_only=True)
        change(content["model"])
        torch.save(content, path)
        return path
    return write


def of_bin(change):
    def write(path):
        content = write_legacy(tied_model(), path.with_suffix(".bin"), tied=True).read_bytes()
        path.with_suffix(".bin").write_bytes(change(content))
        return path.with_suffix(".bin")
    return write


def of_content(content):
    def write(path):
        torch.save(content, path.with_suffix(".pt"))
        return path.with_suffix(".pt")
    return write


@pytest.mark.parametrize("write, message", [
    (lambda path: path / "absent.pt", "No such file or directory"),
    (of_content([1]), "has no model and model_args"),
    (of_content({"model": {}, "model_args": {}}), "has no layers.0.feed_forward.w1.weight"),
    (of_content({"model": {"a": 1}, "model_args": {}}), "a.pt: 'a' is int, not a tensor"),
    (of_content({"model_args": Evil("trap")}), "is not a checkpoint of llama2.c"),
    (of_pt(n_layers=3), "do not fit its config: missing ['layers.2"),
    (of_pt(n_layers=10**6), "a layer is missing"), (of_pt(dim="32"), "dim is '32'"),
    (of_pt(n_heads=5), "an even multiple of n_heads 5"), (of_pt(n_kv_heads=3), "of n_kv_heads 3"),
    (of_pt(vocab_size=769), "is (768, 32), its config asks for (769, 32)"),
    (of_pt(vocab_size=None), "vocab_size is None"),
    (of_pt(lambda s: s.pop("norm.weight")), "missing ['norm.weight'], extra []"),
    (of_pt(lambda s: s.update(more=torch.ones(1))), "missing [], extra ['more']"),
    (of_bin(lambda b: b[:-1]), "ends before freqs_sin: it is cut short"),
    (of_bin(lambda b: b[:1000]), "ends before tok_embeddings.weight"),
    (of_bin(lambda b: b + b"\0\0"), "2 bytes after its last tensor"),
    (of_bin(lambda b: b""), "dim is 0"),
    (of_bin(lambda b: b[:8] + struct.pack("<i", 2**24 - 1) + b[12:]), "it is cut short"),
    (of_bin(lambda b: b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    (of_bin(lambda b: b"\xff" * 300), "is -1, not a number"),
    (lambda path: write_version_1(tied_model(), path.with_suffix(".bin"), True, version=2),
     "version 2, which is quantised"),
])
def test_a_file_that_is_no_checkpoint_of_llama2c_is_refused_and_nothing_is_written(
        tmp_path, monkeypatch, capsys, write, message):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a")
    before = sorted(os.listdir(tmp_path))
    line = refused(capsys, import_llama2c, path, TOKENIZER, tmp_path / "meta")
    assert message in line and not re.search("weights_only|torch.save|Stream", line)
    assert sorted(os.listdir(tmp_path)) == before


def test_the_tokenizer_of_another_model_is_refused(tmp_path, capsys):
    path = write_pt(tied_model(vocab_size=700), tmp_path / "a.pt")
    binary = tmp_path / "tok512.bin"
    binary.write_bytes(b"\0" * 64)
    for tokenizer, message in [(TOKENIZER, "768 pieces, the embedding 700 rows"),
                               (binary, "run.c's form of a tokenizer: give the .model"),
                               (tmp_path / "absent.model", "absent.model, the sentencepiece file")]:
        assert message in refused(capsys, import_llama2c, path, tokenizer, tmp_path / "meta")
    assert not (tmp_path / "meta").exists()


def test_a_full_disk_leaves_nothing(tmp_path, capsys):
    path = write_pt(tied_model(), tmp_path / "a.pt")
    with file_size_limit(20_000):
        refused(capsys, import_llama2c, path, TOKENIZER, tmp_path / "meta")
    assert os.listdir(tmp_path) == ["a.pt"]
