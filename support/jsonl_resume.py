"""The rows of a long run, saved line by line, so that a stopped run can be resumed.

    done = read_partial(path, settings, columns={"index": int, "answer": str}, name=("index",))
    with open_partial(path, settings, done) as file:
        append_row(file, {"index": 3, "answer": "four"})
    ...                                 # write the result
    remove_partial(path)

The first line holds the settings that the rows depend on; every other line is a row.
Only rank 0 reads, writes and removes the file; it broadcasts what it read.
"""

import json
import os

from support.distributed import rank, run_on_rank0
from support.files import write_text


def read_partial(path, settings, *, columns, name):
    """{values of the columns in `name`: row} of a stopped run, without a line that was
    cut short. Raises ValueError if its settings were others, since its rows would be
    wrong here, and for a row that does not have exactly these columns, {name: type}."""
    return run_on_rank0(lambda: parse_partial(path, settings, columns, name))


def parse_partial(path, settings, columns, name):
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = []
    for line in text.split("\n"):
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):  # cut short
            break
    if text and not (lines and isinstance(lines[0], dict)):
        raise ValueError(f"{path} is not of a stopped run: delete it, or choose another --out")
    if lines[1:] and lines[0] != settings:
        differ = [key for key in settings if lines[0].get(key) != settings[key]]
        raise ValueError(f"{path} is of a stopped run with another {', '.join(differ)}: finish it, "
                         "delete that file, or choose another --out")
    done = {tuple(row[key] for key in name): row for row in lines[1:]
            if isinstance(row, dict) and {key: type(row[key]) for key in row} == columns}
    if len(done) < len(lines[1:]):
        raise ValueError(f"{path} is not of a stopped run: delete it, or choose another --out")
    return done


def open_partial(path, settings, done):
    """The file, open for more rows, after the settings and the rows that are done."""
    if rank():
        return open(os.devnull, "w", encoding="utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line) + "\n" for line in [settings, *done.values()]))
    return open(path, "a", encoding="utf-8")


def append_row(file, row):
    file.write(json.dumps(row) + "\n")


def remove_partial(path):
    if not rank():
        path.unlink()
