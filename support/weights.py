"""What a path given as --weights or --adapter really holds, said before a loader's own words.

    with explained_weights(folder):
        model, tokenizer = load_llama(folder)
    with explained_adapter(path):
        load_adapter(model, path)

Inside, a refusal is replaced by a better one where a look at the files finds the cause: another
layout, a Git LFS pointer, a shard that is missing.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import torch

from model import SPLIT_DIM, Transformer, open_shard, read_params

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(path):
    """Whether the file is the small text that Git LFS leaves in place of a large file."""
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def refuse_lfs_pointer(path):
    """Raises ValueError where the file is a Git LFS pointer."""
    if Path(path).is_file() and is_lfs_pointer(path):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in "
                         "its repository, or download the file")


@contextmanager
def explained_weights(folder):
    """Inside, a ValueError of a loader becomes one that names what the folder holds, where that
    explains it."""
    try:
        yield
    except ValueError as error:
        explain_weights(Path(folder))
        raise error


def explain_weights(folder):
    """Raises ValueError where a look at the folder shows why it cannot be loaded."""
    if not folder.exists():
        raise ValueError(f"{folder} does not exist: give the path of a checkpoint's folder; names "
                         "of a hub are not fetched")
    if not folder.is_dir():
        refuse_lfs_pointer(folder)
        raise ValueError(f"{folder} is a file: give the folder that holds params.json, "
                         "consolidated.NN.pth and tokenizer.model")
    for path in sorted(folder.iterdir()):
        refuse_lfs_pointer(path)
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter in PEFT's format, not a model: give the base "
                         "model as --weights; python -m tools.official_adapter reads adapters of "
                         "HydraLoRA's code")
    if not (folder / "params.json").exists():
        if (folder / "config.json").exists():
            raise ValueError(f"{folder} is in Hugging Face's layout: python -m tools.import_hf "
                             f"{folder} NEW-FOLDER makes a folder that can be given here")
        if llama2c := sorted([*folder.glob("*.pt"), *folder.glob("*.bin")]):
            raise ValueError(f"{folder} has no params.json; is {llama2c[0].name} a checkpoint of "
                             "llama2.c? python -m tools.import_llama2c reads those")
    elif missing := missing_shards(folder):
        raise ValueError(f"{folder} holds a part of every split tensor: {', '.join(missing)} "
                         f"{'is' if len(missing) == 1 else 'are'} missing")


def missing_shards(folder):
    """Names of shards that are not there, found from the shapes; none where that is no cause."""
    try:
        paths = sorted(folder.glob("consolidated.*.pth"))
        args, held = read_params(folder), [open_shard(path) for path in paths]
        if args.vocab_size == -1:
            args.vocab_size = held[0]["tok_embeddings.weight"].shape[0]
        with torch.device("meta"):
            wanted = {name: p.shape for name, p in Transformer(args).named_parameters()}
        shares = set()
        for name, shape in wanted.items():
            split = SPLIT_DIM.get(name.split(".")[-2])
            if split is not None:
                shares.add(shape[split] / sum(part[name].shape[split] for part in held))
    except (ValueError, KeyError, IndexError, RuntimeError, ZeroDivisionError):
        return []
    share = shares.pop() if len(shares) == 1 else 1
    if share <= 1 or share != int(share):
        return []
    names = [f"consolidated.{i:02d}.pth" for i in range(int(share) * len(paths))]
    return [name for name in names if not (folder / name).exists()]


@contextmanager
def explained_adapter(path):
    """Inside, a ValueError of load_adapter becomes one that names what the path holds, where that
    explains it."""
    try:
        yield
    except ValueError as error:
        explain_adapter(Path(path))
        raise error


def explain_adapter(path):
    """Raises ValueError where a look at the path shows why it is no adapter of this project."""
    folder = path if path.is_dir() else path.parent
    foreign = path.suffix in (".bin", ".safetensors") or path.is_dir()
    if foreign and (folder / "adapter_config.json").is_file():
        try:
            ours = "lora_nums" in json.loads((folder / "adapter_config.json").read_text("utf-8"))
        except (ValueError, TypeError):
            ours = False
        if ours:
            raise ValueError(f"{path} is an adapter of HydraLoRA's own code: python -m "
                             f"tools.official_adapter {folder} adapter.pt makes one that can be "
                             "given here")
        raise ValueError(f"{path} is an adapter in PEFT's format: python -m tools.official_adapter "
                         "reads those of HydraLoRA's own code; an ordinary LoRA is not read")
    if path.is_dir():
        if (path / "adapter.pt").is_file():
            raise ValueError(f"{path} is a folder: give the file {path / 'adapter.pt'}")
        raise ValueError(f"{path} is a folder without an adapter.pt: give the file of an adapter")
    refuse_lfs_pointer(path)


def named_length(folder):
    """The longest sequence that the folder's params.json names, None where it names none."""
    try:
        return json.loads((Path(folder) / "params.json").read_text("utf-8")).get("max_seq_len")
    except (OSError, ValueError, AttributeError):
        return None


def shown_length(args, folder):
    """The model's longest sequence as a message names it: a default is called one, since the model
    may have been made for another."""
    if args.max_seq_len != type(args).max_seq_len or named_length(folder):
        return f"{args.max_seq_len}"
    return (f"{args.max_seq_len} (a default: {folder}/params.json names no max_seq_len; write the "
            "model's own there, 2048 for LLaMA 1, 16384 for CodeLlama)")
