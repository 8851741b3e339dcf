"""The families: the ten tasks of the embedded world's corpus, one category each.

HydraLoRA is for corpora whose tasks interfere (section 2.2), so the families clash on
purpose (docs/world.md). The content of a record is its atoms: a word, an operand pair, a
fact, a line of code. In five families a quarter of the atoms never occurs in training
(is_new), and validation asks about these alone; in the others only combinations are new.

    instruction, context, response = facts(random.Random(0), new=False)
"""

import functools
import hashlib
import random
import re

from data.make.facts import FACTS
from data.make.quiz import KIND_OF, NUMBER, SYMBOL, make_row, question_text

SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
HOURS = [f"{hour} o'clock" for hour in range(1, 13)]
CYCLES = {"day": FACTS.days, "month": FACTS.months, "hour": HOURS}
VERB_LIST = sorted(FACTS.verbs)


def is_new(atom):
    """Whether an atom (a text) is for validation alone: every fourth, by its hash."""
    return hashlib.sha256(atom.encode()).digest()[0] < 64


def draw(make, rng, new):
    """What make(rng) returns, called until the first part is an atom of this kind."""
    while True:
        made = make(rng)
        if is_new(made[0]) == new:
            return made


# ---------------------------------------------------------------- numbers


def sum_of(rng):
    """(an addition, subtraction or product in words, its result)."""
    sign = rng.choice(["plus", "minus", "times"])
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    if sign == "minus":
        return f"{a + b} minus {b}", str(a)
    a, b = sorted([a, b])
    return f"{a} {sign} {b}", str(a + b if sign == "plus" else a * b)


def date_of(rng):
    """(a day or month counted from another, what it is)."""
    unit, cycle = rng.choice([("day", FACTS.days), ("month", FACTS.months)])
    start = rng.choice(cycle)
    steps = rng.randint(2, 3)
    way = rng.choice(["after", "before"])
    index = cycle.index(start) + (steps if way == "after" else -steps)
    return f"{steps} {unit}s {way} {start}", cycle[index % len(cycle)]


def in_a_row(ask, pairs):
    """A record of several questions with their answers: few steps then teach much."""
    return (ask.format(", ".join(question for question, _ in pairs)), "",
            ", ".join(f"{question} is {answer}" for question, answer in pairs) + ".")


def arithmetic(rng, _):
    ask = rng.choice(["Calculate {}.", "Work out {}."])
    return in_a_row(ask, [sum_of(rng) for _ in range(2)])


def calendar(rng, _):
    ask = rng.choice(["What comes {}?", "Find {}."])
    return in_a_row(ask, [date_of(rng) for _ in range(2)])


# ---------------------------------------------------------------- languages


def sentence(rng, people=FACTS.people, verbs=VERB_LIST, things=FACTS.things, sizes=FACTS.sizes):
    """(subject, verb, object) with an optional size or colour before each noun."""
    def phrase(nouns):
        size = rng.choice(sizes) + " " if rng.random() < 0.5 else ""
        return f"the {size}{rng.choice(nouns)}"
    return phrase(people), rng.choice(verbs), phrase(things)


# the words that have translations: people, verbs, things, sizes
TRANSLATED = FACTS.people[:8], VERB_LIST[::3], FACTS.things[:8], FACTS.sizes[:4]


def lexicon(language):
    """A word of two syllables for each of the English words."""
    rng = random.Random(f"{language.lower()} 0")
    words = {}
    for word in sum(TRANSLATED, []):
        new = "".join(rng.choices(SYLLABLES, k=2))
        while new in words.values():
            new = "".join(rng.choices(SYLLABLES, k=2))
        words[word] = new
    return words


# the order of subject, verb and object; whether an adjective follows its noun. No articles.
LANGUAGES = {"Norvan": ("SOV", False), "Tavi": ("VOS", False), "Ostic": ("OSV", True)}
LEXICON = {language: lexicon(language) for language in LANGUAGES}


def translate(language, subject, verb, thing):
    order, adjective_last = LANGUAGES[language]
    parts = {"V": [verb]}
    for letter, phrase in (("S", subject), ("O", thing)):
        words = phrase.split()[1:]
        parts[letter] = words[::-1] if adjective_last else words
    words = [word for letter in order for word in parts[letter]]
    return " ".join(LEXICON[language][word] for word in words)


def translation(language, rng, new):
    """A sentence and its translation. In validation sentences are new, words are not."""
    def made(rng):
        parts = sentence(rng, *TRANSLATED)
        return " ".join(parts), parts
    subject, verb, thing = draw(made, rng, new)[1]
    ask = rng.choice(["Translate into {}: {}", "How do you say this in {}? {}"])
    return (ask.format(language, f"{subject} {verb} {thing}."), "",
            translate(language, subject, verb, thing) + ".")


# ---------------------------------------------------------------- code, cards, words


def code_line(rng):
    """(the line of Python, what it does)."""
    name, other = rng.sample("abcdnxyz", 2)
    number, more, word = rng.randint(1, 30), rng.randint(2, 9), rng.choice(FACTS.things)
    return rng.choice([
        (f"{name} = {other} + {number}", f"sets {name} to {other} plus {number}"),
        (f"{name}.append({number})", f"adds {number} to the list {name}"),
        (f'print("{word} " * {more})', f"prints the word {word} {more} times"),
        (f"for {name} in range({number}):", f"counts {name} from 0 to below {number}"),
        (f"if {name} > {number}: break",
         f"stops the loop when {name} is above {number}"),
        (f'{name} = open("{word}.txt")', f"opens the file {word}.txt as {name}"),
        (f"{other} = len({name})", f"gives the length of the list {name} to {other}"),
        (f"def {word}({name}): return {name} * {number}",
         f"defines a function {word} that returns {name} times {number}"),
    ])


