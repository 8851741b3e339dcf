"""Why a path was refused, in one line with the next step, by looking at what is there.

    text = diagnose(error, args) or str(error)

model.py and hydralora.py report what they expected. This module looks at what is there
instead: another layout, a Git LFS pointer, a missing shard. It runs only after a
refusal (support/cli.py) and answers only if it is certain.
"""

import re
import zipfile
from fractions import Fraction
from pathlib import Path
from shlex import quote

from data.what_it_is import what_it_is
from model import open_shard, read_params
from support.cli import flag, one_line
from support.files import read_json, read_torch

HUB = "names of a hub are not fetched: download it, and give"
# Hugging Face's names of the layers in Meta's
HF_TARGETS = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1",
              "down_proj": "w2", "up_proj": "w3", "lm_head": "output"}
# what a file of torch.save is, by keys that it has
CONTENTS = {
    ("step", "optimizer", "tensors"): "a checkpoint of a run that was stopped: train.py with its "
                                      "flags and --resume ends it and writes adapter.pt",
    ("config", "base", "tensors"): "an adapter of this project",
    ("key", "features"): "a feature file of cluster.py",
    ("tok_embeddings.weight",): "a shard of a model in Meta's layout: give its folder to --weights",
    ("model.embed_tokens.weight",): "a part of a model in Hugging Face's layout: `python -m "
                                    "tools.import_hf` makes a folder of its folder",
}
ADAPTER_TOO = "{adapter}"  # where adapter_too goes
# first bytes of a torch.save file: an archive, before PyTorch 1.6 a pickled number
ARCHIVE = b"PK"
BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9"


def diagnose(error, args):
    """A better text for an error that names a path of the command line, found by looking
    at that path; None if the error's own words are the best."""
    looks = {"weights": diagnose_weights, "adapter": diagnose_adapter,
             "init_adapter": diagnose_adapter, "source": diagnose_source,
             "checkpoint": file_reason, "tokenizer": file_reason}
    for name, look in looks.items():
        path = getattr(args, name, None)
        if not path or str(Path(path)) not in str(error):
            continue
        try:
            reason = look(Path(path))
        except (ValueError, OSError):  # it cannot be read at all
            continue
        if reason:
            return reason.replace(ADAPTER_TOO, adapter_too(args, path))
    return hf_names_reason(args, error)


def adapter_too(args, folder):
    """Which flag takes the adapter in a folder, if the script has one."""
    names = [name for name in ("init_adapter", "adapter") if hasattr(args, name)]
    return f", and {Path(folder) / 'adapter.pt'} to {flag(names[0])}" if names else ""


def hf_names_reason(args, error):
    """What Hugging Face's names of layers, given to --targets, are called here."""
    known = [f"{name} is {HF_TARGETS[name]} here" for name in getattr(args, "targets", None) or []
             if name in HF_TARGETS and name in str(error)]
    return f"{one_line(error)}; {', '.join(known)}" if known else None


def file_reason(path):
    """What a file is instead of the one that was wanted; None if that is not certain."""
    if reason := what_it_is(path):
        return reason
    if not starts_with(path, ARCHIVE):
        return None
    if is_cut_short(path):
        return f"{path} is cut short: get it again"
    content = read_torch(path, "whole", mmap=True)
    for keys, words in CONTENTS.items():
        if isinstance(content, dict) and content.keys() >= set(keys):
            return f"{path} is {words}"
    return None


def import_command(folder):
    return (f"`python -m tools.import_hf {quote(str(folder))} NEW_FOLDER` makes a folder of it "
            "that can be given to --weights")


# ---------------------------------------------------------------- a folder in Meta's layout


def diagnose_weights(folder):
    """Why load_llama refuses the folder; None if its own words are the best."""
    if not folder.is_symlink() and not folder.exists():
        return f"there is no folder {folder}; {HUB} its folder"
    if not folder.is_dir():
        return instead_of_folder(folder)
    names = {path.name for path in folder.iterdir()}
    if "params.json" not in names:
        return layout_reason(folder, names)
    shards = sorted(folder.glob("consolidated.*.pth"))
    for path in [folder / "params.json", folder / "tokenizer.model", *shards]:
        if reason := what_it_is(path):
            return reason
    return tokenizer_reason(folder, names) or shards_reason(folder, shards)


