"""data/: the embedded world is true, complete, and comes out the same again."""

import csv
import json
import re

import pytest
import torch

import eval_mmlu
import train
from data import make_base, make_world
from data.corpus import encode_records, prompt_text, read_records
from data.facts import COUNTRIES, ELEMENTS, VERBS
from experiments import check_world
from model import load_llama
from support import evaluation
from tests.conftest import WORLD

TRAIN, VAL = read_records(WORLD / "train.jsonl"), read_records(WORLD / "val.jsonl")
QUIZ = {path.stem: list(csv.reader(open(path, encoding="utf-8", newline="")))
        for path in sorted(WORLD.glob("quiz/*/*.csv"))}
STAGES = make_world.FIRST, make_world.SECOND, make_world.THIRD


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and "base" not in path.parts}


def test_corpus_and_quiz_come_out_byte_for_byte_the_same(tmp_path):
    make_world.main(["--out", str(tmp_path)])
    assert files(tmp_path) == files(WORLD)


def test_another_seed_gives_other_records(tmp_path):
    make_world.main(["--out", str(tmp_path), "--seed", "1"])
    assert files(tmp_path).keys() == files(WORLD).keys()
    assert all(a != b for a, b in zip(files(tmp_path).values(), files(WORLD).values()))


def test_eight_families_in_thousands_of_records_none_in_both_parts():
    assert len(TRAIN) >= 6000 and len(VAL) >= 1200
    families = {record["category"] for record in TRAIN}
    assert families == {record["category"] for record in VAL} and len(families) == 8
    prompts = [prompt_text(record) for record in TRAIN + VAL]
    assert len(set(prompts)) == len(prompts)


def test_every_sum_of_the_corpus_is_right():
    records = [r for r in TRAIN + VAL if r["category"] == "arithmetic"]
    for record in records:
        sums = re.findall(r"((\d+) (\w+) (\d+)) is (\d+)", record["response"])
        for _, a, sign, b, result in sums:
            a, b = int(a), int(b)
            assert int(result) == {"plus": a + b, "minus": a - b, "times": a * b}[sign]
        assert len(sums) == 3
        assert record["instruction"].endswith(f" {', '.join(question for question, *_ in sums)}.")
    assert len(records) == 950


def test_every_line_of_python_is_python():
    lines = [r["response"] for r in TRAIN + VAL if r["category"] == "code"]
    for line in [line for pair in lines for line in pair.split("\n")]:
        body = line + " pass" if line.endswith(":") else line
        compile(f"while True:\n    {body}\n", line, "exec")
    assert all(pair.count("\n") == 1 for pair in lines)


def test_calendar_answers_agree_with_counting_one_by_one():
    for record in TRAIN[:2000] + VAL:
        if record["category"] == "calendar":
            dates = re.findall(r"((\d+) (day|month|hour)s (after|before) (.+?)) is (.+?)[,.]",
                               record["response"])
            for _, steps, unit, way, start, answer in dates:
                cycle = make_world.CYCLES[unit]
                place = cycle.index(start)
                for _ in range(int(steps)):
                    place += 1 if way == "after" else -1
                assert answer == cycle[place % len(cycle)]
            assert record["instruction"][:-1].endswith(", ".join(date for date, *_ in dates))
            assert len(dates) == 2


def test_three_families_translate_the_same_sentences_into_three_languages():
    words = make_world.LEXICON
    assert all(len(set(lexicon.values())) == len(lexicon) for lexicon in words.values())
    seen = set()
    for record in VAL:
        language = record["category"].capitalize()
        if language in words:
            text = re.split(r"[:?] ", record["instruction"])[1].rstrip(".")
            verb, = [word for word in text.split() if word in VERBS]
            subject, thing = [part.split()[1:] for part in text.split(f" {verb} ")]
            order = {"Norvan": subject + thing + [verb], "Tavi": [verb] + thing + subject,
                     "Ostic": thing[::-1] + subject[::-1] + [verb]}[language]
            assert record["response"] == " ".join(words[language][word] for word in order) + "."
            assert language in record["instruction"]
            seen.add(language)
    assert len(seen) == 3


