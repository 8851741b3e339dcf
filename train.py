"""Fine-tune LLaMA 2 with HydraLoRA, or with a method to compare it to: one plain loop, one GPU.

    python train.py --heads 3 --rank 8                     # the embedded world, minutes on a CPU
    python train.py --weights llama-2-7b --data dolly.jsonl --heads 3 --rank 8   # the real thing

Tian et al., NeurIPS 2024, sections 3.2 and 4: only the adapters and their router train. Writes
adapter.pt, run.json and log.csv. What is fp32 and what is in the chosen --dtype:

    frozen base: dtype    adapters, router, AdamW state: fp32    products: dtype, by autocast
    softmax of gate and attention, RMSNorm, rotary, loss: fp32    --method full: fp32 weights
"""

import json
import math
import resource
import sys
import time
from itertools import combinations, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cluster import choose_heads, print_report
from data.corpus import (collate, encode_records, hold_out, length_batches, read_records,
                         without_duplicates)
from data.files import file_fingerprint, weights_fingerprint, write_file
from data.runs import (Log, catch_signals, check_out, fingerprints, how_to_go_on, prepare_out,
                       read_checkpoint, restore, save_checkpoint, versions)
from data.scripts import Parser, pick_device, run_script, signal_number
from hydralora import (adapter_parameters, add_hydralora, adapters_disabled, hydra_layers,
                       record_gates, save_adapter)
from model import load_llama, save_llama
from tools.memory import print_needs

WORLD_DIR = Path(__file__).resolve().parent / "data" / "world"
# without --weights: the embedded world
WORLD = dict(weights=str(WORLD_DIR / "base"), data=str(WORLD_DIR / "train.jsonl"), lr=4e-3,
             epochs=3, batch_size=16, grad_accum=1, dropout=0.0)
# with --weights: the recipe of the paper's released script
PAPER = dict(lr=2e-4, epochs=1, batch_size=1, grad_accum=8, dropout=0.05)
BOTH = dict(rank=8, alpha=32.0, targets="w1,w2,w3", gate="learned")
MAX_SEQ_LEN = 1024  # the recipe's; a model made for less gets what it was made for
METHODS = ["hydralora", "lora", "lora-split", "full"]
WARMUP, CLIP, BETAS = 0.03, 1.0, (0.9, 0.999)
VAL_SHARE, EVAL_BATCH, LOG_EVERY = 0.05, 16, 10
HEAD_CHUNK = 256  # targets whose logits exist at a time: (256, 32000) in fp32 are 33 MB
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_args(argv=None):
    """Every setting of a run; what is not given comes from WORLD, PAPER and BOTH."""
    p = Parser("train.py", __doc__)
    p.add_argument("--weights", help="checkpoint folder in Meta's layout (the embedded world's)")
    p.add_argument("--data", help="training records, JSON lines or array (the embedded world's)")
    p.add_argument("--val-data", help="validation records (5 %% of --data, drawn by --seed)")
    p.add_argument("--method", default="hydralora", choices=METHODS, help="what trains (hydralora)")
    p.add_argument("--heads", help="number of B matrices, or auto: ask cluster.py (3; lora: 1)")
    p.add_argument("--rank", type=int, help="rank of A and B (8)")
    p.add_argument("--alpha", type=float, help="the update is scaled by alpha / rank (32)")
    p.add_argument("--dropout", type=float, help="on the adapters' input, 0: off (0.05; world: 0)")
    p.add_argument("--targets", help="adapted layers by exact name (w1,w2,w3: the feed-forward)")
    p.add_argument("--gate", choices=["learned", "uniform"], help="the router, or 1/N (learned)")
    p.add_argument("--lr", type=float, help=f"peak learning rate (2e-4; world: {WORLD['lr']:g})")
    p.add_argument("--epochs", type=int, help=f"passes over the data (1; world: {WORLD['epochs']})")
    p.add_argument("--max-steps", type=int, default=0, help="stop after so many steps, 0: off")
    p.add_argument("--batch-size", type=int, help="records a forward pass (1; world: 16)")
    p.add_argument("--grad-accum", type=int, help="forward passes a step (8; world: 1)")
    p.add_argument("--max-seq-len", type=int,
                   help="tokens a record may have (1024, or the model's own where that is less)")
    p.add_argument("--dtype", choices=DTYPES, help="base and products (fp32 on CPU, bf16 on GPU)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU where there is one)")
    p.add_argument("--checkpoint-activations", action="store_true",
                   help="recompute activations in the backward pass: less memory, more time (off)")
    p.add_argument("--dry-run", action="store_true",
                   help="say what memory the run will need, from params.json alone, and stop (off)")
    p.add_argument("--gpu-memory", type=float, metavar="GB",
                   help="with --dry-run: also the longest sequence that fits so many GiB (none)")
    p.add_argument("--seed", type=int, default=0, help="of initial weights, order and split (0)")
    p.add_argument("--out", help="folder to write (runs/METHOD)")
    p.add_argument("--overwrite", action="store_true", help="replace the run in --out (off)")
    p.add_argument("--save-every", type=int, default=500,
                   help="steps a checkpoint; 0: at the end alone (500)")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out (off)")
    args = p.parse_args(argv)
    if args.weights and not args.data and not args.dry_run:
        p.error("--weights needs --data FILE as well")
    if not args.weights and not args.data and not args.val_data:
        args.val_data = str(WORLD_DIR / "val.jsonl")
    for name, value in {**(PAPER if args.weights else WORLD), **BOTH}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    try:
        args.device = pick_device(args.device)
    except ValueError as error:
        p.error(str(error))
    on_gpu = args.device.startswith("cuda") or args.gpu_memory  # --gpu-memory asks about one
    args.dtype = args.dtype or ("bf16" if on_gpu else "fp32")
    args.out = args.out or f"runs/{args.method}"
    args.heads = args.heads or ("1" if args.method == "lora" else "3")
    args.targets = args.targets.split(",")
    check(args, p)
    return args


