"""Fine-tune LLaMA 2 with HydraLoRA, or with a method to compare it to: one plain loop.

    python train.py --heads 3 --rank 8                     # the embedded world, minutes on a CPU
    python train.py --weights llama-2-7b --data dolly.jsonl --heads 3 --rank 8   # the real thing
    torchrun --nproc-per-node 4 train.py ...               # the same run on four GPUs

Tian et al., NeurIPS 2024, sections 3.2 and 4: only the adapters and their router train. Writes
adapter.pt, run.json and log.csv. What is fp32 and what is in the chosen --dtype:

    frozen base: dtype    adapters, router, AdamW state: fp32    products: dtype, by autocast
    softmax of gate and attention, RMSNorm, rotary, loss: fp32    --method full: fp32 weights

Shapes: M target tokens of a micro-batch, V vocabulary.
"""

import argparse
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data import QUIZ_SHOTS, WORLD
from data.corpus import (
    collate,
    cut_by_tokens,
    draw_epoch,
    encode_records,
    encode_texts,
    length_batches,
    load_train_val,
    split_weight,
)
from hydralora import (
    GATES,
    TARGETS,
    HydraSettings,
    adapters_disabled,
    add_hydralora,
    load_adapter,
    target_layers,
)
from model import Transformer, read_params
from support import distributed, evaluation, run_folder
from support.base import (
    load_model,
    model_length,
    print_default_length,
    print_quantize,
    read_adapter_config,
    trained_with,
    warn_of_spare_rows,
)
from support.cli import Parser, check_min, comma_list, flag, progress, run_script
from support.device import DTYPES, add_device_flags, autocast, peak_memory, pick_device, pick_dtype
from support.evaluation import evaluate, target_logits
from support.lock import file_lock
from support.quantize import KINDS, add_quantize_flag
from support.run_folder import Log, save_adapter_file, save_checkpoint
from support.signals import catch_signals, ignore, set_handlers

# without --weights: the embedded world
WORLD_RECIPE = dict(weights=str(WORLD / "base"), data=[str(WORLD / "train.jsonl")],
                    keep_data=str(WORLD / "keep.jsonl"), lr=4e-3, epochs=1, batch_size=8,
                    grad_accum=1, dropout=0.0)
# with --weights: the recipe of the paper's released script
PAPER_RECIPE = dict(lr=2e-4, epochs=1, batch_size=1, grad_accum=8, dropout=0.05)
MAX_SEQ_LEN = 1024  # the recipe's; a model made for less gets what it was made for
# what a method fixes of HydraSettings; full trains the base and has no adapter
METHODS = {"hydralora": {}, "lora": {"heads": 1}, "lora-split": {"share_a": False}, "full": {}}
BETAS = (0.9, 0.999)
MICRO_TOKENS = 1024  # positions per micro-batch on a GPU: the longest record of the recipe
ORDER = 2  # of records; a checkpoint of an older one is resumed in its own
VAL_SHARE = 0.05  # of the records, held out if there is no --val-data
LOG_EVERY = 10  # steps

# ---------------------------------------------------------------- the loop


