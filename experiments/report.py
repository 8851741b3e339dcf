"""From numbers to what is printed: intervals, claims and verdicts, tables, files, pictures.

    claims = judge([claim(PRIMARY, difference(a, b), primary=True), ...], __file__)
    write_results(args, "table1", {"claims": claims}, [claims_text(claims)], draw)

The rules, which experiments/README.md explains at length:

    interval   Student's t, 95 %, over seeds; differences are taken seed by seed
    primary    at most one claim per script, written into it and committed before its long run
    secondary  all others; their p values are corrected by Holm for how many they are
    verdict    at p below 0.05 "holds", or "does not hold" if the opposite was measured; else
               "not shown"
"""

import math
import statistics
import subprocess
from pathlib import Path

from support.files import write_json, write_text
from support.pictures import plain_matplotlib

LEVEL = 0.05

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


def student_quantile(freedom):
    """The t whose student_p is LEVEL, by bisection."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        if student_p(middle, freedom) > LEVEL:
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


def p_value(stat):
    """The p value of an interval's values if their true mean were zero; 1 for a single value
    and for None."""
    numbers = stat["values"] if stat else []
    if len(numbers) < 2 or not stat["mean"]:
        return 1.0
    error = statistics.stdev(numbers) / math.sqrt(len(numbers))
    return student_p(stat["mean"] / error, len(numbers) - 1) if error else 0.0


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


def claim(text, stat, primary=False):
    """A claim and the paired difference that is positive if it is true, None if it could not
    be measured."""
    return {"claim": text, "primary": primary, "difference": stat}


def judge(claims, script):
    """The claims with p and verdict, the primary one also with the commit that brought its
    text into the script (a path). Raises ValueError for more than one primary claim."""
    primary = sum(c["primary"] for c in claims)
    if primary > 1:
        raise ValueError(f"{script} has {primary} primary claims, one at most is allowed")
    corrected = iter(holm([p_value(c["difference"]) for c in claims if not c["primary"]]))
    judged = []
    for c in claims:
        p = p_value(c["difference"]) if c["primary"] else next(corrected)
        judged.append({**c, "p": p, "verdict": verdict(c["difference"], p)})
        if c["primary"]:
            judged[-1]["fixed_by"] = fixed_by(script, c["claim"])
    return judged


def verdict(stat, p):
    if p >= LEVEL:
        return "not shown"
    return "holds" if stat["mean"] > 0 else "does not hold"


def fixed_by(script, text):
    """The commit that brought the text into the script; None if git does not know."""
    path = Path(script).resolve()

    def git(*words):
        done = subprocess.run(["git", *words], cwd=path.parent, capture_output=True, text=True)
        return "" if done.returncode else done.stdout

    try:
        if text not in git("show", f"HEAD:./{path.name}"):
            return None
        return git("log", "-1", "--format=%H", f"-S{text}", "--", path.name)[:10] or None
    except OSError:  # no git here
        return None


def claims_text(claims):
    """The table of judged claims, and which commit fixed the primary one."""
    rows = []
    note = ""
    for c in claims:
        p = "< 0.001" if c["p"] < 0.001 else f"{c['p']:.3f}"
        prefix = "primary: " if c["primary"] else ""
        rows.append([prefix + c["claim"], signed(c["difference"]), p, c["verdict"]])
        if c["primary"] and c["fixed_by"]:
            note = f"\n\nThe primary claim was fixed by commit {c['fixed_by']}, before the run."
        elif c["primary"]:
            note = "\n\nThe primary claim was not committed before the run."
    return markdown(["claim", "difference", "p", "verdict"], rows) + note


# ---------------------------------------------------------------- tables, files, pictures


def show(stat, digits=4, percent=False):
    """"mean ± half the interval", as it is or in percent; "-" for None."""
    if stat is None:
        return "-"
    factor, unit = (100, " %") if percent else (1, "")
    digits = 1 if percent else digits
    text = f"{factor * stat['mean']:.{digits}f}"
    if stat["low"] is not None:
        text += f" ± {factor * (stat['high'] - stat['mean']):.{digits}f}"
    return text + unit


def signed(stat, digits=4):
    """show() with a plus sign before a positive mean."""
    return "-" if stat is None else ("+" if stat["mean"] > 0 else "") + show(stat, digits)


def markdown(header, rows):
    """A Markdown table whose columns also line up in a terminal."""
    table = [list(map(str, row)) for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |"
             for row in table]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def write_results(args, name, content, sections, picture):
    """Prints the sections and writes NAME.json, NAME.md and, if matplotlib is installed,
    NAME.png. picture(pyplot) returns a figure, or None if it cannot be drawn."""
    args.out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(sections) + "\n"
    write_json(args.out / f"{name}.json", finite(content))
    write_text(args.out / f"{name}.md", text)
    print("\n" + text)
    try:
        with plain_matplotlib() as pyplot:
            figure = picture(pyplot)
            if figure is not None:
                # without matplotlib's version in it, the same numbers give the same file
                figure.savefig(args.out / f"{name}.png", dpi=100, metadata={"Software": None})
                pyplot.close(figure)
    except ImportError:
        print("no picture: matplotlib is not installed "
              "(pip install -r requirements-optional.txt)")


def finite(content):
    """The content with None for every number that is not finite, which JSON does not have."""
    if isinstance(content, dict):
        return {str(key): finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def error_bars(axes, x, stats, **style):
    """Means with their intervals. A marker tells series apart, not the colour alone."""
    half = [0 if s["low"] is None else s["high"] - s["mean"] for s in stats]
    axes.errorbar(x, [s["mean"] for s in stats], yerr=half, capsize=3, **style)
