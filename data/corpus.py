"""From records to batches: the one place that knows what a sequence looks like.

HydraLoRA, section 4 (recipe of the released script): a record becomes

    BOS, instruction (newline, context), EOS, response, EOS

and the loss is on the response and its EOS only. A chat goes on with prompt, EOS, response,
EOS, and the loss is on every response and its EOS. Used by train.py and cluster.py:

    records = read_records("data/world/train.jsonl")
    sequences, report = encode_records(records, tokenizer, max_seq_len=256)

Shapes: B batch, T tokens, M targets (the tokens of the batch that are to be predicted).
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from data.records import NO_CATEGORY, Records, read_records, read_rows

MAX_WEIGHT = 1000  # of a file of records: how often an epoch may repeat it


def turns_of(record):
    """[(prompt, response)] of a record, oldest first. A prompt is the instruction, then a
    newline and the context if there is one. The first one starts with the system text. A
    question without a response has the response ""."""
    context = "\n" + record["context"] if record["context"] else ""
    last = (record["instruction"] + context, record.get("response", ""))
    turns = [*record.get("history", []), last]
    prompts, responses = zip(*turns)
    if "system" in record:
        prompts = (record["system"] + "\n" + prompts[0], *prompts[1:])
    return list(zip(prompts, responses))


def prompt_text(record):
    """The prompts of all turns of a record, a newline between two."""
    return "\n".join(prompt for prompt, _ in turns_of(record))


@dataclass
class Sequence:
    ids: list  # BOS, prompt, EOS, response, EOS; each later turn: prompt, EOS, response, EOS
    response_start: int  # index in ids of the first response's first token
    record: int  # index of the record, in file order
    category: str
    place: str = ""  # where the record is in its file, for messages
    shortened: bool = False  # whether something was cut away to fit
    later_prompts: list = ()  # (start, end) in ids of every later prompt and its EOS
    file: int = 0  # index of the record's file, if there are several

    @property
    def targets(self):
        """Indices in ids of the tokens to be predicted: each response and its EOS."""
        starts = [self.response_start, *(end for _, end in self.later_prompts)]
        ends = [*(start for start, _ in self.later_prompts), len(self.ids)]
        return [i for start, end in zip(starts, ends) for i in range(start, end)]

    @property
    def n_targets(self):
        return len(self.targets)


def encode_turns(turns, tokenizer):
    """(ids, [(start, end) of every prompt and its EOS]) of the turns of a record."""
    ids, prompts = [tokenizer.bos_id], []
    for prompt, response in turns:
        start = len(ids)
        ids += tokenizer.encode(prompt, bos=False, eos=True)
        prompts.append((start, len(ids)))
        ids += tokenizer.encode(response, bos=False, eos=True)
    return ids, prompts


def encode_record(record, tokenizer, max_seq_len, index=0):
    """The Sequence of one record, or None if it does not fit.

    A record that is too long loses whole turns of its history, the oldest first, then the
    start of its context, and nothing else.
    """
    ids, prompts = encode_turns(turns_of(record), tokenizer)
    whole, history = len(ids), record.get("history", [])
    while len(ids) > max_seq_len and history:
        history = history[1:]
        ids, prompts = encode_turns(turns_of({**record, "history": history}), tokenizer)
    start, excess = prompts[0][1], len(ids) - max_seq_len
    if excess > 0:
        # keep the prompt's first tokens as far as they are those of the instruction alone
        instruction = prompt_text({**record, "history": [], "context": ""}) + "\n"
        keep = len(os.path.commonprefix([tokenizer.encode(instruction), ids[:start - 1]]))
        if not record["context"] or keep + excess > start - 1:
            return None  # the context is too short to absorb the excess
        ids = ids[:keep] + ids[keep + excess:]
        start -= excess
    place = getattr(record, "place", None) or f"record {index + 1}"
    return Sequence(ids, response_start=start, record=index,
                    category=record["category"] or NO_CATEGORY, place=place,
                    shortened=len(ids) < whole, later_prompts=prompts[1:],
                    file=getattr(record, "file", 0))


def encode_records(records, tokenizer, max_seq_len):
    """(sequences, report) of the records that fit. The report counts them, the
    shortened and the skipped ones, after those that read_records counted. Raises
    ValueError if no record fits."""
    encoded = [encode_record(record, tokenizer, max_seq_len, index)
               for index, record in enumerate(records)]
    sequences = [sequence for sequence in encoded if sequence is not None]
    if not sequences:
        raise ValueError(f"none of the {len(records)} records fits max_seq_len {max_seq_len}: "
                         "increase it, or give shorter records")
    return sequences, {"records": len(sequences),
                       "shortened": sum(sequence.shortened for sequence in sequences),
                       "skipped": len(records) - len(sequences),
                       **getattr(records, "report", {})}


def encode_texts(path, tokenizer, max_seq_len):
    """(sequences, report) of a file of texts to measure a model on: records, as in
    training, or JSON lines {"text": ...}, whose tokens after BOS are all targets. A
    text that is too long loses its end. Raises ValueError if a line has no text."""
    rows = read_rows(Path(path))
    if not any(isinstance(row, dict) and "text" in row for _, row in rows):
        return encode_records(read_records(path), tokenizer, max_seq_len)
    sequences = []
    for index, (place, row) in enumerate(rows):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}, {place}: no text under 'text', which other lines have")
        ids = tokenizer.encode(text)
        sequences.append(Sequence(ids[:max_seq_len], response_start=1, record=index,
                                  category="", place=place,
                                  shortened=len(ids) > max_seq_len))
    return sequences, {"records": len(sequences),
                       "shortened": sum(sequence.shortened for sequence in sequences),
                       "skipped": 0}


def encode_prompts(records, tokenizer, max_seq_len):
    """(sequences, number shortened): BOS and the prompt of each record, in file order.
    A prompt that is too long loses its end. Raises ValueError if a prompt is empty."""
    sequences = []
    for index, record in enumerate(records):
        ids = tokenizer.encode(prompt_text(record))
        if len(ids) < 2:
            raise ValueError(f"record {index + 1} has an empty prompt")
        sequences.append(Sequence(ids[:max_seq_len], response_start=len(ids), record=index,
                                  category=record["category"] or NO_CATEGORY,
                                  shortened=len(ids) > max_seq_len))
    return sequences, sum(sequence.shortened for sequence in sequences)


def train_val_split(records, share, seed):
    """(train, val): val is a random share of the records, drawn by seed. Of two records or
    more each has at least one; both keep the file's order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(records), generator=generator).tolist()
    n_val = min(max(1, round(share * len(records))), len(records) - 1)
    val = [records[i] for i in sorted(order[:n_val])]
    train = [records[i] for i in sorted(order[n_val:])]
    return train, val


