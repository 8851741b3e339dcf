"""data/corpus.py and data/records.py: what is read, what a sequence is, what a batch holds."""

import json
from collections import Counter

import pytest
import torch

import cluster
import train
from data.corpus import (
    Sequence,
    collate,
    cut_by_tokens,
    draw_epoch,
    encode_record,
    encode_records,
    encode_texts,
    length_batches,
    load_train_val,
    prompt_text,
    read_files,
    read_records,
    split_weight,
    train_val_split,
    without_duplicates,
)
from data.records import Record
from tests.conftest import asset

DOLLY = {"instruction": "Name the town.", "context": "Ada lives in Oslo.", "response": "Oslo",
         "category": "closed_qa"}
MINIMAL = {"instruction": "a", "context": "", "response": "b", "category": ""}
EMPTY = {"instruction": "a", "output": ""}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def write_rows(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def fish(count, **more):
    return [{"instruction": f"Name fish {i}.", "response": f"Fish {i}.", **more}
            for i in range(count)]


# ---------------------------------------------------------------- reading


def test_json_lines_and_one_array_read_alike_dolly_and_alpaca_fields_too(tmp_path):
    alpaca = {"instruction": DOLLY["instruction"], "input": DOLLY["context"],
              "output": DOLLY["response"], "category": "closed_qa"}
    lines = write(tmp_path / "a.jsonl", f"{json.dumps(DOLLY)}\n\n{json.dumps(alpaca)}\n")
    array = write(tmp_path / "a.json", json.dumps([DOLLY, alpaca], indent=2))
    assert read_records(lines) == read_records(str(array)) == [DOLLY, DOLLY]


@pytest.mark.parametrize("text, changes", [
    ('{"instruction": "a", "response": "b", "input": null, "history": [{"x": 1}]}', {}),
    ('\ufeff{"instruction": "a\u2028b", "response": "c\x85d"}\n',  # a byte-order mark, separators
     {"instruction": "a\u2028b", "response": "c\x85d"})])
def test_absent_or_other_fields_and_line_separators_in_a_text_are_read(tmp_path, text, changes):
    assert read_records(write(tmp_path / "a.jsonl", text)) == [{**MINIMAL, **changes}]


@pytest.mark.parametrize("text, message", [
    ("", "holds no records"), ("[]", "holds no records"),
    ('{"instruction": "a", "response": "b"}\n{"instr', "line 2 is not valid JSON"),
    ('[{"instruction": "a"', "not valid JSON"), ("[" * 100000, "not valid JSON"),
    ('{"response": "b"}', "line 1 needs a text under 'instruction': it has response; wanted"),
    ('{"instruction": "a"}', "needs a text under 'response' or 'output'"),
    ('[{"instruction": "a", "response": "b"}, {"instruction": "a"}]', "record 2 needs"),
    ('{"data": [{"instruction": "a", "output": "b"}]}', "records under 'data'"),
    ('{"version": 1,\n "rows": [{"a": 1}]}', "records under 'rows'"),
    ('{\n"instruction": "a",\n"output": "b"}', "one JSON value, dict, over 3 lines"),
    ('"text"', "line 1 is not a JSON object but str"),
    ('{"prompt": "a", "completion": "b"}',
     "it has completion, prompt; wanted instruction, context or input, response or output")])
def test_a_broken_file_is_refused_with_its_line_or_layout(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_records(write(tmp_path / "a.jsonl", text))


def test_a_file_that_is_absent_or_not_utf8_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no data file"):
        read_records(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b'{"instruction": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_records(tmp_path / "b.jsonl")


def test_dolly_reads_whole():
    records = read_records(asset("dolly/databricks-dolly-15k.jsonl"))
    assert len(records) == 15011 and len({r["category"] for r in records}) == 8


@pytest.mark.parametrize("row, context, response, not_used", [
    ({"context": "", "input": "The sea.", "output": "a"}, "The sea.", "a", {}),
    ({"context": None, "input": "The sea.", "output": "a"}, "The sea.", "a", {}),
    ({"context": "The lake.", "input": " ", "response": "a"}, "The lake.", "a", {}),
    ({"context": "The lake.", "input": "The lake.", "response": "a"}, "The lake.", "a", {}),
    ({"context": "The lake.", "input": "The sea.", "response": "a"}, "The lake.", "a",
     {"input": 1}),
    ({"response": "", "output": "b"}, "", "b", {}),
    ({"response": "a", "output": "b", "id": 7, "tags": [], "more": {"x": [1, " "]}}, "", "a",
     {"output": 1}),
    ({"response": "a", "system": ["Be brief."], "history": [["Hi.", ""]], "note": ""}, "",
     "a", {"system": 1, "history": 1}),
], ids=str)
def test_every_text_of_a_record_is_used_or_reported(tmp_path, row, context, response, not_used):
    path = write_rows(tmp_path / "a.jsonl", [{"instruction": "Sum it up.", **row}])
    records = read_records(path)
    assert records == [{"instruction": "Sum it up.", "context": context, "response": response,
                        "category": ""}]
    assert records.report["not_used"] == not_used


@pytest.mark.parametrize("row, reason, words", [
    (EMPTY, "empty response", "has an empty response"),
    ({"instruction": " ", "output": "b"}, "empty instruction", "an empty instruction"),
    ({"instruction": "a\ud800", "output": "b"}, "half a surrogate pair", "surrogate"),
    ({"instruction": "a", "output": 5}, "output is int", "found int"),
    ({"instruction": "a", "output": "b", "input": ["x"]}, "input is list", "found list"),
    ({"output": "b"}, "no instruction", "wanted instruction"),
    (7, "not an object", "is not a JSON object but int")], ids=str)
def test_a_bad_record_is_skipped_counted_and_named(tmp_path, capsys, row, reason, words):
    path = write_rows(tmp_path / "a.jsonl", [*fish(15), row, *fish(15), row])
    records = read_records(path)
    assert len(records) == 30 and records.report["unusable"] == {reason: 2}
    assert [r.place for r in records[14:16]] == ["line 15", "line 17"]
    records.print_remarks(path)
    line = capsys.readouterr().out
    assert f"skipped: {reason} (2 records)" in line and words in line
    assert "line 16 " in line and "line 32 " in line
    with pytest.raises(ValueError, match=f"line 16 .*{words}.*--strict"):
        read_records(path, strict=True)


def test_the_first_three_bad_records_are_named_and_more_than_a_tenth_is_refused(tmp_path, capsys):
    records = read_records(write_rows(tmp_path / "a.jsonl", [*[EMPTY] * 5, *fish(45)]))
    records.print_remarks("a.jsonl")
    out = capsys.readouterr().out
    assert "line 3 " in out and "line 4 " not in out
    with pytest.raises(ValueError, match=r"6 of 51 records cannot be used \(empty response"):
        read_records(write_rows(tmp_path / "b.jsonl", [*[EMPTY] * 6, *fish(45)]))


CHAT = [{"role": "user", "content": "Name a fish."}, {"role": "assistant", "content": "Trout."}]
SHAREGPT = [{"from": "human", "value": "Name a fish."}, {"from": "gpt", "value": "Trout."}]


@pytest.mark.parametrize("name, turns", [("messages", CHAT), ("conversations", SHAREGPT)])
def test_a_chat_of_one_question_and_one_answer_is_a_record(tmp_path, name, turns):
    assert read_records(write_rows(tmp_path / "a.jsonl", [{name: turns}])) == [
        {**MINIMAL, "instruction": "Name a fish.", "response": "Trout."}]


def chat(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + turns}


def test_a_longer_chat_and_alpacas_history_and_system_are_read_alike(tmp_path, capsys):
    alpaca = {"instruction": "And a bird.", "input": "", "output": "Heron.",
              "system": "Be brief.", "history": [["Name a fish.", "Trout."]]}
    long = chat("Name a fish.", "Trout.", "And a bird.", "Heron.", system="Be brief.")
    path = write_rows(tmp_path / "a.jsonl", [
        alpaca, long, chat("Name a fish.", "Trout.", "And a bird."), *fish(20)])
    records = read_records(path)
    assert records[0] == records[1] == {
        **MINIMAL, "instruction": "And a bird.", "response": "Heron.", "system": "Be brief.",
        "history": [["Name a fish.", "Trout."]]}
    assert records[2] == {**MINIMAL, "instruction": "Name a fish.", "response": "Trout."}
    records.print_remarks("a.jsonl")
    out = capsys.readouterr().out.splitlines()
    assert out == ["a.jsonl: also used: history (2 records), system (2)",
                   "a.jsonl: not used: last turn of the user (1 record)"]


@pytest.mark.parametrize("turns, words", [
    (CHAT[:1], "do not alternate"), (CHAT[::-1], "do not alternate"), ([], "do not alternate"),
    ([*CHAT, *CHAT[1:]], "do not alternate"), ("hello", "no list of objects"),
    ([*CHAT, {"role": "system", "content": "Stop."}, *CHAT], "do not alternate"),
    (chat("Name a fish.", " ", "And a bird.", "Heron.")["messages"], "an empty turn"),
    ([{"role": "tool", "content": "x"}], "a turn of 'tool'"),
    ([{"role": "user", "content": ["x"]}, CHAT[1]], "found list"),
    ([{"role": "user", "content": ["x"]}, CHAT[1], *CHAT], "found list")], ids=str)
def test_another_chat_is_a_bad_record(tmp_path, turns, words):
    with pytest.raises(ValueError, match=words):
        read_records(write_rows(tmp_path / "a.jsonl", [{"messages": turns}]))


# ---------------------------------------------------------------- sequences


def test_a_sequence_is_bos_prompt_eos_response_eos(tokenizer):
    sequence = encode_record(DOLLY, tokenizer, 100)
    prompt = tokenizer.encode("Name the town.\nAda lives in Oslo.", bos=False)
    response = tokenizer.encode("Oslo", bos=False)
    assert sequence.ids == [1] + prompt + [2] + response + [2]
    assert sequence.ids[sequence.response_start:] == response + [2]
    assert sequence.n_targets == len(response) + 1 and not sequence.shortened
    assert prompt_text({**DOLLY, "context": ""}) == "Name the town."


CONVERSATION = {**MINIMAL, "instruction": "And a bird.", "response": "Heron.",
                "system": "Be brief.", "history": [["Name a fish.", "Trout."]]}


def test_a_conversation_has_one_bos_an_eos_after_each_turn_and_a_loss_on_each_answer(tokenizer):
    sequence = encode_record(CONVERSATION, tokenizer, 100)
    assert sequence.ids == [
        1, 312, 692, 288, 698, 695, 609, 702, 701, 735, 497, 259, 427, 702, 2,  # Be .. a fish.
        285, 280, 706, 697, 702, 2,  # Trout.
        292, 699, 708, 259, 429, 702, 2,  # And a bird.
        392, 265, 323, 702, 2]  # Heron.
    assert sequence.targets == [*range(15, 21), *range(28, 33)] and sequence.n_targets == 11
    texts = ["Be brief.\nName a fish.", "Trout.", "And a bird.", "Heron."]
    assert sequence.ids == [1] + [i for text in texts for i in tokenizer.encode(text, False, True)]
    assert prompt_text(CONVERSATION) == "Be brief.\nName a fish.\nAnd a bird."


def test_a_conversation_too_long_loses_whole_turns_after_the_system_text(tokenizer):
    turns = [[f"Name fish {i}.", f"Fish {i}."] for i in range(6)]
    record = {**CONVERSATION, "history": turns, "context": "The sea is wide. " * 3}
    kept, limit = [], len(encode_record(record, tokenizer, 1000).ids)
    while sequence := encode_record(record, tokenizer, limit):
        kept.append(len(sequence.later_prompts))
        assert len(sequence.ids) <= limit and sequence.shortened == (len(kept) > 1)
        if kept[-1]:  # what is left is whole, and so is the context
            left = {**record, "history": turns[6 - kept[-1]:]}
            assert sequence.ids == encode_record(left, tokenizer, 1000).ids
            assert sequence.n_targets == encode_record(left, tokenizer, 1000).n_targets
        last, limit = sequence, limit - 1
    assert kept == sorted(kept, reverse=True) and set(kept) == set(range(7))
    assert kept.count(0) > 10  # then the context goes
    assert tokenizer.decode(last.ids).startswith("Be brief.\nAnd a bird.\n")


def test_a_record_too_long_loses_the_start_of_its_context_only(tokenizer):
    record = {**DOLLY, "context": "Ben is a baker. " * 20 + "Ada lives in Oslo."}
    whole = len(encode_record(record, tokenizer, 1000).ids)
    for limit in range(whole - 1, 30, -7):
        sequence = encode_record(record, tokenizer, limit)
        ids, start = sequence.ids, sequence.response_start
        assert len(ids) == limit and sequence.shortened
        assert tokenizer.decode(ids[start:]) == "Oslo"
        prompt = tokenizer.decode(ids[:start - 1])
        assert prompt.startswith("Name the town.\n")
        assert record["context"].endswith(prompt.removeprefix("Name the town.\n"))


def test_a_record_whose_instruction_and_response_do_not_fit_is_skipped_and_counted(tokenizer):
    long = {**DOLLY, "response": "bread " * 50}
    sequences, report = encode_records([DOLLY, long, DOLLY], tokenizer, 40)
    assert report == {"records": 2, "shortened": 0, "skipped": 1}
    assert [(s.record, s.place) for s in sequences] == [(0, "record 1"), (2, "record 3")]
    with pytest.raises(ValueError, match="none of the 1 records fits max_seq_len 40"):
        encode_records([long], tokenizer, 40)


def test_all_tokens_of_a_text_to_measure_on_are_targets(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "Ada lives in Oslo."}, {"text": "Oslo"}])
    sequences, report = encode_texts(path, tokenizer, 4)
    assert sequences[0].ids == tokenizer.encode("Ada lives in Oslo.")[:4]
    assert [s.response_start for s in sequences] == [1, 1]
    assert report == {"records": 2, "shortened": 1, "skipped": 0}


# ---------------------------------------------------------------- splits and batches


def test_validation_records_are_drawn_by_seed_and_the_rest_is_for_training():
    records = [{"id": i} for i in range(100)]
    train, val = train_val_split(records, 0.05, seed=3)
    assert len(val) == 5 and sorted(r["id"] for r in train + val) == list(range(100))
    assert train_val_split(records, 0.05, seed=3) == (train, val)
    assert train_val_split(records, 0.05, seed=4) != (train, val)
    assert [len(part) for part in train_val_split(records[:2], 0.05, seed=0)] == [1, 1]


def test_duplicates_of_validation_are_found_by_prompt_and_response():
    other = {**DOLLY, "category": "another"}
    assert without_duplicates([DOLLY, {**DOLLY, "response": "Rome"}], [other]) == [
        {**DOLLY, "response": "Rome"}]
    assert without_duplicates([CONVERSATION], [{**CONVERSATION, "system": "Be long."}])
    assert without_duplicates([CONVERSATION], [{**CONVERSATION, "history": []}])
    assert not without_duplicates([CONVERSATION], [{**CONVERSATION}])


def test_fields_that_are_not_used_are_named_once_with_their_counts(tmp_path, capsys):
    rows = fish(12, hint="Think.") + fish(30) + fish(1, note="Done.")
    path = write_rows(tmp_path / "a.jsonl", rows)
    train, _ = load_train_val([path], None, share=0.1, seed=0, strict=False)
    out = capsys.readouterr().out
    assert out.count("not used: hint (12 records), note (1)") == 1
    assert train.report["not_used"] == {"hint": 12, "note": 1}
    assert read_files([path, path]).report["not_used"] == {"hint": 24, "note": 2}


# ---------------------------------------------------------------- several files


def test_a_weight_follows_the_last_colon_unless_a_file_has_the_whole_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "b.jsonl:2", "")
    assert [split_weight(text) for text in (
        "a.jsonl", "a.jsonl:0.5", "b.jsonl:2", "b.jsonl:2:3", "c:/a.jsonl", "a.jsonl:1.5e0")] == [
        ("a.jsonl", 1), ("a.jsonl", 0.5), ("b.jsonl:2", 1), ("b.jsonl:2", 3), ("c:/a.jsonl", 1),
        ("a.jsonl", 1.5)]
    for number in ("0", "-1", "nan", "inf", "1001"):
        with pytest.raises(ValueError, match="a weight must be above 0"):
            split_weight(f"a.jsonl:{number}")


