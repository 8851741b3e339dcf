"""MMLU, of HydraLoRA section 4: base and adapter in one harness, with intervals.

Prompts are those of Hendrycks et al. 2021 byte for byte; the answer is the likeliest of
the four letters as the next token. A subject's questions share their first tokens,
header and shots: their keys and values are computed once, and each batch of questions
continues them. The paper prints scores without intervals; these say what a difference
is worth.

    python eval_mmlu.py --adapter runs/hydralora/adapter.pt
    python eval_mmlu.py --compare runs/mmlu.json runs/hydralora/mmlu.json

Shapes: B questions of a batch, P shared tokens, T further tokens, K key/value heads, E
their width, D width, V vocabulary.
"""

import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import WORLD
from data.mmlu import CATEGORY, LETTERS, encode_prompt, letter_ids, read_questions
from hydralora import HydraLinear
from support.base import (
    base_digest,
    check_unchanged,
    load_model_and_adapter,
    print_default_length,
    stated_length,
)
from support.cli import Parser, check_min, comma_list, run_script
from support.device import add_device_flags, autocast, pick_device, pick_dtype
from support.distributed import add_shard_flag, process_group
from support.files import digest, read_json, write_json
from support.jsonl_resume import append_row, open_partial, read_partial, remove_partial
from support.lock import file_lock
from support.output import cell, progress
from support.quantize import add_quantize_flag

QUESTION = {"subject": str, "index": int, "prediction": str, "answer": str, "logprobs": list}
Z = 1.959963984540054  # the normal quantile of a two-sided 95 % interval
MOST_MOVED = 10  # subjects that --compare names
CACHE_POSITIONS = 8192  # of a batch, prefix included: 4 GiB at 7B in bf16

# ---------------------------------------------------------------- four letters


@torch.inference_mode()
def prefix_cache(model, ids):
    """(keys, values), each (1, P, K, E), of the shared tokens, layer by layer."""
    tokens = torch.tensor([ids], device=model.tok_embeddings.weight.device)
    cache = model.make_cache(1, len(ids))
    model.hidden_states(tokens, cache, torch.arange(len(ids), device=tokens.device)[None])
    return cache


@torch.inference_mode()
def letter_logprobs(model, rows, letters, prefix=None):
    """For each list of ids the log-probabilities of the letters as its next token,
    normalised over the vocabulary in fp32. With a prefix from prefix_cache, the rows
    begin with its tokens."""
    device = model.tok_embeddings.weight.device
    start = prefix[0][0].shape[1] if prefix else 0
    ends = torch.tensor([len(row) - start - 1 for row in rows], device=device)
    rests = [torch.tensor(row[start:]) for row in rows]
    tokens = pad_sequence(rests, batch_first=True).to(device)
    if prefix:
        def extend(x):  # (1, P, K, E) -> (B, P + T, K, E)
            return F.pad(x.expand(len(rows), -1, -1, -1), (0, 0, 0, 0, 0, tokens.shape[1]))

        cache = [(extend(keys), extend(values)) for keys, values in prefix]
        positions = torch.arange(start, start + tokens.shape[1], device=device)[None]
        h = model.hidden_states(tokens, cache, positions)
    else:
        h = model.hidden_states(tokens)
    h = h[torch.arange(len(rows), device=device), ends]  # (B, D): of the last token
    total = model.output(h).float().logsumexp(-1, keepdim=True)  # (B, 1)
    return (letter_logits(model, h, letters) - total).tolist()


def letter_logits(model, h, letters):
    """The letters' logits (B, 4) of hidden states h (B, D) in fp32, whatever the
    model's dtype: in bf16 the two best letters are equal in one question of a
    hundred."""
    head = model.output  # with --targets output, a HydraLinear
    weight = getattr(head, "base", head).weight[letters]
    with torch.autocast(h.device.type, enabled=False):
        logits = F.linear(h.float(), weight.float())
        if isinstance(head, HydraLinear):
            logits += head.update(h.float())[:, letters]
    return logits


