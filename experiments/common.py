"""What the experiments on HydraLoRA's claims share: flags, data, cached runs, one sweep.

A run is one call of train.py. Its folder under --runs is named after its settings and the
sha256 of weights and data: an interrupted script continues where it was, scripts share runs,
and a run on other weights or data is never mistaken for this one. The learning rate of every
method is the one with the lowest loss on a held-out tenth of the training data: rates a factor
of sqrt 2 apart, two seeds, the lower rate if two are within the scatter of the seeds.
report.py turns the numbers into intervals, claims and tables.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import signal
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

import eval_mmlu
import train
from data import QUIZ_SHOTS
from data.corpus import read_records, train_val_split, without_duplicates
from data.mmlu import read_questions
from experiments import report
from hydralora import add_hydralora, load_adapter
from model import Transformer, load_llama, read_params
from support import files
from support.base import load_model
from support.cli import Parser, check_min, flag, run_script
from support.lock import file_lock
from support.output import one_line
from support.run_folder import RESUME_MAY_DIFFER, fingerprints

RESULTS = Path(__file__).resolve().parent / "results"
# peak learning rates, a factor of sqrt 2 apart; how many more if the best is an edge
RATES = (2.83e-3, 4e-3, 5.66e-3)
WIDEN = 6
SWEEP_SEEDS = 2  # behind the choice of a rate
THREADS = 2  # of a rerun; all other runs have one
MIXED = 4000  # records of the mix in table1, heads and routing, which share their runs
SHARE = 0.1  # held out for the sweep; and for validation if the data comes without any
SCALE = 4.0  # alpha / rank, the paper's 32 / 8
# settings that all runs share
RECIPE = {"batch-size": 8, "grad-accum": 1, "dropout": 0, "device": "cpu", "dtype": "fp32",
          "save-every": 0}
DIVERGED = ("gradient norm", "tuned model", "not finite")  # in train.py's words for it
PATHS = ("weights", "data", "val_data", "keep_data")
# settings that are part of a run's name whatever their value; any other one, a later flag of
# train.py, only if it is not the default, so that it does not rename the runs of before
NAMED = ("alpha", "batch_size", "device", "dropout", "dry_run", "dtype", "epochs", "gate",
         "gpu_memory", "gpus", "grad_accum", "heads", "lr", "max_seq_len", "max_steps", "method",
         "rank", "seed", "targets")


# ---------------------------------------------------------------- flags and data


def parser(name, doc, *, seeds, epochs, records=0, rates=RATES, sweep_epochs=1):
    """The flags that the scripts share; a script adds its own. Without rates none are tried,
    without sweep_epochs none is chosen."""
    p = Parser(f"experiments.{name}", doc)
    p.description = doc
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--weights", help="checkpoint folder in Meta's layout (the embedded world's)")
    p.add_argument("--data", help="training records (the embedded world's)")
    p.add_argument("--val-data", help="validation records (the world's; else a tenth of --data)")
    p.add_argument("--keep-data", help="texts to measure forgetting on (none; the world's)")
    p.add_argument("--records", type=int, default=records,
                   help=f"number of records to draw from --data, 0: all ({records})")
    p.add_argument("--seeds", type=int, default=seeds, help=f"runs per method ({seeds})")
    p.add_argument("--epochs", type=int, default=epochs,
                   help=f"passes of these runs over the data ({epochs})")
    p.add_argument("--max-steps", type=int, default=0,
                   help="stop any run after so many steps, 0: off (%(default)s)")
    p.add_argument("--max-seq-len", type=int, help="tokens per record (the model's own limit)")
    p.add_argument("--runs", type=Path, default=Path("runs/claims"),
                   help="folder that caches the runs (runs/claims)")
    p.add_argument("--out", type=Path, default=RESULTS,
                   help="folder of the results (experiments/results)")
    p.set_defaults(sweep_epochs=1, rates=list(RATES), jobs=1)
    if rates:
        add_rates_flag(p, rates)
        p.add_argument("--jobs", type=int, default=2, help="processes of one thread each (2)")
    if sweep_epochs:
        p.add_argument("--sweep-epochs", type=int, default=sweep_epochs,
                       help=f"passes of the runs that choose the rate ({sweep_epochs})")
    return p


def add_rates_flag(p, rates):
    p.add_argument("--rates", type=float, nargs="+", default=list(rates),
                   help="learning rates to try; a sweep adds more if the best is the lowest or "
                        f"highest of several ({' '.join(f'{rate:g}' for rate in rates)})")


def parse_args(p, argv):
    """The flags; the four paths default as in train.py."""
    args = p.parse_args(argv)
    try:
        check_min(args, seeds=1, epochs=1, sweep_epochs=1, jobs=1, records=0, max_steps=0)
    except ValueError as error:
        p.error(str(error))
    if min(args.rates) <= 0:
        p.error("--rates must be positive")
    given = {name: getattr(args, name) for name in PATHS}
    defaults = train.parse_args(command_line({**given, **RECIPE}))
    for name in PATHS:
        setattr(args, name, getattr(defaults, name))
    [args.data] = args.data  # one file
    return args


def main(name, parse_args, run, argv=None):
    """The main function of every script."""
    return run_script(f"experiments.{name}", parse_args, run, argv,
                      stopped="stopped; the same command continues from here",
                      memory="--jobs 1 or a smaller --max-seq-len needs less; the same command "
                             "continues from here")


def load_records(args):
    """(training records, validation records). The draw and the split do not depend on a run's
    seed."""
    records = read_records(args.data)
    if args.records:
        records = draw_records(records, args.records)
    if args.val_data:
        val = read_records(args.val_data)
    else:
        records, val = train_val_split(records, SHARE, seed=0)
    return without_duplicates(records, val), val


def draw_records(records, count, seed=0):
    """That many of the records, in file order."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
    return [records[i] for i in sorted(order[:count].tolist())]


