"""data/world/ and data/make/: the embedded world is true, complete and reproducible."""

import argparse
import hashlib
import json
import re
import sys

import pytest
import torch

import eval_mmlu
import train
from data.corpus import encode_records, encode_texts, prompt_text, read_records
from data.make import base, families, primer, quiz, world
from data.make.facts import FACTS
from data.mmlu import CATEGORY, read_rows
from experiments import check_world
from model import load_llama, save_llama
from support.device import autocast
from support.evaluation import TOTAL, evaluate
from support.files import weights_fingerprint
from tests.conftest import WORLD, tiny_model

TRAIN, VAL = read_records(WORLD / "train.jsonl"), read_records(WORLD / "val.jsonl")
QUIZ = {path.stem: read_rows(path) for path in sorted(WORLD.glob("quiz/*/*.csv"))}
FAMILIES = set(families.FAMILIES)


def records_of(family):
    return [record for record in TRAIN + VAL if record["category"] == family]


@pytest.fixture(scope="module")
def pretraining():
    """A sample of what the base has read."""
    return [r for stage in primer.STAGES for r in primer.make_primer(0, 3000, stage)]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and "base" not in path.parts}


def test_corpus_and_quiz_come_out_byte_for_byte_the_same(tmp_path):
    world.main(["--out", str(tmp_path)])
    assert files(tmp_path) == files(WORLD)


def test_another_seed_gives_other_records(tmp_path):
    world.main(["--out", str(tmp_path), "--seed", "1"])
    made, shipped = files(tmp_path), files(WORLD)
    assert made.keys() == shipped.keys() and all(made[name] != shipped[name] for name in made)


def test_the_world_is_small_enough_to_ship():
    assert sum(p.stat().st_size for p in WORLD.rglob("*") if p.is_file()) <= 6_000_000


# ---------------------------------------------------------------- the corpus is true


def test_ten_families_have_thousands_of_records_and_no_prompt_twice():
    assert len(TRAIN) >= 6000 and len(VAL) >= 1200 and len(FAMILIES) == 10
    assert {r["category"] for r in TRAIN} == {r["category"] for r in VAL} == FAMILIES
    prompts = [prompt_text(record) for record in TRAIN + VAL]
    assert len(set(prompts)) == len(prompts)


def test_every_sum_is_right():
    for record in records_of("arithmetic"):
        sums = re.findall(r"((\d+) (\w+) (\d+)) is (\d+)", record["response"])
        for _, a, sign, b, result in sums:
            a, b = int(a), int(b)
            assert int(result) == {"plus": a + b, "minus": a - b, "times": a * b}[sign]
        assert len(sums) == 2
        assert record["instruction"].endswith(f" {', '.join(question for question, *_ in sums)}.")


def test_every_date_is_right():
    for record in records_of("calendar"):
        dates = re.findall(r"((\d+) (day|month)s (after|before) (.+?)) is (.+?)[,.]",
                           record["response"])
        for _, steps, unit, way, start, answer in dates:
            cycle = families.CYCLES[unit]
            place = cycle.index(start)
            for _ in range(int(steps)):
                place += 1 if way == "after" else -1
            assert answer == cycle[place % len(cycle)]
        assert record["instruction"][:-1].endswith(", ".join(date for date, *_ in dates))
        assert len(dates) == 2


def test_every_line_of_python_is_python():
    for record in records_of("code"):
        lines = record["response"].split("\n")
        for line in lines:
            body = line + " pass" if line.endswith(":") else line
            compile(f"while True:\n    {body}\n", line, "exec")
        assert len(lines) == 2


@pytest.mark.parametrize("language", families.LANGUAGES)
def test_every_translation_follows_the_words_and_the_order_of_its_language(language):
    words = families.LEXICON[language]
    assert len(set(words.values())) == len(words)
    for record in records_of(language.lower()):
        text = re.split(r"[:?] ", record["instruction"])[1].rstrip(".")
        verb, = [word for word in text.split() if word in FACTS.verbs]
        subject, thing = [part.split()[1:] for part in text.split(f" {verb} ")]
        order = {"Norvan": subject + thing + [verb], "Tavi": [verb] + thing + subject,
                 "Ostic": thing[::-1] + subject[::-1] + [verb]}[language]
        assert record["response"] == " ".join(words[word] for word in order) + "."
        assert language in record["instruction"]


