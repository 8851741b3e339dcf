"""Fine-tune LLaMA 2 with HydraLoRA, or with a method to compare it to: one plain loop.

    python train.py --heads 3 --rank 8                     # the embedded world, minutes on a CPU
    python train.py --weights llama-2-7b --data dolly.jsonl --heads 3 --rank 8   # the real thing
    torchrun --nproc-per-node 4 train.py ...               # the same run on four GPUs

Tian et al., NeurIPS 2024, sections 3.2 and 4: only the adapters and their router train. Writes
adapter.pt, run.json and log.csv. What is fp32 and what is in the chosen --dtype:

    frozen base: dtype    adapters, router, AdamW state: fp32    products: dtype, by autocast
    softmax of gate and attention, RMSNorm, rotary, loss: fp32    --method full: fp32 weights
"""

import argparse
import math
import sys
import time
from dataclasses import asdict, fields

import torch
import torch.nn.functional as F

from data import WORLD
from data.corpus import collate, encode_records, encode_texts, length_batches, load_train_val
from hydralora import GATES, TARGETS, HydraSettings, adapters_disabled, add_hydralora
from support import diagnose, distributed, evaluation, run_folder
from support.cli import Parser, add_strict_flag, flag, progress, run_script, signal_number
from support.device import DTYPES, add_device_flags, autocast, peak_memory, pick_device, pick_dtype
from support.evaluation import HEAD_CHUNK
from support.lock import file_lock
from support.refusals import refuse_impossible, refuse_misfit

# without --weights: the embedded world
WORLD_RECIPE = dict(weights=str(WORLD / "base"), data=str(WORLD / "train.jsonl"),
                    keep_data=str(WORLD / "keep.jsonl"), lr=4e-3, epochs=1, batch_size=8,
                    grad_accum=1, dropout=0.0)
# with --weights: the recipe of the paper's released script
PAPER_RECIPE = dict(lr=2e-4, epochs=1, batch_size=1, grad_accum=8, dropout=0.05)
MAX_SEQ_LEN = 1024  # the recipe's; a model made for less gets what it was made for
# what a method fixes of HydraSettings; full trains the base and has no adapter
METHODS = {"hydralora": {}, "lora": {"heads": 1}, "lora-split": {"share_a": False}, "full": {}}
WARMUP, CLIP, BETAS = 0.03, 1.0, (0.9, 0.999)
VAL_SHARE, LOG_EVERY = 0.05, 10

# ---------------------------------------------------------------- settings


def make_parser():
    p = Parser("train.py", __doc__)
    p.add_argument("--weights", help="checkpoint folder in Meta's layout (the embedded world's)")
    p.add_argument("--data", help="training records, JSON lines or array (the embedded world's)")
    p.add_argument("--val-data", help="validation records (5 %% of --data, drawn by --seed)")
    p.add_argument("--keep-data", help="texts that the base knows and --data does not teach: says "
                   "what tuning takes (none; the embedded world's)")
    add_strict_flag(p)
    p.add_argument("--method", default="hydralora", choices=METHODS, help="what trains (hydralora)")
    p.add_argument("--heads", help="number of B matrices, or auto: ask cluster.py (3; lora: 1)")
    p.add_argument("--rank", type=int, help="rank of A and B (8)")
    p.add_argument("--alpha", type=float, help="the update is scaled by alpha / rank (32)")
    p.add_argument("--dropout", type=float, help="on the adapters' input, 0: off (0.05; world: 0)")
    p.add_argument("--targets", default=",".join(TARGETS),
                   help="adapted layers by exact name (w1,w2,w3: the feed-forward)")
    p.add_argument("--gate", choices=GATES, help="the router, or 1/N (learned)")
    p.add_argument("--lr", type=float, help="peak learning rate (2e-4; world: 4e-3)")
    p.add_argument("--epochs", type=int, help="passes over the data (1)")
    p.add_argument("--max-steps", type=int, default=0, help="stop after so many steps, 0: off")
    p.add_argument("--batch-size", type=int, help="records a forward pass (1; world: 8)")
    p.add_argument("--grad-accum", type=int, help="forward passes a step (8; world: 1)")
    p.add_argument("--max-seq-len", type=int,
                   help="tokens a record may have (1024, or the model's own where that is less)")
    add_device_flags(p, dtype_help="base and products")
    distributed.add_shard_flag(p)
    p.add_argument("--checkpoint-activations", action="store_true",
                   help="recompute activations in the backward pass: less memory, more time (off)")
    p.add_argument("--dry-run", action="store_true",
                   help="say what memory the run will need, from params.json alone, and stop (off)")
    p.add_argument("--gpu-memory", type=float, metavar="GB",
                   help="with --dry-run: also the longest sequence that fits so many GiB (none)")
    p.add_argument("--gpus", type=int, help="with --dry-run: shared by so many GPUs (none)")
    p.add_argument("--seed", type=int, default=0, help="of initial weights, order and split (0)")
    p.add_argument("--out", help="folder to write (runs/METHOD)")
    p.add_argument("--overwrite", action="store_true", help="replace the run in --out (off)")
    p.add_argument("--save-every", type=int, default=500,
                   help="steps a checkpoint; 0: at the end alone (500)")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out (off)")
    return p


