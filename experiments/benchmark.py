"""How fast a step is, of ours, of the known frameworks, and the least it could be.

    OMP_NUM_THREADS=1 python -m experiments.benchmark --json benchmark.json

A random LLaMA of SmolLM-135M's shape takes training steps by every method in turn, in
one process, several rounds; the tables show medians and their ratios. With one thread a
step is timed by the processor time of this process, so other work on the machine hardly
counts; with more threads by the clock on the wall. transformers and peft are compared
with when they are installed (requirements-optional.txt). Dolly's real lengths need
--data and --tokenizer; without them the lengths are drawn to be like Dolly's.
"""

import platform
import random
import sys
from functools import partial
from statistics import mean

import torch

from data.corpus import length_batches
from experiments import parts, steps
from experiments.parts import METHODS
from experiments.steps import OURS, SMOL, VARIANTS, random_base, random_batch
from support.cli import Parser, run_script
from support.files import write_json
from support.pictures import plain_matplotlib

PARTS = ("step", "memory", "dolly", "growth", "compile", "mmlu")
HEADS, RANKS, LENGTHS = (1, 2, 4, 8, 16), (4, 8, 16, 32, 64), (128, 256, 512, 1024, 2048)
PRODUCT = 2048  # width of the matrices whose product shows what the processor reaches

# each part returns the seconds of every round


def measure_step(report, base, *, tokens, rounds):
    batch = random_batch(2, tokens, base.args.vocab_size)
    product = parts.product_flops(PRODUCT, torch.float32, "cpu")
    seconds = parts.compare_methods(report, f"step, 2 x {tokens} tokens", METHODS | VARIANTS, base,
                                    [batch], device="cpu", product=product, rounds=rounds)
    parts.report_aims(report, "aims", seconds)
    method = METHODS[OURS](base)
    method.step(batch)  # warm
    parts.profile(report, method, batch, "cpu")
    return seconds


def measure_memory(report):
    """What one adapted layer, 576 -> 1536, keeps of 512 tokens for the backward pass."""
    kept = {heads: parts.kept_bytes(heads) for heads in HEADS}
    for heads, size in kept.items():
        report.row("kept for the backward pass by one adapted layer", {
            "heads": heads, "MiB": size / 2**20, "times one head": size / kept[1]})
    parts.report_aim(report, "aims", "bytes kept, 8 heads over 1", kept[8] / kept[1], "<=", 1.5)
    return {}


def measure_dolly(report, base, *, data, tokenizer, batch_size, batches, rounds):
    """Our loop, on batches of like length, against PEFT's LoRA on randomly ordered
    padded ones. Every round takes other batches of the epoch."""
    kind = "Dolly's" if data and tokenizer else "drawn"
    table = f"{kind} lengths, batches of {batch_size}"
    sequences = steps.dolly_sequences(data, tokenizer)
    order = random.Random(0).sample(sequences, len(sequences))
    padded = [order[i:i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)]
    grouped = length_batches(sequences, batch_size, torch.Generator().manual_seed(0))
    epochs = {OURS: grouped, "PEFT LoRA r24": padded}
    methods = {}
    for name, epoch in epochs.items():
        method = parts.attempt(report, name, partial(METHODS[name], base), f", {table}")
        if method:
            method.step(epoch[0])  # warm
            methods[name] = method
    seconds = {name: [] for name in methods}
    for turn in range(rounds):
        for name, method in methods.items():
            chosen = steps.evenly_chosen(epochs[name], batches, (turn + 0.5) / rounds)
            seconds[name].append(steps.seconds_of(partial(method.steps, chosen)))
    rates = {name: rounds * batches * batch_size / sum(spent)
             for name, spent in seconds.items()}
    for name, rate in rates.items():
        width = mean(max(len(s.ids) for s in batch) for batch in epochs[name])
        report.row(table, {"method": name, "records/s": rate, "positions per record": round(width)})
    if len(rates) == 2:
        claim = f"our loop over PEFT's, records/s ({kind} lengths)"
        ratio = rates[OURS] / rates["PEFT LoRA r24"]
        parts.report_aim(report, "aims", claim, ratio, ">=", 1.5)
    return seconds


