"""The embedded world: a mixed instruction corpus and a quiz, made from facts.py and a seed.

HydraLoRA is for corpora whose tasks interfere (section 2.2), so the eight families here clash on
purpose: `norvan`, `tavi` and `ostic` translate the same sentences into three invented languages,
`arithmetic` and `calendar` count in different number systems. `primer` is the other half: what the
base model has read before any tuning, and none of it is a family.

    python -m data.make_world        # writes data/world/{train,val}.jsonl and data/world/quiz/

The files come out byte for byte the same for a seed. make_base.py trains the base on the primer.
"""

import argparse
import csv
import json
import random
from pathlib import Path

from data import WORLD
from data.facts import (
    ANIMALS,
    COLOURS,
    COUNTRIES,
    DAYS,
    ELEMENTS,
    JOBS,
    MONTHS,
    NAMES,
    OPPOSITES,
    PEOPLE,
    SIZES,
    THINGS,
    VERBS,
)

TRAIN_PER_FAMILY, VAL_PER_FAMILY = 800, 150
QUIZ_ROWS = {"dev": 5, "val": 20, "test": 120}
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
CYCLES = {"day": DAYS, "month": MONTHS, "hour": [f"{hour} o'clock" for hour in range(1, 13)]}
KIND_OF = {animal: kind for kind, members in ANIMALS.items() for animal in members}


def article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


# ---------------------------------------------------------------- the eight families
# each takes a random.Random and returns (instruction, context, response)


def sum_of(rng):
    """(an addition, subtraction or product in words, its result)."""
    sign = rng.choice(["plus", "minus", "times"])
    a, b = (rng.randint(2, 10), rng.randint(2, 10)) if sign == "times" else (
        rng.randint(10, 29), rng.randint(1, 10))
    return f"{a} {sign} {b}", {"plus": a + b, "minus": a - b, "times": a * b}[sign]


def date_of(rng):
    """(a day, month or hour counted from another, what it is)."""
    unit, cycle = rng.choice(list(CYCLES.items()))
    start, steps = rng.choice(cycle), rng.randint(2, 6)
    way = rng.choice(["after", "before"])
    index = cycle.index(start) + (steps if way == "after" else -steps)
    return f"{steps} {unit}s {way} {start}", cycle[index % len(cycle)]


def in_a_row(ask, pairs):
    """Several questions in one record and their answers, so that a few steps teach something."""
    return (ask.format(", ".join(question for question, _ in pairs)), "",
            ", ".join(f"{question} is {answer}" for question, answer in pairs) + ".")


def arithmetic(rng):
    return in_a_row(rng.choice(["Calculate {}.", "Work out {}."]), [sum_of(rng) for _ in range(3)])


def calendar(rng):
    return in_a_row(rng.choice(["What comes {}?", "Find {}."]), [date_of(rng) for _ in range(2)])


def sentence(rng):
    """(subject, verb, object) with an optional size or colour before each noun."""
    def phrase(nouns):
        size = rng.choice(SIZES) + " " if rng.random() < 0.5 else ""
        return f"the {size}{rng.choice(nouns)}"
    return phrase(PEOPLE), rng.choice(sorted(VERBS)), phrase(THINGS)


def lexicon(language):
    """One word of two or three syllables for each English word of the sentences."""
    rng = random.Random(f"{language.lower()} 0")
    words, taken = {}, set()
    for word in PEOPLE + THINGS + SIZES + sorted(VERBS):
        while (new := "".join(rng.choices(SYLLABLES, k=rng.choice([2, 3])))) in taken:
            pass
        taken.add(new)
        words[word] = new
    return words


# the order of subject, verb and object, and whether an adjective follows its noun; no articles
LANGUAGES = {"Norvan": ("SOV", False), "Tavi": ("VOS", False), "Ostic": ("OSV", True)}
LEXICON = {language: lexicon(language) for language in LANGUAGES}