def learning_rate(step, steps, peak, warmup):
    """Linear warmup over that share of the steps, then a cosine to zero; step counts from 0."""
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def train_step(model, batches, optimizer, scaler, *, clip, precision):
    """One optimizer step over micro-batches; returns (loss, gradient norm) as tensors. The loss is
    the mean over all target tokens of the step, not the mean of the micro-batches' means."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    n_targets = sum(s.n_targets for batch in batches for s in batch)
    total = 0.0
    for sequences, weight in distributed.local_batches(batches):
        batch = collate(sequences, parameters[0].device)
        with precision:
            # no name for the logits (M, V): their memory is released before the blocks go back
            loss = F.cross_entropy(target_logits(model, batch), batch.labels, reduction="sum")
        loss = weight * loss / n_targets
        scaler.scale(loss).backward()
        total = total + loss.detach()
    total = distributed.all_reduce_gradients(parameters, total)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    scaler.step(optimizer)  # fp16's scaler skips it if a gradient overflowed
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def train(model, steps, eval_sets, optimizer, scaler, args, *, start, facts):
    """Takes the steps after `start`, each a list of micro-batches, and writes log.csv and the
    checkpoint, which holds the run's `facts` too. After Ctrl-C or SIGTERM it finishes the step,
    saves and returns the signal's number; it returns 0 after the last step."""
    out = Path(args.out)
    precision = autocast(args.device, args.dtype)
    model.train()
    with (Log(out / "log.csv", start, fp16=args.dtype == "fp16") as log,
          catch_signals() as signals, progress(total=len(steps), initial=start) as bar):
        for step in range(start + 1, len(steps) + 1):
            batches = steps[step - 1]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step - 1, len(steps), group["peak_lr"], args.warmup)
            lr = optimizer.param_groups[0]["lr"]
            loss, norm = train_step(model, batches, optimizer, scaler, clip=args.clip,
                                    precision=precision)
            log.add(step, loss, norm, lr, batches)
            stop = distributed.all_reduce_signals(signals)
            if args.eval_every and step % args.eval_every == 0:
                best = log.add_evaluation(evaluate_sets(model, eval_sets, args, "current"))
                if best and args.method != "full":
                    save_adapter_file(model, out / "adapter-best.pt")
            saves = stop or step == len(steps) or args.save_every and step % args.save_every == 0
            if saves or step % LOG_EVERY == 0:
                bar.set_postfix_str(f"{log.flush()}, peak {peak_memory(args.device):.1f} GiB",
                                    refresh=False)
            if saves:
                save_checkpoint(out / "checkpoint.pt", step, facts, model, optimizer, scaler)
            bar.update()
            if stop:
                return stop
        return distributed.all_reduce_signals(signals)  # one may have come during the last save


def evaluate_sets(model, eval_sets, args, name):
    """{"val": what evaluate finds, and "kept" if there is --keep-data}."""
    precision = autocast(args.device, args.dtype)
    return {part: evaluate(model, sequences, precision=precision, name=name)
            for part, sequences in eval_sets.items()}


# ---------------------------------------------------------------- what the loop needs


def load_base(args):
    """(base model on the device, tokenizer)."""
    # full: the weights that train are fp32, only their products are in --dtype
    dtype = torch.float32 if args.method == "full" else DTYPES[args.dtype]
    model, tokenizer = load_model(args.weights, device=args.device, dtype=dtype,
                                  shard_base=args.shard_base, quantize=args.quantize)
    warn_of_spare_rows(model, tokenizer, args.weights)
    model.checkpoint_activations = args.checkpoint_activations
    return model, tokenizer


def count_heads(args, records, model, tokenizer):
    """What cluster.py finds for --heads auto: the number of heads under "k", and why."""
    from cluster import choose_heads, print_report
    clusters = choose_heads(records, model, tokenizer, seed=args.seed)
    clusters = distributed.run_on_rank0(lambda: clusters)  # one answer for all ranks
    print_default_length(args.weights, model.args.max_seq_len)
    print_report(clusters)
    return clusters


class Plan:
    """The steps of a run, each a list of micro-batches; those of one epoch exist at a time.
    plan_epoch(number) gives an epoch's, as many in each."""

    def __init__(self, plan_epoch, epochs, max_steps):
        self.plan_epoch = lru_cache(maxsize=1)(plan_epoch)
        self.per_epoch = len(plan_epoch(0))
        steps = epochs * self.per_epoch
        self.length = min(steps, max_steps or steps)

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if not 0 <= i < self.length:
            raise IndexError(i)
        epoch, step = divmod(i, self.per_epoch)
        return self.plan_epoch(epoch)[step]


def plan_steps(sequences, *, batch_size, grad_accum, epochs, max_steps, seed, micro_tokens=0,
               ranks=1, order=ORDER, weights=None):
    """The Plan of a run in an order fixed by the seed. A step is batch_size * grad_accum records
    of like length. It is cut into micro-batches of batch_size records, or of micro_tokens
    positions at most, one per rank at least; which records make a step does not depend on that.
    Order 1, of older checkpoints: steps of unlike micro-batches. weights are those of the files
    of --data, None if all are 1."""
    def plan_epoch(epoch):
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        drawn = draw_epoch(sequences, weights, generator) if weights else sequences
        if order == 1:
            batches = length_batches(drawn, batch_size, generator)
            return [batches[i:i + grad_accum] for i in range(0, len(batches), grad_accum)]
        steps = length_batches(drawn, batch_size * grad_accum, generator)
        if micro_tokens:
            return [cut_by_tokens(records, micro_tokens, least=ranks) for records in steps]
        return [[records[i:i + batch_size] for i in range(0, len(records), batch_size)]
                for records in steps]

    return Plan(plan_epoch, epochs, max_steps)


