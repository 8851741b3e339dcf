"""Table 1 of HydraLoRA with error bars: every method, tuned alike, several seeds, one world.

    python -m experiments.table1
    python -m experiments.table1 --weights stories260K --data dolly.jsonl --seeds 3 \\
        --max-seq-len 256 --max-steps 300 --scaling constant --name table1-dolly

Every rank stands at a constant alpha / rank of 4 and, where that differs, at the authors' alpha of
32 for all ranks; on the feed-forward layers, and the methods that matter most on wq and wv too.

    validation loss   nats per token of the response
    exact match       share of the responses that greedy decoding gets right
    quiz              share of the questions that eval_mmlu.py finds right
    kept              loss on --keep-data: what the base knew, and the training data do not teach
"""

import statistics
import sys
from pathlib import Path

from data import WORLD
from experiments import common
from experiments.common import FULL, hydra, lora, split
from experiments.report import (
    claim,
    claims_text,
    difference,
    interval,
    judged,
    markdown,
    show,
    signed,
    write_results,
)

PRIMARY = "the quiz, feed-forward layers: HydraLoRA 3x8 ahead of one LoRA of its size"
AUTHORS_ALPHA, FIXED = 32.0, ", alpha 32"
ATTENTION, ATTENTION_TARGETS = ", wq,wv", ("wq", "wv")
HYDRA, UNIFORM = "HydraLoRA 3x8", "uniform gate 3x8"
METRICS = {"val_loss": ("validation loss", 1), "exact_match": ("exact match (%)", 100),
           "quiz": ("quiz (%)", 100), "kept": ("kept: loss", 1)}
MARKERS = {"LoRA r": "o", "LoRA (": "s", "HydraL": "D", "full": "^", "unifor": "v"}


def matched_name(args, targets):
    """(name of the LoRA of HydraLoRA 3x8's size, its rank)."""
    rank = common.matched_rank(args, targets=targets)
    return f"LoRA r{rank}, matched", rank


def methods(args):
    """{name: flags of train.py}."""
    name, rank = matched_name(args, common.TARGETS)
    constant = {"LoRA r8": lora(8), "LoRA r16": lora(16), "LoRA r32": lora(32), name: lora(rank),
                "LoRA (Split) 2x16": split(2, 16), "LoRA (Split) 4x8": split(4, 8),
                "LoRA (Split) 8x4": split(8, 4), HYDRA: hydra(3),
                UNIFORM: hydra(3, gate="uniform"), "full": FULL}
    # the authors keep alpha at 32: another scale than the above at every rank but 8
    same = {name: config for name, config in constant.items() if config.get("rank", 8) == 8}
    fixed = {name + FIXED: {**config, "alpha": AUTHORS_ALPHA}
             for name, config in constant.items() if name not in (*same, "LoRA r16")}
    name, rank = matched_name(args, ATTENTION_TARGETS)
    attention = {name + ATTENTION: {**config, "targets": ",".join(ATTENTION_TARGETS)}
                 for name, config in (("LoRA r8", lora(8)), (name, lora(rank)), (HYDRA, hydra(3)),
                                      (UNIFORM, hydra(3, gate="uniform")))}
    return {"constant": {**constant, **attention}, "fixed": {**same, **fixed},
            "both": {**constant, **fixed, **attention}}[args.scaling]


# ---------------------------------------------------------------- rows


def known_metrics(run):
    """Those of METRICS that this run was measured by."""
    return [metric for metric in METRICS if metric in run["metrics"]]


def base_row(args, run, quiz):
    """The row of the untuned model, from what any run says of it."""
    metrics = run["metrics"]
    row = {"name": "base", "trainable": 0, "without_router": 0, "rate": None, "difference": None,
           "val_loss": interval([metrics["val_loss_base"]]),
           "exact_match": interval([metrics["exact_match_base"]])}
    if quiz:
        path = args.runs / f"base-{common.digest(args.weights)}.json"
        row["quiz"] = interval([common.quiz_accuracy(args.weights, None, quiz, path)])
    if "kept" in metrics:
        row["kept"] = interval([metrics["kept"]["loss_base"]])
    return row


def method_row(name, runs, hydra_runs, rate):
    """Means with intervals; the difference is to HydraLoRA 3x8 on the same layers."""
    row = {"name": name, "rate": rate, "trainable": runs[0]["parameters"]["trainable"],
           "without_router": runs[0]["parameters"]["trainable_without_router"],
           "difference": None}
    for metric in known_metrics(runs[0]):
        row[metric] = interval(common.values(runs, metric))
    if runs is not hydra_runs:
        row["difference"] = difference(common.values(runs), common.values(hydra_runs))
    return row