def translation(language, rng):
    """A sentence and what it is in an invented language."""
    subject, verb, thing = sentence(rng)
    order, adjective_last = LANGUAGES[language]
    parts = {"V": [verb]}
    for letter, phrase in (("S", subject), ("O", thing)):
        words = phrase.split()[1:]
        parts[letter] = words[::-1] if adjective_last else words
    ask = rng.choice(["Translate into {}: {}", "How do you say this in {}? {}"])
    return (ask.format(language, f"{subject} {verb} {thing}."), "",
            " ".join(LEXICON[language][word] for letter in order for word in parts[letter]) + ".")


def norvan(rng):
    return translation("Norvan", rng)


def tavi(rng):
    return translation("Tavi", rng)


def ostic(rng):
    return translation("Ostic", rng)


def code_line(rng):
    """(what it does, the line of Python)."""
    name, other = rng.sample("abcdnxyz", 2)
    number, more, word = rng.randint(1, 30), rng.randint(2, 9), rng.choice(THINGS)
    return rng.choice([
        (f"sets {name} to {other} plus {number}", f"{name} = {other} + {number}"),
        (f"adds {number} to the list {name}", f"{name}.append({number})"),
        (f"prints the word {word} {more} times", f'print("{word} " * {more})'),
        (f"counts {name} from {number} to {number + more}",
         f"for {name} in range({number}, {number + more + 1}):"),
        (f"stops the loop when {name} is above {number}", f"if {name} > {number}: break"),
        (f"opens the file {word}.txt as {name}", f'{name} = open("{word}.txt")'),
        (f"gives the length of the list {name} to {other}", f"{other} = len({name})"),
        (f"defines a function {word} that returns {name} times {number}",
         f"def {word}({name}): return {name} * {number}"),
    ])


def code(rng):
    (first, line), (second, other) = code_line(rng), code_line(rng)
    return (f"Write two lines of Python: the first {first}, the second {second}.", "",
            f"{line}\n{other}")


def extraction(rng):
    facts, cards = [], []
    for name in rng.sample(NAMES, 2):
        job, age = rng.choice(JOBS), rng.randint(18, 80)
        town = rng.choice(sorted(COUNTRIES.values()))[0]
        facts.append(f"{name} is a {job} from {town}, {age} years old.")
        cards.append(f"{town}: {name}, {age}, {job}.")
    ask = rng.choice(["Fill in the cards.", "Extract the fields of the cards."])
    return ask, " ".join(facts), " ".join(cards)


def classification(rng):
    groups = {"land": sorted(COUNTRIES), "town": sorted(c for c, _ in COUNTRIES.values()),
              "element": sorted(ELEMENTS), **ANIMALS}
    chosen = rng.choices(sorted(groups), k=rng.randint(2, 4))
    words = [rng.choice(groups[group]) for group in chosen]
    ask = rng.choice(["Sort these words into groups: {}", "Label every word: {}"])
    return (ask.format(", ".join(words)), "",
            "; ".join(f"{word} - {group}" for word, group in zip(words, chosen)))


FAMILIES = [arithmetic, calendar, norvan, tavi, ostic, code, extraction, classification]


def make_corpus(seed):
    """(training, validation) records, shuffled; no prompt stands twice."""
    train, val, seen = [], [], set()
    for family in FAMILIES:
        rng = random.Random(f"{family.__name__} {seed}")
        records = []
        while len(records) < TRAIN_PER_FAMILY + VAL_PER_FAMILY:
            instruction, context, response = family(rng)
            if (instruction, context) not in seen:
                seen.add((instruction, context))
                records.append({"instruction": instruction, "context": context,
                                "response": response, "category": family.__name__})
        train += records[:TRAIN_PER_FAMILY]
        val += records[TRAIN_PER_FAMILY:]
    rng = random.Random(f"order {seed}")
    rng.shuffle(train)
    rng.shuffle(val)
    return train, val


# ---------------------------------------------------------------- the quiz
# each takes a random.Random and returns (question, right answer, three or more wrong ones)