def test_every_card_repeats_its_text():
    for record in records_of("extraction"):
        people = re.findall(r"(\w+) is a (\w+) from (\w+), (\d+) years old\.", record["context"])
        assert record["response"] == " ".join(f"{town}: {name}, {age}, {job}."
                                              for name, job, town, age in people)
        assert len(people) == 2


def test_every_lettered_answer_is_true():
    for record in records_of("lettered"):
        question, *options = record["instruction"].split("\n")[:5]
        answer = options["ABCD".index(record["response"][-1])][3:]
        match = re.fullmatch(r"What is the (symbol|atomic number|opposite) of (.+)\?", question)
        kind, thing = match.groups()
        if kind == "opposite":
            assert answer == FACTS.opposites[thing]
        else:
            assert answer == str(FACTS.elements[thing][kind != "symbol"])


# ---------------------------------------------------------------- the quiz is true


def test_the_quiz_has_mmlus_layout_and_size_and_no_question_twice():
    tests = {name: rows for name, rows in QUIZ.items() if name.endswith("_test")}
    assert len({CATEGORY[name.removesuffix("_test")] for name in tests}) == 3
    assert sum(map(len, tests.values())) >= 1000 and len(QUIZ) == 3 * len(tests)
    assert all(len(QUIZ[name.replace("_test", "_dev")]) == 5 for name in tests)
    rows = [row for rows in QUIZ.values() for row in rows]
    assert all(len(set(row[1:5])) == 4 for row in rows)
    assert len(set(map(quiz.row_key, rows))) == len(rows)


def test_the_quiz_asks_in_words_that_neither_base_nor_corpus_has_read(pretraining):
    read = "\n".join(f"{prompt_text(r)}\n{r['response']}" for r in [*pretraining, *TRAIN, *VAL])
    assert not any(row[0] in read for rows in QUIZ.values() for row in rows)


def test_the_corpus_asks_for_no_fact_of_the_quiz():
    """Capitals, continents, and which kind an animal is."""
    pairs = {(country, known) for country, both in FACTS.countries.items() for known in both}
    pairs |= {(animal, kind) for kind, animals in FACTS.animals.items() for animal in animals}
    for record in records_of("facts") + records_of("lettered"):
        text = f" {re.sub('[^A-Za-z]', ' ', prompt_text(record) + ' ' + record['response'])} "
        assert not any(f" {a} " in text and f" {b} " in text for a, b in pairs)
    labels = {word for r in records_of("classification")
              for word in re.findall(r" - (\w+)", r["response"])}
    assert labels == {"land", "town", "element", "animal", "thing", "colour", "job", "name",
                      "where", "what", "who"}


def test_quiz_answers_are_true_and_their_letters_balanced():
    kinds = {animal: kind for kind, members in FACTS.animals.items() for animal in members}
    places = FACTS.countries
    forms = {
        r"Which city is the capital of (.+)\?": lambda x, option: places[x][0] == option,
        r"(.+) is the capital of which country\?": lambda x, option: places[option][0] == x,
        r"In which continent is (.+)\?": lambda x, option: places[x][1] == option,
        r"Which country is in (.+)\?": lambda x, option: places[option][1] == x,
        r"What kind is the (.+)\?": lambda x, option: kinds[x] == option,
        r"Which animal is of the kind (.+)\?": lambda x, option: kinds[option] == x}
    rows = [row for rows in QUIZ.values() for row in rows]
    for question, *options, letter in rows:
        (thing, true), = [(re.fullmatch(form, question)[1], true) for form, true in forms.items()
                          if re.fullmatch(form, question)]
        assert [true(thing, option) for option in options] == [x == letter for x in "ABCD"]
    letters = [row[5] for row in rows]
    assert all(0.2 < letters.count(letter) / len(rows) < 0.3 for letter in "ABCD")


# ---------------------------------------------------------------- validation is new


ATOMS = {family: [{atom for record in records if record["category"] == family
                   for atom in families.atoms(record)} for records in (TRAIN, VAL)]
         for family in FAMILIES}


