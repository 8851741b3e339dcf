"""Writes a file whole or not at all, and reads any file without running code in it.

    check_output(args.out, inputs)
    write_file("adapter.pt", lambda file: save_adapter(model, file))
    state = read_torch("checkpoint.pt", "a checkpoint of a run")
"""

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from data.what_it_is import what_it_is
from support.distributed import rank

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# a result does not replace a file of such a name: a part of a model, a run or a benchmark
PART = re.compile(r"(params|run|config)\.json|.*\.(pth?|model|bin|safetensors|csv)")
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


def check_regular(path):
    """Raises OSError if path is a link that leads nowhere, or a device, a pipe or a socket:
    reading one may never end, and writing would put a file where it was."""
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise OSError(f"{path} is a link to {os.readlink(path)}, which leads nowhere")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(f"{path} is no regular file: name another")


def check_output(path, inputs=()):
    """Raises ValueError or OSError if a result cannot be written to path, or would replace
    one of the inputs, a part of a model or run, or a device."""
    path = Path(path)
    check_regular(path)
    for given in inputs:
        same = os.path.realpath(path) == os.path.realpath(given) or (
            path.exists() and os.path.exists(given) and os.path.samefile(path, given))
        if same and not path.is_dir():
            raise ValueError(f"--out {path} is also read ({given}): name another")
    if path.is_file() and PART.fullmatch(path.name):
        raise ValueError(f"{path} exists already, and may be a part of a model, a run or a "
                         "benchmark: name another file")
    places = [path.absolute()] * path.is_dir() + [*path.absolute().parents]
    existing = next(place for place in places if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):  # os.access may answer for another user
            pass
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written, since {existing} is read-only or no "
                         f"folder ({error.strerror}): name another") from error


@contextmanager
def lock_folder(folder):
    """Holds the kernel's lock on a folder. Raises OSError if another process does, and
    where there are no such locks."""
    if not fcntl:
        raise OSError("Windows locks no folder")
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(number)


@contextmanager
def scratch_folder(path):
    """Yields a new folder beside path for what is renamed to it when it is finished. A kill
    leaves the folder behind, without its lock: the next call for this path removes it."""
    path = Path(path)
    mark = f".{path.name[:50]}-unfinished-"
    for old in path.parent.glob(f"{glob.escape(mark)}*"):
        with suppress(OSError), lock_folder(old):
            shutil.rmtree(old)
    new = Path(tempfile.mkdtemp(dir=path.parent, prefix=".new-"))
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(lock_folder(new))
        folder = new.rename(new.with_name(mark + new.name[-8:]))  # now it is known, and locked
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def move_into_place(temporary, path):
    """Renames a finished file so that a power cut leaves the whole new or old one."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    with suppress(OSError):  # some file systems sync no folder, Windows opens none
        folder = os.open(Path(path).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_file(path, write):
    """Calls write(file) on a temporary file and renames it: whatever happens, path is
    the whole new file or the old one; of a link, its target is. Raises OSError if it cannot
    be written, or if path is a device. Only rank 0 writes; the other ranks call
    write too, since it may ask each for its part of the base."""
    if rank():
        with open(os.devnull, "wb") as nowhere:
            write(nowhere)
        return
    check_regular(path)
    path = Path(os.path.realpath(path))
    with wrap_disk_errors(path), scratch_folder(path) as folder:
        with open(folder / path.name, "wb") as file:
            write(file)
        move_into_place(folder / path.name, path)


def write_text(path, text):
    """Writes the text as UTF-8, whole or not at all."""
    write_file(path, lambda file: file.write(text.encode()))


def write_json(path, value):
    """Writes the value as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_llama(model, tokenizer_path, folder):
    """save_llama into a folder that may hold other files. Each of its three files is
    whole, new or old, and params.json is there only if all three are new, so a mixture
    is never loaded. Raises what save_llama raises, and OSError if it cannot be written."""
    from model import save_llama  # here alone: it loads sentencepiece
    folder = Path(folder)
    with wrap_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder / "params.json") as new:
            save_llama(model, tokenizer_path, new)
            (folder / "params.json").unlink(missing_ok=True)
            for name in ("tokenizer.model", "consolidated.00.pth", "params.json"):
                move_into_place(new / name, folder / name)


@contextmanager
def atomic_dir(path):
    """Yields an empty folder, which becomes `path` at the end and is removed after an
    error. Raises ValueError if path exists already, or its parent does not."""
    path = Path(path)
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already: name another folder, or move it away")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to make {path.name} in")
    with scratch_folder(path) as holder:
        folder = holder / path.name
        folder.mkdir()
        yield folder
        folder.rename(path)


# ---------------------------------------------------------------- reading


def check_archive(path, crc=True):
    """Raises BadZipFile for a zip that torch.save has not written: one with compressed or
    overlapping entries, which can ask for any amount of memory, or (if crc, which reads
    all of it) one whose bytes have changed. torch looks at none of these."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return  # a pickle: older than PyTorch 1.6
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if (any(entry.compress_type for entry in entries)
                or sum(entry.file_size for entry in entries) > os.path.getsize(path)):
            raise zipfile.BadZipFile("compressed")
        if crc and archive.testzip():
            raise zipfile.BadZipFile("a checksum differs")


def check_count(value, most):
    """Raises ValueError if lists within lists hold more than so many values. In a file one
    list can stand in many places, forty deep; as a text it would have no end."""
    waiting, count = [value], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        if count + len(waiting) > most:
            raise ValueError("it holds more values than bytes")


def read_torch(path, kind, *, mmap=False, crc=None):
    """What torch.save wrote: tensors and plain values, nothing else, so no code in it
    can run. With mmap the tensors stay in the file, and its checksums are compared only with
    crc. Raises ValueError, "PATH is not `kind`", for any other file. torch's own words are not
    passed on: they advise to trust the file, or to save it again."""
    check_regular(path)
    try:
        check_archive(path, crc=not mmap if crc is None else crc)
        content = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
        check_count(content, os.path.getsize(path))
        return content
    except Exception as error:  # a damaged file raises half a dozen types
        reason = (what_it_is(path)
                  or "it holds more than tensors and plain values, or is damaged")
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        if isinstance(error, zipfile.BadZipFile) and zipfile.is_zipfile(path):
            reason = f"it is damaged ({error}): copy it again, or make it anew"
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


def read_json(path, *keys):
    """The JSON object in a file. Raises ValueError if there is none, or a key is missing."""
    if not Path(path).is_file():
        raise ValueError(f"there is no {path}")
    if reason := what_it_is(path):
        raise ValueError(reason)
    value = parse_json(Path(path).read_bytes(), path)
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{path} has no {', '.join(missing)}: it is damaged, or another's")
    return value


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
    def finite(tensor):
        tensor = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no isfinite
        return tensor.isfinite().all()

    bad = [name for name, tensor in tensors.items() if not finite(tensor)]
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
