"""The run folder: what train.py writes while it trains, and reads again to resume.

    log.csv          a row per step                     from the first step
    checkpoint.pt    all that the next step depends on  every --save-every steps, when stopped and
                                                        after the last step; removed at the end
    adapter-best.pt  the lowest validation loss so far  with --eval-every
    adapter.pt       for --method full, a checkpoint folder in Meta's layout      at the end
    run.json         settings, versions, fingerprints, metrics                    last

Each file is written whole or not at all (support/files.py).
"""

import csv
import math
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from shlex import quote

import numpy as np
import sentencepiece
import torch

from data.what_it_is import check_is_file
from hydralora import save_adapter
from support.base import stated_length
from support.device import get_rng_state, set_rng_state
from support.distributed import rank
from support.evaluation import TOTAL
from support.files import (
    check_finite,
    check_tensors,
    file_fingerprint,
    read_torch,
    shape_mismatches,
    weights_fingerprint,
    wrap_disk_errors,
    write_file,
    write_json,
    write_llama,
    write_text,
)

RUN_FILES = ("run.json", "checkpoint.pt", "log.csv", "adapter.pt", "adapter-best.pt",
             "params.json", "consolidated.00.pth", "tokenizer.model")
SIGNS_OF_A_RUN = RUN_FILES[:3]  # only train.py writes these; --overwrite needs to see one
# settings that a resumed run may change: no weight depends on them, but for the order of sums.
# What the paths hold is compared by its fingerprint
RESUME_MAY_DIFFER = ("resume", "overwrite", "out", "save_every", "eval_every", "debug", "strict",
                     "checkpoint_activations", "shard_base", "processes", "order",
                     "weights", "data", "val_data", "keep_data", "init_adapter")
CHECKPOINT_KEYS = {"settings", "versions", "fingerprints", "step", "before", "init", "clusters",
                   "tensors", "optimizer", "scaler", "rng", "cuda_rng"}
ACTING = ("params", "betas", "eps", "weight_decay", "amsgrad", "maximize")  # of AdamW
MOST_SKIPPED = 20  # steps in a row: fp16's scale, 2**16 at the start, is below 1 by then
MOST_NAMED = 20  # records of a step that a message names

# ---------------------------------------------------------------- the folder


def check_out(out, weights, *, resume, overwrite):
    """The output folder as a Path. It must not hold another run, unless resume or overwrite. No
    file is written yet, so a run that cannot start leaves no trace."""
    out = Path(out)
    if out.resolve() == Path(weights).resolve():
        raise ValueError(f"--out {out} is the folder of the weights: name another")
    found = [name for name in RUN_FILES if (out / name).exists()]
    if resume and "run.json" in found and "checkpoint.pt" not in found:
        result = "--init-adapter", out / "adapter.pt"
        if not result[1].exists():  # of --method full
            result = "--weights", out
        raise ValueError(f"--resume: the run in {out} has ended, its result is {result[1]}: to "
                         f"train that further, give {result[0]} {quote(str(result[1]))} and "
                         "another --out")
    if resume and "checkpoint.pt" not in found:
        raise ValueError(f"--resume: {out} holds no checkpoint.pt, found {found or 'no run'}: "
                         "start again without --resume")
    if found and not (resume or overwrite):
        also = " or continue it with --resume" if "checkpoint.pt" in found else ""
        raise ValueError(f"{out} already holds a run ({', '.join(found)}): choose another --out, "
                         f"replace it with --overwrite{also}")
    if found and overwrite and not set(SIGNS_OF_A_RUN) & set(found):
        raise ValueError(f"--overwrite: {out} holds {', '.join(found)} but none of "
                         f"{', '.join(SIGNS_OF_A_RUN)}, so it is no run: name another --out")
    return out


def prepare_out(out, *, resume):
    """Makes the folder, once the run can start. Removes the former run, unless it is resumed."""
    if rank():
        return
    out.mkdir(parents=True, exist_ok=True)
    for name in () if resume else RUN_FILES:
        (out / name).unlink(missing_ok=True)


def versions():
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "numpy": np.__version__, "sentencepiece": sentencepiece.__version__,
            "platform": platform.platform(), "threads": torch.get_num_threads()}


