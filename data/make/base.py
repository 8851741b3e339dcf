"""The embedded world's base model: a tokenizer and a tiny LLaMA, trained here from random weights.

    python -m data.make.base    # writes data/world/base/ in Meta's layout; an hour on two cores

The tokenizer is sentencepiece BPE with LLaMA's settings. The model is trained by the command that
trains everything else: a checkpoint of random weights is written, `train.py --method full` trains
it on the five stages of the primer (primer.py), and the result is stored in bf16 to keep the
repository small.

Whether the third stage learns letters, and how far the fifth takes them back, is not settled by the
recipe: another machine's rounding may decide it. So letters are measured after both, on questions
that the quiz does not ask. The third is read again, and of the fifth only a part is taken, where
that is needed (docs/world.md).
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
from data.make.quiz import make_quiz, quiz_key
from data.make.world import write_quiz, write_records
from data.mmlu import read_questions
from model import ModelArgs, Transformer, load_llama, save_llama

TRAIN, EVAL = (WORLD.parent.parent / script for script in ("train.py", "eval_mmlu.py"))
ARGS = ModelArgs(dim=128, n_layers=6, n_heads=4, n_kv_heads=2, vocab_size=768, multiple_of=32,
                 max_seq_len=512)
# shares of right letters. KNOWN: after the third stage at least (readings that learned letters had
# 74 to 84 %, one that did not 24 %). LEFT, MOST: in the end (the quiz should have 30 to 50 %)
KNOWN, LEFT, MOST = 0.6, 0.36, 0.5
READINGS = 3  # of the third stage, at most


def make_tokenizer(records, path):
    """Trains BPE with LLaMA's settings: byte fallback, digits apart, text left as it is."""
    text = [record[key] for record in records for key in ("instruction", "context", "response")
            if record[key]]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=written, model_type="bpe",
        vocab_size=ARGS.vocab_size, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1,
        minloglevel=2)
    path.write_bytes(written.getvalue())


def run(script, *flags, **settings):
    """Runs a script of the project; where it fails, this one ends with its status."""
    status = subprocess.run([sys.executable, *map(str, (script, *flags))], **settings).returncode
    if status:
        sys.exit(status)


def read_primer(args, number, start, folder, again=0):
    """One stage: train.py reads the primer from the checkpoint at start; returns where it ended.
    `again` counts further readings, each of other texts."""
    seed, place = args.seed + 100 * number + 10 * again, folder / f"stage{number}-{again}"
    left_out = held_out_rows(args.seed)
    records = make_primer(seed, args.records[number], STAGES[number], left_out)
    write_records(records, place / "primer.jsonl")
    # facts come again and again in the primer; what is held out are texts that do not
    held_out = make_primer(seed + 1, args.records[number] // 80, STAGES[number], left_out)
    write_records(without_duplicates(held_out, records), place / "held_out.jsonl")
    run(TRAIN, "--method", "full", "--weights", start, "--data", place / "primer.jsonl",
        "--val-data", place / "held_out.jsonl", "--out", place / "run",
        "--epochs", args.epochs[number], "--lr", args.lr[number],
        "--batch-size", args.batch_size[number], "--grad-accum", 1, "--seed", args.seed,
        "--save-every", 0, "--max-seq-len", ARGS.max_seq_len, "--dtype", "fp32")
    model, _ = load_llama(place / "run", dtype=torch.bfloat16)
    save_llama(model, start / "tokenizer.model", place / "end")
    return place / "end"


# ---------------------------------------------------------------- letters


def other_questions(seed):
    """{"test": {subject: rows}} of the kind that the world's quiz asks, and none that it asks."""
    quiz, _ = read_questions(WORLD / "quiz", shots=0)
    asked = {quiz_key(row) for rows in quiz.values() for row in rows}
    return {"test": {subject: [row for row in rows if quiz_key(row) not in asked]
                     for subject, rows in make_quiz(seed)["test"].items()}}


def share_right(weights, folder):
    """The share of the questions in folder/quiz that the model answers with the right letter."""
    run(EVAL, "--shots", 0, "--weights", weights, "--data", folder / "quiz",
        "--out", folder / "mmlu.json", "--dtype", "fp32", stdout=subprocess.DEVNULL)
    share = json.loads((folder / "mmlu.json").read_text(encoding="utf-8"))["accuracy"]
    print(f"{weights}: {share:.0%} of the questions answered with the right letter", flush=True)
    return share


def read_until_known(args, number, start, folder):
    """Reads a stage, and reads on with other texts, until letters are known or it was read READINGS
    times; returns where it ended."""
    for again in range(READINGS):
        start = read_primer(args, number, start, folder, again)
        if share_right(start, folder) >= KNOWN:
            break
    return start


def weaken_letters(before, after, folder):
    """The last stage, as far as it leaves LEFT: the furthest tenth of the straight line between the
    weights before and after it, on which letters fade gradually (Wortsman et al., Robust
    fine-tuning of zero-shot models, 2022). Reading the stage for less long is no such dial."""
    (first, _), (last, _), (model, _) = (load_llama(at) for at in (before, after, after))
    for tenths in range(10, -1, -1):
        with torch.no_grad():
            for weight, a, b in zip(model.parameters(), first.parameters(), last.parameters()):
                weight.copy_(torch.lerp(a.float(), b.float(), tenths / 10))
        place = folder / f"{tenths}-tenths"
        save_llama(model, after / "tokenizer.model", place)
        if share_right(place, folder) >= LEFT:
            break
    print(f"{tenths} tenths of the last stage are taken")
    return place


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the primer and the weights (0)")
    for name, kind, default, text in (  # a number for each stage of the primer
            ("--records", int, [160000, 130000, 80000, 90000, 12000], "of each stage"),
            ("--epochs", int, [3, 1, 1, 1, 1], "passes over each stage"),
            ("--batch-size", int, [64, 64, 32, 32, 32], "records a step"),
            ("--lr", float, [2e-3, 2e-3, 1e-3, 1.2e-3, 1e-3], "peak learning rates")):
        parser.add_argument(name, type=kind, nargs=len(STAGES), default=default,
                            help=f"{text} (%(default)s)")
    parser.add_argument("--unchecked", action="store_true",
                        help="read each stage once and take all of it: measure no letters (off)")
    parser.add_argument("--out", type=Path, default=WORLD / "base", help="folder (data/world/base)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        questions = other_questions(args.seed + 1)
        if not all(questions["test"].values()):
            parser.error(f"the world's quiz is that of seed {args.seed + 1}: take another --seed")
        write_quiz(questions, folder / "quiz")
        text = make_primer(args.seed, args.records[0], held_out=held_out_rows(args.seed))[:20000]
        make_tokenizer(text, folder / "tokenizer.model")
        model = Transformer(ARGS)
        model.init_weights(args.seed)
        save_llama(model, folder / "tokenizer.model", folder / "random")
        end = folder / "random"
        for number, stage in enumerate(STAGES):
            read = read_until_known if stage is THIRD and not args.unchecked else read_primer
            before, end = end, read(args, number, end, folder)
        if not args.unchecked:
            end = weaken_letters(before, end, folder)
        model, _ = load_llama(end)
        save_llama(model, end / "tokenizer.model", args.out)
        print(f"stored in bf16 in {args.out}")
        if not args.unchecked and not LEFT <= share_right(args.out, folder) <= MOST:
            sys.exit(f"{LEFT:.0%} to {MOST:.0%} are wanted: take another --seed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