def test_every_card_holds_what_its_text_says():
    for record in VAL:
        if record["category"] == "extraction":
            people = re.findall(r"(\w+) is a (\w+) from (\w+), (\d+) years old\.",
                                record["context"])
            assert record["response"] == " ".join(f"{town}: {name}, {age}, {job}."
                                                  for name, job, town, age in people)
            assert len(people) == 2


def test_the_quiz_has_mmlus_layout_and_size():
    tests = {name: rows for name, rows in QUIZ.items() if name.endswith("_test")}
    assert len(tests) >= 6 and all(len(rows) >= 100 for rows in tests.values())
    assert len(QUIZ) == 3 * len(tests)
    assert all(len(QUIZ[name.replace("_test", "_dev")]) == 5 for name in tests)
    for rows in QUIZ.values():
        for row in rows:
            assert len(row) == 6 and row[5] in "ABCD" and len(set(row[1:5])) == 4


def test_no_quiz_question_stands_in_two_splits_or_in_the_primer():
    keys = [make_world.quiz_key(row) for rows in QUIZ.values() for row in rows]
    assert len(set(keys)) == len(keys)
    quiz = make_world.make_quiz(0)
    primer = "\n".join(r["response"] + r["instruction"] for stage in STAGES
                       for r in make_world.make_primer(0, 2000, quiz, stage))
    for split in quiz.values():
        for rows in split.values():
            for row in rows:
                assert make_world.quiz_text([row]).rsplit(" ", 1)[0] not in primer


def test_quiz_answers_are_true_and_their_letters_balanced():
    letters = []
    for rows in QUIZ.values():
        for question, *options, letter in rows:
            answer = options["ABCD".index(letter)]
            letters.append(letter)
            if match := re.fullmatch(r"What is the capital of (.+)\?", question):
                assert COUNTRIES[match[1]][0] == answer
            if match := re.fullmatch(r"What is the atomic number of (.+)\?", question):
                assert str(ELEMENTS[match[1]][1]) == answer
            if match := re.fullmatch(r"Which of these countries is in (.+)\?", question):
                assert [COUNTRIES[o][1] == match[1] for o in options].count(True) == 1
                assert COUNTRIES[answer][1] == match[1]
            if match := re.fullmatch(r"What is (\d+) (plus|minus|times) (\d+)\?", question):
                a, b = int(match[1]), int(match[3])
                assert int(answer) == {"plus": a + b, "minus": a - b, "times": a * b}[match[2]]
    assert all(0.2 < letters.count(letter) / len(letters) < 0.3 for letter in "ABCD")


def test_no_family_stands_in_the_primer():
    quiz = make_world.make_quiz(0)
    primer = [r for stage in STAGES for r in make_world.make_primer(0, 3000, quiz, stage)]
    marks = {"Norvan", "Tavi", "Ostic", "Python", "cards", "groups", "Label"}

    def marked(record):
        return marks & set(re.findall(r"\w+", record["instruction"]))

    assert all(marked(r) or r["category"] in ("arithmetic", "calendar") for r in TRAIN)
    for record in primer:
        assert not marked(record) and not re.search("plus|minus|times", record["instruction"])
        assert not re.search(r"(days|months|hours) (after|before)", record["instruction"])


# ---------------------------------------------------------------- the base model


def test_the_base_is_small_enough_to_ship():
    assert sum(p.stat().st_size for p in (WORLD / "base").iterdir()) <= 6_000_000


