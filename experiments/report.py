"""From numbers to what is printed: intervals, claims and verdicts, tables, pictures.

    claims = judge({PRIMARY: loss_difference(worse, better), ...}, PRIMARY, __file__)
    write_results(args, "table1", {"claims": claims}, [claims_text(claims)], draw)

The rules are explained in experiments/README.md: intervals are Student's t, 95 %, over seeds; a
script has at most one primary claim, and the p values of all others are corrected by Holm. What
is not found to differ may be found to be equal, by two one-sided tests (Schuirmann 1987).
"""

import math
import statistics
import subprocess
from pathlib import Path

from support.files import write_json, write_text
from support.pictures import plain_matplotlib

LEVEL = 0.05
MARGIN = 3.0  # percent of the loss: losses that differ by less are called equal
POWER = 0.8  # with which `power` would have been seen
STYLES = (("o", "-"), ("s", "--"), ("D", "-."), ("^", ":"), ("v", (0, (1, 3))))

# ---------------------------------------------------------------- statistics


def student_p(t, freedom):
    """The two-sided p value of Student's t, by the finite series of Abramowitz and Stegun,
    26.7.3 and 26.7.4."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(odd, freedom - 1, 2):
        total += term
        term *= cosine ** 2 * (k + 1) / (k + 2)
    inside = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)


def student_quantile(freedom, level=LEVEL):
    """The t whose student_p is the level, by bisection."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        if student_p(middle, freedom) > level:
            low = middle
        else:
            high = middle
    return low


def interval(numbers):
    """{mean, low, high, values}: the mean and its 95 % interval by Student's t. The interval
    of a single value is unknown: low and high are None."""
    numbers = list(numbers)
    mean = statistics.fmean(numbers)
    if len(numbers) < 2:
        return {"mean": mean, "low": None, "high": None, "values": numbers}
    error = statistics.stdev(numbers) / math.sqrt(len(numbers))
    half = student_quantile(len(numbers) - 1) * error
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": numbers}


def difference(a, b):
    """The interval of a - b, seed by seed: what the two share, data and order, cancels."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired")
    return interval([x - y for x, y in zip(a, b)])


def loss_difference(worse, better):
    """difference(worse, better) of losses, with the same in percent of the worse one's loss."""
    percent = interval(100 * (a - b) / a for a, b in zip(worse, better))
    return {**difference(worse, better), "percent": percent}


def standard_error(stat):
    """Of an interval's mean; None for a single value and for None."""
    numbers = stat["values"] if stat else []
    return statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else None


def p_value(stat):
    """The two-sided p value of an interval's values if their true mean were zero; 1 for a single
    value and for None."""
    error = standard_error(stat)
    if error is None or not stat["mean"]:
        return 1.0
    return student_p(stat["mean"] / error, len(stat["values"]) - 1) if error else 0.0


def equality_p(stat, margin=MARGIN):
    """The larger p value of two one-sided tests, of a true mean beyond the margin below and above
    zero: if it is small, the mean lies within the margin."""
    error = standard_error(stat)
    distance = margin - abs(stat["mean"]) if stat else 0
    if not error:
        return 1.0 if error is None or distance <= 0 else 0.0
    outside = student_p(distance / error, len(stat["values"]) - 1) / 2
    return outside if distance > 0 else 1 - outside


def detectable(stat):
    """The smallest true mean that a two-sided test at LEVEL would have found with a probability
    of POWER, given how the values scatter: the sum of two quantiles of Student's t, times the
    standard error."""
    error = standard_error(stat)
    if error is None:
        return None
    freedom = len(stat["values"]) - 1
    both = student_quantile(freedom) + student_quantile(freedom, 2 * (1 - POWER))
    return both * error


def holm(p_values):
    """The p values, corrected by Holm: in 95 of 100 scripts none of them is below LEVEL by
    chance."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


# ---------------------------------------------------------------- claims


def judge(differences, primary, script):
    """The claims of {text: paired difference that is positive if it is true, or None if it could
    not be measured}, with p and verdict; the primary one also with the commit that brought its
    text into the script (a path). Only of a loss_difference equality is asked, in percent."""
    claims = []
    for text, stat in differences.items():
        percent = (stat or {}).get("percent")
        claims.append({
            "claim": text, "primary": text == primary,
            "difference": {key: stat[key] for key in stat if key != "percent"} if stat else None,
            "percent": percent, "p": p_value(stat), "p_equal": equality_p(percent),
            "margin": MARGIN if percent else None, "power": detectable(percent or stat),
            "fixed_by": fixed_by(script, text) if text == primary else None})
    asked = {"p": claims, "p_equal": [c for c in claims if c["percent"]]}
    for key, family in asked.items():
        corrected = iter(holm([c[key] for c in family if not c["primary"]]))
        for c in claims:
            counts = c in family and not c["primary"]
            c[f"{key}_corrected"] = next(corrected) if counts else c[key]
    return [{**c, "verdict": verdict(c)} for c in claims]


def verdict(claim):
    """"ahead" or "behind" where a difference is found; else "equal", within the margin, or
    "undecided"."""
    if claim["p_corrected"] < LEVEL:
        return "ahead" if claim["difference"]["mean"] > 0 else "behind"
    return "equal" if claim["p_equal_corrected"] < LEVEL else "undecided"


def fixed_by(script, text):
    """The commit that brought the text into the script; None if git does not know."""
    path = Path(script).resolve()
    command = ["git", "log", "-1", "--format=%H", f"-S{text}", "--", path.name]
    try:
        found = subprocess.run(command, cwd=path.parent, capture_output=True, text=True).stdout
    except OSError:  # no git here
        return None
    return found[:10] or None


def code_commit():
    """The commit of this code, with "-dirty" after it if tracked files differ from it; None if
    git does not know."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=10"]
    folder = Path(__file__).parent
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    except OSError:  # no git here
        return None
    return found.strip() or None


