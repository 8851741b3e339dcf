"""The run folder: what train.py writes while it trains, and reads back to go on.

    log.csv         a row a step                        from the first step
    checkpoint.pt   all that the next step depends on   every --save-every steps, when stopped,
                                                        at the end of training; gone when all is
                                                        done
    adapter.pt      or, for --method full, a checkpoint folder in Meta's layout      at the end
    run.json        settings, versions, fingerprints, metrics                        last

Each file is written whole or not at all (data/files.py). Used by train.py and eval_mmlu.py.
"""

import csv
import math
import os
import platform
import signal
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from data.files import (check_finite, check_tensors, file_fingerprint, misfits, read_json,
                        read_torch, weights_fingerprint, write_file)

RUN_FILES = ("run.json", "checkpoint.pt", "log.csv", "adapter.pt", "params.json",
             "consolidated.00.pth", "tokenizer.model")
MARKS = RUN_FILES[:3]  # only train.py writes these: without one the folder is not its own
# settings that may differ between a run and its continuation, since no weight depends on them
FREE = ("resume", "overwrite", "out", "save_every", "debug", "checkpoint_activations")
CHECKPOINT_KEYS = {"settings", "fingerprints", "step", "before", "clusters", "tensors", "optimizer",
                   "scaler", "rng", "cuda_rng"}
MOST_SKIPPED = 20  # steps in a row: fp16's scale, 2**16 at the start, has then fallen below 1
NAMED = 20  # records of a batch that a message names


# ---------------------------------------------------------------- the folder


def check_out(args):
    """The output folder, which must not hold another run unless --overwrite or --resume says so.
    Nothing is written yet, so that a run that cannot start leaves no trace."""
    out = Path(args.out)
    if out.resolve() == Path(args.weights).resolve():
        raise ValueError(f"--out {out} is the folder of the weights: name another")
    held = [name for name in RUN_FILES if (out / name).exists()]
    if args.resume and "checkpoint.pt" not in held:
        raise ValueError(f"--resume: {out} holds no checkpoint.pt, found {held or 'no run'}: "
                         "start anew without --resume")
    if held and not (args.resume or args.overwrite):
        resume = " or go on with --resume" if "checkpoint.pt" in held else ""
        raise ValueError(f"{out} already holds a run ({', '.join(held)}): choose another --out, "
                         f"replace it with --overwrite{resume}")
    if held and args.overwrite and not set(MARKS) & set(held):
        raise ValueError(f"--overwrite: {out} holds {', '.join(held)} but none of "
                         f"{', '.join(MARKS)}, so it is no run: name another --out")
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):  # nameless: os.access would ask for another user
            pass
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written, since {there} is read-only or no folder "
                         f"({error.strerror}): name another") from error
    return out


def prepare_out(out, args):
    """Makes the folder, now that the run can start; with --overwrite the old run goes, and so does
    what a killed one was writing."""
    out.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        (out / f"{name}.tmp").unlink(missing_ok=True)
        if not args.resume:
            (out / name).unlink(missing_ok=True)


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "sentencepiece": sentencepiece.__version__,
            "platform": platform.platform(), "threads": torch.get_num_threads()}


def fingerprints(args):
    """Of what the run reads: sha256 of the data files and the tokenizer, and of the weights."""
    prints = {name: file_fingerprint(path)
              for name, path in [("data", args.data), ("val_data", args.val_data)] if path}
    return {**prints, "tokenizer": file_fingerprint(Path(args.weights) / "tokenizer.model"),
            "weights": weights_fingerprint(args.weights)}


def compare_run(folder, found):
    """Names of the fingerprints that differ between found(), {name: sha256}, and run.json in the
    folder. A folder without a run.json has nothing to say, and found is not called."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        return []
    try:
        recorded = dict(read_json(path)["fingerprints"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the run.json of a run ({error}): move it away, or give "
                         "files from a whole run folder") from error
    return [name for name, value in found().items() if recorded.get(name, value) != value]


# ---------------------------------------------------------------- the checkpoint


def settings(args):
    return {key: value for key, value in vars(args).items() if key not in FREE}


def save_checkpoint(path, args, prints, model, optimizer, scaler, step, before, clusters):
    """All that the next step depends on. The step is the scheduler's too, and the place in the
    shuffled data follows from it and the seed; no generator but torch's is used. Every run keeps
    its last weights and selects none, so the only metric to keep is the base's, `before`."""
    cuda = args.device.startswith("cuda")
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {"settings": settings(args), "fingerprints": prints, "step": step, "before": before,
             "clusters": clusters, "tensors": tensors, "optimizer": optimizer.state_dict(),
             "scaler": scaler.state_dict(), "rng": torch.get_rng_state(),
             "cuda_rng": torch.cuda.get_rng_state(args.device) if cuda else None}
    moments = {f"{key} of parameter {i}": value for i, of in state["optimizer"]["state"].items()
               for key, value in of.items()}
    check_finite({**tensors, **moments}, path)
    write_file(path, lambda file: torch.save(state, file))


def read_checkpoint(path):
    """The state that save_checkpoint wrote; raises ValueError for any other file."""
    kind = "a checkpoint of a run"
    state = read_torch(path, kind)
    if not isinstance(state, dict) or state.keys() != CHECKPOINT_KEYS:
        found = sorted(map(str, state))[:4] if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path} is not {kind}: found {found}")
    clusters = state["clusters"]
    if not (type(state["step"]) is int and state["step"] > 0
            and isinstance(state["settings"], dict) and isinstance(state["fingerprints"], dict)
            and (clusters is None or isinstance(clusters, dict)
                 and clusters.get("k") == state["settings"].get("heads"))):
        raise ValueError(f"{path} is not {kind}: its step, settings, fingerprints or clusters are "
                         "damaged")
    return state


