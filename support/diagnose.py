"""What a path really holds, said where it is refused: the reason in one line, with the next step.

    with explained(weights=args.weights, adapter=args.adapter):
        model, tokenizer = load_llama(args.weights)
        load_adapter(model, args.adapter)

model.py and hydralora.py say what they wanted. This module looks at what is there instead: another
layout, a Git LFS pointer, a shard too few. It runs only after a refusal, and answers only where it
is certain. The length of a model is explained here too, since Meta's params.json does not say it.
"""

import json
import re
import zipfile
from fractions import Fraction
from pathlib import Path

import torch

from model import SPLIT_DIM, Transformer, open_shard, read_params
from support.files import placeholder_reason, read_json, read_torch

HUB = "names of a hub are not fetched: download it, and give its folder"
# how files of PyTorch begin: an archive, and before 1.6 a pickled number
ARCHIVE, BEFORE_1_6 = b"PK", b"\x80\x02\x8a\nl\xfc\x9cF\xf9"
MANY_SPARE = 0.1  # of an embedding's rows, from which a warning asks about the tokenizer


def diagnose(error, args):
    """A better text for a ValueError, found by looking at the paths in args that were read: a
    folder in Meta's layout, an adapter, a folder of Hugging Face, data files. None if its own
    words are the best."""
    if not isinstance(error, ValueError):
        return None
    looks = [(diagnose_weights, "weights"), (diagnose_adapter, "adapter"),
             (diagnose_source, "source"), (placeholder_reason, "data"),
             (placeholder_reason, "val_data"), (placeholder_reason, "keep_data")]
    for look, name in looks:
        path = getattr(args, name, None)
        reason = look(Path(path)) if path else None
        if reason:
            return reason
    adapter = getattr(args, "adapter", None)
    if str(error).startswith(f"{adapter} ") and isinstance(error.__cause__, RuntimeError):
        return f"{adapter} is not an adapter of this project: it is damaged, copy it again"
    return None


# ---------------------------------------------------------------- a folder in Meta's layout


def diagnose_weights(folder):
    """Why load_llama refuses the folder, or None where its own words are the best."""
    if not folder.is_dir():
        return file_for_folder(folder) if folder.exists() else f"there is no folder {folder}; {HUB}"
    names = {path.name for path in folder.iterdir()}
    if "params.json" not in names:
        return other_layout(folder, names)
    shards = sorted(folder.glob("consolidated.*.pth"))
    for path in [folder / "params.json", folder / "tokenizer.model", *shards]:
        if reason := placeholder_reason(path):
            return reason
    return tokenizer_reason(folder, names) or shards_reason(folder, shards)


def file_for_folder(path):
    """What to do with a file that was given as the weights."""
    if path.name == "params.json" or path.name.startswith("consolidated."):
        return f"{path} is a file: give its folder, {path.parent}"
    if (path.parent / "config.json").is_file():
        return (f"{path} is a file of Hugging Face's layout: `python -m tools.import_hf "
                f"{path.parent} NEW_FOLDER` makes a folder of it that can be given here")
    if path.suffix in (".pt", ".bin"):
        return (f"{path} is a file: give a folder in Meta's layout; of a checkpoint of llama2.c "
                f"`python -m tools.import_llama2c {path} TOKENIZER.model NEW_FOLDER` makes one")
    return f"{path} is a file: give the folder of a checkpoint in Meta's layout"


def other_layout(folder, names):
    """What a folder without params.json is instead."""
    def held(*patterns):
        return any(Path(name).match(pattern) for name in names for pattern in patterns)

    if "adapter_config.json" in names:
        return f"{folder} holds an adapter of PEFT, not a model: give the base to --weights"
    if held("config.json", "model*.safetensors", "pytorch_model*.bin"):
        return (f"{folder} is in Hugging Face's layout: `python -m tools.import_hf {folder} "
                "NEW_FOLDER` makes a folder of it that can be given here")
    if held("tok*.model") and held("*.pt", "*.bin"):
        return (f"{folder} holds a checkpoint of llama2.c: `python -m tools.import_llama2c "
                f"{folder}/NAME.pt {folder}/TOKENIZER.model NEW_FOLDER` makes a folder of it that "
                "can be given here")
    if "adapter.pt" in names:
        return (f"{folder} holds an adapter, not a model: give {folder}/adapter.pt to --adapter, "
                "and its base to --weights")
    if held("*.gguf"):
        return f"{folder} holds a GGUF file of llama.cpp, which is not read: take the original"
    return inner_folder(folder, "params.json", "config.json")


