"""MMLU (Hendrycks et al., MIT), a benchmark of HydraLoRA section 4, for eval_mmlu.py.

Takes the public tar, downloaded or on disk, or the folder that it unpacks to, checks every
row, and copies the files SPLIT/SUBJECT_SPLIT.csv of dev, val and test and of its 57 subjects,
byte for byte, for `eval_mmlu.py --data data/mmlu`.

    python -m data.prepare_mmlu                   # downloads 166 MB, most of it auxiliary_train
    python -m data.prepare_mmlu --source data.tar
"""

import re
import tarfile
from pathlib import Path

from data import download
from data.mmlu import parse_rows

URL = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"
MIRROR = "https://huggingface.co/datasets/cais/mmlu/resolve/main/data.tar"
NAME = re.compile(r"(dev|val|test)/[a-z_]+_\1\.csv")
SUBJECTS = 57
# Two editions of val are in use: the present data.tar has 1531 rows; the authors' earlier
# upload (github.com/hendrycks/test, commit 8d4768d) has 11 more, some about absent figures.
ROWS = {"dev": (285,), "val": (1531, 1542), "test": (14042,)}
LARGEST = 16 * 2 ** 20  # bytes in one file; the largest real one has 1.9 MB


def read_tar(file):
    """The wanted files of a tar, {name: bytes}. Members are chosen by their whole name
    and never unpacked, so links, devices and paths out of the folder are not wanted."""
    files = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = member.name.removeprefix("./").removeprefix("data/")
                if not (member.isreg() and NAME.fullmatch(name)):
                    continue
                if member.size > LARGEST:
                    raise ValueError(f"{member.name} claims {member.size:,} bytes: this is not "
                                     "the MMLU tar; get it again")
                files[name] = tar.extractfile(member).read()
    except tarfile.TarError as error:
        raise ValueError(f"--source is not a whole, uncompressed tar ({error}): get it "
                         "again") from None
    return files


def read_folder(root):
    """The wanted files of an unpacked tar, {name: bytes}."""
    if not (root / "test").is_dir():
        root = root / "data"
    paths = {path.relative_to(root).as_posix(): path for path in root.glob("*/*.csv")}
    return {name: path.read_bytes() for name, path in paths.items() if NAME.fullmatch(name)}


def count_rows(files):
    """Rows per split. Raises ValueError if the files are not the whole of MMLU."""
    counts, subjects = {}, {}
    for split, expected in ROWS.items():
        names = sorted(name for name in files if name.startswith(f"{split}/"))
        subjects[split] = [Path(name).name.removesuffix(f"_{split}.csv") for name in names]
        if len(names) != SUBJECTS or subjects[split] != subjects["dev"]:
            raise ValueError(f"found {len(names)} files {split}/SUBJECT_{split}.csv, expected "
                             f"the same {SUBJECTS} subjects in dev, val and test: --source must "
                             "be MMLU's data.tar or its folder")
        counts[split] = sum(len(parse_rows(files[name], name)) for name in names)
        if counts[split] not in expected:
            raise ValueError(f"found {counts[split]} rows in {split}, expected "
                             f"{' or '.join(map(str, expected))}; get the data again")
    return counts


def prepare(source, out):
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: move it away, or choose "
                         "another --out")
    if not download.is_url(source) and Path(source).is_dir():
        files = read_folder(Path(source))
    else:
        with download.open_source(source) as file:
            files = read_tar(file)
    counts = count_rows(files)
    download.write_atomic(out, {out / name: data for name, data in files.items()})
    for split, count in counts.items():
        print(f"{split:<5}{SUBJECTS:>4} subjects{count:>7} rows")
    if counts["val"] != ROWS["val"][0]:
        print(f"note: val is an earlier edition, {counts['val']} rows; the present data.tar has "
              f"{ROWS['val'][0]}")
    print(f"wrote {out}")


def main(argv=None):
    download.run("prepare_mmlu.py", prepare, argv, url=URL, out="data/mmlu",
                 purpose="Check MMLU and lay it out for eval_mmlu.py.",
                 source_help="the tar, the folder it unpacks to, or a URL to download (if the "
                             f"default is down, the authors' copy: {MIRROR})")


if __name__ == "__main__":
    main()