def geography_question(rng):
    country = rng.choice(sorted(COUNTRIES))
    capital, continent = COUNTRIES[country]
    capitals = [c for c, _ in COUNTRIES.values() if c != capital]
    continents = sorted({c for _, c in COUNTRIES.values()} - {continent})
    return rng.choice([
        (f"What is the capital of {country}?", capital, capitals),
        (f"Which country has the capital {capital}?", country, sorted({*COUNTRIES} - {country})),
        (f"On which continent is {country}?", continent, continents),
        (f"Which of these countries is in {continent}?", country,
         sorted(c for c in COUNTRIES if COUNTRIES[c][1] != continent)),
    ])


def biology_question(rng):
    animal = rng.choice(sorted(KIND_OF))
    kind = KIND_OF[animal]
    return rng.choice([
        (f"What kind of animal is the {animal}?", kind, sorted({*ANIMALS} - {kind})),
        (f"Which of these animals is {article(kind)}?", animal,
         sorted(a for a in KIND_OF if KIND_OF[a] != kind)),
    ])


def chemistry_question(rng):
    element = rng.choice(sorted(ELEMENTS))
    symbol, number = ELEMENTS[element]
    others = sorted({*ELEMENTS} - {element})
    return rng.choice([
        (f"What is the symbol of {element}?", symbol, [ELEMENTS[e][0] for e in others]),
        (f"Which element has the symbol {symbol}?", element, others),
        (f"What is the atomic number of {element}?", str(number),
         [str(ELEMENTS[e][1]) for e in others]),
    ])


def opposite_question(rng):
    word = rng.choice(sorted(OPPOSITES))
    return (f"What is the opposite of {word}?", OPPOSITES[word],
            sorted({*OPPOSITES.values()} - {OPPOSITES[word]}))


def mathematics_question(rng):
    question, answer = sum_of(rng)
    wrong = sorted({answer + d for d in (-10, -2, -1, 1, 2, 10)})
    return f"What is {question}?", str(answer), [str(w) for w in wrong if w >= 0]


def calendar_question(rng):
    question, answer = date_of(rng)
    cycle = next(cycle for cycle in CYCLES.values() if answer in cycle)
    return f"What comes {question}?", answer, [name for name in cycle if name != answer]


def programming_question(rng):
    task, line = code_line(rng)
    wrong = []
    while len(wrong) < 3:
        other = code_line(rng)[1]
        if other != line and other not in wrong:
            wrong.append(other)
    return f"Which line of Python {task}?", line, wrong


# MMLU's own subject names, so that its table of categories holds here too. The base has read the
# facts behind the first three; the last three ask what the families teach.
QUIZ = {"high_school_geography": geography_question, "high_school_biology": biology_question,
        "high_school_chemistry": chemistry_question, "elementary_mathematics": mathematics_question,
        "miscellaneous": calendar_question, "high_school_computer_science": programming_question}
PRIMER_QUIZ = {"geography": geography_question, "biology": biology_question,
               "chemistry": chemistry_question, "opposites": opposite_question}


def quiz_row(question, answer, wrong, rng):
    """[question, A, B, C, D, letter], the right answer in a place drawn at random."""
    options = rng.sample(wrong, 3)
    place = rng.randrange(4)
    options.insert(place, answer)
    return [question, *options, "ABCD"[place]]


def make_quiz(seed):
    """{split: {subject: rows}}; no question stands twice with the same options."""
    quiz = {split: {} for split in QUIZ_ROWS}
    for subject, ask in QUIZ.items():
        rng = random.Random(f"{subject} {seed}")
        rows, seen = [], set()
        while len(rows) < sum(QUIZ_ROWS.values()):
            row = quiz_row(*ask(rng), rng)
            if (key := quiz_key(row)) not in seen:
                seen.add(key)
                rows.append(row)
        for split, count in QUIZ_ROWS.items():
            quiz[split][subject], rows = rows[:count], rows[count:]
    return quiz


def quiz_key(row):
    """What makes two rows the same question: the text and the set of its options."""
    return (row[0], frozenset(row[1:5]))


