"""MMLU, the benchmark of HydraLoRA section 4: base and adapter in one harness, with intervals.

Prompts are those of Hendrycks et al. 2021 byte for byte; the answer is the likeliest of the four
letters as the next token. A subject's questions share their first tokens, header and shots: their
keys and values are computed once, and each batch of questions continues them.

    python eval_mmlu.py --adapter runs/hydralora/adapter.pt
    python eval_mmlu.py --compare runs/mmlu.json runs/hydralora/mmlu.json

Shapes: B questions of a batch, P shared tokens, T further tokens, K key/value heads, E their width,
D width, V vocabulary.
"""

import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import WORLD
from data.mmlu import LETTERS, encode_prompt, letter_ids, read_questions
from hydralora import base_fingerprint
from support.cli import Parser, check_min, progress, run_script
from support.device import add_device_flags, pick_device, pick_dtype
from support.diagnose import explained, print_default_length, stated_length
from support.distributed import add_shard_flag, process_group
from support.files import digest, write_json
from support.jsonl_resume import append_row, open_partial, read_partial, remove_partial
from support.lock import file_lock
from support.run_folder import load_model_and_adapter
from support.scores import compare, print_summary, summarise

QUESTION = {"subject": str, "index": int, "prediction": str, "answer": str, "logprobs": list}


@torch.inference_mode()
def prefix_cache(model, ids):
    """(keys, values), each (1, P, K, E), of the shared tokens, layer by layer."""
    tokens = torch.tensor([ids], device=model.tok_embeddings.weight.device)
    cache = model.make_cache(1, len(ids))
    model.hidden_states(tokens, cache, torch.arange(len(ids), device=tokens.device)[None])
    return cache


@torch.inference_mode()
def letter_logprobs(model, rows, letters, prefix=None):
    """For each list of ids the log-probabilities of the letters as its next token, normalised over
    the vocabulary in fp32. With a prefix from prefix_cache, the rows begin with its tokens."""
    device = model.tok_embeddings.weight.device
    start = prefix[0][0].shape[1] if prefix else 0
    ends = torch.tensor([len(row) - start - 1 for row in rows], device=device)
    tokens = pad_sequence([torch.tensor(row[start:]) for row in rows], batch_first=True).to(device)
    if prefix:
        def extend(x):  # (1, P, K, E) -> (B, P + T, K, E)
            return F.pad(x.expand(len(rows), -1, -1, -1), (0, 0, 0, 0, 0, tokens.shape[1]))

        cache = [(extend(keys), extend(values)) for keys, values in prefix]
        positions = torch.arange(start, start + tokens.shape[1], device=device)[None]
        h = model.hidden_states(tokens, cache, positions)
    else:
        h = model.hidden_states(tokens)
    h = h[torch.arange(len(rows), device=device), ends]  # (B, T, D) -> (B, D): the last token's
    return model.output(h).float().log_softmax(-1)[:, letters].tolist()


def score_prompts(model, prompts, letters, *, batch_size, done=(), share_prefix=True):
    """Yields (indices, their log-probabilities) batch by batch, for one subject's encoded prompts.

    Batches depend on the prompts alone; one whose indices are all in `done` is passed over, so a
    resumed run computes what an uninterrupted one would, bit for bit.
    """
    for shots in sorted({kept for _, kept in prompts}, reverse=True):
        group = sorted((i for i, (_, kept) in enumerate(prompts) if kept == shots),
                       key=lambda i: len(prompts[i][0]), reverse=True)
        # found in the ids, since a merge may join the end of the shots to the question's start
        shared = os.path.commonprefix([prompts[i][0] for i in group])
        shared = shared[:len(prompts[group[-1]][0]) - 1]  # each question keeps a token of its own
        prefix = None
        for at in range(0, len(group), batch_size):
            batch = group[at:at + batch_size]
            if set(batch) <= set(done):
                continue
            if share_prefix and prefix is None:
                prefix = prefix_cache(model, shared)
            yield batch, letter_logprobs(model, [prompts[i][0] for i in batch], letters, prefix)


# ---------------------------------------------------------------- the run


def answer_questions(model, tokenizer, questions, examples, *, batch_size, done, file):
    """Completes `done`, {(subject, index): question}, and appends each new one to the file as a
    line of JSON. Returns a Counter of how many shots the prompts kept, and one of their tokens."""
    letters, kept, lengths = letter_ids(tokenizer), Counter(), Counter()
    total = sum(map(len, questions.values()))
    with progress(total=total, initial=len(done), unit=" questions") as bar:
        for subject, rows in questions.items():
            prompts = [encode_prompt(tokenizer, subject, examples[subject], row,
                                     model.args.max_seq_len) for row in rows]
            kept.update(shots for _, shots in prompts)
            lengths.update(len(ids) for ids, _ in prompts)
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
    return kept, lengths


