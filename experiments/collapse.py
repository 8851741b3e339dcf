"""Zero router plus zero B: why HydraLoRA's heads would stay one head, and what separates them.

Every B starts at zero, so at the first step each B_i gets the same gradient times its gate. With
a router of zeros the gates are equal, and with them the heads, the gradients of the gates, and
all that follows: a LoRA of the same rank. Each start below is trained by the same steps; printed
is the mean cosine between the B matrices (1: copies), and how many steps it takes to stay below
0.9. That is arithmetic, not a sample: there are no claims, and a test holds the copies.

    python -m experiments.collapse   # 5 runs of 300 steps
"""

import statistics
import sys
from functools import partial
from itertools import product

import torch

import train
from data.corpus import encode_records
from experiments import common, report
from experiments.common import hydra
from hydralora import hydra_layers
from support import files
from support.evaluation import mean_cosine

APART = 0.9
# (factor of the router's own random start, standard deviation of B)
STARTS = {"router 0, B 0": (0.0, 0.0), "router x 1e-6, B 0": (1e-6, 0.0),
          "router x 1e-3, B 0": (1e-3, 0.0), "router random, B 0": (1.0, 0.0),
          "router 0, B random": (0.0, 1e-3)}


def watch(flags, records, start, every):
    """{steps, cosine, apart}, each with a value per `every` steps of the run: the mean cosine
    between the heads' B matrices, and the largest difference between two of them."""
    settings = train.parse_args(common.command_line(flags))
    model, tokenizer = common.starting_model(flags)
    layers = hydra_layers(model).values()
    router, b = STARTS[start]
    with torch.no_grad():
        for layer in layers:
            layer.router.mul_(router)
            layer.lora_B.normal_().mul_(b)
    longest = settings.max_seq_len or min(train.MAX_SEQ_LEN, model.args.max_seq_len)
    sequences, _ = encode_records(records, tokenizer, longest)
    steps = common.train_here(model, sequences, lr=settings.lr, seed=settings.seed,
                              batch_size=settings.batch_size, epochs=settings.epochs,
                              max_steps=settings.max_steps, clip=settings.clip)
    rows = []
    for step, _ in enumerate(steps, 1):
        matrices = [layer.lora_B.detach() for layer in layers]  # (N, O, R)
        rows.append([step, statistics.fmean(map(mean_cosine, matrices)),
                     max((b.amax(0) - b.amin(0)).max().item() for b in matrices)])
    looked = [row for row in rows if row[0] % every == 1 % every or row is rows[-1]]
    return dict(zip(("steps", "cosine", "apart"), map(list, zip(*looked))))


def separated(trace):
    """The first recorded step from which on the heads stay apart, or None."""
    since = None
    for step, cosine in zip(trace["steps"], trace["cosine"]):
        since = None if cosine >= APART else since or step
    return since


def make_table(traces):
    rows = []
    for start, seeds in traces.items():
        rows.append([start, ", ".join(f"{trace['cosine'][-1]:.4f}" for trace in seeds),
                     f"{max(trace['apart'][-1] for trace in seeds):.2g}",
                     ", ".join(str(separated(trace) or "never") for trace in seeds)])
    return report.markdown(["start", "cosine at the end", "largest difference of two B",
                            "steps until below 0.9 for good"], rows)


def draw_collapse(pyplot, traces):
    lines = {start: (seeds[0]["steps"], [report.interval(cosines) for cosines in zip(
        *(trace["cosine"] for trace in seeds))]) for start, seeds in traces.items()}
    return report.line_chart(pyplot, lines, "optimizer steps",
                             "mean cosine between the B matrices").figure


def parse_args(argv):
    p = common.parser("collapse", __doc__, seeds=1, epochs=1, rates=None, sweep_epochs=None)
    p.set_defaults(max_steps=300)
    p.add_argument("--every", type=int, default=5, help="steps between two looks (5)")
    return common.parse_args(p, argv)


def run(args):
    records, val = common.load_records(args)
    torch.set_num_threads(1)
    traces = {start: [] for start in STARTS}
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for start, seed in product(STARTS, seeds):
        flags = common.run_flags(args, hydra(3), rate=train.WORLD_RECIPE["lr"], records=records,
                                 val=val, seed=seed)
        key = [start, STARTS[start], args.every, common.run_folder(flags, args.runs).name]
        path = args.runs / f"collapse-{files.digest(key)}.json"
        trace = common.cached(path, partial(watch, flags, records, start, args.every))
        traces[start].append(trace)
        print(f"{start}, seed {seed}: cosine {trace['cosine'][-1]}", flush=True)
    report.write_results(
        args, "collapse",
        {"conditions": common.conditions(args, records, val), "traces": traces},
        [make_table(traces)], lambda pyplot: draw_collapse(pyplot, traces))


if __name__ == "__main__":
    sys.exit(common.main("collapse", parse_args, run))
