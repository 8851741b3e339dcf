"""The parts of gpu.py and benchmark.py: what is measured, and how it is reported.

    python -m experiments.gpu --part step

The first half serves both commands. The second half holds the parts of gpu.py, on
models of 7B's shape in bf16; each takes a Report, a Scale and a device.
"""

import io
import math
import random
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from cluster import kmeans
from data import WORLD
from data.corpus import Sequence, cut_by_tokens, length_batches
from data.mmlu import Prompt
from eval_mmlu import score_prompts
from experiments import steps
from experiments.steps import OURS, floor, ours, random_base, random_batch, time_rounds
from hydralora import HydraLinear
from model import ModelArgs
from support import memory
from support.cli import out_of_memory
from support.files import read_json
from support.memory import GIB, Watch
from support.output import one_line

FOREIGN = ("PEFT LoRA r24", "looped HydraLoRA 3 x 8")  # may be absent
MAY_FAIL = (*FOREIGN, "torch.compile")  # in their own ways: it needs a C compiler
# method: what HydraLoRA should reach against it
AIMS = {"LoRA r24": ("HydraLoRA 3 x 8 over LoRA r24, time", "<=", 1.10),
        "floor": ("HydraLoRA 3 x 8 over the floor, time", "<=", 1.20),
        "looped HydraLoRA 3 x 8": ("HydraLoRA over the looped one, tokens/s", ">=", 1.8),
        "PEFT LoRA r24": ("HydraLoRA over PEFT's LoRA r24, tokens/s", ">=", 1.1)}


def peft_lora(base, checkpoint=False):
    from experiments import frameworks  # needs transformers and peft
    return frameworks.peft_lora(base, rank=24, checkpoint=checkpoint)


def looped_hydra(base, checkpoint=False):
    from experiments import frameworks
    return frameworks.looped_hydra(base, rank=8, heads=3, checkpoint=checkpoint)


METHODS = {OURS: partial(ours, rank=8, heads=3), "LoRA r24": partial(ours, rank=24, heads=1),
           "floor": floor, "PEFT LoRA r24": peft_lora, "looped HydraLoRA 3 x 8": looped_hydra}

# ---------------------------------------------------------------- reporting


class Report:
    """Where a part puts what it finds: rows of named tables, and notes. Each is
    printed, and save(content) is called, before the call returns."""

    def __init__(self, save=None):
        self.content = {"status": "running", "tables": {}, "notes": []}
        self.save = save or (lambda content: None)
        self.header = None

    def row(self, table, cells):
        """Adds {column: value} to the table."""
        self.content["tables"].setdefault(table, []).append(cells)
        widths = [48, *(max(9, len(name)) for name in list(cells)[1:])]
        header = (table, *cells)
        if header != self.header:
            self.header = header
            print(f"\n{table}")
            print_line(cells, widths)
        print_line(map(show, cells.values()), widths)
        self.save(self.content)

    def note(self, text):
        self.content["notes"].append(one_line(text))
        print(one_line(text), flush=True)
        self.save(self.content)


def print_line(cells, widths):
    first, *others = (f"{cell:>{width}}" for cell, width in zip(cells, widths))
    print("  ".join([f"{first.strip():{widths[0]}}", *others]), flush=True)


