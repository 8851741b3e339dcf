"""Records in, batches out: the one place that knows what a training sequence looks like.

HydraLoRA, section 4 (recipe of the released script): a record becomes

    BOS, instruction (newline, context), EOS, response, EOS

and the loss is on the response and its EOS only. Used by train.py and cluster.py:

    records = read_records("data/world/train.jsonl")
    sequences, report = encode_records(records, tokenizer, max_seq_len=256)

Shapes: B batch, T tokens, M labels, the tokens of the batch that are to be predicted.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from data.records import Records, read_records, read_rows


def prompt_text(record):
    """The instruction, then a newline and the context when there is one."""
    return record["instruction"] + ("\n" + record["context"] if record["context"] else "")


@dataclass
class Sequence:
    ids: list  # BOS, prompt, EOS, response, EOS
    response_start: int  # index in ids of its first token
    record: int  # which record it came from, in file order
    category: str
    place: str = ""  # of the record in its file, for messages

    @property
    def n_targets(self):
        """How many tokens are to be predicted: the response and its EOS."""
        return len(self.ids) - self.response_start


def encode_record(record, tokenizer, max_seq_len):
    """(ids, start, shortened) of one record, or None when it does not fit.

    A record too long loses the start of its context, never its instruction or response.
    """
    prompt = tokenizer.encode(prompt_text(record))
    response = [tokenizer.eos_id] + tokenizer.encode(record["response"], bos=False, eos=True)
    excess = len(prompt) + len(response) - max_seq_len
    if excess > 0:
        # kept: the prompt's first tokens as far as they are those of the instruction alone
        head = tokenizer.encode(record["instruction"] + "\n")
        keep = len(os.path.commonprefix([head, prompt]))
        if not record["context"] or keep + excess > len(prompt):
            return None
        prompt = prompt[:keep] + prompt[keep + excess:]
    return prompt + response, len(prompt) + 1, excess > 0


def encode_records(records, tokenizer, max_seq_len):
    """(sequences, report): what fits, and how many records were kept, shortened and skipped, with
    what read_records reported. Raises ValueError when nothing is left."""
    sequences, shortened = [], 0
    for index, record in enumerate(records):
        encoded = encode_record(record, tokenizer, max_seq_len)
        if encoded is None:
            continue
        ids, start, cut = encoded
        place = getattr(record, "place", None) or f"record {index + 1}"
        sequences.append(Sequence(ids, start, index, record["category"], place))
        shortened += cut
    if not sequences:
        raise ValueError(f"none of the {len(records)} records fits max_seq_len {max_seq_len}: give "
                         "more of it, or shorter records")
    return sequences, {"records": len(sequences), "shortened": shortened,
                       "skipped": len(records) - len(sequences), **getattr(records, "report", {})}


def encode_texts(path, tokenizer, max_seq_len):
    """(sequences, report) of a file of texts to measure a model on: records, as in training, or
    JSON lines {"text": ...}, read after BOS; of a text too long the end goes."""
    rows = read_rows(Path(path))
    if not any(isinstance(row, dict) and "text" in row for _, row in rows):
        return encode_records(read_records(path), tokenizer, max_seq_len)
    sequences, shortened = [], 0
    for index, (place, row) in enumerate(rows):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}, {place}: no text under 'text', which other lines have")
        ids = tokenizer.encode(text)
        shortened += len(ids) > max_seq_len
        sequences.append(Sequence(ids[:max_seq_len], 1, index, "", place))
    return sequences, {"records": len(sequences), "shortened": shortened, "skipped": 0}


def encode_prompts(records, tokenizer, max_seq_len):
    """(sequences, shortened): BOS and the prompt alone, one for each record in file order; a prompt
    too long keeps its start. Raises ValueError for a prompt without a token of its own."""
    sequences, shortened = [], 0
    for index, record in enumerate(records):
        ids = tokenizer.encode(prompt_text(record))
        if len(ids) < 2:
            raise ValueError(f"record {index + 1} has an empty prompt")
        shortened += len(ids) > max_seq_len
        sequences.append(Sequence(ids[:max_seq_len], len(ids), index, record["category"]))
    return sequences, shortened


def train_val_split(records, share, seed):
    """(training, validation): a share of the records, drawn by seed, at least one of each."""
    if len(records) < 2:
        raise ValueError("one record cannot be split: give more, or a file with --val-data")
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(1, round(share * len(records))), len(records) - 1)
    held = sorted(order[:count])
    kept = sorted(order[count:])
    return [records[i] for i in kept], [records[i] for i in held]


def without_duplicates(records, others):
    """The records whose prompt and response do not stand in others word for word."""
    seen = {(prompt_text(record), record["response"]) for record in others}
    return [r for r in records if (prompt_text(r), r["response"]) not in seen]


def load_train_val(path, val_path, *, share, seed, strict):
    """(training Records, validation Records) of the file at path and that at val_path; without one,
    a share of the first is held out. Training records that stand in both are removed. Prints what
    was removed, skipped or not used. Raises ValueError where none is left."""
    whole = records = read_records(path, strict=strict)
    if val_path:
        val = read_records(val_path, strict=strict)
    else:
        records, held = train_val_split(records, share, seed)
        val = Records(held)
    whole.print_remarks(path)
    val.print_remarks(val_path)
    kept = Records(without_duplicates(records, val), whole.report)
    if not kept:
        raise ValueError(f"every record of {path} stands in the validation data too: give other "
                         "records to one of them")
    if len(kept) < len(records):
        print(f"warning: {len(records) - len(kept)} training records stand in the validation data "
              "too, word for word, and were removed")
    return kept, val


def length_batches(sequences, batch_size, generator=None, pool=50):
    """Lists of sequences of like length, so that little of a batch is padding.

    With a generator: shuffled, then sorted by length within pools of `pool` batches, then the
    batches shuffled, so that an epoch is still random. Without: all sorted, longest first, which
    is what evaluation wants (a batch that does not fit in memory fails at once).
    """
    def by_length(items):
        return sorted(items, key=lambda s: len(s.ids), reverse=True)

    def cut(items):
        return [items[i:i + batch_size] for i in range(0, len(items), batch_size)]

    if generator is None:
        return cut(by_length(sequences))
    shuffled = [sequences[i] for i in torch.randperm(len(sequences), generator=generator).tolist()]
    size = pool * batch_size
    batches = [batch for i in range(0, len(shuffled), size)
               for batch in cut(by_length(shuffled[i:i + size]))]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


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
    """A tensor of the values. Pinned on its way to a CUDA GPU: a copy from ordinary memory would
    first wait for all that the GPU has still to do."""
    tensor = torch.tensor(values)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pad(rows, device="cpu"):
    """(tokens (B, T), real (B, T)) of lists of ids, padded on the right; real is False at padding.
    Being causal, the model never reads the padding."""
    width = max(map(len, rows))
    tokens = to_device([row + [0] * (width - len(row)) for row in rows], device)
    lengths = to_device([[len(row)] for row in rows], device)
    return tokens, torch.arange(width, device=device) < lengths


class Batch(NamedTuple):
    tokens: torch.Tensor  # (B, T)
    attention_mask: torch.Tensor  # (B, T): which tokens are not padding
    target_index: torch.Tensor  # (M,): indices into the flattened (B * T); what follows is a target
    labels: torch.Tensor  # (M,): the target tokens


def collate(sequences, device="cpu"):
    """The Batch of a list of sequences. The places are found here, on the CPU, so that a GPU need
    not stop to count them."""
    tokens, real = pad([s.ids[:-1] for s in sequences], device)
    width = tokens.shape[1]
    places = [row * width + i for row, s in enumerate(sequences)
              for i in range(s.response_start - 1, len(s.ids) - 1)]
    labels = [token for s in sequences for token in s.ids[s.response_start:]]
    return Batch(tokens, real, to_device(places, device), to_device(labels, device))
