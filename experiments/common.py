"""What the experiments on HydraLoRA's claims share: flags, data, kept runs, one sweep.

A run is one call of train.py. Its folder in --runs is named after its flags and the sha256 of
weights and data: an interrupted script continues where it was, scripts share runs, and a run on
other weights or data is never mistaken for this one. The learning rate of every method is the one
with the lowest loss on a held-out tenth of the training data, as experiments/README.md explains.
report.py turns the numbers into intervals, claims and tables.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch

import train
from data import QUIZ_SHOTS
from data.corpus import read_records, train_val_split, without_duplicates
from experiments import report
from hydralora import TARGETS, add_hydralora, load_adapter, remove_adapters
from model import Transformer, load_llama, read_params
from support import files
from support.cli import Parser, check_min, flag, run_script
from support.device import autocast
from support.evaluation import TOTAL, count_parameters, evaluate
from support.lock import file_lock
from support.run_folder import fingerprints

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
# peak learning rates, a factor of sqrt 2 apart; how many more if the best is an edge
RATES = (2.83e-3, 4e-3, 5.66e-3)
WIDEN = 6
# of the runs that are reported, and of those that choose the rate: none is in both
FIRST_SEED, SWEEP_SEED, SWEEP_SEEDS = 20, 100, 3
THREADS = 2  # of a rerun; all other runs have one
MIXED = 4000  # records of the mix in table1, heads and routing, which share their runs
SHARE = 0.1  # held out for the sweep; and for validation if the data comes without any
SCALE = 4.0  # alpha / rank, the paper's 32 / 8
# flags that all runs share
RECIPE = {"batch-size": 8, "grad-accum": 1, "dropout": 0, "device": "cpu", "dtype": "fp32",
          "save-every": 0, "clip": 0}
DIVERGED = ("gradient norm", "tuned model", "not finite")  # in train.py's words for it
PATHS = ("weights", "data", "val_data", "keep_data")


# ---------------------------------------------------------------- flags and data


def parser(name, doc, *, seeds, epochs, records=0, rates=RATES, sweep_epochs=1):
    """The flags that the scripts share; a script adds its own. Without rates none are tried,
    without sweep_epochs none is chosen."""
    p = Parser(f"experiments.{name}", doc)
    p.add_argument("--weights", help="checkpoint folder in Meta's layout (the embedded world's)")
    p.add_argument("--data", help="training records (the embedded world's)")
    p.add_argument("--val-data", help="validation records (the world's; else a tenth of --data)")
    p.add_argument("--keep-data", help="texts to measure forgetting on (none; the world's)")
    p.add_argument("--records", type=int, default=records,
                   help=f"number of records to draw from --data, 0: all ({records})")
    p.add_argument("--seeds", type=int, default=seeds, help=f"runs per method ({seeds})")
    p.add_argument("--first-seed", type=int, default=FIRST_SEED,
                   help="their seeds count from it (%(default)s)")
    p.add_argument("--epochs", type=int, default=epochs,
                   help=f"passes of these runs over the data ({epochs})")
    p.add_argument("--max-steps", type=int, default=0,
                   help="stop any run after so many steps, 0: off (%(default)s)")
    p.add_argument("--max-seq-len", type=int, help="tokens per record (the model's own limit)")
    p.add_argument("--runs", type=Path, default=Path("runs/claims"),
                   help="folder that keeps the runs (runs/claims)")
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


def parse_args(p, argv, **least):
    """The flags, some of which have a smallest value; the four paths default as in train.py."""
    args = p.parse_args(argv)
    try:
        check_min(args, seeds=1, epochs=1, sweep_epochs=1, jobs=1, records=0, max_steps=0, **least)
    except ValueError as error:
        p.error(str(error))
    if min(args.rates) <= 0:
        p.error("--rates must be positive")
    given = {name: getattr(args, name) for name in PATHS}
    defaults = train.parse_args(command_line({**given, **RECIPE}))
    vars(args).update({name: getattr(defaults, name) for name in PATHS})
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


def write_records(records, folder):
    """The path of a file with these records, named after its content."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    path = folder / f"{files.digest(text)}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text)
    return path