def fingerprints(weights, data, **others):
    """{name: sha256} of what a run reads: the weights, their tokenizer, each file of data (called
    data, data_2, data_3), and each other file that is given."""
    files = {f"data_{i}" if i > 1 else "data": path for i, path in enumerate(data, start=1)}
    files |= {name: path for name, path in others.items() if path}
    files["tokenizer"] = Path(weights) / "tokenizer.model"
    for name, path in files.items():
        check_is_file(path, "tokenizer" if name == "tokenizer" else "data file")
    found = {name: file_fingerprint(path) for name, path in files.items()}
    return {**found, "weights": weights_fingerprint(weights)}


def save_adapter_file(model, path):
    """save_adapter, whole or not at all. Every rank must call it: the base's fingerprint gathers
    the parts of a sharded base."""
    write_file(path, lambda file: save_adapter(model, file))


def write_result(model, out, result, *, weights, full):
    """Writes adapter.pt, or the weights that --method full trained; then run.json, with their
    fingerprint; then removes the checkpoint."""
    if not full:
        save_adapter_file(model, out / "adapter.pt")
    if rank():
        return
    fingerprints = result["fingerprints"]
    if full:
        write_tuned(model, weights, out)
        fingerprints["tuned"] = weights_fingerprint(out)
    else:
        fingerprints["adapter"] = file_fingerprint(out / "adapter.pt")
    write_json(out / "run.json", result)
    (out / "checkpoint.pt").unlink(missing_ok=True)


def write_tuned(model, weights, out):
    """write_llama of a trained model. A default length is not written as the model's own."""
    args = model.args
    if not stated_length(weights):
        model.args = replace(args, max_seq_len=None)  # None is not written
    write_llama(model, Path(weights) / "tokenizer.model", out)
    model.args = args


# ---------------------------------------------------------------- the checkpoint


def trained_parameters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(path, step, facts, model, optimizer, scaler):
    """All that the next step depends on. The learning rate and the place in the shuffled data
    follow from the step and the seed, and no generator but torch's is used. facts: what run.json
    will hold, and the losses of start_or_resume."""
    tensors = {name: p.detach() for name, p in trained_parameters(model).items()}
    state = {name: facts[name] for name in ("settings", "fingerprints", "clusters")}
    state |= {"before": facts["losses"]["base"], "init": facts["losses"].get("before")}
    state["versions"] = facts["versions"]
    state |= {"step": step, "tensors": tensors, "optimizer": optimizer.state_dict(),
              "scaler": scaler.state_dict(), "rng": torch.get_rng_state(),
              "cuda_rng": get_rng_state(next(iter(tensors.values())).device)}  # of any device
    moments = {f"{key} of parameter {i}": value for i, entry in state["optimizer"]["state"].items()
               for key, value in entry.items()}
    check_finite({**tensors, **moments}, path)
    write_file(path, lambda file: torch.save(state, file))


def read_checkpoint(path, mmap=False):
    """The state that save_checkpoint wrote. Raises ValueError for any other file."""
    kind = "a checkpoint of a run"
    state = read_torch(path, kind, mmap=mmap)
    if isinstance(state, dict):
        state = {"init": None, "versions": {}, **state}  # older checkpoints lack these
    if not isinstance(state, dict) or state.keys() != CHECKPOINT_KEYS:
        found = sorted(map(str, state))[:4] if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path} is not {kind}: found {found}")
    clusters = state["clusters"]
    if not (type(state["step"]) is int and state["step"] > 0
            and all(isinstance(state[name], dict)
                    for name in ("settings", "versions", "fingerprints"))
            and (clusters is None or isinstance(clusters, dict)
                 and clusters.get("k") == state["settings"].get("heads"))):
        raise ValueError(f"{path} is not {kind}: its step, settings, fingerprints or clusters are "
                         "damaged")
    return state


def compare_settings(recorded, settings, defaults):
    """Raises ValueError that names each setting a resumed run must not change. A setting that the
    checkpoint lacks did not exist when it was written: it had its default."""
    names = sorted(set(settings) - set(RESUME_MAY_DIFFER))
    before = {name: recorded.get(name, defaults.get(name)) for name in names}
    changed = [name for name in names if settings[name] != before[name]]
    if changed:
        words = ", ".join(f"{name} was {before[name]}, is {settings[name]}" for name in changed)
        hint = "give those of the first command"
        if {"epochs", "max_steps"} & set(changed):
            hint += ("; to train longer, let the run end (its learning rate falls to zero with the "
                     "last step), then give its adapter to --init-adapter")
        raise ValueError(f"--resume with other settings: {words}: {hint}")


