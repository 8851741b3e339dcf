"""tools.generate --data: the answers to a whole file of records."""

import json
from pathlib import Path

import pytest
import torch

from hydralora import adapters_disabled
from model import load_llama
from tests.test_tools import make_adapter, refused, run, tuned
from tools import answers
from tools import generate as talk

WORDS = ["the cook", "one two three four five six seven", "a", "the old boat is red", "Sort: dog"]


@pytest.fixture
def adapter(weights, tmp_path):
    return make_adapter(weights, tmp_path / "a.pt", dropout=0.5)


def one_at_a_time(model, tokenizer, prompt, count=6, eos=True):
    """No cache, no batch: the likeliest token, again and again, decoded apart from the prompt (or,
    where that is continued, what the text gains)."""
    ids, new = tokenizer.encode(prompt, eos=eos), []
    for _ in range(count):
        token = torch.tensor([ids + new])
        new.append(model(token)[0, -1].argmax().item())
        if new[-1] == tokenizer.eos_id:
            new.pop()
            break
    before = [] if eos else ids
    text = tokenizer.decode(before + new)[len(tokenizer.decode(before)):]
    return text.removesuffix("\ufffd")


@pytest.fixture
def data(weights, adapter, tokenizer, tmp_path):
    """Records of which every second one expects what the adapter says."""
    model, lines = tuned(weights, adapter), []
    for i, words in enumerate(WORDS):
        prompt = words + ("\nnear the sea" if i == 3 else "")
        expected = one_at_a_time(model, tokenizer, prompt) if i % 2 == 0 else "no"
        lines.append({"instruction": words, "context": prompt[len(words) + 1:],
                      "response": expected or "?", "category": "ab"[i // 3]})
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


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


def test_the_answers_are_in_file_order_and_equal_those_given_one_at_a_time(
        answer, weights, adapter, tokenizer, data):
    status, lines, printed = answer("--batch-size", 2, "--compare")
    assert status == 0
    model = tuned(weights, adapter)
    for row, text in zip(lines, data.read_text().splitlines(), strict=True):
        record = json.loads(text)
        prompt = record["instruction"] + ("\n" + record["context"] if record["context"] else "")
        want = one_at_a_time(model, tokenizer, prompt)
        with adapters_disabled(model):
            base = one_at_a_time(model, tokenizer, prompt)
        expected = record["response"].strip()
        assert row == {**record, "answer": want, "exact": want.strip() == expected,
                       "base_answer": base, "base_exact": base.strip() == expected}
    assert [row["exact"] for row in lines] == [True, False, True, False, True]
    table = [line.split() for line in printed.splitlines()]
    assert ["a", "3", "66.7%", "0.0%"] in table and ["b", "2", "50.0%", "0.0%"] in table
    assert ["all", "5", "60.0%", "0.0%"] in table


def test_without_an_adapter_the_base_answers_and_there_is_no_second_column(
        answer, weights, tokenizer):
    status, lines, _ = answer(base=True)
    assert status == 0 and lines[0].keys() == {"instruction", "context", "response", "category",
                                               "answer", "exact"}
    base = load_llama(weights)[0]
    assert [row["answer"] for row in lines][:3] == [one_at_a_time(base, tokenizer, words)
                                                    for words in WORDS[:3]]


def test_raw_continues_the_prompt(answer, weights, adapter, tokenizer):
    lines = answer("--raw")[1]
    model = tuned(weights, adapter)
    assert lines[0]["answer"] == one_at_a_time(model, tokenizer, WORDS[0], eos=False)


def test_a_batch_holds_records_of_like_length_and_does_not_change_the_answers(
        answer, monkeypatch):
    sizes, inner = [], answers.answer_tokens
    monkeypatch.setattr(answers, "answer_tokens", lambda model, tokenizer, rows, args: sizes.append(
        [len(row) for row in rows]) or inner(model, tokenizer, rows, args))
    one = answer("--batch-size", 1, "--temperature", 1.5, "--seed", 3)[1]
    assert len(sizes) == 5
    sizes.clear()
    assert answer("--batch-size", 3, "--temperature", 1.5, "--seed", 3)[1] == one
    assert [len(batch) for batch in sizes] == [3, 2]
    assert sum(sizes, []) == sorted(sum(sizes, []), reverse=True)
    assert answer("--temperature", 1.5, "--seed", 4)[1] != one
    greedy = answer()[1]
    assert answer("--temperature", 1.5, "--top-p", 1e-6)[1] == greedy != one
    sizes.clear()
    answer()
    assert len(sizes) == 1  # 8 are the default


def stop_after(monkeypatch, count):
    """The next call of answer_tokens after so many stops the run; returns the list of calls."""
    calls, inner = [], answers.answer_tokens

    def stopping(*rest):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(1)
        return inner(*rest)

    monkeypatch.setattr(answers, "answer_tokens", stopping)
    return calls


def test_a_stopped_run_goes_on_and_ends_with_the_same_file(answer, tmp_path, monkeypatch):
    flags = ("--batch-size", 2, "--temperature", 1.0)
    answer(*flags)
    whole = (tmp_path / "answers.jsonl").read_bytes()
    (tmp_path / "answers.jsonl").unlink()
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        status, lines, printed = answer(*flags)
    assert status == 130 and not lines and "the same command goes on from here" in printed
    partial = tmp_path / "answers.jsonl.partial"
    text = partial.read_text()
    assert len(text.splitlines()) == 1 + 4
    partial.write_text(text[:-9])  # torn: one record of the second batch is lost
    calls = stop_after(monkeypatch, 9)
    status, _, printed = answer(*flags)
    assert status == 0 and len(calls) == 2 and "wrote" in printed
    assert (tmp_path / "answers.jsonl").read_bytes() == whole and not partial.exists()


def test_a_run_with_other_settings_does_not_go_on(answer, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        assert answer("--batch-size", 2)[0] == 130
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
    for foreign in ("3", '{"index": 1}', '{"index": "1", "answer": "x"}'):
        partial.write_text(text + foreign + "\n")
        assert "is not of a stopped run" in answer()[2]
    partial.write_text(text + '{"index": 99, "answer": "x"}\n')
    assert "is not of a stopped run" in answer()[2]
    partial.write_text(text)
    assert answer("--batch-size", 3)[0] == 0  # which no answer depends on


def test_what_cannot_be_answered_is_said_before_any_time_is_spent(
        answer, weights, adapter, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(answers, "answer_tokens", lambda *_: pytest.fail("spent"))

    def attempt(*argv):
        return refused(capsys, talk, "--weights", weights, "--adapter", adapter, *argv)

    ours = ("--data", data)
    out = ("--out", tmp_path / "o.jsonl")
    assert "--data needs --out FILE" in attempt(*ours)
    assert "--out needs --data FILE" in attempt("one", *out)
    assert "give prompts or --data" in attempt("one", *ours, *out)
    assert "--show-routing" in attempt(*ours, *out, "--show-routing")
    assert "--batch-size must be at least 1" in attempt(*ours, *out, "--batch-size", 0)
    assert "is the data itself" in attempt(*ours, "--out", data)
    assert "is a folder" in attempt(*ours, "--out", tmp_path)
    assert "no data file" in attempt("--data", tmp_path / "absent", *out)
    message = attempt(*ours, *out, "--max-seq-len", 16)
    assert "records.jsonl, line 1: the prompt's" in message
    assert "exceed --max-seq-len 16: shorten one of them" in message
    assert not (tmp_path / "o.jsonl").exists() and not (tmp_path / "o.jsonl.partial").exists()


def test_a_record_that_cannot_be_used_is_skipped_and_named(answer, data):
    lines = data.read_text().splitlines()
    empty = json.dumps({"instruction": "", "response": "x"})
    data.write_text("\n".join([*lines * 2, empty]))
    status, rows, printed = answer()
    assert status == 0 and len(rows) == 2 * len(lines)
    assert "records.jsonl: skipped: empty instruction (1 record); the first: line 11" in printed


def test_a_second_run_into_one_file_is_refused(answer, tmp_path, capsys, monkeypatch):
    inner, seen = answers.answer_tokens, []

    def meanwhile(*arguments):
        if not seen:  # half way, the same command is sent again
            seen.append("")
            seen[0] = answer()[::2]
        return inner(*arguments)

    monkeypatch.setattr(answers, "answer_tokens", meanwhile)
    assert answer()[0] == 0
    (status, printed), out = seen[0], tmp_path / "answers.jsonl"
    assert status == 2 and f"generate.py: {out} is held by process" in printed
    assert not Path(f"{out}.lock.pid").exists()