def without_duplicates(records, others):
    """The records whose prompts and responses do not occur in others, word for word."""
    seen = {tuple(turns_of(record)) for record in others}
    return [record for record in records if tuple(turns_of(record)) not in seen]


def split_weight(text):
    """(path, weight) of one --data: FILE, or FILE:WEIGHT if there is no file of the whole
    name. Raises ValueError unless the weight is above 0 and at most MAX_WEIGHT."""
    path, colon, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not colon or Path(text).exists():
        return text, 1.0
    if not 0 < weight <= MAX_WEIGHT:
        raise ValueError(f"--data {text}: a weight must be above 0 and at most {MAX_WEIGHT}")
    return path, weight


def read_files(paths, *, strict=False):
    """The Records of one or several files, in order. Prints what was also used, skipped
    or not used. A record of several files knows its own: by index, in its place for
    messages, and as its category if it has none."""
    whole = Records()
    for number, path in enumerate(paths):
        records = read_records(path, strict=strict)
        records.print_remarks(path)
        if len(paths) > 1:
            for record in records:
                record.file = number
                record.place = f"{path}, {record.place}"
                record["category"] = record["category"] or Path(path).stem
        whole += records
        for name, counts in records.report.items():
            whole.report[name] = dict(Counter(whole.report.get(name, {})) + Counter(counts))
    return whole


