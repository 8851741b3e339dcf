"""Open a file on disk, or download it: the one step both prepare_*.py scripts share.

A download stays in memory until the script has verified it, so a broken one leaves nothing on
the disk. Nothing here runs on import; the command that uses it is

    python -m data.prepare_dolly
"""

import http.client
import io
import urllib.request
from pathlib import Path


def is_url(source):
    return "://" in source


def open_source(source):
    """An open binary file for `source`, a path or a URL; raises ValueError with one line that
    says what failed and what to do."""
    if not is_url(source):
        if not Path(source).is_file():
            raise ValueError(f"there is no file {source}: correct --source, or leave it out to "
                             "download the original")
        return open(source, "rb")
    print(f"downloading {source}", flush=True)
    try:
        # one read(): http.client reports a connection cut short only when it is asked for all
        with urllib.request.urlopen(source, timeout=60) as response:
            return io.BytesIO(response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"cannot download {source} ({error}): check the network, or pass "
                         "another URL or a file on disk with --source (see --help)") from None
