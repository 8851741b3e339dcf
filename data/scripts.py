"""What the scripts share as scripts: how they refuse, stop, find a device.

    p = Parser("cluster.py", __doc__)
    return run_script("cluster.py", lambda: run(args), argv, stopped="...", memory="...")
"""

import argparse
import signal
import sys
import traceback

import torch


class Parser(argparse.ArgumentParser):
    """argparse with --debug, without abbreviations, and with one line for a flag it refuses."""

    def __init__(self, name, doc):
        super().__init__(prog=name, description=doc.split("\n")[0], allow_abbrev=False)
        self.add_argument("--debug", action="store_true",
                          help="print the traceback of what is refused as well (off)")

    def error(self, message):
        self.exit(2, f"{self.prog}: {one_line(message)}; --help lists the flags\n")


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def pick_device(name):
    """The device by that name, or without one a GPU where there is one. Raises ValueError when
    nothing can be computed on it."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA device here")
        torch.zeros(1, device=name).item()  # the meta device has no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {name} cannot be used: {reason}; --device cpu always "
                         "can") from error
    return name


def interrupt(number, _):
    raise KeyboardInterrupt(number)


def signal_number(error):
    """Of a KeyboardInterrupt: Python raises it bare for Ctrl-C, interrupt() with its number."""
    return error.args[0] if error.args else signal.SIGINT


def out_of_memory(error):
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or "DefaultCPUAllocator" in str(error))  # on a CPU torch has no type for it


def run_script(name, work, argv, *, stopped, memory):
    """The exit status: what work() returns, None for 0; 2 for what it refuses (ValueError,
    OSError), 1 when the memory is used up, 128 and the signal's number for Ctrl-C and SIGTERM, each
    with one line on standard error. The last two lines end in what the caller gives. A bug keeps
    its traceback."""
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        return work() or 0
    except (ValueError, OSError, KeyboardInterrupt, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        if "--debug" in (sys.argv[1:] if argv is None else argv):
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            status, text = 128 + signal_number(error), stopped
        elif out_of_memory(error):
            status, text = 1, f"{str(error).split(chr(10))[0] or 'out of memory'}; {memory}"
        else:
            status, text = 2, error
        print(f"{name}: {one_line(text)}", file=sys.stderr)
        return status
    finally:
        signal.signal(signal.SIGTERM, before)
