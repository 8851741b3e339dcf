"""Table 1 of HydraLoRA with error bars: every method, tuned alike, several seeds, one corpus.

    python -m experiments.table1
    python -m experiments.table1 --weights stories260K --data dolly.jsonl --seeds 3 \\
        --max-seq-len 256 --max-steps 300 --scaling constant --name table1-dolly

Every rank runs at a constant alpha / rank of 4 and, if that differs, at the authors' alpha of
32; on the feed-forward layers, and the methods that matter most on wq and wv too. Nothing is
clipped, but for the two methods of the primary claim once more. A uniform gate over B's that
start at zero is no method of its own: it trains as LoRA r8 (held by a test).
"""

import statistics
import sys
from pathlib import Path

from data import WORLD
from experiments import common, report
from experiments.common import FULL, hydra, lora, split

PRIMARY = "wq,wv: HydraLoRA 3x8 ahead of one LoRA of its size in validation loss"
RATE = "wq,wv: HydraLoRA 3x8 is best at a higher rate than one LoRA of its size (log2)"
CUE = "wq,wv: the gain is larger in the families whose clash a cue names (points of percent)"
CUED = {"classification", "facts", "lettered"}
FIXED = ", alpha 32"  # the authors' at any rank
ATTENTION = ", wq,wv"
ATTENTION_TARGETS = {"targets": "wq,wv"}
CLIPPED = ", clip 1"
TWICE = ", at twice the rate"
HYDRA = "HydraLoRA 3x8"
METRICS = ("val_loss", "exact_match", "quiz", "kept")


def matched_lora(args, **targets):
    """(name, settings) of the LoRA of HydraLoRA 3x8's size."""
    rank = common.matched_rank(args, **targets)
    return f"LoRA r{rank}, matched", lora(rank, **targets)


def methods(args):
    """{name: settings}."""
    matched, config = matched_lora(args)
    constant = {"LoRA r8": lora(8), "LoRA r16": lora(16), "LoRA r32": lora(32),
                matched: config, "LoRA (Split) 2x16": split(2, 16),
                "LoRA (Split) 4x8": split(4, 8), "LoRA (Split) 8x4": split(8, 4),
                HYDRA: hydra(3), "full": FULL}
    # the authors keep alpha at 32: another scale than the above at every rank but 8
    same = {name: config for name, config in constant.items() if config.get("rank", 8) == 8}
    fixed = {name + FIXED: {**config, "alpha": 32.0}
             for name, config in constant.items() if name not in (*same, "LoRA r16")}
    matched, config = matched_lora(args, **ATTENTION_TARGETS)
    attention = {"LoRA r8": lora(8, **ATTENTION_TARGETS), matched: config,
                 HYDRA: hydra(3, **ATTENTION_TARGETS)}
    attention |= {name + CLIPPED: {**attention[name], "clip": 1.0} for name in (matched, HYDRA)}
    attention = {name + ATTENTION: config for name, config in attention.items()}
    return {"constant": {**constant, **attention}, "fixed": {**same, **fixed},
            "both": {**constant, **fixed, **attention}}[args.scaling]


# ---------------------------------------------------------------- rows


def run_at_twice_the_rate(args, configs, tried, records, val):
    """{name: runs} of HydraLoRA 3x8 and the LoRA of its size, on both kinds of layers."""
    matched, attention = (matched_lora(args, **targets)[0] for targets in ({}, ATTENTION_TARGETS))
    names = [matched, HYDRA, attention + ATTENTION, HYDRA + ATTENTION]
    names = [name for name in names if name in configs]
    return common.run_methods({name + TWICE: configs[name] for name in names},
                              {name + TWICE: 2 * tried[name]["rate"] for name in names},
                              args, records, val)


def base_run(args, run):
    """The untuned model as if it were a run, from what any run recorded of it."""
    metrics = {"val_loss": run["metrics"]["val_loss_base"],
               "exact_match": run["metrics"]["exact_match_base"]}
    if "kept" in run["metrics"]:
        metrics["kept"] = {"loss": run["metrics"]["kept"]["loss_base"]}
    if args.quiz:
        base = {"base": {"folder": Path(args.weights)}}
        metrics["quiz"] = common.quiz_accuracies(base, args.quiz, args)["base"]
    return {"settings": {"lr": None}, "metrics": metrics,
            "parameters": {"trainable": 0, "trainable_without_router": 0}}


def make_rows(args, runs):
    """Means with intervals; the difference is to HydraLoRA 3x8 on the same layers."""
    rows = []
    for name, own in {"base": [base_run(args, runs[HYDRA][0])], **runs}.items():
        reference = HYDRA + ATTENTION if name.endswith(ATTENTION) else HYDRA
        row = {"name": name, **common.make_row(own, METRICS), "difference": None}
        if name not in ("base", reference):
            row["difference"] = report.difference(common.values(own),
                                                  common.values(runs[reference]))
        rows.append(row)
    return rows


# ---------------------------------------------------------------- claims


