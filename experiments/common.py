"""What the experiments on HydraLoRA's claims share: runs, one sweep for all, intervals, verdicts.

A run is one call of train.py. Its folder under --runs is named after every setting and after the
sha256 of weights and data, so a script that was stopped goes on where it was, scripts share runs,
and other weights or data are never mistaken for these. The rules, which experiments/README.md
states at length:

    rate       lowest loss on a held-out tenth of the training data, the same rates for every arm
    interval   Student's t, 95 %, over seeds; differences are taken seed by seed
    verdict    "holds" where the whole interval is on the claim's side of zero, "does not hold"
               where it is all on the other side, else "undecided here"
"""

import argparse
import io
import json
import math
import multiprocessing
import statistics
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

import eval_mmlu
import train
from cluster import choose_heads
from data import WORLD
from data.corpus import hold_out, read_records, without_duplicates
from data.mmlu import read_questions
from hydralora import add_hydralora, load_adapter
from model import Transformer, load_llama, read_params
from support.cli import Parser, flag, one_line, run_script
from support.files import (
    digest,
    file_fingerprint,
    read_json,
    weights_fingerprint,
    write_json,
    write_text,
)
from support.hold import holding
from support.run_folder import fingerprints, lasting_settings
from support.scores import summarise

RESULTS = Path(__file__).resolve().parent / "results"
RATES, WIDEN = (2e-3, 4e-3, 8e-3), 3  # peak learning rates; how many more when the best is an edge
MIXED = 4000  # records of the mix in table1, heads and routing, which share their runs
SHARE = 0.1  # held out for the sweep; and for validation where the data comes without any
SCALE = 4.0  # alpha / rank, the paper's 32 / 8
QUIZ_SHOTS = 0  # as in the paper's Table 1
# what every run has in common, and no method of its own
RECIPE = {"batch-size": 8, "grad-accum": 1, "dropout": 0, "device": "cpu", "dtype": "fp32",
          "save-every": 0}
DIVERGED = ("gradient norm", "tuned model", "not finite")  # what train.py says of such a run


# ---------------------------------------------------------------- flags and data


def parser(name, doc, *, seeds, epochs, records=0, sweep_epochs=1, sweeps=True):
    """The flags that every script has, or every one that sweeps; a script adds its own."""
    p = Parser(f"experiments.{name}", doc)
    p.description, p.formatter_class = doc, argparse.RawDescriptionHelpFormatter
    p.add_argument("--weights", help="checkpoint folder in Meta's layout (the embedded world's)")
    p.add_argument("--data", help="training records (the embedded world's)")
    p.add_argument("--val-data", help="validation records (the world's; else a tenth of --data)")
    p.add_argument("--records", type=int, default=records,
                   help=f"draw so many from --data, 0: all ({records})")
    p.add_argument("--seeds", type=int, default=seeds, help=f"runs of every arm ({seeds})")
    p.add_argument("--epochs", type=int, default=epochs, help=f"of those runs ({epochs})")
    p.add_argument("--max-steps", type=int, default=0, help="of any run, 0: all (%(default)s)")
    p.add_argument("--max-seq-len", type=int, help="tokens a record may have (the model's own)")
    p.add_argument("--runs", type=Path, default=Path("runs/claims"),
                   help="folder that keeps the runs for the next time (runs/claims)")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder (experiments/results)")
    p.set_defaults(sweep_epochs=sweep_epochs, rates=list(RATES), jobs=1)
    if sweeps:
        p.add_argument("--sweep-epochs", type=int, default=sweep_epochs,
                       help=f"of the runs that choose the rate ({sweep_epochs})")
        p.add_argument("--rates", type=float, nargs="+", default=list(RATES),
                       help="learning rates to try; wider where the best is the lowest or highest "
                            "of several (2e-3 4e-3 8e-3)")
        p.add_argument("--jobs", type=int, default=2, help="processes of one thread each (2)")
    return p


