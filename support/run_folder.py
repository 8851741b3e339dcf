"""The run folder: what train.py writes while it trains, and reads back to go on.

    log.csv         a row a step                        from the first step
    checkpoint.pt   all that the next step depends on   every --save-every steps, when stopped,
                                                        at the end of training; gone when all is
                                                        done
    adapter.pt      or, for --method full, a checkpoint folder in Meta's layout      at the end
    run.json        settings, versions, fingerprints, metrics                        last

Each file is written whole or not at all (support/files.py).
"""

import csv
import math
import os
import platform
import shutil
import signal
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from hydralora import HydraSettings, load_adapter, save_adapter
from support.device import DTYPES, get_rng_state, set_rng_state
from support.diagnose import explained, stated_length, warn_of_spare_rows
from support.distributed import ignore_signals, load, rank
from support.files import (
    check_finite,
    check_tensors,
    file_fingerprint,
    read_json,
    read_torch,
    shape_mismatches,
    weights_fingerprint,
    write_file,
    write_json,
    write_llama,
    write_text,
)

RUN_FILES = ("run.json", "checkpoint.pt", "log.csv", "adapter.pt", "params.json",
             "consolidated.00.pth", "tokenizer.model")
SIGNS_OF_A_RUN = RUN_FILES[:3]  # train.py alone writes these; --overwrite needs to see one of them
# settings that may differ between a run and its continuation: no weight depends on them, but for
# the order of sums
RESUME_MAY_DIFFER = ("resume", "overwrite", "out", "save_every", "debug", "checkpoint_activations",
              "strict", "shard_base", "processes")
CHECKPOINT_KEYS = {"settings", "fingerprints", "step", "before", "clusters", "tensors", "optimizer",
                   "scaler", "rng", "cuda_rng"}
MOST_SKIPPED = 20  # steps in a row: fp16's scale, 2**16 at the start, has then fallen below 1
MOST_NAMED = 20  # records of a batch that a message names


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
    if held and args.overwrite and not set(SIGNS_OF_A_RUN) & set(held):
        raise ValueError(f"--overwrite: {out} holds {', '.join(held)} but none of "
                         f"{', '.join(SIGNS_OF_A_RUN)}, so it is no run: name another --out")
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):  # what os.access says may be of another user
            pass
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written, since {existing} is read-only or no "
                         f"folder ({error.strerror}): name another") from error
    return out


def prepare_out(out, args):
    """Makes the folder, now that the run can start; with --overwrite the old run goes, and so does
    what a killed one was writing."""
    if rank():
        return
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "unfinished.tmp", ignore_errors=True)
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
              for name in ("data", "val_data", "keep_data") if (path := getattr(args, name))}
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


def compare_runs(weights, adapter):
    """Raises ValueError where an adapter, or the weights that --method full wrote, are not what the
    run.json beside them says. Where only the files of the base are others, a line warns:
    load_adapter has compared the values in them."""
    if not adapter:
        if compare_run(weights, lambda: {"tuned": weights_fingerprint(weights)}):
            raise ValueError(f"the weights in {weights} are not those that its run.json describes: "
                             "give the whole folder of one run")
        return
    if adapter.name != "adapter.pt":
        return  # not the file that a run.json beside it would describe
    differ = compare_run(adapter.parent, lambda: {
        "adapter": file_fingerprint(adapter), "weights": weights_fingerprint(weights),
        "tokenizer": file_fingerprint(weights / "tokenizer.model")})
    if set(differ) - {"weights"}:
        raise ValueError(f"{', '.join(differ)}: not what the run.json beside {adapter} records: "
                         "give adapter and weights of one run, or move run.json away")
    if differ:
        print(f"warning: {weights} holds other files than those that {adapter} was trained on, "
              "with the same weights as far as load_adapter compares them")


def load_model_and_adapter(args):
    """(model with its adapter, ready for evaluation, tokenizer), each compared with the run.json
    that describes it. args has weights, adapter (or None), device, dtype and max_seq_len."""
    with explained(weights=args.weights, adapter=args.adapter):
        model, tokenizer = load(args.weights, args, dtype=DTYPES[args.dtype],
                                max_seq_len=args.max_seq_len)
        if args.adapter:
            load_adapter(model, args.adapter)
    warn_of_spare_rows(model, tokenizer, args.weights)
    compare_runs(args.weights, args.adapter)
    return model.eval(), tokenizer


