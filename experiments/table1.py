"""Table 1 of HydraLoRA with error bars: every method, tuned alike, several seeds, one corpus.

    python -m experiments.table1
    python -m experiments.table1 --weights stories260K --data dolly.jsonl --seeds 3 \\
        --max-seq-len 256 --max-steps 300 --scaling constant --name table1-dolly

Every rank runs at a constant alpha / rank of 4 and, if that differs, at the authors' alpha of
32; on the feed-forward layers, and the methods that matter most on wq and wv too. Measured are
the validation loss (nats per token of the response), the exact match, the share of the quiz that
eval_mmlu.py finds right, and the kept loss: on texts that the base knew and the training data do
not teach (--keep-data).
"""

import statistics
import sys
from pathlib import Path

from data import WORLD
from experiments import common, report
from experiments.common import FULL, hydra, lora, split
from support import files

PRIMARY = "the quiz, feed-forward layers: HydraLoRA 3x8 ahead of one LoRA of its size"
FIXED = ", alpha 32"  # the authors' at any rank
ATTENTION = ", wq,wv"
ATTENTION_TARGETS = {"targets": "wq,wv"}
HYDRA, UNIFORM = "HydraLoRA 3x8", "uniform gate 3x8"
METRICS = {"val_loss": ("validation loss", 1), "exact_match": ("exact match (%)", 100),
           "quiz": ("quiz (%)", 100), "kept": ("kept: loss", 1)}


def matched_lora(args, **changes):
    """(name, settings) of the LoRA of HydraLoRA 3x8's size."""
    rank = common.matched_rank(args, **changes)
    return f"LoRA r{rank}, matched", lora(rank, **changes)


def methods(args):
    """{name: settings}."""
    matched, config = matched_lora(args)
    constant = {"LoRA r8": lora(8), "LoRA r16": lora(16), "LoRA r32": lora(32),
                matched: config, "LoRA (Split) 2x16": split(2, 16),
                "LoRA (Split) 4x8": split(4, 8), "LoRA (Split) 8x4": split(8, 4),
                HYDRA: hydra(3), UNIFORM: hydra(3, gate="uniform"), "full": FULL}
    # the authors keep alpha at 32: another scale than the above at every rank but 8
    same = {name: config for name, config in constant.items() if config.get("rank", 8) == 8}
    fixed = {name + FIXED: {**config, "alpha": 32.0}
             for name, config in constant.items() if name not in (*same, "LoRA r16")}
    matched, config = matched_lora(args, **ATTENTION_TARGETS)
    attention = {"LoRA r8": lora(8, **ATTENTION_TARGETS), matched: config,
                 HYDRA: hydra(3, **ATTENTION_TARGETS),
                 UNIFORM: hydra(3, gate="uniform", **ATTENTION_TARGETS)}
    attention = {name + ATTENTION: config for name, config in attention.items()}
    return {"constant": {**constant, **attention}, "fixed": {**same, **fixed},
            "both": {**constant, **fixed, **attention}}[args.scaling]


# ---------------------------------------------------------------- rows


def base_row(args, run):
    """The row of the untuned model, from what any run recorded of it."""
    metrics = run["metrics"]
    row = {"name": "base", "trainable": 0, "without_router": 0, "rate": None,
           "difference": None, "val_loss": report.interval([metrics["val_loss_base"]]),
           "exact_match": report.interval([metrics["exact_match_base"]])}
    if args.quiz:
        path = args.runs / f"base-{files.digest(args.weights)}.json"
        accuracy = common.quiz_accuracy(args.weights, None, args.quiz, path)
        row["quiz"] = report.interval([accuracy])
    if "kept" in metrics:
        row["kept"] = report.interval([metrics["kept"]["loss_base"]])
    return row


def make_rows(args, runs, rates):
    """Means with intervals; the difference is to HydraLoRA 3x8 on the same layers."""
    rows = [base_row(args, runs[HYDRA][0])]
    for name, own in runs.items():
        reference = HYDRA + ATTENTION if name.endswith(ATTENTION) else HYDRA
        parameters = own[0]["parameters"]
        row = {"name": name, "rate": rates[name],
               "trainable": parameters["trainable"],
               "without_router": parameters["trainable_without_router"], "difference": None}
        for metric in METRICS:
            if metric in own[0]["metrics"]:
                row[metric] = report.interval(common.values(own, metric))
        if name != reference:
            row["difference"] = report.difference(common.values(own),
                                                  common.values(runs[reference]))
        rows.append(row)
    return rows


# ---------------------------------------------------------------- claims


def comparisons(matched):
    """[(claim, method that loses, method that wins)] by validation loss, at a constant scale."""
    return [("a higher rank helps", "LoRA r8", "LoRA r32"),
            *(("Observation I", "LoRA r32", f"LoRA (Split) {arm}")
              for arm in ("2x16", "4x8", "8x4")),
            *(("section 3", worse, HYDRA)
              for worse in ("LoRA r8", matched, "LoRA (Split) 4x8")),
            ("the gate matters", UNIFORM, HYDRA), ("low rank costs something", HYDRA, "full")]