def measure_growth(report, base, *, tokens, rounds, picture):
    axes = {"heads": HEADS, "rank": RANKS, "length": LENGTHS}
    seconds = parts.compare_growth(report, base, axes, tokens=tokens, batch_tokens=2 * tokens,
                                   device="cpu", rounds=rounds)
    if picture:
        draw_growth({axis: report.content["tables"][axis] for axis in axes}, picture)
    return seconds


def draw_growth(tables, path):
    """The curves of {axis: rows} side by side, on one scale that starts at zero."""
    with plain_matplotlib() as pyplot:
        figure, panels = pyplot.subplots(1, len(tables), figsize=(9, 2.4), sharey=True)
        for panel, (axis, rows) in zip(panels, tables.items()):
            places = range(len(rows))
            panel.plot(places, [row["tokens/s"] for row in rows], marker="o")
            panel.set_xticks(places, [row[axis] for row in rows])
            panel.set_xlabel(axis)
        panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel("tokens/s")
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def measure_compile(report, base, *, tokens, rounds):
    cases = {f"2 x {tokens} tokens": [random_batch(2, tokens, base.args.vocab_size)]}
    return parts.compare_compiled(report, base, cases, backend="inductor", device="cpu",
                                  rounds=rounds)


def measure_mmlu(report, base, *, rounds):
    """32 questions of one subject, whose lengths are the median of MMLU's 57."""
    subjects = parts.drawn_prompts(1, 32, (380, 520), base.args.vocab_size)
    return parts.compare_prefix(report, base.eval(), subjects, device="cpu", rounds=rounds)


def parse_args(argv):
    p = Parser("experiments.benchmark", __doc__)
    p.add_argument("--parts", default=",".join(PARTS[:4]),
                   help="what to measure (%(default)s; also mmlu, and compile, which needs a "
                   "C++ compiler)")
    p.add_argument("--repeats", type=int, default=7, help="rounds over the methods (7)")
    p.add_argument("--layers", type=int, default=30, help="layers; fewer for a trial (30)")
    p.add_argument("--tokens", type=int, default=256, help="tokens per row of the step (256)")
    p.add_argument("--data", help="Dolly's JSON lines, for its real lengths (lengths like them)")
    p.add_argument("--tokenizer", help="a tokenizer.model of 32,000 pieces, for the same")
    p.add_argument("--batch-size", type=int, default=4, help="records per batch of Dolly (4)")
    p.add_argument("--batches", type=int, default=4, help="batches per round of Dolly (4)")
    p.add_argument("--json", help="write every figure to this file (none)")
    p.add_argument("--picture", help="draw the growth into this SVG file (none)")
    args = p.parse_args(argv)
    args.parts = args.parts.split(",")
    if unknown := set(args.parts) - set(PARTS):
        p.error(f"--parts knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    return args


def run(args):
    base = random_base({**SMOL, "n_layers": args.layers})
    conditions = {"weights": sum(w.numel() for w in base.parameters()), "dtype": "fp32",
                  "torch": torch.__version__, "threads": torch.get_num_threads(),
                  "machine": platform.machine(), "rounds": args.repeats}
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    seconds, report = {}, parts.Report()
    if "step" in args.parts:
        seconds["step"] = measure_step(report, base, tokens=args.tokens, rounds=args.repeats)
    if "memory" in args.parts:
        measure_memory(report)
    if "dolly" in args.parts:
        seconds["dolly"] = measure_dolly(
            report, base, data=args.data, tokenizer=args.tokenizer, batch_size=args.batch_size,
            batches=args.batches, rounds=args.repeats)
    if "growth" in args.parts:
        seconds["growth"] = measure_growth(report, base, tokens=args.tokens, rounds=args.repeats,
                                           picture=args.picture)
    if "compile" in args.parts:
        seconds["compile"] = measure_compile(report, base, tokens=args.tokens,
                                             rounds=args.repeats)
    if "mmlu" in args.parts:
        seconds["mmlu"] = measure_mmlu(report, base, rounds=args.repeats)
    if args.json:
        write_json(args.json, {"conditions": conditions, "tables": report.content["tables"],
                               "notes": report.content["notes"], "seconds": seconds})


def main(argv=None):
    return run_script("experiments.benchmark", parse_args, run, argv,
                      memory="fewer --layers need less")


if __name__ == "__main__":
    sys.exit(main())