def instead_of_folder(path):
    """What to do with a file that was given instead of a folder of weights."""
    if path.name == "params.json" or path.name.startswith("consolidated."):
        return f"{path} is a file: give its folder, {path.parent}"
    if (path.parent / "config.json").is_file():
        return f"{path} is a file in Hugging Face's layout: {import_command(path.parent)}"
    if reason := file_reason(path):
        return reason
    if path.suffix in (".pt", ".bin"):
        return (f"{path} is a file: give a folder in Meta's layout; `python -m "
                f"tools.import_llama2c {quote(str(path))} TOKENIZER.model NEW_FOLDER` makes one "
                "from a checkpoint of llama2.c")
    return f"{path} is a file: give the folder of a checkpoint in Meta's layout"


def layout_reason(folder, names):
    """What a folder without params.json is instead."""
    def has(*patterns):
        return any(Path(name).match(pattern) for name in names for pattern in patterns)

    if has("adapter_config.json"):
        return f"{folder} holds an adapter of PEFT, not a model: give the base to --weights"
    if has("config.json", "model*.safetensors", "pytorch_model*.bin"):
        return f"{folder} is in Hugging Face's layout: {import_command(folder)}"
    if has("adapter.pt"):
        return (f"{folder} holds an adapter, not a model: give the folder of its base"
                f"{ADAPTER_TOO}")
    if has("checkpoint.pt"):
        return (f"{folder} holds a stopped run, not a model: train.py with the run's own flags "
                "and --resume ends it")
    if has("tok*.model") and has("*.pt", "*.bin"):
        inside = quote(str(folder))
        return (f"{folder} holds a checkpoint of llama2.c: `python -m tools.import_llama2c "
                f"{inside}/NAME.pt {inside}/TOKENIZER.model NEW_FOLDER` makes a folder of it that "
                "can be given to --weights")
    if has("*.gguf"):
        return f"{folder} holds a GGUF file of llama.cpp, which is not read: take the original"
    if inner := inner_folder(folder, "params.json"):
        return f"{folder} has no params.json, {inner} has: give that folder"
    if inner := inner_folder(folder, "config.json"):
        return f"{inner} in {folder} is in Hugging Face's layout: {import_command(inner)}"
    return None


def inner_folder(folder, name):
    """A folder further down that holds the file, as in a hub's cache; None if there is none."""
    found = [path for depth in ("*", "*/*", "*/snapshots/*")
             for path in sorted(folder.glob(f"{depth}/{name}"))]
    return found[0].parent if found else None


def tokenizer_reason(folder, names):
    path = folder / "tokenizer.model"
    if path.is_file():
        return None
    # Meta's download puts it in the folder above
    if (folder.absolute().parent / "tokenizer.model").is_file():
        return (f"there is no tokenizer at {path}, but one in the folder above: copy it, if it "
                "is this model's")
    if "tokenizer.json" in names:
        return (f"{folder} has tokenizer.json but no tokenizer.model, the sentencepiece file "
                "that this project reads: take it from the model's original repository")
    return None


def shards_reason(folder, shards):
    """Names the shards that are missing, by a gap in their numbers or because a part of
    every split tensor is in no shard; or one that is damaged."""
    numbers = [path.name.split(".")[1] for path in shards]
    numbers = {int(number) for number in numbers if number.isdigit()}
    gap = [number for number in range(max(numbers, default=0)) if number not in numbers]
    if gap:
        return (f"{shard_names(gap)} missing from {folder}: shards are numbered without a gap, "
                f"found {[path.name for path in shards]}")
    for path in shards:
        if is_cut_short(path):
            return f"{path} is not a whole PyTorch checkpoint: it is cut short, get it again"
        if starts_with(path, BEFORE_1_6):
            return (f"{path} is not a whole PyTorch checkpoint that can be memory-mapped: it is "
                    "in the format of PyTorch before 1.6, get it in the newer one")
    part = present_part(folder, shards)
    if not part or part >= 1:
        return None
    count = max(len(shards) + 1, round(len(shards) / part))
    return (f"{shard_names(range(len(shards), count))} missing from {folder}: what is there "
            f"holds {part} of every tensor that is split over the shards")


def starts_with(path, head):
    with open(path, "rb") as file:
        return file.read(len(head)) == head