def write_result(model, args, out, result):
    """adapter.pt, or the weights that --method full trained; then run.json, with their fingerprint;
    then the checkpoint goes."""
    prints = result["fingerprints"]
    if args.method != "full":  # by all: save_adapter asks them for their parts of the base
        write_file(out / "adapter.pt", lambda file: save_adapter(model, file))
    if rank():
        return
    if args.method == "full":
        write_tuned(model, args.weights, out)
        wrote, prints["tuned"] = "the checkpoint", weights_fingerprint(out)
    else:
        wrote, prints["adapter"] = "adapter.pt", file_fingerprint(out / "adapter.pt")
    write_json(out / "run.json", result)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    print(f"\nwrote {wrote}, run.json and log.csv to {out}\n"
          f"to see it: python -m tools.plot {out} --out {out / 'plot.png'}")


def write_tuned(model, weights, out):
    """write_llama of a model that was loaded from `weights` and trained. A length that is a default
    there is not written as the model's own."""
    args = model.args
    if not stated_length(weights):
        model.args = replace(args, max_seq_len=None)  # what is None is not written
    write_llama(model, Path(weights) / "tokenizer.model", out)
    model.args = args


# ---------------------------------------------------------------- the checkpoint


def resume_key(args):
    """{name: value} of the settings that a run and its continuation must share."""
    return {key: value for key, value in vars(args).items() if key not in RESUME_MAY_DIFFER}


def recorded_setting(recorded, key):
    """The value of a setting in a checkpoint. An older one may lack it: then it had its default,
    which for everything but an adapter's settings is off."""
    return recorded.get(key, getattr(HydraSettings, key, None))


