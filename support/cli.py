"""How the scripts behave as scripts: flags, refusals in one line, signals, progress.

    p = Parser("cluster.py", __doc__)
    return run_script("cluster.py", lambda: run(args), argv, stopped="...", memory="...")
"""

import argparse
import signal
import sys
import traceback
import warnings

import torch
from tqdm import tqdm

from support.distributed import ignore_signals, rank, under_torchrun, wait_for_rank0_error

LINE_SECONDS = 30  # between two lines of progress where there is no terminal


class Parser(argparse.ArgumentParser):
    """argparse with --debug, without abbreviations, and with one line for a flag it refuses."""

    def __init__(self, name, doc):
        super().__init__(prog=name, description=doc.split("\n")[0], allow_abbrev=False)
        self.add_argument("--debug", action="store_true",
                          help="print the traceback of what is refused as well (off)")

    def error(self, message):
        wait_for_rank0_error()
        self.exit(2, f"{self.prog}: {one_line(message)}; --help lists the flags\n")


def add_strict_flag(parser):
    parser.add_argument("--strict", action="store_true", help="refuse a record that cannot be "
                        "trained on, in place of skipping and counting it (off)")


def flag(name):
    """How the setting of that name is spelled on the command line."""
    return f"--{name.replace('_', '-')}"


def check_min(args, **least):
    """Raises ValueError where a setting that is given is less than its least value."""
    for name, smallest in least.items():
        if (value := getattr(args, name)) is not None and value < smallest:
            raise ValueError(f"{flag(name)} must be at least {smallest}, got {value}")


def one_line(error):
    """The text of an error in one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


class Lines:
    """A file for tqdm whose every update is a line of its own on standard error."""

    def write(self, text):
        if text := text.strip():
            print(text, file=sys.stderr)

    def flush(self):
        sys.stderr.flush()


def progress(*args, **settings):
    """tqdm; where standard error is no terminal, a line every 30 seconds in place of a bar."""
    if not sys.stderr.isatty():
        settings.update(file=Lines(), mininterval=LINE_SECONDS, maxinterval=LINE_SECONDS,
                        delay=LINE_SECONDS, miniters=1, leave=False)
    return tqdm(*args, **settings, disable=rank() > 0)


def interrupt(number, _):
    ignore_signals()
    raise KeyboardInterrupt(number)


def signal_number(error):
    """Of a KeyboardInterrupt: Python raises it bare for Ctrl-C, interrupt() with its number."""
    return error.args[0] if error.args else signal.SIGINT


def out_of_memory(error):
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))  # on CUDA
            # on a CPU, on mps and for what CUDA itself needs torch has no type for it
            or "DefaultCPUAllocator" in str(error) or "out of memory" in str(error))


def run_script(name, work, argv, *, stopped, memory):
    """The exit status: what work() returns, None for 0; 2 for what it refuses (ValueError,
    OSError), 1 when the memory is used up, 128 and the signal's number for Ctrl-C and SIGTERM, each
    with one line on standard error. The last two lines end in what the caller gives. A bug keeps
    its traceback."""
    # what torch remarks on a file that it is about to refuse
    warnings.filterwarnings("ignore", message="Detected pickle protocol")
    before = signal.signal(signal.SIGTERM, interrupt)
    if under_torchrun():
        signal.signal(signal.SIGINT, interrupt)
    try:
        return work() or 0
    except (ValueError, OSError, KeyboardInterrupt, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        ignore_signals()
        if "--debug" in (sys.argv[1:] if argv is None else argv):
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            status, text = 128 + signal_number(error), stopped
        elif out_of_memory(error):
            status, text = 1, f"{str(error).split(chr(10))[0] or 'out of memory'}; {memory}"
        else:
            status, text = 2, error
        if rank() and isinstance(error, KeyboardInterrupt):
            return status
        wait_for_rank0_error()
        name += f", process {rank()}" if rank() else ""
        print(f"{name}: {one_line(text)}", file=sys.stderr)
        return status
    finally:
        if not under_torchrun():
            signal.signal(signal.SIGTERM, before)