def check(args, parser):
    """Refuses impossible settings before anything is read."""
    for name in ("rank", "epochs", "batch_size", "grad_accum", "max_seq_len"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if min(args.max_steps, args.save_every) < 0:
        parser.error("--max-steps and --save-every must not be negative")
    if not (args.lr > 0 and math.isfinite(args.lr)):
        parser.error(f"--lr must be positive and finite, got {args.lr}")
    if not (args.alpha > 0 and math.isfinite(args.alpha)):
        parser.error(f"--alpha must be positive and finite, got {args.alpha}: 0 trains nothing")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to 2**32 - 1, got {args.seed}")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run and --overwrite deletes it: give one of them")
    if not 0 <= args.dropout < 1:
        parser.error("--dropout must be at least 0 and below 1")
    if args.heads != "auto":
        if not (args.heads.isdecimal() and len(args.heads) < 5 and int(args.heads) >= 1):
            parser.error("--heads must be auto or a number from 1 to 9999")
        args.heads = int(args.heads)
    if args.method == "lora" and args.heads != 1:
        parser.error(f"--method lora has one head, not {args.heads}: drop --heads or the method")
    if args.method == "full" and args.heads == "auto":
        parser.error("--heads auto needs heads to count: --method full has none")
    if args.dry_run and args.heads == "auto":
        parser.error("--dry-run reads no data: --heads auto must be a number")
    if args.gpu_memory is not None and not (args.dry_run and args.gpu_memory > 0):
        parser.error("--gpu-memory is a positive number of GiB, and a question to --dry-run")
    if args.gate == "uniform" and args.method in ("lora", "full"):
        parser.error(f"--gate uniform needs heads to weigh: --method {args.method} has none")


def read_data(args):
    """(training records, validation records), without one that is in both."""
    train = read_records(args.data)
    if args.val_data:
        val = read_records(args.val_data)
    else:
        train, val = hold_out(train, VAL_SHARE, args.seed)
    kept = without_duplicates(train, val)
    if not kept:
        raise ValueError(f"every record of {args.data} stands in the validation data too: give "
                         "other records to one of them")
    if len(kept) < len(train):
        print(f"warning: {len(train) - len(kept)} training records stand in the validation data "
              "too, word for word, and were removed")
    return kept, val