def show(value):
    """A cell of a table: figures to three digits, "-" for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def attempt(report, name, work, where=""):
    """work(), or None with a note if the device has too little memory; for what is
    foreign, whatever its error is."""
    try:
        return work()
    except Exception as error:
        full = out_of_memory(error)
        if not full and name not in MAY_FAIL:
            raise
        kind = "too little memory on the card" if full else type(error).__name__
        reason = one_line(str(error).split(". ")[0])
    report.note(f"{name}{where}: skipped, {kind} ({reason})")
    steps.free()
    return None


def report_aim(report, table, claim, measured, relation, bound):
    holds = measured <= bound if relation == "<=" else measured >= bound
    report.row(table, {"aim": claim, "wanted": f"{relation} {bound}", "measured": measured,
                       "holds": holds})


# ---------------------------------------------------------------- steps, and how their cost grows


class Trial(NamedTuple):
    method: steps.Method
    batches: list  # a round is a step on each of them
    flops: int  # of the products and the attention of a round
    peak: float | None  # GiB on a GPU, weights and optimiser included


class Result(NamedTuple):
    seconds: list  # of each round
    tokens_per_second: float  # in the median round
    flops: int
    peak: float | None


def prepare_trial(make, device):
    """The Trial of what make() returns, a Method and its batches, after two rounds,
    which warm it up."""
    method, batches = make()
    with FlopCounterMode(display=False) as counter:
        method.steps(batches)
    extra = steps.extra_peak(partial(method.steps, batches), device)
    peak = None if extra is None else (method.resident() + extra) / GIB
    return Trial(method, batches, counter.get_total_flops(), peak)


def run_trials(report, where, makers, *, device, rounds, budget=math.inf):
    """{name: Result} of {name: function that returns a Method and its batches}, timed
    round by round. What finds too little memory is left out with a note."""
    trials = {name: attempt(report, name, partial(prepare_trial, make, device), f", {where}")
              for name, make in makers.items()}
    trials = {name: trial for name, trial in trials.items() if trial}
    seconds = time_rounds({name: partial(trial.method.steps, trial.batches)
                           for name, trial in trials.items()}, rounds, device, budget)
    return {name: Result(seconds[name], steps.positions(trial.batches) / median(seconds[name]),
                         trial.flops, trial.peak) for name, trial in trials.items()}


def product_flops(width, dtype, device):
    """Operations per second of a large matrix product: the most that a device reaches."""
    a = torch.randn(width, width, device=device).to(dtype)
    for _ in range(3):
        a @ a
    seconds = steps.seconds_of(lambda: [a @ a for _ in range(10)], device)
    return 10 * 2 * width**3 / seconds


def compare_methods(report, table, methods, base, batches, *, device, product, rounds,
                    budget=math.inf):
    """A row for each of {name: function that makes a Method on the base}: its steps on
    the batches, against the operations per second of a large product. {name: seconds of
    each round}."""
    makers = {name: lambda make=make: (make(base), batches) for name, make in methods.items()}
    results = run_trials(report, table, makers, device=device, rounds=rounds, budget=budget)
    seconds = {name: result.seconds for name, result in results.items()}
    ratio = steps.time_ratios(seconds, OURS)
    for name, result in results.items():
        middle = median(result.seconds)
        report.row(table, {
            "method": name, "seconds": middle, "tokens/s": result.tokens_per_second,
            "records/s": sum(map(len, batches)) / middle,
            "HydraLoRA's time against it": ratio.get(name), "peak GiB": result.peak,
            "share of the peak": result.flops / middle / product,
            "rounds": len(result.seconds)})
    return seconds


def report_aims(report, table, seconds):
    """Which aims HydraLoRA reaches, by the seconds that compare_methods returned."""
    ratio = steps.time_ratios(seconds, OURS)
    for name, (claim, relation, bound) in AIMS.items():
        if name in ratio:
            value = ratio[name] if relation == "<=" else 1 / ratio[name]
            report_aim(report, table, claim, value, relation, bound)


def compare_growth(report, base, axes, *, tokens, batch_tokens=0, device, rounds):
    """Rows along each of {axis: values}, the others being 3 heads, rank 8 and rows of
    `tokens`: as many rows as batch_tokens hold, at least one. {axis: {value: seconds of
    each round}}."""
    def make(heads=3, rank=8, length=tokens):
        rows = max(1, batch_tokens // length)
        return (ours(base, heads=heads, rank=rank),
                [random_batch(rows, length, base.args.vocab_size)])

    found = {axis: {} for axis in axes}
    for axis, values in axes.items():
        makers = {value: partial(make, **{axis: value}) for value in values}
        # on a CPU all take turns, on a GPU each has the memory for itself
        groups = [makers] if device == "cpu" else [{value: makers[value]} for value in values]
        for group in groups:
            results = run_trials(report, axis, group, device=device, rounds=rounds)
            steps.free()
            for value, result in results.items():
                report.row(axis, {axis: value, "tokens/s": result.tokens_per_second,
                                  "peak GiB": result.peak})
                found[axis][value] = result.seconds
    return found


def kept_bytes(heads, tokens=512, inputs=576, outputs=1536):
    """Bytes that one adapted layer, its weights apart, keeps for the backward pass."""
    layer = HydraLinear(torch.nn.Linear(inputs, outputs, bias=False), rank=8, heads=heads,
                        dropout=steps.DROPOUT)
    with Watch() as watch:
        y = layer(torch.randn(tokens, inputs, requires_grad=True))
    return watch.now - y.nbytes


# ---------------------------------------------------------------- where the time goes


def kind_of(operation, shapes, vocab):
    """A matrix product is the head's if a side of it is the vocabulary, an adapter's if
    a side of it is at most 64 wide, else the base's."""
    if operation in ("aten::mm", "aten::addmm", "aten::bmm"):
        sides = {side for shape in shapes for side in shape}
        if vocab in sides:
            return "head: products"
        return "adapters: products" if min(sides) <= 64 else "base: products"
    kinds = {"attention": ["attention"], "softmax of loss and gate": ["softmax", "nll_loss"],
             "dropout": ["dropout", "bernoulli"], "optimiser, clipping": ["adam", "foreach"]}
    for kind, words in kinds.items():
        if any(word in operation for word in words):
            return kind
    return "the rest: norms, SwiGLU, rotary, additions"


