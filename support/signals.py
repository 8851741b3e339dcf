"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal): the first one stops a script, and what it does
then is not disturbed by the next.

In a script the first signal raises KeyboardInterrupt (support/cli.py); in the training loop it is
noted, so that the step can be finished and saved (catch_signals).
"""

import signal
import threading
from contextlib import contextmanager

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]  # Windows has no SIGHUP


def set_handlers(handler):
    """Gives all three this handler; returns the former ones, {number: handler}. A signal that is
    ignored stays so, as under nohup. Does nothing in a thread, where Python allows no handler."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    former = {number: signal.getsignal(number) for number in SIGNALS}
    former = {number: old for number, old in former.items() if old is not signal.SIG_IGN}
    for number in former:
        signal.signal(number, handler)
    return former


def restore_handlers(former):
    for number, handler in former.items():
        signal.signal(number, handler)


def ignore(number, _):
    """The handler once a script ends. No SIG_IGN, which child processes would inherit."""


def raise_interrupt(number, _):
    """The handler of a script: only the first signal counts."""
    set_handlers(ignore)
    raise KeyboardInterrupt(number)


def signal_number(error):
    """The signal behind a KeyboardInterrupt: Python's own has no number."""
    return error.args[0] if error.args else signal.SIGINT


@contextmanager
def catch_signals():
    """Within this context a signal only adds its number to the list that it yields, so that the
    loop can finish its step, save and stop."""
    signals = []
    former = set_handlers(lambda number, _: signals.append(number))
    try:
        yield signals
    finally:
        restore_handlers(dict.fromkeys(former, ignore) if signals else former)