def is_cut_short(path):
    """Whether a torch.save file lacks its end, where an archive has its directory."""
    return starts_with(path, ARCHIVE) and not zipfile.is_zipfile(path)


def shard_names(numbers):
    """"consolidated.01.pth is", or the first and the last of several with "are"."""
    first, last = (f"consolidated.{number:02d}.pth" for number in (numbers[0], numbers[-1]))
    return f"{first} is" if first == last else f"{first} to {last} are"


def present_part(folder, shards):
    """The part of Meta's split tensors that all shards together hold, a Fraction,
    judged by wq, split by rows, and wo, split by columns. None if they differ."""
    dim, parts = read_params(folder).dim, set()
    for name, split in [("wq", 0), ("wo", 1)]:
        try:
            shapes = [open_shard(path)[f"layers.0.attention.{name}.weight"].shape
                      for path in shards]
        except (ValueError, KeyError):
            return None
        if any(len(shape) != 2 or shape[1 - split] != dim for shape in shapes):
            return None
        parts.add(Fraction(sum(shape[split] for shape in shapes), dim))
    return parts.pop() if len(parts) == 1 else None


# ---------------------------------------------------------------- an adapter


def diagnose_adapter(path):
    """Why load_adapter refuses the path; None if its own words are the best."""
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return peft_reason(path)
        if (path / "adapter.pt").is_file():
            return f"{path} is a folder: give {path / 'adapter.pt'}"
        return f"{path} is a folder without an adapter.pt: give the file of a finished run"
    if not path.is_symlink() and not path.exists():
        stopped = (path.parent / "checkpoint.pt").is_file()
        hint = ": its run was stopped, train.py --resume continues it" if stopped else (
            f"; {HUB} the file")
        return f"there is no adapter at {path}{hint}"
    if reason := what_it_is(path):
        return reason
    if path.suffix == ".safetensors" or path.name == "adapter_model.bin":
        return peft_reason(path.parent)
    if is_cut_short(path):
        return f"{path} is not an adapter of this project: it is cut short, copy it again"
    try:
        content = read_torch(path, "an adapter")
    except ValueError as error:
        if isinstance(error.__cause__, RuntimeError):  # an archive with damaged content
            return f"{path} is not an adapter of this project: it is damaged, copy it again"
        return None
    names = content if isinstance(content, dict) else {}
    if any(str(name).startswith("base_model.") for name in names):
        return peft_reason(path.parent)
    reason = None if names.keys() >= {"config", "base", "tensors"} else file_reason(path)
    return reason and reason.replace(" is ", " is not an adapter of this project: it is ", 1)


def peft_reason(folder):
    """What to do with an adapter in PEFT's layout. HydraLoRA's own code writes it too."""
    path = folder / "adapter_config.json"
    found = f"{folder} holds an adapter in PEFT's layout: "
    if path.is_file() and "lora_nums" not in read_json(path):
        return (found + "an ordinary LoRA (no lora_nums), which is not read here; "
                "tools.official_adapter converts those of HydraLoRA's code")
    return (found + f"`python -m tools.official_adapter {quote(str(folder))} adapter.pt "
            "--weights DIR` converts one that HydraLoRA's code wrote")


# ---------------------------------------------------------------- a folder of Hugging Face


def diagnose_source(folder):
    """Why tools.import_hf refuses the folder; None if its own words are the best."""
    if not folder.exists():
        return f"there is no folder {folder}; {HUB} its folder"
    if not folder.is_dir():
        return f"{folder} is a file: give its folder"
    names = {path.name for path in folder.iterdir()}
    if "config.json" not in names:
        if "adapter_config.json" in names:
            return peft_reason(folder)
        meta = folder if "params.json" in names else inner_folder(folder, "params.json")
        if meta:
            return f"{meta} is in Meta's layout already: give it to --weights as it is"
        inner = inner_folder(folder, "config.json")
        return f"{folder} has no config.json, {inner} has: give that folder" if inner else None
    for name in sorted(names):  # model-00001-of-00002.safetensors
        part = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})(\.safetensors|\.bin)", name)
        if part:
            stem, count, end = part.groups()
            wanted = [f"{stem}-{i + 1:05d}-of-{count}{end}" for i in range(int(count))]
            missing = [name for name in wanted if name not in names]
            if missing:
                them = "it" if len(missing) == 1 else "them"
                return f"{folder} lacks {missing[:4]}: get {them}"
    return None