def save_checkpoint(path, args, prints, model, optimizer, scaler, step, before, clusters):
    """All that the next step depends on: the learning rate and the place in the shuffled data
    follow from the step and the seed, and no generator but torch's is used. A run keeps its last
    weights, not its best, so the only metrics to keep are the base's, `before`."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {"settings": {**resume_key(args), "processes": args.processes},
             "fingerprints": prints, "step": step, "before": before, "clusters": clusters,
             "tensors": tensors, "optimizer": optimizer.state_dict(),
             "scaler": scaler.state_dict(), "rng": torch.get_rng_state(),
             "cuda_rng": get_rng_state(args.device)}  # of any device; the file keeps the name
    moments = {f"{key} of parameter {i}": value for i, entry in state["optimizer"]["state"].items()
               for key, value in entry.items()}
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


def check_losses(losses, held):
    """Raises ValueError unless these are the losses that measure() returns for what is held."""
    if losses.keys() != held.keys() or any(
            losses[part].keys() != {"", *(s.category for s in sequences)} or any(
                type(row[key]) not in (int, float) or not math.isfinite(row[key])
                for row in losses[part].values()
                for key in ("loss", "exact", "records", "tokens"))
            for part, sequences in held.items()):
        raise ValueError("its losses of the base are damaged")


def check_state(state, path, wanted, held):
    """Raises ValueError, or anything where the content is damaged, unless the checkpoint's losses
    and tensors are of this run: `wanted` is {name: parameter} of what trains here."""
    check_losses(state["before"], held)
    check_tensors(state["tensors"])
    check_finite(state["tensors"], path)
    if shape_mismatches({name: p.shape for name, p in wanted.items()}, state["tensors"]):
        raise ValueError("its tensors are not those that train here")
    trained = list(wanted.values())
    if [len(group["params"]) for group in state["optimizer"]["param_groups"]] != [len(trained)]:
        raise ValueError("the optimiser's state is of other tensors")
    for i, entry in state["optimizer"]["state"].items():
        check_tensors(entry)
        check_finite(entry, path)
        if any(value.shape not in ((), trained[i].shape) for value in entry.values()):
            raise ValueError("the optimiser's state has other shapes")


def restore(path, args, prints, model, optimizer, scaler, held):
    """(steps done, losses of the base on what is held) of an interrupted run, whose state is put in
    place when its settings, data and weights were these; raises ValueError that names each
    difference."""
    state, now = read_checkpoint(path), resume_key(args)
    before = {key: recorded_setting(state["settings"], key) for key in now}
    changed = [f"{key} was {before[key]}, is {now[key]}" for key in sorted(now)
               if now[key] != before[key] and (now[key] or before[key])]
    if changed:
        raise ValueError(f"--resume with other settings: {', '.join(changed)}: give those of the "
                         "first command")
    if (begun := state["settings"].get("processes", 1)) != args.processes:
        print(f"the run was begun by {begun} processes, {args.processes} go on with it: they round "
              "differently, and draw other dropout masks where one of the two is 1")
    changed = [name for name in prints if prints[name] != state["fingerprints"].get(name)]
    if changed:
        raise ValueError(f"--resume: {', '.join(changed)} changed since {path} was written: bring "
                         "the old files back, or start anew in another --out")
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        check_state(state, path, wanted, held)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        set_rng_state(state["cuda_rng"], args.device)
    except Exception as error:  # damaged content raises almost anything
        reason = error if isinstance(error, ValueError) else "it is damaged"
        raise ValueError(f"{path} does not fit this run: {reason}; start anew with --overwrite, or "
                         "in another --out") from error
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state["tensors"][name])
    return state["step"], state["before"]


def resume_hint(out):
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
        if signals:  # under torchrun more of them follow
            ignore_signals()


# ---------------------------------------------------------------- log.csv


class Log:
    """log.csv, one row a step. Losses stay on the device until flush, so that the loop does not
    wait for the GPU at every step; the batches stay as well, for flush to name their records."""

    def __init__(self, path, start, fp16):
        self.fp16, self.skipped, self.columns, kept = fp16, 0, None, []
        if start and path.exists():  # resumed: steps after the checkpoint will come again
            with open(path, encoding="utf-8", newline="") as file:
                self.columns, *rows = [*csv.reader(file)] or [None]
            kept = [row for row in rows if len(row) == len(self.columns)
                    and row[0].isdecimal() and int(row[0]) <= start]
        lines = [self.columns, *kept] if self.columns else []
        write_text(path, "".join(",".join(row) + "\r\n" for row in lines))
        self.file = open(os.devnull if rank() else path, "a", encoding="utf-8", newline="")
        for row in kept:
            self.count_skips(float(row[self.columns.index("grad_norm")]))
        self.rows, self.clock = [], time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def add(self, row, batches):
        """A step's row, {column: number or tensor}, and the batches that it took. The columns are
        those of the first row."""
        self.rows.append((row, batches))

    def count_skips(self, norm):
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1

    def flush(self):
        """Writes and syncs the rows, returns the latest. Raises ValueError for a step whose loss or
        gradient is not finite; fp16's scaler has skipped a step with such a gradient, as it should,
        but MOST_SKIPPED in a row are no accident."""
        if not self.rows:
            return None
        tokens = sum(len(s.ids) for _, batches in self.rows for batch in batches for s in batch)
        rows = to_python([row for row, _ in self.rows])
        speed = round(tokens / (time.perf_counter() - self.clock))
        writer = csv.DictWriter(self.file, self.columns or [*rows[0], "tokens_per_second"])
        if not self.columns:
            self.columns = writer.fieldnames
            writer.writeheader()
        problem = None
        for row, (_, batches) in zip(rows, self.rows):
            latest = {**row, "tokens_per_second": speed}
            writer.writerow(latest)
            self.count_skips(row["grad_norm"])
            skipped = self.fp16 and self.skipped
            if skipped >= MOST_SKIPPED:
                problem = (f"step {row['step']}: fp16 has skipped {skipped} steps in a row, the "
                           f"last on {describe_records(batches)}: use --dtype bf16 or fp32")
            elif not skipped and not all(map(math.isfinite, row.values())):
                problem = (f"step {row['step']}: loss {row['loss']}, gradient norm "
                           f"{row['grad_norm']} on {describe_records(batches)}: look at these "
                           "records, or start anew with a lower --lr")
            if problem:
                break
        self.file.flush()
        if not rank():
            os.fsync(self.file.fileno())
        if problem:
            raise ValueError(problem)
        self.rows, self.clock = [], time.perf_counter()
        return latest


def to_python(rows):
    """The rows with numbers in place of tensors; each column is read back from the device once."""
    columns = {}
    for key in rows[0]:
        column = [row[key] for row in rows]
        columns[key] = torch.stack(column).tolist() if torch.is_tensor(column[0]) else column
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def describe_records(batches):
    """Where in the data file the records of a step stand."""
    named = [s.place for batch in batches for s in batch]
    more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    return f"{', '.join(named[:MOST_NAMED])}{more} of the training data"