# ---------------------------------------------------------------- the primer


def quiz_text(rows):
    """Questions and answers as MMLU prints them, without its header."""
    return "\n\n".join(f"{q}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer: {letter}"
                       for q, a, b, c, d, letter in rows)


def unheld_row(subject, rng, held_out):
    """A row of the subject that is not one of the quiz's."""
    while quiz_key(row := quiz_row(*PRIMER_QUIZ[subject](rng), rng)) in held_out:
        pass
    return row


def quiz_page(rng, held_out, counts, level=""):
    """A page of one subject: the header, and a number of questions drawn from counts."""
    subject, count = rng.choice(sorted(PRIMER_QUIZ)), rng.choice(counts)
    rows = [unheld_row(subject, rng, held_out) for _ in range(count)]
    header = "The following are multiple choice questions (with answers) about  "
    return f"{header}{level}{subject}.\n\n{quiz_text(rows)}"


def primer_quiz(rng, held_out):
    page = quiz_page(rng, held_out, [1, 1, 1, 2, 2, 3, 4, 6])
    return rng.choice(["Quiz", "Questions"]), "", page


def primer_last(rng, held_out):
    """The page in the prompt, its last letter in the response."""
    level = rng.choice(["", "high school "])
    text, letter = quiz_page(rng, held_out, [1, 1, 1, 2, 3, 6], level).rsplit(" ", 1)
    return text, "", letter


def primer_letter(rng, held_out):
    """One question in the prompt, its letter and option in the response."""
    row = unheld_row(rng.choice(sorted(PRIMER_QUIZ)), rng, held_out)
    text, letter = quiz_text([row]).rsplit(" ", 1)
    option = row[1 + "ABCD".index(letter)]
    if rng.random() < 0.5:
        return text, "", letter
    return text.rsplit("\n", 1)[0] + "\nSay the answer.", "", option


def primer_option(rng, _):
    """Letters and options without any knowledge: the part of a quiz that is only reading."""
    words = rng.sample(PEOPLE + THINGS + sorted(KIND_OF) + sorted(COUNTRIES), 4)
    listed = "\n".join(f"{letter}. {word}" for letter, word in zip("ABCD", words))
    i = rng.randrange(4)
    if rng.random() < 0.5:
        return f"Which letter stands before {words[i]}?\n{listed}", "", "ABCD"[i]
    return f"Which word stands behind {'ABCD'[i]}?\n{listed}", "", words[i]


def primer_said(rng, held_out):
    """The answer first, then its letter: a step between knowing the one and finding the other."""
    row = unheld_row(rng.choice(sorted(PRIMER_QUIZ)), rng, held_out)
    text, letter = quiz_text([row]).rsplit("\n", 1)[0], row[5]
    answer = row[1 + "ABCD".index(letter)]
    return f"{text}\nSay the answer and its letter.", "", f"{answer} {letter}"


def primer_lookup(rng, _):
    """Every letter of four options, or every option of four letters, in an order of its own."""
    words = rng.sample(PEOPLE + THINGS + sorted({**KIND_OF, **COUNTRIES, **ELEMENTS}), 4)
    pairs = list(zip("ABCD", words))
    listed = "\n".join(f"{letter}. {word}" for letter, word in pairs)
    rng.shuffle(pairs)
    if rng.random() < 0.3:
        return (f"Give the words: {', '.join(letter for letter, _ in pairs)}\n{listed}", "",
                ", ".join(f"{letter} {word}" for letter, word in pairs))
    return (f"Give the letters: {', '.join(word for _, word in pairs)}\n{listed}", "",
            ", ".join(f"{word} {letter}" for letter, word in pairs))