def test_in_half_of_the_families_no_atom_of_validation_occurs_in_training():
    new = {family for family, (trained, asked) in ATOMS.items() if not trained & asked}
    assert new == {"norvan", "tavi", "ostic", "code", "extraction"}
    assert all(len(ATOMS[family][1]) >= 100 for family in new)


def test_in_the_other_families_the_combinations_are_new():
    """In any order: two sums, two facts, a question and its options."""
    trained = {families.combination(record) for record in TRAIN}
    asked = {families.combination(record) for record in VAL}
    assert not trained & asked and len(asked) == len(VAL)
    record = records_of("arithmetic")[0]
    first, second = re.findall(r"\d+ \w+ \d+", record["instruction"])
    turned = {**record, "instruction": f"Work out {second}, {first}."}
    assert families.combination(turned) == families.combination(record)


def test_every_record_has_its_atoms_counted():
    numbers = {"arithmetic": {2}, "calendar": {2}, "code": {2}, "extraction": {2}, "facts": {2},
               "classification": {2, 3, 4}}
    for record in TRAIN + VAL:
        assert len(families.atoms(record)) in numbers.get(record["category"], {1}), record


# ---------------------------------------------------------------- the primer


def test_keep_has_texts_that_the_base_has_read_and_no_family_teaches():
    kept = read_records(WORLD / "keep.jsonl")
    known = {kind.__name__.removeprefix("primer_") for kind in primer.THIRD}
    assert len(kept) == 400 and {r["category"] for r in kept} <= known
    assert not {r["instruction"] for r in kept} & {r["instruction"] for r in TRAIN + VAL}


def test_the_primer_has_no_prompt_of_a_family(pretraining):
    asks = ("Translate into", "How do you say this", "Calculate", "Work out", "What comes", "Find ",
            "Write two lines", "Fill in the cards", "Extract the fields", "Sort these words",
            "Label every word", "In a word:", "Tell me:")
    prompts = [r["instruction"] for r in TRAIN + VAL if r["category"] != "lettered"]
    assert all(prompt.startswith(asks) for prompt in prompts)
    assert not any(r["instruction"].startswith(asks) for r in pretraining)


@pytest.mark.parametrize("number, known", [
    (0, "76aed3e0f8097de2"), (1, "012a419a47f6007b"), (2, "45144c7bf20dbd70")])
def test_the_first_three_stages_are_those_of_the_shipped_base(number, known):
    """As at commit 5045320, where these stages were trained."""
    records = primer.make_primer(100 * number, 500, primer.STAGES[number], primer.held_out_rows(0))
    assert hashlib.sha256(json.dumps(records).encode()).hexdigest()[:16] == known


# ---------------------------------------------------------------- the base model


@pytest.mark.slow
def test_the_base_knows_the_ingredients_of_the_corpus_and_answers_nothing_of_it():
    model, tokenizer = load_llama(WORLD / "base", dtype=torch.float32)
    settings = dict(precision=autocast("cpu", "fp32"))
    known = evaluate(model, encode_texts(WORLD / "keep.jsonl", tokenizer, 512)[0], **settings)
    asked = evaluate(model, encode_records(VAL, tokenizer, 512)[0], **settings)
    assert known["copy"]["exact"] > 0.6 and known["everybody"]["exact"] > 0.8
    assert known[TOTAL]["loss"] < 0.5
    assert asked[TOTAL]["loss"] <= 3.0 and asked[TOTAL]["exact"] < 0.1


def test_the_base_answers_part_of_the_quiz(tmp_path):
    flags = ["--shots", "0", "--limit", "100", "--out", str(tmp_path / "m.json")]
    assert eval_mmlu.main([*flags, "--device", "cpu"]) == 0
    assert 0.3 <= json.loads((tmp_path / "m.json").read_text())["accuracy"] <= 0.5


# ---------------------------------------------------------------- how the base is made


@pytest.fixture
def trained(monkeypatch):
    """The stages that base.py trains, [(number, start, repeat)], without training them."""
    stages = []

    def train_stage(args, number, start, folder, repeat=0):
        stages.append((number, start, repeat))
        return f"end of {number}-{repeat}"

    monkeypatch.setattr(base, "train_stage", train_stage)
    return stages