def load_base(args):
    """(base model on the device, tokenizer)."""
    # full: the weights that train are fp32, only their products are in --dtype
    dtype = torch.float32 if args.method == "full" else DTYPES[args.dtype]
    model, tokenizer = load_llama(args.weights, device=args.device, dtype=dtype)
    longest = model.args.max_seq_len
    if args.max_seq_len is None:
        args.max_seq_len = min(MAX_SEQ_LEN, longest)
    if args.max_seq_len > longest:
        raise ValueError(f"--max-seq-len {args.max_seq_len} is more than the {longest} of the "
                         f"model in {args.weights}: give less")
    if args.method != "full" and args.rank > model.args.ffn_dim:
        raise ValueError(f"--rank {args.rank} is more than any layer in {args.weights} is wide "
                         f"({model.args.ffn_dim}): give less")
    model.checkpoint_activations = args.checkpoint_activations
    return model, tokenizer


def add_adapters(model, args):
    if args.method != "full":
        add_hydralora(model, targets=args.targets, rank=args.rank, heads=args.heads,
                      alpha=args.alpha, dropout=args.dropout, gate=args.gate,
                      share_a=args.method != "lora-split")


def autocast(args):
    device = args.device.split(":")[0]
    return torch.autocast(device, DTYPES[args.dtype], enabled=args.dtype != "fp32")


def target_states(model, batch, args):
    """(hidden states (M, D), targets (M,)): only the places whose next token is a target."""
    tokens, where, targets = collate(batch, args.device)
    with autocast(args):
        return model.hidden_states(tokens).flatten(0, 1)[where], targets


def target_logits(model, h, args):
    """Logits (M, V) in fp32 of hidden states (M, D)."""
    with autocast(args):
        return model.output(h).float()


def target_losses(model, h, targets, args):
    """(loss (M,), hit (M,)): per target, and whether it is the most likely token; no gradients."""
    losses, hits = [], []
    for part, wanted in zip(h.split(HEAD_CHUNK), targets.split(HEAD_CHUNK)):
        logits = target_logits(model, part, args)
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        hits.append(logits.argmax(-1) == wanted)
    return torch.cat(losses), torch.cat(hits)


def backward(model, batch, count, scaler, args):
    """Adds the gradients of the batch's summed loss over count, and returns it. The head goes
    forward and back chunk by chunk, so that logits (M, V) never exist whole."""
    h, targets = target_states(model, batch, args)
    parts = [part.detach().requires_grad_(h.requires_grad) for part in h.split(HEAD_CHUNK)]
    total = 0.0
    for part, wanted in zip(parts, targets.split(HEAD_CHUNK)):
        loss = F.cross_entropy(target_logits(model, part, args), wanted, reduction="sum") / count
        scaler.scale(loss).backward()  # as far as part; frees this chunk's logits
        total = total + loss.detach()
    if h.requires_grad:  # not where the head alone has adapters
        h.backward(torch.cat([part.grad for part in parts]))
    return total


def learning_rate(step, steps, peak):
    """Linear warmup over the first 3 %, then a cosine to zero; step counts from 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def epoch_steps(sequences, args, epoch):
    """The steps of an epoch, each a list of grad_accum batches, in an order fixed by the seed."""
    generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
    batches = length_batches(sequences, args.batch_size, generator)
    return [batches[i:i + args.grad_accum] for i in range(0, len(batches), args.grad_accum)]


def all_steps(sequences, args):
    """The steps of the whole run, epoch by epoch, at most --max-steps of them."""
    steps = (step for epoch in range(args.epochs) for step in epoch_steps(sequences, args, epoch))
    return islice(steps, args.max_steps or None)


def train_step(model, batches, optimizer, scaler, args):
    """One optimiser step; returns (loss, gradient norm) as tensors. The loss is the mean over every
    target token of the accumulated batches, not the mean of the batches' means."""
    count = sum(len(s.ids) - s.start for batch in batches for s in batch)
    total = sum(backward(model, batch, count, scaler, args) for batch in batches)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(trainable(model), CLIP)
    scaler.step(optimizer)  # skipped by fp16's scaler when a gradient overflowed
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def eval_batches(sequences, args):
    """Longest first, of no more rows than in training: what fits to be trained fits here."""
    return length_batches(sequences, min(EVAL_BATCH, args.batch_size))