def profile(report, method, batch, device):
    """A row per kind of operation: its share of a step's time (GPU: kernels' time)."""
    with torch.profiler.profile(record_shapes=True) as record:
        method.step(batch)
    spent = {}
    for event in record.key_averages(group_by_input_shape=True):
        if event.device_type != torch.autograd.DeviceType.CPU or event.is_user_annotation:
            continue  # a kernel: the operation that launched it has its time
        kind = kind_of(event.key, event.input_shapes, method.model.args.vocab_size)
        own = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        spent[kind] = spent.get(kind, 0) + own
    if not sum(spent.values()):
        report.note("where a step's time goes: skipped, the profiler sees no kernels (CUPTI)")
        return
    for kind in sorted(spent, key=spent.get, reverse=True):
        report.row("where a step's time goes", {
            "where": kind, "share": spent[kind] / sum(spent.values())})


def compare_compiled(report, base, cases, *, backend, device, rounds):
    """{case: batches} with and without torch.compile of every block, in turn; all
    blocks are one graph. {case: {"plain", "compiled": seconds of each round}}."""
    from torch._dynamo.utils import counters
    plain, compiled = (ours(base, rank=8, heads=3) for _ in range(2))
    for layer in compiled.model.layers:
        layer.compile(backend=backend)
    found = {}
    for case, batches in cases.items():
        plain.steps(batches)
        started = time.perf_counter()  # and no processor time: compiling starts processes
        compiled.step(batches[0])
        steps.wait(device)
        first = time.perf_counter() - started
        compiled.steps(batches)
        found[case] = time_rounds({"plain": partial(plain.steps, batches),
                                   "compiled": partial(compiled.steps, batches)}, rounds, device)
        middle = steps.medians(found[case])
        report.row(f"torch.compile ({backend}) of the blocks", {
            "case": case, **middle, "time, times": middle["compiled"] / middle["plain"],
            "first step, s": first, "graphs": counters["stats"]["unique_graphs"],
            "graph breaks": sum(counters["graph_break"].values())})
    return found


# ---------------------------------------------------------------- MMLU's shared prefix


