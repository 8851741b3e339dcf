"""Where a script computes, and in which precision: --device, --dtype, autocast, peak memory."""

import sys
import warnings
from contextlib import nullcontext

import torch

from support.distributed import set_local_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_device_flags(parser, dtype_help="dtype of the model"):
    """--dtype and --device, for pick_device and pick_dtype."""
    parser.add_argument("--dtype", choices=DTYPES, help=f"{dtype_help} (fp32 on CPU, bf16 on GPU)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (cuda if there is one)")


def pick_device(name):
    """The device of that name; without a name, a CUDA GPU if there is one. Raises ValueError if
    nothing can be computed on it."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    set_local_device(name)
    # on Hopper and later bf16 attention would go to cuDNN, which plans anew for each length of a
    # batch: up to half a second, for hundreds of lengths
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA device here")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the line below says it
            torch.zeros(1, device=name).item()  # the meta device has no values
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {name} cannot be used: {reason}; --device cpu always "
                         "can") from error
    return name


def pick_dtype(name, device):
    """The dtype of that name; without a name fp32, on a CUDA GPU bf16. Before Ampere bf16 is
    emulated, and attention keeps a (T, T) matrix in it: fp16 there."""
    if name or not device.startswith("cuda"):
        return name or "fp32"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        print("fp16, since this GPU has no bf16 of its own (--dtype bf16 emulates it)")
        return "fp16"
    return "bf16"


def autocast(device, dtype):
    """A context manager, to be used as often as wanted: within it, products run in the dtype of
    that name, and the rest as torch's autocast decides. No context at all for fp32."""
    if dtype == "fp32":
        return nullcontext()
    # no cache: it would hold a copy of every fp32 weight until the context ends, and none is
    # read twice in it; --method full with checkpointing would need the copies' memory for nothing
    return torch.autocast(torch.device(device).type, DTYPES[dtype], cache_enabled=False)


def peak_memory(device):
    """Peak GiB: allocated on a GPU, resident in this process on a CPU. For mps, PyTorch only
    reports the driver's current allocation, which does not shrink when tensors are freed."""
    module = torch.get_device_module(device)
    if hasattr(module, "max_memory_allocated"):
        return module.max_memory_allocated(device) / 2**30
    if hasattr(module, "driver_allocated_memory"):
        return module.driver_allocated_memory() / 2**30
    return peak_resident() / 2**30


def peak_resident():
    """Peak bytes of this process in memory, pages of mapped files included; 0 on Windows, which
    does not report it this way."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak * (1 if sys.platform == "darwin" else 1024)


def get_rng_state(device):
    """State of the device's own random generator; None on a CPU, whose generator is torch's."""
    module = torch.get_device_module(device)
    return module.get_rng_state(device) if hasattr(module, "get_rng_state") else None


def set_rng_state(state, device):
    """Restores what get_rng_state returned."""
    if state is not None:
        torch.get_device_module(device).set_rng_state(state, device)