def prepare(p, argv):
    """(args, training records, validation records); --weights and --data are the world's where
    they are not given. The draw and the split do not depend on a run's seed."""
    args = p.parse_args(argv)
    if args.weights and not args.data:
        p.error("--weights needs --data FILE as well")
    for name in ("seeds", "epochs", "sweep_epochs", "jobs"):
        if getattr(args, name) < 1:
            p.error(f"{flag(name)} must be at least 1")
    if min(args.records, args.max_steps) < 0 or min(args.rates) <= 0:
        p.error("--records and --max-steps must not be negative, --rates must be positive")
    if not args.data and not args.val_data:
        args.val_data = str(WORLD / "val.jsonl")
    args.weights = args.weights or str(WORLD / "base")
    args.data = args.data or str(WORLD / "train.jsonl")
    records = read_records(args.data)
    if args.records:
        records = draw_records(records, args.records)
    if args.val_data:
        val = read_records(args.val_data)
    else:
        records, val = hold_out(records, SHARE, seed=0)
    return args, without_duplicates(records, val), val


def draw_records(records, count, seed=0):
    """So many of the records, in file order."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    return [records[i] for i in sorted(order[:count])]


def keep_records(records, args):
    """The path of a file with these records, named after what is in it."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    path = args.runs / "data" / f"{digest(text)}.jsonl"
    if not path.exists():
        with holding(f"{path}.lock", path):
            write_text(path, text)
    return path


def remember(path, key, compute):
    """What compute() returns, kept as JSON at path; computed anew for another key."""
    key = digest(key)

    def known():
        return path.exists() and read_json(path)["key"] == key

    if not known():
        with holding(f"{path}.lock", path):
            if not known():  # another process may have ended just now
                write_json(path, {"key": key, "value": compute()})
    return read_json(path)["value"]  # as it is read next time: keys are strings


# ---------------------------------------------------------------- the methods


def lora(rank, alpha=None):
    """The flags of LoRA; alpha / rank is SCALE unless alpha says otherwise, here and below."""
    return dict(method="lora", rank=rank, alpha=alpha or SCALE * rank)


def split(heads, rank, alpha=None):
    return dict(method="lora-split", heads=heads, rank=rank, alpha=alpha or SCALE * rank)


def hydra(heads, rank=8, **changes):
    if heads == 1:
        return lora(rank)  # a single head has weight 1: the same method
    return dict(method="hydralora", heads=heads, rank=rank, alpha=SCALE * rank, **changes)


FULL = dict(method="full")


def count_trainable(args, heads, rank):
    """Trainable parameters of HydraLoRA, router included; of LoRA where heads is 1."""
    shape = read_params(args.weights)
    shape.vocab_size = max(shape.vocab_size, 1)  # not in every params.json, and nothing adapts it
    with torch.device("meta"):
        model = Transformer(shape)
    return add_hydralora(model, rank=rank, heads=heads)


def matched_rank(args, heads, wanted):
    """The rank with which so many heads come nearest to the wanted number of parameters, router
    included; the parameters grow evenly with the rank."""
    first, second = count_trainable(args, heads, 1), count_trainable(args, heads, 2)
    return max(1, round(1 + (wanted - first) / (second - first)))


def kmeans_heads(args, records):
    """The number of heads that cluster.py finds in the training records."""
    path = keep_records(records, args)
    key = [weights_fingerprint(args.weights), file_fingerprint(path), args.max_seq_len]

    def compute():
        model, tokenizer = load_llama(args.weights, dtype=torch.float32)
        with redirect_stderr(io.StringIO()):
            return choose_heads(records, model, tokenizer, max_seq_len=args.max_seq_len)["k"]

    return remember(args.runs / f"heads-{digest(key)}.json", key, compute)


# ---------------------------------------------------------------- runs


def train_flags(args, config, *, rate, seed, epochs, data, val):
    """The arguments of train.py; data and val are lists of records."""
    flags = {"weights": args.weights, "data": keep_records(data, args),
             "val-data": keep_records(val, args),
             "lr": rate, "seed": seed, "epochs": epochs, "max-steps": args.max_steps,
             "max-seq-len": args.max_seq_len, **RECIPE, **config}
    return [part for name, value in flags.items() if value is not None
            for part in (f"--{name}", str(value))]


def run_folder(flags, runs):
    """Where this run is kept: every setting and the content of every file that it reads decide."""
    args = train.parse_args(flags)
    chosen = {key: value for key, value in sorted(lasting_settings(args).items())
              if key not in ("weights", "data", "val_data")}  # where they lie does not count
    return runs / f"{args.method}-{digest(chosen, sorted(fingerprints(args).items()))}"


