"""matplotlib as it is on every machine: it draws into files, with its own defaults.

    with plain_matplotlib() as pyplot:
        ...
"""

import os
import sys
from contextlib import contextmanager


@contextmanager
def plain_matplotlib():
    """Within this context pyplot, which it yields, draws with Agg and matplotlib's own defaults,
    whatever MPLBACKEND and the user's matplotlibrc say. Raises ImportError without matplotlib."""
    if "matplotlib" not in sys.modules:  # it reads both when it is imported, and may refuse them
        os.environ.update(MPLBACKEND="agg", MATPLOTLIBRC=os.devnull)
    import matplotlib
    from matplotlib import pyplot
    with matplotlib.rc_context():
        matplotlib.use("Agg")
        matplotlib.rcdefaults()
        yield pyplot