def claims_text(claims):
    """The table of judged claims, and which commit fixed the primary one."""
    rows, note = [], ""
    for c in claims:
        prefix = "primary: " if c["primary"] else ""
        word = f"equal within {c['margin']:g} %" if c["verdict"] == "equal" else c["verdict"]
        seen = c["power"] and (f"{c['power']:.1f} %" if c["percent"] else f"{c['power']:.2g}")
        rows.append([prefix + c["claim"], show(c["difference"], sign="+"),
                     show(c["percent"], 2, sign="+"), p_text(c["p"]), p_text(c["p_corrected"]),
                     word, seen or "-"])
        if c["primary"]:
            how = f"fixed by commit {c['fixed_by']}," if c["fixed_by"] else "not committed"
            note = f"\n\nThe primary claim was {how} before the run."
    header = ["claim", "difference", "in %", "p", "p corrected", "verdict", "80 % power"]
    return markdown(header, rows) + note


def p_text(p):
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# ---------------------------------------------------------------- tables


def show(stat, digits=4, percent=False, sign=""):
    """"mean ± half the interval", as it is or in percent; "-" for None. With sign "+" a positive
    mean has its sign too."""
    if stat is None:
        return "-"
    factor, digits, unit = (100, 1, " %") if percent else (1, digits, "")
    text = f"{sign if stat['mean'] > 0 else ''}{factor * stat['mean']:.{digits}f}"
    if stat["low"] is not None:
        text += f" ± {factor * (stat['high'] - stat['mean']):.{digits}f}"
    return text + unit


def cell(value):
    """How a table shows a value: an interval with ±, a count with commas, None as a dash."""
    if value is None or isinstance(value, dict):
        return show(value)
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def markdown(header, rows):
    """A Markdown table whose columns also line up in a terminal."""
    table = [list(map(cell, row)) for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(row, widths)) + " |"
             for row in table]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


# ---------------------------------------------------------------- files and pictures


def write_results(args, name, content, sections, draw=None):
    """Prints the sections and writes NAME.json, NAME.md and, if there is a draw(pyplot) that
    returns a figure, and what it needs is installed, NAME.png."""
    args.out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(sections) + "\n"
    write_json(args.out / f"{name}.json", finite(content))
    write_text(args.out / f"{name}.md", text)
    print("\n" + text)
    if draw is None:
        return
    try:
        with plain_matplotlib() as pyplot:
            figure = draw(pyplot)
            # without matplotlib's version in it, the same numbers give the same file
            figure.savefig(args.out / f"{name}.png", dpi=100, metadata={"Software": None})
            pyplot.close(figure)
    except ImportError as error:
        print(f"no picture: {error.name} is not installed "
              "(pip install -r requirements-optional.txt)")


def finite(content):
    """The content with None for every number that is not finite, which JSON does not have."""
    if isinstance(content, dict):
        return {str(key): finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def error_bars(stats):
    """(means, half their intervals); a single value has no bar."""
    half = [math.nan if s["low"] is None else s["high"] - s["mean"] for s in stats]
    return [s["mean"] for s in stats], half


def line_chart(pyplot, lines, xlabel, ylabel):
    """The axes of a chart of {label: (x, intervals)}. Marker and dashes tell lines apart, not the
    colour alone."""
    _, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for (label, (x, stats)), (marker, dashes) in zip(lines.items(), STYLES):
        y, half = error_bars(stats)
        axes.errorbar(x, y, yerr=half, capsize=3, marker=marker, linestyle=dashes, markersize=5,
                      markevery=max(1, len(y) // 8), label=label)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.legend()
    return axes


def points_chart(pyplot, names, panels):
    """A figure with a row for each name and a panel for each of {label: intervals}."""
    figure, axes = pyplot.subplots(1, len(panels), sharey=True, squeeze=False,
                                   layout="constrained", figsize=(12, 1.5 + 0.3 * len(names)))
    for axis, (label, stats) in zip(axes[0], panels.items()):
        for y, (name, mean, half) in enumerate(zip(names, *error_bars(stats))):
            marker, color = ("D", "black") if "HydraLoRA" in name else ("o", "tab:blue")
            axis.errorbar(mean, y, xerr=half, marker=marker, color=color, capsize=3)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.4)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()  # the first name on top
    return figure