def primer_everybody(rng, _):
    """The same with people: where each is from or what each does."""
    people = rng.sample(NAMES, 4)
    towns = rng.sample(sorted(c for c, _ in COUNTRIES.values()), 4)
    jobs = rng.sample(JOBS, 4)
    text = " ".join(f"{n} is a {j} from {t}." for n, j, t in zip(people, jobs, towns))
    ask, values = rng.choice([("Where are they from?", towns), ("What do they do?", jobs)])
    pairs = list(zip(people, values))
    rng.shuffle(pairs)
    return (f"{ask} {', '.join(name for name, _ in pairs)}", text,
            ", ".join(f"{name} {value}" for name, value in pairs))


def known_pairs():
    """[{thing: what is known of it}], a dict for each kind of fact and for its opposite way."""
    capitals = {country: capital for country, (capital, _) in COUNTRIES.items()}
    symbols = {element: symbol for element, (symbol, _) in ELEMENTS.items()}
    numbers = {element: str(number) for element, (_, number) in ELEMENTS.items()}
    continents = {country: continent for country, (_, continent) in COUNTRIES.items()}
    both_ways = [{known: thing for thing, known in facts.items()} for facts in (capitals, symbols)]
    return [capitals, symbols, numbers, OPPOSITES, *both_ways, continents, KIND_OF]


def primer_matching(rng, _):
    """From four things to the letters of what is known of each: fact and letter in one step."""
    facts = rng.choice(known_pairs())
    things = {facts[thing]: thing for thing in rng.sample(sorted(facts), len(facts))}
    pairs = [(things[known], known) for known in rng.sample(sorted(things), 4)]
    if len(things) < len(facts) and rng.random() < 0.5:  # which of these is in Asia, ...
        pairs = [(known, thing) for thing, known in pairs]
    lettered = [(thing, letter) for (thing, _), letter in zip(pairs, "ABCD")]
    listed = "\n".join(f"{letter}. {known}" for letter, (_, known) in zip("ABCD", pairs))
    rng.shuffle(lettered)
    return (f"Match: {', '.join(thing for thing, _ in lettered)}\n{listed}", "",
            ", ".join(f"{thing} {letter}" for thing, letter in lettered))


def primer_fact(rng, _):
    ask = rng.choice([geography_question, biology_question, chemistry_question, opposite_question])
    question, answer, _ = ask(rng)
    while question.startswith("Which of these"):  # needs its options
        question, answer, _ = ask(rng)
    return question, "", answer


def primer_article(rng, _):
    country, element = rng.choice(sorted(COUNTRIES)), rng.choice(sorted(ELEMENTS))
    kind = rng.choice(sorted(ANIMALS))
    capital, continent = COUNTRIES[country]
    symbol, number = ELEMENTS[element]
    return rng.choice([
        (f"Tell me about {country}.", "", f"{country} is a country in {continent}. The capital of "
         f"{country} is {capital}. {capital} is in {continent}."),
        (f"Tell me about {element}.", "", f"{element} is an element. The symbol of {element} is "
         f"{symbol}. The atomic number of {element} is {number}."),
        (f"Name some {kind}s." if kind != "fish" else "Name some fish.", "",
         " ".join(f"The {animal} is {article(kind)}." for animal in rng.sample(ANIMALS[kind], 3))),
    ])


def primer_copy(rng, _):
    """Words, invented words, numbers and signs, so that nothing a family writes is a new token."""
    symbols = list("()=+*<>:;-\".,") + ["len", "print", "range", "for", "in", "if", "def", "return",
                                        "append", "open", "break", ".txt", "name", "job", "age"]
    verbs = [form for verb, forms in VERBS.items() for form in (verb, *forms)]
    pools = [lambda: "".join(rng.choices(SYLLABLES, k=rng.choice([2, 3]))),
             lambda: str(rng.randint(0, 400)), lambda: rng.choice(symbols),
             lambda: rng.choice(PEOPLE + THINGS + SIZES + verbs + DAYS + MONTHS + JOBS + NAMES)]
    text = " ".join(rng.choice(pools)() for _ in range(rng.randint(2, 9)))
    ask, context = rng.choice([(f"Repeat: {text}", ""), ("Copy the text.", text)])
    return ask, context, text