@pytest.mark.slow
def test_the_base_reads_formats_but_knows_no_family():
    model, tokenizer = load_llama(WORLD / "base", dtype=torch.float32)
    args = train.parse_args(["--device", "cpu"])
    quiz = make_world.make_quiz(0)
    primer = make_world.make_primer(99, 2000, quiz, make_world.THIRD)  # never trained on
    known = evaluation.evaluate(model, encode_records(primer, tokenizer, 512)[0], args, "")
    families = evaluation.evaluate(model, encode_records(VAL[:400], tokenizer, 512)[0], args, "")
    assert known["copy"]["exact"] > 0.8  # follows an instruction, copies from a context
    assert known["everybody"]["exact"] > 0.8  # finds what is asked for in a context
    assert known["lookup"]["exact"] > 0.8 and known["said"]["exact"] > 0.8
    assert known["last"]["exact"] > 0.8  # answers a question with its letter
    assert families[""]["exact"] < 0.02


def test_the_base_answers_the_quiz_on_what_it_has_read_and_guesses_the_rest(tmp_path):
    assert eval_mmlu.main(["--shots", "1", "--limit", "40", "--out", str(tmp_path / "m.json"),
                           "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "m.json").read_text())["subjects"]
    read = ["high_school_geography", "high_school_biology", "high_school_chemistry"]
    assert all(result[subject]["accuracy"] > 0.5 for subject in read)
    assert all(result[subject]["accuracy"] < 0.5 for subject in set(result) - set(read))


@pytest.mark.slow
def test_the_base_comes_out_of_train_py(tmp_path):
    flags = ["--records", "160", "160", "160", "--epochs", "1", "1", "2",
             "--batch-size", "64", "64", "32", "--lr", "1e-3", "1e-3", "1e-3", "--seed", "3",
             "--out", str(tmp_path / "b")]
    assert make_base.main(flags) == 0
    model, tokenizer = load_llama(tmp_path / "b")
    assert model.args == load_llama(WORLD / "base")[0].args
    assert model.output.weight.dtype == torch.bfloat16


@pytest.mark.slow
def test_the_check_of_the_world_sweeps_every_arm_apart_and_reads_validation_once(monkeypatch,
                                                                              tmp_path, capsys):
    calls = []

    def tune(method, data, rate, seed, epochs, val=None):
        calls.append((method, data.stem, rate, seed, epochs, val is not None))
        loss = (0.1 if method == "full" else 0.2) * (1 + abs(rate - 4e-3))
        loss *= 1 if "train" == data.stem else 0.9  # alone
        return {"val_loss": loss, "exact_match": 0.5,
                "categories": {family.__name__: {"val_loss": loss} for family in
                               make_world.FAMILIES}}

    monkeypatch.setattr(check_world, "tune", tune)
    monkeypatch.setattr(check_world, "RUNS", tmp_path)
    assert check_world.main(["--seeds", "2", "--epochs", "4"]) == 0
    out = capsys.readouterr().out
    assert "full fine-tuning ends 50.0% below LoRA" in out
    assert out.count("-10.0%") == len(make_world.FAMILIES) == 8
    swept = {call[:3] for call in calls if not call[5]}
    assert len(swept) == (1 + 1 + 8) * 4  # the rates of full fine-tuning, and of nine LoRAs
    final = [call for call in calls if call[5]]
    assert len(final) == 10 * 2 and {call[2] for call in final} == {4e-3}


@pytest.mark.slow
def test_the_check_of_the_world_keeps_its_runs_by_the_content_of_the_data(monkeypatch, tmp_path):
    calls, run = [], train.run_training
    monkeypatch.setattr(check_world, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(train, "run_training",
                        lambda args: calls.append(args.data) or run(args))
    data = tmp_path / "few.jsonl"
    for records in (TRAIN[:80], TRAIN[:80], TRAIN[1:81]):
        make_world.write_records(records, data)
        metrics = check_world.tune("lora", data, 4e-3, 0, 2)
    assert len(calls) == 2 and 0 < metrics["val_loss"] < metrics["val_loss_base"]
