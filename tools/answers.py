"""Answers: of one batch of prompts, and of a whole file of records, for scoring by others.

    python -m tools.generate --data data/world/val.jsonl --out answers.jsonl --compare

A line of the output is a JSON object: the record (instruction, context, response, category), its
"answer", and "exact", whether that is the response word for word; after --compare "base_answer"
and "base_exact" as well. An answer does not depend on the other records of its batch.
"""

import json
import time
from pathlib import Path

from data.corpus import Sequence, length_batches, prompt_text, read_records
from hydralora import adapters_disabled, base_fingerprint
from model import generate_tokens
from support.cli import progress
from support.diagnose import model_length
from support.files import digest, write_text
from support.jsonl_resume import append_row, open_partial, read_partial, remove_partial

# ---------------------------------------------------------------- a prompt, a batch


def encode_prompt(model, tokenizer, prompt, args):
    """BOS, prompt, EOS; with --raw no EOS. ValueError where the answer may not fit behind it."""
    ids = tokenizer.encode(prompt) + [tokenizer.eos_id] * (not args.raw)
    if len(ids) + args.max_new_tokens > model.args.max_seq_len:
        length = (f"--max-seq-len {args.max_seq_len}" if args.max_seq_len else
                  model_length(args.weights, model.args.max_seq_len))
        raise ValueError(f"the prompt's {len(ids)} tokens and --max-new-tokens "
                         f"{args.max_new_tokens} exceed {length}: shorten one of them")
    return ids


def text_pieces(tokenizer, tokens, before=()):
    """Yields what each token adds to the text of those before it: "" while a character lacks some
    of its bytes."""
    ids = list(before)
    shown = tokenizer.decode(ids)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        whole = not text.endswith("\ufffd")
        yield text[len(shown):] if whole else ""
        shown = text if whole else shown


def sampling(args):
    return dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                top_p=args.top_p, seed=args.seed)


def answer_tokens(model, tokenizer, rows, args):
    """The new tokens of each row of ids, without the EOS that ended it."""
    new = [[] for _ in rows]
    for tokens in generate_tokens(model, tokenizer, rows, **sampling(args)):
        for row, token in zip(new, tokens):
            if token is not None:
                row.append(token)
    return new


def answer_texts(model, tokenizer, rows, args):
    """What tools.generate prints for each of these prompts alone."""
    return ["".join(text_pieces(tokenizer, new, before=row if args.raw else ()))
            for row, new in zip(rows, answer_tokens(model, tokenizer, rows, args))]


# ---------------------------------------------------------------- a whole file


def encode_file(model, tokenizer, records, args):
    """A Sequence of every record's prompt, all before the first answer is waited for."""
    sequences = []
    for index, record in enumerate(records):
        try:
            ids = encode_prompt(model, tokenizer, prompt_text(record), args)
        except ValueError as error:
            raise ValueError(f"{args.data}, {record.place}: {error}") from None
        sequences.append(Sequence(ids, len(ids), index, record["category"], record.place))
    return sequences


def answer_batches(model, tokenizer, sequences, args, done, file):
    """Completes `done`, {(record's index,): row}, and appends each new row to the file. A batch
    depends on the data alone; one that is done is passed over."""
    with progress(total=len(sequences), initial=len(done), unit=" records") as bar:
        for batch in length_batches(sequences, args.batch_size):
            if all((s.record,) in done for s in batch):
                continue
            rows = [s.ids for s in batch]
            found = {"answer": answer_texts(model, tokenizer, rows, args)}
            if args.compare:
                with adapters_disabled(model):
                    found["base_answer"] = answer_texts(model, tokenizer, rows, args)
            for i, s in enumerate(batch):
                row = {"index": s.record, **{name: texts[i] for name, texts in found.items()}}
                if (s.record,) not in done:
                    append_row(file, row)
                done[s.record,] = row
            file.flush()
            bar.update(len(done) - bar.n)


def same(answer, expected):
    """Word for word; what stands around the whole does not count."""
    return answer.strip() == expected.strip()


def judged(record, row):
    """The line of a record: what it holds, the answers, and which of them are the expected one."""
    line = {**record, "answer": row["answer"], "exact": same(row["answer"], record["response"])}
    if "base_answer" in row:
        line.update(base_answer=row["base_answer"],
                    base_exact=same(row["base_answer"], record["response"]))
    return line


def print_exact(lines):
    """The share of exact answers by category and in all."""
    marks = [mark for mark in ("exact", "base_exact") if mark in lines[0]]
    print(f"\n{'category':24}{'records':>8}{'exact':>8}" + f"{'base':>8}" * (len(marks) - 1))
    for category in [*sorted({line["category"] for line in lines} - {""}), None]:
        part = [line for line in lines if category in (None, line["category"])]
        print(f"{category or 'all':24}{len(part):8}"
              + "".join(f"{sum(line[mark] for line in part) / len(part):8.1%}" for mark in marks))


def answer_file(model, tokenizer, args):
    """Answers every record of args.data, from where a stopped run was, and writes args.out."""
    records = read_records(args.data)
    records.print_remarks(args.data)
    sequences = encode_file(model, tokenizer, records, args)
    # what the answers depend on; the batch size is not among it
    settings = {"weights_digest": digest(base_fingerprint(model)),
                "adapter_digest": digest(args.adapter.read_bytes()) if args.adapter else None,
                "data_digest": digest([*map(dict, records)]), "dtype": args.dtype,
                "raw": args.raw, "compare": args.compare, **sampling(args)}
    columns = {"index": int, "answer": str, **({"base_answer": str} if args.compare else {})}
    partial = Path(f"{args.out}.partial")
    done = read_partial(partial, settings, columns=columns, name=("index",))
    if not set(done) <= {(i,) for i in range(len(records))}:
        raise ValueError(f"{partial} is not of a stopped run: delete it, or choose another --out")
    before, started = len(done), time.perf_counter()
    with open_partial(partial, settings, done) as file:
        answer_batches(model, tokenizer, sequences, args, done, file)
    seconds = time.perf_counter() - started
    lines = [judged(record, done[i,]) for i, record in enumerate(records)]
    print_exact(lines)
    write_text(args.out, "".join(json.dumps(line) + "\n" for line in lines))
    remove_partial(partial)
    print(f"\nwrote {len(lines)} answers to {args.out}, {len(lines) - before} of them new, in "
          f"{seconds:.1f} s")