@torch.no_grad()
def evaluate(model, sequences, args, name):
    """{category: {loss, exact, records, tokens}} and the total under "". Loss is the mean per
    target token. Exact: greedy decoding would give the response and its EOS token by token, which
    one forward pass tells, since every step of it would be fed the true prefix."""
    model.eval()
    sums = {}
    for batch in tqdm(eval_batches(sequences, args), desc=name, leave=False):
        losses, hits = target_losses(model, *target_states(model, batch, args), args)
        sizes = [len(s.ids) - s.start for s in batch]
        for s, loss, hit in zip(batch, losses.cpu().split(sizes), hits.cpu().split(sizes)):
            for category in {"", s.category}:
                row = sums.setdefault(category, dict(loss=0.0, exact=0, records=0, tokens=0))
                row["loss"] += loss.sum(dtype=torch.float64).item()
                row["exact"] += hit.all().item()
                row["records"] += 1
                row["tokens"] += len(loss)
    for row in sums.values():
        row["loss"] /= row["tokens"]
        row["exact"] /= row["records"]
    return sums


@torch.no_grad()
def routing(model, sequences, args):
    """Where the tokens went: {layer: {category: mean gate (N)}} over the real tokens of the
    sequences, {layer: mean gate entropy, 1 = uniform}, {layer: mean cosine between the B_i}."""
    model.eval()
    layers = hydra_layers(model)
    heads = next(iter(layers.values())).heads
    gate, entropy, tokens = {name: {} for name in layers}, dict.fromkeys(layers, 0.0), {}
    for batch in tqdm(eval_batches(sequences, args), desc="routing", leave=False):
        ids = collate(batch, args.device)[0]
        with record_gates(model) as gates, autocast(args):
            h = model.hidden_states(ids)
            if "output" in layers:  # the head costs much, and is of use here only with a router
                model.output(h)
        for row, s in enumerate(batch):
            tokens[s.category] = tokens.get(s.category, 0) + len(s.ids) - 1
            for name, weights in gates.items():
                w = weights[row, :len(s.ids) - 1].cpu()  # (T, N), padding left out
                gate[name][s.category] = gate[name].get(s.category, 0) + w.sum(0)
                entropy[name] -= (w * w.clamp_min(1e-12).log()).sum().item()
    count = sum(tokens.values())
    return {
        "gate": {name: {c: (total / tokens[c]).tolist() for c, total in sorted(by.items())}
                 for name, by in gate.items()},
        "entropy": {name: total / count / math.log(heads) for name, total in entropy.items()},
        "cosine_b": {name: sum(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
                               for a, b in combinations(layer.lora_B, 2)) / math.comb(heads, 2)
                     for name, layer in layers.items()},
    }


# ---------------------------------------------------------------- what is printed and written


def print_start(args, counts, data):
    print("\n".join(f"{key:24}{value}" for key, value in vars(args).items()))
    share = counts["trainable"] / counts["base"]
    print(f"{'trainable parameters':24}{counts['trainable']:,} ({share:.2%} of the base's "
          f"{counts['base']:,}); without the router {counts['trainable_without_router']:,}")
    for name, part in data.items():
        print(f"{name + ' records':24}{part['records']} ({part['shortened']} shortened, "
              f"{part['skipped']} too long and skipped)")
    print()


