"""What both prepare_*.py share: they open or download a source and write all or nothing.

A download stays in memory until the script has checked it, and nothing appears under
the final name before all of it is on the disk.

    python -m data.prepare_dolly
    python -m data.prepare_mmlu
"""

import argparse
import http.client
import io
import os
import signal
import tempfile
import time
import urllib.request
from pathlib import Path

from data.what_it_is import HEAD, kind_of, what_it_is

LARGEST = 2**30  # bytes of a source; MMLU's has 166 MB
SLOWEST, PATIENCE = 1000, 15  # bytes per second of a download, and how long they are awaited


def run(name, prepare, argv, *, purpose, url, source_help, out):
    """A script's command line: prepare(source, out). A failure is one line and status 2."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--source", default=url, help=f"{source_help}; default: %(default)s")
    parser.add_argument("--out", type=lambda path: Path(path).expanduser(), default=Path(out),
                        help="what to write; default: %(default)s")
    args = parser.parse_args(argv)
    if argv is None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        prepare(os.path.expanduser(args.source), args.out)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:1000]
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        parser.exit(2, f"{name}: {text}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{name}: interrupted; nothing is half written\n")


def is_url(source):
    return "://" in source


def open_source(source):
    """An open binary file of a path or a URL. Raises ValueError that says what to do."""
    if not is_url(source):
        if reason := what_it_is(source):
            raise ValueError(reason)
        if not Path(source).is_file():
            raise ValueError(f"there is no file {source}: correct --source, or leave it out to "
                             "download the original")
        if os.path.getsize(source) > LARGEST:
            raise ValueError(f"{source} has more than {LARGEST:,} bytes: it is another file")
        return open(source, "rb")
    print(f"downloading {source}", flush=True)
    try:
        with urllib.request.urlopen(source, timeout=60) as response:
            content = read_all(response)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"cannot download {source} ({error}): check the network, or pass "
                         "another URL or a file on disk with --source (see --help)") from None
    if kind := kind_of(content[:HEAD]):
        raise ValueError(f"{source} {kind}")
    return io.BytesIO(content)


def read_all(response):
    """The body, in pieces, since a server may send without end, or a byte a second."""
    content, start = io.BytesIO(), time.monotonic()
    while piece := response.read1(2**20):
        content.write(piece)
        seconds = time.monotonic() - start
        if content.tell() > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        if seconds > PATIENCE and content.tell() < SLOWEST * seconds:
            raise ValueError(f"it comes at less than {SLOWEST} bytes per second")
    if missing := getattr(response, "length", None):  # that of a file has none
        raise http.client.IncompleteRead(b"", missing)
    return content.getvalue()


def write_atomic(out, files):
    """Writes all of {path: bytes} or nothing, by one rename. Each path is `out` itself,
    a file, or is in the folder `out`, which must be absent or empty."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".prepare-") as folder:
        new = Path(folder) / out.name
        for path, data in files.items():
            part = new / path.relative_to(out)
            part.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        os.replace(new, out)