def parse_args(argv=None):
    """The flags, with defaults filled in; resolve_args() adds what only the model and the
    clustering can tell."""
    p = make_parser()
    args = p.parse_args(argv)
    if args.weights and not args.data and not args.dry_run:
        p.error("--weights needs --data FILE as well")
    if not args.weights and not args.data and not args.val_data:
        args.val_data = str(WORLD / "val.jsonl")
    if args.heads not in (None, "auto"):
        if not (args.heads.isdecimal() and len(args.heads) < 5 and int(args.heads) >= 1):
            p.error("--heads must be auto or a number from 1 to 9999")
        args.heads = int(args.heads)
    for name, value in METHODS[args.method].items():
        if getattr(args, name, None) not in (None, value):
            p.error(f"--method {args.method} has {name} {value}, not {getattr(args, name)}: drop "
                    f"{flag(name)} or the method")
    defaults = {**asdict(HydraSettings()), **(PAPER_RECIPE if args.weights else WORLD_RECIPE),
                **METHODS[args.method]}
    for name, value in defaults.items():
        if getattr(args, name, "no flag") is None:
            setattr(args, name, value)
    args.targets = args.targets.split(",")
    args.out = args.out or f"runs/{args.method}"
    try:
        args.device = pick_device(args.device)
    except ValueError as error:
        p.error(str(error))
    # --gpu-memory asks about a GPU, whatever this machine has
    args.dtype = pick_dtype(args.dtype, "cuda" if args.gpu_memory else args.device)
    args.processes = distributed.world_size()
    refuse_impossible(args, p)
    return args


def resolve_args(args, model, clusters):
    """The settings of the run, as they are printed and saved: args, with the longest record that
    the model allows and the number of heads that the clustering chose."""
    longest = args.max_seq_len or min(MAX_SEQ_LEN, model.args.max_seq_len)
    heads = clusters["k"] if args.heads == "auto" else args.heads
    return argparse.Namespace(**{**vars(args), "max_seq_len": longest, "heads": heads})


def adapter_settings(args):
    """The arguments of add_hydralora, None for --method full: every flag that is named like a
    setting, then what the method fixes."""
    if args.method == "full":
        return None
    flags = {field.name: getattr(args, field.name) for field in fields(HydraSettings)
             if hasattr(args, field.name)}
    return {"targets": args.targets, **flags, **METHODS[args.method]}


# ---------------------------------------------------------------- what a run starts with


def load_base(args):
    """(base model on the device, tokenizer)."""
    # full: the weights that train are fp32, only their products are in --dtype
    dtype = torch.float32 if args.method == "full" else DTYPES[args.dtype]
    model, tokenizer = distributed.load(args.weights, args, dtype=dtype)
    diagnose.warn_of_spare_rows(model, tokenizer, args.weights)
    refuse_misfit(args, model)
    model.checkpoint_activations = args.checkpoint_activations
    return model, tokenizer


