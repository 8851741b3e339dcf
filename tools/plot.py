"""Runs of train.py as one picture: losses, exact match, and what the router does.

    python -m tools.plot runs/hydralora --out run.png
    python -m tools.plot runs/hydralora runs/lora --out comparison.png

It draws log.csv and run.json of each run folder, series apart by marker, hatch and line
style as well as by colour, and the router of HydraLoRA, section 3.2.1: the mean gate of
each head per family, in the layer where the families differ most. Needs matplotlib.
"""

import math
import re
import sys
import textwrap
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from data.records import NO_CATEGORY
from hydralora import HydraSettings
from support.cli import Parser, run_script
from support.evaluation import TOTAL, check_routing, most_specialised_layer, row_name
from support.files import read_json, write_file
from support.pictures import plain_matplotlib
from support.run_folder import RESUME_MAY_DIFFER, read_log

STYLE = {"font.size": 9, "axes.titlesize": 10, "hatch.linewidth": 0.6, "legend.fontsize": 8.5}
WIDTH, DPI = 8.3, 100  # 830 pixels, the width of a README
MOST_FAMILIES = 200  # a picture of thousands takes minutes
WINDOWS = 50  # the smoothed loss is a mean over a 50th of the longest run
# seven of each kind; colours of Okabe and Ito, which colour-blind people can tell apart
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
MARKERS, HATCHES = "os^Dv<>", ["///", "\\\\\\", "xxx", "...", "---", "+++", "|||"]
LINES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (1, 3))]
BASE_STYLES = [("#8a8a8a", "P", ""), ("#bbbbbb", "*", "oo"), ("#666666", "X", "OO")]
EVALUATIONS = ("val_loss", "exact_match", "kept_loss")  # columns of log.csv, of --eval-every
# settings that are not worth a label, and those that have no meaning for --method full
NO_LABEL = {*RESUME_MAY_DIFFER, "dry_run", "gpu_memory", "max_steps"} - {
    "weights", "data", "val_data", "keep_data", "init_adapter"}
ADAPTERS_ONLY = {"targets", *(field.name for field in fields(HydraSettings))}


@dataclass
class Run:
    """What a run folder holds; of a run that has not ended, name to evaluations alone."""
    name: str  # of the folder
    settings: dict
    steps: list
    losses: list  # one per step, in nats per token
    evaluations: dict  # {column: [(step, value)]} of --eval-every
    base: dict  # {family: (validation loss, exact match)} before training, the total last
    tuned: dict  # the same afterwards
    gate: dict  # {layer: {family: mean gate (N)}}, empty without a router
    entropy: dict  # {layer: mean entropy of the gate, 1 = uniform}
    label: str = ""


# ---------------------------------------------------------------- reading and comparing runs


def read_run(folder):
    """The Run in a folder. Raises ValueError if run.json or log.csv is not whole; a run that
    is going on or was stopped has log.csv alone."""
    folder = Path(folder)
    ended = (folder / "run.json").is_file()
    if not ended and not (folder / "log.csv").is_file():
        raise ValueError(f"{folder} holds no run.json and no log.csv: give the folder of a run of "
                         "train.py")
    result = read_json(folder / "run.json") if ended else {}
    try:
        rows = read_log(folder / "log.csv")
        steps, losses = [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
        if not rows:
            raise ValueError("log.csv has no rows")
        evaluations = {column: [(step, float(row[column])) for step, row in zip(steps, rows)
                                if row[column]] for column in EVALUATIONS}
        if not ended:
            return Run(folder.resolve().name, {}, steps, losses, evaluations, {}, {}, {}, {})
        settings, metrics = dict(result["settings"]), result["metrics"]
        table = {**metrics["categories"], TOTAL: metrics}
        base, tuned = ({name: (float(row["val_loss" + end]), float(row["exact_match" + end]))
                        for name, row in table.items()} for end in ("_base", ""))
        routing = result.get("routing") if settings.get("gate") == "learned" else None
        if routing:
            check_routing(routing)
        gate, entropy = (routing["gate"], routing["entropy"]) if routing else ({}, {})
        return Run(folder.resolve().name, settings, steps, losses, evaluations, base, tuned, gate,
                   entropy)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is not the folder of a whole run: run.json or log.csv is "
                         f"damaged ({error!r})") from error