def make_optimizer(model, *, lr, betas=BETAS, weight_decay=0.0):
    """AdamW over what trains. The loop scales the peak rate of each parameter group."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay,
                                  fused=True)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


# ---------------------------------------------------------------- the run


@dataclass
class Setup:
    """What is there before the first step."""
    model: nn.Module  # with its adapters
    sequences: list  # to train on
    eval_sets: dict  # {"val": sequences, and "kept" if there is --keep-data}
    facts: dict  # what run.json holds from the start: settings, fingerprints, ...


def set_up(args):
    """Loads the base and the data, chooses the heads, adds the adapters; what is quick to refuse
    comes first. Fills in the settings that only the checkpoint, the model and the clustering
    know: quantize, max_seq_len, and heads if they are auto."""
    fingerprints, clusters = check_files(args)
    records, val = load_train_val(args.data, args.val_data, share=VAL_SHARE, seed=args.seed,
                                  strict=args.strict)
    model, tokenizer = load_base(args)
    data, eval_sets = {}, {}
    sequences, data["train"] = encode_records(records, tokenizer, args.max_seq_len)
    eval_sets["val"], data["val"] = encode_records(val, tokenizer, args.max_seq_len)
    if args.keep_data:
        eval_sets["kept"], data["kept"] = encode_texts(args.keep_data, tokenizer,
                                                       args.max_seq_len)
    if fingerprint_files(args) != fingerprints:
        raise ValueError("data or weights changed while they were read: start again")
    if args.heads == "auto":
        clusters = count_heads(args, records, model, tokenizer)
        args.heads = clusters["k"]
    if args.init_adapter and not args.resume:
        load_adapter(model, args.init_adapter)
        print_quantize(args.init_adapter, args.quantize)
    elif args.method != "full":
        add_hydralora(model, **adapter_settings(args))
    facts = {"settings": settings_to_record(args), "versions": run_folder.versions(),
             "fingerprints": fingerprints, "parameters": evaluation.count_parameters(model),
             "data": data, "clusters": clusters}
    return Setup(model, sequences, eval_sets, facts)


def check_files(args):
    """(fingerprints of the files that are read, "clusters" of a run that is resumed). Raises
    ValueError for what params.json and the checkpoint refuse, before the base is loaded."""
    path, state = Path(args.out) / "checkpoint.pt", {"clusters": None}
    if args.resume:  # an older run keeps its own order of records
        state = run_folder.read_checkpoint(path, mmap=True)
        args.order = state["settings"].get("order", 1)
        args.micro_tokens = args.micro_tokens if args.order > 1 else 0
        args.quantize = args.quantize or state["settings"].get("quantize")
        if args.heads == "auto" and state["clusters"]:
            args.heads = state["clusters"]["k"]  # not chosen again
    args.quantize = args.quantize or "none"
    shape = read_params(args.weights)
    args.max_seq_len = args.max_seq_len or min(MAX_SEQ_LEN, shape.max_seq_len)
    validate_for_model(args, shape)
    fingerprints = fingerprint_files(args)
    if args.resume:
        recipe = WORLD_RECIPE if args.weights == WORLD_RECIPE["weights"] else PAPER_RECIPE
        defaults = {**default_settings(args.method, recipe), "micro_tokens": 0, "quantize": "none"}
        run_folder.check_resume(state, path, settings_to_record(args), fingerprints, defaults)
    return fingerprints, state["clusters"]


def fingerprint_files(args):
    return run_folder.fingerprints(args.weights, args.data, val_data=args.val_data,
                                   keep_data=args.keep_data, init_adapter=args.init_adapter)


def settings_to_record(args):
    """The settings that have an effect: --method full has no adapter."""
    without = {"targets", *vars(HydraSettings())} if args.method == "full" else set()
    return {name: value for name, value in vars(args).items() if name not in without}


def start_or_resume(args, setup, optimizer, scaler):
    """(steps done, losses: {"base": what evaluate_sets found, and "before" of --init-adapter})."""
    if not args.resume:
        with adapters_disabled(setup.model):
            losses = {"base": evaluate_sets(setup.model, setup.eval_sets, args, "base")}
        if args.init_adapter:
            losses["before"] = evaluate_sets(setup.model, setup.eval_sets, args, "adapter")
        return 0, losses
    start, losses = run_folder.restore(Path(args.out) / "checkpoint.pt", setup.model, optimizer,
                                       scaler)
    print(f"resumed after step {start}")
    return start, losses


def run(args):
    """One run, from the settings to the files. Returns the exit status."""
    if args.dry_run:
        return dry_run(args)
    with (distributed.process_group(args.device, args.shard_base),
          file_lock(f"{args.out}/.lock", args.out)):
        out = distributed.run_on_rank0(lambda: run_folder.check_out(
            args.out, args.weights, resume=args.resume, overwrite=args.overwrite))
        torch.manual_seed(args.seed)
        setup = set_up(args)
        evaluation.print_start(setup.facts)
        optimizer = make_optimizer(setup.model, lr=args.lr, betas=args.betas,
                                   weight_decay=args.weight_decay)
        scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.dtype == "fp16")
        start, losses = start_or_resume(args, setup, optimizer, scaler)
        steps = plan_steps(setup.sequences, batch_size=args.batch_size, epochs=args.epochs,
                           grad_accum=args.grad_accum, max_steps=args.max_steps, seed=args.seed,
                           micro_tokens=args.micro_tokens, ranks=args.processes, order=args.order,
                           weights=args.data_weights)
        clock = time.perf_counter()
        try:
            run_folder.prepare_out(out, resume=args.resume)
            stopped = train(setup.model, steps, setup.eval_sets, optimizer, scaler, args,
                            start=start, facts={**setup.facts, "losses": losses})
            if stopped:
                print(f"stopped; {run_folder.resume_hint(out)}")
                return 128 + stopped
            seconds = time.perf_counter() - clock
            finish(args, setup, losses, seconds)
        except BaseException as error:
            set_handlers(ignore)  # it ends; the next line reads the checkpoint
            error.hint = run_folder.resume_hint(out)
            raise


def finish(args, setup, losses, seconds):
    """Evaluates the tuned model, writes the results, then prints the tables."""
    out, full = Path(args.out), args.method == "full"
    tuned = evaluate_sets(setup.model, setup.eval_sets, args, "tuned")
    losses = {**losses, "tuned": tuned}
    result = {**setup.facts, "seconds": seconds, "peak_gib": peak_memory(args.device),
              "metrics": evaluation.metrics(losses)}
    if not full and args.heads > 1:
        result["routing"] = evaluation.routing_report(
            setup.model, setup.eval_sets["val"], precision=autocast(args.device, args.dtype))
    run_folder.write_result(setup.model, out, result, weights=args.weights, full=full)
    evaluation.print_losses(losses)
    evaluation.print_history(run_folder.read_log(out / "log.csv"))
    if args.weights == WORLD_RECIPE["weights"]:
        model = ["--weights", str(out)] if full else ["--adapter", f"{out}/adapter.pt"]
        print(f"quiz: python eval_mmlu.py --shots {QUIZ_SHOTS} {shlex.join(model)}")
    if "routing" in result:
        evaluation.print_routing(result["routing"])
    print(f"\nwrote {'the checkpoint' if full else 'adapter.pt'}, run.json and log.csv to {out}\n"
          f"to see it: python -m tools.plot {shlex.join([str(out), '--out', f'{out}/plot.png'])}")


def measure_memory(args, shape, length, checkpoint):
    """The Need of a step of this run: see support/memory.py. shape is the base's ModelArgs."""
    from support.memory import measure_step
    step = partial(train_step, scaler=torch.amp.GradScaler("cpu", enabled=False), clip=args.clip,
                   precision=autocast("cpu", args.dtype))
    return measure_step(shape, adapter_settings(args), step=step, dtype=args.dtype,
                        make_optimizer=partial(make_optimizer, lr=args.lr), gpus=args.gpus or 1,
                        batch_size=args.batch_size, length=length, checkpoint=checkpoint,
                        quantize=args.quantize)