def families(records):
    return {record["category"] for record in records}


def of_families(records, families):
    return [record for record in records if record["category"] in families]


def cached(path, compute):
    """compute(), kept as JSON at path."""
    if not path.exists():
        files.write_json(path, compute())
    return files.read_json(path)  # as the next call reads it: keys are strings


def compute_each(specs, folder, compute):
    """{key: compute(spec)} of {key: spec}, kept as JSON in the folder, each under the digest of
    its spec. Those that another process of the same command computes at the moment are left to
    it: a second one on another core halves the time, and a kill loses one run of each."""
    paths = {key: folder / f"{files.digest(spec)}.json" for key, spec in specs.items()}
    clock = time.perf_counter()
    while missing := [key for key in specs if not paths[key].exists()]:
        for key in missing:
            path = paths[key]
            with ExitStack() as stack:
                try:
                    stack.enter_context(file_lock(path, path))
                except ValueError:
                    continue  # another process has it
                if not path.exists():
                    commit = report.code_commit()  # at its start
                    files.write_json(path, {"spec": specs[key], "commit": commit,
                                            **compute(specs[key])})
                    left = sum(not path.exists() for path in paths.values())
                    minutes = (time.perf_counter() - clock) / 60
                    print(f"{key}: {minutes:.1f} minutes, {left} of {len(paths)} left", flush=True)
        time.sleep(1)
    return {key: files.read_json(path, "metrics") for key, path in paths.items()}


# ---------------------------------------------------------------- the methods


def lora(rank, **changes):
    """The flags of LoRA; like all others with a constant alpha / rank."""
    return dict(method="lora", rank=rank, alpha=SCALE * rank, **changes)


def split(heads, rank):
    return dict(method="lora-split", heads=heads, rank=rank, alpha=SCALE * rank)


def hydra(heads, rank=8, **changes):
    if heads == 1:  # a single head has weight 1: the same method
        return lora(rank, **changes)
    return dict(method="hydralora", heads=heads, rank=rank, alpha=SCALE * rank, **changes)


FULL = dict(method="full")


def count_trainable(args, heads, rank, targets=None):
    """Trainable parameters of so many heads, router included."""
    targets = targets.split(",") if targets else TARGETS
    shape = read_params(args.weights)
    shape.vocab_size = max(shape.vocab_size, 1)  # missing in some params.json; never adapted
    with torch.device("meta"):
        model = Transformer(shape)
    return add_hydralora(model, targets=targets, heads=heads, rank=rank)


def matched_rank(args, heads=1, **targets):
    """The rank at which so many heads have nearly the parameters of HydraLoRA 3x8 on the same
    layers, router included; parameters grow linearly with the rank."""
    wanted = count_trainable(args, 3, 8, **targets)
    first, second = (count_trainable(args, heads, rank, **targets) for rank in (1, 2))
    return max(1, round(1 + (wanted - first) / (second - first)))


# ---------------------------------------------------------------- runs


def command_line(flags):
    """The words of {name of a flag: value}; None leaves a flag out."""
    return [word for name, value in flags.items() if value is not None
            for word in (flag(name), str(value))]


def run_flags(args, config, *, rate, records, val, **more):
    """{name of a flag: value} of a run of train.py on these records."""
    folder = args.runs / "data"
    return {"weights": args.weights, "data": write_records(records, folder),
            "val_data": write_records(val, folder), "lr": rate, "seed": args.first_seed,
            "epochs": args.epochs, "max_steps": args.max_steps,
            "max_seq_len": args.max_seq_len, **RECIPE, **config, **more}


def run_folder(flags, runs):
    """Where a run is kept. The files that it reads count by their content, not their path. Flags
    that are not given do not count, so one that train.py gains later renames no run."""
    read = fingerprints(flags["weights"], [flags["data"]], val_data=flags["val_data"],
                        keep_data=flags.get("keep_data"))
    given = {name: value for name, value in flags.items()
             if value is not None and name not in PATHS}
    return runs / f"{flags['method']}-{files.digest(sorted(given.items()), sorted(read.items()))}"


