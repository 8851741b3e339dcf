"""The primer: what the base model of the embedded world has read before any tuning.

The first three stages teach it to read: facts, formats, letters, looking things up. The fourth
holds the ingredients of the task families (families.py), in other forms than the corpus asks for:
words and lines of three languages, Python, sums, dates, more facts. No family stands in it, and no
question of the quiz (quiz.py). Used by base.py:

    records = make_primer(seed=0, count=1000, stage=FOURTH)
"""

import random

from data.make.facts import (
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
from data.make.families import (
    CYCLES,
    GROUPS,
    LEXICON,
    OPEN,
    SYLLABLES,
    TRANSLATED,
    code_line,
    date_of,
    sentence,
    sum_of,
    translate,
)
from data.make.quiz import (
    KIND_OF,
    QUESTIONS,
    article,
    biology_question,
    chemistry_question,
    geography_question,
    opposite_question,
    quiz_key,
    quiz_row,
    quiz_text,
)

HELD_OUT_ROWS = 145  # of each subject below


def held_out_rows(seed):
    """The keys of rows that no page of the primer holds: whether it answers them is no memory."""
    held_out = set()
    for subject in ("geography", "biology", "chemistry"):
        rng, rows = random.Random(f"high_school_{subject} {seed}"), set()
        while len(rows) < HELD_OUT_ROWS:
            rows.add(quiz_key(quiz_row(*QUESTIONS[subject](rng), rng)))
        held_out |= rows
    return held_out


# ---------------------------------------------------------------- the first three stages


def unheld_row(subject, rng, held_out):
    """A row of the subject that is not held out."""
    while quiz_key(row := quiz_row(*QUESTIONS[subject](rng), rng)) in held_out:
        pass
    return row


def quiz_page(rng, held_out, counts, level=""):
    """A page of one subject: the header, and a number of questions drawn from counts."""
    subject, count = rng.choice(sorted(QUESTIONS)), rng.choice(counts)
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
    row = unheld_row(rng.choice(sorted(QUESTIONS)), rng, held_out)
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
    row = unheld_row(rng.choice(sorted(QUESTIONS)), rng, held_out)
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


# ---------------------------------------------------------------- the fourth stage


def primer_dictionary(rng, _):
    language = rng.choice(sorted(LEXICON))
    words = rng.sample(sorted(LEXICON[language]), rng.randint(3, 6))
    pairs = [(word, LEXICON[language][word]) for word in words]
    if rng.random() < 0.3:
        return (f"What do these {language} words mean? {', '.join(new for _, new in pairs)}", "",
                ", ".join(f"{new} means {word}" for word, new in pairs))
    return (f"{language} words: {', '.join(words)}", "",
            ", ".join(f"{word} {new}" for word, new in pairs))


def primer_parallel(rng, _):
    """A line in two languages; which comes first, and which is given, differs."""
    language, parts = rng.choice(sorted(LEXICON)), sentence(rng, *TRANSLATED)
    english, other = " ".join(parts), translate(language, *parts)
    return rng.choice([
        (f"A line in {language}.", "", f"{other} = {english}"),
        (f"{language} for: {english}", "", other),
        (f"{english} = ({language})", "", other),
        (f"{language}: {other}", "", english),
    ])


def primer_python(rng, _):
    (line, does), (other, second) = code_line(rng), code_line(rng)
    return rng.choice([
        ("Some Python.", "", f"{line}  # {does}\n{other}  # {second}"),
        (f"# {does}\n# {second}", "", f"{line}\n{other}"),
        (f"What does this do? {line}", "", f"It {does}."),
    ])


SIGNS = {"plus": "+", "minus": "-", "times": "x", "after": "+", "before": "-"}


def in_signs(text):
    """14 plus 3, 3 days after Monday -> 14 + 3, Monday + 3."""
    first, word, *rest = text.split()
    if word in SIGNS:
        return f"{first} {SIGNS[word]} {rest[0]}"
    way, *start = rest
    return f"{' '.join(start)} {SIGNS[way]} {first}"


def written_out(pairs, rng):
    """To be finished in signs, or told in words: each with its answer behind it."""
    if rng.random() < 0.4:
        told = ", ".join(f"{text} makes {answer}" for text, answer in pairs)
        return "Count a little.", "", f"{told}."
    texts = [in_signs(text) for text, _ in pairs]
    return (f"Do: {', '.join(texts)}", "",
            ", ".join(f"{text} = {answer}" for text, (_, answer) in zip(texts, pairs)))


def primer_sums(rng, _):
    return written_out([sum_of(rng) for _ in range(4)], rng)


def primer_dates(rng, _):
    return written_out([date_of(rng) for _ in range(3)], rng)


# kind of fact: two more ways to tell it
TOLD = {
    "young": ("The {1} is the young of the {0}.", "{0} and {1}, old and young."),
    "made": ("{1} goes into {0}.", "From {1} comes {0}."),
    "past": ("Today he {0}, yesterday he {1}.", "He {0} now, he {1} then."),
    "money": ("In {0} they pay with the {1}.", "The {1} is the money of {0}."),
    "maker": ("We owe {0} to {1}.", "{1} gave us {0}."),
}


def primer_lore(rng, _):
    asked, answers = [], []
    kind = rng.choice(sorted(OPEN))
    if rng.random() < 0.4:
        known, _, tell = OPEN[kind]
        tell = rng.choice([tell, *TOLD[kind]])
        things = rng.sample(sorted(known), 3)
        return (f"Tell about {', '.join(things)}.", "",
                " ".join(tell.format(thing, known[thing]) for thing in things))
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(sorted(OPEN))
        thing = rng.choice(sorted(OPEN[kind][0]))
        asked.append(OPEN[kind][1].format(thing))
        answers.append(OPEN[kind][0][thing])
    return (f"Name {', '.join(asked)}.", "", " and ".join(answers))


def primer_words(rng, _):
    """Words and the groups that they belong to."""
    pairs = []
    for _ in range(rng.randint(2, 4)):
        group = rng.choice(sorted(GROUPS))
        pairs.append((rng.choice(GROUPS[group][1]), group))
    return (f"What are {', '.join(word for word, _ in pairs)}?", "",
            "; ".join(f"{word} - {article(group)}" for word, group in pairs))


def primer_list(rng, _):
    """The cards of people, with their fields in another order than the corpus asks for."""
    people = [(rng.choice(NAMES), rng.choice(JOBS), rng.choice(sorted(COUNTRIES.values()))[0],
               rng.randint(18, 80)) for _ in range(rng.randint(1, 3))]
    return ("Make a list.",
            " ".join(f"{n} is a {j} from {t}, {a} years old." for n, j, t, a in people),
            ", ".join(f"{j} {n} ({a}) of {t}" for n, j, t, a in people))


def primer_spoken(rng, held_out):
    """A page of questions that are answered in words, not with a letter."""
    subject = rng.choice(sorted(QUESTIONS))
    rows = [unheld_row(subject, rng, held_out) for _ in range(rng.choice([1, 1, 2, 3]))]
    header = "The following are multiple choice questions (with answers) about  "
    page = quiz_text([[*row[:5], row[1 + "ABCD".index(row[5])]] for row in rows])
    return rng.choice(["Quiz", "Questions"]), "", f"{header}{subject}.\n\n{page}"


# The stages of the base's reading, and how often each kind is drawn. After the first it knows the
# facts and the formats but picks letters at random; the second teaches it to look things up, many
# to a record; the third to go from what it knows to a letter. The fourth has the ingredients of the
# families. In the fifth it sees questions answered in words and none with a letter, so that letters
# grow weaker than facts, as LLaMA 2's are.
FIRST = {primer_quiz: 5, primer_letter: 5, primer_option: 2, primer_fact: 3, primer_article: 3,
         primer_copy: 4, primer_people: 3, primer_sentence: 3, primer_counting: 2}
SECOND = {primer_quiz: 4, primer_letter: 4, primer_option: 3, primer_fact: 1, primer_article: 1,
          primer_copy: 2, primer_people: 2, primer_sentence: 1, primer_counting: 1,
          primer_lookup: 4, primer_everybody: 2, primer_said: 3}
THIRD = {primer_quiz: 2, primer_letter: 5, primer_last: 5, primer_option: 3, primer_fact: 1,
         primer_article: 1, primer_copy: 2, primer_people: 2, primer_sentence: 1,
         primer_counting: 1, primer_lookup: 1, primer_everybody: 2, primer_said: 2,
         primer_matching: 5}
FOURTH = {primer_parallel: 8, primer_dictionary: 2, primer_python: 4, primer_sums: 7,
          primer_dates: 6, primer_lore: 5, primer_words: 3, primer_list: 1, primer_fact: 3,
          primer_article: 1, primer_copy: 2, primer_people: 2, primer_everybody: 1,
          primer_sentence: 1, primer_counting: 1, primer_letter: 1, primer_last: 1}
FIFTH = {**FOURTH, primer_letter: 0, primer_last: 0, primer_spoken: 1}
STAGES = FIRST, SECOND, THIRD, FOURTH, FIFTH
# what the base knows and no family teaches: whether tuning takes it is measured on these
KEPT = {primer_fact: 1, primer_article: 1, primer_copy: 1, primer_people: 1, primer_everybody: 1,
        primer_sentence: 1, primer_counting: 1}


def make_primer(seed, count, stage=FIRST, held_out=frozenset()):
    """`count` records; none holds a row of held_out."""
    rng = random.Random(f"primer {seed}")
    records = []
    for kind in rng.choices(list(stage), weights=list(stage.values()), k=count):
        instruction, context, response = kind(rng, held_out)
        records.append({"instruction": instruction, "context": context, "response": response,
                        "category": kind.__name__.removeprefix("primer_")})
    return records