def check_resume(state, path, settings, now, defaults):
    """Raises ValueError unless the settings, and the fingerprints `now` of data and weights, are
    those of the stopped run with this state; `defaults` are the settings of a command without
    flags. Prints what rounds differently here."""
    compare_settings(state["settings"], settings, defaults)
    for name in ("torch", "threads"):
        before, here = state["versions"].get(name), versions()[name]
        if before not in (None, here):
            print(f"the run had {name} {before} and continues with {here}: sums may be rounded "
                  "differently")
    begun = state["settings"].get("processes", 1)
    if begun != settings["processes"]:
        print(f"the run was started with {begun} processes and continues with "
              f"{settings['processes']}: they round differently, and draw other dropout masks if "
              "one of the two is 1")
    changed = [name for name in sorted(now.keys() | state["fingerprints"].keys())
               if now.get(name) != state["fingerprints"].get(name)]
    if changed:
        raise ValueError(f"--resume: {', '.join(changed)} changed since {path} was written: bring "
                         "the old files back, or start again in another --out")


def restore(path, model, optimizer, scaler):
    """Puts a stopped run's state in place; returns (steps done, losses of start_or_resume)."""
    state = read_checkpoint(path)
    trained = trained_parameters(model)
    try:
        losses = {"base": state["before"]}
        if state["init"] is not None:
            losses["before"] = state["init"]
        for found in losses.values():
            check_losses(found)
        check_tensors(state["tensors"])
        check_finite(state["tensors"], path)
        if shape_mismatches({name: p.shape for name, p in trained.items()}, state["tensors"]):
            raise ValueError("its tensors are not those that train here")
        load_moments(optimizer, state["optimizer"], path)
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        set_rng_state(state["cuda_rng"], next(iter(trained.values())).device)
    except Exception as error:  # damaged content raises almost anything
        reason = error if isinstance(error, ValueError) else "it is damaged"
        raise ValueError(f"{path} does not fit this run: {reason}; start again with --overwrite, "
                         "or in another --out") from error
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["tensors"][name])
    return state["step"], losses


def check_losses(losses):
    """Raises ValueError unless these are losses of evaluate_sets."""
    rows = [row for part in losses.values() for row in part.values()]
    wanted = ("loss", "exact", "records", "tokens")
    if "val" not in losses or any(TOTAL not in part for part in losses.values()) or any(
            type(row[key]) not in (int, float) or not math.isfinite(row[key])
            for row in rows for key in wanted):
        raise ValueError("its losses are damaged")


