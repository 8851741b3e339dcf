"""Questions with four options: those of the primer, and the quiz in MMLU's layout.

The quiz asks for facts of the primer (primer.py) in words that the primer never uses.

    rows = make_quiz(seed=0)["test"]["high_school_geography"]
"""

import random

from data.make.facts import FACTS
from data.mmlu import format_example

QUIZ_ROWS = {"dev": 5, "val": 20, "test": 350}
KIND_OF = {animal: kind for kind, members in FACTS.animals.items() for animal in members}


def article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def make_row(question, answer, wrong, rng):
    """[question, A, B, C, D, letter], the right answer at a place drawn at random."""
    options = rng.sample(wrong, 3)
    place = rng.randrange(4)
    options.insert(place, answer)
    return [question, *options, "ABCD"[place]]


def question_text(row):
    """The question and its options as MMLU prints them."""
    return format_example(row, answered=False).removesuffix("\nAnswer:")


def right_option(row):
    return row[1 + "ABCD".index(row[5])]


def row_key(row):
    """Rows with the same key ask the same, whatever the order of their options."""
    return (row[0], frozenset(row[1:5]))


# ---------------------------------------------------------------- questions of the primer
# each takes a random.Random and returns (question, right answer, three or more wrong ones)


def geography_question(rng):
    country = rng.choice(sorted(FACTS.countries))
    capital, continent = FACTS.countries[country]
    capitals = [c for c, _ in FACTS.countries.values() if c != capital]
    continents = sorted({c for _, c in FACTS.countries.values()} - {continent})
    return rng.choice([
        (f"What is the capital of {country}?", capital, capitals),
        (f"Which country has the capital {capital}?", country,
         sorted({*FACTS.countries} - {country})),
        (f"On which continent is {country}?", continent, continents),
        (f"Which of these countries is in {continent}?", country,
         sorted(c for c in FACTS.countries if FACTS.countries[c][1] != continent)),
    ])


def biology_question(rng):
    animal = rng.choice(sorted(KIND_OF))
    kind = KIND_OF[animal]
    return rng.choice([
        (f"What kind of animal is the {animal}?", kind, sorted({*FACTS.animals} - {kind})),
        (f"Which of these animals is {article(kind)}?", animal,
         sorted(a for a in KIND_OF if KIND_OF[a] != kind)),
    ])


def chemistry_question(rng):
    element = rng.choice(sorted(FACTS.elements))
    symbol, number = FACTS.elements[element]
    others = sorted({*FACTS.elements} - {element})
    return rng.choice([
        (f"What is the symbol of {element}?", symbol, [FACTS.elements[e][0] for e in others]),
        (f"Which element has the symbol {symbol}?", element, others),
        (f"What is the atomic number of {element}?", str(number),
         [str(FACTS.elements[e][1]) for e in others]),
    ])


def opposite_question(rng):
    word = rng.choice(sorted(FACTS.opposites))
    return (f"What is the opposite of {word}?", FACTS.opposites[word],
            sorted({*FACTS.opposites.values()} - {FACTS.opposites[word]}))


QUESTIONS = {"geography": geography_question, "biology": biology_question,
             "chemistry": chemistry_question, "opposites": opposite_question}


# ---------------------------------------------------------------- the quiz
# each takes a random.Random and returns (question, right answer, three or more wrong ones)


def capital_question(rng):
    country = rng.choice(sorted(FACTS.countries))
    capital = FACTS.countries[country][0]
    return rng.choice([
        (f"Which city is the capital of {country}?", capital,
         sorted({c for c, _ in FACTS.countries.values()} - {capital})),
        (f"{capital} is the capital of which country?", country,
         sorted({*FACTS.countries} - {country}))])


def continent_question(rng):
    country = rng.choice(sorted(FACTS.countries))
    continent = FACTS.countries[country][1]
    return rng.choice([
        (f"In which continent is {country}?", continent,
         sorted({c for _, c in FACTS.countries.values()} - {continent})),
        (f"Which country is in {continent}?", country,
         sorted(c for c in FACTS.countries if FACTS.countries[c][1] != continent))])


def animal_question(rng):
    animal = rng.choice(sorted(KIND_OF))
    kind = KIND_OF[animal]
    return rng.choice([
        (f"What kind is the {animal}?", kind, sorted({*FACTS.animals} - {kind})),
        (f"Which animal is of the kind {kind}?", animal,
         sorted(a for a in KIND_OF if KIND_OF[a] != kind))])


# names of MMLU's subjects, so that its table of categories holds here too
QUIZ = {"high_school_geography": capital_question, "global_facts": continent_question,
        "high_school_biology": animal_question}


def make_quiz(seed):
    """{split: {subject: rows}}; no question occurs twice with the same options."""
    quiz = {split: {} for split in QUIZ_ROWS}
    for subject, ask in QUIZ.items():
        rng = random.Random(f"{subject} quiz {seed}")
        rows = []
        seen = set()
        while len(rows) < sum(QUIZ_ROWS.values()):
            row = make_row(*ask(rng), rng)
            if row_key(row) not in seen:
                seen.add(row_key(row))
                rows.append(row)
        for split, count in QUIZ_ROWS.items():
            quiz[split][subject], rows = rows[:count], rows[count:]
    return quiz
