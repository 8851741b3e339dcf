"""The primer: the texts that the embedded world's base model is pretrained on.

The first three stages teach it to read: facts, formats, letters, looking things up. The
fourth has the ingredients of the families (families.py) in other forms than the corpus.
No text is a record of a family or a question of the quiz (quiz.py).

    records = make_primer(seed=0, count=1000, stage=FOURTH)
"""

import random

from data.make import families, quiz
from data.make.facts import FACTS
from data.mmlu import format_prompt

HELD_OUT_ROWS = 145  # of each subject below


def held_out_rows(seed):
    """Keys of rows that the primer leaves out: no model of it has them by heart."""
    held_out = set()
    for subject in ("geography", "biology", "chemistry"):
        rng = random.Random(f"high_school_{subject} {seed}")
        rows = set()
        while len(rows) < HELD_OUT_ROWS:
            rows.add(quiz.row_key(draw_row(subject, rng, ())))
        held_out |= rows
    return held_out


# ---------------------------------------------------------------- the first three stages
# Every primer_NAME takes (rng, held_out) and returns (instruction, context, response).


def draw_row(subject, rng, held_out):
    """A row of the subject that is not held out."""
    while True:
        row = quiz.make_row(*quiz.draw_question(quiz.QUESTIONS[subject], rng), rng)
        if quiz.row_key(row) not in held_out:
            return row


def draw_page(rng, held_out, counts):
    """(subject, rows): as many questions of one subject as is drawn from counts."""
    subject, count = rng.choice(sorted(quiz.QUESTIONS)), rng.choice(counts)
    return subject, [draw_row(subject, rng, held_out) for _ in range(count)]


def page_text(subject, rows):
    """MMLU's prompt, its last question answered too."""
    return f"{format_prompt(subject, rows[:-1], rows[-1])} {rows[-1][5]}"


def primer_quiz(rng, held_out):
    page = page_text(*draw_page(rng, held_out, [1, 1, 1, 2, 2, 3, 4, 6]))
    return rng.choice(["Quiz", "Questions"]), "", page


def primer_last(rng, held_out):
    """The page in the prompt, its last letter in the response."""
    level = rng.choice(["", "high school "])
    subject, rows = draw_page(rng, held_out, [1, 1, 1, 2, 3, 6])
    return format_prompt(level + subject, rows[:-1], rows[-1]), "", rows[-1][5]


def primer_letter(rng, held_out):
    """One question in the prompt, its letter or option in the response."""
    row = draw_row(rng.choice(sorted(quiz.QUESTIONS)), rng, held_out)
    if rng.random() < 0.5:
        return f"{quiz.question_text(row)}\nAnswer:", "", row[5]
    return f"{quiz.question_text(row)}\nSay the answer.", "", quiz.right_option(row)


def as_options(words):
    return "\n".join(f"{letter}. {word}" for letter, word in zip("ABCD", words))


def primer_option(rng, _):
    """Letters and options without any knowledge: the part of a quiz that is reading."""
    known = sorted(quiz.KIND_OF) + sorted(FACTS.countries)
    words = rng.sample(FACTS.people + FACTS.things + known, 4)
    i = rng.randrange(4)
    if rng.random() < 0.5:
        return f"Which letter stands before {words[i]}?\n{as_options(words)}", "", "ABCD"[i]
    return f"Which word stands behind {'ABCD'[i]}?\n{as_options(words)}", "", words[i]


def primer_said(rng, held_out):
    """The answer, then its letter: a step between knowing one and finding the other."""
    row = draw_row(rng.choice(sorted(quiz.QUESTIONS)), rng, held_out)
    return (f"{quiz.question_text(row)}\nSay the answer and its letter.", "",
            f"{quiz.right_option(row)} {row[5]}")


