"""Runs of train.py as one picture: losses, exact match, and where the router sends what.

    python -m tools.plot runs/hydralora --out run.png
    python -m tools.plot runs/hydralora runs/lora --out comparison.png

Drawn are log.csv and run.json of each run folder. Series differ in marker, hatch and line style as
well as in colour. The heat map is the router of HydraLoRA, section 3.2.1: the mean gate of each
head by family, in the layer that divides the families most. Needs matplotlib.
"""

import csv
import math
import re
import sys
import textwrap
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from hydralora import HydraSettings
from support.cli import Parser, run_script
from support.evaluation import most_specialised_layer
from support.files import read_json, write_file
from support.run_folder import RESUME_MAY_DIFFER

WIDTH, DPI = 8.3, 100  # 830 pixels, the width of a README
MEANS = 50  # the smoothed loss is a mean over a 50th of the longest run
# Okabe and Ito's colours, told apart with colour-blind eyes; the base is grey
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
MARKERS, HATCHES = "os^Dv<>", ["///", "\\\\\\", "xxx", "...", "---", "+++", "|||"]
LINES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (1, 3))]
ALL = "all"
# of no weight, or without a meaning where --method full trains the base
UNTOLD = {*RESUME_MAY_DIFFER, "dry_run", "gpu_memory", "max_steps"}
ADAPTERS_ONLY = {"targets", *(field.name for field in fields(HydraSettings))}


@dataclass
class Run:
    name: str  # of the folder
    settings: dict
    steps: list
    losses: list  # a step, in nats per token
    base: dict  # {family: (validation loss, exact match)} before training, "all" last
    tuned: dict  # the same afterwards
    gate: dict  # {layer: {family: mean gate (N)}}, empty without a router
    entropy: dict  # {layer: mean entropy of the gate, 1 = uniform}
    label: str = ""


# ---------------------------------------------------------------- what runs hold


def read_run(folder):
    """The Run in a folder. Raises ValueError where run.json or log.csv is absent or damaged."""
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} holds no run.json: give the folder of a run of train.py that "
                         "has ended")
    result = read_json(folder / "run.json")
    try:
        with open(folder / "log.csv", encoding="utf-8", newline="") as file:
            rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
        if not rows:
            raise ValueError("log.csv has no rows")
        settings, metrics = dict(result["settings"]), result["metrics"]
        table = {**metrics["categories"], ALL: metrics}
        base, tuned = ({name: (float(row["val_loss" + end]), float(row["exact_match" + end]))
                        for name, row in table.items()} for end in ("_base", ""))
        routed = settings["method"] != "full" and settings["gate"] == "learned"
        routing = result.get("routing") if routed else None
        gate, entropy = (routing["gate"], routing["entropy"]) if routing else ({}, {})
        return Run(folder.resolve().name, settings, [step for step, _ in rows],
                   [loss for _, loss in rows], base, tuned, gate, entropy)
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{folder} is not the folder of a whole run: run.json or log.csv is "
                         f"damaged ({error!r})") from error


def told(run):
    """{name: text} of the settings that may tell runs apart; of a path its last part, and the steps
    taken in place of --max-steps, which may be off."""
    def text(value):
        if isinstance(value, list):
            return ",".join(map(str, value))
        return Path(value).name if isinstance(value, str) and "/" in value else str(value)

    skipped = UNTOLD | (ADAPTERS_ONLY if run.settings["method"] == "full" else set())
    kept = {key: text(value) for key, value in run.settings.items() if key not in skipped}
    return {**kept, "steps": str(run.steps[-1])}


