"""From numbers to what is printed: intervals, claims and their verdicts, tables, files, pictures.

    claims = judged([claim(PRIMARY, difference(a, b), primary=True), claim("...", ...)], __file__)
    write_results(args, "table1", {"claims": claims}, [claims_text(claims)], draw)

The rules, which experiments/README.md states at length:

    interval   Student's t, 95 %, over seeds; differences are taken seed by seed
    primary    at most one claim a script, written into it and committed before its long run
    secondary  all others; their p carries Holm's correction for how many they are
    verdict    at p below 0.05 "holds", or "does not hold" where the opposite was measured; else
               "not shown"
"""

import math
import statistics
import subprocess
from pathlib import Path

from support.files import write_json, write_text

LEVEL = 0.05

# ---------------------------------------------------------------- statistics


def student_p(t, freedom):
    """How probable a value of Student's t is that is further from zero than t; two-sided, by the
    finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = cosine if odd else 1.0, 0.0
    for k in range(odd, freedom - 1, 2):
        total += term
        term *= cosine ** 2 * (k + 1) / (k + 2)
    inside = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)


def student_quantile(freedom):
    """The t that student_p gives LEVEL for, by halving."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, freedom) > LEVEL else (low, middle)
    return low


def interval(numbers):
    """{mean, low, high, values}: the mean and its 95 % interval by Student's t; a single value has
    no interval, so low and high are None."""
    numbers = list(numbers)
    mean = statistics.fmean(numbers)
    if len(numbers) < 2:
        return {"mean": mean, "low": None, "high": None, "values": numbers}
    half = (student_quantile(len(numbers) - 1) * statistics.stdev(numbers)
            / math.sqrt(len(numbers)))
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": numbers}


def difference(a, b):
    """The interval of a - b, seed by seed: what the two share, data and order, cancels."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired")
    return interval([x - y for x, y in zip(a, b)])


def p_value(stat):
    """Of a mean of zero behind the values of an interval; 1 where there is no interval, or None in
    its place."""
    numbers = stat["values"] if stat else []
    if len(numbers) < 2 or not stat["mean"]:
        return 1.0
    error = statistics.stdev(numbers) / math.sqrt(len(numbers))
    return student_p(stat["mean"] / error, len(numbers) - 1) if error else 0.0


def holm(found):
    """The p values, corrected by Holm: none of them all is below LEVEL by chance, in 95 of 100
    scripts."""
    corrected, largest = [0.0] * len(found), 0.0
    for done, i in enumerate(sorted(range(len(found)), key=found.__getitem__)):
        largest = max(largest, min(1.0, (len(found) - done) * found[i]))
        corrected[i] = largest
    return corrected


# ---------------------------------------------------------------- claims


def claim(text, stat, primary=False):
    """A claim and the paired difference that is positive where it is true, None where it could not
    be measured."""
    return {"claim": text, "primary": primary, "difference": stat}


def judged(claims, script):
    """The claims with p and verdict; the primary one with the commit that brought its words into
    the script, which is a path."""
    main, others = ([c for c in claims if c["primary"] == kind] for kind in (True, False))
    if len(main) > 1:
        raise ValueError(f"{script} has {len(main)} primary claims, one at most is allowed")
    found = {id(c): p_value(c["difference"]) for c in main}
    found |= zip(map(id, others), holm([p_value(c["difference"]) for c in others]))
    return [{**c, "p": found[id(c)], "verdict": verdict(c["difference"], found[id(c)]),
             **({"fixed_by": fixed_by(script, c["claim"])} if c["primary"] else {})}
            for c in claims]


def verdict(stat, p):
    if p >= LEVEL:
        return "not shown"
    return "holds" if stat["mean"] > 0 else "does not hold"


def fixed_by(script, text):
    """The commit that brought the text into the script, None where git does not say."""
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
    def p(c):
        return "< 0.001" if c["p"] < 0.001 else f"{c['p']:.3f}"

    table = markdown(["claim", "difference", "p", "verdict"],
                     [[("primary: " if c["primary"] else "") + c["claim"],
                       signed(c["difference"]), p(c), c["verdict"]] for c in claims])
    for c in claims:
        if c["primary"]:
            table += (f"\n\nThe primary claim was fixed by commit {c['fixed_by']}, before the run."
                      if c["fixed_by"] else
                      "\n\nThe primary claim was not committed before the run.")
    return table


# ---------------------------------------------------------------- tables, files, pictures


def show(stat, digits=4, percent=False):
    """"mean ± half the interval", in percent or as it is; "-" for None."""
    if stat is None:
        return "-"
    factor, unit, digits = (100, " %", 1) if percent else (1, "", digits)
    text = f"{factor * stat['mean']:.{digits}f}"
    if stat["low"] is not None:
        text += f" ± {factor * (stat['high'] - stat['mean']):.{digits}f}"
    return text + unit


def signed(stat, digits=4):
    return "-" if stat is None else ("+" if stat["mean"] > 0 else "") + show(stat, digits)


def markdown(header, rows):
    """A Markdown table whose columns also line up in a terminal."""
    table = [list(map(str, row)) for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |"
             for row in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def write_results(args, name, content, sections, picture):
    """Prints the sections and writes NAME.json, NAME.md and, where matplotlib is there, NAME.png;
    picture(pyplot) returns a figure, or None where it cannot be drawn."""
    args.out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(sections) + "\n"
    print("\n" + text)
    write_json(args.out / f"{name}.json", plain(content))
    write_text(args.out / f"{name}.md", text)
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not here (pip install -r requirements-optional.txt)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure = picture(pyplot)
    if figure is not None:
        # without the version in it, the same numbers give the same file
        figure.savefig(args.out / f"{name}.png", dpi=100, metadata={"Software": None})
        pyplot.close(figure)


def plain(content):
    """The same with None where a number is not finite, which JSON does not have."""
    if isinstance(content, dict):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def error_bars(axes, x, stats, **style):
    """Means with their intervals; a marker tells series apart, not the colour alone."""
    half = [0 if s["low"] is None else s["high"] - s["mean"] for s in stats]
    axes.errorbar(x, [s["mean"] for s in stats], yerr=half, capsize=3, **style)