def add_adapters(model, args):
    if args.method != "full":
        add_hydralora(model, **adapter_settings(args))


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def plan_steps(sequences, args):
    """The steps of the run, each a list of grad_accum batches, in an order fixed by the seed."""
    steps = []
    for epoch in range(args.epochs):
        generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        batches = length_batches(sequences, args.batch_size, generator)
        steps += [batches[i:i + args.grad_accum] for i in range(0, len(batches), args.grad_accum)]
        if args.max_steps and len(steps) >= args.max_steps:
            return steps[:args.max_steps]
    return steps


def make_optimizer(model, args):
    """(AdamW over what trains, the scaler of fp16's gradients, which does nothing otherwise)."""
    optimizer = torch.optim.AdamW(trainable(model), lr=args.lr, betas=BETAS, weight_decay=0.0,
                                  fused=True)
    return optimizer, torch.amp.GradScaler(args.device.split(":")[0], enabled=args.dtype == "fp16")


# ---------------------------------------------------------------- the loop


def learning_rate(step, steps, peak):
    """Linear warmup over the first 3 %, then a cosine to zero; step counts from 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def backward(model, sequences, count, scaler, args):
    """Adds the gradients of the batch's summed loss over count, and returns it. The head goes
    forward and back chunk by chunk, so that logits of every label never exist at once."""
    batch = collate(sequences, args.device)
    with autocast(args):
        h = model.hidden_states(batch.tokens).flatten(0, 1)[batch.target_index]  # (M, D)
    parts = [part.detach().requires_grad_(h.requires_grad) for part in h.split(HEAD_CHUNK)]
    total = 0.0
    for part, labels in zip(parts, batch.labels.split(HEAD_CHUNK)):
        with autocast(args):  # no name for the logits: they are free again after their backward
            loss = F.cross_entropy(model.output(part).float(), labels, reduction="sum") / count
        scaler.scale(loss).backward()  # down to part
        total = total + loss.detach()
    if h.requires_grad:  # not where the head alone has adapters
        h.backward(torch.cat([part.grad for part in parts]))
    return total


def train_step(model, batches, optimizer, scaler, args):
    """One optimiser step; returns (loss, gradient norm) as tensors. The loss is the mean over every
    label of the accumulated batches, not the mean of the batches' means."""
    count = sum(s.n_targets for batch in batches for s in batch)
    loss = sum(backward(model, batch, over, scaler, args)
               for batch, over in distributed.local_batches(batches, count))
    loss = distributed.all_reduce_gradients(trainable(model), loss)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(trainable(model), CLIP)
    scaler.step(optimizer)  # skipped by fp16's scaler when a gradient overflowed
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def train_steps(model, plan, optimizer, scaler, args, start=0):
    """Takes the steps of the plan from start on; yields {step, loss, grad_norm, lr} after each."""
    model.train()
    for step, batches in enumerate(plan[start:], start + 1):
        lr = learning_rate(step - 1, len(plan), args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, norm = train_step(model, batches, optimizer, scaler, args)
        yield {"step": step, "loss": loss, "grad_norm": norm, "lr": lr}


def fit(model, plan, optimizer, scaler, args, out, start, save):
    """Trains, logs, and calls save(step) every --save-every steps and at the end. After Ctrl-C or
    SIGTERM it finishes the step, saves and raises KeyboardInterrupt with the signal's number."""
    with (run_folder.Log(out / "log.csv", start, fp16=args.dtype == "fp16") as log,
          run_folder.catch_signals() as signals,
          progress(total=len(plan), initial=start, desc="train") as bar):
        for row in train_steps(model, plan, optimizer, scaler, args, start):
            step = row["step"]
            log.add(row, plan[step - 1])
            bar.update()
            stop = distributed.all_reduce_signals(signals)
            saves = stop or step == len(plan) or args.save_every and step % args.save_every == 0
            if step % LOG_EVERY == 0 or saves:
                row = log.flush()
                bar.set_postfix_str(f"loss {row['loss']:.3f}, lr {row['lr']:.1e}, "
                                    f"{row['tokens_per_second']} tokens/s, "
                                    f"peak {peak_memory(args.device):.1f} GiB", refresh=False)
            if saves:
                save(step)
            if stop:
                break
        if stop := distributed.all_reduce_signals(signals):
            raise KeyboardInterrupt(stop[0])


# ---------------------------------------------------------------- the run


def prepare(args, out):
    """(settled args, model, training sequences, {"val", and "kept" where there are any: sequences
    to measure on}, clusters, what run.json says of the data)."""
    model, tokenizer = load_base(args)
    train, val = load_train_val(args.data, args.val_data, share=VAL_SHARE, seed=args.seed,
                            strict=args.strict)
    clusters = None
    if args.resume:  # its heads are not chosen again
        clusters = run_folder.read_checkpoint(out / "checkpoint.pt")["clusters"]
    if args.heads == "auto":
        from cluster import choose_heads, print_report
        clusters = clusters or choose_heads(train, model, tokenizer, seed=args.seed)
        clusters = distributed.run_on_rank0(lambda: clusters)  # one answer for all processes
        diagnose.print_default_length(args.weights, model.args.max_seq_len)
        print_report(clusters)
    args = resolve_args(args, model, clusters)
    add_adapters(model, args)
    held, data = {}, {}
    train, data["train"] = encode_records(train, tokenizer, args.max_seq_len)
    held["val"], data["val"] = encode_records(val, tokenizer, args.max_seq_len)
    if args.keep_data:
        held["kept"], data["kept"] = encode_texts(args.keep_data, tokenizer, args.max_seq_len)
    return args, model, train, held, clusters, data


def finish(args, out, model, held, before, result):
    """After training: measures, prints and writes all; returns the content of run.json."""
    after = evaluation.measure(model, held, args, "tuned")
    evaluation.print_losses(before, after, out, args)
    result["metrics"] = evaluation.metrics(before, after)
    if args.method != "full" and args.heads > 1:
        result["routing"] = evaluation.routing_report(model, held["val"], args)
        evaluation.print_routing(result["routing"])
    run_folder.write_result(model, args, out, result)
    return result


def run_training(args):
    """One run from the settings to the files; returns (exit status, content of run.json)."""
    if args.dry_run:
        from support.memory import print_needs
        print_needs(args, adapter_settings(args), MAX_SEQ_LEN)
        return 0, None
    with distributed.process_group(args), file_lock(f"{args.out}/.lock", args.out):
        return train_and_write(args, distributed.run_on_rank0(lambda: run_folder.check_out(args)))


def train_and_write(args, out):
    """run_training in its folder, which no other process writes to."""
    torch.manual_seed(args.seed)
    with diagnose.explained(weights=args.weights, data=(args.data, args.val_data, args.keep_data)):
        args, model, train, held, clusters, data = prepare(args, out)
    counts, prints = evaluation.count_parameters(model), run_folder.fingerprints(args)
    evaluation.print_start(args, counts, data)
    optimizer, scaler = make_optimizer(model, args)
    start, checkpoint = 0, out / "checkpoint.pt"
    if args.resume:
        start, before = run_folder.restore(checkpoint, args, prints, model, optimizer, scaler, held)
        print(f"resumed after step {start}")
    else:
        with adapters_disabled(model):
            before = evaluation.measure(model, held, args, "base")

    def save(step):
        run_folder.save_checkpoint(checkpoint, args, prints, model, optimizer, scaler, step,
                                   before, clusters)

    clock = time.perf_counter()
    try:
        run_folder.prepare_out(out, args)
        with distributed.detect_lost_ranks():
            fit(model, plan_steps(train, args), optimizer, scaler, args, out, start, save)
            return 0, finish(args, out, model, held, before, {
                "settings": vars(args), "versions": run_folder.versions(), "fingerprints": prints,
                "parameters": counts, "data": data, "clusters": clusters,
                "seconds": time.perf_counter() - clock, "peak_gib": peak_memory(args.device)})
    except KeyboardInterrupt as error:  # the checkpoint of the last step stands
        print(f"stopped; {run_folder.resume_hint(out)}")
        return 128 + signal_number(error), None
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; {run_folder.resume_hint(out)}") from error


def main(argv=None):
    args = parse_args(argv)
    return run_script("train.py", lambda: run_training(args)[0], argv,
                      stopped="stopped before training; --out is as it was: start again",
                      memory="--checkpoint-activations needs less, with --resume as well; so does "
                             "a new run with a smaller --batch-size or --max-seq-len")


if __name__ == "__main__":
    sys.exit(main())