def score_prompts(model, prompts, letters, *, batch_size, done=(), share_prefix=True):
    """Yields (indices, their log-probabilities) batch by batch, for one subject's
    Prompts.

    Batches depend on the prompts alone, and one whose indices are all in `done` is
    skipped, so a resumed run computes what an uninterrupted one would, bit for bit.
    Without share_prefix every prompt is computed as a whole.
    """
    for shots in sorted({p.shots - p.truncated for p in prompts}, reverse=True):
        group = [i for i, p in enumerate(prompts) if p.shots - p.truncated == shots]
        group.sort(key=lambda i: len(prompts[i].ids), reverse=True)
        # found in the ids: a merge may join the end of the shots to the question
        shared = os.path.commonprefix([prompts[i].ids for i in group])
        # a question has a token of its own
        shared = shared[:len(prompts[group[-1]].ids) - 1]
        prefix = None
        longest = len(prompts[group[0]].ids)
        rows_at_once = max(1, min(batch_size, CACHE_POSITIONS // longest))
        for start in range(0, len(group), rows_at_once):
            batch = group[start:start + rows_at_once]
            if set(batch) <= set(done):
                continue
            if share_prefix and prefix is None:
                prefix = prefix_cache(model, shared)
            rows = [prompts[i].ids for i in batch]
            yield batch, letter_logprobs(model, rows, letters, prefix)


def answer_questions(model, tokenizer, questions, examples, *, batch_size, done, file):
    """Completes `done`, {(subject, index): question}, and appends each new one to the
    file as a line of JSON. Returns the Prompts of all questions."""
    letters, found = letter_ids(tokenizer), []
    total = sum(map(len, questions.values()))
    with progress(total=total, initial=len(done), unit=" questions") as bar:
        for subject, rows in questions.items():
            prompts = [encode_prompt(tokenizer, subject, examples[subject], row,
                                     model.args.max_seq_len) for row in rows]
            found += prompts
            before = {index for name, index in done if name == subject}
            for batch, logprobs in score_prompts(model, prompts, letters, batch_size=batch_size,
                                                 done=before):
                for i, four in zip(batch, logprobs):
                    if not all(map(math.isfinite, four)):
                        raise ValueError(f"{subject}, question {i}: the log-probabilities are "
                                         f"{four}; try --dtype fp32")
                    prediction = LETTERS[four.index(max(four))]
                    done[subject, i] = {"subject": subject, "index": i, "prediction": prediction,
                                        "answer": rows[i][5], "logprobs": four}
                    append_row(file, done[subject, i])
                file.flush()
                right = sum(q["prediction"] == q["answer"] for q in done.values())
                bar.set_postfix_str(f"accuracy {right / len(done):.2%}", refresh=False)
                bar.update(len(done) - bar.n)
    return found


# ---------------------------------------------------------------- intervals and comparisons


def wilson(right, n):
    """Wilson's interval of an accuracy: within [0, 1], and never of no width."""
    p, shrink = right / n, 1 / (1 + Z * Z / n)
    centre = shrink * (p + Z * Z / (2 * n))
    half = shrink * Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def macro_interval(counts):
    """The interval of the mean accuracy over these subjects, each (right, n): normal,
    from the sum of their binomial variances. Two right and two wrong answers more
    (Agresti and Coull 1998) keep the variance of a subject that is all right or all
    wrong from being zero."""
    macro = sum(right / n for right, n in counts) / len(counts)
    padded = [((right + 2) / (n + 4), n) for right, n in counts]
    half = Z * math.sqrt(sum(p * (1 - p) / n for p, n in padded)) / len(counts)
    return [max(0.0, macro - half), min(1.0, macro + half)]


def paired_interval(only_a, only_b, n):
    """The interval of accuracy B minus accuracy A on the same n questions, from how
    many only A and only B got right: Wald's, with half a question more in each cell of
    the 2 x 2 table (Agresti and Min 2005), so that it has a width even where A and B
    agree."""
    difference = (only_b - only_a) / (n + 2)
    half = Z * math.sqrt(((only_a + only_b + 1) / (n + 2) - difference ** 2) / (n + 2))
    return [difference - half, difference + half]


def mcnemar(only_a, only_b):
    """McNemar's exact two-sided p: if A and B were equally good, each question that
    only one of them got right would be a fair coin."""
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2 ** n)


def tally(questions, name_of):
    """{name: (right, n)} in alphabetical order, name_of(subject) being the name."""
    counts = {}
    for q in questions:
        name = name_of(q["subject"])
        right, n = counts.get(name, (0, 0))
        counts[name] = right + (q["prediction"] == q["answer"]), n + 1
    return dict(sorted(counts.items()))


def summarise(questions):
    """Micro and macro accuracy, those of subjects and categories, each with n and
    interval."""
    subjects = tally(questions, lambda subject: subject)
    categories = tally(questions, lambda subject: CATEGORY.get(subject, "uncategorised"))
    right, n = map(sum, zip(*subjects.values()))
    result = {"accuracy": right / n, "n": n,
              "macro": sum(r / m for r, m in subjects.values()) / len(subjects),
              "intervals": {"accuracy": wilson(right, n),
                            "macro": macro_interval(subjects.values())}}
    for key, counts in (("subjects", subjects), ("categories", categories)):
        result[key] = {name: {"accuracy": r / m, "n": m} for name, (r, m) in counts.items()}
        result["intervals"][key] = {name: wilson(r, m) for name, (r, m) in counts.items()}
    return result


def print_summary(result):
    def line(name, n, accuracy, interval):
        print(f"{cell(name, 40)}{n:6}{accuracy:10.2%}   [{interval[0]:.2%}, {interval[1]:.2%}]")

    intervals = result["intervals"]
    print(f"\n{'':40}{'n':>6}{'accuracy':>10}   95 % interval")
    for key in ("subjects", "categories"):
        for name, entry in result[key].items():
            line(name, entry["n"], entry["accuracy"], intervals[key][name])
        print()
    line("macro, the mean of subjects (normal)", result["n"], result["macro"], intervals["macro"])
    line("micro, all questions (Wilson)", result["n"], result["accuracy"], intervals["accuracy"])


def read_result(path):
    """(settings, {(subject, index, answer): right?}) of a file that eval_mmlu.py
    wrote."""
    try:
        result = read_json(path)
        right = {(q["subject"], q["index"], q["answer"]): q["prediction"] == q["answer"]
                 for q in result["questions"]}
        if not right or not all(isinstance(subject, str) for subject, _, _ in right):
            raise ValueError("it needs questions, each with a subject")
        return dict(result["settings"]), right
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of eval_mmlu.py: {error!r}") from error


def compare(path_a, path_b):
    """Prints what result B gains on result A; raises ValueError where their questions
    differ. An older result knows the digest of its questions and shots alone."""
    (settings_a, a), (settings_b, b) = read_result(path_a), read_result(path_b)
    if a.keys() != b.keys():
        raise ValueError(f"{path_a} and {path_b} are not on the same questions: "
                         f"{len(a.keys() - b.keys())} are only in the first, "
                         f"{len(b.keys() - a.keys())} only in the second")
    same = settings_a.get("shots") == settings_b.get("shots")
    for key in ("questions_digest", *["data_digest"] * same):
        digests = {settings[key] for settings in (settings_a, settings_b) if key in settings}
        if len(digests) > 1:
            raise ValueError(f"{path_a} and {path_b} are not on the same questions ({key} "
                             f"{settings_a[key]} and {settings_b[key]})")
    for key in settings_a:
        if settings_a[key] != settings_b.get(key):
            print(f"{key:16}A {settings_a[key]}, B {settings_b.get(key)}")
    n, right_a, right_b = len(a), sum(a.values()), sum(b.values())
    both = sum(a[key] and b[key] for key in a)
    only_a, only_b = right_a - both, right_b - both
    low, high = paired_interval(only_a, only_b, n)
    print(f"A {right_a / n:.2%}, B {right_b / n:.2%} of {n} questions; "
          f"right only in A {only_a}, only in B {only_b}")
    print(f"B - A {100 * (right_b - right_a) / n:+.2f} points, 95 % interval "
          f"[{100 * low:+.2f}, {100 * high:+.2f}] (Agresti-Min); "
          f"McNemar's exact p {mcnemar(only_a, only_b):.3g}")
    moves = {}
    for key in a:
        moves.setdefault(key[0], []).append(b[key] - a[key])
    means = {subject: sum(values) / len(values) for subject, values in moves.items()}
    for subject in sorted(means, key=lambda name: (-abs(means[name]), name))[:MOST_MOVED]:
        if means[subject]:
            print(f"{cell(subject, 40)}{100 * means[subject]:+10.2f} points")


# ---------------------------------------------------------------- the run


def shortened_prompts(prompts, shots):
    """How many shots were dropped, and from how many prompts; how many questions were
    cut too."""
    return {"shots_dropped": sum(shots - p.shots for p in prompts),
            "prompts_shortened": sum(p.shots < shots or p.truncated for p in prompts),
            "prompts_cut": sum(p.truncated for p in prompts)}


def count_overlong(weights, longest, prompts):
    """How many prompts are longer than the model was made for, printed as well; None if
    that length is not known, or if prompts may not exceed it."""
    stated = stated_length(weights)
    if not stated or longest <= stated:
        return None
    count = sum(len(p.ids) > stated for p in prompts)
    print(f"{count} of {len(prompts)} prompts are longer than the {stated} tokens that the model "
          "was made for (max_seq_len in its params.json)")
    return count


def score_questions(args):
    """Answers the questions, from where a stopped run was, and writes args.out."""
    questions, examples = read_questions(args.data, subjects=args.subjects, shots=args.shots,
                                         limit=args.limit)
    model, tokenizer = load_model_and_adapter(
        args.weights, args.adapter, device=args.device, dtype=args.dtype,
        max_seq_len=args.max_seq_len, shard_base=args.shard_base, quantize=args.quantize)
    # what the answers depend on: a stopped run continues only if all of it is the same
    cache_key = {
        "weights_digest": base_digest(model),
        "adapter_digest": digest(args.adapter.read_bytes()) if args.adapter else None,
        "data_digest": digest(questions, examples), "shots": args.shots, "limit": args.limit,
        "subjects": len(questions), "max_seq_len": model.args.max_seq_len, "dtype": args.dtype}
    settings = {"weights": str(args.weights), "adapter": args.adapter and str(args.adapter),
                "data": str(args.data), "device": args.device, "batch_size": args.batch_size,
                "quantize": getattr(model, "quantized", "none"),
                "questions_digest": digest(questions), **cache_key}
    print("\n".join(f"{key:16}{value}" for key, value in settings.items()))
    print_default_length(args.weights, model.args.max_seq_len, args.max_seq_len)
    partial = Path(f"{args.out}.partial")
    done = read_partial(partial, cache_key, columns=QUESTION, name=("subject", "index"))
    before = len(done)
    started = time.perf_counter()
    with open_partial(partial, cache_key, done) as file:
        prompts = answer_questions(model, tokenizer, questions, examples,
                                   batch_size=args.batch_size, done=done, file=file)
    seconds = time.perf_counter() - started
    check_unchanged(model, cache_key["weights_digest"], args.weights, partial)
    answers = [done[key] for key in sorted(done)]
    shortened = shortened_prompts(prompts, args.shots)
    result = {"settings": settings, **summarise(answers), **shortened}
    result["prompts_beyond"] = count_overlong(args.weights, model.args.max_seq_len, prompts)
    result["questions"] = answers
    write_json(args.out, result)
    remove_partial(partial)
    print_summary(result)
    print(f"{shortened['shots_dropped']} shots dropped from {shortened['prompts_shortened']} "
          f"prompts too long for {model.args.max_seq_len} tokens, {shortened['prompts_cut']} of "
          "them cut as well")
    print(f"{len(done) - before} questions in {seconds:.1f} s, "
          f"{(len(done) - before) / seconds:.1f} per second")
    print(f"wrote {args.out}")


def run(args):
    if args.compare:
        compare(*args.compare)
        return
    with (process_group(args.device, args.shard_base), file_lock(f"{args.out}.lock", args.out),
          autocast(args.device, args.dtype)):  # products as in training
        score_questions(args)


def parse_args(argv):
    p = Parser("eval_mmlu.py", __doc__)
    p.add_argument("--weights", type=Path, default=WORLD / "base",
                   help="checkpoint folder in Meta's layout (the embedded world's)")
    p.add_argument("--data", type=Path, default=WORLD / "quiz",
                   help="folder with dev/SUBJECT_dev.csv, test/SUBJECT_test.csv (the world's quiz)")
    p.add_argument("--adapter", type=Path, help="adapter.pt to put on the base (none)")
    p.add_argument("--shots", type=int, default=5, help="solved examples per prompt, 0: none (5)")
    p.add_argument("--subjects", type=comma_list, help="names with commas between (all in --data)")
    p.add_argument("--limit", type=int, help="only the first N questions of each subject (all)")
    p.add_argument("--max-seq-len", type=int, help="tokens per prompt (the checkpoint's)")
    p.add_argument("--batch-size", type=int, default=8, help="questions per forward pass (8)")
    add_device_flags(p)
    add_quantize_flag(p)
    add_shard_flag(p)
    p.add_argument("--out", type=Path, help="result (mmlu.json beside the adapter, or in runs/)")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), type=Path,
                   help="print what result B gains on result A, and measure nothing (off)")
    args = p.parse_args(argv)
    args.out = args.out or (args.adapter.parent if args.adapter else Path("runs")) / "mmlu.json"
    try:
        args.device = pick_device(args.device)
        args.dtype = pick_dtype(args.dtype, args.device)
        check_min(args, shots=0, limit=1, max_seq_len=2, batch_size=1)
        if args.out.is_dir():
            raise ValueError(f"--out {args.out} is a folder: name a file in it")
        args.out = None if args.compare else args.out
    except ValueError as error:
        p.error(str(error))
    return args


def main(argv=None):
    return run_script("eval_mmlu.py", parse_args, run, argv,
                      stopped="stopped; rerun the same command to continue",
                      memory="rerun the same command with a smaller --batch-size to continue")


if __name__ == "__main__":
    sys.exit(main())
