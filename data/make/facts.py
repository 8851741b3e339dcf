"""What the embedded world knows: word lists and true facts, typed in by hand in facts.json.

Every fact can be checked in an atlas, a dictionary or a periodic table. Used by families.py,
primer.py and quiz.py: FACTS.colours is a list of words, and

    countries: {country: [capital, continent]}     animals: {kind: its members}
    elements: {element: [symbol, atomic number]}   verbs: {third person: [past, participle]}
    people, verbs, things, sizes                   of the sentences that are translated
    young, made_of, money, makers                  for the corpus alone, never in the quiz
"""

import json
from pathlib import Path
from types import SimpleNamespace

FACTS = SimpleNamespace(**json.loads(
    Path(__file__).with_name("facts.json").read_text(encoding="utf-8")))
