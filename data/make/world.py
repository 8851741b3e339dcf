"""The embedded world: a corpus, a quiz, and texts to measure forgetting on.

    python -m data.make.world   # writes data/world/{train,val,keep}.jsonl and data/world/quiz/

The same seed gives the same files, byte for byte. keep.jsonl has texts of the kind that the
base was trained on (primer.py), drawn with another seed. base.py trains the base model.
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
    """(train, val), shuffled records. No combination of atoms occurs twice."""
    train, val = [], []
    seen = set()
    for name, family in FAMILIES.items():
        for part, records, count in ((0, train, TRAIN_PER_FAMILY), (1, val, VAL_PER_FAMILY)):
            rng = random.Random(f"{name} {part} {seed}")
            end = len(records) + count
            while len(records) < end:
                instruction, context, response = family(rng, part == 1)
                record = {"instruction": instruction, "context": context,
                          "response": response, "category": name}
                if combination(record) not in seen:
                    seen.add(combination(record))
                    records.append(record)
    rng = random.Random(f"order {seed}")
    rng.shuffle(train)
    rng.shuffle(val)
    return train, val


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
    parser.add_argument("--seed", type=int, default=0, help="random seed of all files (0)")
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
