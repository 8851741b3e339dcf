"""Reads records from a file: Dolly's or Alpaca's fields, or a chat.

HydraLoRA, section 4, tunes on Dolly-15K; people bring files of many other makers. One
bad record does not end a run, and no text of a record is left out without a message:

    records = read_records("data/world/train.jsonl")
    records.print_remarks("train.jsonl")    # what was skipped, and which fields are not used
"""

import json
from collections import Counter
from pathlib import Path

from data.what_it_is import check_is_file

FIELDS = {"instruction": ("instruction",), "context": ("context", "input"),
          "response": ("response", "output")}  # Dolly's, Alpaca's; and category, a label
REQUIRED = ("instruction", "response")
WANTED = "wanted instruction, context or input, response or output"
CONVERSATION = {"system", "history"}  # Alpaca's names; a chat is read into the same two
CHAT_NAMES = ("messages", "conversations")  # of OpenAI's layout and of ShareGPT's
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "system": "system"}
NO_CATEGORY = "(none)"  # what tables call the records without one
MAX_UNUSABLE = 0.1  # a file with a larger share of unusable records is refused
MOST_NAMES = 20  # of fields in a message
N_NAMED = 3  # unusable records that are named one by one


class Record(dict):
    """instruction, context, response, category, a label. If there is any: system, a text, and
    history, the earlier turns of a chat as [prompt, response] each, oldest first."""

    place = None  # "line 3" of its file
    file = 0  # index of its file, if there are several


class Records(list):
    """Records of a file, and a report on the rest of it: {"unusable": {reason: number
    of records}, "not_used": {field: number of records}, "also_used": {"system" or
    "history": number of records}}."""

    def __init__(self, records=(), report=None, first_unusable=()):
        super().__init__(records)
        self.report = report or {}
        self.first_unusable = first_unusable  # a sentence about each

    def print_remarks(self, path):
        """Prints which records have a system text or a history, and what of the file
        does not reach the model, if anything."""
        also_used = self.report.get("also_used")
        if also_used:
            print(f"{path}: also used: {format_counts(also_used)}")
        unusable = self.report.get("unusable")
        if unusable:
            first = "; ".join(self.first_unusable)
            print(f"{path}: skipped: {format_counts(unusable)}; the first: {first}")
        not_used = self.report.get("not_used")
        if not_used:
            print(f"{path}: not used: {format_counts(not_used)}")


def format_counts(counts):
    """"history (12 records), system (12)"; of many names the first."""
    (first, n), *rest = counts.items()
    more = [f"{short(name)} ({count})" for name, count in rest[:MOST_NAMES]]
    more += ["..."] * (len(rest) > MOST_NAMES)
    return ", ".join([f"{short(first)} ({n} record{'s' * (n != 1)})", *more])


def short(name):
    """A field's name as part of a line."""
    return " ".join(str(name)[:60].split())


class Unusable(ValueError):
    """A record that cannot be trained on; reason is what it is counted under."""

    def __init__(self, reason, sentence):
        super().__init__(sentence)
        self.reason = reason


def read_records(path, *, strict=False):
    """The Records of a file of JSON lines or of one JSON array.

    Raises ValueError, which names file and line, if the file is neither, if more than a
    tenth of its records cannot be used, and with strict if any record cannot.
    """
    records, first_unusable = [], []
    unusable, not_used, also_used = Counter(), Counter(), Counter()
    rows = read_rows(Path(path))
    for place, row in rows:
        try:
            record, others = read_record(row, place)
        except Unusable as error:
            if strict:
                raise ValueError(f"{path}, {error}: correct it, or omit --strict") from None
            unusable[error.reason] += 1
            if len(first_unusable) < N_NAMED:
                first_unusable.append(str(error))
            continue
        record.place = place
        records.append(record)
        not_used.update(others)
        also_used.update(record.keys() & CONVERSATION)
    if unusable.total() > MAX_UNUSABLE * len(rows):
        raise ValueError(f"{path}: {unusable.total()} of {len(rows)} records cannot be used "
                         f"({format_counts(unusable)}), more than a tenth; the first: "
                         f"{'; '.join(first_unusable)}")
    report = {"unusable": dict(unusable), "not_used": dict(not_used)}
    if also_used:
        report["also_used"] = dict(sorted(also_used.items()))
    return Records(records, report, first_unusable)