def dry_run(args):
    """Prints the memory that the run needs. Reads params.json only."""
    from support.memory import print_needs, read_shape
    shape = read_shape(args.weights)
    length = args.max_seq_len or min(MAX_SEQ_LEN, shape.max_seq_len)
    quantized = f", linear layers of the base in {args.quantize}" if args.quantize in KINDS else ""
    print(f"{args.method}, base and products in {args.dtype}{quantized}, batches of "
          f"{args.batch_size} x {length} tokens")
    if args.gpus:
        print(f"each of {args.gpus} GPUs with --shard-base: 1 / {args.gpus} of every block; "
              "embedding, head and adapters whole")
    print_needs(partial(measure_memory, args, shape), length, gpu_memory=args.gpu_memory,
                limit=model_length(args.weights, shape.max_seq_len))


def main(argv=None):
    return run_script(
        "train.py", parse_args, run, argv,
        stopped="stopped before training; --out is as it was: start again",
        memory="--checkpoint-activations needs less, also with --resume; so does a new run with a "
               "smaller --batch-size or --max-seq-len")


# ---------------------------------------------------------------- settings


def heads(text):
    if text == "auto":
        return text
    if not (text.isdecimal() and len(text) < 5 and int(text) >= 1):
        raise argparse.ArgumentTypeError("must be auto or a number from 1 to 9999")
    return int(text)