def make_claims(args, runs):
    """The primary one, on the quiz; then those by validation loss at a constant scale, at alpha
    32 as the paper has them, on wq and wv; then those on the quiz and on the kept loss."""
    matched, _ = matched_lora(args)
    attention, _ = matched_lora(args, **ATTENTION_TARGETS)
    found = []

    def add(text, worse, better, metric="val_loss", primary=False):
        if not {worse, better} <= runs.keys() or metric not in runs[HYDRA][0]["metrics"]:
            return
        a, b = (common.values(runs[name], metric) for name in (worse, better))
        # a better method has a lower loss, or a higher share
        stat = report.difference(a, b) if metric != "quiz" else report.difference(b, a)
        text = text if primary else f"{text}: {better} ahead of {worse}"
        found.append(report.claim(text, stat, primary))

    add(PRIMARY, matched, HYDRA, "quiz", primary=True)
    for text, worse, better in comparisons(matched):
        add(text, worse, better)
    for text, worse, better in comparisons(matched):
        if text == "Observation I" or worse == matched:  # r8 and 4x8 have alpha 32 as it is
            pair = [name + FIXED if name + FIXED in runs else name for name in (worse, better)]
            if pair != [worse, better]:
                add(text, *pair)
    for text, worse in (("section 3", "LoRA r8"), ("section 3", attention),
                        ("the gate matters", UNIFORM)):
        add(text, worse + ATTENTION, HYDRA + ATTENTION)
    add("quiz", "LoRA r8", HYDRA, "quiz")
    add("quiz", UNIFORM, HYDRA, "quiz")
    add("kept", matched, HYDRA, "kept")
    return report.judge(found, __file__)


# ---------------------------------------------------------------- what is written


def make_table(rows):
    header = ["method", "rate", "trainable", "without router", "validation loss",
              "minus HydraLoRA", "exact match"]
    more = [metric for metric in ("quiz", "kept") if metric in rows[-1]]
    header += [{"quiz": "quiz", "kept": "kept: loss"}[metric] for metric in more]
    return report.markdown(header, [
        [row["name"], f"{row['rate']:g}" if row["rate"] else "-", f"{row['trainable']:,}",
         f"{row['without_router']:,}", report.show(row["val_loss"]),
         report.signed(row["difference"]), report.show(row["exact_match"], percent=True),
         *(report.show(row[metric], percent=metric == "quiz") for metric in more)]
        for row in rows])


def draw_table1(pyplot, rows):
    """The metrics that differ, a line per method; the base's loss would dwarf the rest."""
    rows = [row for row in rows if row["name"] != "base"][::-1]
    panels = [metric for metric in METRICS
              if metric in rows[0] and len({row[metric]["mean"] for row in rows}) > 1]
    figure, axes = pyplot.subplots(1, len(panels), sharey=True, squeeze=False,
                                   layout="constrained", figsize=(12, 1.5 + 0.3 * len(rows)))
    for axis, metric in zip(axes[0], panels):
        label, factor = METRICS[metric]
        for y, row in enumerate(rows):
            stat = row[metric]
            half = 0 if stat["low"] is None else stat["high"] - stat["mean"]
            marker, color = ("D", "black") if row["name"].startswith(HYDRA) else ("o", "tab:blue")
            axis.errorbar(factor * stat["mean"], y, xerr=factor * half, marker=marker,
                          color=color, capsize=3)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.4)
    axes[0, 0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    return figure


def parse_args(argv):
    p = common.parser("table1", __doc__, seeds=5, epochs=1, records=common.MIXED)
    p.add_argument("--scaling", choices=["both", "constant", "fixed"], default="both",
                   help="alpha / rank constant, alpha fixed at 32 if that differs, or both")
    p.add_argument("--quiz", help="folder of a quiz in MMLU's layout (the world's for its base)")
    p.add_argument("--name", default="table1", help="name of the files in --out (table1)")
    args = common.parse_args(p, argv)
    if not args.quiz and Path(args.weights).resolve() == WORLD / "base":
        args.quiz = str(WORLD / "quiz")
    return args


def run(args):
    records, val = common.load_records(args)
    configs = methods(args)
    tried = common.tune({name: (config, [records]) for name, config in configs.items()}, args)
    rates = common.steady_rates(tried)
    runs = common.run_seeds(configs, rates, args, records, val, args.quiz)
    again = common.rerun(HYDRA, runs[HYDRA], args)
    rows = make_rows(args, runs, rates)
    data = runs[HYDRA][0]["data"]
    for part, counts in data.items():
        print(f"{part}: {counts['records']} records, {counts['skipped']} too long and skipped")
    print(f"median run of {HYDRA}, on one thread: "
          f"{statistics.median(r['seconds'] for r in runs[HYDRA]):.0f} s")
    common.publish(args, args.name, records, val,
                   {"data": data, "configs": configs, "sweep": tried, "rows": rows},
                   tables=[make_table(rows)], again=again, claims=make_claims(args, runs),
                   more=[common.rates_table(tried)],
                   draw=lambda pyplot: draw_table1(pyplot, rows))


if __name__ == "__main__":
    sys.exit(common.main("table1", parse_args, run))