def load_moments(optimizer, saved, path):
    """Copies the state of a saved optimizer into this one.

    A step of zero gradients makes the state that the optimizer wants, in each parameter's own
    layout: fused AdamW reads moments of another layout wrongly, and says nothing. (The step's
    effect on the parameters is gone when theirs are loaded.) Raises ValueError if names, shapes or
    dtypes differ, or the settings that act on a step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    fresh, groups = (optimizer.state_dict()[name] for name in ("state", "param_groups"))
    saved, saved_groups = saved["state"], saved["param_groups"]
    acting, saved_acting = ([{name: group[name] for name in ACTING} for group in part]
                            for part in (groups, saved_groups))
    if fresh.keys() != saved.keys() or acting != saved_acting:
        raise ValueError("its optimizer state is of other parameters, or of another optimizer")
    for i, entry in fresh.items():
        check_tensors(saved[i])
        check_finite(saved[i], path)
        same = entry.keys() == saved[i].keys() and all(
            entry[name].shape == saved[i][name].shape and entry[name].dtype == saved[i][name].dtype
            for name in entry)
        if not same:
            raise ValueError("its optimizer state has other names, shapes or dtypes")
        for name, tensor in entry.items():
            tensor.copy_(saved[i][name])


def resume_hint(out):
    """What a run that ends early should print: which checkpoint is there, read from the file."""
    path = out / "checkpoint.pt"
    if not path.exists():
        return f"no checkpoint was written to {out} yet"
    step = read_torch(path, "a checkpoint of a run", mmap=True)["step"]
    return (f"the last good checkpoint is {path}, of step {step}; rerun the same command with "
            "--resume to continue")


# ---------------------------------------------------------------- log.csv

COLUMNS = ("step", "loss", "grad_norm", "lr", "tokens_per_second",
           "val_loss", "exact_match", "kept_loss")  # the last three with --eval-every alone


class Log:
    """log.csv, a row per step. Losses stay on the device until flush, so that the loop does not
    wait for the GPU at every step. A resumed run continues the file after step `start`."""

    def __init__(self, path, start=0, fp16=False):
        # the steps after the checkpoint will be taken again
        done = [row for row in read_log(path) if int(row["step"]) <= start] if start else []
        lines = [",".join(COLUMNS), *(",".join(row.values()) for row in done)]
        write_text(path, "".join(f"{line}\r\n" for line in lines))
        self.file = open(os.devnull if rank() else path, "a", encoding="utf-8", newline="")
        self.best = min((float(row["val_loss"]) for row in done if row["val_loss"]),
                        default=math.inf)
        self.fp16 = fp16
        self.skipped = 0  # steps in a row up to now
        for row in done:
            self.count_skip(float(row["grad_norm"]))
        self.rows = []
        self.clock = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def add(self, step, loss, grad_norm, lr, batches):
        """A step and the batches that it took; loss and grad_norm are tensors."""
        row = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr}
        self.rows.append((row, batches))

    def add_evaluation(self, results):
        """What evaluate_sets found after the latest step; returns whether its validation loss is
        the lowest so far."""
        row, val = self.rows[-1][0], results["val"][TOTAL]
        row.update(val_loss=val["loss"], exact_match=val["exact"])
        if "kept" in results:
            row["kept_loss"] = results["kept"][TOTAL]["loss"]
        best = val["loss"] < self.best
        self.best = min(self.best, val["loss"])
        return best

    def flush(self):
        """Writes and syncs the rows; returns the latest in words. Raises ValueError for a step
        with a loss or gradient that is not finite. fp16's scaler skips a step with such a
        gradient, as it should, but MOST_SKIPPED in a row are no accident."""
        tokens = sum(len(s.ids) for _, batches in self.rows for batch in batches for s in batch)
        speed = round(tokens / (time.perf_counter() - self.clock))
        rows, problem = to_python([row for row, _ in self.rows]), None
        writer = csv.DictWriter(self.file, COLUMNS)
        with wrap_disk_errors(self.file.name):
            for row, (_, batches) in zip(rows, self.rows):
                writer.writerow({**row, "tokens_per_second": speed})
                problem = self.problem_of(row, batches)
                if problem:
                    break
            self.file.flush()
            if not rank():
                os.fsync(self.file.fileno())
        if problem:
            raise ValueError(problem)
        self.rows = []
        self.clock = time.perf_counter()
        return f"loss {row['loss']:.3f}, lr {row['lr']:.1e}, {speed} tokens/s"

    def count_skip(self, norm):
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1

    def problem_of(self, row, batches):
        """What is wrong with a step, with its records; None if nothing is."""
        self.count_skip(row["grad_norm"])
        if self.fp16 and self.skipped >= MOST_SKIPPED:
            return (f"step {row['step']}: fp16 has skipped {self.skipped} steps in a row, the "
                    f"last on {describe_records(batches)}: use --dtype bf16 or fp32")
        if self.fp16 and self.skipped or math.isfinite(row["loss"] + row["grad_norm"]):
            return None
        return (f"step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']} on "
                f"{describe_records(batches)}: look at these records, or start again with a "
                "lower --lr")


def read_log(path):
    """[{column: text}] of a log.csv, without rows that a kill cut short. Columns that an older
    file lacks are empty."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("step,")), len(lines))
    try:
        rows = [row for row in csv.DictReader(lines[start:])
                if None not in row and None not in row.values() and row["step"].isdecimal()]
    except csv.Error as error:
        raise ValueError(f"{path} is no log of a run: {error}") from error
    return [{name: row.get(name, "") for name in COLUMNS} for row in rows]


def to_python(rows):
    """The rows with numbers instead of tensors; each column is read from the device at once."""
    for name in ("loss", "grad_norm"):
        values = torch.stack([row[name] for row in rows]).tolist()
        rows = [{**row, name: value} for row, value in zip(rows, values)]
    return rows


def describe_records(batches):
    """Where in the data file the records of a step are."""
    named = [s.place for batch in batches for s in batch]
    more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    return f"{', '.join(named[:MOST_NAMED])}{more} of the training data"
