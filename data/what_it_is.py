"""What a path leads to instead of the file that was wanted, judged by its first bytes.

    check_is_file("train.jsonl", "data file")

One place for all that read files: records, quizzes, weights, tokenizers, downloads.
"""

import os
import re
from pathlib import Path

HEAD = 4096  # bytes
ANOTHER_TOKENIZER = "which cannot be used here: that of LLaMA 1 or 2 can, a sentencepiece file"
KINDS = {  # what a file begins with: what it is, and what to do
    rb"version https://git-lfs\.github\.com/spec/":
        "is a Git LFS pointer, not the file itself{size}: get it with `git lfs pull` in the "
        "repository that it was cloned with",
    rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head|\?xml|!--)":
        "is a web page, not the file itself: download it again by its own link",
    rb"\x1f\x8b": "is compressed with gzip: unpack it, as `gzip -d` does",
    rb"BZh\d": "is compressed with bzip2: unpack it, as `bzip2 -d` does",
    rb"\xfd7zXZ\0": "is compressed with xz: unpack it, as `xz -d` does",
    rb"\x28\xb5\x2f\xfd": "is compressed with zstd: unpack it, as `zstd -d` does",
    rb"7z\xbc\xaf": "is a 7z archive: unpack it",
    rb"GGUF": "is a GGUF file of llama.cpp, which is not read: take the original",
    rb"PAR1": "is a Parquet file: convert it to JSON lines, as `pandas` does",
    rb"[A-Za-z0-9+/]+=* \d+\r?\n": f"is a tokenizer of Llama 3, {ANOTHER_TOKENIZER}",
    rb"\s*\{.*\"(num_vocab_tokens|default_vocab_size|token_bytes)\"":
        f"is Mistral's tokenizer tekken, {ANOTHER_TOKENIZER}",
    rb"\s*\{\s*\"version\".*\"added_tokens\"":
        f"is Hugging Face's tokenizer.json, {ANOTHER_TOKENIZER}",
}


def kind_of(head):
    """What a file with these first bytes is, as the end of a sentence; None if nothing that is
    known here. A real input of this project is nothing known."""
    for pattern, words in KINDS.items():
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            size = re.search(rb"size (\d{1,18})", head)
            return words.format(size=f" of {int(size[1]):,} bytes" if size else "")
    return None


def what_it_is(path):
    """Why a path is not the file that its name promises, and what to do; None if it may be, or
    if nothing is there."""
    path = Path(path)
    if path.is_symlink() and not path.exists():
        return (f"{path} is a link to {os.readlink(path)}, a file that is not there: download it "
                "again")
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if entry.name[0] != ".")
        such = f", such as {', '.join(names[:4])}" if names else ""
        return f"{path} is a folder: give a file in it{such}"
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            kind = kind_of(file.read(HEAD))
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return kind and f"{path} {kind}"


def check_is_file(path, kind):
    """Raises ValueError if there is no file of that kind at path."""
    if reason := what_it_is(path):
        raise ValueError(reason)
    if not Path(path).is_file():
        raise ValueError(f"there is no {kind} at {path}")