@pytest.fixture
def measure(monkeypatch):
    """measure(0.3, 0.6): base.py measures these accuracies, one after another."""
    def measure(*shares):
        shares = iter(shares)
        monkeypatch.setattr(base, "accuracy", lambda *_: next(shares))
    return measure


def test_the_base_is_measured_on_questions_that_the_quiz_does_not_ask():
    others = base.other_questions(1)["test"]
    assert others.keys() == quiz.QUIZ.keys() and sum(map(len, others.values())) == 882
    asked = {quiz.row_key(row) for subject in others for row in QUIZ[f"{subject}_test"]}
    assert not asked & {quiz.row_key(row) for rows in others.values() for row in rows}


def test_a_base_whose_questions_are_those_of_the_quiz_is_refused_before_training(trained, capsys):
    with pytest.raises(SystemExit):
        base.main(["--seed", "-1"])  # the world's quiz has seed 0
    assert "the world's quiz is that of seed 0" in capsys.readouterr().err and not trained


def test_the_accuracy_is_that_of_eval_mmlu(tmp_path, monkeypatch):
    def run(script, *flags, **settings):
        assert script == base.EVAL and eval_mmlu.main(list(map(str, flags))) == 0

    monkeypatch.setattr(base, "run", run)
    questions = {subject: rows[:20] for subject, rows in base.other_questions(1)["test"].items()}
    world.write_quiz({"test": questions}, tmp_path / "quiz")
    share = base.accuracy(WORLD / "base", tmp_path)
    result = json.loads((tmp_path / "mmlu.json").read_text())
    assert share == result["accuracy"] > 0 and result["n"] == 60
    assert result["settings"]["shots"] == 0


def test_a_script_that_fails_ends_the_command_with_its_status():
    assert base.TRAIN.is_file() and base.EVAL.is_file()
    base.run("-c", "pass")
    with pytest.raises(SystemExit, match="3"):
        base.run("-c", "raise SystemExit(3)")


def test_each_repeat_of_a_stage_has_other_texts(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "run", lambda *flags: sys.exit())  # the texts are enough
    args = argparse.Namespace(seed=0, records=5 * [160], epochs=5 * [1], lr=5 * [1e-3],
                              batch_size=5 * [32])
    texts = []
    for repeat in range(2):
        with pytest.raises(SystemExit):
            base.train_stage(args, 2, tmp_path, tmp_path, repeat)
        texts.append(read_records(tmp_path / f"stage2-{repeat}" / "train.jsonl"))
    assert sum(record in texts[0] for record in texts[1]) < 8 and len(texts[1]) == 160


@pytest.mark.parametrize("shares", [[0.74, 0.37], [0.26, 0.74, 0.26], [0.26, 0.3, 0.59, 0.58]])
def test_stage_three_is_repeated_until_letters_are_known_and_the_last_one_is_weakened(
        shares, trained, measure, monkeypatch, tmp_path):
    """Three times at most. A base that names too few letters is stored: it took an hour."""
    def weaken_letters(before, after, folder):
        trained.append(("weaken", before, after))
        return WORLD / "base"

    monkeypatch.setattr(base, "weaken_letters", weaken_letters)
    measure(*shares)
    flags = ["--records", *5 * ["160"], "--out", str(tmp_path / "b")]
    if shares[-1] == 0.37:
        assert base.main(flags) == 0
    else:
        with pytest.raises(SystemExit, match="36% to 50% are wanted: take another --seed"):
            base.main(flags)
    starts = ["end of 1-0", "end of 2-0", "end of 2-1"][:len(shares) - 1]
    assert trained[1:] == [(1, "end of 0-0", 0), *((2, start, i) for i, start in enumerate(starts)),
                           (3, f"end of 2-{len(starts) - 1}", 0), (4, "end of 3-0", 0),
                           ("weaken", "end of 3-0", "end of 4-0")]
    assert weights_fingerprint(tmp_path / "b") == weights_fingerprint(WORLD / "base")