def primer_lookup(rng, _):
    """The letters of four options, or the options of four letters, in another order."""
    known = sorted({**quiz.KIND_OF, **FACTS.countries, **FACTS.elements})
    words = rng.sample(FACTS.people + FACTS.things + known, 4)
    pairs = list(zip("ABCD", words))
    rng.shuffle(pairs)
    if rng.random() < 0.3:
        asked = f"Give the words: {', '.join(letter for letter, _ in pairs)}"
        answer = ", ".join(f"{letter} {word}" for letter, word in pairs)
    else:
        asked = f"Give the letters: {', '.join(word for _, word in pairs)}"
        answer = ", ".join(f"{word} {letter}" for letter, word in pairs)
    return f"{asked}\n{as_options(words)}", "", answer


def primer_everybody(rng, _):
    """The same with people: where each is from, or what each does."""
    people = rng.sample(FACTS.names, 4)
    towns = rng.sample(sorted(c for c, _ in FACTS.countries.values()), 4)
    jobs = rng.sample(FACTS.jobs, 4)
    text = " ".join(f"{n} is a {j} from {t}." for n, j, t in zip(people, jobs, towns))
    ask, values = rng.choice([("Where are they from?", towns), ("What do they do?", jobs)])
    pairs = list(zip(people, values))
    rng.shuffle(pairs)
    return (f"{ask} {', '.join(name for name, _ in pairs)}", text,
            ", ".join(f"{name} {value}" for name, value in pairs))


def inverse(known):
    return {value: thing for thing, value in known.items()}


def primer_matching(rng, _):
    """Four things and the letter of a fact on each: fact and letter in one step."""
    facts = rng.choice([quiz.CAPITAL, quiz.SYMBOL, quiz.NUMBER, FACTS.opposites,
                        inverse(quiz.CAPITAL), inverse(quiz.SYMBOL), quiz.CONTINENT, quiz.KIND_OF])
    things = {facts[thing]: thing for thing in rng.sample(sorted(facts), len(facts))}
    pairs = [(things[known], known) for known in rng.sample(sorted(things), 4)]
    if len(things) < len(facts) and rng.random() < 0.5:  # which of these is in Asia, ...
        pairs = [(known, thing) for thing, known in pairs]
    lettered = [(thing, letter) for (thing, _), letter in zip(pairs, "ABCD")]
    options = as_options(known for _, known in pairs)
    rng.shuffle(lettered)
    return (f"Match: {', '.join(thing for thing, _ in lettered)}\n{options}", "",
            ", ".join(f"{thing} {letter}" for thing, letter in lettered))


def primer_fact(rng, _):
    relations = rng.choice(list(quiz.QUESTIONS.values()))
    question, answer, _ = quiz.draw_question(relations, rng)
    while question.startswith("Which of these"):  # makes no sense without its options
        question, answer, _ = quiz.draw_question(relations, rng)
    return question, "", answer


def primer_article(rng, _):
    country, element = rng.choice(sorted(FACTS.countries)), rng.choice(sorted(FACTS.elements))
    kind = rng.choice(sorted(FACTS.animals))
    capital, continent = FACTS.countries[country]
    symbol, number = FACTS.elements[element]
    kinds = "fish" if kind == "fish" else f"{kind}s"
    animals = rng.sample(FACTS.animals[kind], 3)
    return rng.choice([
        (f"Tell me about {country}.", "",
         f"{country} is a country in {continent}. The capital of {country} is {capital}. "
         f"{capital} is in {continent}."),
        (f"Tell me about {element}.", "",
         f"{element} is an element. The symbol of {element} is {symbol}. "
         f"The atomic number of {element} is {number}."),
        (f"Name some {kinds}.", "",
         " ".join(f"The {animal} is {quiz.article(kind)}." for animal in animals)),
    ])


