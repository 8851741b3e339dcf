"""How much the shared prefix of eval_mmlu.py saves where arithmetic dominates.

A random model of the 135M class (30 layers of width 576) scores the same batches of one subject in
two ways, in turn: each prompt whole, and with the keys and values of header and shots computed
once. Prints the medians, their ratio and how far the answers lie apart. By its count of tokens the
default subject is the median of MMLU's 57.

    python -m experiments.benchmark_mmlu --tokenizer llama-2-7b/tokenizer.model --data data/mmlu
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from data.mmlu import encode_prompt, letter_ids, read_questions
from eval_mmlu import score_prompts
from model import ModelArgs, Tokenizer, Transformer

SIZE = dict(dim=576, n_heads=9, n_kv_heads=3, multiple_of=256, max_seq_len=2048)  # FFN 1536


def time_prompts(model, prompts, letters, batch_size, share_prefix):
    """(seconds, log-probabilities (questions, 4) in the questions' order)."""
    values = torch.empty(len(prompts), len(letters))
    started = time.perf_counter()
    for batch, logprobs in score_prompts(model, prompts, letters, batch_size=batch_size,
                                         share_prefix=share_prefix):
        values[batch] = torch.tensor(logprobs)
    return time.perf_counter() - started, values


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--tokenizer", required=True, help="a tokenizer.model, LLaMA's 32,000 pieces")
    p.add_argument("--data", type=Path, default=Path("data/mmlu"), help="MMLU (data/mmlu)")
    p.add_argument("--subject", default="logical_fallacies", help="whose questions (%(default)s)")
    p.add_argument("--questions", type=int, default=32, help="how many of them (32)")
    p.add_argument("--batch-size", type=int, default=8, help="questions a forward pass (8)")
    p.add_argument("--layers", type=int, default=30, help="of the model; fewer for a trial (30)")
    p.add_argument("--repeats", type=int, default=3, help="of both ways in turn (3)")
    p.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    args = p.parse_args(argv)
    tokenizer = Tokenizer(args.tokenizer)
    model = Transformer(ModelArgs(**SIZE, n_layers=args.layers, vocab_size=tokenizer.vocab_size))
    model.init_weights(0)
    model.to(args.device)
    questions, examples = read_questions(args.data, subjects=[args.subject], limit=args.questions)
    prompts = [encode_prompt(tokenizer, args.subject, examples[args.subject], row,
                             model.args.max_seq_len) for row in questions[args.subject]]
    lengths = [len(ids) for ids, _ in prompts]
    letters = letter_ids(tokenizer)
    print(f"{sum(w.numel() for w in model.parameters()):,} weights, {torch.get_num_threads()} "
          f"threads; {args.subject}: {len(prompts)} prompts of {min(lengths)} to {max(lengths)} "
          f"tokens, {min(kept for _, kept in prompts)} shots or more")
    seconds, answers = {True: [], False: []}, {}
    for _ in range(args.repeats):
        for share in (False, True):
            took, answers[share] = time_prompts(model, prompts, letters, args.batch_size, share)
            seconds[share].append(took)
            print(f"{'shared prefix' if share else 'whole prompts'}: {took:.2f} s", flush=True)
    whole, shared = (statistics.median(seconds[share]) for share in (False, True))
    same = (answers[True].argmax(1) == answers[False].argmax(1)).sum().item()
    print(f"medians: whole {whole:.2f} s, shared {shared:.2f} s: {whole / shared:.1f} times "
          f"faster; {same} of {len(prompts)} answers the same, log-probabilities within "
          f"{(answers[True] - answers[False]).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