def add_labels(runs):
    """Gives each run its method and the settings in which it differs from another; runs alike in
    all of them are told apart by their folders."""
    kept = [told(run) for run in runs]
    for run, mine in zip(runs, kept):
        names = [key for key in mine if key != "method" and any(
            key in other and other[key] != mine[key] for other in kept)]
        run.label = ", ".join([mine["method"], *(f"{name.replace('_', ' ')} {mine[name]}"
                                                 for name in names)])
    labels = [run.label for run in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            run.label += f" ({run.name})"


def smoothed(losses, reach):
    """Mean of each loss and of `reach` before and after it, fewer at the ends. What is not finite
    (fp16 skips such a step) is left out."""
    means = []
    for i in range(len(losses)):
        part = [x for x in losses[max(0, i - reach):i + reach + 1] if math.isfinite(x)]
        means.append(sum(part) / len(part) if part else math.nan)
    return means


def series(runs):
    """[(label, {family: (loss, exact match)})]: the base, or each base where the runs had several,
    then the runs."""
    bases = []
    for run in runs:
        for _, rows in bases:
            if all(math.isclose(rows[name][0], run.base[name][0], rel_tol=1e-3)
                   for name in rows.keys() & run.base.keys()):
                rows.update(run.base)
                break
        else:
            bases.append((run.label, dict(run.base)))
    if len(bases) == 1:
        named = [("base", bases[0][1])]
    else:
        named = [(f"base of {label}", rows) for label, rows in bases]
    return named + [(run.label, run.tuned) for run in runs]


def families(runs):
    """The families of all runs in alphabetical order, and "all" at the end."""
    return [*sorted({name for run in runs for name in run.tuned} - {ALL}), ALL]


def divided(run):
    """The layer whose gate tells the families apart most."""
    return most_specialised_layer({layer: torch.tensor(list(by.values()))
                         for layer, by in run.gate.items()})


# ---------------------------------------------------------------- the drawing


def plain(text, width=60):
    """Text as it is: matplotlib would set what stands between dollars as mathematics."""
    return textwrap.fill(text, width).replace("$", r"\$")


def style(index, bases):
    """(colour, marker, hatch) of a series: grey for a base, then in order."""
    if index < bases:
        return ["#8a8a8a", "#bbbbbb", "#666666"][index % 3], "P*X"[index % 3], ["", "oo", "OO"][
            index % 3]
    i = index - bases
    return COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], HATCHES[i % len(HATCHES)]


def draw_training(axes, runs):
    every = [loss for run in runs for loss in run.losses if math.isfinite(loss) and loss > 0]
    reach = max(len(run.losses) for run in runs) // MEANS // 2
    for i, run in enumerate(runs):
        colour, marker, _ = style(i, 0)
        axes.plot(run.steps, run.losses, color=colour, linewidth=0.5, alpha=0.3)
        axes.plot(run.steps, smoothed(run.losses, reach), color=colour, linewidth=1.6,
                  linestyle=LINES[i % len(LINES)], marker=marker, markersize=5,
                  markevery=(i * len(run.steps) // 40, max(1, len(run.steps) // 8)),
                  label=plain(run.label))
    if every and max(every) > 5 * min(every):
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(short)
    axes.yaxis.set_minor_formatter(few)
    axes.set(title="training loss", xlabel="step", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()


def short(value, _=None):
    return f"{value:g}"


def few(value, _=None):
    """Between the powers of ten of a log axis 2 and 5 are named."""
    return f"{value:g}" if f"{value:.3e}"[:5] in ("2.000", "5.000") else ""


def draw_families(loss_axes, exact_axes, runs):
    names, rows = families(runs), series(runs)
    bases = len(rows) - len(runs)
    height = 0.8 / len(rows)
    values = [loss for _, table in rows for loss, _ in table.values()]
    logarithmic = min(values) > 0 and max(values) > 10 * min(values)
    for i, (label, table) in enumerate(rows):
        colour, marker, hatch = style(i, bases)
        y = [names.index(name) - 0.4 + (i + 0.5) * height for name in names if name in table]
        loss, exact = zip(*(table[name] for name in names if name in table))
        loss_axes.plot(loss, y, color=colour, marker=marker, linestyle="", markersize=6,
                       label=plain(label, 40))
        exact_axes.barh(y, [100 * x for x in exact], height=0.85 * height, color=colour + "66",
                        edgecolor=colour, hatch=hatch, linewidth=0.8, label=plain(label, 40))
        for axes, xs, form in ((loss_axes, loss, "{:#.3g}"), (exact_axes, exact, "{:.0%}")):
            for x, at in zip(xs, y):
                axes.annotate(form.format(x), (x if axes is loss_axes else 100 * x, at),
                              (6, 0), textcoords="offset points", va="center", fontsize=7.5)
    for axes in (loss_axes, exact_axes):
        axes.set_ylim(len(names) - 0.5, -0.5)  # the first on top
        axes.set_yticks(range(len(names)), [plain(name, 24) for name in names])
        for line in range(1, len(names)):
            axes.axhline(line - 0.5, color="#cccccc", linewidth=0.6)
    if logarithmic:
        loss_axes.set_xscale("log")
        loss_axes.xaxis.set_major_formatter(short)
    loss_axes.margins(x=0.15)
    loss_axes.set(title="validation loss", xlabel="nats per token")
    exact_axes.set(title="exact match", xlabel="% of records", xlim=(0, 115))
    exact_axes.set_xticks(range(0, 101, 25))


def draw_gate(axes, run):
    """Heads by family as a heat map, every cell with its number."""
    layer = divided(run)
    names, table = list(run.gate[layer]), list(run.gate[layer].values())
    heads = len(table[0])
    axes.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(heads), [str(i + 1) for i in range(heads)])
    axes.set_yticks(range(len(names)), [plain(name or ALL, 24) for name in names])
    if heads <= 12:
        for i, row in enumerate(table):
            for j, w in enumerate(row):
                axes.text(j, i, f"{w:.2f}", ha="center", va="center", fontsize=8,
                          color="white" if w > 0.6 else "black")
    axes.set(title=f"mean gate in {layer},\nthe most divided layer", xlabel="head")


def place(layer):
    """("w1", 5) of layers.5.feed_forward.w1; a layer outside the blocks has no number."""
    found = re.fullmatch(r"layers\.(\d+)\..*?(\w+)", layer)
    return (found[2], int(found[1])) if found else (layer, None)


def draw_entropy(axes, run):
    """Entropy of the gate by block, a line for each kind of layer."""
    kinds, last = {}, max((place(layer)[1] or 0 for layer in run.entropy), default=0)
    for layer, value in run.entropy.items():
        kind, block = place(layer)
        kinds.setdefault(kind, []).append((last + 1 if block is None else block, value))
    for i, (kind, points) in enumerate(kinds.items()):
        colour, marker, _ = style(i, 0)
        axes.plot(*zip(*points), color=colour, marker=marker, markersize=5,
                  linestyle=LINES[i % len(LINES)], label=plain(kind))
    kind, block = place(divided(run))
    axes.plot([last + 1 if block is None else block], [run.entropy[divided(run)]], "o",
              markersize=13, markerfacecolor="none", markeredgecolor="black",
              label="most divided")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title="entropy of the gate", xlabel="block of the model",
             ylabel="0: one head, 1: uniform", ylim=(-0.05, 1.1))
    axes.grid(alpha=0.3)
    axes.legend(ncols=2)


