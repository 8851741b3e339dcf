"""Files written whole or not at all, and files of others opened so that nothing in them runs.

    write_file("run.json", lambda file: file.write(text.encode()))
    content = read_torch("adapter.pt", "an adapter of this project")

Used by every script and module that writes a result or opens a checkpoint.
"""

import hashlib
import json
import os
import warnings
from contextlib import suppress
from pathlib import Path

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def write_file(path, write):
    """write(file) to a temporary name, synced and renamed, then the folder synced: whatever happens
    the path holds the whole new file or the former one. Raises OSError where it cannot be written.
    A temporary file that a kill left behind is never read, and the next write replaces it."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        # torch.save reports a full disk as a RuntimeError about positions in its archive
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(reason, OSError):
            raise OSError(f"{path} cannot be written ({reason.strerror or reason}): make room or "
                          "name another place") from error
        raise
    folder = os.open(Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_torch(path, kind, mmap=False):
    """What torch.save wrote: tensors and plain values, nothing else, so no code in it can run.
    Raises ValueError, saying that the file is not `kind`, for whatever cannot be read so."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on the pickles that it refuses
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # a damaged file raises half a dozen types
        reason = "it holds more than tensors and plain values, or is damaged"
        if isinstance(error, (OSError, RuntimeError)):  # the others say to trust it, or nothing
            reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not {kind}: {reason}") from error


def read_json(path):
    """The value in a JSON file. Raises ValueError for what is not JSON, or too deep."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def check_tensors(tensors):
    """Raises ValueError unless this is {name: dense floating-point tensor} whose values all stand
    in the file: strides of zero can claim a terabyte that is one number."""
    if not isinstance(tensors, dict):
        raise ValueError(f"tensors by name were wanted, found {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name!r} is {type(tensor).__name__}, not a tensor")
        if (tensor.device.type != "cpu" or tensor.layout != torch.strided
                or tensor.dtype not in FLOATS
                or tensor.nbytes > tensor.untyped_storage().nbytes()):
            raise ValueError(f"{name} is not a plain tensor of floating-point numbers")


def misfits(shapes, tensors):
    """Names that are missing from {name: tensor}, extra, or of another shape than {name: shape}."""
    return sorted(name for name in shapes.keys() | tensors.keys()
                  if name not in shapes or name not in tensors
                  or shapes[name] != tensors[name].shape)


def check_finite(tensors, path):
    """Raises ValueError when a value of {name: tensor} is not finite: it must not reach the path,
    or must not be taken from it."""
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{path}: {len(bad)} of {len(tensors)} tensors hold values that are not "
                         f"finite, {bad[0]} the first: they are neither written nor loaded")


# ---------------------------------------------------------------- fingerprints

WHOLE, BLOCKS, BLOCK = 2**24, 64, 2**18


def file_fingerprint(path):
    """sha256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def weights_fingerprint(folder):
    """sha256 of params.json and of the shards in a folder of Meta's layout. A shard over 16 MiB
    counts by its size and 64 evenly spaced blocks, the last of which is the archive's directory
    with a checksum of every tensor: seconds, not minutes, for 7B."""
    digest = hashlib.sha256((Path(folder) / "params.json").read_bytes())
    for path in sorted(Path(folder).glob("consolidated.*.pth")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            if size <= WHOLE:
                digest.update(file.read())
            else:
                for i in range(BLOCKS):
                    file.seek(i * (size - BLOCK) // (BLOCKS - 1))
                    digest.update(file.read(BLOCK))
    return digest.hexdigest()
