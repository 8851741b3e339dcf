"""data/corpus.py: what is read, what a sequence is, what a batch holds."""

import json

import pytest
import torch

from data.corpus import (
    collate,
    encode_record,
    encode_records,
    hold_out,
    length_batches,
    prompt_text,
    read_records,
    without_duplicates,
)
from tests.conftest import asset

DOLLY = {"instruction": "Name the town.", "context": "Ada lives in Oslo.", "response": "Oslo",
         "category": "closed_qa"}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_json_lines_and_one_array_read_alike_dolly_and_alpaca_fields_too(tmp_path):
    alpaca = {"instruction": DOLLY["instruction"], "input": DOLLY["context"],
              "output": DOLLY["response"], "category": "closed_qa"}
    lines = write(tmp_path / "a.jsonl", f"{json.dumps(DOLLY)}\n\n{json.dumps(alpaca)}\n")
    array = write(tmp_path / "a.json", json.dumps([DOLLY, alpaca], indent=2))
    assert read_records(lines) == read_records(str(array)) == [DOLLY, DOLLY]


def test_context_and_category_may_be_absent(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"instruction": "a", "response": "b", "input": null}')
    assert read_records(path) == [{"instruction": "a", "context": "", "response": "b",
                                   "category": ""}]


def test_a_line_separator_inside_a_text_does_not_cut_the_record(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"instruction": "a\u2028b", "response": "c\x85d"}\n')
    assert read_records(path)[0]["instruction"] == "a\u2028b"


@pytest.mark.parametrize("text, message", [
    ("", "holds no records"), ("[]", "holds no records"),
    ('{"instruction": "a", "response": "b"}\n{"instr', "line 2 is not valid JSON"),
    ('[{"instruction": "a"', "not valid JSON"), ("[" * 100000, "not valid JSON"),
    ('{"instruction": "a", "response": "b"}\n3', "line 2 is not a JSON object but int"),
    ('{"response": "b"}', "line 1 needs a text under 'instruction', found NoneType"),
    ('{"instruction": "a"}', "needs a text under 'response' or 'output'"),
    ('{"instruction": "a", "response": 5}', "found int"),
    ('{"instruction": " ", "response": "b"}', "empty instruction"),
    ('{"instruction": "a", "response": ""}', "empty response"),
    ('[{"instruction": "a", "response": "b"}, {"instruction": "a"}]', "record 2 needs"),
])
def test_a_broken_file_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_records(write(tmp_path / "a.jsonl", text))


def test_a_file_that_is_absent_or_not_utf8_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no data file"):
        read_records(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b'{"instruction": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_records(tmp_path / "b.jsonl")


@pytest.mark.slow
def test_dolly_reads_whole():
    records = read_records(asset("dolly/databricks-dolly-15k.jsonl"))
    assert len(records) == 15011 and len({r["category"] for r in records}) == 8


# ---------------------------------------------------------------- sequences


def test_a_sequence_is_bos_prompt_eos_response_eos(tokenizer):
    ids, start, shortened = encode_record(DOLLY, tokenizer, 100)
    prompt = tokenizer.encode("Name the town.\nAda lives in Oslo.", bos=False)
    response = tokenizer.encode("Oslo", bos=False)
    assert ids == [1] + prompt + [2] + response + [2]
    assert ids[start:] == response + [2] and not shortened


def test_without_a_context_there_is_no_newline():
    assert prompt_text({**DOLLY, "context": ""}) == "Name the town."


def test_a_record_too_long_loses_the_start_of_its_context_only(tokenizer):
    record = {**DOLLY, "context": "Ben is a baker. " * 20 + "Ada lives in Oslo."}
    whole = len(encode_record(record, tokenizer, 1000)[0])
    for limit in range(whole - 1, 30, -7):
        ids, start, shortened = encode_record(record, tokenizer, limit)
        assert len(ids) == limit and shortened
        assert tokenizer.decode(ids[start:]) == "Oslo"
        prompt = tokenizer.decode(ids[:start - 1])
        assert prompt.startswith("Name the town.\n")
        assert record["context"].endswith(prompt.removeprefix("Name the town.\n"))


def test_a_record_whose_instruction_and_response_do_not_fit_is_skipped_and_counted(tokenizer):
    long = {**DOLLY, "response": "bread " * 50}
    sequences, report = encode_records([DOLLY, long, DOLLY], tokenizer, 40)
    assert report == {"records": 2, "shortened": 0, "skipped": 1}
    assert [s.record for s in sequences] == [0, 2]
    with pytest.raises(ValueError, match="none of the 1 records fits max_seq_len 40"):
        encode_records([long], tokenizer, 40)


# ---------------------------------------------------------------- splits and batches


def test_held_out_records_are_drawn_by_seed_and_leave_the_rest():
    records = [{"id": i} for i in range(100)]
    train, val = hold_out(records, 0.05, seed=3)
    assert len(val) == 5 and sorted(r["id"] for r in train + val) == list(range(100))
    assert hold_out(records, 0.05, seed=3) == (train, val) != hold_out(records, 0.05, seed=4)
    assert [len(part) for part in hold_out(records[:2], 0.05, seed=0)] == [1, 1]
    with pytest.raises(ValueError, match="cannot be split"):
        hold_out(records[:1], 0.05, seed=0)


def test_duplicates_across_the_split_are_found_by_prompt_and_response():
    other = {**DOLLY, "category": "another"}
    assert without_duplicates([DOLLY, {**DOLLY, "response": "Rome"}], [other]) == [
        {**DOLLY, "response": "Rome"}]


def sequences_of(tokenizer, lengths):
    records = [{"instruction": "a " * n, "context": "", "response": "b", "category": str(i)}
               for i, n in enumerate(lengths)]
    return encode_records(records, tokenizer, 1000)[0]


def test_every_sequence_comes_once_an_epoch_in_batches_of_like_length(tokenizer):
    lengths = torch.randint(1, 60, (203,), generator=torch.Generator().manual_seed(0)).tolist()
    sequences = sequences_of(tokenizer, lengths)
    batches = length_batches(sequences, 8, torch.Generator().manual_seed(0))
    assert sorted(s.record for batch in batches for s in batch) == list(range(203))
    padded = sum(len(b) * max(len(s.ids) for s in b) for b in batches)
    assert padded < 1.1 * sum(len(s.ids) for s in sequences)  # in file order it is 1.7 times
    again = length_batches(sequences, 8, torch.Generator().manual_seed(0))
    other = length_batches(sequences, 8, torch.Generator().manual_seed(1))
    assert again == batches != other


def test_labels_are_the_response_and_its_eos_at_the_places_before_them(tokenizer):
    batch = sequences_of(tokenizer, [3, 9])
    tokens, real, places, labels = collate(batch)
    width = tokens.shape[1]
    want_places, want_labels = [], []
    for row, s in enumerate(batch):  # the slow twin
        for i in range(len(s.ids) - 1):
            assert tokens[row, i] == s.ids[i]
            if i + 1 >= s.start:
                want_places.append(row * width + i)
                want_labels.append(s.ids[i + 1])
        assert real[row].tolist() == [i < len(s.ids) - 1 for i in range(width)]
    assert places.tolist() == want_places and labels.tolist() == want_labels
    assert tokenizer.decode(labels[:2].tolist()) == "b" and labels[1] == tokenizer.eos_id