def last_line(path):
    """The last line of the log of start_script: why a script refused to go on, if it did."""
    return "".join(Path(f"{path}.log").read_text(encoding="utf-8").splitlines()[-1:])


def has_diverged(folder):
    if (folder / "run.json").exists() or not Path(f"{folder}.log").exists():
        return False
    return any(words in last_line(folder) for words in DIVERGED)


def start_script(path, script, *flags, threads=1):
    """The process of a script of this repository that makes `path`. Its errors go to PATH.log."""
    with open(f"{path}.log", "w", encoding="utf-8") as log:
        return subprocess.Popen([sys.executable, ROOT / script, *flags], stderr=log,
                                stdout=subprocess.DEVNULL,
                                env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def call_all(commands, processes, threads=1):
    """Runs {path to be made: command line of a script}, so many at once, with a line for each that
    ends. Raises KeyboardInterrupt for a script that a signal stopped, ValueError for one that
    refused; a run of train.py may diverge."""
    clock = time.perf_counter()
    waiting, running = list(commands.items()), {}
    ended = 0
    try:
        while waiting or running:
            if waiting and len(running) < processes:
                path, command = waiting.pop(0)
                path.parent.mkdir(parents=True, exist_ok=True)
                files.write_text(f"{path}.commit", report.code_commit() or "")  # at its start
                running[path] = start_script(path, *command, threads=threads)
            time.sleep(0.02)
            for path in [path for path, child in running.items() if child.poll() is not None]:
                status = running.pop(path).returncode
                if status > 128:
                    raise KeyboardInterrupt(status - 128)
                if status < 0:
                    raise MemoryError(f"signal {-status} killed {path.name}, perhaps out of memory")
                if status and not has_diverged(path):
                    raise (ValueError if status == 2 else RuntimeError)(last_line(path))
                ended += 1
                minutes = (time.perf_counter() - clock) / 60
                print(f"run {ended} of {len(commands)}, {path.name}, {minutes:.1f} minutes",
                      flush=True)
    finally:
        for child in running.values():  # train.py ends its step
            child.terminate()
        for child in running.values():
            child.wait()


def run_all(runs, args, *, quiz=None, threads=1, may_diverge=False):
    """{key: run} for {key: flags}; a run is the content of its run.json, with its folder, its
    flags and, with a quiz, its accuracy. Those that are not in args.runs yet are computed, in
    args.jobs processes of one thread, or one of several threads. Raises ValueError for a run that
    diverges, unless it may: its val_loss is then infinite."""
    suffix = f"-{threads}threads" if threads > 1 else ""  # more threads round sums differently
    folders = {key: Path(f"{run_folder(flags, args.runs)}{suffix}") for key, flags in runs.items()}
    commands = {folder: ["train.py", *command_line({**runs[key], "out": folder}), "--overwrite"]
                for key, folder in folders.items()}
    missing = {folder: command for folder, command in commands.items()
               if not (folder / "run.json").exists() and not has_diverged(folder)}
    print(f"{len(commands)} runs, {len(missing)} of them to be computed", flush=True)
    call_all(missing, 1 if threads > 1 else args.jobs, threads)
    found = {}
    for key, folder in folders.items():
        if has_diverged(folder):
            if not may_diverge:
                raise ValueError(f"{folder} diverged at the rate that the sweep chose: "
                                 f"{last_line(folder)}; give lower --rates")
            found[key] = {"metrics": {"val_loss": math.inf}}
        else:
            recorded = files.read_json(folder / "run.json", "metrics")
            commit = Path(f"{folder}.commit")
            found[key] = {**recorded, "folder": folder, "flags": runs[key],
                          "commit": commit.read_text() if commit.exists() else None}
    if quiz:
        for key, accuracy in quiz_accuracies(found, quiz, args).items():
            found[key]["metrics"]["quiz"] = accuracy
    return found


def quiz_accuracies(runs, quiz, args):
    """{key: share of the quiz's questions that the model answers correctly} for {key: run}. The
    folder of a run may be that of the weights; quantize says how these are held."""
    asked = [(path.name, files.file_fingerprint(path))
             for path in sorted(Path(quiz).glob("*/*.csv"))]
    paths, commands = {}, {}
    for key, run in runs.items():
        adapter = run["folder"] / "adapter.pt"
        weights, adapter = (args.weights, adapter) if adapter.exists() else (run["folder"], None)
        name = files.digest(asked, files.weights_fingerprint(weights), run.get("quantize"),
                            adapter and files.file_fingerprint(adapter))
        path = paths[key] = args.runs / f"quiz-{name}.json"
        if not path.exists():
            commands[path] = ["eval_mmlu.py", *command_line({
                "weights": weights, "adapter": adapter, "data": quiz, "shots": QUIZ_SHOTS,
                "device": "cpu", "dtype": "fp32", "quantize": run.get("quantize"), "out": path})]
    call_all(commands, args.jobs)
    return {key: files.read_json(path, "accuracy")["accuracy"] for key, path in paths.items()}


def run_seeds(arms, args, seeds=None, **options):
    """{key: [run of each seed]} for {key: flags}; the seeds count from the one in the flags. For
    options see run_all."""
    seeds = range(seeds or args.seeds)
    runs = run_all({(key, seed): {**flags, "seed": flags["seed"] + seed}
                    for key, flags in arms.items() for seed in seeds}, args, **options)
    return {key: [runs[key, seed] for seed in seeds] for key in arms}


def run_methods(configs, rates, args, records, val, quiz=None):
    """{name: [run of each seed]} of {name: config} at {name: rate}, on the same records."""
    return run_seeds({name: run_flags(args, config, rate=rates[name], records=records, val=val,
                                      keep_data=args.keep_data)
                      for name, config in configs.items()}, args, quiz=quiz)


def values(runs, metric="val_loss"):
    """A metric of every run; "kept" is the loss on --keep-data."""
    found = [run["metrics"][metric] for run in runs]
    return [kept["loss"] for kept in found] if metric == "kept" else found


def mean_loss(runs):
    return statistics.fmean(values(runs))


def intervals(runs, metrics):
    """{metric: its interval over the runs} of those metrics that were measured."""
    return {metric: report.interval(values(runs, metric)) for metric in metrics
            if metric in runs[0]["metrics"]}


def by_category(runs):
    """{category: [validation loss of each run]}."""
    return {category: [run["metrics"]["categories"][category]["val_loss"] for run in runs]
            for category in runs[0]["metrics"].get("categories", {})}


def make_row(runs, metrics):
    """What a result says of an arm, from the runs of its seeds."""
    settings, parameters = runs[0]["settings"], runs[0]["parameters"]
    return {"rate": settings["lr"], "clip": settings.get("clip"),
            "seeds": [run["settings"].get("seed") for run in runs],
            "commits": sorted({run.get("commit") or "unknown" for run in runs}),
            "trainable": parameters["trainable"],
            "without_router": parameters["trainable_without_router"],
            **intervals(runs, metrics), "categories": by_category(runs)}


def starting_model(flags):
    """(model with adapters as train.py drew them, by the same calls in the same order;
    tokenizer)."""
    settings = train.parse_args(command_line(flags))
    torch.manual_seed(settings.seed)
    model, tokenizer = load_llama(settings.weights, dtype=torch.float32)
    add_hydralora(model, **train.adapter_settings(settings))
    return model, tokenizer


def trained_model(run):
    """(model with a run's adapter, tokenizer)."""
    model, tokenizer = load_llama(run["flags"]["weights"], dtype=torch.float32)
    load_adapter(model, run["folder"] / "adapter.pt")
    return model.eval(), tokenizer


def train_here(model, sequences, *, lr, seed, batch_size=8, epochs=1, max_steps=0, warmup=0.03,
               clip=0.0, optimizer=None, step=train.train_step):
    """Trains a model with adapters in this process by train.py's steps, in its order, in fp32;
    yields the gradient norm of each. The optimizer's groups and the step may be others."""
    steps = train.plan_steps(sequences, batch_size=batch_size, grad_accum=1, epochs=epochs,
                             max_steps=max_steps, seed=seed)
    optimizer = optimizer or train.make_optimizer(model, lr=lr)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    precision = autocast("cpu", "fp32")
    model.train()
    for i, batches in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(i, len(steps), group["peak_lr"], warmup)
        _, norm = step(model, batches, optimizer, scaler, clip=clip, precision=precision)
        yield norm.item()


# ---------------------------------------------------------------- the sweep


def sweep(names, rates, measure, widen=WIDEN):
    """{name: {rate: [loss of each seed]}}; measure([(name, rate)]) returns {(name, rate): such a
    list}. All names try the same rates; while the best is the lowest or highest of several, the
    next rate beyond it is tried, at most `widen` times."""
    tried = {name: {} for name in names}
    asked = [(name, rate) for name in names for rate in rates]
    for _ in range(1 + widen):
        for (name, rate), losses in measure(asked).items():
            tried[name][rate] = losses
        asked = [(name, beyond(losses)) for name, losses in tried.items() if beyond(losses)]
        if not asked:
            break
    return tried


def mean_losses(losses):
    return {rate: statistics.fmean(own) for rate, own in losses.items()}


def best_rate(losses):
    """The rate to use, of {rate: [loss of each seed]}: that of the lowest mean."""
    means = mean_losses(losses)
    return min(means, key=means.get)


def beyond(losses):
    """The next rate if the best of {rate: losses} is an edge, else None."""
    rates = sorted(losses)
    best = best_rate(losses)
    if len(rates) == 1 or best not in (rates[0], rates[-1]):
        return None
    # rates are 1e-3 times powers of sqrt 2, rounded for the eye
    power = round(2 * math.log2(best / 1e-3)) + (1 if best == rates[-1] else -1)
    return float(f"{1e-3 * 2 ** (power / 2):.3g}")


def sweep_seeds(count=SWEEP_SEEDS):
    return list(range(SWEEP_SEED, SWEEP_SEED + count))


def sweep_result(losses, **more):
    """What a result says of the sweep of an arm, of {rate: [loss of each seed]}."""
    return {"seeds": sweep_seeds(len(next(iter(losses.values())))), "rate": best_rate(losses),
            "losses": losses, **more}


def lowest_between(losses):
    """[the rate at which each seed's loss is lowest]: at the vertex of the parabola, over the
    logarithm of the rate, through its lowest loss and the two beside it; None at an edge."""
    rates, found = sorted(losses), []
    for seed in range(len(losses[rates[0]])):
        own = [losses[rate][seed] for rate in rates]
        i = own.index(min(own))
        if not 0 < i < len(own) - 1 or not math.isfinite(own[i - 1] + own[i + 1]):
            return None
        left, right = own[i - 1] - own[i], own[i + 1] - own[i]
        shift = (left - right) / (left + right) / 2  # in steps of the grid
        found.append(rates[i] * (rates[i + 1] / rates[i]) ** shift)
    return found


def rate_ratio(tried, a, b):
    """The interval of log2 of a's best rate over b's, seed by seed; None if one is not known."""
    found = [lowest_between(tried[name]["losses"]) for name in (a, b)]
    return None if None in found else report.interval(
        math.log2(x / y) for x, y in zip(*found))


def tune(arms, args, rates=None, *, seeds=SWEEP_SEEDS, share=SHARE, widen=WIDEN):
    """{name: sweep_result} of arms {name: (config, [records, ...])} by the mean held-out loss. A
    share of each list of training records is held out, alike for all arms; the validation set is
    not among the arguments."""
    categories = {name: {} for name in arms}

    def measure(asked):
        flags = {}
        for name, rate in asked:
            config, lists = arms[name]
            for i, records in enumerate(lists):
                training, held_out = train_val_split(records, share, seed=0)
                flags[name, rate, i] = run_flags(args, config, rate=rate, records=training,
                                                 val=held_out, epochs=args.sweep_epochs,
                                                 seed=SWEEP_SEED)
        losses = {}  # {(name, rate): [losses of the seeds, for each list]}
        for (name, rate, _), runs in run_seeds(flags, args, seeds, may_diverge=True).items():
            losses.setdefault((name, rate), []).append(values(runs))
            if all(math.isfinite(loss) for loss in values(runs)):
                categories[name].setdefault(rate, {}).update(by_category(runs))
        return {key: [statistics.fmean(seed) for seed in zip(*lists)]
                for key, lists in losses.items()}

    print("sweep of the learning rate, on training data only")
    tried = {}
    for name, losses in sweep(arms, rates or args.rates, measure, widen).items():
        clip = arms[name][0].get("clip", RECIPE["clip"])
        tried[name] = sweep_result(losses, clip=clip, categories=categories[name])
        means = mean_losses(losses)
        if math.isinf(min(means.values())):
            raise ValueError(f"{name} diverged at every rate of {sorted(losses)}: give lower "
                             "--rates")
        listed = ", ".join(f"{rate:g}: {means[rate]:.4f}" for rate in sorted(means))
        print(f"{name}: held-out loss by learning rate {listed}; chosen: "
              f"{tried[name]['rate']:g}", flush=True)
    return tried


def chosen_rates(tried):
    return {name: own["rate"] for name, own in tried.items()}


def tune_and_run(configs, args, records, val, quiz=None):
    """(sweep, {name: [run of each seed]}) of {name: config}, all on the same records, each at the
    rate that its sweep chose."""
    tried = tune({name: (config, [records]) for name, config in configs.items()}, args)
    return tried, run_methods(configs, chosen_rates(tried), args, records, val, quiz)


def run_here(spec, model, training, measure, change=None, **options):
    """A run in this process: the adapter of spec["settings"] on a model that is the base before
    and after, trained on sequences and measured by measure(). change(model, rate) alters the
    layers and returns more options of train_here."""
    torch.manual_seed(spec["seed"])
    add_hydralora(model, **spec["settings"])
    try:
        options |= change(model, spec["rate"]) if change else {}
        parameters = count_parameters(model)
        norms = list(train_here(model, training, lr=spec["rate"], seed=spec["seed"], **options))
        metrics = measure()
    finally:
        remove_adapters(model)
    clipped = sum(norm > 1 for norm in norms) / len(norms)
    return {"metrics": {**metrics, "clipped_at_1": clipped}, "parameters": parameters}


def measure_here(model, sequences):
    """{"val_loss", "categories"} of a model, as in run.json."""
    found = evaluate(model, sequences, precision=autocast("cpu", "fp32"))
    return {"val_loss": found.pop(TOTAL)["loss"],
            "categories": {name: {"val_loss": row["loss"]} for name, row in found.items()}}


def tune_and_run_here(arms, args, seeds, fixed, folder, compute):
    """tune_and_run of {arm: part of a spec} in this process, by compute_each in that folder. A
    spec has what is fixed, the arm's own, the part ("sweep" or "val"), rate and seed. In a sweep a
    loss may be None: not finite."""
    def measure(asked):
        specs = {key: {**fixed, **own, "part": part, "rate": rate, "seed": seed}
                 for key, own in asked.items() for _, part, rate, seed in [key]}
        return {key: {**run, "settings": {"lr": key[2], "seed": key[3], "clip": 0}}
                for key, run in compute_each(specs, folder, compute).items()}

    categories = {arm: {} for arm in arms}

    def held_out(asked):
        found = measure({(arm, "sweep", rate, seed): arms[arm]
                         for arm, rate in asked for seed in sweep_seeds()})
        losses = {}
        for arm, rate in asked:
            own = [found[arm, "sweep", rate, seed] for seed in sweep_seeds()]
            losses[arm, rate] = [math.inf if loss is None else loss for loss in values(own)]
            if all(map(math.isfinite, losses[arm, rate])):
                categories[arm][rate] = by_category(own)
        return losses

    tried = {arm: sweep_result(losses, clip=0, categories=categories[arm])
             for arm, losses in sweep(arms, args.rates, held_out).items()}
    runs = {}
    for (arm, *_), run in measure({(arm, "val", tried[arm]["rate"], seed): arms[arm]
                                   for arm in arms for seed in seeds}).items():
        runs.setdefault(arm, []).append(run)
    return tried, runs


def rerun(name, runs, args):
    """{arm, runs, threads, moved}: the runs of one arm repeated on THREADS threads, which
    round sums differently, as another processor would. moved is {metric: {scatter, seeds}}:
    the root mean square change of a run, and the standard deviation between the seeds."""
    again = run_all({i: run["flags"] for i, run in enumerate(runs)}, args, threads=THREADS)
    moved = {}
    for metric in ("val_loss", "kept"):
        if metric in runs[0]["metrics"]:
            first = values(runs, metric)
            squares = [(a - b) ** 2 for a, b in zip(first, values(again.values(), metric))]
            moved[metric] = {"scatter": math.sqrt(statistics.fmean(squares)),
                             "seeds": statistics.stdev(first) if first[1:] else None}
    return {"arm": name, "runs": len(runs), "threads": THREADS, "moved": moved}


# ---------------------------------------------------------------- what scripts print and write


def rerun_text(found):
    names = {"val_loss": "validation loss", "kept": "kept loss"}
    changes = []
    for metric, row in found["moved"].items():
        between = "unknown" if row["seeds"] is None else f"{row['seeds']:.4f}"
        changes.append(f"the {names[metric]} by {row['scatter']:.2g} (standard deviation "
                       f"between seeds: {between})")
    return (f"Rerunning {found['arm']} with {found['threads']} threads instead of one changes "
            f"{' and '.join(changes)}, RMS over {found['runs']} runs.")


def rates_table(tried):
    """Mean held-out losses of the sweep; the chosen rate is marked."""
    rates = sorted({rate for own in tried.values() for rate in own["losses"]})
    rows = []
    for name, own in tried.items():
        means = mean_losses(own["losses"])
        cells = {rate: f"{loss:.4f}" if math.isfinite(loss) else "diverged"
                 for rate, loss in means.items()}
        cells[own["rate"]] += " *"
        rows.append([name, *(cells.get(rate, "") for rate in rates)])
    return report.markdown(["held-out loss by rate, * chosen", *rates], rows)


def conditions(args, records, val):
    """What a result depends on; without time and place, so that a rerun gives the same file."""
    return {"records": len(records), "validation_records": len(val), "seeds": args.seeds,
            "epochs": args.epochs, "sweep_epochs": args.sweep_epochs,
            "max_steps": args.max_steps, "max_seq_len": args.max_seq_len, "rates": args.rates,
            "first_seed": args.first_seed, "sweep_seeds": sweep_seeds(), "recipe": RECIPE,
            "commit": report.code_commit(), "weights": files.weights_fingerprint(args.weights),
            **{name: path and files.file_fingerprint(path) for name, path in (
                ("data", args.data), ("val_data", args.val_data), ("keep_data", args.keep_data))},
            "torch": torch.__version__}


def publish(args, name, records, val, content, *, tables, again, claims, draw, more=()):
    """Writes the results of a script: its content with conditions, rerun and claims; its tables,
    the sentence on the rerun, the table of claims, the rates of its sweep, and more tables."""
    swept = [rates_table(content["sweep"])] if "sweep" in content else []
    content = {"conditions": conditions(args, records, val), **content, "rerun": again,
               "claims": claims}
    sections = [*tables, rerun_text(again), report.claims_text(claims), *swept, *more]
    report.write_results(args, name, content, sections, draw)
