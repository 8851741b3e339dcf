"""One folder, one run: a process holds what it writes, and a second one is told who that is.

    with file_lock(out / ".lock", out):
        ...                             # a second run into `out` is refused in one line

A lock is a folder with one empty file, whose name is its holder: process, when it began, host. One
rename puts such a folder in place, or a new holder's name over that of a dead one; of several that
try, one succeeds. So the file system need not know locks, and what a kill left behind, which names
a process that is gone, holds nothing. Machines are told apart by their host names.
"""

import os
import shutil
import socket
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from support.distributed import run_on_rank0
from support.files import wrap_disk_errors

TRIES, PAUSE = 20, 0.01  # others may come and go meanwhile; seconds


def began(pid):
    """When a process began, as Linux tells it: in which run of the machine, and at which tick of
    its clock. "" for one that has ended, "unknown" on other systems."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        state, *numbers = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return "unknown"
    return "" if state in b"ZX" else f"{boot}.{numbers[18].decode()}"


def lives(holder):
    """Whether the process that a lock names may still run: of another host, this one cannot know.
    A process id is given away again, so one that began at another time is somebody else's."""
    pid, start, host = holder.split("-", 2)
    if host != socket.gethostname():
        return True
    if os.name == "nt":
        return False  # take() finds out: Windows renames no file that a process has open
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return began(pid) in (start, "unknown")


def in_use(lock, what, holder):
    """The refusal that names who holds the lock."""
    pid, _, host = holder.split("-", 2)
    if host == socket.gethostname():
        return ValueError(f"{what} is held by process {pid} on {host}, which writes there: wait "
                          "for it, or name another --out")
    return ValueError(f"{what} is held by process {pid} on another machine, {host}: wait for it, "
                      f"name another --out, or delete {lock} if it has ended")


def take(lock, what, me):
    """Makes `me` the holder and returns the file that says so, open, see lives(). Raises ValueError
    where another process holds the lock."""
    claim = Path(f"{lock}.{me}")
    for left in reversed(range(TRIES)):
        holder = None
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            holder = next(iter(os.listdir(lock)), None) if lock.exists() else None
            if holder and lives(holder):
                raise in_use(lock, what, holder)
            if holder:
                os.rename(lock / holder, lock / me)  # fails where another was quicker
            else:
                claim.mkdir(exist_ok=True)
                (claim / me).touch()
                os.rename(claim, lock)  # so does this, unless the folder there is empty
            return open(lock / me, "rb")
        except OSError as error:
            shutil.rmtree(claim, ignore_errors=True)
            if not left and holder:
                raise in_use(lock, what, holder) from error
            if not left:
                raise
            with suppress(OSError):
                lock.rmdir()  # an empty one, which Windows does not rename over
            time.sleep(PAUSE)


@contextmanager
def file_lock(lock, what):
    """file_lock_alone; of several processes the first does it for all, and what it refuses, all
    refuse."""
    with ExitStack() as stack:
        run_on_rank0(lambda: stack.enter_context(file_lock_alone(lock, what)))
        yield


@contextmanager
def file_lock_alone(lock, what):
    """Inside, this process alone holds the lock, and with it `what`, the path that it writes to.
    The folder that the lock lies in is made where there is none, and goes again if nothing else was
    put in it. Raises ValueError where another process holds the lock, OSError where none can be.
    """
    lock, me = Path(lock), f"{os.getpid()}-{began(os.getpid())}-{socket.gethostname()}"
    made, file = [], None
    try:
        with wrap_disk_errors(lock.parent):
            made = [path for path in lock.parents if not path.exists()]
            file = take(lock, what, me)
        for path in lock.parent.iterdir():  # claims of processes that were killed within take()
            name = path.name.removeprefix(f"{lock.name}.")
            if name != path.name and name.count("-") > 1 and not lives(name):
                shutil.rmtree(path, ignore_errors=True)
        yield
    finally:
        if file:
            file.close()
            (lock / me).unlink(missing_ok=True)
        for path in (lock, *made):
            with suppress(OSError):
                path.rmdir()