def comparisons(args):
    """[(claim, method that loses, method that wins, metric)]."""
    matched, _ = matched_lora(args)
    attention = matched_lora(args, **ATTENTION_TARGETS)[0] + ATTENTION
    by_loss = [
        (PRIMARY, attention, HYDRA + ATTENTION),
        ("at clip 1", attention.replace(ATTENTION, CLIPPED + ATTENTION),
         HYDRA + CLIPPED + ATTENTION),
        ("section 3", "LoRA r8" + ATTENTION, HYDRA + ATTENTION),
        ("section 3", matched, HYDRA),
        ("section 3", "LoRA r8", HYDRA),
        ("section 3", "LoRA (Split) 4x8", HYDRA),
        ("a higher rank helps", "LoRA r8", "LoRA r32"),
        ("Observation I", "LoRA r32", "LoRA (Split) 2x16"),
        ("Observation I", "LoRA r32", "LoRA (Split) 4x8"),
        ("Observation I", "LoRA r32", "LoRA (Split) 8x4"),
        ("low rank costs something", HYDRA, "full"),
        # at alpha 32, which rank 8 has as it is
        ("Observation I", "LoRA r32" + FIXED, "LoRA (Split) 2x16" + FIXED),
        ("Observation I", "LoRA r32" + FIXED, "LoRA (Split) 4x8"),
        ("Observation I", "LoRA r32" + FIXED, "LoRA (Split) 8x4" + FIXED),
        ("section 3", matched + FIXED, HYDRA),
        *(("robust", f"{name}{TWICE}", f"{HYDRA}{layers}{TWICE}")
          for name, layers in ((matched, ""), (attention, ATTENTION)))]
    return [*((*three, "val_loss") for three in by_loss), ("kept", matched, HYDRA, "kept"),
            ("kept", HYDRA, "full", "kept")]


def cue_gain(worse, better):
    """By how many points of percent the gain is larger in CUED families than in all others; None
    without these families."""
    worse, better = common.by_category(worse), common.by_category(better)
    if not CUED < worse.keys():
        return None
    gains = {name: [100 * (a - b) / a for a, b in zip(worse[name], better[name])]
             for name in worse}
    parts = [[statistics.fmean(seed) for seed in zip(*(gains[name] for name in names))]
             for names in (CUED, gains.keys() - CUED)]
    return report.difference(*parts)


def make_claims(args, runs, tried):
    """Those whose methods have run and whose metric was measured. That of a method at twice its
    rate is on how much this costs, in percent of the loss at its own rate."""
    found = {}
    for text, worse, better, metric in comparisons(args):
        if {worse, better} <= runs.keys() and metric in runs[HYDRA][0]["metrics"]:
            a, b = (common.values(runs[name], metric) for name in (worse, better))
            named = text if text == PRIMARY else f"{text}: {better} ahead of {worse}"
            if text == "robust":
                a, b = ([100 * (x - y) / y for x, y in zip(
                    own, common.values(runs[name.removesuffix(TWICE)]))]
                    for own, name in ((a, worse), (b, better)))
                found[named] = report.difference(a, b)
            else:
                found[named] = report.loss_difference(a, b)
    matched = matched_lora(args, **ATTENTION_TARGETS)[0] + ATTENTION
    if matched in runs:
        found[RATE] = common.rate_ratio(tried, HYDRA + ATTENTION, matched)
        found[CUE] = cue_gain(runs[matched], runs[HYDRA + ATTENTION])
    return report.judge(found, PRIMARY, __file__)


# ---------------------------------------------------------------- what is written


def make_table(rows):
    more = [metric for metric in ("quiz", "kept") if metric in rows[1]]
    header = ["method", "rate", "trainable", "without router", "validation loss",
              "minus HydraLoRA", "exact match"]
    header += [{"quiz": "quiz", "kept": "kept: loss"}[metric] for metric in more]
    return report.markdown(header, [
        [row["name"], row["rate"], row["trainable"], row["without_router"], row["val_loss"],
         report.show(row["difference"], sign="+"), report.show(row["exact_match"], percent=True),
         *(report.show(row.get(metric), percent=metric == "quiz") for metric in more)]
        for row in rows])


def ratios_table(tried):
    """Best rates, and how many times full fine-tuning's they are."""
    full = tried["full"]["rate"]
    return report.markdown(["method", "best rate", "times full fine-tuning's"],
                           [[name, own["rate"], f"{own['rate'] / full:.1f}"]
                            for name, own in tried.items()])


def draw_table1(pyplot, rows):
    """The metrics that differ, a row per method; the base's loss would dwarf the rest."""
    rows = [row for row in rows[1:] if TWICE not in row["name"]]
    labels = dict(zip(METRICS, ("validation loss", "exact match", "quiz", "kept: loss")))
    panels = {labels[metric]: [row[metric] for row in rows] for metric in METRICS
              if metric in rows[0] and len({row[metric]["mean"] for row in rows}) > 1}
    return report.points_chart(pyplot, [row["name"] for row in rows], panels)


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
    tried, runs = common.tune_and_run(configs, args, records, val, args.quiz)
    runs |= run_at_twice_the_rate(args, configs, tried, records, val)
    again = common.rerun(HYDRA, runs[HYDRA], args)
    rows = make_rows(args, runs)
    content = {"data": runs[HYDRA][0]["data"], "configs": configs, "sweep": tried, "rows": rows}
    common.publish(args, args.name, records, val, content,
                   tables=[make_table(rows)], again=again, claims=make_claims(args, runs, tried),
                   more=[ratios_table(tried)],
                   draw=lambda pyplot: draw_table1(pyplot, rows))


if __name__ == "__main__":
    sys.exit(common.main("table1", parse_args, run))