def metrics(before, after):
    """val_loss, val_loss_base and the exact matches, in total and per category."""
    def pair(category):
        return {"val_loss": after[category]["loss"], "val_loss_base": before[category]["loss"],
                "exact_match": after[category]["exact"],
                "exact_match_base": before[category]["exact"],
                "records": after[category]["records"]}
    return {**pair(""), "categories": {c: pair(c) for c in sorted(after) if c}}


def print_losses(before, after):
    print(f"\n{'category':24}{'records':>8}{'loss base':>11}{'tuned':>9}"
          f"{'exact base':>12}{'tuned':>8}")
    for category in sorted(before, key=lambda name: (name == "", name)):
        a, b = before[category], after[category]
        print(f"{category or 'all':24}{a['records']:8}{a['loss']:11.4f}{b['loss']:9.4f}"
              f"{a['exact']:12.1%}{b['exact']:8.1%}")


def print_routing(report):
    """The mean gate per category in the layer whose gate tells the categories apart most (heads of
    different layers have nothing to do with each other), then the signs of a collapsed router."""
    def spread(by_category):
        table = torch.tensor(list(by_category.values()))  # (categories, N)
        return table.std(0, correction=0).mean().item()

    gate, mean = report["gate"], lambda values: sum(values.values()) / len(values)
    name = max(gate, key=lambda layer: spread(gate[layer]))
    heads = len(next(iter(gate[name].values())))
    print(f"\nmean gate in {name}, the most divided of {len(gate)} layers")
    print(f"{'category':24}" + "".join(f"{f'head {i + 1}':>9}" for i in range(heads)))
    for category, weights in gate[name].items():
        print(f"{category or 'all':24}" + "".join(f"{w:9.3f}" for w in weights))
    print(f"over all layers: gate entropy {mean(report['entropy']):.3f} (1: uniform, 0: one head), "
          f"mean cosine between the B matrices {mean(report['cosine_b']):.3f} (1: identical heads)")


def count_parameters(model):
    """{trainable, trainable_without_router, base}: numbers of weights."""
    adapter = adapter_parameters(model)
    router = sum(p.numel() for name, p in adapter.items() if name.endswith(".router"))
    total = sum(p.numel() for p in trainable(model))
    base = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in adapter.values())
    return {"trainable": total, "trainable_without_router": total - router, "base": base}


def peak_memory(args):
    """Peak GiB: allocated on the GPU, or resident in this process on a CPU."""
    if args.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(args.device) / 2**30
    return peak_resident() / 2**30