def write_records(records, args):
    """The path of a file with these records, named after its content."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    path = args.runs / "data" / f"{files.digest(text)}.jsonl"
    if not path.exists():
        with file_lock(f"{path}.lock", path):
            files.write_text(path, text)
    return path


def families(records):
    return {record["category"] for record in records}


def of_families(records, families):
    return [record for record in records if record["category"] in families]


def cached(path, key, compute):
    """compute(), cached as JSON at path; computed anew for another key."""
    key = files.digest(key)

    def is_known():
        return path.exists() and files.read_json(path, "key", "value")["key"] == key

    if not is_known():
        with file_lock(f"{path}.lock", path):
            if not is_known():  # another process may have finished it meanwhile
                files.write_json(path, {"key": key, "value": compute()})
    return files.read_json(path)["value"]  # as the next call reads it: keys are strings


# ---------------------------------------------------------------- the methods


def lora(rank, **changes):
    """The settings of LoRA; like all others with a constant alpha / rank."""
    return dict(method="lora", rank=rank, alpha=SCALE * rank, **changes)


def split(heads, rank):
    return dict(method="lora-split", heads=heads, rank=rank, alpha=SCALE * rank)


def hydra(heads, rank=8, **changes):
    if heads == 1:  # a single head has weight 1: the same method
        return lora(rank, **changes)
    return dict(method="hydralora", heads=heads, rank=rank, alpha=SCALE * rank, **changes)


FULL = dict(method="full")


def count_trainable(args, config):
    """Trainable parameters of a method that adds adapters, router included."""
    settings = train.parse_args(command_line(
        {"weights": args.weights, "data": args.data, **RECIPE, **config}))
    shape = read_params(args.weights)
    shape.vocab_size = max(shape.vocab_size, 1)  # missing in some params.json; never adapted
    with torch.device("meta"):
        model = Transformer(shape)
    return add_hydralora(model, **train.adapter_settings(settings))


def matched_rank(args, heads=1, **changes):
    """The rank at which so many heads have nearly the parameters of HydraLoRA 3x8 with the
    same changed settings, router included; parameters grow linearly with the rank."""
    wanted = count_trainable(args, hydra(3, 8, **changes))
    first, second = (count_trainable(args, hydra(heads, rank, **changes)) for rank in (1, 2))
    return max(1, round(1 + (wanted - first) / (second - first)))


# ---------------------------------------------------------------- runs


def command_line(settings):
    """The command line of {name of a flag: value}. None and False leave a flag out, True
    gives it without a value."""
    words = []
    for name, value in settings.items():
        if value is True:
            words.append(flag(name))
        elif value is not None and value is not False:
            words += [flag(name), str(value)]
    return words


def run_settings(args, config, *, rate, seed, data, val, epochs=None, keep=False):
    """The settings of a run, as train.parse_args returns them; data and val are files. With
    keep the run also measures its loss on --keep-data."""
    return train.parse_args(command_line({
        "weights": args.weights, "data": data, "val-data": val,
        "keep-data": args.keep_data if keep else None,
        "lr": rate, "seed": seed, "epochs": epochs or args.epochs, "max-steps": args.max_steps,
        "max-seq-len": args.max_seq_len, **RECIPE, **config}))


def run_folder(settings, runs):
    """Where a run is cached. The files that it reads count by their content, not their path."""
    defaults = {**train.default_settings(settings.method, train.PAPER_RECIPE), "micro_tokens": 0}
    named = {name: value for name, value in sorted(vars(settings).items()) if name in NAMED
             or name not in RESUME_MAY_DIFFER and value != defaults[name]}
    read = fingerprints(settings.weights, data=settings.data, val_data=settings.val_data,
                        keep_data=settings.keep_data)
    return runs / f"{settings.method}-{files.digest(named, sorted(read.items()))}"


def is_complete(folder, quiz=None):
    """Whether a run has ended, and its accuracy is known if there is a quiz."""
    if (folder / "diverged.json").exists():
        return True
    return (folder / "run.json").exists() and (not quiz or (folder / "quiz.json").exists())


def train_once(settings, folder):
    """Runs train.py in silence. A run whose loss or gradient is not finite leaves
    diverged.json. A stopped one raises KeyboardInterrupt; the next call starts it anew."""
    settings = argparse.Namespace(**{**vars(settings), "out": str(folder), "overwrite": True})
    silence = io.StringIO()
    with file_lock(f"{folder}.lock", folder):
        if is_complete(folder):  # another process may have finished it meanwhile
            return
        try:
            with redirect_stdout(silence), redirect_stderr(silence):
                status = train.run(settings)
        except ValueError as error:
            if not any(words in str(error) for words in DIVERGED):
                raise
            files.write_json(folder / "diverged.json", {"reason": one_line(error)})
        else:
            if status:
                raise KeyboardInterrupt(status - 128)


def quiz_accuracy(weights, adapter, quiz, cache, quantize=None):
    """The share of the quiz's questions that the model answers correctly."""
    asked = [(path.name, files.file_fingerprint(path))
             for path in sorted(Path(quiz).glob("*/*.csv"))]
    key = [QUIZ_SHOTS, files.weights_fingerprint(weights),
           adapter and files.file_fingerprint(adapter), asked]

    def answer():
        questions, examples = read_questions(Path(quiz), shots=QUIZ_SHOTS)
        model, tokenizer = load_model(weights, device="cpu", dtype=torch.float32,
                                      quantize=quantize)
        if adapter:
            load_adapter(model, adapter)
        answers = {}
        with redirect_stderr(io.StringIO()):
            eval_mmlu.answer_questions(model.eval(), tokenizer, questions, examples,
                                       batch_size=8, done=answers, file=io.StringIO())
        return statistics.fmean(q["prediction"] == q["answer"] for q in answers.values())

    return cached(cache, key, answer)