def test_several_files_are_split_one_by_one_and_each_record_knows_its_own(tmp_path, capsys):
    rows = {"a": fish(40), "b": [{"instruction": f"Name bird {i}.", "output": "x",
                                  "category": "named" if i < 10 else ""} for i in range(20)]}
    paths = [str(write_rows(tmp_path / f"{name}.jsonl", lines)) for name, lines in rows.items()]
    write_rows(tmp_path / "b.jsonl", [*rows["b"], EMPTY])
    train, val = load_train_val(paths, None, share=0.1, seed=0, strict=False)
    assert [(r.file, r["category"]) for r in val] == [(0, "a")] * 4 + [
        (1, "named" if int(r["instruction"][10:-1]) < 10 else "b") for r in val[4:]]
    assert len(val) == 6 and len(train) == 54
    assert [r.file for r in train] == sorted(r.file for r in train)
    assert {r["instruction"] for r in train}.isdisjoint(r["instruction"] for r in val)
    assert train[-1].place == f"{paths[1]}, line 20"
    assert train.report["unusable"] == {"empty response": 1}
    # one file alone is as it always was
    [alone, held_out] = load_train_val(paths[:1], None, share=0.1, seed=0, strict=False)
    assert (alone, held_out) == train_val_split(read_records(paths[0]), 0.1, 0)
    assert {r["category"] for r in alone} == {""} and alone[0].place.startswith("line ")


