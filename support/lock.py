"""One folder, one run: while a process writes somewhere, a second one is refused.

    with file_lock(f"{out}/.lock", out):
        ...                             # no other process is in such a block for the same path

The kernel holds the lock, on a file that names the process, and releases it when that
process ends, even by a kill: a file that was left behind locks nothing. The file is
PATH.pid, since older versions made a folder at PATH; such a folder is ignored.
"""

import os
import socket
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from support.distributed import run_on_rank0
from support.files import wrap_disk_errors

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt
    fcntl = None

PAUSE = 0.2  # seconds in which a process that has just taken the lock writes its name
FAR = 2**30  # on Windows nobody else can read the locked byte: one beyond the name


@contextmanager
def file_lock(path, what):
    """Holds the lock of `what`, the path that a refusal names; under torchrun, rank 0
    holds it for all ranks. Folders made for the file are removed at the end if nothing
    else was put in them. Raises ValueError if another process holds the lock, OSError
    if the file cannot be written."""
    with ExitStack() as stack:
        run_on_rank0(lambda: stack.enter_context(process_lock(Path(f"{path}.pid"), what)))
        yield


@contextmanager
def process_lock(path, what):
    made, file = [], None
    try:
        with wrap_disk_errors(path.parent):
            made = [folder for folder in path.parents if not folder.exists()]
            file = open_locked(path, what)
        yield
    finally:
        if file and not fcntl:
            file.close()  # Windows removes no open file, so none that another one locks
        if file:
            with suppress(OSError):
                path.unlink()
            file.close()
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def open_locked(path, what):
    """The file, open and locked, with this process's name in it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the last holder just removed file or folder
            if os.path.lexists(path) and (path.is_symlink() or not is_lock(path)):
                raise ValueError(f"{path} is no lock of this project: move it away")
            file = open(path, "ab+", buffering=0)
            take_lock(file, what)
            if os.path.samefile(file.fileno(), path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
                return file


def is_lock(path):
    """Whether this is a lock's file, which a kill may have left empty, and nobody else's."""
    return path.is_file() and path.read_bytes()[:8] in (b"", b"process ")


def take_lock(file, what):
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(FAR)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        time.sleep(PAUSE)
        with file:
            file.seek(0)
            holder = file.read(200).decode(errors="replace") or "another process"
        raise ValueError(f"{what} is held by {holder}, which writes there: wait for it, or name "
                         "another --out") from None
    except OSError as error:
        print(f"warning: the file system of {what} has no locks ({error.strerror}): make sure that "
              "no other run writes there")
