"""The embedded world: a mixed instruction corpus, a quiz, and texts to measure forgetting with.

The corpus is of the families in families.py. The quiz asks in MMLU's layout for facts that the base
has read (primer.py) and no family teaches, in words that the primer never uses. keep.jsonl holds
texts of the kind that the base has read, drawn with another seed.

    python -m data.make.world   # writes data/world/{train,val,keep}.jsonl and data/world/quiz/

The files come out byte for byte the same for a seed. base.py trains the base on the primer.
"""

import argparse
import csv
import json
import random
from pathlib import Path

from data import WORLD
from data.make.families import FAMILIES, combination
from data.make.primer import KEPT, make_primer
from data.make.quiz import QUIZ, make_quiz

TRAIN_PER_FAMILY, VAL_PER_FAMILY, KEEP = 1280, 120, 400


def make_corpus(seed):
    """(training, validation) records, shuffled; no combination of atoms stands twice."""
    parts, seen = ([], []), set()
    for family in FAMILIES:
        for part, count in enumerate((TRAIN_PER_FAMILY, VAL_PER_FAMILY)):
            rng, records = random.Random(f"{family.__name__} {part} {seed}"), []
            while len(records) < count:
                instruction, context, response = family(rng, bool(part))
                record = {"instruction": instruction, "context": context, "response": response,
                          "category": family.__name__}
                if combination(record) not in seen:
                    seen.add(combination(record))
                    records.append(record)
            parts[part].extend(records)
    rng = random.Random(f"order {seed}")
    for records in parts:
        rng.shuffle(records)
    return parts


# ---------------------------------------------------------------- writing


def write_records(records, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def write_quiz(quiz, folder):
    for split, subjects in quiz.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for subject, rows in subjects.items():
            path = folder / split / f"{subject}_{split}.csv"
            with open(path, "w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="what everything is drawn from")
    parser.add_argument("--out", type=Path, default=WORLD, help="folder to write (data/world)")
    args = parser.parse_args(argv)
    train, val = make_corpus(args.seed)
    write_records(train, args.out / "train.jsonl")
    write_records(val, args.out / "val.jsonl")
    write_records(make_primer(args.seed + 999, KEEP, KEPT), args.out / "keep.jsonl")
    quiz = make_quiz(args.seed)
    write_quiz(quiz, args.out / "quiz")
    rows = sum(len(rows) for rows in quiz["test"].values())
    print(f"{args.out}: {len(train)} training and {len(val)} validation records in "
          f"{len(FAMILIES)} families, {rows} test questions in {len(QUIZ)} subjects")


if __name__ == "__main__":
    main()
