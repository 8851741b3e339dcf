"""Table 1 of HydraLoRA with error bars: every method, tuned alike, several seeds, one world.

Claims: several small heads beat one LoRA of the same size (Observation I), HydraLoRA beats both
with fewer parameters (section 3), and its gate matters. Every rank stands at a constant alpha /
rank of 4 and, where that differs, at the authors' alpha of 32 for all ranks.

    python -m experiments.table1                 # 138 runs, 50 minutes on two slow cores
    python -m experiments.table1 --weights stories260K --data dolly.jsonl --seeds 3 \\
        --max-seq-len 256 --max-steps 300 --scaling constant --name table1-dolly

The verdicts go by validation loss (nats per token of the response); exact match is the share of
responses that greedy decoding gets right; the quiz is scored by eval_mmlu.py.
"""

import statistics
import sys
from pathlib import Path

from data import WORLD
from experiments import common
from experiments.common import FULL, claim, difference, hydra, interval, lora, show, signed, split

AUTHORS_ALPHA, FIXED = 32.0, ", alpha 32"
HYDRA = "HydraLoRA 3x8"
MARKERS = {"LoRA r": "o", "LoRA (": "s", "HydraL": "D", "full": "^", "unifor": "v"}


def methods(args, heads):
    """{name: flags of train.py}; heads is k-means' number, a method of its own unless it is 3."""
    matched = common.matched_rank(args, 1, common.count_trainable(args, 3, 8))
    constant = {"LoRA r8": lora(8), "LoRA r16": lora(16), "LoRA r32": lora(32),
                f"LoRA r{matched}, matched": lora(matched),
                "LoRA (Split) 2x16": split(2, 16), "LoRA (Split) 4x8": split(4, 8),
                "LoRA (Split) 8x4": split(8, 4), HYDRA: hydra(3),
                **({f"HydraLoRA {heads}x8, k-means": hydra(heads)} if heads != 3 else {}),
                "uniform gate 3x8": hydra(3, gate="uniform"), "full": FULL}
    # the authors keep alpha at 32: another scale than the above at every rank but 8
    same = {name: config for name, config in constant.items() if config.get("rank", 8) == 8}
    fixed = {name + FIXED: {**config, "alpha": AUTHORS_ALPHA}
             for name, config in constant.items() if name not in same}
    return {"constant": constant, "fixed": {**same, **fixed},
            "both": {**constant, **fixed}}[args.scaling]


def base_row(args, run, quiz):
    """The row of the untuned model, from what any run says of it."""
    metrics = run["metrics"]
    row = {"name": "base", "trainable": 0, "without_router": 0, "rate": None, "difference": None,
           "val_loss": interval([metrics["val_loss_base"]]),
           "exact_match": interval([metrics["exact_match_base"]])}
    if quiz:
        path = args.runs / f"base-{common.digest(args.weights)}.json"
        row["quiz"] = interval([common.quiz_accuracy(args.weights, None, quiz, path)])
    return row


def method_row(name, runs, hydra_runs, rate, quiz):
    row = {"name": name, "rate": rate, "trainable": runs[0]["parameters"]["trainable"],
           "without_router": runs[0]["parameters"]["trainable_without_router"],
           "difference": None}
    for metric in ("val_loss", "exact_match", *(["quiz"] if quiz else [])):
        row[metric] = interval(common.values(runs, metric))
    if name != HYDRA:
        row["difference"] = difference(common.values(runs), common.values(hydra_runs))
    return row


def statements(runs):
    """(claim, method that loses, method that wins) of sections 2 and 3."""
    found = [("a higher rank helps", "LoRA r8", "LoRA r32")]
    found += [("Observation I", "LoRA r32", f"LoRA (Split) {arm}")
              for arm in ("2x16", "4x8", "8x4")]
    matched = [name for name in runs if name.endswith("matched")]
    found += [("section 3", worse, HYDRA)
              for worse in ("LoRA r8", "LoRA r16", "LoRA r32", *matched, "LoRA (Split) 4x8")]
    found += [("k-means' number", HYDRA, name) for name in runs if name.endswith("k-means")]
    return [*found, ("the gate matters", "uniform gate 3x8", HYDRA),
            ("low rank costs something", HYDRA, "full")]