def drawn_prompts(subjects, questions, shots, vocab_size):
    """The Prompts of each subject: a header and five shots that its questions share,
    between shots[0] and shots[1] tokens, and 20 to 130 tokens per question, as a
    subject of MMLU has them in the median."""
    numbers = random.Random(0)

    def ids(count):
        return [numbers.randrange(3, vocab_size) for _ in range(count)]

    prefixes = [[1, *ids(numbers.randint(*shots))] for _ in range(subjects)]
    counts = [questions // subjects + (i < questions % subjects) for i in range(subjects)]
    return [[Prompt(prefix + ids(numbers.randint(20, 130)), 5, False) for _ in range(count)]
            for prefix, count in zip(prefixes, counts)]


def compare_prefix(report, model, subjects, *, device, rounds):
    """Scores drawn_prompts in two ways, in turn: with the keys and values of a
    subject's header and shots computed once, and every prompt whole. {way: seconds of
    each round}."""
    scores = {}

    def score(way):
        scores[way] = torch.tensor([
            four for prompts in subjects for _, logprobs in score_prompts(
                model, prompts, [5, 6, 7, 8], batch_size=8, share_prefix=way == "shared prefix")
            for four in logprobs])

    list(score_prompts(model, subjects[0][:8], [5], batch_size=8))  # warm
    seconds = time_rounds({way: partial(score, way) for way in ("shared prefix", "whole")},
                          rounds, device)
    middle = steps.medians(seconds)
    for way, values in scores.items():
        report.row("MMLU, five shots, drawn prompts", {
            "prompts": way, "questions": len(values), "seconds": middle[way],
            "questions/s": len(values) / middle[way]})
    shared, whole = scores.values()
    report.note(f"MMLU: the shared prefix is {middle['whole'] / middle['shared prefix']:.2f} times "
                f"as fast; {(shared.argmax(1) == whole.argmax(1)).sum().item()} of {len(whole)} "
                "answers are the same, log-probabilities within "
                f"{(shared - whole).abs().max().item():.2g}")
    return seconds


# ---------------------------------------------------------------- the parts of gpu.py


@dataclass
class Scale:
    """The sizes of everything that gpu.py measures."""
    seven: dict  # ModelArgs of 7B, and of 13B
    thirteen: dict
    tokens: int = 1024
    rounds: int = 5
    budget: float = 12.0  # seconds after which the rounds of one table end
    dolly: int = 4  # micro-batches that represent Dolly's lengths
    heads: tuple = (1, 2, 4, 8, 16)
    ranks: tuple = (4, 8, 16, 32, 64)
    lengths: tuple = (256, 512, 1024, 2048, 4096)
    product: int = 8192  # width of the matrices whose product shows the card's peak
    subjects: int = 57
    questions: int = 1000
    shots: tuple = (380, 520)  # tokens of a subject's header and five shots, least and most
    records: tuple = (15000, 4096)  # of k-means
    k_max: int = 10
    backend: str = "inductor"
    main: tuple = ()  # further flags of the main command


CHECKPOINT = {"plain": False, "checkpointed": True}
FULL = Scale(seven=steps.LLAMA_7B, thirteen=steps.LLAMA_13B)
SMALL = dict(dim=128, n_layers=2, n_heads=2, vocab_size=768, multiple_of=32, max_seq_len=256)
TINY = Scale(seven=SMALL, thirteen={**SMALL, "n_layers": 3}, tokens=48, rounds=1, dolly=2,
             heads=(1, 2), ranks=(4, 8), lengths=(32, 64), product=128, subjects=2, questions=6,
             shots=(20, 30), records=(60, 16), k_max=3, backend="eager",
             main=("--weights", str(WORLD / "base"), "--data", str(WORLD / "val.jsonl"),
                   "--max-steps", "3"))


def dolly_batches(count, tokens):
    """Micro-batches of lengths like Dolly's, as train.py cuts them on a GPU."""
    records = [Sequence(s.ids[:tokens + 1], min(s.response_start, tokens), s.record, "")
               for s in steps.dolly_sequences()]
    cut = [batch for step in length_batches(records, 8, torch.Generator().manual_seed(0))
           for batch in cut_by_tokens(step, tokens)]
    return steps.evenly_chosen(cut, count)


def rounded_up(batches, multiple=64):
    """The same with positions in multiples of so many."""
    return [[Sequence(s.ids + [5] * (-(len(s.ids) - 1) % multiple), s.response_start, s.record, "")
             for s in batch] for batch in batches]


def measure_step(report, scale, device):
    base = random_base(scale.seven, device, torch.bfloat16)
    product = product_flops(scale.product, torch.bfloat16, device)
    report.row("the card", {"bf16 product, width": scale.product, "TFLOP/s": product / 1e12})
    report.note("share of the peak: products and attention that a step computes, recomputed ones "
                "too, per second, over those of the large product above")
    whole = f"1 x {scale.tokens} tokens"
    cases = {whole: [random_batch(1, scale.tokens, base.args.vocab_size)],
             "Dolly's lengths": dolly_batches(scale.dolly, scale.tokens)}
    for kind, checkpoint in CHECKPOINT.items():
        methods = {name: partial(make, checkpoint=checkpoint) for name, make in METHODS.items()}
        for case, batches in cases.items():
            seconds = compare_methods(report, f"{case}, {kind}", methods, base, batches,
                                      device=device, product=product, rounds=scale.rounds,
                                      budget=scale.budget)
            steps.free()
            if kind == "plain" and case == whole:
                report_aims(report, "aims, as on a CPU", seconds)


def measure_growth(report, scale, device):
    base = random_base(scale.seven, device, torch.bfloat16)
    axes = {"heads": scale.heads, "rank": scale.ranks, "length": scale.lengths}
    compare_growth(report, base, axes, tokens=scale.tokens, device=device, rounds=scale.rounds)


def kernels(events):
    """Those of a profiler's events that a GPU runs: regions with a name, such as AdamW's
    step, are among its events too."""
    return [event for event in events if not event.is_user_annotation
            and event.device_type != torch.autograd.DeviceType.CPU]


def launches(method, batches, seconds):
    """What a GPU launches in a round of so many seconds, as cells of a row; {} on a
    CPU."""
    with torch.profiler.profile() as record:
        method.steps(batches)
    found = kernels(record.key_averages())
    busy = sum(event.self_device_time_total for event in found) / 1e6 / seconds
    return {"kernels": sum(event.count for event in found),
            "share with a kernel running": busy} if found else {}


def measure_profile(report, scale, device):
    base = random_base(scale.seven, device, torch.bfloat16)
    method = ours(base, rank=8, heads=3)
    whole = [random_batch(1, scale.tokens, base.args.vocab_size)]
    exact = dolly_batches(scale.dolly, scale.tokens)
    cases = {f"1 x {scale.tokens} tokens": whole, "Dolly's lengths": exact,
             "Dolly's lengths up to multiples of 64": rounded_up(exact)}
    for case, batches in cases.items():
        method.steps(batches)
        work = partial(method.steps, batches)
        seconds = median(time_rounds({case: work}, scale.rounds, device)[case])
        report.row("launches", {"case": case, "seconds": seconds,
                                **launches(method, batches, seconds)})
    profile(report, method, whole[0], device)
    del cases["Dolly's lengths"]  # every length would be another graph
    attempt(report, "torch.compile", partial(
        compare_compiled, report, base, cases, backend=scale.backend, device=device,
        rounds=scale.rounds))


def measure_main(report, scale, device):
    """The first command of the README, whole, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        said = io.StringIO()
        started = time.perf_counter()
        with redirect_stdout(said), redirect_stderr(said):
            status = train.main(["--heads", "3", "--rank", "8", "--device", device,
                                 "--out", str(run), *scale.main])
        seconds = time.perf_counter() - started
        if status:
            raise RuntimeError(said.getvalue().strip().split("\n")[-1])
        result = read_json(run / "run.json", "metrics")
    metrics = result["metrics"]
    report.row("the main command", {
        "dtype": result["settings"]["dtype"], "seconds": seconds, "training": result["seconds"],
        "loss base": metrics["val_loss_base"], "tuned": metrics["val_loss"],
        "exact match": metrics["exact_match"],
        "peak GiB": None if device == "cpu" else result["peak_gib"]})


def measure_mmlu(report, scale, device):
    model = random_base(scale.seven, device, torch.bfloat16).eval()
    subjects = drawn_prompts(scale.subjects, scale.questions, scale.shots, model.args.vocab_size)
    compare_prefix(report, model, subjects, device=device, rounds=1)


def measure_kmeans(report, scale, device):
    count, width = scale.records
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, width, generator=generator)
    x = centres[torch.randint(8, (count,), generator=generator)]
    x = (x + torch.randn(count, width, generator=generator)).to(device)
    for k in range(1, scale.k_max + 1):
        steps.wait(device)
        started = time.perf_counter()
        _, _, inertia = kmeans(x, k)
        report.row(f"k-means, {count:,} x {width:,}", {
            "k": k, "seconds": time.perf_counter() - started, "inertia": inertia})


def measure_commands(report, scale, device):
    for name, measure in (("k-means", measure_kmeans), ("the main command", measure_main),
                          ("MMLU", measure_mmlu)):
        attempt(report, name, partial(measure, report, scale, device))
        steps.free()


def total_memory(device):
    """Bytes of the card; no bound on a CPU."""
    return math.inf if device == "cpu" else torch.cuda.get_device_properties(device).total_memory


def peak_of_step(shape, tokens, checkpoint, device):
    """GiB that HydraLoRA's second step takes at most, everything included, and GiB that
    torch holds of the card by then; (None, None) on a CPU."""
    method = ours(random_base(shape, device, torch.bfloat16), rank=8, heads=3,
                  checkpoint=checkpoint)
    batch = [Sequence([5] * (tokens + 1), 1, 0, "")]  # all targets, as --dry-run assumes
    method.step(batch)
    if steps.extra_peak(partial(method.step, batch), device) is None:
        return None, None
    return (torch.cuda.max_memory_allocated(device) / GIB,
            torch.cuda.max_memory_reserved(device) / GIB)


def measure_memory(report, scale, device):
    """Each size with what --dry-run computes and what it takes; what cannot fit is not
    tried."""
    settings = dict(rank=8, heads=3, dropout=steps.DROPOUT)
    cases = [(size, shape, kind) for size, shape in (("7B", scale.seven), ("13B", scale.thirteen))
             for kind in CHECKPOINT]
    for size, shape, kind in cases:
        need = memory.measure_step(
            ModelArgs(**shape), settings, dtype="bf16", quantize="none", batch_size=1,
            length=scale.tokens, checkpoint=CHECKPOINT[kind], step=steps.take_step,
            make_optimizer=partial(train.make_optimizer, lr=steps.LR))
        computed, wanted = need.total / GIB, need.gpu / GIB
        if need.gpu > total_memory(device):
            report.note(f"{size}, {kind}: skipped, too little memory on the card ({wanted:.1f} GiB "
                        "are needed)")
            continue
        found = attempt(report, size, partial(peak_of_step, shape, scale.tokens, CHECKPOINT[kind],
                                              device), f", {kind}")
        measured, held = found or (None, None)
        report.row("peak of a step and --dry-run's sum", {
            "size": size, "activations": kind, "computed GiB": computed, "measured GiB": measured,
            "measured over computed": measured and measured / computed,
            "held by torch GiB": held, "a GPU needs, by --dry-run": wanted})
        steps.free()


MEASURES = {"step": measure_step, "memory": measure_memory, "commands": measure_commands,
            "growth": measure_growth, "profile": measure_profile}
