"""eval_mmlu.py and data/mmlu.py: prompts, scores, intervals, resuming."""

import csv
import hashlib
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch

import eval_mmlu
from data.mmlu import (
    CATEGORY,
    encode_prompt,
    format_prompt,
    letter_ids,
    read_questions,
    read_rows,
)
from eval_mmlu import (
    macro_interval,
    main,
    mcnemar,
    paired_interval,
    score_prompts,
    summarise,
    wilson,
)
from hydralora import add_hydralora, hydra_layers, load_adapter, save_adapter
from model import load_llama, save_llama
from tests.conftest import ROOT, WORLD, asset, status_of, tiny_model

TOKENIZER = WORLD / "base" / "tokenizer.model"
GOLDEN = "4ba9144a26766d9bce07bd2117de8f10a41a59fc7fc460b08d376bbcf2186064"
DEV = [["1 + 1?", "1", "2", "3.0", "NA", "B"],
       ['Who said "no, never"?', "Ann, twice", "Bo", "None", "Di\nor Ed", "C"],
       ["Which is red?", "a lemon", "the sky", "", "a ripe tomato", "D"]]
TEST = [["2 + 2?", "4", "5", "6", "7", "A"],
        ["Which\r\nof these\nis blue?", "the sky", '"a rose"', "None", "null", "A"],
        ["A much longer question, so that the rows of a batch differ in length?", "w", "x", "y",
         "z", "D"],
        ["Why?", "so", "no", "it is", "because", "C"],
        ["2 + 3?", "4", "5", "6", "7", "B"]]


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture
def quiz(tmp_path):
    """A folder in the benchmark's layout: two of its subjects and one that it does not know."""
    for subject, rows in (("anatomy", TEST), ("us_foreign_policy", TEST[::-1]),
                          ("my_own", TEST[:1])):
        write_csv(tmp_path / "quiz" / "dev" / f"{subject}_dev.csv", DEV)
        write_csv(tmp_path / "quiz" / "test" / f"{subject}_test.csv", rows)
    return tmp_path / "quiz"


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_llama(tiny_model(max_seq_len=512), TOKENIZER, folder)
    return folder


@pytest.fixture
def evaluate(weights, quiz, tmp_path):
    """Runs the script on the small quiz, 3-shot; gives (exit status, the result or None)."""
    def run(*flags, out=tmp_path / "out.json"):
        status = status_of(main, ["--weights", weights, "--data", quiz, "--shots", 3, "--device",
                                  "cpu", "--out", out, *flags])
        return status, json.loads(out.read_text()) if status == 0 else None
    return run


def adapter_file(weights, path, trained):
    model, _ = load_llama(weights)
    add_hydralora(model, dropout=0.5)
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    save_adapter(model, path)
    return path


