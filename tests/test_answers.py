"""tools.generate --data: the answers to a whole file of records."""

import json

import pytest

from data.corpus import encode_record
from hydralora import adapters_disabled
from model import load_llama
from tests.test_tools import greedy, make_adapter, refused, run, slow_answer, tuned
from tools import generate as talk

WORDS = ["the cook", "one two three four five six seven", "a", "the old boat is red", "Sort: dog"]


@pytest.fixture
def adapter(weights, tmp_path):
    return make_adapter(weights, tmp_path / "a.pt", dropout=0.5)


@pytest.fixture
def data(weights, adapter, tokenizer, tmp_path):
    """Records of which every second one expects what the adapter says."""
    model, lines = tuned(weights, adapter), []
    for i, words in enumerate(WORDS):
        context = "near the sea" if i == 3 else ""
        expected = slow_answer(model, tokenizer, words + ("\n" + context) * bool(context))
        lines.append({"instruction": words, "context": context, "category": "ab"[i // 3],
                      "response": (expected if i % 2 == 0 else "no") or "?"})
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def batches(monkeypatch):
    """batches(act): from now on the lengths of the prompts of each batch; before each
    act(number of batches before it) is called."""
    inner = talk.generate_ids

    def count(act=lambda number: None):
        found = []

        def counted(model, tokenizer, ids, **sampling):
            found.append([len(row) for row in ids])
            act(len(found) - 1)
            return inner(model, tokenizer, ids, **sampling)

        monkeypatch.setattr(talk, "generate_ids", counted)
        return found
    return count


def stop_at(count):
    def act(number):
        if number == count:
            raise KeyboardInterrupt
    return act


@pytest.fixture
def answer(weights, adapter, data, tmp_path, capsys):
    """answer(flags) -> (exit status, lines of the file, what was printed on both channels)."""
    def call(*flags, out="answers.jsonl", base=False):
        capsys.readouterr()
        status = run(talk, "--weights", weights, *([] if base else ["--adapter", adapter]),
                     "--data", data, "--out", tmp_path / out, "--max-new-tokens", 6, *flags)
        printed = capsys.readouterr()
        path = tmp_path / out
        lines = path.read_text().splitlines() if path.exists() else []
        return status, [json.loads(line) for line in lines], printed.out + printed.err
    return call


def test_answers_are_in_file_order_and_equal_those_to_each_prompt_alone(
        answer, weights, adapter, tokenizer, data):
    status, lines, printed = answer("--batch-size", 2, "--compare")
    assert status == 0
    model = tuned(weights, adapter)
    for row, text in zip(lines, data.read_text().splitlines(), strict=True):
        record = json.loads(text)
        prompt = record["instruction"] + ("\n" + record["context"] if record["context"] else "")
        want = slow_answer(model, tokenizer, prompt)
        with adapters_disabled(model):
            base = slow_answer(model, tokenizer, prompt)
        expected = record["response"].strip()
        assert row == {**record, "answer": want, "exact": want.strip() == expected,
                       "base_answer": base, "base_exact": base.strip() == expected,
                       "cut": row["cut"], "base_cut": row["base_cut"]}
    assert [row["exact"] for row in lines] == [True, False, True, False, True]
    table = [line.split() for line in printed.splitlines()]
    assert ["a", "3", "66.7%", "0.0%"] in table and ["b", "2", "50.0%", "0.0%"] in table
    assert ["all", "5", "60.0%", "0.0%"] in table


def test_without_an_adapter_the_base_answers_and_there_is_no_second_column(
        answer, weights, tokenizer):
    status, lines, _ = answer(base=True)
    assert status == 0 and lines[0].keys() == {"instruction", "context", "response", "category",
                                               "answer", "cut", "exact"}
    base = load_llama(weights)[0]
    assert [row["answer"] for row in lines][:3] == [slow_answer(base, tokenizer, words)
                                                    for words in WORDS[:3]]


def test_the_last_prompt_of_a_conversation_is_answered_after_its_earlier_turns(
        answer, weights, adapter, tokenizer, data):
    record = {"instruction": "And 4?", "context": "", "response": "x", "category": "",
              "system": "Count.", "history": [["What is 3?", "It is 3."]]}
    data.write_text(json.dumps(record))
    ids = encode_record(record, tokenizer, 128).ids
    prompt = ids[:-len(tokenizer.encode("x", bos=False, eos=True))]
    new = greedy(tuned(weights, adapter), tokenizer, prompt, 6)
    (row,) = answer()[1]
    assert row.items() >= {**record, "answer": talk.text_of(tokenizer, new)}.items()


def test_raw_continues_the_prompt(answer, weights, adapter, tokenizer):
    want = slow_answer(tuned(weights, adapter), tokenizer, WORDS[0], raw=True)
    assert answer("--raw")[1][0]["answer"] == want and want.startswith(" ")


def test_a_batch_holds_records_of_like_length_and_does_not_change_the_answers(answer, batches):
    hot = ("--temperature", 1.5, "--seed")
    sizes = batches()
    one = answer("--batch-size", 1, *hot, 3)[1]
    assert len(sizes) == 5
    sizes = batches()
    assert answer("--batch-size", 3, *hot, 3)[1] == one
    assert [len(batch) for batch in sizes] == [3, 2]
    assert sum(sizes, []) == sorted(sum(sizes, []), reverse=True)
    assert answer(*hot, 4)[1] != one
    sizes = batches()
    assert answer()[1] == answer(*hot, 3, "--top-p", 1e-6)[1] != one
    assert len(sizes) == 2  # 8 are the default


def test_an_interrupted_run_resumes_and_ends_with_the_same_file(answer, tmp_path, batches):
    flags = ("--batch-size", 2, "--temperature", 1.0)
    answer(*flags)
    whole = (tmp_path / "answers.jsonl").read_bytes()
    (tmp_path / "answers.jsonl").unlink()
    batches(stop_at(2))
    status, lines, printed = answer(*flags)
    assert status == 130 and not lines and "rerun the same command to continue" in printed
    partial = tmp_path / "answers.jsonl.partial"
    text = partial.read_text()
    assert len(text.splitlines()) == 1 + 4
    partial.write_text(text[:-9])  # torn: one record of the second batch is lost
    batches(stop_at(1))
    assert answer(*flags)[0] == 130
    calls = batches()
    status, _, printed = answer(*flags)
    assert status == 0 and len(calls) == 1 and "wrote" in printed
    assert (tmp_path / "answers.jsonl").read_bytes() == whole and not partial.exists()


def test_a_run_with_other_settings_is_not_resumed(answer, data, tmp_path, batches):
    batches(stop_at(1))
    assert answer("--batch-size", 2)[0] == 130
    batches()
    for flags, name in [(["--max-new-tokens", 5], "max_new_tokens"), (["--seed", 1], "seed"),
                        (["--temperature", 1], "temperature"), (["--top-p", 0.5], "top_p"),
                        (["--raw"], "raw"), (["--compare"], "compare"),
                        (["--dtype", "bf16"], "dtype")]:
        status, _, printed = answer(*flags)
        assert status == 2 and f"{name}: finish it" in printed
    assert "another adapter_digest" in answer(base=True)[2]
    before = data.read_text()
    data.write_text(before.replace("the cook", "the cooks"))
    assert "another data_digest" in answer()[2]
    data.write_text(before)
    partial = tmp_path / "answers.jsonl.partial"
    text = partial.read_text()
    for foreign in ("3", '{"index": 1}', '{"index": "1", "answer": "x"}',
                    '{"index": 99, "answer": "x"}'):
        partial.write_text(text + foreign + "\n")
        assert "is not of a" in answer()[2]
    partial.write_text(text)
    assert answer("--batch-size", 3)[0] == 0  # which no answer depends on


def test_impossible_flags_and_too_long_records_are_refused_before_the_first_answer(
        weights, adapter, data, tmp_path, capsys, batches):
    batches(lambda number: pytest.fail("generated"))

    def attempt(*argv):
        return refused(capsys, talk, "--weights", weights, "--adapter", adapter, *argv)

    out = ("--out", tmp_path / "o.jsonl")
    both = ("--data", data, *out)
    for flags in (["--data", data], ["one", *out]):
        assert "--data FILE and --out FILE need one another" in attempt(*flags)
    assert "give prompts or --data" in attempt("one", *both)
    assert "--show-routing" in attempt(*both, "--show-routing")
    assert "--batch-size must be at least 1" in attempt(*both, "--batch-size", 0)
    assert "is also read" in attempt("--data", data, "--out", data)
    assert "is a folder: name" in attempt("--data", data, "--out", tmp_path)
    assert "no data file" in attempt("--data", tmp_path / "absent", *out)
    message = attempt(*both, "--max-seq-len", 16)
    assert "records.jsonl, line 1: the prompt's" in message
    assert "exceed --max-seq-len 16: shorten one of them" in message
    assert not (tmp_path / "o.jsonl").exists() and not (tmp_path / "o.jsonl.partial").exists()


def test_an_unusable_record_is_skipped_and_named(answer, data):
    lines = data.read_text().splitlines()
    empty = json.dumps({"instruction": "", "response": "x"})
    data.write_text("\n".join([*lines * 2, empty]))
    status, rows, printed = answer()
    assert status == 0 and len(rows) == 2 * len(lines)
    assert "records.jsonl: skipped: empty instruction (1 record); the first: line 11" in printed


def test_a_second_run_into_one_file_is_refused(answer, tmp_path, batches):
    seen = []
    # half way, the same command is given again
    batches(lambda number: seen.append(answer()) if number == 0 else None)
    assert answer()[0] == 0
    status, _, printed = seen[0]
    assert status == 2 and f"generate.py: {tmp_path / 'answers.jsonl'} is held by" in printed
