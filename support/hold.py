"""One folder, one run: a small file says which process writes there.

    with holding(out / ".lock", out):
        ...                             # a second run into `out` is refused in one line

The system lets one process alone make the file (O_EXCL), so no lock of the file system is needed.
What a killed process left behind holds nothing: that process is gone, or its number belongs to one
that started at another time.
"""

import json
import os
import platform
import time
from contextlib import contextmanager, suppress
from pathlib import Path

WAIT = 0.1  # seconds for a process that has just made its file to write its name into it
GUARD_SECONDS = 10  # taking a file away needs a small part of this


def process_start(pid):
    """When the process started, in the system's own unit; None where nothing tells (not Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def myself():
    return {"host": platform.node(), "pid": os.getpid(), "start": process_start(os.getpid())}


def read_holder(lock):
    """Who holds the file; {} where nobody wrote a name into it."""
    for attempt in range(3):
        with suppress(OSError, ValueError):
            holder = json.loads(lock.read_text(encoding="utf-8"))
            if isinstance(holder, dict) and type(holder.get("pid")) is int:
                return holder
        if attempt < 2:
            time.sleep(WAIT)
    return {}


def is_running(holder, lock):
    """Whether the process that holds the file still runs, on this machine."""
    if not holder:
        return False
    if os.name == "nt":  # an open file cannot be renamed there, and the holder keeps it open
        try:
            os.replace(lock, lock)
            return False
        except OSError:
            return True
    try:
        os.kill(holder["pid"], 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, and is another user's
    except OverflowError:
        return False
    return process_start(holder["pid"]) == holder.get("start")


def take_away(lock, holder):
    """Removes the file of a process that is gone. Only one process at a time may do so: another
    could have taken the file anew since this one read it."""
    guard = lock.with_name(f"{lock.name}.guard")
    try:
        os.close(os.open(guard, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        with suppress(OSError):
            if time.time() - guard.stat().st_mtime > GUARD_SECONDS:  # killed while it did
                guard.unlink()
        time.sleep(WAIT)
        return
    try:
        if read_holder(lock) == holder:
            lock.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)


@contextmanager
def holding(lock, what):
    """Inside, this process holds the file `lock`; raises ValueError, naming the process, where
    another holds it. Folders made for the file go again if nothing else came into them."""
    lock = Path(lock)
    made = [folder for folder in lock.parents if not folder.exists()]
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        while True:
            try:
                file = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                break
            except FileExistsError:
                refuse_if_held(lock, what)
        try:
            os.write(file, json.dumps(myself()).encode())
            yield
        finally:
            os.close(file)
            lock.unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # not empty: the run has written
            for folder in made:
                folder.rmdir()


def refuse_if_held(lock, what):
    """Raises ValueError where a process holds the file; removes it where that process is gone."""
    holder = read_holder(lock)
    if holder and holder.get("host") != platform.node():
        raise ValueError(f"{what} is held by process {holder['pid']} on another machine, "
                         f"{holder.get('host')}: wait for it, name another --out, or delete {lock} "
                         "if it has ended")
    if is_running(holder, lock):
        raise ValueError(f"{what} is held by process {holder['pid']}, which writes there: wait for "
                         "it, or name another --out")
    take_away(lock, holder)