def check_losses(losses, categories):
    """Raises ValueError unless these are the losses that evaluate returns for the categories."""
    if losses.keys() != categories or any(
            type(row[key]) not in (int, float) or not math.isfinite(row[key])
            for row in losses.values() for key in ("loss", "exact", "records", "tokens")):
        raise ValueError("its losses of the base are damaged")


def restore(path, args, prints, model, optimizer, scaler, categories):
    """(steps done, losses of the base by category) of an interrupted run, whose state is put in
    place when its settings, data and weights were these; raises ValueError that names each
    difference."""
    state, now = read_checkpoint(path), settings(args)
    changed = [f"{key} was {state['settings'].get(key)}, is {now[key]}"
               for key in sorted(now) if now[key] != state["settings"].get(key)]
    if changed:
        raise ValueError(f"--resume with other settings: {', '.join(changed)}: give those of the "
                         "first command")
    changed = [name for name in prints if prints[name] != state["fingerprints"].get(name)]
    if changed:
        raise ValueError(f"--resume: {', '.join(changed)} changed since {path} was written: bring "
                         "the old files back, or start anew in another --out")
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        check_losses(state["before"], categories)
        check_tensors(state["tensors"])
        check_finite(state["tensors"], path)
        if misfits({name: p.shape for name, p in wanted.items()}, state["tensors"]):
            raise ValueError("its tensors are not those that train here")
        moments, trained = state["optimizer"]["state"], list(wanted.values())
        for i, of in moments.items():
            check_tensors(of)
            check_finite(of, path)
            if any(value.shape not in ((), trained[i].shape) for value in of.values()):
                raise ValueError("the optimiser's state has other shapes")
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], args.device)
    except Exception as error:  # damaged content raises almost anything
        raise ValueError(f"{path} does not fit this run: {error}") from error
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state["tensors"][name])
    return state["step"], state["before"]


def how_to_go_on(out):
    """What a run that ends early says: the checkpoint that stands, read from the file itself."""
    path = out / "checkpoint.pt"
    if not path.exists():
        return f"no checkpoint was written to {out} yet"
    step = read_torch(path, "a checkpoint of a run", mmap=True)["step"]
    return (f"the last good checkpoint is {path}, of step {step}; the same command with --resume "
            "goes on from it")


@contextmanager
def catch_signals():
    """Inside, Ctrl-C and SIGTERM are only noted in the list that it yields, so that the loop can
    end the step, save and stop."""
    signals = []
    handlers = {number: signal.signal(number, lambda number, _: signals.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- log.csv


class Log:
    """log.csv, one row a step. Losses stay on the device until flush, so that the loop does not
    wait for the GPU at every step; the batches stay as well, for flush to name their records."""

    FIELDS = ("step", "loss", "grad_norm", "lr", "tokens_per_second")

    def __init__(self, path, start, fp16):
        self.fp16, self.skipped, kept = fp16, 0, []
        if start and path.exists():  # resumed: steps after the checkpoint will come again
            with open(path, encoding="utf-8", newline="") as file:
                kept = [row for row in csv.reader(file) if len(row) == len(self.FIELDS)
                        and row[0].isdecimal() and int(row[0]) <= start]
        text = "".join(",".join(row) + "\r\n" for row in [self.FIELDS, *kept])
        write_file(path, lambda file: file.write(text.encode()))
        self.file = open(path, "a", encoding="utf-8", newline="")
        self.writer = csv.DictWriter(self.file, self.FIELDS)
        for row in kept:
            self.count_skips(float(row[2]))
        self.rows, self.clock = [], time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def add(self, step, loss, norm, lr, batches):
        self.rows.append((step, loss, norm, lr, batches))

    def count_skips(self, norm):
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1

    def flush(self):
        """Writes and syncs the rows, returns the latest. Raises ValueError for a step whose loss or
        gradient is not finite; fp16's scaler has skipped a step with such a gradient, as it should,
        but MOST_SKIPPED in a row are no accident."""
        if not self.rows:
            return None
        losses = torch.stack([row[1] for row in self.rows]).tolist()
        norms = torch.stack([row[2] for row in self.rows]).tolist()
        tokens = sum(len(s.ids) for row in self.rows for batch in row[4] for s in batch)
        speed = round(tokens / (time.perf_counter() - self.clock))
        problem = None
        for (step, _, _, lr, batches), loss, norm in zip(self.rows, losses, norms):
            latest = dict(zip(self.FIELDS, (step, loss, norm, lr, speed)))
            self.writer.writerow(latest)
            self.count_skips(norm)
            skipped = self.fp16 and self.skipped
            if skipped >= MOST_SKIPPED:
                problem = (f"step {step}: fp16 has skipped {skipped} steps in a row, the last on "
                           f"{places(batches)}: use --dtype bf16 or fp32")
            elif not skipped and not (math.isfinite(loss) and math.isfinite(norm)):
                problem = (f"step {step}: loss {loss}, gradient norm {norm} on {places(batches)}: "
                           "look at these records, or start anew with a lower --lr")
            if problem:
                break
        self.file.flush()
        os.fsync(self.file.fileno())
        if problem:
            raise ValueError(problem)
        self.rows, self.clock = [], time.perf_counter()
        return latest


def places(batches):
    """Where in the data file the records of a step stand."""
    named = [s.place for batch in batches for s in batch]
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return f"{', '.join(named[:NAMED])}{more} of the training data"
