"""What is printed: an output on which no print fails, foreign text as text, tables, progress.

    with safe_output():                                    # support/cli.py, for every script
        print(f"{cell(category)}{loss:9.4f}")
"""

import errno
import os
import re
import sys
from contextlib import contextmanager, suppress
from unicodedata import combining, east_asian_width

from tqdm import tqdm

from support.distributed import rank

# a closed pipe, a terminal that hung up, a closed pipe of Windows
NO_READER = (errno.EPIPE, errno.EIO, errno.EINVAL)
LINE_SECONDS = 30  # between two lines of progress if standard error is no terminal
# what acts on a terminal, but for tabs and line ends
CONTROL = r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
NO_COLOUR = r"(?!\x1b\[\d{0,2}m)"  # where colours, which are our own, may act

# ---------------------------------------------------------------- standard output


class Output:
    """A stream on which no print fails, so that none ends a run: a character that the encoding
    lacks becomes a question mark, and what nobody reads any more goes nowhere. With `text`,
    control characters in what is printed do not act: it may be foreign."""

    def __init__(self, stream, text=False):
        self.text = text
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")  # None if it is closed

    def write(self, text):
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        if self.text:
            pattern = NO_COLOUR * self.stream.isatty() + CONTROL
            text = re.sub(pattern, lambda found: ascii(found[0])[1:-1], text)
        self.attempt(self.stream.write, text.encode(encoding, "replace").decode(encoding))

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, act, *arguments):
        try:
            act(*arguments)
        except OSError as error:
            if error.errno not in NO_READER:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextmanager
def safe_output():
    """Within this context standard output and standard error are an Output."""
    former = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output(former[0], text=True), Output(former[1])
    try:
        yield
    finally:
        with suppress(OSError):  # of a full disk; the interpreter says it
            sys.stdout.flush()  # else the interpreter does, and reports a closed pipe too
        sys.stdout, sys.stderr = former


# ---------------------------------------------------------------- texts


def printable(text, most=200):
    """A foreign text as part of a line: control characters are escaped, so that none acts on
    the terminal, and of a longer text the middle is left out."""
    text = str(text)
    if len(text) > most:
        text = f"{text[:most * 2 // 3]} ... {text[-most // 3:]}"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def one_line(error):
    """The text of an error in one line; its type if it has no text."""
    return printable(" ".join(str(error).split()), 1200) or type(error).__name__


def cell(text, width=24):
    """A name that a user chose as a cell of a table: one line of exactly this many columns, of
    which a wide letter takes two."""
    text = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    if columns(text) > width:
        while columns(text) > width - 3:
            text = text[:-1]
        text += "..."
    return text + " " * (width - columns(text))


def columns(text):
    return sum(0 if combining(c) else 1 + (east_asian_width(c) in "WF") for c in text)


# ---------------------------------------------------------------- progress


class Lines:
    """A file for tqdm that prints every update as a line of its own on standard error."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self):
        sys.stderr.flush()


def progress(*args, **settings):
    """tqdm; if standard error is no terminal, a line every 30 seconds instead of a bar."""
    if not sys.stderr.isatty():
        settings.update(file=Lines(), mininterval=LINE_SECONDS, maxinterval=LINE_SECONDS,
                        delay=LINE_SECONDS, miniters=1, leave=False)
    return tqdm(*args, **settings, disable=rank() > 0)
