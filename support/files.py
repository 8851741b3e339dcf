"""Writes a file whole or not at all, and reads any file without running code in it.

    write_file("adapter.pt", lambda file: save_adapter(model, file))
    write_json("run.json", result)
    state = read_torch("checkpoint.pt", "a checkpoint of a run")
"""

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from data.what_it_is import what_it_is
from support.distributed import rank

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# ---------------------------------------------------------------- writing


@contextmanager
def wrap_disk_errors(path):
    """Within this context, an error of the disk becomes an OSError that names the path
    and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError about positions in its archive
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(reason, OSError):
            raise OSError(f"{path} cannot be written ({reason.strerror or reason}): make room or "
                          "name another place") from error
        raise


def move_into_place(temporary, path):
    """Renames a finished file so that a power cut leaves the whole new or old one."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    with suppress(PermissionError):  # Windows opens no folder
        folder = os.open(Path(path).parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_file(path, write):
    """Calls write(file) on a temporary file and renames it: whatever happens, path is
    the whole new file or the old one. What a kill leaves behind is never read, and the
    next write replaces it. Raises OSError if it cannot be written. Only rank 0 writes;
    the other ranks call write too, since it may ask each for its part of the base."""
    if rank():
        with open(os.devnull, "wb") as nowhere:
            write(nowhere)
        return
    temporary = f"{path}.tmp"
    try:
        with wrap_disk_errors(path):
            with open(temporary, "wb") as file:
                write(file)
            move_into_place(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def write_text(path, text):
    """Writes the text as UTF-8, whole or not at all."""
    write_file(path, lambda file: file.write(text.encode()))


def write_json(path, value):
    """Writes the value as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_llama(model, tokenizer_path, folder):
    """save_llama into a folder that may hold other files. Each of its three files is
    whole, new or old, and params.json is there only if all three are new, so a mixture
    is never loaded. Raises what save_llama raises, and OSError if it cannot be written.
    The next call removes what a kill left behind."""
    from model import save_llama  # here alone: it loads sentencepiece
    folder = Path(folder)
    unfinished = folder / "unfinished.tmp"
    with wrap_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            save_llama(model, tokenizer_path, unfinished)
            (folder / "params.json").unlink(missing_ok=True)
            for name in ("tokenizer.model", "consolidated.00.pth", "params.json"):
                move_into_place(unfinished / name, folder / name)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def atomic_dir(path):
    """Yields an empty folder, which becomes `path` at the end and is removed after an
    error. Raises ValueError if path exists already, or its parent does not."""
    path = Path(path)
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already: name another folder, or move it away")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to make {path.name} in")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as holder:
        folder = Path(holder) / path.name
        folder.mkdir()
        yield folder
        folder.rename(path)


# ---------------------------------------------------------------- reading


def read_torch(path, kind, mmap=False):
    """What torch.save wrote: tensors and plain values, nothing else, so no code in it
    can run. Raises ValueError, "PATH is not `kind`", for any other file. torch's own
    words are not passed on: they advise to trust the file, or to save it again."""
    try:
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # a damaged file raises half a dozen types
        reason = (what_it_is(path)
                  or "it holds more than tensors and plain values, or is damaged")
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise ValueError(f"{path} is not {kind}: {reason}") from error


def parse_json(text, place):
    """The JSON object in a text. Raises ValueError, naming the place, for NaN,
    Infinity, a repeated name and anything but an object."""
    def no_constant(name):
        raise ValueError(f"it holds {name}")

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("it holds a name twice")
        return dict(pairs)

    try:
        value = json.loads(text, parse_constant=no_constant, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place} is not a JSON object but {type(value).__name__}")
    return value


def read_json(path):
    """The JSON object in a file. Raises ValueError if there is none."""
    if not Path(path).is_file():
        raise ValueError(f"there is no {path}")
    if reason := what_it_is(path):
        raise ValueError(reason)
    return parse_json(Path(path).read_bytes(), path)


def check_tensors(tensors):
    """Raises ValueError unless this is {name: plain floating-point tensor} with all of
    its values in the file: strides of zero can claim a terabyte and hold one number."""
    if not isinstance(tensors, dict):
        raise ValueError(f"tensors by name were wanted, found {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name!r} is {type(tensor).__name__}, not a tensor")
        if (tensor.device.type != "cpu" or tensor.layout != torch.strided
                or tensor.dtype not in FLOATS
                or tensor.nbytes > tensor.untyped_storage().nbytes()):
            raise ValueError(f"{name} is not a plain tensor of floating-point numbers")


def check_finite(tensors, path):
    """Raises ValueError if {name: tensor} has a value that is not finite. The path,
    which it would be written to or was read from, is for the message."""
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{path}: {len(bad)} of {len(tensors)} tensors hold values that are not "
                         f"finite, {bad[0]} the first: they are neither written nor loaded")


def shape_mismatches(shapes, tensors):
    """Names in {name: tensor} that are missing, extra, or not of {name: shape}."""
    return sorted(name for name in shapes.keys() | tensors.keys()
                  if name not in shapes or name not in tensors
                  or shapes[name] != tensors[name].shape)


# ---------------------------------------------------------------- fingerprints
# Files: file_fingerprint and weights_fingerprint. run.json records them; they show whether a run
# reads the same files again, and a changed byte changes them.
# Values: hydralora.base_fingerprint, some numbers of each weight of a loaded model. An adapter
# records it, since the same base may come in other files and another dtype.
# digest makes a short key of anything, such as of base_fingerprint and all settings.

READ_WHOLE = 2**24  # bytes up to which a shard is read whole; a larger one is sampled
SAMPLES = 64
SAMPLE_BYTES = 2**18


def digest(*content):
    """16 hexadecimal digits that depend on the whole content."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def file_fingerprint(path):
    """sha256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def weights_fingerprint(folder):
    """sha256 of params.json and the shards in a folder in Meta's layout. A shard over
    16 MiB counts by its size and 64 evenly spaced blocks, the last of which is the
    archive's directory with a checksum of every tensor. 7B takes seconds."""
    found = hashlib.sha256((Path(folder) / "params.json").read_bytes())
    for path in sorted(Path(folder).glob("consolidated.*.pth")):
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            if size <= READ_WHOLE:
                found.update(file.read())
            else:
                for i in range(SAMPLES):
                    file.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                    found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()