def make_claims(runs):
    """Each statement at both scalings, as a difference of loss that is positive if it is true; at
    the fixed alpha only where that changes one of the two methods."""
    found = []
    for fixed in ("", FIXED):
        for text, worse, better in statements(runs):
            pair = [name + fixed if name + fixed in runs else name for name in (worse, better)]
            if all(name in runs for name in pair) and (not fixed or pair != [worse, better]):
                found.append(claim(f"{text}: {pair[1]} ahead of {pair[0]}",
                                   difference(*(common.values(runs[name]) for name in pair))))
    return found


def make_table(rows, quiz):
    header = ["method", "rate", "trainable", "without router", "validation loss",
              "minus HydraLoRA", "exact match"] + (["quiz"] if quiz else [])
    cells = [[row["name"], f"{row['rate']:g}" if row["rate"] else "-", f"{row['trainable']:,}",
              f"{row['without_router']:,}", show(row["val_loss"]), signed(row["difference"]),
              show(row["exact_match"], percent=True)]
             + ([show(row["quiz"], percent=True)] if quiz else []) for row in rows]
    return common.markdown(header, cells)


def draw_table1(pyplot, rows, quiz):
    """Loss and accuracies that differ, a line a method; the base's loss would dwarf the rest."""
    panels = [("val_loss", "validation loss (nats per token)", 1), ("exact_match",
              "exact match (%)", 100)] + ([("quiz", "quiz accuracy (%)", 100)] if quiz else [])
    rows = [row for row in rows if row["name"] != "base"][::-1]
    panels = [panel for panel in panels if len({row[panel[0]]["mean"] for row in rows}) > 1]
    figure, axes = pyplot.subplots(1, len(panels), sharey=True, squeeze=False,
                                   layout="constrained", figsize=(10, 1.5 + 0.3 * len(rows)))
    for axis, (metric, label, factor) in zip(axes[0], panels):
        for y, row in enumerate(rows):
            stat = row[metric]
            half = 0 if stat["low"] is None else stat["high"] - stat["mean"]
            marker = next((m for start, m in MARKERS.items() if row["name"].startswith(start)), "o")
            axis.errorbar(factor * stat["mean"], y, xerr=factor * half, marker=marker, capsize=3,
                          color="black" if row["name"] == HYDRA else "tab:blue")
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.4)
    axes[0, 0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    return figure


def main(argv=None):
    p = common.parser("table1", __doc__, seeds=5, epochs=1, records=common.MIXED)
    p.add_argument("--scaling", choices=["both", "constant", "fixed"], default="both",
                   help="alpha / rank constant, alpha fixed at 32 where that differs, or both")
    p.add_argument("--quiz", help="folder of a quiz in MMLU's layout (the world's for its base)")
    p.add_argument("--name", default="table1", help="of the files in --out (table1)")
    args, records, val = common.prepare(p, argv)
    quiz = args.quiz
    if not quiz and Path(args.weights).resolve() == WORLD / "base":
        quiz = str(WORLD / "quiz")
    heads = common.kmeans_heads(args, records)
    configs = methods(args, heads)
    tried = common.tune({name: (config, [records]) for name, config in configs.items()}, args)
    runs = common.run_seeds(configs, tried, args, records, val, quiz)
    rows = [base_row(args, runs[HYDRA][0], quiz)]
    rows += [method_row(name, runs[name], runs[HYDRA], common.best_rate(tried[name]), quiz)
             for name in configs]
    claims = make_claims(runs)
    seconds = sum(run["seconds"] for run in {r["folder"]: r for of in runs.values() for r in of}
                  .values())
    fitted = ", ".join(f"{part} {kept['records']} records ({kept['skipped']} too long and skipped)"
                       for part, kept in runs[HYDRA][0]["data"].items())
    print(f"{fitted}\n{seconds / 60:.0f} minutes of training after the sweep, on one thread each; "
          f"median run {statistics.median(r['seconds'] for r in runs[HYDRA]):.0f} s for {HYDRA}")
    common.write_results(
        args, args.name,
        {"conditions": common.conditions(args, records, val), "kmeans_heads": heads,
         "data": runs[HYDRA][0]["data"], "configs": configs, "sweep": tried, "rows": rows,
         "claims": claims},
        [f"k-means finds {heads} heads.", make_table(rows, quiz), common.claims_table(claims),
         common.rates_table(tried)],
        lambda pyplot: draw_table1(pyplot, rows, quiz))
    return 0


if __name__ == "__main__":
    sys.exit(common.run_experiment("table1", main, None))