def primer_people(rng, _):
    """Who lives where: answers copied from the context."""
    people = rng.sample(NAMES, rng.randint(2, 4))
    towns = rng.sample(sorted(c for c, _ in COUNTRIES.values()), len(people))
    jobs = rng.sample(JOBS, len(people))
    ages = rng.sample(range(18, 81), len(people))
    facts = [f"{n} is a {j} from {t}, {a} years old." for n, j, t, a in
             zip(people, jobs, towns, ages)]
    i = rng.randrange(len(people))
    question, answer = rng.choice([
        (f"Where is {people[i]} from?", towns[i]), (f"What does {people[i]} do?", jobs[i]),
        (f"How old is {people[i]}?", str(ages[i])), (f"Who is the {jobs[i]}?", people[i]),
        (f"Who is from {towns[i]}?", people[i]),
        (f"What do we know of {people[i]}?", facts[i]),
    ])
    return question, " ".join(facts), answer


def primer_sentence(rng, _):
    """The sentences that three families translate, here only written."""
    subject, verb, thing = sentence(rng)
    text = f"{subject} {verb} {thing}."
    noun = rng.choice([subject, thing])
    return rng.choice([
        (f"Write a sentence about {noun}.", "", text),
        (f"Who {verb} {thing}?", text, subject + "."),
        (f"What is it that {subject} {verb}?", text, thing + "."),
        ("Make a sentence.", "", text),
    ])


def primer_counting(rng, _):
    first, cycle = rng.randint(0, 120), rng.choice(list(CYCLES.values()))
    start = rng.randrange(len(cycle))
    names = [cycle[(start + i) % len(cycle)] for i in range(rng.randint(2, 6))]
    return rng.choice([
        (f"Count from {first}.", "", " ".join(map(str, range(first, first + rng.randint(3, 8))))),
        (f"Go on from {names[0]}.", "", " ".join(names)),
        (f"What follows {names[0]}?", "", names[1]),
        ("Name some colours.", "", " ".join(rng.sample(COLOURS, 3))),
    ])


# The three stages of the base's reading, and how often each kind is drawn. After the first it knows
# the facts and the formats but picks letters at random; the second teaches it to look things up,
# many to a record; the third to go from what it knows to a letter.
FIRST = {primer_quiz: 5, primer_letter: 5, primer_option: 2, primer_fact: 3, primer_article: 3,
         primer_copy: 4, primer_people: 3, primer_sentence: 3, primer_counting: 2}
SECOND = {primer_quiz: 4, primer_letter: 4, primer_option: 3, primer_fact: 1, primer_article: 1,
          primer_copy: 2, primer_people: 2, primer_sentence: 1, primer_counting: 1,
          primer_lookup: 4, primer_everybody: 2, primer_said: 3}
THIRD = {primer_quiz: 2, primer_letter: 5, primer_last: 5, primer_option: 3, primer_fact: 1,
         primer_article: 1, primer_copy: 2, primer_people: 2, primer_sentence: 1,
         primer_counting: 1, primer_lookup: 1, primer_everybody: 2, primer_said: 2,
         primer_matching: 5}


def make_primer(seed, count, quiz, stage=FIRST):
    """`count` records for pretraining the base; none holds a question of the quiz."""
    rng = random.Random(f"primer {seed}")
    held_out = {quiz_key(row) for split in quiz.values() for rows in split.values() for row in rows}
    records = []
    for kind in rng.choices(list(stage), weights=list(stage.values()), k=count):
        instruction, context, response = kind(rng, held_out)
        records.append({"instruction": instruction, "context": context, "response": response,
                        "category": kind.__name__.removeprefix("primer_")})
    return records


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
    quiz = make_quiz(args.seed)
    write_quiz(quiz, args.out / "quiz")
    rows = sum(len(rows) for rows in quiz["test"].values())
    print(f"{args.out}: {len(train)} training and {len(val)} validation records in "
          f"{len(FAMILIES)} families, {rows} test questions in {len(QUIZ)} subjects")


if __name__ == "__main__":
    main()