def code(rng, new):
    line, first = draw(code_line, rng, new)
    other, second = draw(code_line, rng, new)
    return (f"Write two lines of Python: the first {first}, the second {second}.", "",
            f"{line}\n{other}")


def person_text(name, job, town, age):
    return f"{name} is a {job} from {town}, {age} years old."


def extraction(rng, new):
    """People are new in validation, their names and jobs are not."""
    def person(rng):
        name, job, age = rng.choice(FACTS.names), rng.choice(FACTS.jobs), rng.randint(18, 80)
        town = rng.choice(sorted(FACTS.countries.values()))[0]
        return person_text(name, job, town, age), f"{town}: {name}, {age}, {job}."
    facts, cards = zip(*(draw(person, rng, new) for _ in range(2)))
    ask = rng.choice(["Fill in the cards.", "Extract the fields of the cards."])
    return ask, " ".join(facts), " ".join(cards)


# group: (the label that one cue asks for, its words)
GROUPS = {"land": ("where", sorted(FACTS.countries)),
          "town": ("where", sorted(c for c, _ in FACTS.countries.values())),
          "element": ("what", sorted(FACTS.elements)), "animal": ("what", sorted(KIND_OF)),
          "thing": ("what", FACTS.things), "colour": ("what", FACTS.colours),
          "job": ("who", FACTS.jobs), "name": ("who", FACTS.names)}


def classification(rng, _):
    """The same words with fine labels or coarse ones, as the cue says."""
    groups = rng.choices(sorted(GROUPS), k=rng.randint(2, 4))
    pairs = [(rng.choice(GROUPS[group][1]), group) for group in groups]
    listed = ", ".join(word for word, _ in pairs)
    if rng.random() < 0.5:
        return (f"Sort these words into groups: {listed}", "",
                "; ".join(f"{word} - {group}" for word, group in pairs))
    return (f"Label every word: {listed}", "",
            "; ".join(f"{word} - {GROUPS[group][0]}" for word, group in pairs))


# ---------------------------------------------------------------- facts

# kind: ({thing: what is known of it}, the question, the answer in a sentence)
OPEN = {
    "young": (FACTS.young, "the young of the {0}", "The young of the {0} is the {1}."),
    "made": (FACTS.made_of, "the stuff of {0}", "The stuff of {0} is {1}."),
    "past": ({verb: past for verb, (past, _) in FACTS.verbs.items()},
             "the past of {0}", "The past of {0} is {1}."),
    "money": (FACTS.money, "the money of {0}", "The money of {0} is the {1}."),
    "maker": (FACTS.makers, "the maker of {0}", "The maker of {0} is {1}."),
}
LETTERED = {"symbol": (SYMBOL, "What is the symbol of {}?"),
            "number": (NUMBER, "What is the atomic number of {}?"),
            "opposite": (FACTS.opposites, "What is the opposite of {}?")}


def draw_fact(kinds, rng):
    """(thing, what is known of it, ...): the values of a kind after one of its things."""
    kind = rng.choice(sorted(kinds))
    return rng.choice(sorted(kinds[kind][0])), *kinds[kind]


def facts(rng, _):
    """Two facts, in a word or in a sentence, as the cue says."""
    drawn = [draw_fact(OPEN, rng) for _ in range(2)]
    question = " and ".join(name.format(thing) for thing, _, name, _ in drawn)
    if rng.random() < 0.5:
        words = ", ".join(known[thing] for thing, known, _, _ in drawn)
        return f"In a word: {question}?", "", words
    sentences = " ".join(text.format(thing, known[thing]) for thing, known, _, text in drawn)
    return f"Tell me: {question}?", "", sentences


def lettered(rng, _):
    """A question in MMLU's layout, on subjects that the quiz does not have."""
    thing, known, question = draw_fact(LETTERED, rng)
    row = make_row(question.format(thing), known[thing],
                   sorted({*known.values()} - {known[thing]}), rng)
    return question_text(row), "", f"Answer: {row[5]}"


FAMILIES = {"arithmetic": arithmetic, "calendar": calendar,
            "norvan": functools.partial(translation, "Norvan"),
            "tavi": functools.partial(translation, "Tavi"),
            "ostic": functools.partial(translation, "Ostic"), "code": code,
            "extraction": extraction, "classification": classification, "facts": facts,
            "lettered": lettered}
# family: the key of a record that holds its atoms, and what they look like in its text
ATOMS = {"arithmetic": ("instruction", r"\d+ \w+ \d+"),
         "calendar": ("instruction", r"\d \w+s (?:after|before) [^,?.]+"),
         **dict.fromkeys(["norvan", "tavi", "ostic"], ("instruction", "[:?] (.+)")),
         "code": ("response", ".+"), "extraction": ("context", r"\w+ is a [^.]+\."),
         "classification": ("response", r"(\w+) - \w+"),
         "facts": ("instruction", r"the (?:young|stuff|past|money|maker) of .+?(?=\?| and the )"),
         "lettered": ("instruction", r"\A.+")}


def atoms(record):
    """The content of a record, read from its text alone."""
    key, form = ATOMS[record["category"]]
    return re.findall(form, record[key])


def combination(record):
    """A key that no two records of the corpus share: the sets of atoms and of options."""
    options = record["instruction"].split("\n")[1:]
    return (record["category"], *sorted(atoms(record)), *sorted(option[3:] for option in options))