def draw(runs):
    """The figure of labelled runs: training loss, families, and a row for each router."""
    from matplotlib.figure import Figure
    routed = [run for run in runs if run.gate]
    bars = len(families(runs)) * (len(series(runs)) * 0.14 + 0.1)
    heights = [2.6, 1.3 + bars,
               *(1.3 + max(1.7, 0.22 * len(run.gate[divided(run)])) for run in routed)]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    draw_training(parts[0].subplots(), runs)
    pair = parts[1].subplots(1, 2, sharey=True)
    draw_families(*pair, runs)
    handles, labels = pair[1].get_legend_handles_labels()
    marks, _ = pair[0].get_legend_handles_labels()
    parts[1].legend([*zip(marks, handles)], labels, loc="outside lower center",
                    ncols=min(3, len(labels)))
    for part, run in zip(parts[2:], routed):
        left, right = part.subplots(1, 2)
        draw_gate(left, run)
        draw_entropy(right, run)
        if len(runs) > 1:
            part.suptitle(f"router of: {plain(run.label, 80)}", fontsize=10)
    return figure


# ---------------------------------------------------------------- the run


def plot(args):
    try:
        import matplotlib
    except ImportError:
        raise ValueError("no picture: matplotlib is not here (pip install -r "
                         "requirements-optional.txt)") from None
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out} must end in .png")
    runs = [read_run(folder) for folder in args.runs]
    add_labels(runs)
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10, "hatch.linewidth": 0.6,
                                "legend.fontsize": 8.5}):
        figure = draw(runs)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        # without the version in it, the same numbers give the same file
        write_file(args.out, lambda file: figure.savefig(file, format="png", dpi=DPI,
                                                         metadata={"Software": None}))
    print(f"wrote {args.out}")


def main(argv=None):
    p = Parser("plot.py", __doc__)
    p.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run of train.py")
    p.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="picture to write")
    args = p.parse_args(argv)
    return run_script("plot.py", lambda: plot(args), argv, stopped="interrupted",
                      memory="give fewer runs")


if __name__ == "__main__":
    sys.exit(main())