def primer_copy(rng, _):
    """Words, invented words, numbers and signs: all tokens that a family writes."""
    symbols = [*"()=+*<>:;-\".,", "len", "print", "range", "for", "in", "if", "def", "return",
               "append", "open", "break", ".txt", "name", "job", "age"]
    verbs = [form for verb, forms in FACTS.verbs.items() for form in (verb, *forms)]
    words = (FACTS.people + FACTS.things + FACTS.sizes + verbs + FACTS.days + FACTS.months
             + FACTS.jobs + FACTS.names)
    pools = [lambda: "".join(rng.choices(families.SYLLABLES, k=rng.choice([2, 3]))),
             lambda: str(rng.randint(0, 400)), lambda: rng.choice(symbols),
             lambda: rng.choice(words)]
    text = " ".join(rng.choice(pools)() for _ in range(rng.randint(2, 9)))
    ask, context = rng.choice([(f"Repeat: {text}", ""), ("Copy the text.", text)])
    return ask, context, text


def primer_people(rng, _):
    """Who lives where: answers copied from the context."""
    people = rng.sample(FACTS.names, rng.randint(2, 4))
    towns = rng.sample(sorted(c for c, _ in FACTS.countries.values()), len(people))
    jobs = rng.sample(FACTS.jobs, len(people))
    ages = rng.sample(range(18, 81), len(people))
    facts = [families.person_text(*person) for person in zip(people, jobs, towns, ages)]
    i = rng.randrange(len(people))
    question, answer = rng.choice([
        (f"Where is {people[i]} from?", towns[i]),
        (f"What does {people[i]} do?", jobs[i]),
        (f"How old is {people[i]}?", str(ages[i])),
        (f"Who is the {jobs[i]}?", people[i]),
        (f"Who is from {towns[i]}?", people[i]),
        (f"What do we know of {people[i]}?", facts[i]),
    ])
    return question, " ".join(facts), answer


def primer_sentence(rng, _):
    """The sentences that three families translate, here only written."""
    subject, verb, thing = families.sentence(rng)
    text = f"{subject} {verb} {thing}."
    noun = rng.choice([subject, thing])
    return rng.choice([
        (f"Write a sentence about {noun}.", "", text),
        (f"Who {verb} {thing}?", text, subject + "."),
        (f"What is it that {subject} {verb}?", text, thing + "."),
        ("Make a sentence.", "", text),
    ])


def primer_counting(rng, _):
    first = rng.randint(0, 120)
    cycle = rng.choice(list(families.CYCLES.values()))
    start = rng.randrange(len(cycle))
    names = [cycle[(start + i) % len(cycle)] for i in range(rng.randint(2, 6))]
    numbers = range(first, first + rng.randint(3, 8))
    return rng.choice([
        (f"Count from {first}.", "", " ".join(map(str, numbers))),
        (f"Go on from {names[0]}.", "", " ".join(names)),
        (f"What follows {names[0]}?", "", names[1]),
        ("Name some colours.", "", " ".join(rng.sample(FACTS.colours, 3))),
    ])


# ---------------------------------------------------------------- the fourth stage


def primer_dictionary(rng, _):
    language = rng.choice(sorted(families.LEXICON))
    words = rng.sample(sorted(families.LEXICON[language]), rng.randint(3, 6))
    pairs = [(word, families.LEXICON[language][word]) for word in words]
    if rng.random() < 0.3:
        asked = ", ".join(new for _, new in pairs)
        return (f"What do these {language} words mean? {asked}", "",
                ", ".join(f"{new} means {word}" for word, new in pairs))
    return (f"{language} words: {', '.join(words)}", "",
            ", ".join(f"{word} {new}" for word, new in pairs))


def primer_parallel(rng, _):
    """A line in two languages; either may come first or be given."""
    language = rng.choice(sorted(families.LEXICON))
    parts = families.sentence(rng, *families.TRANSLATED)
    english, other = " ".join(parts), families.translate(language, *parts)
    return rng.choice([
        (f"A line in {language}.", "", f"{other} = {english}"),
        (f"{language} for: {english}", "", other),
        (f"{english} = ({language})", "", other),
        (f"{language}: {other}", "", english),
    ])


def primer_python(rng, _):
    line, does = families.code_line(rng)
    other, second = families.code_line(rng)
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
    """Questions to be answered in signs, or questions and answers in words."""
    if rng.random() < 0.4:
        told = ", ".join(f"{text} makes {answer}" for text, answer in pairs)
        return "Count a little.", "", f"{told}."
    texts = [in_signs(text) for text, _ in pairs]
    return (f"Do: {', '.join(texts)}", "",
            ", ".join(f"{text} = {answer}" for text, (_, answer) in zip(texts, pairs)))


