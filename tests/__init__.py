"""The tests run on a CPU, where they compare in fp32, whatever the machine has.

Only test_cuda.py looks at a GPU; it is a command of its own: python -m pytest tests/test_cuda.py
"""

import os
import sys

if not any("test_cuda" in argument for argument in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported; child processes see it too