def train_once(flags, folder):
    """Runs train.py in silence unless the folder holds the whole run. A run whose loss is no
    number leaves diverged.json; a stopped one raises KeyboardInterrupt, and starts anew."""
    def ended():
        return (folder / "run.json").exists() or (folder / "diverged.json").exists()

    if ended():
        return
    silence, status = io.StringIO(), 0
    with holding(f"{folder}.lock", folder):
        try:
            if not ended():  # another process may have done it just now
                with redirect_stdout(silence), redirect_stderr(silence):
                    args = train.parse_args([*flags, "--out", str(folder), "--overwrite"])
                    status, _ = train.run_training(args)
        except ValueError as error:
            if not any(words in str(error) for words in DIVERGED):
                raise
            write_json(folder / "diverged.json", {"reason": one_line(error)})
    if status:
        raise KeyboardInterrupt(status - 128)


def quiz_accuracy(weights, adapter, quiz, path):
    """The share of the quiz's questions that the model gets right, kept at path."""
    files = sorted(Path(quiz).glob("*/*.csv"))
    key = [QUIZ_SHOTS, weights_fingerprint(weights), adapter and file_fingerprint(adapter),
           [(file.name, file_fingerprint(file)) for file in files]]

    def compute():
        questions, examples = read_questions(Path(quiz), shots=QUIZ_SHOTS)
        model, tokenizer = load_llama(weights, dtype=torch.float32)
        if adapter:
            load_adapter(model, adapter)
        done = {}
        with redirect_stderr(io.StringIO()):
            eval_mmlu.answer_questions(model.eval(), tokenizer, questions, examples, batch_size=8,
                                       done=done, file=io.StringIO())
        return summarise(list(done.values()))["accuracy"]

    return remember(path, key, compute)


def run_accuracy(folder, flags, quiz):
    """quiz_accuracy of a finished run: of its adapter, or of the weights that full tuning wrote."""
    adapter = folder / "adapter.pt"
    if adapter.exists():
        weights = flags[flags.index("--weights") + 1]
        return quiz_accuracy(weights, adapter, quiz, folder / "quiz.json")
    return quiz_accuracy(folder, None, quiz, folder / "quiz.json")


def work(jobs, quiz, name):
    """Runs [(flags, folder)] one after another on one thread, with a line for each."""
    threads, clock = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)  # the sums of more threads are rounded in another order
    try:
        for number, (flags, folder) in enumerate(jobs, start=1):
            parent = multiprocessing.parent_process()
            if parent and not parent.is_alive():
                return  # killed: nobody waits for the rest
            train_once(flags, folder)
            if quiz and (folder / "run.json").exists():
                run_accuracy(folder, flags, quiz)
            print(f"{name}run {number} of {len(jobs)}, {folder.name}, "
                  f"{(time.perf_counter() - clock) / 60:.1f} minutes", flush=True)
    finally:
        torch.set_num_threads(threads)


def work_apart(jobs, quiz, name):
    """work() in a process of its own, which says in one line why it fails."""
    try:
        work(jobs, quiz, name)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(one_line(error), file=sys.stderr)
        sys.exit(2)


def run_all(runs, args, quiz=None):
    """[content of run.json, with its folder, and its quiz accuracy] for a list of flags, in order;
    only what is not in args.runs yet is computed, in args.jobs processes."""
    folders = [run_folder(flags, args.runs) for flags in runs]
    wanted = {folder: flags for flags, folder in zip(runs, folders)}  # each once

    def missing(folder):
        whole = (folder / "run.json").exists() and (not quiz or (folder / "quiz.json").exists())
        return not (whole or (folder / "diverged.json").exists())

    jobs = [(flags, folder) for folder, flags in wanted.items() if missing(folder)]
    print(f"{len(wanted)} runs, {len(jobs)} of them to be computed", flush=True)
    if args.jobs == 1 or len(jobs) < 2:
        work(jobs, quiz, "")
    else:
        spawn = multiprocessing.get_context("spawn")
        processes = [spawn.Process(target=work_apart, args=(jobs[i::args.jobs], quiz, f"{i + 1}: "))
                     for i in range(args.jobs)]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()  # train.py ends its step first
                    process.join()
        if any(process.exitcode for process in processes):
            raise ValueError("a run failed, see above; the same command goes on from here")
    return [read_run(flags, folder, quiz) for flags, folder in zip(runs, folders)]