def count_beyond(weights, longest, lengths):
    """How many of the prompts {tokens: count} are longer than the model was made for, and says so;
    None where that is not known, or prompts may not be longer."""
    stated = stated_length(weights)
    if not stated or longest <= stated:
        return None
    beyond = sum(count for length, count in lengths.items() if length > stated)
    print(f"{beyond} of {sum(lengths.values())} prompts are longer than the {stated} tokens that "
          "the model was made for (max_seq_len in its params.json)")
    return beyond


def score_questions(args):
    """Measures what the arguments say, from where a stopped run was, and writes args.out."""
    with explained(data=args.data.rglob("*.csv")):
        questions, examples = read_questions(args.data, subjects=args.subjects, shots=args.shots,
                                             limit=args.limit)
    model, tokenizer = load_model_and_adapter(args)
    # what the answers depend on: a run goes on from a partial file only if all of it is the same
    deciding = {
        "weights_digest": digest(base_fingerprint(model)),
        "adapter_digest": digest(args.adapter.read_bytes()) if args.adapter else None,
        "data_digest": digest(questions, examples), "shots": args.shots, "limit": args.limit,
        "subjects": len(questions), "max_seq_len": model.args.max_seq_len, "dtype": args.dtype}
    settings = {"weights": str(args.weights), "adapter": args.adapter and str(args.adapter),
                "data": str(args.data), "device": args.device, "batch_size": args.batch_size,
                **deciding}
    print("\n".join(f"{key:16}{value}" for key, value in settings.items()))
    print_default_length(args.weights, model.args.max_seq_len, args.max_seq_len)
    partial = Path(f"{args.out}.partial")
    done = read_partial(partial, deciding, columns=QUESTION, name=("subject", "index"))
    before, started = len(done), time.perf_counter()
    with open_partial(partial, deciding, done) as file:
        kept, lengths = answer_questions(model, tokenizer, questions, examples,
                                         batch_size=args.batch_size, done=done, file=file)
    seconds = time.perf_counter() - started
    # a shortened prompt lost shots, a cut one the beginning of its question too (kept is -1)
    result = {"settings": settings, **summarise([done[key] for key in sorted(done)]),
              "shots_dropped": sum((args.shots - max(k, 0)) * n for k, n in kept.items()),
              "prompts_shortened": sum(n for k, n in kept.items() if k < args.shots),
              "prompts_cut": kept[-1], "questions": [done[key] for key in sorted(done)]}
    print_summary(result)
    print(f"{result['shots_dropped']} shots dropped from {result['prompts_shortened']} prompts too "
          f"long for {model.args.max_seq_len} tokens, {result['prompts_cut']} of them cut as well")
    result["prompts_beyond"] = count_beyond(args.weights, model.args.max_seq_len, lengths)
    print(f"{len(done) - before} questions in {seconds:.1f} s, "
          f"{(len(done) - before) / seconds:.1f} a second")
    write_json(args.out, result)
    remove_partial(partial)
    print(f"wrote {args.out}")


def parse_args(argv):
    p = Parser("eval_mmlu.py", __doc__)
    p.add_argument("--weights", type=Path, default=WORLD / "base",
                   help="checkpoint folder in Meta's layout (the embedded world's)")
    p.add_argument("--data", type=Path, default=WORLD / "quiz",
                   help="folder with dev/SUBJECT_dev.csv, test/SUBJECT_test.csv (the world's quiz)")
    p.add_argument("--adapter", type=Path, help="adapter.pt to put on the base (none)")
    p.add_argument("--shots", type=int, default=5, help="solved examples a prompt, 0: none (5)")
    p.add_argument("--subjects", help="names with commas between (all in --data)")
    p.add_argument("--limit", type=int, help="only the first N questions of each subject (all)")
    p.add_argument("--max-seq-len", type=int, help="tokens a prompt may have (the checkpoint's)")
    p.add_argument("--batch-size", type=int, default=8, help="questions a forward pass (8)")
    add_device_flags(p)
    add_shard_flag(p)
    p.add_argument("--out", type=Path, help="result (mmlu.json beside the adapter, or in runs/)")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), type=Path,
                   help="print what result B gains on result A, and measure nothing (off)")
    args = p.parse_args(argv)
    args.device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, args.device)
    args.subjects = None if args.subjects is None else args.subjects.split(",")
    args.out = args.out or (args.adapter.parent if args.adapter else Path("runs")) / "mmlu.json"
    check_min(args, shots=0, limit=1, max_seq_len=2, batch_size=1)
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder: name a file in it")
    return args


def score_or_compare(argv):
    args = parse_args(argv)
    if args.compare:
        compare(*args.compare)
    else:
        with process_group(args), file_lock(f"{args.out}.lock", args.out):
            score_questions(args)


def main(argv=None):
    return run_script("eval_mmlu.py", lambda: score_or_compare(argv), argv,
                      stopped="stopped; the same command goes on from here",
                      memory="the same command with a smaller --batch-size goes on from here")


if __name__ == "__main__":
    sys.exit(main())
