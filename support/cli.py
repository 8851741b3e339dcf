"""How the scripts behave as scripts: flags, failures in one line, signals, progress.

    def main(argv=None):
        return run_script("cluster.py", parse_args, run, argv, memory="give a smaller --batch-size")
"""

import argparse
import os
import signal
import sys
import traceback
import warnings

import torch
from tqdm import tqdm

from support.distributed import group_error, rank, wait_for_rank0_error
from support.files import check_output, check_regular
from support.signals import (
    ignore,
    raise_interrupt,
    restore_handlers,
    set_handlers,
    signal_number,
)

LINE_SECONDS = 30  # between two lines of progress if standard error is no terminal
LARGEST = 10**15  # of a setting that is a number
# settings that name what a script reads
INPUTS = ("weights", "data", "val_data", "keep_data", "adapter", "init_adapter", "cache",
          "source", "given", "checkpoint", "tokenizer")


class Parser(argparse.ArgumentParser):
    """argparse with --debug, without abbreviations, and with one line for a refused flag."""

    def __init__(self, name, doc):
        super().__init__(prog=name, description=doc.split("\n")[0], allow_abbrev=False)
        self.add_argument("--debug", action="store_true",
                          help="also print the traceback of a refusal (off)")

    def error(self, message):
        if out_of_memory(sys.exc_info()[1]):  # while a file that a flag names was read
            raise
        wait_for_rank0_error()
        self.exit(2, f"{self.prog}: {one_line(message)}; --help lists the flags\n")


def flag(name):
    """How the setting of that name is spelled on the command line."""
    return f"--{name.replace('_', '-')}"


def check_min(args, **least):
    """Raises ValueError if a setting that is given is below its smallest value, or beyond
    any use."""
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and not smallest <= value <= LARGEST:
            raise ValueError(f"{flag(name)} must be at least {smallest} and at most {LARGEST}, "
                             f"got {printable(value, 40)}")


def check_files(args):
    """Raises ValueError, before any work, for an input that is no regular file or folder,
    and for an --out that check_output refuses."""
    given = [getattr(args, name, None) for name in INPUTS]
    given = [path for value in given for path in (value if isinstance(value, list) else [value])
             if path]
    for path in given:
        check_regular(path)
    for name in ("weights", "source"):
        folder = getattr(args, name, None)
        for entry in os.scandir(folder) if folder and os.path.isdir(folder) else []:
            check_regular(entry.path)
    if getattr(args, "out", None) is not None and not getattr(args, "dry_run", False):
        check_output(args.out, given)


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


# ---------------------------------------------------------------- start and end of a script


def run_script(name, parse_args, run, argv=None, *, memory="give it a machine with more memory",
               stopped="interrupted; nothing was written"):
    """The exit status of run(parse_args(argv)), None counting as 0; see report_failure. Meanwhile
    SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does."""
    former = set_handlers(raise_interrupt)
    args = argparse.Namespace(debug=False)
    # torch's remark on a file that is refused a moment later
    warnings.filterwarnings("ignore", module="torch")
    try:
        args = parse_args(argv)
        check_files(args)
        return run(args) or 0
    except (Exception, KeyboardInterrupt) as error:
        return report_failure(error, name, args, stopped=stopped, memory=memory)
    finally:
        if argv is None:  # the process ends now: a signal would cost it its status and output
            set_handlers(signal.SIG_IGN)
        else:
            restore_handlers(former)


def out_of_memory(error):
    """The error, or one behind it, that says that there is too little memory; else None.
    Whoever read a file with too little memory has called it damaged."""
    if error is None or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return error  # the latter on CUDA
    # torch has no type for a CPU, for mps and for what CUDA's own libraries need
    if any(words in str(error) for words in ("DefaultCPUAllocator", "out of memory",
                                             "Cannot allocate memory")):
        return error
    return out_of_memory(error.__cause__)


def report_failure(error, name, args, *, stopped, memory):
    """Prints why a script ended, one line on standard error, and returns its exit status: 2 for
    a refusal (ValueError, OSError), 1 for out of memory, 128 plus the signal's number for Ctrl-C
    and SIGTERM. Any other error is a bug and is raised again.

    The line ends with `stopped` or `memory`, or with the error's own attribute `hint`."""
    lost = group_error(error)
    hint = getattr(error, "hint", None)
    if isinstance(error, KeyboardInterrupt):
        status, text = 128 + signal_number(error), f"stopped; {hint}" if hint else stopped
    elif short := out_of_memory(error):
        status, text = 1, f"{str(short).split(chr(10))[0] or 'out of memory'}; {memory}"
    elif lost or isinstance(error, (ValueError, OSError)):
        from support.diagnose import diagnose  # only now: it looks at every file that was read
        status = 2
        text = lost or one_line(diagnose(error, args) or error)
        text = f"{text}; {hint}" if hint else text
    else:
        raise error
    set_handlers(ignore)
    if args.debug:
        traceback.print_exception(error)
    if rank() and (lost or isinstance(error, KeyboardInterrupt)):
        return 1 if lost else status  # rank 0 reports it
    wait_for_rank0_error()
    name = f"{name}, process {rank()}" if rank() else name
    print(f"{name}: {one_line(text)}", file=sys.stderr)
    return status