def run_accuracy(settings, folder, quiz):
    """quiz_accuracy of a finished run: of its adapter, or of the weights that it wrote."""
    adapter = folder / "adapter.pt"
    tuned = (settings.weights, adapter) if adapter.exists() else (folder, None)
    return quiz_accuracy(*tuned, quiz, folder / "quiz.json", settings.quantize)


def compute(job):
    """Computes a run, and its accuracy if there is a quiz, as far as they are missing."""
    settings, folder, quiz, threads = job
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # more threads round sums differently
    try:
        if not is_complete(folder):
            train_once(settings, folder)
        if not is_complete(folder, quiz):
            run_accuracy(settings, folder, quiz)
    finally:
        torch.set_num_threads(before)
    return folder.name


def end_with_parent():
    """In a process of the pool: leaves Ctrl-C to the parent, and ends if the parent is killed."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, daemon=True).start()


def compute_all(jobs, processes):
    """compute() for every job, in so many processes, with a line for each."""
    clock = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=end_with_parent) as pool:
        names = pool.map(compute, jobs) if processes > 1 else map(compute, jobs)
        try:
            for number, name in enumerate(names, start=1):
                minutes = (time.perf_counter() - clock) / 60
                print(f"run {number} of {len(jobs)}, {name}, {minutes:.1f} minutes", flush=True)
        except BrokenProcessPool as error:
            raise MemoryError("a process was killed, perhaps out of memory") from error
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                while process.is_alive():  # train.py ends its step; the next job must not begin
                    process.terminate()
                    process.join(timeout=1)
            raise


def run_all(runs, args, *, quiz=None, threads=1, may_diverge=False):
    """{key: run} for {key: settings}; a run is the content of its run.json, with its folder, its
    settings as "args" and, with a quiz, its accuracy. Those that are not in args.runs yet are
    computed, in args.jobs processes of one thread, or on several threads in this process.
    Raises ValueError for a run that diverges, unless it may: its val_loss is then infinite."""
    folders = {key: run_folder(settings, args.runs) for key, settings in runs.items()}
    if threads > 1:
        folders = {key: path.with_name(f"{path.name}-{threads}threads")
                   for key, path in folders.items()}
    unique = {folder: runs[key] for key, folder in folders.items()}
    jobs = [(settings, folder, quiz, threads) for folder, settings in unique.items()
            if not is_complete(folder, quiz)]
    print(f"{len(unique)} runs, {len(jobs)} of them to be computed", flush=True)
    compute_all(jobs, 1 if threads > 1 else args.jobs)
    found = {key: read_run(runs[key], folder, quiz) for key, folder in folders.items()}
    for run in found.values():
        if "diverged" in run and not may_diverge:
            raise ValueError(f"{run['folder']} diverged at the rate that the sweep chose: "
                             f"{run['diverged']}; give lower --rates")
    return found


def read_run(settings, folder, quiz):
    if (folder / "diverged.json").exists():
        reason = files.read_json(folder / "diverged.json", "reason")["reason"]
        return {"folder": folder, "metrics": {"val_loss": math.inf}, "diverged": reason}
    run = {**files.read_json(folder / "run.json", "metrics"), "folder": folder, "args": settings}
    if quiz:
        run["metrics"]["quiz"] = run_accuracy(settings, folder, quiz)
    return run


def starting_model(settings):
    """(model with adapters as train.py drew them, by the same calls in the same order;
    tokenizer)."""
    torch.manual_seed(settings.seed)
    model, tokenizer = load_llama(settings.weights, dtype=torch.float32)
    add_hydralora(model, **train.adapter_settings(settings))
    return model, tokenizer


def trained_model(run):
    """(model with a run's adapter, tokenizer)."""
    model, tokenizer = load_llama(run["args"].weights, dtype=torch.float32)
    load_adapter(model, run["folder"] / "adapter.pt")
    return model.eval(), tokenizer


# ---------------------------------------------------------------- the sweep


def sweep(names, rates, losses_at, widen=WIDEN):
    """{name: {rate: [loss of each seed]}}; losses_at([(name, rate)]) returns such a list for
    each. All names try the same rates; while the best is the lowest or highest of several, the
    next rate beyond it is tried, at most `widen` times."""
    tried = {name: {} for name in names}
    asked = [(name, rate) for name in names for rate in rates]
    for _ in range(1 + (widen if len(rates) > 1 else 0)):
        for (name, rate), losses in zip(asked, losses_at(asked)):
            tried[name][rate] = losses
        asked = [(name, beyond(losses)) for name, losses in tried.items() if beyond(losses)]
        if not asked:
            break
    return tried


def mean_losses(tried):
    return {rate: statistics.fmean(losses) for rate, losses in tried.items()}


def best_rate(tried):
    means = mean_losses(tried)
    return min(means, key=means.get)


def beyond(tried):
    """The next rate if the best of {rate: losses} is an edge, else None."""
    rates = sorted(tried)
    best = best_rate(tried)
    if len(rates) == 1 or best not in (rates[0], rates[-1]):
        return None
    # rates are 1e-3 times powers of sqrt 2, rounded for the eye
    power = round(2 * math.log2(best / 1e-3)) + (1 if best == rates[-1] else -1)
    return float(f"{1e-3 * 2 ** (power / 2):.3g}")


def steady_rate(tried):
    """The rate to use, of {rate: [loss of each seed]}: the lowest one whose mean loss exceeds
    the best by no more than the seeds scatter at the two (the root of the mean of their
    variances). A single seed has no scatter: the best."""
    means = mean_losses(tried)
    best = best_rate(tried)

    def is_close(rate):
        variances = [statistics.variance(tried[rate]), statistics.variance(tried[best])]
        return means[rate] - means[best] <= math.sqrt(statistics.fmean(variances))

    if len(tried[best]) == 1:
        return best
    lower = [rate for rate in means if rate < best and math.isfinite(means[rate])]
    return min([best, *filter(is_close, lower)])


def tune(arms, args, rates=None, *, seeds=SWEEP_SEEDS, share=SHARE, widen=WIDEN):
    """{name: {rate: [mean held-out loss of each seed]}} of arms {name: (config, [records,
    ...])}. A share of each list of training records is held out, alike for all arms; the
    validation set is not among the arguments."""
    parts = {name: [[write_records(part, args) for part in train_val_split(records, share, 0)]
                    for records in lists] for name, (_, lists) in arms.items()}

    def losses_at(asked):
        runs = {}
        for name, rate in asked:
            for seed in range(seeds):
                for i, (training, held_out) in enumerate(parts[name]):
                    runs[name, rate, seed, i] = run_settings(
                        args, arms[name][0], rate=rate, seed=seed, data=training, val=held_out,
                        epochs=args.sweep_epochs)
        runs = run_all(runs, args, may_diverge=True)

        def mean_loss(name, rate, seed):
            found = [runs[name, rate, seed, i] for i in range(len(parts[name]))]
            return statistics.fmean(values(found))

        return [[mean_loss(name, rate, seed) for seed in range(seeds)] for name, rate in asked]

    print("sweep of the learning rate, on training data only")
    tried = sweep(arms, rates or args.rates, losses_at, widen)
    for name, losses in tried.items():
        means = mean_losses(losses)
        if math.isinf(min(means.values())):
            raise ValueError(f"{name} diverged at every rate of {sorted(losses)}: give lower "
                             "--rates")
        listed = ", ".join(f"{rate:g}: {means[rate]:.4f}" for rate in sorted(means))
        print(f"{name}: held-out loss by learning rate {listed}; chosen: "
              f"{steady_rate(losses):g}", flush=True)
    return tried


def steady_rates(tried):
    return {name: steady_rate(losses) for name, losses in tried.items()}


def run_seeds(configs, rates, args, records, val, quiz=None):
    """{name: [run of each seed]} of {name: config} at {name: rate}."""
    data = write_records(records, args)
    val = write_records(val, args)
    runs = run_all({(name, seed): run_settings(
        args, config, rate=rates[name], seed=seed, data=data, val=val, keep=True)
        for name, config in configs.items() for seed in range(args.seeds)}, args, quiz=quiz)
    return {name: [runs[name, seed] for seed in range(args.seeds)] for name in configs}


def values(runs, metric="val_loss"):
    """A metric of every run; "kept" is the loss on --keep-data."""
    found = [run["metrics"][metric] for run in runs]
    return [kept["loss"] for kept in found] if metric == "kept" else found


def rerun(name, runs, args):
    """{arm, runs, threads, moved}: the runs of one arm repeated on THREADS threads, which
    round sums differently, as another processor would. moved is {metric: {scatter, seeds}}:
    the root mean square change of a run, and the standard deviation between the seeds."""
    again = run_all({i: run["args"] for i, run in enumerate(runs)}, args, threads=THREADS).values()
    moved = {}
    for metric in ("val_loss", "kept"):
        if metric in runs[0]["metrics"]:
            first = values(runs, metric)
            squares = [(a - b) ** 2 for a, b in zip(first, values(again, metric))]
            moved[metric] = {"scatter": math.sqrt(statistics.fmean(squares)),
                             "seeds": statistics.stdev(first) if first[1:] else None}
    return {"arm": name, "runs": len(runs), "threads": THREADS, "moved": moved}


def rerun_text(found):
    names = {"val_loss": "validation loss", "kept": "kept loss"}
    changes = []
    for metric, row in found["moved"].items():
        between = "unknown" if row["seeds"] is None else f"{row['seeds']:.4f}"
        changes.append(f"the {names[metric]} by {row['scatter']:.2g} (standard deviation "
                       f"between seeds: {between})")
    return (f"Rerunning {found['arm']} with {found['threads']} threads instead of one changes "
            f"{' and '.join(changes)}, RMS over {found['runs']} runs.")


# ---------------------------------------------------------------- what scripts print and write


def rates_table(tried):
    """Mean held-out losses of the sweep; the chosen rate is marked."""
    rates = sorted({rate for losses in tried.values() for rate in losses})
    rows = []
    for name, losses in tried.items():
        means = mean_losses(losses)
        cells = {rate: f"{loss:.4f}" if math.isfinite(loss) else "diverged"
                 for rate, loss in means.items()}
        cells[steady_rate(losses)] += " *"
        rows.append([name, *(cells.get(rate, "") for rate in rates)])
    header = ["held-out loss by rate, * chosen", *(f"{rate:g}" for rate in rates)]
    return report.markdown(header, rows)


def conditions(args, records, val):
    """What a result depends on; without time and place, so that a rerun gives the same file."""
    return {"records": len(records), "validation_records": len(val), "seeds": args.seeds,
            "epochs": args.epochs, "sweep_epochs": args.sweep_epochs,
            "max_steps": args.max_steps, "max_seq_len": args.max_seq_len, "rates": args.rates,
            "sweep_seeds": SWEEP_SEEDS, "recipe": RECIPE,
            "weights": files.weights_fingerprint(args.weights),
            "data": files.file_fingerprint(args.data),
            "keep_data": args.keep_data and files.file_fingerprint(args.keep_data),
            "torch": torch.__version__}


def publish(args, name, records, val, content, *, tables, again, claims, more, draw):
    """Writes the results of a script: its content with conditions, rerun and claims; its
    tables, the sentence on the rerun, the table of claims, and more tables."""
    report.write_results(
        args, name,
        {"conditions": conditions(args, records, val), **content, "rerun": again,
         "claims": claims},
        [*tables, rerun_text(again), report.claims_text(claims), *more], draw)
