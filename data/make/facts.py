"""What the embedded world knows: word lists and true facts, typed in by hand in facts.json.

Every fact can be checked in an atlas, a dictionary or a periodic table. Used by families.py,
primer.py and quiz.py.
"""

import json
from pathlib import Path

FACTS = json.loads(Path(__file__).with_name("facts.json").read_text(encoding="utf-8"))

COUNTRIES = FACTS["countries"]  # country: [capital, continent]
ANIMALS = FACTS["animals"]  # kind: its members
ELEMENTS = FACTS["elements"]  # element: [symbol, atomic number]
COLOURS = FACTS["colours"]
DAYS = FACTS["days"]
MONTHS = FACTS["months"]
OPPOSITES = FACTS["opposites"]
NAMES = FACTS["names"]
JOBS = FACTS["jobs"]

# who does what to what: the sentences that three of the families translate
PEOPLE = FACTS["people"]
THINGS = FACTS["things"]
SIZES = FACTS["sizes"]
VERBS = FACTS["verbs"]  # verb, third person: [past, participle]

# what the corpus asks for and the quiz never does
YOUNG = FACTS["young"]  # animal: its young
MADE_OF = FACTS["made_of"]  # thing: what it is mostly made of
MONEY = FACTS["money"]  # country: its money
MAKERS = FACTS["makers"]  # what somebody is known for: who
