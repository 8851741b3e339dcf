"""Dolly-15K (databricks, CC-BY-SA-3.0), the data of HydraLoRA section 4, for train.py.

Takes the public file, downloaded or already on disk, checks it, and writes it
unchanged: 15,011 lines of JSON with the fields instruction, context, response and
category. Then `train.py --data data/dolly/databricks-dolly-15k.jsonl` reads it.

    python -m data.prepare_dolly                         # downloads 13 MB
    python -m data.prepare_dolly --source my-dolly.jsonl
"""

import argparse
import collections
import hashlib
import json
from pathlib import Path

from data.download import is_url, open_source, write_atomic

URL = ("https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/"
       "databricks-dolly-15k.jsonl")
# of the file at URL since commit d72c16e, as the repository's Git LFS pointer states it
SHA256 = "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec"
RECORDS = 15_011
FIELDS = {"instruction", "context", "response", "category"}
CATEGORIES = {"brainstorming", "classification", "closed_qa", "creative_writing", "general_qa",
              "information_extraction", "open_qa", "summarization"}


def category_of(line):
    """The category of one line. Raises ValueError if the line is not a Dolly record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"not JSON, it starts with {line[:30]!r}") from None
    if not isinstance(record, dict) or set(record) != FIELDS:
        raise ValueError(f"expected the fields {sorted(FIELDS)}, found {str(record)[:60]!r}")
    if not all(isinstance(value, str) for value in record.values()):
        raise ValueError("a field is not a string")
    if record["category"] not in CATEGORIES:
        raise ValueError(f"unknown category {record['category'][:30]!r}")
    return record["category"]


def count_categories(data):
    """Records per category. Raises ValueError if the file is not the whole of Dolly."""
    counts = collections.Counter()
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            counts[category_of(line)] += 1
        except ValueError as error:
            raise ValueError(f"line {number}: {error}; get the file again") from None
    if counts.total() != RECORDS or set(counts) != CATEGORIES:
        raise ValueError(f"found {counts.total():,} records in {len(counts)} categories, "
                         f"expected {RECORDS:,} in {len(CATEGORIES)}: the file is cut short or "
                         "another edition; get it again")
    return counts


def prepare(source, out):
    if out.exists() and not out.is_file():
        raise ValueError(f"{out} is not a file: choose another --out")
    with open_source(source) as file:
        data = file.read()
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != SHA256 and is_url(source):
        raise ValueError(f"the download has sha256 {sha256}, expected {SHA256}: try again, "
                         "or get the file another way and pass its path with --source")
    counts = count_categories(data)
    if out.exists() and out.read_bytes() != data:
        raise ValueError(f"{out} exists and differs from {source}: move it away, or choose "
                         "another --out")
    write_atomic(out, {out: data})
    for category, count in sorted(counts.items()):
        print(f"{category:<24}{count:>7,}")
    print(f"{'records':<24}{counts.total():>7,}")
    if sha256 == SHA256:
        print("sha256 of the public original")
    else:
        print("note: not the public original byte for byte; it has as many records with the "
              "same fields, perhaps in another order")
    print(f"wrote {out}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Check Dolly-15K and lay it out for train.py.")
    parser.add_argument("--source", default=URL,
                        help="a file on disk, or a URL to download; default: %(default)s")
    parser.add_argument("--out", type=Path, help="the file to write; default: %(default)s",
                        default=Path("data/dolly/databricks-dolly-15k.jsonl"))
    args = parser.parse_args(argv)
    try:
        prepare(args.source, args.out)
    except (OSError, ValueError) as error:
        parser.exit(2, f"prepare_dolly.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "prepare_dolly.py: interrupted; nothing is half written\n")


if __name__ == "__main__":
    main()