def inner_folder(folder, *names):
    """Names a folder below, as in a cache of Hugging Face's hub, that holds one of the files."""
    for name in names:
        for depth in ("*", "*/*"):
            if found := sorted(folder.glob(f"{depth}/{name}")):
                return f"{folder} has no {name}, {found[0].parent} has: give that folder"
    return None


def tokenizer_reason(folder, names):
    path = folder / "tokenizer.model"
    if path.is_file():
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", path.read_bytes()[:200]):
            return f"{path} is a tokenizer of Llama 3, which cannot be used here: LLaMA 1 or 2 can"
        return None
    if (folder.absolute().parent / "tokenizer.model").is_file():  # where Meta's download puts it
        return (f"there is no tokenizer at {path}, but one in the folder above: copy it, if it is "
                "this model's")
    if "tokenizer.json" in names:
        return (f"{folder} has tokenizer.json but no tokenizer.model, the sentencepiece file that "
                "this project reads: take it from the model's original repository")
    return None


def shards_reason(folder, shards):
    """Names the shards that are missing: a gap in their numbers, or a part of every split tensor
    that no shard holds; or one that is damaged."""
    numbers = [int(path.name.split(".")[1]) for path in shards if path.name.split(".")[1].isdigit()]
    gap = [number for number in range(max(numbers, default=0)) if number not in numbers]
    if gap:
        return (f"{shard_names(gap)} missing from {folder}: shards are numbered without a gap, "
                f"found {[path.name for path in shards]}")
    for path in shards:
        if is_cut_short(path):
            return f"{path} is not a whole PyTorch checkpoint: it is cut short, get it again"
        if starts_with(path, BEFORE_1_6):
            return (f"{path} is not a whole PyTorch checkpoint that can be memory-mapped: it is in "
                    "the format of PyTorch before 1.6, get it in the newer one")
    try:
        share = held_share(folder, shards)
    except (ValueError, KeyError, IndexError):
        return None
    if share is None or share >= 1:
        return None
    count = max(len(shards) + 1, round(len(shards) / share))
    return (f"{shard_names(range(len(shards), count))} missing from {folder}: what is there holds "
            f"{share} of every tensor that is split over the shards")


def starts_with(path, head):
    with open(path, "rb") as file:
        return file.read(len(head)) == head


def is_cut_short(path):
    """Whether a file of torch.save lacks its end, where an archive has its directory."""
    return starts_with(path, ARCHIVE) and not zipfile.is_zipfile(path)


def shard_names(numbers):
    """"consolidated.01.pth is", or the first and the last of several with "are"."""
    first, last = (f"consolidated.{number:02d}.pth" for number in (numbers[0], numbers[-1]))
    return f"{first} is" if first == last else f"{first} to {last} are"


def held_share(folder, shards):
    """The share that all shards together hold of each tensor that Meta splits, if it is one and the
    same, and nothing else is wrong with a shape; else None."""
    args, parts = read_params(folder), [open_shard(path) for path in shards]
    if args.vocab_size == -1:
        args.vocab_size = len(parts[0]["tok_embeddings.weight"])
    if args.n_layers > len(parts[0]):
        return None
    with torch.device("meta"):
        wanted = {name: list(p.shape) for name, p in Transformer(args).named_parameters()}
    shares = set()
    for name, shape in wanted.items():
        found, dim = list(parts[0][name].shape), SPLIT_DIM.get(name.split(".")[-2])
        if dim is not None:
            found[dim] = sum(part[name].shape[dim] for part in parts)
            shares.add(Fraction(found[dim], shape[dim]))
            found[dim] = shape[dim]
        if found != shape:
            return None
    return shares.pop() if len(shares) == 1 else None


