"""The embedded world's base model: a tokenizer and a tiny LLaMA, trained here from random weights.

    python -m data.make_base    # writes data/world/base/ in Meta's layout; an hour on two cores

The tokenizer is sentencepiece BPE with LLaMA's settings. The model is trained by the command that
trains everything else: a checkpoint of random weights is written, `train.py --method full` trains
it on the five stages of the primer (primer.py), and the result is stored in bf16 to keep the
repository small.
"""

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import sentencepiece
import torch

from data import WORLD
from data.corpus import without_duplicates
from data.make_world import write_records
from data.primer import STAGES, held_out_rows, make_primer
from model import ModelArgs, Transformer, load_llama, save_llama

TRAIN = WORLD.parent.parent / "train.py"
ARGS = ModelArgs(dim=128, n_layers=6, n_heads=4, n_kv_heads=2, vocab_size=768, multiple_of=32,
                 max_seq_len=512)


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


def read_primer(args, stage, number, start, folder):
    """One stage: train.py reads the primer from the checkpoint at start; returns where it ended."""
    seed, place = args.seed + 100 * number, folder / f"stage{number}"
    left_out = held_out_rows(args.seed)
    records = make_primer(seed, args.records[number], stage, left_out)
    write_records(records, place / "primer.jsonl")
    # facts come again and again in the primer; what is held out are texts that do not
    held_out = make_primer(seed + 1, args.records[number] // 80, stage, left_out)
    write_records(without_duplicates(held_out, records), place / "held_out.jsonl")
    status = subprocess.run([
        sys.executable, str(TRAIN), "--method", "full", "--weights", str(start),
        "--data", str(place / "primer.jsonl"), "--val-data", str(place / "held_out.jsonl"),
        "--out", str(place / "run"), "--epochs", str(args.epochs[number]),
        "--lr", str(args.lr[number]), "--batch-size", str(args.batch_size[number]),
        "--grad-accum", "1", "--seed", str(args.seed), "--save-every", "0",
        "--max-seq-len", str(ARGS.max_seq_len), "--dtype", "fp32"]).returncode
    if status:
        sys.exit(status)
    model, _ = load_llama(place / "run", dtype=torch.bfloat16)
    save_llama(model, start / "tokenizer.model", place / "end")
    return place / "end"


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
    parser.add_argument("--out", type=Path, default=WORLD / "base", help="folder (data/world/base)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text = make_primer(args.seed, args.records[0], held_out=held_out_rows(args.seed))[:20000]
        make_tokenizer(text, folder / "tokenizer.model")
        model = Transformer(ARGS)
        model.init_weights(args.seed)
        save_llama(model, folder / "tokenizer.model", folder / "random")
        end = folder / "random"
        for number, stage in enumerate(STAGES):
            end = read_primer(args, stage, number, end, folder)
        model, _ = load_llama(end)
        save_llama(model, end / "tokenizer.model", args.out)
    print(f"stored in bf16 in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