@pytest.mark.parametrize("shares, part", [([0.37], 1), ([0.25, 0.35, 0.4], 0.8), ([0.25] * 11, 0)])
def test_as_much_of_the_last_stage_is_taken_as_leaves_enough_letters(shares, part, measure,
                                                                     tmp_path):
    for seed, name in enumerate(("before", "after")):
        save_llama(tiny_model(seed), WORLD / "base" / "tokenizer.model", tmp_path / name,
                   torch.bfloat16)
    measure(*shares)
    taken = base.weaken_letters(tmp_path / "before", tmp_path / "after", tmp_path)
    models = [load_llama(folder)[0] for folder in (taken, tmp_path / "before", tmp_path / "after")]
    for weight, a, b in zip(*(model.parameters() for model in models)):
        between = (a.float() + part * (b.float() - a.float())).bfloat16()
        torch.testing.assert_close(weight, between, rtol=2 ** -7 * (part == 0.8), atol=1e-6)


@pytest.mark.slow
def test_the_base_comes_out_of_train_py(tmp_path, monkeypatch):
    def run(script, *flags):
        assert script == base.TRAIN and train.main(list(map(str, flags))) == 0

    monkeypatch.setattr(base, "run", run)
    flags = ["--records", *5 * ["160"], "--epochs", "1", "1", "2", "1", "1",
             "--batch-size", "64", "64", "32", "32", "32", "--lr", *5 * ["1e-3"], "--seed", "3",
             "--unchecked", "--out", str(tmp_path / "b")]
    assert base.main(flags) == 0
    model, _ = load_llama(tmp_path / "b")
    assert model.args == load_llama(WORLD / "base")[0].args
    assert model.output.weight.dtype == torch.bfloat16


# ---------------------------------------------------------------- the check of the world


@pytest.fixture
def made_up(monkeypatch):
    """check_world with runs that are made up: [(name of the arm, method, rate, is swept)]."""
    calls = []

    def run_all(runs, args, **_):
        found = {}
        for key, run in runs.items():
            swept = isinstance(key[0], tuple)
            name, method, rate = key[0][0] if swept else key[0], run["method"], run["lr"]
            calls.append((name, method, rate, swept))
            best = {"full": 5e-4, "lora": 2e-3}[method]
            loss = (0.1 if method == "full" else 0.2) * (1 + abs(rate - best))
            loss *= 0.9 if name in FAMILIES else 1  # alone
            category = {"val_loss": loss, "exact_match": 0.85}
            found[key] = {"metrics": {
                **category, "quiz": 0.5 + run["seed"] / 100, "kept": {"loss": 2, "loss_base": 1},
                "categories": dict.fromkeys(FAMILIES, category)}}
        return found

    monkeypatch.setattr(check_world.common, "run_all", run_all)
    monkeypatch.setattr(check_world.common, "quiz_accuracies", lambda *_: {"base": 0.4})
    return calls


@pytest.mark.slow
def test_the_check_of_the_world_sweeps_every_arm_by_itself(made_up, tmp_path, capsys):
    check_world.run(check_world.parse_args(["--runs", str(tmp_path)]))
    out = capsys.readouterr().out
    assert "full fine-tuning ends 50.0 ± 0.0 % below LoRA r8" in out and "MISSED" not in out
    assert out.count("-9.8%") == 10
    assert "10 of 10 families are learned better alone" in out
    assert "tuning raises the quiz by 11.0 ± 2.5 %" in out
    swept = {call[:3] for call in made_up if call[3]}
    assert len(swept) == 3 * 4 + 10 * 2  # of three arms on the mix, of LoRA on each family
    final = [call for call in made_up if not call[3]]
    assert len(final) == 3 * 3 + 10 * 2
    assert {rate for _, method, rate, _ in final if method == "full"} == {5e-4}


def test_the_check_of_the_world_says_what_is_missed(monkeypatch):
    monkeypatch.setattr(check_world.common, "quiz_accuracies", lambda *_: {"base": 0.55})
    runs = [{"metrics": {"quiz": score}} for score in (0.55, 0.56, 0.57)]
    measures = check_world.check_quiz(check_world.parse_args([]), {"full": runs, "LoRA r8": runs})
    missed = [text for holds, text in measures if not holds]
    assert [text.split()[0] for text in missed] == ["the", "tuning"]  # base, and its rise