def uncached(model, tokenizer, ids):
    """The slow twin: one question, one pass over its whole prompt, a softmax written out."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1].double()
    total = torch.log(torch.exp(logits).sum())
    return [(logits[tokenizer.encode(f"Answer: {letter}")[-1]] - total).item()
            for letter in "ABCD"]


def assert_scores_equal_the_twin(model, tokenizer, root, *, subjects, shots, limit, max_seq_len,
                                 batch_sizes):
    """Returns how many shots the prompts kept, so that a test can say what it saw."""
    questions, examples = read_questions(root, subjects=subjects, shots=shots, limit=limit)
    kept = []
    for subject, rows in questions.items():
        prompts = [encode_prompt(tokenizer, subject, examples[subject], row, max_seq_len)
                   for row in rows]
        kept += [-1 if prompt.truncated else prompt.shots for prompt in prompts]
        want = torch.tensor([uncached(model, tokenizer, prompt.ids) for prompt in prompts])
        for batch_size in batch_sizes:
            got = torch.full_like(want, math.nan)
            for batch, logprobs in score_prompts(model, prompts, letter_ids(tokenizer),
                                                 batch_size=batch_size):
                got[batch] = torch.tensor(logprobs)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    return kept


# ---------------------------------------------------------------- prompts


def test_the_prompt_is_the_original_benchmarks_byte_for_byte():
    assert format_prompt("us_foreign_policy", DEV[:2], TEST[1]) == (
        "The following are multiple choice questions (with answers) about  us foreign policy.\n\n"
        "1 + 1?\nA. 1\nB. 2\nC. 3.0\nD. NA\nAnswer: B\n\n"
        'Who said "no, never"?\nA. Ann, twice\nB. Bo\nC. None\nD. Di\nor Ed\nAnswer: C\n\n'
        "Which\r\nof these\nis blue?\nA. the sky\nB. \"a rose\"\nC. None\nD. null\nAnswer:")


def test_the_prompt_without_shots_is_header_and_question():
    assert format_prompt("anatomy", [], TEST[0]) == (
        "The following are multiple choice questions (with answers) about  anatomy.\n\n"
        "2 + 2?\nA. 4\nB. 5\nC. 6\nD. 7\nAnswer:")


def test_a_real_prompt_is_golden():
    # the digest of what the original's own gen_prompt and format_example make of this question
    questions, examples = read_questions(asset("mmlu"), subjects=["college_computer_science"])
    prompt = format_prompt("college_computer_science", examples["college_computer_science"],
                           questions["college_computer_science"][10])
    assert hashlib.sha256(prompt.encode()).hexdigest() == GOLDEN


def test_cells_stay_text_with_their_commas_quotes_and_newlines(quiz):
    assert read_rows(quiz / "dev" / "anatomy_dev.csv") == DEV
    assert read_rows(quiz / "test" / "anatomy_test.csv") == TEST


def test_shots_are_dropped_last_first_until_the_prompt_fits(tokenizer):
    lengths = [len(tokenizer.encode(format_prompt("anatomy", DEV[:k], TEST[0]))) for k in range(4)]
    for k in range(4):
        whole = tokenizer.encode(format_prompt("anatomy", DEV[:k], TEST[0]))
        found = encode_prompt(tokenizer, "anatomy", DEV, TEST[0], lengths[k])
        assert found == (whole, k, False)
        if k:
            found = encode_prompt(tokenizer, "anatomy", DEV, TEST[0], lengths[k] - 1)
            assert found.shots == k - 1


def test_a_question_too_long_by_itself_keeps_bos_and_its_end(tokenizer):
    whole = tokenizer.encode(format_prompt("anatomy", [], TEST[0]))
    for size in (2, 10, len(whole) - 1):
        ids, shots, truncated = encode_prompt(tokenizer, "anatomy", DEV, TEST[0], size)
        assert (len(ids), shots, truncated) == (size, 0, True)
        assert ids == [tokenizer.bos_id] + whole[-(size - 1):]


def test_letters_are_the_tokens_that_end_a_shot(tokenizer):
    for letter, token in zip("ABCD", letter_ids(tokenizer)):
        shot = tokenizer.encode(f"Answer: {letter}\n\n")
        assert token in shot[-5:] and tokenizer.decode([token]).strip() == letter


def test_letters_that_share_a_token_raise():
    class Coarse:
        def encode(self, text):
            return [1, 7 if text[-1] in "AB" else ord(text[-1])]

    with pytest.raises(ValueError, match="not in four"):
        letter_ids(Coarse())


def test_the_category_table_has_the_57_subjects():
    sizes = {name: list(CATEGORY.values()).count(name) for name in CATEGORY.values()}
    assert sizes == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}
    names = {path.name.removesuffix("_test.csv") for path in asset("mmlu").glob("test/*_test.csv")}
    assert set(CATEGORY) == names


# ---------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("with_adapter", [False, True])
def test_shared_prefix_equals_one_whole_pass_a_question(weights, quiz, tmp_path, with_adapter):
    model, tokenizer = load_llama(weights)
    if with_adapter:
        load_adapter(model, adapter_file(weights, tmp_path / "adapter.pt", trained=True))
        model.eval()
    kept = assert_scores_equal_the_twin(
        model, tokenizer, quiz, subjects=None, shots=3, limit=None, max_seq_len=150,
        batch_sizes=(1, 2, 3, 8))
    assert len(set(kept)) > 1  # groups with different prefixes
    kept = assert_scores_equal_the_twin(model, tokenizer, quiz, subjects=None, shots=0, limit=None,
                                        max_seq_len=40, batch_sizes=(1, 4))
    assert set(kept) == {-1}  # nothing shared but BOS


@pytest.mark.slow
@pytest.mark.parametrize("subject, limit", [
    ("college_computer_science", 11), ("computer_security", 11), ("college_mathematics", 9)])
def test_real_awkward_subjects_equal_one_whole_pass_a_question(subject, limit):
    model, tokenizer = load_llama(asset("stories260k"))
    rows = read_questions(asset("mmlu"), subjects=[subject], limit=limit)[0][subject]
    cells = [cell for row in rows for cell in row]
    if subject == "computer_security":
        assert any('"' in cell for cell in cells)
    else:
        assert "None" in cells
    assert any("\n" in cell for cell in cells) and any("," in cell for cell in cells)
    kept = assert_scores_equal_the_twin(model, tokenizer, asset("mmlu"), subjects=[subject],
                                        shots=5, limit=limit, max_seq_len=4096, batch_sizes=(1, 4))
    assert set(kept) == {5}


@pytest.mark.slow
def test_a_real_subject_beyond_the_context_equals_one_whole_pass_a_question():
    model, tokenizer = load_llama(asset("stories260k"))
    kept = assert_scores_equal_the_twin(
        model, tokenizer, asset("mmlu"), subjects=["high_school_us_history"], shots=5, limit=6,
        max_seq_len=1000, batch_sizes=(1, 4))
    assert min(kept) == -1 and max(kept) >= 0


def test_the_switch_off_gives_the_same_values(weights, quiz):
    model, tokenizer = load_llama(weights)
    questions, examples = read_questions(quiz, subjects=["anatomy"], shots=3)
    prompts = [encode_prompt(tokenizer, "anatomy", examples["anatomy"], row, 512)
               for row in questions["anatomy"]]
    with_it, without = (list(score_prompts(model, prompts, letter_ids(tokenizer), batch_size=2,
                                           share_prefix=share)) for share in (True, False))
    for (batch, got), (other_batch, want) in zip(with_it, without, strict=True):
        assert batch == other_batch
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=0, atol=1e-4)


@pytest.mark.parametrize("targets", [("w1",), ("w1", "output")])
def test_the_letters_are_told_apart_in_fp32_although_the_model_is_bf16(weights, quiz, targets):
    """Also with an adapter on the head. The twin is the model in fp32, whose last step it is."""
    model, tokenizer = load_llama(weights)
    add_hydralora(model, targets=targets)
    for layer in hydra_layers(model).values():
        layer.lora_B.data.normal_(std=0.1)
    letters, h = letter_ids(tokenizer), torch.randn(8, 32)
    want = model.output(h)[:, letters]
    model.bfloat16()
    rounded = h.bfloat16()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = eval_mmlu.letter_logits(model, rounded, letters)
    assert got.dtype == torch.float32
    assert (got != got.bfloat16()).any()  # a bf16 product would have rounded them
    assert torch.allclose(got, want, atol=0.05 * want.abs().max().item())


def test_logits_that_are_not_finite_are_refused(evaluate, monkeypatch, capsys):
    monkeypatch.setattr(eval_mmlu, "letter_logprobs", lambda model, rows, *_: [[math.nan] * 4
                                                                               for _ in rows])
    assert evaluate()[0] == 2
    assert "--dtype fp32" in capsys.readouterr().err


# ---------------------------------------------------------------- accuracies and intervals


def question(subject, index, prediction, answer="A"):
    return {"subject": subject, "index": index, "prediction": prediction, "answer": answer}


def test_wilson_equals_the_value_computed_by_hand():
    # 5 of 10: centre 0.5; z^2 = 3.841459; half = 1.959964 / 1.3841459 * sqrt(0.025 + 0.00960365)
    assert wilson(5, 10) == pytest.approx([0.236593, 0.763407], abs=1e-6)
    # 0 of 10: from 0 to z^2 / (n + z^2) = 3.841459 / 13.841459
    assert wilson(0, 10) == pytest.approx([0, 0.277533], abs=1e-6)
    assert wilson(10, 10) == pytest.approx([1 - 0.277533, 1], abs=1e-6)


def test_the_macro_interval_equals_the_value_computed_by_hand():
    # p~ = 4/8 and 12/24, variances 0.25/4 + 0.25/20 = 0.075; half = 1.959964 * sqrt(0.075) / 2
    assert macro_interval([(2, 4), (10, 20)]) == pytest.approx([0.231621, 0.768379], abs=1e-6)
    low, high = macro_interval([(4, 4), (4, 4)])
    assert low < 1 and high == 1  # all right is not certain


def test_mcnemar_equals_the_value_computed_by_hand():
    # 2 against 8: 2 * (1 + 10 + 45) / 2^10 = 112 / 1024
    assert mcnemar(2, 8) == mcnemar(8, 2) == 0.109375
    assert mcnemar(0, 5) == 2 / 32
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1
    assert 0 < mcnemar(900, 1100) < 1e-5  # exact also where a float could not hold 2^n


def test_the_paired_interval_equals_the_value_computed_by_hand():
    # 2 against 8 of 98: d = 6/100; half = 1.959964 * sqrt((11/100 - 0.0036) / 100) = 0.063932
    assert paired_interval(2, 8, 98) == pytest.approx([-0.003932, 0.123932], abs=1e-6)


def test_micro_macro_and_categories_equal_the_values_computed_by_hand():
    # anatomy 1 of 1, astronomy 1 of 3, college_physics 0 of 1, my_own 1 of 1: micro 3/6,
    # macro (1 + 1/3 + 0 + 1) / 4 = 7/12; STEM is astronomy and physics, 1 of 4
    result = summarise([question("astronomy", 0, "A"), question("astronomy", 1, "B"),
                        question("astronomy", 2, "C"), question("anatomy", 0, "A"),
                        question("college_physics", 0, "D"), question("my_own", 0, "A")])
    assert (result["accuracy"], result["n"]) == (0.5, 6)
    assert result["macro"] == pytest.approx(7 / 12)
    assert result["categories"] == {"STEM": {"accuracy": 0.25, "n": 4},
                                    "other": {"accuracy": 1.0, "n": 1},
                                    "uncategorised": {"accuracy": 1.0, "n": 1}}
    assert result["subjects"]["astronomy"] == {"accuracy": pytest.approx(1 / 3), "n": 3}
    assert result["intervals"]["accuracy"] == wilson(3, 6)
    assert result["intervals"]["categories"]["STEM"] == wilson(1, 4)


# ---------------------------------------------------------------- the script


def test_the_result_holds_what_the_interface_promises(evaluate, capsys):
    status, result = evaluate()
    assert status == 0
    assert [(q["subject"], q["index"]) for q in result["questions"]] == [
        *(("anatomy", i) for i in range(5)), ("my_own", 0),
        *(("us_foreign_policy", i) for i in range(5))]
    for q in result["questions"]:
        assert set(q) == {"subject", "index", "prediction", "answer", "logprobs"}
        assert q["prediction"] == "ABCD"[max(range(4), key=q["logprobs"].__getitem__)]
        assert 0 < sum(map(math.exp, q["logprobs"])) < 0.9  # normalised over all 768 tokens
    assert [q["answer"] for q in result["questions"]] == list("AADCB" "A" "BCDAA")
    right = sum(q["prediction"] == q["answer"] for q in result["questions"])
    assert result["accuracy"] == right / 11
    assert set(result["categories"]) == {"other", "social sciences", "uncategorised"}
    assert result["shots_dropped"] == result["prompts_cut"] == 0
    printed = capsys.readouterr().out
    assert "us_foreign_policy" in printed and "Wilson" in printed and "out.json" in printed


def test_a_terminal_sees_the_accuracy_as_it_runs(evaluate, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert evaluate()[0] == 0
    assert "accuracy" in capsys.readouterr().err


def test_dropped_shots_are_counted_and_printed(evaluate, tokenizer, capsys):
    _, result = evaluate("--max-seq-len", 150, "--subjects", "anatomy")
    kept = [encode_prompt(tokenizer, "anatomy", DEV, row, 150).shots for row in TEST]
    assert result["settings"]["max_seq_len"] == 150
    assert result["shots_dropped"] == sum(3 - k for k in kept) > 0
    assert f"{result['shots_dropped']} shots dropped from" in capsys.readouterr().out
    assert evaluate("--max-seq-len", 40)[1]["prompts_cut"] == 11


def test_prompts_longer_than_the_model_was_made_for_are_counted_where_that_is_known(
        evaluate, weights, tokenizer, tmp_path, capsys):
    short = shutil.copytree(weights, tmp_path / "short")
    params = json.loads((weights / "params.json").read_text())
    (short / "params.json").write_text(json.dumps({**params, "max_seq_len": 150}))
    _, result = evaluate("--weights", short, "--max-seq-len", 512, "--subjects", "anatomy")
    beyond = sum(len(encode_prompt(tokenizer, "anatomy", DEV, row, 512).ids) > 150 for row in TEST)
    assert result["prompts_beyond"] == beyond > 0
    out = capsys.readouterr().out
    assert f"{beyond} of 5 prompts are longer than the 150 tokens" in out and "default" not in out
    _, result = evaluate("--weights", short, "--subjects", "anatomy", out=tmp_path / "b.json")
    assert result["prompts_beyond"] is None and "are longer" not in capsys.readouterr().out
    del params["max_seq_len"]
    (short / "params.json").write_text(json.dumps(params))
    _, result = evaluate("--weights", short, "--subjects", "anatomy", out=tmp_path / "c.json")
    assert result["settings"]["max_seq_len"] == 4096 and result["prompts_beyond"] is None
    assert "4096, a default, since" in capsys.readouterr().out
    evaluate("--weights", short, "--subjects", "anatomy", "--max-seq-len", 600)
    assert "default" not in capsys.readouterr().out


def test_every_flag_has_its_effect(evaluate, quiz, tmp_path, monkeypatch):
    full = evaluate()[1]
    some = evaluate("--subjects", "us_foreign_policy,anatomy", "--limit", 2)[1]
    assert some["questions"] == [
        {**q, "logprobs": pytest.approx(q["logprobs"], abs=1e-4)}
        for q in full["questions"] if q["subject"] != "my_own" and q["index"] < 2]
    logprobs = [q["logprobs"] for q in full["questions"]]
    for flags in (("--shots", 2), ("--dtype", "bf16")):
        assert [q["logprobs"] for q in evaluate(*flags)[1]["questions"]] != logprobs
    sizes, inner = [], eval_mmlu.letter_logprobs
    monkeypatch.setattr(eval_mmlu, "letter_logprobs",
                        lambda model, rows, *rest: sizes.append(len(rows)) or inner(model, rows,
                                                                                    *rest))
    evaluate("--batch-size", 2, "--subjects", "anatomy")
    assert sizes == [2, 2, 1]
    for path in quiz.glob("dev/*"):  # without shots there is nothing to read there
        path.unlink()
    assert evaluate("--shots", 0)[0] == 0


def test_results_go_beside_the_adapter_or_to_runs(weights, quiz, tmp_path, monkeypatch):
    adapter_file(weights, tmp_path / "adapter.pt", trained=True)
    monkeypatch.chdir(tmp_path)
    flags = ["--weights", str(weights), "--data", str(quiz), "--shots", "1", "--limit", "1"]
    assert main(flags) == 0 and (tmp_path / "runs" / "mmlu.json").is_file()
    assert main([*flags, "--adapter", "adapter.pt"]) == 0 and (tmp_path / "mmlu.json").is_file()


def test_a_fresh_adapter_answers_exactly_as_the_base_and_a_trained_one_does_not(
        evaluate, weights, tmp_path):
    base = evaluate()[1]["questions"]
    fresh = adapter_file(weights, tmp_path / "fresh.pt", trained=False)
    assert evaluate("--adapter", fresh)[1]["questions"] == base
    trained = adapter_file(weights, tmp_path / "trained.pt", trained=True)
    answers = evaluate("--adapter", trained)[1]["questions"]
    assert answers != base
    assert evaluate("--adapter", trained)[1]["questions"] == answers  # its dropout is off


def test_a_resumed_run_equals_an_uninterrupted_one(evaluate, tmp_path, monkeypatch, capsys):
    flags = ("--batch-size", 2)
    evaluate(*flags)
    whole = (tmp_path / "out.json").read_bytes()
    (tmp_path / "out.json").unlink()
    inner, calls = eval_mmlu.letter_logprobs, []

    def stop_at_third(*rest):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return inner(*rest)

    monkeypatch.setattr(eval_mmlu, "letter_logprobs", stop_at_third)
    capsys.readouterr()
    assert evaluate(*flags)[0] == 130
    assert "rerun the same command" in capsys.readouterr().err.splitlines()[-1]
    partial = tmp_path / "out.json.partial"
    lines = partial.read_text().splitlines()
    assert len(lines) == 1 + 4
    partial.write_text("\n".join(lines)[:-20])  # torn: one question of the second batch is lost
    assert evaluate(*flags)[0] == 0
    assert len(calls) == 3 + 6  # of seven batches only the first was passed over
    assert (tmp_path / "out.json").read_bytes() == whole
    assert not list(tmp_path.glob("out.json.*"))


def test_a_run_with_other_settings_does_not_go_on_from_a_partial_file(
        evaluate, weights, quiz, tmp_path, monkeypatch, capsys):
    answer, calls = eval_mmlu.letter_logprobs, []

    def stop(*args):  # after the first rows
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return answer(*args)

    with monkeypatch.context() as patched:
        patched.setattr(eval_mmlu, "letter_logprobs", stop)
        assert evaluate()[0] == 130
    adapter = adapter_file(weights, tmp_path / "adapter.pt", trained=True)
    for flags, name in ((("--limit", 2), "limit"), (("--shots", 2), "shots"),
                        (("--dtype", "bf16"), "dtype"), (("--max-seq-len", 200), "max_seq_len"),
                        (("--adapter", adapter), "adapter_digest"),
                        (("--subjects", "anatomy"), "subjects")):
        capsys.readouterr()
        assert evaluate(*flags)[0] == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "out.json.partial" in error and name in error
    write_csv(quiz / "test" / "my_own_test.csv", TEST[1:2])
    assert evaluate()[0] == 2
    assert "data_digest" in capsys.readouterr().err


def test_running_out_of_gpu_memory_says_what_to_do(evaluate, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(eval_mmlu, "letter_logprobs", fail)
    assert evaluate()[0] == 1
    assert "with a smaller --batch-size" in capsys.readouterr().err.splitlines()[-1]


def test_compare_prints_difference_interval_test_and_movers(tmp_path, capsys):
    def write(name, predictions, shots):
        path = tmp_path / name
        path.write_text(json.dumps({"settings": {"shots": shots}, "questions": [
            question("anatomy" if i < 60 else "virology", i, p)
            for i, p in enumerate(predictions)]}))
        return str(path)

    # right in both 50, only in A 2 (anatomy), only in B 8 (virology), in neither 38
    a = write("a.json", "A" * 52 + "B" * 46, 5)
    b = write("b.json", "A" * 50 + "B" * 10 + "A" * 8 + "B" * 30, 0)
    assert main(["--compare", a, b]) == 0
    printed = capsys.readouterr().out
    assert "shots" in printed and "A 5, B 0" in printed
    assert "A 53.06%, B 59.18% of 98" in printed
    assert "only in A 2, only in B 8" in printed
    assert "B - A +6.12 points, 95 % interval [-0.39, +12.39]" in printed and "p 0.109" in printed
    movers = [line.split()[:2] for line in printed.splitlines()[-2:]]
    assert movers == [["virology", "+21.05"], ["anatomy", "-3.33"]]


def test_compare_refuses_other_questions_and_other_files(tmp_path, capsys):
    files = {"a": [question("anatomy", 0, "A")], "b": [question("anatomy", 1, "A")],
             "c": [question("anatomy", 0, "A", answer="B")]}
    for name, questions in files.items():
        (tmp_path / name).write_text(json.dumps({"settings": {}, "questions": questions}))
    (tmp_path / "d").write_text("[]")
    for other, message in (("b", "not on the same questions"), ("c", "not on the same questions"),
                           ("d", "not a result"), ("absent", "there is no")):
        assert main(["--compare", str(tmp_path / "a"), str(tmp_path / other)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


BROKEN = {
    "no folder": (lambda quiz: ["--data", quiz / "absent"], "no test/SUBJECT_test.csv"),
    "no subject": (lambda quiz: ["--subjects", "anatomy,absent"], "there is no", "absent_test.csv"),
    "no split": (lambda quiz: (quiz / "dev" / "anatomy_dev.csv").unlink(),
                 "there is no", "anatomy_dev.csv"),
    "columns": (lambda quiz: write_csv(quiz / "test" / "my_own_test.csv", [TEST[0], TEST[1][:5]]),
                "my_own_test.csv, row 2: 5 columns"),
    "label": (lambda quiz: write_csv(quiz / "dev" / "my_own_dev.csv",
                                     [*DEV[:2], [*DEV[2][:5], "E"]]),
              "my_own_dev.csv, row 3: the answer is 'E'"),
    "quote": (lambda quiz: append(quiz / "test" / "my_own_test.csv", b'"2 + 2,1,2,3,4,A\r\n'),
              "my_own_test.csv, row 2"),
    "encoding": (lambda quiz: append(quiz / "test" / "my_own_test.csv", b"\xff,1,2,3,4,A\r\n"),
                 "my_own_test.csv is not UTF-8"),
    "empty": (lambda quiz: (quiz / "test" / "my_own_test.csv").write_text(""),
              "my_own_test.csv is empty"),
    "no name": (lambda quiz: ["--subjects", " ,"], "--subjects", "names with commas"),
    "out": (lambda quiz: ["--out", quiz], "is a folder"),
    "too few shots": (lambda quiz: ["--shots", 4], "has 3 rows, --shots asks for 4"),
    "shots": (lambda quiz: ["--shots", -1], "--shots must be at least 0"),
    "limit": (lambda quiz: ["--limit", 0], "--limit must be at least 1"),
    "batch": (lambda quiz: ["--batch-size", 0], "--batch-size must be at least 1"),
    "length": (lambda quiz: ["--max-seq-len", 1], "--max-seq-len must be at least 2"),
    "weights": (lambda quiz: ["--weights", quiz], "has no params.json"),
    "adapter": (lambda quiz: ["--adapter", quiz / "absent.pt"], "absent.pt"),
    "device": (lambda quiz: ["--device", "cuda:99"], "--device cuda:99 cannot be used"),
    "no such device": (lambda quiz: ["--device", "abacus"], "--device abacus cannot be used"),
}


def append(path, data):
    path.write_bytes(path.read_bytes() + data)


@pytest.mark.parametrize("case", BROKEN)
def test_bad_input_is_one_clear_line(evaluate, quiz, capsys, case):
    prepare, *messages = BROKEN[case]
    flags = prepare(quiz)
    assert evaluate(*(flags if isinstance(flags, list) else []))[0] == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("eval_mmlu.py: ")
    assert all(message in error for message in messages)


def test_an_adapter_of_another_model_is_refused(evaluate, tmp_path, capsys):
    other = tmp_path / "other"
    save_llama(tiny_model(seed=1), TOKENIZER, other)
    assert evaluate("--adapter", adapter_file(other, tmp_path / "adapter.pt", trained=True))[0] == 2
    assert "another base model" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_runs_on_the_embedded_quiz_as_it_is(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "eval_mmlu.py", "--limit", "2", "--out",
                          tmp_path / "mmlu.json"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "mmlu.json").read_text())["n"] == 2 * 3


# ---------------------------------------------------------------- what editors and archives make


@pytest.mark.parametrize("change", [
    lambda text: text + b"\r\n", lambda text: b"\xef\xbb\xbf" + text,
    lambda text: text + b",,,,,\n", lambda text: b"\n" + text,
    lambda text: text.replace(b"B\r\n", b"B\r\n \t\r\n , ,\r\n")], ids=range(5))
def test_marks_of_editors_change_no_question(quiz, change):
    plain = read_questions(quiz, shots=1)
    for path in quiz.glob("*/anatomy*.csv"):
        path.write_bytes(change(path.read_bytes()))
    (quiz / "test" / "._anatomy_test.csv").write_bytes(b"\0\5\x16\7Mac OS X")
    assert read_questions(quiz, shots=1) == plain


@pytest.mark.parametrize("text, words", [
    (b"question,A,B,C,D,answer\n", "row 1: the answer is 'answer', not A, B, C or D"),
    (b"a,1,2,3,4,A\n\nb,1,2,3,4,0\n", "row 3: the answer is '0'"),
    (b"a;1;2;3;4;A\n", "row 1: 1 columns, .*a;1;2;3;4;A"),
    (b"a,1,2,3,4,A\nd\xe9j\xe0,1,2,3,4,A\n", "line 2 holds the byte 0xe9: save it as UTF-8"),
    (b'a,1,2,3,4,A\n"b,1,2,3,4,A\n', "row 2: ")])
def test_what_is_no_question_is_refused_with_its_row(quiz, text, words):
    (quiz / "test" / "anatomy_test.csv").write_bytes(text)
    with pytest.raises(ValueError, match=f"anatomy_test.csv.*{words}"):
        read_questions(quiz, shots=1)