def peak_resident():
    """Peak bytes of this process in memory, pages of mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------- the run


def fit(args, out, model, train, optimizer, scaler, start, save):
    """The loop; save(step) writes a checkpoint, at the end too. Returns 0 at the end; after Ctrl-C
    or SIGTERM it finishes the step, saves and returns the signal's number."""
    steps = sum(1 for _ in all_steps(train, args))
    model.train()
    with (Log(out / "log.csv", start, fp16=args.dtype == "fp16") as log,
          catch_signals() as signals, tqdm(total=steps, initial=start, desc="train") as bar):
        for step, batches in enumerate(all_steps(train, args), start=1):
            if step <= start:
                continue
            lr = learning_rate(step - 1, steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, norm = train_step(model, batches, optimizer, scaler, args)
            log.add(step, loss, norm, lr, batches)
            bar.update()
            saves = signals or step == steps or (args.save_every and step % args.save_every == 0)
            if step % LOG_EVERY == 0 or saves:
                row = log.flush()
                bar.set_postfix_str(f"loss {row['loss']:.3f}, lr {lr:.1e}, "
                                    f"{row['tokens_per_second']} tokens/s, "
                                    f"peak {peak_memory(args):.1f} GiB")
            if saves:
                save(step)
            if signals:
                break
    return signals[0] if signals else 0


def prepare(args, out):
    """(model, training and validation sequences, clusters, what run.json says of the data)."""
    model, tokenizer = load_base(args)
    train, val = read_data(args)
    # a run that goes on does not choose its heads again
    clusters = read_checkpoint(out / "checkpoint.pt")["clusters"] if args.resume else None
    if args.heads == "auto":
        clusters = clusters or choose_heads(train, model, tokenizer, seed=args.seed)
        args.heads = clusters["k"]
        print_report(clusters)
    add_adapters(model, args)
    data = {}
    train, data["train"] = encode_records(train, tokenizer, args.max_seq_len)
    val, data["val"] = encode_records(val, tokenizer, args.max_seq_len)
    return model, train, val, clusters, data


def measure(model, val, args, name):
    """evaluate, of a model that must give numbers: JSON has no NaN, and nobody wants the model."""
    losses = evaluate(model, val, args, name)
    if not math.isfinite(losses[""]["loss"]):
        raise ValueError(f"the validation loss of the {name} model is {losses['']['loss']}: try "
                         "--dtype fp32, or other weights")
    return losses


def finish(args, out, model, val, before, result):
    """After training: measures, prints and writes the model, then run.json, then lets go of the
    checkpoint; returns the content of run.json."""
    after = measure(model, val, args, "tuned")
    print_losses(before, after)
    result["metrics"] = metrics(before, after)
    if args.method == "full":
        save_llama(model, Path(args.weights) / "tokenizer.model", out)
        result["fingerprints"]["tuned"] = weights_fingerprint(out)
    else:
        if args.heads > 1:
            result["routing"] = routing(model, val, args)
            print_routing(result["routing"])
        save_adapter(model, out / "adapter.pt")
        result["fingerprints"]["adapter"] = file_fingerprint(out / "adapter.pt")
    text = json.dumps(result, indent=1) + "\n"
    write_file(out / "run.json", lambda file: file.write(text.encode()))
    (out / "checkpoint.pt").unlink(missing_ok=True)
    wrote = "the checkpoint" if args.method == "full" else "adapter.pt"
    print(f"\nwrote {wrote}, run.json and log.csv to {out}")
    return result


def run(args):
    """One run from the settings to the files; returns (exit status, content of run.json)."""
    if args.dry_run:
        print_needs(args, HEAD_CHUNK, MAX_SEQ_LEN)
        return 0, None
    torch.manual_seed(args.seed)
    out = check_out(args)
    model, train, val, clusters, data = prepare(args, out)
    counts, prints = count_parameters(model), fingerprints(args)
    print_start(args, counts, data)
    optimizer = torch.optim.AdamW(trainable(model), lr=args.lr, betas=BETAS, weight_decay=0.0,
                                  fused=True)
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.dtype == "fp16")
    start = 0
    if args.resume:
        start, before = restore(out / "checkpoint.pt", args, prints, model, optimizer, scaler,
                                categories={"", *(s.category for s in val)})
        print(f"resumed after step {start}")
    else:
        with adapters_disabled(model):
            before = measure(model, val, args, "base")

    def save(step):
        save_checkpoint(out / "checkpoint.pt", args, prints, model, optimizer, scaler, step, before,
                        clusters)

    clock = time.perf_counter()
    try:
        prepare_out(out, args)
        stopped = fit(args, out, model, train, optimizer, scaler, start, save)
        if not stopped:
            return 0, finish(args, out, model, val, before, {
                "settings": vars(args), "versions": versions(), "fingerprints": prints,
                "parameters": counts, "data": data, "clusters": clusters,
                "seconds": time.perf_counter() - clock, "peak_gib": peak_memory(args)})
    except KeyboardInterrupt as error:  # outside the loop; its last step's checkpoint stands
        stopped = signal_number(error)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; {how_to_go_on(out)}") from error
    print(f"stopped; {how_to_go_on(out)}")
    return 128 + stopped, None


def main(argv=None):
    args = parse_args(argv)
    return run_script("train.py", lambda: run(args)[0], argv,
                      stopped="stopped before training; --out is as it was: start again",
                      memory="--checkpoint-activations needs less, with --resume as well; so does "
                             "a new run with a smaller --batch-size or --max-seq-len")


if __name__ == "__main__":
    sys.exit(main())
