"""What the experiments on HydraLoRA's claims share: flags, data, runs, one sweep for all methods.

A run is one call of train.py. Its folder under --runs is named after every setting and after the
sha256 of weights and data, so a script that was stopped goes on where it was, scripts share runs,
and other weights or data are never mistaken for these. The learning rate of every method is the one
with the lowest loss on a held-out tenth of the training data: rates a factor of sqrt 2 apart, two
seeds, the lower rate where two are within the seeds' scatter. What becomes of the numbers is in
report.py.
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
from data import QUIZ_SHOTS, WORLD
from data.corpus import read_records, train_val_split, without_duplicates
from data.mmlu import read_questions
from experiments.report import markdown
from hydralora import TARGETS, add_hydralora, hydra_layers, load_adapter
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
from support.lock import file_lock
from support.run_folder import fingerprints, resume_key
from support.scores import summarise

RESULTS = Path(__file__).resolve().parent / "results"
# peak learning rates, a factor of sqrt 2 apart; how many more when the best is an edge
RATES, WIDEN = (2.83e-3, 4e-3, 5.66e-3), 6
SWEEP_SEEDS = 2  # behind the choice of a rate
THREADS = 2  # of a rerun; all other runs have one
MIXED = 4000  # records of the mix in table1, heads and routing, which share their runs
SHARE = 0.1  # held out for the sweep; and for validation where the data comes without any
SCALE = 4.0  # alpha / rank, the paper's 32 / 8
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
    p.add_argument("--keep-data", help="texts that the base knows and --data does not teach (none; "
                                       "the world's)")
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
                            f"of several ({' '.join(f'{rate:g}' for rate in RATES)})")
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
    if not args.data and not args.keep_data:
        args.keep_data = train.WORLD_RECIPE.get("keep_data")
    args.weights = args.weights or str(WORLD / "base")
    args.data = args.data or str(WORLD / "train.jsonl")
    records = read_records(args.data)
    if args.records:
        records = draw_records(records, args.records)
    if args.val_data:
        val = read_records(args.val_data)
    else:
        records, val = train_val_split(records, SHARE, seed=0)
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
        with file_lock(f"{path}.lock", path):
            write_text(path, text)
    return path


def remember(path, key, compute):
    """What compute() returns, kept as JSON at path; computed anew for another key."""
    key = digest(key)

    def known():
        return path.exists() and read_json(path)["key"] == key

    if not known():
        with file_lock(f"{path}.lock", path):
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


def count_trainable(args, heads, rank, targets=TARGETS):
    """Trainable parameters of HydraLoRA, router included; of LoRA where heads is 1."""
    shape = read_params(args.weights)
    shape.vocab_size = max(shape.vocab_size, 1)  # not in every params.json, and nothing adapts it
    with torch.device("meta"):
        model = Transformer(shape)
    return add_hydralora(model, targets=targets, rank=rank, heads=heads)


def matched_rank(args, heads=1, *, targets=TARGETS):
    """The rank with which so many heads come nearest to the parameters of HydraLoRA 3x8, router
    included; the parameters grow evenly with the rank."""
    wanted = count_trainable(args, 3, 8, targets)
    first, second = (count_trainable(args, heads, rank, targets) for rank in (1, 2))
    return max(1, round(1 + (wanted - first) / (second - first)))


# ---------------------------------------------------------------- runs


def train_flags(args, config, *, rate, seed, epochs, data, val, keep=False):
    """The arguments of train.py; data and val are lists of records. With keep the run measures what
    it keeps of --keep-data."""
    flags = {"weights": args.weights, "data": keep_records(data, args),
             "val-data": keep_records(val, args), "keep-data": args.keep_data if keep else None,
             "lr": rate, "seed": seed, "epochs": epochs, "max-steps": args.max_steps,
             "max-seq-len": args.max_seq_len, **RECIPE, **config}
    return [part for name, value in flags.items() if value is not None
            for part in (f"--{name}", str(value))]


def run_folder(flags, runs):
    """Where this run is kept: every setting and the content of every file that it reads decide."""
    args = train.parse_args(flags)
    chosen = {key: value for key, value in sorted(resume_key(args).items())
              if key not in ("weights", "data", "val_data", "keep_data")}  # by content alone
    return runs / f"{args.method}-{digest(chosen, sorted(fingerprints(args).items()))}"


def train_once(flags, folder):
    """Runs train.py in silence unless the folder holds the whole run. A run whose loss is no
    number leaves diverged.json; a stopped one raises KeyboardInterrupt, and starts anew."""
    def ended():
        return (folder / "run.json").exists() or (folder / "diverged.json").exists()

    if ended():
        return
    silence, status = io.StringIO(), 0
    with file_lock(f"{folder}.lock", folder):
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


def work(jobs, quiz, name, threads=1):
    """Runs [(flags, folder)] one after another on so many threads, with a line for each."""
    before, clock = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(threads)  # the sums of more threads are rounded in another order
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
        torch.set_num_threads(before)


def work_apart(jobs, quiz, name):
    """work() in a process of its own, which says in one line why it fails."""
    try:
        work(jobs, quiz, name)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(one_line(error), file=sys.stderr)
        sys.exit(2)


def run_all(runs, args, quiz=None, threads=1):
    """[content of run.json, with its folder, and its quiz accuracy] for a list of flags, in order;
    only what is not in args.runs yet is computed, in args.jobs processes of one thread, or where
    more threads are asked for in this process alone: together they would wait for each other."""
    folders = [run_folder(flags, args.runs) for flags in runs]
    if threads > 1:
        folders = [folder.with_name(f"{folder.name}-{threads}threads") for folder in folders]
    wanted = {folder: flags for flags, folder in zip(runs, folders)}  # each once

    def missing(folder):
        whole = (folder / "run.json").exists() and (not quiz or (folder / "quiz.json").exists())
        return not (whole or (folder / "diverged.json").exists())

    jobs = [(flags, folder) for folder, flags in wanted.items() if missing(folder)]
    print(f"{len(wanted)} runs, {len(jobs)} of them to be computed", flush=True)
    if args.jobs == 1 or threads > 1 or len(jobs) < 2:
        work(jobs, quiz, "", threads)
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


def starting_layers(flags):
    """{name: HydraLinear} as train.py drew it, by the same calls in the same order."""
    args = train.parse_args(flags)
    torch.manual_seed(args.seed)
    model, _ = train.load_base(args)
    train.add_adapters(model, args)
    return hydra_layers(model)


def trained_model(run):
    """(model with a run's adapter, tokenizer, arguments of train.py, longest record)."""
    args = train.parse_args(run["flags"])
    model, tokenizer = load_llama(args.weights, dtype=torch.float32)
    load_adapter(model, run["folder"] / "adapter.pt")
    limit = args.max_seq_len or min(train.MAX_SEQ_LEN, model.args.max_seq_len)
    return model.eval(), tokenizer, args, limit


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
    # rates are 1e-3 times powers of sqrt 2, rounded for the eye
    power = round(2 * math.log2(best / 1e-3)) + (1 if best == rates[-1] else -1)
    return float(f"{1e-3 * 2 ** (power / 2):.3g}")


def steady_rate(tried):
    """The rate to use, of {rate: [loss of each seed]}: the one with the lowest mean, or the lowest
    rate whose mean is above it by no more than the seeds scatter at the two (the root of the mean
    of their variances)."""
    means = {rate: statistics.fmean(losses) for rate, losses in tried.items()}
    best = best_rate(means)

    def scatter(rate):
        return math.sqrt(statistics.fmean(statistics.variance(tried[r]) for r in (rate, best)))

    return min(rate for rate in means if rate == best or rate < best and len(tried[best]) > 1
               and math.isfinite(means[rate]) and means[rate] - means[best] <= scatter(rate))


def tune(arms, args):
    """{name: {rate: [mean held-out loss of each seed]}} of arms {name: (config, [records, ...])}.
    Each list of training records is split alike for all arms; the validation set is not among the
    arguments."""
    parts = {name: [train_val_split(records, SHARE, seed=0) for records in lists]
             for name, (_, lists) in arms.items()}
    tried = {name: {} for name in arms}

    def losses_at(asked):
        runs = [train_flags(args, arms[name][0], rate=rate, seed=seed, epochs=args.sweep_epochs,
                            data=kept, val=held)
                for name, rate in asked for seed in range(SWEEP_SEEDS)
                for kept, held in parts[name]]
        losses = iter([run["metrics"]["val_loss"] for run in run_all(runs, args)])
        for name, rate in asked:
            tried[name][rate] = [statistics.fmean(next(losses) for _ in parts[name])
                                 for _ in range(SWEEP_SEEDS)]
        return [statistics.fmean(tried[name][rate]) for name, rate in asked]

    print("sweep of the learning rate, on training data only")
    for name, losses in sweep(arms, args.rates, losses_at).items():
        if math.isinf(min(losses.values())):
            raise ValueError(f"{name} diverged at every rate of {sorted(losses)}: give lower "
                             "--rates")
        shown = ", ".join(f"{rate:g}: {losses[rate]:.4f}" for rate in sorted(losses))
        print(f"{name}: held-out loss by learning rate {shown}; {steady_rate(tried[name]):g} it is")
    return tried


def run_seeds(configs, tried, args, records, val, quiz=None):
    """{name: [run of each seed]} at the rate that the sweep chose."""
    runs = [train_flags(args, config, rate=steady_rate(tried[name]), seed=seed, epochs=args.epochs,
                        data=records, val=val, keep=True)
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
    """A metric of every run; "kept" is the loss on --keep-data."""
    found = [run["metrics"][metric] for run in runs]
    return [one["loss"] for one in found] if metric == "kept" else found


def rerun(name, runs, args):
    """{arm, runs, threads, moved}: runs of one arm again, on THREADS threads, whose sums are
    rounded in another order, as on another processor. moved is {metric: {scatter, seeds}}: the root
    mean square of how far a run moves, and the standard deviation of the first runs over seeds."""
    again = run_all([run["flags"] for run in runs], args, threads=THREADS)
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
    parts = [f"{names[metric]} {row['scatter']:.2g} (from seed to seed: "
             + ("one seed)" if row["seeds"] is None else f"{row['seeds']:.4f})")
             for metric, row in found["moved"].items()]
    return (f"A rerun with {found['threads']} threads in place of one moves {found['arm']} by (root"
            f" mean square over {found['runs']} runs): {', '.join(parts)}.")


# ---------------------------------------------------------------- what scripts print and write


def rates_table(tried):
    """Mean held-out losses of the sweep; the chosen rate is marked."""
    rates = sorted({rate for losses in tried.values() for rate in losses})
    rows = []
    for name, losses in tried.items():
        means = {rate: statistics.fmean(losses[rate]) for rate in losses}
        chosen = steady_rate(losses)
        cells = [(f"{means[rate]:.4f}" if math.isfinite(means[rate]) else "diverged")
                 + (" *" if rate == chosen else "") if rate in losses else "" for rate in rates]
        rows.append([name, *cells])
    return markdown(["held-out loss by rate, * chosen", *(f"{rate:g}" for rate in rates)], rows)


def conditions(args, records, val):
    """What a result depends on, for its file; no clock and no place, so a rerun gives the same."""
    return {"records": len(records), "validation_records": len(val), "seeds": args.seeds,
            "epochs": args.epochs, "sweep_epochs": args.sweep_epochs, "max_steps": args.max_steps,
            "max_seq_len": args.max_seq_len, "rates": args.rates, "sweep_seeds": SWEEP_SEEDS,
            "recipe": RECIPE,
            "weights": weights_fingerprint(args.weights), "data": file_fingerprint(args.data),
            "keep_data": args.keep_data and file_fingerprint(args.keep_data),
            "torch": torch.__version__}


def run_experiment(name, main, argv):
    """main(argv), ended like the other scripts: one line for what is refused or stopped."""
    return run_script(f"experiments.{name}", lambda: main(argv), argv,
                      stopped="stopped; the same command goes on from here",
                      memory="--max-seq-len or --jobs 1 needs less; the same command goes on")