def test_an_epoch_has_each_file_by_its_weight_drawn_anew_by_the_generator(tokenizer):
    records = [Record(DOLLY, instruction=f"a {i}") for i in range(30)]
    for i, record in enumerate(records):
        record.file = i % 3
    sequences = encode_records(records, tokenizer, 100)[0]
    generator = torch.Generator().manual_seed(0)
    epochs = [Counter(s.record for s in draw_epoch(sequences, [1.5, 2, 0.25], generator))
              for _ in range(30)]
    for drawn in epochs:
        assert sorted(drawn[i] for i in range(0, 30, 3)) == [1] * 5 + [2] * 5
        assert all(drawn[i] == 2 for i in range(1, 30, 3))
        assert sorted(drawn[i] for i in range(2, 30, 3)) == [0] * 8 + [1] * 2
    assert len({tuple(sorted(drawn.items())) for drawn in epochs}) > 25
    assert {i for drawn in epochs for i in drawn} == set(range(30))
    assert len(draw_epoch(sequences[:9], [0.01, 1, 1], generator)) == 7  # a record at least


def sequences_of(tokenizer, lengths):
    records = [{"instruction": "a " * n, "context": "", "response": "b", "category": str(i)}
               for i, n in enumerate(lengths)]
    return encode_records(records, tokenizer, 1000)[0]


