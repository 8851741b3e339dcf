"""Questions in, prompts out: MMLU's csv files and the original benchmark's prompt, byte for byte.

Hendrycks et al. 2021, the benchmark of HydraLoRA section 4. A folder holds dev/SUBJECT_dev.csv, the
shots, and test/SUBJECT_test.csv, the questions; a row is question, A, B, C, D, answer. Used by
eval_mmlu.py:

    questions, examples = read_questions(Path("data/world/quiz"), shots=5)
    prompt = encode_prompt(tokenizer, subject, examples[subject], row, max_seq_len)
"""

import csv
import io
from typing import NamedTuple

from data.what_it_is import what_it_is

LETTERS = ("A", "B", "C", "D")
CATEGORIES = {  # the benchmark's own table; a subject outside it counts as "uncategorised"
    "STEM": """abstract_algebra astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics
        electrical_engineering elementary_mathematics high_school_biology high_school_chemistry
        high_school_computer_science high_school_mathematics high_school_physics
        high_school_statistics machine_learning""",
    "humanities": """formal_logic high_school_european_history high_school_us_history
        high_school_world_history international_law jurisprudence logical_fallacies moral_disputes
        moral_scenarios philosophy prehistory professional_law world_religions""",
    "social sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology
        human_sexuality professional_psychology public_relations security_studies sociology
        us_foreign_policy""",
    "other": """anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging
        management marketing medical_genetics miscellaneous nutrition professional_accounting
        professional_medicine virology"""}
CATEGORY = {subject: name for name, subjects in CATEGORIES.items() for subject in subjects.split()}


def read_rows(path):
    """The rows of a csv file. Raises ValueError if it is absent, broken or empty."""
    if reason := what_it_is(path):
        raise ValueError(reason)
    if not path.is_file():
        raise ValueError(f"there is no {path}: --data takes a folder with dev/SUBJECT_dev.csv and "
                         "test/SUBJECT_test.csv, --subjects takes names of its files")
    rows = parse_rows(path.read_bytes(), path)
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def parse_rows(data, path):
    """Rows [question, A, B, C, D, answer] of a csv file's bytes, every cell text (the option "None"
    too). Raises ValueError naming the file and the row, counted from 1."""
    rows, read = [], 0
    try:
        for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True):
            read += 1
            if not any(map(str.strip, row)):
                continue  # a blank line, or the empty cells that a spreadsheet leaves
            if len(row) != 6:
                raise ValueError(f"{path}, row {read}: {len(row)} columns, not question, 4 options "
                                 f"and answer: {str(row)[:60]}")
            if row[5] not in LETTERS:
                raise ValueError(f"{path}, row {read}: the answer is {row[5][:30]!r}, not A, B, C "
                                 "or D")
            rows.append(row)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} is not UTF-8 text, line {line} holds the byte "
                         f"{data[error.start]:#x}: save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}, row {read + 1}: {error}") from None
    return rows


def read_questions(root, *, subjects=None, shots=5, limit=None):
    """({subject: test rows}, {subject: the first dev rows, the shots}), subjects in order."""
    if subjects is None:
        subjects = [path.name.removesuffix("_test.csv") for path in root.glob("test/*_test.csv")
                    if not path.name.startswith(".")]  # ._NAME is macOS's, not a subject
        if not subjects:
            raise ValueError(f"{root} has no test/SUBJECT_test.csv: give MMLU's folder as --data")
    questions, examples = {}, {}
    for subject in sorted(set(subjects)):
        questions[subject] = read_rows(root / "test" / f"{subject}_test.csv")[:limit]
        path = root / "dev" / f"{subject}_dev.csv"
        examples[subject] = read_rows(path)[:shots] if shots else []
        if len(examples[subject]) < shots:
            raise ValueError(f"{path} has {len(examples[subject])} rows, --shots asks for {shots}")
    return questions, examples


def format_example(row, answered):
    question, *options, answer = row
    text = "\n".join([question, *map("{}. {}".format, LETTERS, options), "Answer:"])
    return f"{text} {answer}\n\n" if answered else text


def format_prompt(subject, shots, row):
    """The original's prompt. Each word of its subject brings a space, so two follow "about"."""
    about = "".join(f" {word}" for word in subject.split("_"))
    header = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    return header + "".join(format_example(s, True) for s in shots) + format_example(row, False)


class Prompt(NamedTuple):
    ids: list  # BOS and the prompt
    shots: int  # how many solved examples it holds
    truncated: bool  # whether not even the bare question fitted


def encode_prompt(tokenizer, subject, shots, row, max_seq_len):
    """The Prompt of a question. Shots are dropped, last first, until it fits; if the bare question
    does not fit either, its end stays behind BOS."""
    for count in range(len(shots), -1, -1):
        ids = tokenizer.encode(format_prompt(subject, shots[:count], row))
        if len(ids) <= max_seq_len:
            return Prompt(ids, count, False)
    return Prompt(ids[:1] + ids[1 - max_seq_len:], 0, True)


def letter_ids(tokenizer):
    """The token of each letter as it follows "Answer:" in a shot; raises unless all four differ."""
    ids = [tokenizer.encode(f"Answer: {letter}")[-1] for letter in LETTERS]
    if len(set(ids)) < len(ids):
        raise ValueError(f"the tokenizer ends Answer: A, B, C, D in the tokens {ids}, not in four")
    return ids
