"""Questions with four options: those of the primer, and the quiz in MMLU's layout.

The quiz asks for facts of the primer (primer.py) in words that the primer never uses.

    rows = make_quiz(seed=0)["test"]["high_school_geography"]
"""

import itertools
import random

from data.make.facts import FACTS
from data.mmlu import format_example

QUIZ_ROWS = {"dev": 5, "val": 20, "test": 350}


def by_value(known):
    return dict(sorted(known.items(), key=lambda pair: pair[1]))


# {thing: what is known of it}; wrong answers are drawn from the values in their order
CAPITAL = {country: capital for country, (capital, _) in FACTS.countries.items()}
CONTINENT = by_value({country: continent for country, (_, continent) in FACTS.countries.items()})
KIND_OF = by_value({a: kind for kind, animals in FACTS.animals.items() for a in animals})
SYMBOL = {element: symbol for element, (symbol, _) in sorted(FACTS.elements.items())}
NUMBER = {element: str(number) for element, (_, number) in sorted(FACTS.elements.items())}

# subject: its relations, each with a question for what is known of a thing and perhaps one for
# the thing; {a} is what is known with its article
QUESTIONS = {  # of the primer
    "geography": [
        (CAPITAL, "What is the capital of {}?", "Which country has the capital {}?"),
        (CONTINENT, "On which continent is {}?", "Which of these countries is in {}?")],
    "biology": [(KIND_OF, "What kind of animal is the {}?", "Which of these animals is {a}?")],
    "chemistry": [(SYMBOL, "What is the symbol of {}?", "Which element has the symbol {}?"),
                  (NUMBER, "What is the atomic number of {}?")],
    "opposites": [(by_value(FACTS.opposites), "What is the opposite of {}?")]}
QUIZ = {  # names of MMLU's subjects, so that its table of categories holds here too
    "high_school_geography": [(by_value(CAPITAL), "Which city is the capital of {}?",
                               "{} is the capital of which country?")],
    "global_facts": [(CONTINENT, "In which continent is {}?", "Which country is in {}?")],
    "high_school_biology": [(KIND_OF, "What kind is the {}?", "Which animal is of the kind {}?")]}


def article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def draw_question(relations, rng):
    """(question, right answer, three or more wrong ones) on a thing that is drawn."""
    thing = rng.choice(sorted(relations[0][0]))
    forms = []
    for known, ask_known, *ask_thing in relations:
        right = known[thing]
        wrong = list(dict.fromkeys(value for value in known.values() if value != right))
        forms.append((ask_known.format(thing), right, wrong))
        for ask in ask_thing:
            others = sorted(other for other in known if known[other] != right)
            forms.append((ask.format(right, a=article(right)), thing, others))
    return rng.choice(forms) if len(forms) > 1 else forms[0]


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


def make_quiz(seed):
    """{split: {subject: rows}}; no question occurs twice with the same options."""
    quiz = {split: {} for split in QUIZ_ROWS}
    for subject, relations in QUIZ.items():
        rng = random.Random(f"{subject} quiz {seed}")
        found = {}
        while len(found) < sum(QUIZ_ROWS.values()):
            row = make_row(*draw_question(relations, rng), rng)
            found.setdefault(row_key(row), row)
        rows = iter(found.values())
        for split, count in QUIZ_ROWS.items():
            quiz[split][subject] = list(itertools.islice(rows, count))
    return quiz
