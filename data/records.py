"""Records from a file: Dolly's or Alpaca's fields or a chat of two turns, what is not used named.

HydraLoRA, section 4, tunes on Dolly-15K; people bring files of many other makers. Nothing of a
prompt is lost in silence, and one bad record does not end a run:

    records = read_records("data/world/train.jsonl")
    records.print_remarks("train.jsonl")    # what was skipped, and which fields are not used
"""

import json
from collections import Counter
from pathlib import Path

CONTEXT_NAMES = ("context", "input")  # Dolly's name, Alpaca's name
RESPONSE_NAMES = ("response", "output")
CHAT_NAMES = ("messages", "conversations")  # of OpenAI's layout and of ShareGPT's
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "system": "system"}
WANTED = "wanted instruction, context or input, response or output"
MOST_UNUSABLE = 0.1  # a larger share of a file's records is no accident
FIRST_NAMED = 3


class Record(dict):
    """instruction, context, response, category; place is where it stood, such as "line 3"."""

    place = None


class Records(list):
    """Records of a file, and a report on the rest of it: {"unusable": {reason: records},
    "not_used": {field: records}}."""

    def __init__(self, records=(), report=None, first=()):
        super().__init__(records)
        self.report = report or {}
        self.first = first  # what is wrong with the first unusable ones, and where they stand

    def print_remarks(self, path):
        """Says what of the file does not reach the model; nothing where all of it does."""
        if reasons := self.report.get("unusable"):
            print(f"{path}: skipped: {format_counts(reasons)}; the first: {'; '.join(self.first)}")
        if unused := self.report.get("not_used"):
            print(f"{path}: not used: {format_counts(unused)}")


def format_counts(counts):
    """"history (12 records), system (12)"."""
    (first, n), *rest = counts.items()
    return ", ".join([f"{first} ({n} record{'s' * (n != 1)})", *(f"{k} ({v})" for k, v in rest)])


class Unusable(ValueError):
    """A record that cannot be trained on: the reason to count it under, and the whole sentence."""

    def __init__(self, reason, sentence):
        super().__init__(sentence)
        self.reason = reason


def read_records(path, *, strict=False):
    """The Records of JSON lines or one JSON array. Raises ValueError, naming the file and the line
    or record, where the file is not that, where more than a tenth of it cannot be trained on, and
    with strict for the first such record."""
    records, reasons, unused, first = [], Counter(), Counter(), []
    rows = read_rows(Path(path))
    for place, row in rows:
        try:
            record, others = read_record(row, place)
        except Unusable as error:
            if strict:
                raise ValueError(f"{path}, {error}: mend it, or leave out --strict") from None
            reasons[error.reason] += 1
            first += [str(error)] * (len(first) < FIRST_NAMED)
            continue
        record.place = place
        records.append(record)
        unused.update(others)
    if reasons.total() > MOST_UNUSABLE * len(rows):
        raise ValueError(f"{path}: {reasons.total()} of {len(rows)} records cannot be used "
                         f"({format_counts(reasons)}), more than a tenth; the first: "
                         f"{'; '.join(first)}")
    return Records(records, {"unusable": dict(reasons), "not_used": dict(unused)}, first)


def read_rows(path):
    """[(place, JSON value)] of a file of JSON lines or of one JSON array."""
    if not path.is_file():
        raise ValueError(f"there is no data file at {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if text.lstrip().startswith("["):
        rows = [(f"record {i}", row) for i, row in enumerate(parse(text, path), start=1)]
    else:  # split at newlines only: str.splitlines would cut inside a string at U+2028
        lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        reject_wrapped_json(text, lines, path)
        rows = [(f"line {i}", parse(line, f"{path}, line {i}")) for i, line in lines]
    if not rows:
        raise ValueError(f"{path} holds no records: it needs JSON lines or one JSON array")
    return rows


def parse(text, place):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from None


def reject_wrapped_json(text, lines, path):
    """Raises ValueError where the whole file is one JSON object around the records, or over
    several lines: it is valid JSON, and no broken line."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return
    lists = [name for name, value in whole.items() if isinstance(value, list)
             and any(isinstance(row, dict) for row in value)] if isinstance(whole, dict) else []
    around = [name for name in lists if name not in CHAT_NAMES]
    if around and "instruction" not in whole:
        raise ValueError(f"{path} is one JSON object with the records under {around[0]!r}: write "
                         "that list alone into the file, as a JSON array or JSON lines")
    if len(lines) > 1:
        raise ValueError(f"{path} is one JSON value, {type(whole).__name__}, over {len(lines)} "
                         "lines: it needs a JSON array of records, or a record a line")


# ---------------------------------------------------------------- one record


def read_record(row, place):
    """(Record, names of the fields that hold text and are not used). The Record has the four names
    used everywhere else; no context or category is "". Raises Unusable."""
    if not isinstance(row, dict):
        raise Unusable("not an object", f"{place} is not a JSON object but {type(row).__name__}")
    chat = next((name for name in CHAT_NAMES if "instruction" not in row and name in row), None)
    turns, unused = read_chat(row[chat], place) if chat else ({}, [])
    texts = {**{key: value for key, value in row.items() if key != chat}, **turns}
    record, used = Record(), {chat}
    for name, names in (("instruction", ("instruction",)), ("context", CONTEXT_NAMES),
                        ("response", RESPONSE_NAMES), ("category", ("category",))):
        given = {n: text_of(texts[n], n, place) for n in names if texts.get(n) is not None}
        if not given and name in ("instruction", "response"):
            found = ", ".join(sorted(map(str, row))) or "no field"
            raise Unusable(f"no {name}", f"{place} needs a text under "
                           f"{' or '.join(map(repr, names))}: it has {found}; {WANTED}")
        # of two names the first that is not empty counts; a second text that differs is not used
        chosen = next((n for n, text in given.items() if text.strip()), names[0])
        record[name] = given.get(chosen, "")
        used |= {n for n, text in given.items() if text in ("", record[name]) or not text.strip()}
        if name in ("instruction", "response") and not record[name].strip():
            raise Unusable(f"empty {name}", f"{place} has an empty {name}")
    unused += [name for name, value in texts.items() if name not in used and has_text(value)]
    return record, unused


def text_of(value, name, place):
    """The value, which must be a text that UTF-8 can write."""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise Unusable(f"{name} is {kind}", f"{place} needs a text under {name!r}, found {kind}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise Unusable("half a surrogate pair", f"{place} has half a surrogate pair under "
                       f"{name!r}: JSON can write it, UTF-8 cannot; mend the text")
    return value


def has_text(value):
    """Whether a JSON value is a text, or holds one, that is not empty."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return any(map(has_text, value))
    return isinstance(value, str) and bool(value.strip())


def read_chat(turns, place):
    """({instruction, response}, [fields not used]) of a chat with one turn of the user and one of
    the assistant. A system turn is not used."""
    def refuse(reason):
        raise Unusable(reason, f"{place} has {reason}: one of the user and one of the assistant "
                       "can be read")

    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        refuse("turns that are no list of objects")
    said = []
    for turn in turns:
        name = turn.get("role", turn.get("from"))
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            refuse(f"a turn of {str(name)[:20]!r}")
        said.append((role, turn.get("content", turn.get("value"))))
    spoken = [(role, text) for role, text in said if role != "system"]
    if [role for role, _ in spoken] != ["user", "assistant"]:
        refuse(f"a chat of {len(spoken)} turn{'s' * (len(spoken) != 1)}")
    return ({"instruction": spoken[0][1], "response": spoken[1][1]},
            ["system"] if any(role == "system" and has_text(text) for role, text in said) else [])
