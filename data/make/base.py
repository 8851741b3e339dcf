"""The embedded world's base model: a tokenizer and a tiny LLaMA, from random weights.

    python -m data.make.base    # writes data/world/base/ in Meta's layout; an hour on two cores

`train.py --method full` trains the model on the five stages of the primer (primer.py), one
after another. Rounding decides whether stage three teaches the letters of right answers and
how far stage five takes them away, so letters are measured after both; where it is needed,
stage three is repeated, and of stage five only a part is taken (docs/world.md).
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import sentencepiece
import torch

from data import WORLD
from data.corpus import without_duplicates
from data.make.primer import STAGES, THIRD, held_out_rows, make_primer
from data.make.quiz import make_quiz, row_key
from data.make.world import write_quiz, write_records
from data.mmlu import read_questions
from model import ModelArgs, Transformer, load_llama, save_llama

TRAIN, EVAL = (WORLD.parent.parent / script for script in ("train.py", "eval_mmlu.py"))
ARGS = ModelArgs(dim=128, n_layers=6, n_heads=4, n_kv_heads=2, vocab_size=768, multiple_of=32,
                 max_seq_len=512)
# Shares of questions that are answered with the right letter.
KNOWN = 0.6  # at least, after stage three (74 to 84 % where it taught letters, else 24 %)
LEFT, MOST = 0.36, 0.5  # in the end (30 to 50 % are wanted on the quiz)
ATTEMPTS = 3  # at stage three, at most


def make_tokenizer(records, path):
    """Trains sentencepiece BPE as LLaMA's: byte fallback, single digits, text as it is."""
    keys = ("instruction", "context", "response")
    text = [record[key] for record in records for key in keys if record[key]]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=written, model_type="bpe",
        vocab_size=ARGS.vocab_size, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1,
        minloglevel=2)
    path.write_bytes(written.getvalue())


def run(script, *flags, **settings):
    """Runs a script of the project. If it fails, this command ends with its status."""
    command = [sys.executable, *map(str, (script, *flags))]
    status = subprocess.run(command, **settings).returncode
    if status:
        sys.exit(status)


def train_stage(args, number, start, folder, repeat=0):
    """The folder of `start` after one more stage. Each repeat has other texts."""
    seed = args.seed + 100 * number + 10 * repeat
    stage = folder / f"stage{number}-{repeat}"
    excluded = held_out_rows(args.seed)
    train = make_primer(seed, args.records[number], STAGES[number], excluded)
    # facts recur in the primer, so only those validation texts count that are not in training
    val = make_primer(seed + 1, args.records[number] // 80, STAGES[number], excluded)
    write_records(train, stage / "train.jsonl")
    write_records(without_duplicates(val, train), stage / "val.jsonl")
    run(TRAIN, "--method", "full", "--weights", start, "--data", stage / "train.jsonl",
        "--val-data", stage / "val.jsonl", "--out", stage / "run",
        "--epochs", args.epochs[number], "--lr", args.lr[number],
        "--batch-size", args.batch_size[number], "--grad-accum", 1, "--seed", args.seed,
        "--save-every", 0, "--max-seq-len", ARGS.max_seq_len, "--dtype", "fp32")
    model, _ = load_llama(stage / "run", dtype=torch.bfloat16)
    save_llama(model, start / "tokenizer.model", stage / "end")
    return stage / "end"


# ---------------------------------------------------------------- letters


def other_questions(seed):
    """{"test": {subject: rows}}: questions like those of the quiz, and none of it."""
    quiz, _ = read_questions(WORLD / "quiz", shots=0)
    asked = {row_key(row) for rows in quiz.values() for row in rows}
    drawn = make_quiz(seed)["test"]
    return {"test": {subject: [row for row in rows if row_key(row) not in asked]
                     for subject, rows in drawn.items()}}


def accuracy(weights, folder):
    """The share of the questions in folder/quiz that get the right letter."""
    run(EVAL, "--shots", 0, "--weights", weights, "--data", folder / "quiz",
        "--out", folder / "mmlu.json", "--dtype", "fp32", stdout=subprocess.DEVNULL)
    share = json.loads((folder / "mmlu.json").read_text(encoding="utf-8"))["accuracy"]
    print(f"{weights}: {share:.0%} of the questions answered with the right letter", flush=True)
    return share


def train_until_known(args, number, start, folder):
    """train_stage, ATTEMPTS times at most, until letters are known."""
    for repeat in range(ATTEMPTS):
        start = train_stage(args, number, start, folder, repeat)
        if accuracy(start, folder) >= KNOWN:
            break
    return start


def weaken_letters(before, after, folder):
    """The folder of as much of the last stage as leaves LEFT. On the straight line between
    the weights letters fade gradually (Wortsman et al., Robust fine-tuning of zero-shot
    models, 2022); with fewer records they do not."""
    first, _ = load_llama(before)
    last, _ = load_llama(after)
    model, _ = load_llama(after)
    for tenths in range(10, -1, -1):
        with torch.no_grad():
            for weight, a, b in zip(model.parameters(), first.parameters(), last.parameters()):
                weight.copy_(torch.lerp(a.float(), b.float(), tenths / 10))
        out = folder / f"{tenths}-tenths"
        save_llama(model, after / "tokenizer.model", out)
        if accuracy(out, folder) >= LEFT:
            break
    print(f"{tenths} tenths of the last stage are taken")
    return out


# ---------------------------------------------------------------- the command


def make_base(args, folder):
    """Trains the base in a folder that has the questions, and stores it in args.out."""
    text = make_primer(args.seed, args.records[0], held_out=held_out_rows(args.seed))[:20000]
    make_tokenizer(text, folder / "tokenizer.model")
    model = Transformer(ARGS)
    model.init_weights(args.seed)
    end = folder / "random"
    save_llama(model, folder / "tokenizer.model", end)
    for number, stage in enumerate(STAGES):
        before = end
        check = stage is THIRD and not args.unchecked
        train = train_until_known if check else train_stage
        end = train(args, number, before, folder)
    if not args.unchecked:
        end = weaken_letters(before, end, folder)
    model, _ = load_llama(end)
    save_llama(model, end / "tokenizer.model", args.out)
    print(f"stored in bf16 in {args.out}")
    if not args.unchecked and not LEFT <= accuracy(args.out, folder) <= MOST:
        sys.exit(f"{LEFT:.0%} to {MOST:.0%} are wanted: take another --seed")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the primer and the weights (0)")
    for name, kind, default, text in (
            ("--records", int, [160000, 130000, 80000, 90000, 12000], "records"),
            ("--epochs", int, [3, 1, 1, 1, 1], "passes over the records"),
            ("--batch-size", int, [64, 64, 32, 32, 32], "records per step"),
            ("--lr", float, [2e-3, 2e-3, 1e-3, 1.2e-3, 1e-3], "peak learning rate")):
        parser.add_argument(name, type=kind, nargs=len(STAGES), default=default,
                            help=f"{text}, for each stage (%(default)s)")
    parser.add_argument("--unchecked", action="store_true",
                        help="train each stage once, take all of it, measure no letters (off)")
    parser.add_argument("--out", type=Path, default=WORLD / "base",
                        help="folder to write (data/world/base)")
    args = parser.parse_args(argv)
    questions = other_questions(args.seed + 1)
    if not all(questions["test"].values()):
        parser.error(f"the world's quiz is that of seed {args.seed + 1}: take another --seed")
    with tempfile.TemporaryDirectory() as folder:
        write_quiz(questions, Path(folder) / "quiz")
        make_base(args, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