def make_rows(args, runs, tried, quiz):
    rows = [base_row(args, runs[HYDRA][0], quiz)]
    for name, own in runs.items():
        beside = HYDRA + ATTENTION if name.endswith(ATTENTION) else HYDRA
        rows.append(method_row(name, own, runs[beside], common.steady_rate(tried[name])))
    return rows


# ---------------------------------------------------------------- claims


def statements(matched):
    """(claim, method that loses, method that wins) by validation loss, at a constant scale."""
    found = [("a higher rank helps", "LoRA r8", "LoRA r32")]
    found += [("Observation I", "LoRA r32", f"LoRA (Split) {arm}")
              for arm in ("2x16", "4x8", "8x4")]
    found += [("section 3", worse, HYDRA) for worse in ("LoRA r8", matched, "LoRA (Split) 4x8")]
    return [*found, ("the gate matters", UNIFORM, HYDRA),
            ("low rank costs something", HYDRA, "full")]


def make_claims(args, runs):
    """The primary one, on the quiz; then those by validation loss at a constant scale, at alpha 32
    as the paper has them, on wq and wv; then those on the quiz and on what is kept."""
    matched, attention = (matched_name(args, targets)[0]
                          for targets in (common.TARGETS, ATTENTION_TARGETS))
    found = []

    def add(text, metric, worse, better, primary=False):
        if not {worse, better} <= runs.keys() or metric not in known_metrics(runs[HYDRA][0]):
            return
        a, b = (common.values(runs[name], metric) for name in (worse, better))
        # losses fall where a method is ahead, shares rise
        stat = difference(a, b) if metric in ("val_loss", "kept") else difference(b, a)
        found.append(claim(text if primary else f"{text}: {better} ahead of {worse}", stat,
                           primary))

    add(PRIMARY, "quiz", matched, HYDRA, primary=True)
    for text, worse, better in statements(matched):
        add(text, "val_loss", worse, better)
    for text, worse, better in statements(matched):
        if text == "Observation I" or worse == matched:  # r8 and 4x8 have alpha 32 as it is
            pair = [name + FIXED if name + FIXED in runs else name for name in (worse, better)]
            if pair != [worse, better]:
                add(text, "val_loss", *pair)
    for text, worse in (("section 3", "LoRA r8"), ("section 3", attention),
                        ("the gate matters", UNIFORM)):
        add(text, "val_loss", worse + ATTENTION, HYDRA + ATTENTION)
    for text, metric, worse in (("quiz", "quiz", "LoRA r8"), ("quiz", "quiz", UNIFORM),
                                ("kept", "kept", matched)):
        add(text, metric, worse, HYDRA)
    return judged(found, __file__)


# ---------------------------------------------------------------- what is written


def make_table(rows):
    header = ["method", "rate", "trainable", "without router", "validation loss",
              "minus HydraLoRA", "exact match"]
    more = [metric for metric in ("quiz", "kept") if metric in rows[-1]]
    cells = [[row["name"], f"{row['rate']:g}" if row["rate"] else "-", f"{row['trainable']:,}",
              f"{row['without_router']:,}", show(row["val_loss"]), signed(row["difference"]),
              show(row["exact_match"], percent=True),
              *(show(row[metric], percent=metric == "quiz") for metric in more)] for row in rows]
    return markdown([*header, *({"quiz": "quiz", "kept": "kept: loss"}[m] for m in more)], cells)


def draw_table1(pyplot, rows):
    """The metrics that differ, a line a method; the base's loss would dwarf the rest."""
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
            marker = next((m for start, m in MARKERS.items() if row["name"].startswith(start)), "o")
            axis.errorbar(factor * stat["mean"], y, xerr=factor * half, marker=marker, capsize=3,
                          color="black" if row["name"].startswith(HYDRA) else "tab:blue")
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
    configs = methods(args)
    tried = common.tune({name: (config, [records]) for name, config in configs.items()}, args)
    runs = common.run_seeds(configs, tried, args, records, val, quiz)
    again = common.rerun(HYDRA, runs[HYDRA], args)
    rows, claims = make_rows(args, runs, tried, quiz), make_claims(args, runs)
    fitted = ", ".join(f"{part} {kept['records']} records ({kept['skipped']} too long and skipped)"
                       for part, kept in runs[HYDRA][0]["data"].items())
    print(f"{fitted}\nmedian run {statistics.median(r['seconds'] for r in runs[HYDRA]):.0f} s for "
          f"{HYDRA}, on one thread")
    write_results(
        args, args.name,
        {"conditions": common.conditions(args, records, val), "data": runs[HYDRA][0]["data"],
         "configs": configs, "sweep": tried, "rows": rows, "rerun": again, "claims": claims},
        [make_table(rows), common.rerun_text(again), claims_text(claims),
         common.rates_table(tried)],
        lambda pyplot: draw_table1(pyplot, rows))
    return 0


if __name__ == "__main__":
    sys.exit(common.run_experiment("table1", main, None))