def test_every_sequence_comes_once_an_epoch_in_batches_of_similar_length(tokenizer):
    lengths = torch.randint(1, 60, (203,), generator=torch.Generator().manual_seed(0)).tolist()
    sequences = sequences_of(tokenizer, lengths)
    batches = length_batches(sequences, 8, torch.Generator().manual_seed(0))
    assert sorted(s.record for batch in batches for s in batch) == list(range(203))
    padded = sum(len(b) * max(len(s.ids) for s in b) for b in batches)
    assert padded < 1.1 * sum(len(s.ids) for s in sequences)  # in file order it is 1.7 times
    again = length_batches(sequences, 8, torch.Generator().manual_seed(0))
    other = length_batches(sequences, 8, torch.Generator().manual_seed(1))
    assert again == batches != other
    longest = [len(batch[0].ids) for batch in batches]
    assert longest != sorted(longest, reverse=True)  # shuffled, as training wants


def test_batches_for_evaluation_come_longest_first(tokenizer):
    batches = length_batches(sequences_of(tokenizer, [3, 9, 5, 7]), 3)
    assert [[s.record for s in batch] for batch in batches] == [[1, 3, 2], [0]]


def test_labels_are_the_response_and_its_eos_at_the_positions_before_them(tokenizer):
    sequences = [*sequences_of(tokenizer, [3, 9]), encode_record(CONVERSATION, tokenizer, 100)]
    batch = collate(sequences)
    width = batch.tokens.shape[1]
    target_index, labels = [], []
    for row, s in enumerate(sequences):  # the slow twin
        for i in range(len(s.ids) - 1):
            assert batch.tokens[row, i] == s.ids[i]
            if i + 1 >= s.response_start and not (row == 2 and 21 <= i + 1 < 28):
                target_index.append(row * width + i)
                labels.append(s.ids[i + 1])
        assert batch.attention_mask[row].tolist() == [i < len(s.ids) - 1 for i in range(width)]
    assert batch.target_index.tolist() == target_index and batch.labels.tolist() == labels
    assert tokenizer.decode(labels[:2]) == "b" and labels[1] == tokenizer.eos_id