def betas(text):
    numbers = tuple(float(beta) for beta in text.split(","))
    if len(numbers) != 2 or not all(0 <= beta < 1 for beta in numbers):
        raise argparse.ArgumentTypeError("must be two numbers, at least 0 and below 1")
    return numbers


def make_parser():
    p = Parser("train.py", __doc__)
    # data and base
    p.add_argument("--weights", help="checkpoint folder in Meta's layout (the embedded world's)")
    p.add_argument("--data", nargs="+", metavar="FILE[:WEIGHT]",
                   help="training records, JSON lines or array; an epoch has those of a file "
                   "WEIGHT times (the embedded world's; 1)")
    p.set_defaults(data_weights=None)  # of several files, filled in from --data
    p.add_argument("--val-data", help="validation records (5 %% of each file, drawn by --seed)")
    p.add_argument("--keep-data", "--retention-data", metavar="FILE",
                   help="texts to measure forgetting on (none; the embedded world's own)")
    p.add_argument("--strict", action="store_true", help="refuse a record that cannot be trained "
                   "on, instead of skipping and counting it (off)")
    p.add_argument("--max-seq-len", type=int, help="tokens per record (1024, or the model's own "
                   "length if that is less)")
    # method
    p.add_argument("--init-adapter", metavar="FILE",
                   help="train this adapter further, with its own method and settings (none)")
    p.add_argument("--method", choices=METHODS, help="what trains (hydralora)")
    p.add_argument("--heads", type=heads,
                   help="number of B matrices, or auto: ask cluster.py (3; lora: 1)")
    p.add_argument("--rank", type=int, help="rank of A and B (8)")
    p.add_argument("--alpha", type=float, help="the update is scaled by alpha / rank (32)")
    p.add_argument("--dropout", type=float,
                   help="dropout on A x, one mask for all heads, 0: off (0.05; world: 0)")
    p.add_argument("--targets", type=comma_list,
                   help="adapted layers by exact name (w1,w2,w3: the feed-forward)")
    p.add_argument("--gate", choices=GATES, help="the router, or 1/N (learned)")
    # optimization
    p.add_argument("--lr", type=float, help="peak learning rate (2e-4; world: 4e-3)")
    p.add_argument("--warmup", type=float, default=0.03,
                   help="share of the steps with a rising learning rate (0.03)")
    p.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's weight decay (0)")
    p.add_argument("--betas", type=betas, default=BETAS, help="AdamW's betas (0.9,0.999)")
    p.add_argument("--clip", type=float, default=1.0,
                   help="largest norm of the gradient, 0: off (1.0)")
    p.add_argument("--epochs", type=int, help="passes over the data (1)")
    p.add_argument("--max-steps", type=int, default=0, help="stop after so many steps, 0: off (0)")
    p.add_argument("--batch-size", type=int, help="records per micro-batch (1; world: 8)")
    p.add_argument("--grad-accum", type=int, help="micro-batches per step (8; world: 1)")
    p.add_argument("--micro-tokens", type=int, metavar="N",
                   help="cut a step's records into micro-batches of at most N positions, 0: of "
                        "--batch-size records (1024 on a GPU, else 0)")
    p.add_argument("--seed", type=int, default=0,
                   help="random seed for initial weights, data order and validation split (0)")
    # machine
    add_device_flags(p, dtype_help="dtype of base and products")
    add_quantize_flag(p)
    distributed.add_shard_flag(p)
    p.add_argument("--checkpoint-activations", action="store_true",
                   help="recompute activations in the backward pass: less memory, more time (off)")
    p.add_argument("--dry-run", action="store_true",
                   help="print the memory that the run will need, from params.json alone (off)")
    p.add_argument("--gpu-memory", type=float, metavar="GB",
                   help="with --dry-run: also the longest sequence that fits so many GiB (none)")
    p.add_argument("--gpus", type=int, help="with --dry-run: shared by so many GPUs (none)")
    # the run folder
    p.add_argument("--out", help="folder to write (runs/METHOD)")
    p.add_argument("--overwrite", action="store_true", help="replace the run in --out (off)")
    p.add_argument("--resume", action="store_true", help="continue the run in --out (off)")
    p.add_argument("--save-every", type=int, default=500,
                   help="save a checkpoint every N steps, 0: only at the end (500)")
    p.add_argument("--eval-every", type=int, default=0, help="evaluate every N steps and keep the "
                   "best adapter as adapter-best.pt, 0: off (0)")
    return p


