"""What both prepare_*.py share: they open or download a source and write all or nothing.

A download stays in memory until the script has checked it, and nothing appears under
the final name before all of it is on the disk. The commands that use it are

    python -m data.prepare_dolly
    python -m data.prepare_mmlu
"""

import http.client
import io
import os
import tempfile
import urllib.request
from pathlib import Path


def is_url(source):
    return "://" in source


def open_source(source):
    """An open binary file of a path or a URL. Raises ValueError, one line that says
    what failed and what to do."""
    if not is_url(source):
        if not Path(source).is_file():
            raise ValueError(f"there is no file {source}: correct --source, or leave it out to "
                             "download the original")
        return open(source, "rb")
    print(f"downloading {source}", flush=True)
    try:
        # one read(): http.client reports a lost connection only if it is asked for everything
        with urllib.request.urlopen(source, timeout=60) as response:
            return io.BytesIO(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"cannot download {source} ({error}): check the network, or pass "
                         "another URL or a file on disk with --source (see --help)") from None


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