# ---------------------------------------------------------------- the scripts


@pytest.mark.slow
def test_train_and_cluster_skip_a_bad_record_and_strict_refuses_it(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", [*fish(24), EMPTY])
    runs = {train.main: ["--heads", "2", "--rank", "2", "--max-steps", "1", "--out",
                         str(tmp_path / "run")],
            cluster.main: ["--features", "tfidf", "--k-max", "2", "--out",
                           str(tmp_path / "c.json")]}
    for main, flags in runs.items():
        flags += ["--data", str(path), "--device", "cpu"]
        assert main([*flags, "--strict"]) == 2
        assert "line 25 has an empty response" in capsys.readouterr().err
        assert main(flags) == 0
        assert "skipped: empty response (1 record)" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "run.json").read_text())["data"]["train"]
    assert report["records"] == 23 and report["unusable"] == {"empty response": 1}
    assert json.loads((tmp_path / "c.json").read_text())["unusable"] == {"empty response": 1}


def test_rows_are_cut_by_positions_padding_counted_and_never_lost():
    rows = [Sequence([1] * (n + 1), 1, i, "") for i, n in enumerate([30, 90, 10, 50, 50, 7, 120])]
    for tokens, least in ((100, 1), (1, 1), (1000, 3), (64, 9)):
        parts = cut_by_tokens(rows, tokens, least=least)
        assert sorted(s.record for part in parts for s in part) == list(range(7))
        assert len(parts) >= min(least, 7)
        for part in parts:
            widths = [len(s.ids) - 1 for s in part]
            assert widths[0] == max(widths) and (len(part) * widths[0] <= tokens or len(part) == 1)
    assert [len(part) for part in cut_by_tokens(rows, 100)] == [1, 1, 2, 3]