def default_settings(method, recipe):
    """{name: value} of the flags if none but --method is given."""
    return {**vars(make_parser().parse_args([])), "targets": list(TARGETS),
            **asdict(HydraSettings()), **recipe, "method": method, **METHODS[method]}


def parse_args(argv=None):
    """The flags, with the defaults filled in."""
    p = make_parser()
    args = p.parse_args(argv)
    if args.weights and not args.data and not args.dry_run:
        p.error("--weights needs --data FILE as well")
    if not args.weights and not args.data and not args.val_data:
        args.val_data = str(WORLD / "val.jsonl")
    try:
        if args.init_adapter:
            take_settings(args)
    except ValueError as error:
        from support.diagnose import diagnose
        p.error(str(diagnose(error, args) or error))
    args.method = args.method or "hydralora"
    for name, value in METHODS[args.method].items():
        if getattr(args, name, None) not in (None, value):
            p.error(f"--method {args.method} has {name} {value}, not {getattr(args, name)}: drop "
                    f"{flag(name)} or the method")
    recipe = PAPER_RECIPE if args.weights else WORLD_RECIPE
    for name, value in default_settings(args.method, recipe).items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)
    args.out = args.out or f"runs/{args.method}"
    try:
        files = [split_weight(text) for text in args.data or []]
        args.data = [path for path, _ in files]
        weights = [weight for _, weight in files]
        args.data_weights = weights if set(weights) - {1} else None
        args.device = pick_device(args.device)
        # --gpu-memory asks about a GPU, whatever this machine has
        args.dtype = pick_dtype(args.dtype, "cuda" if args.gpu_memory else args.device)
        if args.micro_tokens is None:
            args.micro_tokens = MICRO_TOKENS if args.device.startswith("cuda") else 0
        args.order = ORDER
        args.processes = distributed.world_size()
        validate_args(args)
    except ValueError as error:
        p.error(str(error))
    return args


def take_settings(args):
    """Fills in the method and the settings of --init-adapter, and --quantize as it was trained
    with. Raises ValueError for a flag that contradicts the settings."""
    if not args.resume:  # else the checkpoint says it
        args.quantize = args.quantize or trained_with(args.init_adapter)
    settings = read_adapter_config(args.init_adapter)
    settings["method"] = method_of(settings)
    for name, value in settings.items():
        if not hasattr(args, name):
            continue  # the method fixes it
        given = getattr(args, name)
        if given not in (None, value):
            has, wanted = (",".join(x) if isinstance(x, list) else x for x in (value, given))
            raise ValueError(f"--init-adapter {args.init_adapter} has {name} {has}, not {wanted}: "
                             f"drop {flag(name)}")
        setattr(args, name, value)