def primer_sums(rng, _):
    return written_out([families.sum_of(rng) for _ in range(4)], rng)


def primer_dates(rng, _):
    return written_out([families.date_of(rng) for _ in range(3)], rng)


# kind of fact: two more sentences for it
TOLD = {
    "young": ("The {1} is the young of the {0}.", "{0} and {1}, old and young."),
    "made": ("{1} goes into {0}.", "From {1} comes {0}."),
    "past": ("Today he {0}, yesterday he {1}.", "He {0} now, he {1} then."),
    "money": ("In {0} they pay with the {1}.", "The {1} is the money of {0}."),
    "maker": ("We owe {0} to {1}.", "{1} gave us {0}."),
}


def primer_lore(rng, _):
    kind = rng.choice(sorted(families.OPEN))
    if rng.random() < 0.4:
        known, _, tell = families.OPEN[kind]
        tell = rng.choice([tell, *TOLD[kind]])
        things = rng.sample(sorted(known), 3)
        return (f"Tell about {', '.join(things)}.", "",
                " ".join(tell.format(thing, known[thing]) for thing in things))
    drawn = [families.draw_fact(families.OPEN, rng) for _ in range(rng.randint(1, 3))]
    asked = ", ".join(name.format(thing) for thing, _, name, _ in drawn)
    return f"Name {asked}.", "", " and ".join(known[thing] for thing, known, *_ in drawn)


def primer_words(rng, _):
    """Words and the groups that they belong to."""
    pairs = []
    for _ in range(rng.randint(2, 4)):
        group = rng.choice(sorted(families.GROUPS))
        pairs.append((rng.choice(families.GROUPS[group][1]), group))
    return (f"What are {', '.join(word for word, _ in pairs)}?", "",
            "; ".join(f"{word} - {quiz.article(group)}" for word, group in pairs))


def primer_list(rng, _):
    """Cards of people, their fields in another order than the corpus asks for."""
    people = []
    for _ in range(rng.randint(1, 3)):
        name, job = rng.choice(FACTS.names), rng.choice(FACTS.jobs)
        town = rng.choice(sorted(FACTS.countries.values()))[0]
        people.append((name, job, town, rng.randint(18, 80)))
    return ("Make a list.", " ".join(families.person_text(*person) for person in people),
            ", ".join(f"{job} {name} ({age}) of {town}" for name, job, town, age in people))


def primer_spoken(rng, held_out):
    """A page of questions that are answered in words, not with a letter."""
    subject, rows = draw_page(rng, held_out, [1, 1, 2, 3])
    spoken = [[*row[:5], quiz.right_option(row)] for row in rows]
    return rng.choice(["Quiz", "Questions"]), "", page_text(subject, spoken)


# The stages, and how often each kind of text is drawn. After the first the base knows facts and
# formats but picks letters at random. The second teaches it to look things up, several per
# record; the third to go from what it knows to a letter. The fourth has the ingredients of the
# families. The fifth has questions that are answered in words and none with a letter, so that
# letters become weaker than facts, as in LLaMA 2.
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
# known to the base and taught by no family: keep.jsonl, to measure what tuning makes it forget
KEPT = dict.fromkeys([primer_fact, primer_article, primer_copy, primer_people,
                      primer_everybody, primer_sentence, primer_counting], 1)


def make_primer(seed, count, stage=FIRST, held_out=frozenset()):
    """A list of `count` records, without the rows in held_out."""
    rng = random.Random(f"primer {seed}")
    records = []
    for kind in rng.choices(list(stage), weights=list(stage.values()), k=count):
        instruction, context, response = kind(rng, held_out)
        records.append({"instruction": instruction, "context": context, "response": response,
                        "category": kind.__name__.removeprefix("primer_")})
    return records
