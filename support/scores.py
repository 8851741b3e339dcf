"""From answers to accuracies: 95 % intervals, and two results compared question by question.

HydraLoRA section 4 prints scores without intervals; these say what a difference is worth. A
question is a dict with at least subject, index, prediction and answer. Used by eval_mmlu.py:

    python eval_mmlu.py --compare runs/mmlu.json runs/hydralora/mmlu.json
"""

import math

from data.mmlu import CATEGORY
from support.files import read_json

Z = 1.959963984540054  # the normal quantile of a two-sided 95 % interval
MOST_MOVED = 10


def wilson(right, n):
    """Wilson's interval of an accuracy: within [0, 1], and never of no width."""
    p, shrink = right / n, 1 / (1 + Z * Z / n)
    centre = shrink * (p + Z * Z / (2 * n))
    half = shrink * Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def macro_interval(counts):
    """The interval of the mean accuracy over these subjects, each (right, n): normal, from the sum
    of their binomial variances. Two right and two wrong answers more (Agresti and Coull 1998)
    keep the variance of a subject that is all right or all wrong from being zero."""
    macro = sum(right / n for right, n in counts) / len(counts)
    padded = [((right + 2) / (n + 4), n) for right, n in counts]
    half = Z * math.sqrt(sum(p * (1 - p) / n for p, n in padded)) / len(counts)
    return [max(0.0, macro - half), min(1.0, macro + half)]


def paired_interval(only_a, only_b, n):
    """The interval of accuracy B minus accuracy A on the same n questions, from how many only A and
    only B got right: Wald's, with half a question more in each cell of the 2 x 2 table (Agresti
    and Min 2005), so that it has a width even where A and B agree."""
    difference = (only_b - only_a) / (n + 2)
    half = Z * math.sqrt(((only_a + only_b + 1) / (n + 2) - difference ** 2) / (n + 2))
    return [difference - half, difference + half]


def mcnemar(only_a, only_b):
    """McNemar's exact two-sided p: if A and B were equally good, each question that only one of
    them got right would be a fair coin."""
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2 ** n)


def tally(questions, name_of):
    """{name: (right, n)} in alphabetical order, name_of(subject) being the name."""
    counts = {}
    for q in questions:
        name = name_of(q["subject"])
        right, n = counts.get(name, (0, 0))
        counts[name] = right + (q["prediction"] == q["answer"]), n + 1
    return dict(sorted(counts.items()))


def summarise(questions):
    """Micro and macro accuracy, those of subjects and categories, each with n and interval."""
    subjects = tally(questions, lambda subject: subject)
    categories = tally(questions, lambda subject: CATEGORY.get(subject, "uncategorised"))
    right, n = map(sum, zip(*subjects.values()))
    result = {"accuracy": right / n, "n": n,
              "macro": sum(r / m for r, m in subjects.values()) / len(subjects),
              "intervals": {"accuracy": wilson(right, n),
                            "macro": macro_interval(subjects.values())}}
    for key, counts in (("subjects", subjects), ("categories", categories)):
        result[key] = {name: {"accuracy": r / m, "n": m} for name, (r, m) in counts.items()}
        result["intervals"][key] = {name: wilson(r, m) for name, (r, m) in counts.items()}
    return result


def print_summary(result):
    def line(name, n, accuracy, interval):
        print(f"{name:40}{n:6}{accuracy:10.2%}   [{interval[0]:.2%}, {interval[1]:.2%}]")

    intervals = result["intervals"]
    print(f"\n{'':40}{'n':>6}{'accuracy':>10}   95 % interval")
    for key in ("subjects", "categories"):
        for name, entry in result[key].items():
            line(name, entry["n"], entry["accuracy"], intervals[key][name])
        print()
    line("macro, the mean of subjects (normal)", result["n"], result["macro"], intervals["macro"])
    line("micro, all questions (Wilson)", result["n"], result["accuracy"], intervals["accuracy"])


def read_result(path):
    """(settings, {(subject, index, answer): right?}) of a file that eval_mmlu.py wrote."""
    try:
        result = read_json(path)
        right = {(q["subject"], q["index"], q["answer"]): q["prediction"] == q["answer"]
                 for q in result["questions"]}
        if not right or not all(isinstance(subject, str) for subject, _, _ in right):
            raise ValueError("it needs questions, each with a subject")
        return dict(result["settings"]), right
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of eval_mmlu.py: {error!r}") from error


def compare(path_a, path_b):
    """Prints what result B gains on result A; raises ValueError where their questions differ."""
    (settings_a, a), (settings_b, b) = read_result(path_a), read_result(path_b)
    if a.keys() != b.keys():
        raise ValueError(f"{path_a} and {path_b} are not on the same questions: "
                         f"{len(a.keys() - b.keys())} stand only in the first, "
                         f"{len(b.keys() - a.keys())} only in the second")
    for key in settings_a:
        if settings_a[key] != settings_b.get(key):
            print(f"{key:16}A {settings_a[key]}, B {settings_b.get(key)}")
    n, right_a, right_b = len(a), sum(a.values()), sum(b.values())
    both = sum(a[key] and b[key] for key in a)
    only_a, only_b = right_a - both, right_b - both
    low, high = paired_interval(only_a, only_b, n)
    print(f"A {right_a / n:.2%}, B {right_b / n:.2%} of {n} questions; "
          f"right only in A {only_a}, only in B {only_b}")
    print(f"B - A {100 * (right_b - right_a) / n:+.2f} points, 95 % interval "
          f"[{100 * low:+.2f}, {100 * high:+.2f}] (Agresti-Min); "
          f"McNemar's exact p {mcnemar(only_a, only_b):.3g}")
    moves = {}
    for key in a:
        moves.setdefault(key[0], []).append(b[key] - a[key])
    means = {subject: sum(values) / len(values) for subject, values in moves.items()}
    for subject in sorted(means, key=lambda name: (-abs(means[name]), name))[:MOST_MOVED]:
        if means[subject]:
            print(f"{subject:40}{100 * means[subject]:+10.2f} points")