def read_run(flags, folder, quiz):
    if (folder / "diverged.json").exists():
        return {"folder": folder, "metrics": {"val_loss": math.inf},
                "reason": read_json(folder / "diverged.json")["reason"]}
    result = {**read_json(folder / "run.json"), "folder": folder, "flags": flags}
    if quiz:
        result["metrics"]["quiz"] = run_accuracy(folder, flags, quiz)
    return result


# ---------------------------------------------------------------- the sweep


def sweep(names, rates, losses_at, widen=WIDEN):
    """{name: {rate: loss}}: the same rates for all; losses_at([(name, rate)]) gives their losses.
    Where the best is the lowest or highest of several, one rate beyond it joins, up to `widen`
    times. A rate depends on nothing but what losses_at reads."""
    losses = {name: {} for name in names}
    asked = [(name, rate) for name in names for rate in rates]
    for _ in range(1 + (widen if len(rates) > 1 else 0)):
        for (name, rate), loss in zip(asked, losses_at(asked)):
            losses[name][rate] = loss
        asked = [(name, beyond(tried)) for name, tried in losses.items() if beyond(tried)]
        if not asked:
            break
    return losses


def best_rate(tried):
    return min(tried, key=tried.get)


def beyond(tried):
    """The next rate where the best of {rate: loss} is an edge, else None."""
    rates, best = sorted(tried), best_rate(tried)
    if len(rates) == 1 or best not in (rates[0], rates[-1]):
        return None
    ratio = rates[1] / rates[0]
    return float(f"{best * ratio if best == rates[-1] else best / ratio:.6g}")


def tune(arms, args):
    """{name: {rate: mean held-out loss}} of arms {name: (config, [records, ...])}. Each list of
    training records is split alike for all arms; the validation set is not among the arguments."""
    parts = {name: [hold_out(records, SHARE, seed=0) for records in lists]
             for name, (_, lists) in arms.items()}

    def losses_at(asked):
        runs = [train_flags(args, arms[name][0], rate=rate, seed=0, epochs=args.sweep_epochs,
                            data=kept, val=held)
                for name, rate in asked for kept, held in parts[name]]
        losses = iter([run["metrics"]["val_loss"] for run in run_all(runs, args)])
        return [statistics.mean(next(losses) for _ in parts[name]) for name, _ in asked]

    print("sweep of the learning rate, on training data only")
    tried = sweep(arms, args.rates, losses_at)
    for name, losses in tried.items():
        if math.isinf(min(losses.values())):
            raise ValueError(f"{name} diverged at every rate of {sorted(losses)}: give lower "
                             "--rates")
        shown = ", ".join(f"{rate:g}: {losses[rate]:.4f}" for rate in sorted(losses))
        print(f"{name}: held-out loss by learning rate {shown}")
    return tried


def run_seeds(configs, tried, args, records, val, quiz=None):
    """{name: [run of each seed]} at the rate that the sweep chose."""
    runs = [train_flags(args, config, rate=best_rate(tried[name]), seed=seed, epochs=args.epochs,
                        data=records, val=val)
            for name, config in configs.items() for seed in range(args.seeds)]
    found = run_all(runs, args, quiz)
    check_converged(found)
    return {name: found[i * args.seeds:(i + 1) * args.seeds] for i, name in enumerate(configs)}


def check_converged(runs):
    for run in runs:
        if "reason" in run:
            raise ValueError(f"{run['folder']} diverged at the rate that the sweep chose: "
                             f"{run['reason']}; give lower --rates")


def values(runs, metric="val_loss"):
    return [run["metrics"][metric] for run in runs]


# ---------------------------------------------------------------- statistics

# the 97.5 % quantile of Student's t by degrees of freedom, from 1; after 30 that of 30, a hair wide
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
         2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
         2.052, 2.048, 2.045, 2.042)