def read_rows(path):
    """[(place, JSON value)] of a file of JSON lines or of one JSON array."""
    check_is_file(path, "data file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if text.lstrip().startswith("["):
        rows = [(f"record {i}", row) for i, row in enumerate(parse(text, path), start=1)]
    else:
        # split at "\n" only: str.splitlines would also cut at U+2028, inside a string
        lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        reject_wrapped_json(text, len(lines), path)
        rows = [(f"line {i}", parse(line, f"{path}, line {i}")) for i, line in lines]
    if not rows:
        raise ValueError(f"{path} holds no records: it needs JSON lines or one JSON array")
    return rows


def parse(text, place):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from None


def reject_wrapped_json(text, n_lines, path):
    """Raises ValueError if the file is one JSON object with the list of records inside,
    or one JSON value over several lines: valid JSON, but not JSON lines."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(whole, dict) and "instruction" not in whole:
        for name, value in whole.items():
            is_records = isinstance(value, list) and any(isinstance(row, dict) for row in value)
            if is_records and name not in CHAT_NAMES:
                raise ValueError(f"{path} is one JSON object with the records under {name!r:.60}: "
                                 "write that list alone into the file, as a JSON array or "
                                 "JSON lines")
    if n_lines > 1:
        raise ValueError(f"{path} is one JSON value, {type(whole).__name__}, over {n_lines} "
                         "lines: it needs a JSON array of records, or one record per line")


# ---------------------------------------------------------------- one record


def read_record(row, place):
    """(Record, names of the fields whose text is not used). The Record has the four
    names of FIELDS; an absent context or category is "". Raises Unusable, for a text
    that the model would read alone."""
    if not isinstance(row, dict):
        raise Unusable("not an object", f"{place} is not a JSON object but {type(row).__name__}")
    texts, not_used = row, []
    chat = [name for name in CHAT_NAMES if name in row]
    if chat and "instruction" not in row:
        turns, not_used = read_chat(row[chat[0]], place)
        not_used += [name for name in turns if has_text(row.get(name))]
        texts = {**row, **turns}
        del texts[chat[0]]
    record, used = Record(), {"category"}
    for name, spellings in FIELDS.items():
        given = [s for s in spellings if not is_absent(texts.get(s))]
        if not given and name in REQUIRED:
            found = ", ".join(sorted(map(short, row))[:MOST_NAMES]) or "no field"
            raise Unusable(f"no {name}", f"{place} needs a text under "
                           f"{' or '.join(map(repr, spellings))}: it has {found}; {WANTED}")
        filled = [s for s in given if not is_blank(texts[s])]
        if not filled and name in REQUIRED:
            raise Unusable(f"empty {name}", f"{place} has an empty {name}")
        record[name] = text_of(texts[filled[0]], filled[0], place) if filled else ""
        used |= {s for s in given if texts[s] == record[name]}
    record["category"] = label_of(texts.get("category"))
    system, history = texts.get("system"), texts.get("history")
    if isinstance(system, str) and system.strip():
        record["system"] = text_of(system, "system", place)
    if is_history(history):
        record["history"] = [[text_of(text, "history", place) for text in turn]
                             for turn in history]
    used |= record.keys() & CONVERSATION
    others = [name for name, value in texts.items() if name not in used and has_text(value)]
    return record, not_used + others


def is_history(value):
    """Whether a JSON value is a list of [prompt, response], as in Alpaca's layout."""
    return isinstance(value, list) and bool(value) and all(
        isinstance(turn, list) and len(turn) == 2
        and all(isinstance(text, str) and text.strip() for text in turn) for turn in value)


def is_absent(value):
    """Whether a JSON value stands for no text: null, false, NaN, or a list or object
    of nothing."""
    nothing = isinstance(value, (list, dict)) and not any(value)
    return nothing or value is None or value is False or value != value


def is_blank(value):
    return isinstance(value, str) and not value.strip()


def label_of(value):
    """A category as a label: a text as it is, of any other value its JSON, "" of null
    and blanks."""
    if value is None or is_blank(value):
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode(errors="replace").decode()  # no half surrogate pairs


def text_of(value, name, place):
    """The value, which must be a text that UTF-8 can encode."""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise Unusable(f"{name} is {kind}", f"{place} needs a text under {name!r}, found {kind}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise Unusable("half a surrogate pair", f"{place} has half a surrogate pair under "
                       f"{name!r}: JSON can write it, UTF-8 cannot; correct the text")
    return value


def has_text(value):
    """Whether a JSON value is a non-empty text, or contains one."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return any(map(has_text, value))
    return isinstance(value, str) and bool(value.strip())


def read_chat(turns, place):
    """({instruction, response, and if there are any, system and history}, [names of what
    is not used]) of a chat. A last turn of the user has no answer and is not used. Raises
    Unusable unless user and assistant alternate, after a system turn if there is one."""
    def refuse(reason):
        raise Unusable(reason, f"{place} has {reason}: a chat needs turns of user and assistant "
                       "that alternate, and may start with a system turn")

    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        refuse("turns that are no list of objects")
    roles, texts, found = [], [], {}
    for turn in turns:
        name = turn.get("role", turn.get("from"))
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            refuse(f"a turn of {str(name)[:20]!r}")
        roles.append(role)
        texts.append(turn.get("content", turn.get("value")))
    if roles[:1] == ["system"]:
        found["system"] = texts[0]
        roles, texts = roles[1:], texts[1:]
    not_used = []
    if len(roles) > 1 and roles[-1] == "user":
        not_used = ["last turn of the user"]
        roles, texts = roles[:-1], texts[:-1]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        refuse("turns that do not alternate")
    *earlier, found["instruction"], found["response"] = texts
    if any(not text_of(text, "content", place).strip() for text in earlier):
        refuse("an empty turn")
    if earlier:
        found["history"] = [list(turn) for turn in zip(earlier[::2], earlier[1::2])]
    return found, not_used
