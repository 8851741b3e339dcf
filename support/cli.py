"""How the scripts behave as scripts: flags, failures in one line, signals.

    def main(argv=None):
        return run_script("cluster.py", parse_args, run, argv, memory="give a smaller --batch-size")
"""

import argparse
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch

from support.distributed import group_error, rank, wait_for_rank0_error
from support.files import check_output, check_regular
from support.output import one_line, printable, safe_output
from support.signals import (
    ignore,
    raise_interrupt,
    restore_handlers,
    set_handlers,
    signal_number,
)

ROOT = str(Path(__file__).resolve().parent.parent)
LARGEST = 10**15  # of a setting that is a number
# settings that name what a script reads
INPUTS = ("weights", "data", "val_data", "keep_data", "adapter", "init_adapter", "cache",
          "source", "given", "checkpoint", "tokenizer")


class Parser(argparse.ArgumentParser):
    """argparse with --debug, without abbreviations, and with one line for a refused flag."""

    def __init__(self, name, doc):
        super().__init__(prog=name, description=(doc or "").split("\n")[0], allow_abbrev=False)
        self.add_argument("--debug", action="store_true",
                          help="also print the traceback of a refusal (off)")

    def parse_args(self, args=None):
        """The flags; a path's ~/ is the home folder, where a shell leaves it, as in --out=~/x."""
        args = super().parse_args(args)
        for name in vars(args).keys() - {"prompts"}:
            setattr(args, name, at_home(getattr(args, name)))
        return args

    def error(self, message):
        if out_of_memory(sys.exc_info()[1]):  # while a file that a flag names was read
            raise
        wait_for_rank0_error()
        self.exit(2, f"{self.prog}: {one_line(message)}; --help lists the flags\n")


def at_home(value):
    """A path of the command line, or a list of them, with the home folder for ~."""
    if isinstance(value, list):
        return [at_home(path) for path in value]
    is_path = isinstance(value, (str, Path)) and str(value).startswith("~")
    return type(value)(os.path.expanduser(value)) if is_path else value


def comma_list(text):
    """The names in a text that has commas between them, each once: the type of a flag."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError("must be names with commas between")
    return names


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


def check_paths(args):
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


# ---------------------------------------------------------------- start and end of a script


@safe_output()
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
        check_paths(args)
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
    words = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory",
             "Cannot allocate memory")
    if any(text in str(error) for text in words):
        return error
    return out_of_memory(error.__cause__)


def system_words(error):
    """The text of an error; of one by the operating system the path, what is wrong with it, and
    which function of ours met it."""
    if not isinstance(error, OSError) or not error.errno:
        return error
    place = traceback.extract_tb(error.__traceback__)
    name = next((frame.name for frame in reversed(place) if ROOT in frame.filename), "run")
    return f"{error.filename or 'a file'}: {error.strerror}, in {name}"


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
        text = lost or one_line(diagnose(error, args) or system_words(error))
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
