"""Dolly-15K (databricks, CC-BY-SA-3.0), the data of HydraLoRA section 4, for train.py.

Takes the public file, downloaded or already on disk, checks it, and writes it unchanged,
for `train.py --data data/dolly/databricks-dolly-15k.jsonl`.

    python -m data.prepare_dolly                         # downloads 13 MB
    python -m data.prepare_dolly --source my-dolly.jsonl
"""

import collections
import hashlib
import json

from data import download

URL = ("https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/"
       "databricks-dolly-15k.jsonl")
# of the file at URL since commit d72c16e, as the repository's Git LFS pointer states it
SHA256 = "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec"
RECORDS = 15_011
FIELDS = {"instruction", "context", "response", "category"}
CATEGORIES = {"brainstorming", "classification", "closed_qa", "creative_writing", "general_qa",
              "information_extraction", "open_qa", "summarization"}


def count_categories(data):
    """Records per category. Raises ValueError if the file is not the whole of Dolly."""
    counts = collections.Counter()
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        texts = isinstance(record, dict) and all(isinstance(x, str) for x in record.values())
        if not texts or set(record) != FIELDS or record["category"] not in CATEGORIES:
            raise ValueError(f"line {number}: {line[:60]!r} is no record of Dolly; get the "
                             "file again")
        counts[record["category"]] += 1
    if counts.total() != RECORDS or set(counts) != CATEGORIES:
        raise ValueError(f"found {counts.total():,} records in {len(counts)} categories, "
                         f"expected {RECORDS:,} in {len(CATEGORIES)}: the file is cut short or "
                         "another edition; get it again")
    return counts


def prepare(source, out):
    if out.exists() and not out.is_file():
        raise ValueError(f"{out} is not a file: choose another --out")
    with download.open_source(source) as file:
        data = file.read()
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != SHA256 and download.is_url(source):
        raise ValueError(f"the download has sha256 {sha256}, expected {SHA256}: try again, "
                         "or get the file another way and pass its path with --source")
    counts = count_categories(data)
    if out.exists() and out.read_bytes() != data:
        raise ValueError(f"{out} exists and differs from {source}: move it away, or choose "
                         "another --out")
    download.write_atomic(out, {out: data})
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
    download.run("prepare_dolly.py", prepare, argv, url=URL,
                 purpose="Check Dolly-15K and lay it out for train.py.",
                 source_help="a file on disk, or a URL to download",
                 out="data/dolly/databricks-dolly-15k.jsonl")


if __name__ == "__main__":
    main()