def interval(numbers):
    """{mean, low, high, values}: the mean and its 95 % interval by Student's t; a single value has
    no interval, so low and high are None."""
    numbers = list(numbers)
    mean = statistics.fmean(numbers)
    if len(numbers) < 2:
        return {"mean": mean, "low": None, "high": None, "values": numbers}
    t = T_975[min(len(numbers) - 1, len(T_975)) - 1]
    half = t * statistics.stdev(numbers) / math.sqrt(len(numbers))
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": numbers}


def difference(a, b):
    """The interval of a - b, seed by seed: what the two share, data and order, cancels."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired")
    return interval([x - y for x, y in zip(a, b)])


def verdict(stat):
    """The rule, from an interval that is positive where the claim is true."""
    if stat["low"] is None or stat["low"] <= 0 <= stat["high"]:
        return "undecided here"
    return "holds" if stat["low"] > 0 else "does not hold"


def claim(text, stat):
    """A claim and the paired difference that is positive where it is true."""
    return {"claim": text, "difference": stat, "verdict": verdict(stat)}


# ---------------------------------------------------------------- tables, files, pictures


def show(stat, digits=4, percent=False):
    """"mean ± half the interval", in percent or as it is; "-" for None."""
    if stat is None:
        return "-"
    factor, unit, digits = (100, " %", 1) if percent else (1, "", digits)
    text = f"{factor * stat['mean']:.{digits}f}"
    if stat["low"] is not None:
        text += f" ± {factor * (stat['high'] - stat['mean']):.{digits}f}"
    return text + unit


def signed(stat, digits=4):
    return "-" if stat is None else ("+" if stat["mean"] > 0 else "") + show(stat, digits)


def markdown(header, rows):
    """A Markdown table whose columns also line up in a terminal."""
    table = [list(map(str, row)) for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |"
             for row in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def claims_table(claims):
    return markdown(["claim", "difference", "verdict"],
                    [[c["claim"], signed(c["difference"]), c["verdict"]] for c in claims])


def rates_table(tried):
    """Held-out losses of the sweep; the chosen rate is marked."""
    rates = sorted({rate for losses in tried.values() for rate in losses})
    rows = []
    for name, losses in tried.items():
        best = best_rate(losses)
        cells = [(f"{losses[rate]:.4f}" if math.isfinite(losses[rate]) else "diverged")
                 + (" *" if rate == best else "") if rate in losses else "" for rate in rates]
        rows.append([name, *cells])
    return markdown(["held-out loss by rate, * chosen", *(f"{rate:g}" for rate in rates)], rows)


def conditions(args, records, val):
    """What a result depends on, for its file; no clock and no place, so a rerun gives the same."""
    return {"records": len(records), "validation_records": len(val), "seeds": args.seeds,
            "epochs": args.epochs, "sweep_epochs": args.sweep_epochs, "max_steps": args.max_steps,
            "max_seq_len": args.max_seq_len, "rates": args.rates, "recipe": RECIPE,
            "weights": weights_fingerprint(args.weights), "data": file_fingerprint(args.data),
            "torch": torch.__version__}


def write_results(args, name, content, sections, picture):
    """Prints the sections and writes NAME.json, NAME.md and, where matplotlib is there, NAME.png;
    picture(pyplot) returns a figure, or None where it cannot be drawn."""
    args.out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(sections) + "\n"
    print("\n" + text)
    write_json(args.out / f"{name}.json", plain(content))
    write_text(args.out / f"{name}.md", text)
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not here (pip install -r requirements-optional.txt)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure = picture(pyplot)
    if figure is not None:
        # without the version in it, the same numbers give the same file
        figure.savefig(args.out / f"{name}.png", dpi=100, metadata={"Software": None})
        pyplot.close(figure)


def plain(content):
    """The same with None where a number is not finite, which JSON does not have."""
    if isinstance(content, dict):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def error_bars(axes, x, stats, **style):
    """Means with their intervals; a marker tells series apart, not the colour alone."""
    half = [0 if s["low"] is None else s["high"] - s["mean"] for s in stats]
    axes.errorbar(x, [s["mean"] for s in stats], yerr=half, capsize=3, **style)


def run_experiment(name, main, argv):
    """main(argv), ended like the other scripts: one line for what is refused or stopped."""
    return run_script(f"experiments.{name}", lambda: main(argv), argv,
                      stopped="stopped; the same command goes on from here",
                      memory="--max-seq-len or --jobs 1 needs less; the same command goes on")