def load_train_val(paths, val_path, *, share, seed, strict):
    """(train, val): Records of the files and of val_path; without val_path val is a share
    of each file.

    Training records that also occur in val are removed. Prints what was skipped, not
    used or removed. Raises ValueError if no training record is left.
    """
    records = read_files(paths, strict=strict)
    if val_path:
        candidates, val = records, read_files([val_path], strict=strict)
    else:
        candidates, val = [], Records()
        for number, path in enumerate(paths):
            own = [record for record in records if record.file == number]
            if len(own) < 2:
                raise ValueError(f"{path} has one record, which cannot be split: give more, or "
                                 "a file with --val-data")
            kept, held_out = train_val_split(own, share, seed)
            candidates += kept
            val += held_out
    train = Records(without_duplicates(candidates, val), records.report)
    if not train:
        raise ValueError(f"every record of {', '.join(paths)} is in the validation data too: "
                         "give other records to one of them")
    if len(train) < len(candidates):
        print(f"warning: {len(candidates) - len(train)} training records were removed: the "
              "validation data has them too, word for word")
    return train, val


def draw_epoch(sequences, weights, generator):
    """The sequences of one epoch: those of file i weights[i] times. The fraction of a
    weight is a share of the file that is drawn anew at each call; at least one record."""
    drawn = []
    for number, weight in enumerate(weights):
        own = [sequence for sequence in sequences if sequence.file == number]
        drawn += own * int(weight)
        if weight % 1:
            count = max(1, round(weight % 1 * len(own)))
            order = torch.randperm(len(own), generator=generator)[:count]
            drawn += [own[i] for i in order.tolist()]
    return drawn


def length_batches(sequences, batch_size, generator=None, pool=50):
    """Lists of sequences of similar length, so that little of a batch is padding.

    With a generator: shuffled, then sorted by length within pools of `pool` batches,
    then the batches shuffled, so that an epoch is still random. Without: all sorted,
    longest first, for evaluation: a batch that is too large for memory fails at once.
    """
    def chunks(items, size):
        return [items[i:i + size] for i in range(0, len(items), size)]

    def sorted_batches(items):
        longest_first = sorted(items, key=lambda s: len(s.ids), reverse=True)
        return chunks(longest_first, batch_size)

    def shuffle(items):
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    if generator is None:
        return sorted_batches(sequences)
    pools = chunks(shuffle(sequences), pool * batch_size)
    return shuffle([batch for items in pools for batch in sorted_batches(items)])


def cut_by_tokens(sequences, tokens, least=1):
    """The sequences, longest first, in lists of at most so many positions each, padding counted
    (one sequence may be longer); at least `least` lists if there are as many sequences."""
    rows = sorted(sequences, key=lambda s: len(s.ids), reverse=True)
    most = max(1, len(rows) // least)
    parts = []
    while rows:
        width = len(rows[0].ids) - 1  # the last token is only a target
        count = min(most, max(1, tokens // width))
        parts.append(rows[:count])
        rows = rows[count:]
    return parts


def to_device(values, device):
    """A tensor of the values. It is pinned on its way to a CUDA GPU, because a copy
    from ordinary memory first waits for all work that the GPU has left."""
    tensor = torch.tensor(values)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pad(rows, device="cpu"):
    """(tokens (B, T), attention mask (B, T)) of lists of ids, padded on the right. The
    mask is False at padding; the model needs no mask, because it is causal."""
    width = max(map(len, rows))
    tokens = to_device([row + [0] * (width - len(row)) for row in rows], device)
    lengths = to_device([[len(row)] for row in rows], device)
    return tokens, torch.arange(width, device=device) < lengths


class Batch(NamedTuple):
    tokens: torch.Tensor  # (B, T)
    attention_mask: torch.Tensor  # (B, T): False at padding
    target_index: torch.Tensor  # (M,): positions in the flattened (B * T) that predict a target
    labels: torch.Tensor  # (M,): the targets


def collate(sequences, device="cpu"):
    """The Batch of a list of sequences. The target positions are computed on the CPU,
    so that the GPU does not have to wait."""
    tokens, attention_mask = pad([s.ids[:-1] for s in sequences], device)
    width = tokens.shape[1]
    target_index = [row * width + i - 1 for row, s in enumerate(sequences) for i in s.targets]
    labels = [s.ids[i] for s in sequences for i in s.targets]
    return Batch(tokens, attention_mask, to_device(target_index, device),
                 to_device(labels, device))