def warn_of_spare_rows(model, tokenizer, folder):
    """A line where so many rows of the embedding have no piece that another model's tokenizer is
    likely; such rows are allowed, and never drawn."""
    spare = model.args.vocab_size - tokenizer.vocab_size
    if spare > MANY_SPARE * model.args.vocab_size:
        print(f"warning: {spare} of the embedding's {model.args.vocab_size} rows have no piece in "
              f"{folder}/tokenizer.model: is it this model's own?")


# ---------------------------------------------------------------- an adapter


def diagnose_adapter(path):
    """Why load_adapter refuses the path, or None where its own words are the best."""
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return peft_reason(path)
        if (path / "adapter.pt").is_file():
            return f"{path} is a folder: give {path / 'adapter.pt'}"
        return f"{path} is a folder without an adapter.pt: give the file of a finished run"
    if not path.exists():
        stopped = (path.parent / "checkpoint.pt").is_file()
        return f"there is no adapter at {path}" + (
            ": its run has not ended, train.py goes on with it with --resume" if stopped else
            "; " + HUB.replace("its folder", "the file"))
    if reason := placeholder_reason(path):
        return reason
    if path.suffix == ".safetensors" or path.name == "adapter_model.bin":
        return peft_reason(path.parent)
    if is_cut_short(path):
        return f"{path} is not an adapter of this project: it is cut short, copy it again"
    try:
        content = read_torch(path, "an adapter")
    except ValueError:
        return None
    if isinstance(content, dict) and any(str(name).startswith("base_model.") for name in content):
        return peft_reason(path.parent)
    return None


def peft_reason(folder):
    """What can be done with an adapter in PEFT's layout: HydraLoRA's own code writes it too."""
    path = folder / "adapter_config.json"
    plain = path.is_file() and not placeholder_reason(path) and "lora_nums" not in read_json(path)
    return (f"{folder} holds an adapter in PEFT's layout: " + (
        "an ordinary LoRA (no lora_nums), which is not read here; tools.official_adapter converts "
        "those of HydraLoRA's code" if plain else
        f"`python -m tools.official_adapter {folder} adapter.pt --weights DIR` converts one that "
        "HydraLoRA's code wrote"))


# ---------------------------------------------------------------- a folder of Hugging Face


def diagnose_source(folder):
    """Why import_hf.py refuses the folder, or None where its own words are the best."""
    if not folder.is_dir():
        return (f"{folder} is a file: give its folder" if folder.exists() else
                f"there is no folder {folder}; {HUB}")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    read = [path for path in files if path.suffix in (".safetensors", ".bin")
            or path.name in ("config.json", "tokenizer.model")]
    for path in read:
        if reason := placeholder_reason(path):
            return reason
    names = {path.name for path in files}
    if "config.json" not in names:
        if "adapter_config.json" in names:
            return peft_reason(folder)
        if "params.json" in names:
            return f"{folder} is in Meta's layout already: give it to --weights as it is"
        return inner_folder(folder, "config.json")
    for path in files:  # model-00001-of-00002.safetensors
        if part := re.fullmatch(r"(.*)-\d{5}-of-(\d{5})(\.safetensors|\.bin)", path.name):
            stem, count, end = part.groups()
            wanted = [f"{stem}-{i + 1:05d}-of-{count}{end}" for i in range(int(count))]
            if missing := [name for name in wanted if name not in names]:
                return f"{folder} lacks {missing[:4]}: get {'it' if len(missing) == 1 else 'them'}"
    return None


# ---------------------------------------------------------------- the length of a model


def stated_length(weights):
    """The max_seq_len in params.json, or None: Meta's own files do not say it."""
    return json.loads((Path(weights) / "params.json").read_text("utf-8")).get("max_seq_len")


def model_length(weights, length):
    """The length of a model as a message says it: its own, or a default with the way to say
    another."""
    if stated_length(weights):
        return f"the {length} of the model in {weights}"
    return (f"{length}, a default, since {weights}/params.json says no length (where the model was "
            "made for another, write it there as max_seq_len; LLaMA 1: 2048, CodeLlama: 16384)")


def print_default_length(weights, length, asked=None):
    """A line about a length that is neither the model's own nor asked for."""
    if not asked and not stated_length(weights):
        print(f"prompts may have {model_length(weights, length)}")
