"""The tests run on a CPU, where they compare in fp32, whatever the machine has.

Only test_cuda.py looks at a GPU; it is a command of its own: python -m pytest tests/test_cuda.py
"""

import os
import signal
import sys

if not any("test_cuda" in argument for argument in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported; child processes see it too

# a job in the background of a shell ignores Ctrl-C, and so would all that the tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