def method_of(settings):
    """The method that gives an adapter these settings; of several, the one that fixes most."""
    without_flag = settings.keys() - vars(make_parser().parse_args([])).keys()
    usual = {name: getattr(HydraSettings(), name) for name in without_flag}
    for method, fixed in sorted(METHODS.items(), key=lambda item: len(item[1]), reverse=True):
        if {**usual, **fixed}.items() <= settings.items():
            return method
    raise ValueError(f"no --method gives an adapter of {settings}")


def validate_args(args):
    """Raises ValueError for settings that cannot be, before anything is read."""
    check_min(args, rank=1, epochs=1, batch_size=1, grad_accum=1, max_seq_len=1, max_steps=0,
              save_every=0, eval_every=0, clip=0, weight_decay=0)
    for name in ("lr", "alpha"):
        if not (getattr(args, name) > 0 and math.isfinite(getattr(args, name))):
            raise ValueError(f"--{name} must be positive and finite, got {getattr(args, name)}")
    refused = [
        (not 0 <= args.seed < 2**32, f"--seed must be from 0 to 2**32 - 1, got {args.seed}"),
        (not 0 <= args.dropout < 1, "--dropout must be at least 0 and below 1"),
        (not 0 <= args.warmup < 1, "--warmup must be at least 0 and below 1"),
        (args.resume and args.overwrite, "--resume and --overwrite are mutually exclusive"),
        (args.method == "full" and args.heads == "auto",
         "--heads auto needs heads to count: --method full has none"),
        (args.gate == "uniform" and args.method in ("lora", "full"),
         f"--gate uniform requires several heads: --method {args.method} has none"),
        ((args.shard_base or args.gpus) and args.method == "full",
         "--shard-base and --gpus shard a base that is frozen: --method full trains it"),
        (args.quantize in KINDS and (args.method == "full" or args.gpus),
         f"--quantize {args.quantize} holds a frozen base whole: --method full trains the base, "
         "and --gpus shards it"),
        (args.init_adapter and Path(args.init_adapter).resolve().parent == Path(args.out).resolve(),
         f"--init-adapter {args.init_adapter} is in --out {args.out}: name another --out"),
        (args.dry_run and args.heads == "auto",
         "--dry-run reads no data: --heads auto must be a number"),
        (args.dry_run and args.shard_base,
         "--dry-run asks about a sharded base by --gpus N, not by --shard-base"),
        (args.gpu_memory is not None and not (args.dry_run and 0 < args.gpu_memory < 1e6),
         "--gpu-memory is a positive number of GiB, and a question to --dry-run"),
        (args.gpus is not None and not (args.dry_run and args.gpus > 0),
         "--gpus is a number of GPUs from 1, and a question to --dry-run"),
    ]
    for applies, message in refused:
        if applies:
            raise ValueError(message)
    if args.method != "full" and args.heads != "auto":  # of a fork too
        HydraSettings(**{k: v for k, v in adapter_settings(args).items() if k != "targets"})


def validate_for_model(args, shape):
    """Raises ValueError for settings that ask for more than a model of these ModelArgs has."""
    if args.max_seq_len > shape.max_seq_len:
        raise ValueError(f"--max-seq-len {args.max_seq_len} is more than "
                         f"{model_length(args.weights, shape.max_seq_len)}: give less")
    if args.method == "full":
        return
    if args.rank > shape.ffn_dim:
        raise ValueError(f"--rank {args.rank} is more than any layer in {args.weights} is wide "
                         f"({shape.ffn_dim}): give less")
    with torch.device("meta"):
        target_layers(Transformer(replace(shape, vocab_size=1, n_layers=1)), args.targets)


def adapter_settings(args):
    """The arguments of add_hydralora, None for --method full: every flag that is named like a
    setting, then what the method fixes."""
    if args.method == "full":
        return None
    flags = {field.name: getattr(args, field.name) for field in fields(HydraSettings)
             if hasattr(args, field.name)}
    return {"targets": args.targets, **flags, **METHODS[args.method]}


if __name__ == "__main__":
    sys.exit(main())