def label_text(value):
    """A setting's value in a label: of a path the last part."""
    if isinstance(value, list):
        return ",".join(map(label_text, value))
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


def add_labels(runs):
    """Labels each run with its method and the settings in which it differs from another
    run; runs that are alike in all of them also get the names of their folders. --max-steps
    may be off, so the steps that were taken count instead. A run without run.json has its
    folder's name."""
    for run in runs:
        run.label = f"{run.name}, not ended, {run.steps[-1]} steps"
    ended, settings = [run for run in runs if run.settings], []
    for run in ended:
        skipped = NO_LABEL | (ADAPTERS_ONLY if run.settings["method"] == "full" else set())
        shown = {key: label_text(x) for key, x in run.settings.items() if key not in skipped}
        settings.append({**shown, "steps": str(run.steps[-1])})
    for run, mine in zip(ended, settings):
        differing = [name for name in mine if name != "method" and any(
            name in other and other[name] != mine[name] for other in settings)]
        parts = [f"{name.replace('_', ' ')} {mine[name]}" for name in differing]
        run.label = ", ".join([mine["method"], *parts])
    labels = [run.label for run in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            run.label += f" ({run.name})"


def moving_mean(losses, reach):
    """Mean of each loss and `reach` on either side, as far as finite: fp16 skips steps."""
    means = []
    for i in range(len(losses)):
        part = [x for x in losses[max(0, i - reach):i + reach + 1] if math.isfinite(x)]
        means.append(sum(part) / len(part) if part else math.nan)
    return means


def find_bases(runs):
    """[(label, {family: (loss, exact match)})]: each base of the runs once. Two are the
    same if their losses agree in every family that both have."""
    bases = []
    for run in runs:
        if not run.base:
            continue  # it has not ended
        for _, rows in bases:
            if all(math.isclose(rows[name][0], run.base[name][0], rel_tol=1e-3)
                   for name in rows.keys() & run.base.keys()):
                rows.update(run.base)
                break
        else:
            bases.append((f"base of {run.label}", dict(run.base)))
    return bases if len(bases) > 1 else [("base", bases[0][1])]


def families(runs):
    """The families of all runs in alphabetical order, then the total."""
    return [*sorted({name for run in runs for name in run.tuned} - {TOTAL}), TOTAL]


def most_divided_layer(run):
    """The layer whose gate differs most between the families."""
    return most_specialised_layer({layer: torch.tensor(list(rows.values()))
                                   for layer, rows in run.gate.items()})


# ---------------------------------------------------------------- the drawing


def tick_label(name):
    """The name of a family beside its row, short enough for it."""
    return escape(row_name(name).rstrip())


def escape(text, width=60):
    """The text in lines of this width; between dollars, matplotlib sets mathematics."""
    return textwrap.fill(text, width).replace("$", r"\$")


def style(i):
    """How the lines of series i are drawn."""
    return {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "linestyle": LINES[i % 7],
            "markersize": 5}


def minor_tick_label(value, _=None):
    """On a logarithmic axis, between the powers of ten, only 2 and 5 have labels."""
    return f"{value:g}" if f"{value:.3e}"[:5] in ("2.000", "5.000") else ""


def draw_training(axes, runs):
    """The loss of every step and its moving mean, and evaluations as diamonds."""
    reach = max(len(run.losses) for run in runs) // WINDOWS // 2
    title = "training loss"
    for i, run in enumerate(runs):
        colour = style(i)["color"]
        axes.plot(run.steps, run.losses, color=colour, linewidth=0.5, alpha=0.3)
        axes.plot(run.steps, moving_mean(run.losses, reach), **style(i), linewidth=1.6,
                  markevery=(i * len(run.steps) // 40, max(1, len(run.steps) // 8)),
                  label=escape(run.label))
        for column, inside in (("val_loss", colour), ("kept_loss", "white")):
            if run.evaluations[column]:
                title = "training loss; diamonds: validation, hollow: texts to keep"
                axes.plot(*zip(*run.evaluations[column]), **{**style(i), "marker": "D"},
                          linewidth=0.8, markerfacecolor=inside, markeredgecolor="black")
    losses = [loss for run in runs for loss in run.losses if math.isfinite(loss) and loss > 0]
    if losses and max(losses) > 5 * min(losses):
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(minor_tick_label)
    axes.set(title=title, xlabel="step", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_exact_match(axes, runs):
    """Exact match during the run."""
    for i, run in enumerate(runs):
        if run.evaluations["exact_match"]:
            steps, values = zip(*run.evaluations["exact_match"])
            axes.plot(steps, [100 * x for x in values], **style(i))
    axes.set(title="exact match by step", xlabel="step", ylabel="% of records", ylim=(-5, 105))
    axes.grid(alpha=0.3)


def draw_families(loss_axes, exact_axes, runs):
    """Validation loss and exact match of every base and run, a row per family."""
    names = families(runs)
    series = [(label, rows, *BASE_STYLES[i % len(BASE_STYLES)])
              for i, (label, rows) in enumerate(find_bases(runs))]
    series += [(run.label, run.tuned, COLOURS[i % 7], MARKERS[i % 7], HATCHES[i % 7])
               for i, run in enumerate(runs) if run.tuned]
    height = 0.8 / len(series)
    for i, (label, rows, colour, marker, hatch) in enumerate(series):
        present = [name for name in names if name in rows]
        y = [names.index(name) - 0.4 + (i + 0.5) * height for name in present]
        losses = [rows[name][0] for name in present]
        percents = [100 * rows[name][1] for name in present]
        loss_axes.plot(losses, y, color=colour, marker=marker, linestyle="", markersize=6,
                       label=escape(label, 40))
        exact_axes.barh(y, percents, height=0.85 * height, color=colour + "66", edgecolor=colour,
                        hatch=hatch, linewidth=0.8, label=escape(label, 40))
        for axes, values, form in ((loss_axes, losses, "#.3g"), (exact_axes, percents, ".0f")):
            for value, at in zip(values, y):
                text = f"{value:{form}}" + "%" * (axes is exact_axes)
                axes.annotate(text, (value, at), (6, 0), textcoords="offset points", va="center",
                              fontsize=7.5)
    for axes in (loss_axes, exact_axes):
        axes.set_ylim(len(names) - 0.5, -0.5)  # the first on top
        axes.set_yticks(range(len(names)), [tick_label(name) for name in names])
        for line in range(1, len(names)):
            axes.axhline(line - 0.5, color="#cccccc", linewidth=0.6)
    losses = [loss for _, rows, *_ in series for loss, _ in rows.values()]
    if min(losses) > 0 and max(losses) > 10 * min(losses):
        loss_axes.set_xscale("log")
        loss_axes.xaxis.set_major_formatter("{x:g}")
        loss_axes.xaxis.set_minor_formatter(minor_tick_label)
    loss_axes.margins(x=0.15)
    loss_axes.set(title="validation loss", xlabel="nats per token")
    exact_axes.set(title="exact match", xlabel="% of records", xlim=(0, 115))
    exact_axes.set_xticks(range(0, 101, 25))


def draw_gate(axes, run):
    """The mean gate as a heat map, heads by family, with its number in every cell."""
    layer = most_divided_layer(run)
    names, rows = list(run.gate[layer]), list(run.gate[layer].values())
    heads = len(rows[0])
    axes.imshow(rows, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(heads), [str(i + 1) for i in range(heads)])
    axes.set_yticks(range(len(names)), [tick_label(name or NO_CATEGORY) for name in names])
    if heads <= 12:
        for i, row in enumerate(rows):
            for j, w in enumerate(row):
                axes.text(j, i, f"{w:.2f}", ha="center", va="center", fontsize=8,
                          color="white" if w > 0.6 else "black")
    axes.set(title=f"mean gate in {layer},\nthe most divided layer", xlabel="head")


def draw_entropy(axes, run):
    """Entropy of the gate by block, a line for each kind of layer, such as w1; layers
    outside the blocks come last."""
    found = {layer: re.fullmatch(r"layers\.(\d+)\..*?(\w+)", layer) for layer in run.entropy}
    blocks = {layer: int(match[1]) for layer, match in found.items() if match}
    end = max(blocks.values(), default=0) + 1
    kinds = {}
    for layer, value in run.entropy.items():
        kind = found[layer][2] if found[layer] else layer
        kinds.setdefault(kind, []).append((blocks.get(layer, end), value))
    for i, (kind, points) in enumerate(kinds.items()):
        axes.plot(*zip(*points), **style(i), label=escape(kind))
    layer = most_divided_layer(run)
    axes.plot([blocks.get(layer, end)], [run.entropy[layer]], "o", markersize=13,
              markerfacecolor="none", markeredgecolor="black", label="most divided")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title="entropy of the gate", xlabel="block of the model",
             ylabel="0: one head, 1: uniform", ylim=(-0.05, 1.1))
    axes.grid(alpha=0.3)
    axes.legend(ncols=2)


def draw(runs):
    """The figure of labelled runs: training loss, families, a row for each router. Of runs
    that have not ended only the first is known."""
    from matplotlib.figure import Figure
    routed = [run for run in runs if run.gate]
    ended = [run for run in runs if run.tuned]
    heights = [2.6]
    if ended:
        n_series = len(find_bases(runs)) + len(ended)
        heights.append(1.3 + len(families(runs)) * (n_series * 0.14 + 0.1))
    for run in routed:
        heights.append(1.3 + max(1.7, 0.22 * len(run.gate[most_divided_layer(run)])))
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if any(run.evaluations["exact_match"] for run in runs):
        left, right = parts[0].subplots(1, 2, width_ratios=[2, 1], sharex=True)
        draw_training(left, runs)
        draw_exact_match(right, runs)
    else:
        draw_training(parts[0].subplots(), runs)
    if ended:
        pair = parts[1].subplots(1, 2, sharey=True)
        draw_families(*pair, runs)
        marks, labels = pair[0].get_legend_handles_labels()
        bars, _ = pair[1].get_legend_handles_labels()
        parts[1].legend([*zip(marks, bars)], labels, loc="outside lower center",
                        ncols=min(3, len(labels)))
    for part, run in zip(parts[2:], routed):
        left, right = part.subplots(1, 2)
        draw_gate(left, run)
        draw_entropy(right, run)
        if len(runs) > 1:
            part.suptitle(f"router of: {escape(run.label, 80)}", fontsize=10)
    return figure


# ---------------------------------------------------------------- the run


def run(args):
    runs = [read_run(folder) for folder in args.runs]
    add_labels(runs)
    if len(families(runs)) > MOST_FAMILIES:
        raise ValueError(f"{len(families(runs))} categories cannot be told apart in a picture: "
                         f"at most {MOST_FAMILIES} are drawn; run.json has the figures")
    try:
        with plain_matplotlib() as pyplot, warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            pyplot.rcParams.update(STYLE)
            figure = draw(runs)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            # without the version in it, the same numbers give the same file
            write_file(args.out, lambda file: figure.savefig(file, format="png", dpi=DPI,
                                                             metadata={"Software": None}))
    except ImportError:
        raise ValueError("no picture: matplotlib is not installed (pip install -r "
                         "requirements-optional.txt)") from None
    print(f"wrote {args.out}")
    missing = {str(warning.message) for warning in found if "missing from" in str(warning.message)}
    if missing:
        print(f"{len(missing)} characters of its names are not in matplotlib's font: boxes stand "
              "for them")


def parse_args(argv):
    p = Parser("plot.py", __doc__)
    p.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run of train.py")
    p.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="picture to write")
    args = p.parse_args(argv)
    if args.out.suffix.lower() != ".png":
        p.error(f"--out {args.out} must end in .png")
    return args


def main(argv=None):
    return run_script("plot.py", parse_args, run, argv, memory="give fewer runs")


if __name__ == "__main__":
    sys.exit(main())
