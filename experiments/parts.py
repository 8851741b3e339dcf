"""The parts of gpu.py and benchmark.py: what is measured, and how it is reported.

    python -m experiments.gpu --part step

The first half serves both commands. The second half holds the parts of gpu.py, on models of 7B's
shape in bf16; each takes a Report, a Scale and a device.
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
from data.corpus import Sequence, length_batches
from eval_mmlu import letter_logprobs, score_prompts
from experiments import steps
from experiments.steps import METHODS, OURS, ours, random_base, random_batch, time_rounds
from hydralora import HydraLinear
from model import ModelArgs
from support import memory
from support.cli import is_out_of_memory, one_line
from support.files import read_json
from support.memory import GIB, Watch

FOREIGN = ("PEFT LoRA r24", "looped HydraLoRA 3 x 8")  # may be absent, or fail in their own ways
# method: what HydraLoRA should reach against it
AIMS = {"LoRA r24": ("HydraLoRA 3 x 8 over LoRA r24, time", "<=", 1.10),
        "floor": ("HydraLoRA 3 x 8 over the floor, time", "<=", 1.20),
        "looped HydraLoRA 3 x 8": ("HydraLoRA over the looped one, tokens/s", ">=", 1.8),
        "PEFT LoRA r24": ("HydraLoRA over PEFT's LoRA r24, tokens/s", ">=", 1.1)}

# ---------------------------------------------------------------- reporting


class Report:
    """Where a part puts what it finds: rows of named tables, and notes. Each is printed, and
    save(content) is called, before the call returns."""

    def __init__(self, save=None):
        self.content = {"status": "running", "tables": {}, "notes": []}
        self.save = save or (lambda content: None)
        self.header = None

    def row(self, table, cells):
        """Adds {column: value} to the table; its first column is as wide as most names."""
        self.content["tables"].setdefault(table, []).append(cells)
        first, *others = cells
        widths = [max(9, len(name)) for name in others]
        if self.header != (table, *cells):
            print(f"\n{table}\n{first:48}"
                  + "".join(f"  {name:>{width}}" for name, width in zip(others, widths)))
            self.header = (table, *cells)
        print(f"{show(cells[first]):48}"
              + "".join(f"  {show(cells[name]):>{width}}" for name, width in zip(others, widths)),
              flush=True)
        self.save(self.content)

    def aim(self, table, claim, measured, relation, bound):
        holds = measured <= bound if relation == "<=" else measured >= bound
        self.row(table, {"aim": claim, "wanted": f"{relation} {bound}", "measured": measured,
                         "holds": holds})

    def note(self, text):
        self.content["notes"].append(one_line(text))
        print(one_line(text), flush=True)
        self.save(self.content)

    def end(self, status):
        self.content["status"] = status
        self.save(self.content)


def show(value):
    """A cell of a table: figures to three digits, "-" for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def attempt(report, name, device, work, foreign=False):
    """work(), or None with a note if the device has too little memory; for foreign code, whatever
    its error is."""
    try:
        return work()
    except Exception as error:
        if not (foreign or is_out_of_memory(error)):
            raise
        reason = one_line(str(error).split(". ")[0])
        kind = "too little memory on the card" if is_out_of_memory(error) else type(error).__name__
    report.note(f"{name}: skipped, {kind} ({reason})")
    steps.free(device)
    return None


# ---------------------------------------------------------------- steps, and how their cost grows


class Result(NamedTuple):
    seconds: list  # per round
    tokens: int  # positions per round
    flops: int  # of the products and the attention of a round
    peak: float | None  # GiB on a GPU, weights and optimiser included

    @property
    def tokens_per_second(self):
        return self.tokens / median(self.seconds)


def first_rounds(make, device):
    """(method, batches, flops, bytes at the peak): make() and two rounds, which warm it up."""
    method, batches = make()
    with FlopCounterMode(display=False) as counter:
        method.steps(batches)
    peak = method.resident() + steps.peak_beyond(partial(method.steps, batches), device)
    return method, batches, counter.get_total_flops(), peak


def run_trials(report, where, makers, *, device, rounds, budget=math.inf):
    """Times steps round by round. makers: {name: function that returns (Method, batches)}; returns
    {name: Result}, without those that are skipped with a note because memory is too small."""
    trials = {}
    for name, make in makers.items():
        trial = attempt(report, f"{name}, {where}", device, partial(first_rounds, make, device),
                        foreign=name in FOREIGN)
        if trial:
            trials[name] = trial
    works = {name: partial(method.steps, batches)
             for name, (method, batches, *_) in trials.items()}
    seconds = time_rounds(works, rounds, device, budget)
    return {name: Result(seconds[name], steps.positions(batches), flops,
                         peak / GIB if steps.allocated(device) else None)
            for name, (_, batches, flops, peak) in trials.items()}


def product_flops(width, dtype, device):
    """Operations per second of a large matrix product: what this device reaches at best."""
    a = torch.randn(width, width, device=device).to(dtype)
    for _ in range(3):
        a @ a
    seconds = steps.seconds_of(lambda: [a @ a for _ in range(10)], device)
    return 10 * 2 * width**3 / seconds


def compare_methods(report, table, methods, base, batches, *, device, product, rounds,
                    budget=math.inf):
    """A row per method: its steps on the batches, against the operations per second of a large
    product. Returns {name: seconds of each round}."""
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
    """What HydraLoRA reaches of its aims, by the seconds that compare_methods returned."""
    ratio = steps.time_ratios(seconds, OURS)
    for name, (claim, relation, bound) in AIMS.items():
        if name in ratio:
            value = ratio[name] if relation == "<=" else 1 / ratio[name]
            report.aim(table, claim, value, relation, bound)


def compare_growth(report, base, axes, *, tokens, batch_tokens=0, device, rounds):
    """Rows along each of {axis: values}, the others being 3 heads, rank 8 and rows of `tokens`: as
    many rows as batch_tokens hold, at least one. Returns {axis: {value: seconds of each round}}."""
    def trial(heads=3, rank=8, length=tokens):
        rows = max(1, batch_tokens // length)
        return (ours(base, heads=heads, rank=rank),
                [random_batch(rows, length, base.args.vocab_size)])

    found = {axis: {} for axis in axes}
    for axis, values in axes.items():
        makers = {value: partial(trial, **{axis: value}) for value in values}
        # on a CPU all take turns, on a GPU each has the memory for itself
        groups = [makers] if device == "cpu" else [{value: makers[value]} for value in values]
        for group in groups:
            results = run_trials(report, axis, group, device=device, rounds=rounds)
            steps.free(device)
            for value, result in results.items():
                report.row(axis, {axis: value, "tokens/s": result.tokens_per_second,
                                  "peak GiB": result.peak})
                found[axis][value] = result.seconds
    return found


def kept_bytes(heads, tokens=512, inputs=576, outputs=1536):
    """Bytes that one adapted layer keeps for the backward pass in addition to its own weights."""
    layer = HydraLinear(torch.nn.Linear(inputs, outputs, bias=False), rank=8, heads=heads,
                        dropout=steps.DROPOUT)
    with Watch() as watch:
        y = layer(torch.randn(tokens, inputs, requires_grad=True))
    return watch.now - y.nbytes


# ---------------------------------------------------------------- where the time goes


def operation_kind(name, shapes, vocab):
    """A matrix product is the head's if a side of it is the vocabulary, an adapter's if a side of
    it is at most 64 wide, else the base's."""
    sides = {side for shape in shapes for side in shape}
    if name in ("aten::mm", "aten::addmm", "aten::bmm"):
        if vocab in sides:
            return "head: products"
        return "adapters: products" if min(sides) <= 64 else "base: products"
    kinds = {"attention": ["attention"], "softmax of loss and gate": ["softmax", "nll_loss"],
             "dropout": ["dropout", "bernoulli"], "optimiser, clipping": ["adam", "foreach"]}
    for kind, words in kinds.items():
        if any(word in name for word in words):
            return kind
    return "the rest: norms, SwiGLU, rotary, additions"


def profile(report, method, batch, device):
    """A row per kind of operation: its share of a step's time, on a GPU of its kernels' time."""
    with torch.profiler.profile(record_shapes=True) as record:
        method.step(batch)
    spent = {}
    for event in record.key_averages(group_by_input_shape=True):
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel: the operation that launched it has its time
        kind = operation_kind(event.key, event.input_shapes, method.model.args.vocab_size)
        own = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        spent[kind] = spent.get(kind, 0) + own
    for kind in sorted(spent, key=spent.get, reverse=True):
        report.row("where a step's time goes", {
            "where": kind, "share": spent[kind] / sum(spent.values())})


def compare_compiled(report, base, cases, *, backend, device, rounds):
    """{case: batches} with and without torch.compile of every block, in turn; all blocks are one
    graph. Returns {case: {"plain", "compiled": seconds of each round}}."""
    from torch._dynamo.utils import counters
    plain, compiled = (ours(base, rank=8, heads=3) for _ in range(2))
    for layer in compiled.model.layers:
        layer.compile(backend=backend)
    found = {}
    for case, batches in cases.items():
        plain.steps(batches)
        started = time.perf_counter()  # the clock, since compiling starts other processes
        steps.seconds_of(partial(compiled.step, batches[0]), device)
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
    """[[(ids, shots)] of each subject]: a header and five shots that its questions share, between
    shots[0] and shots[1] tokens, and 20 to 130 tokens per question, as a subject of MMLU has them
    in the median."""
    numbers = random.Random(0)

    def ids(count):
        return [numbers.randrange(3, vocab_size) for _ in range(count)]

    shared = [[1, *ids(numbers.randint(*shots))] for _ in range(subjects)]
    each = [questions // subjects + (i < questions % subjects) for i in range(subjects)]
    return [[(prefix + ids(numbers.randint(20, 130)), 5) for _ in range(count)]
            for prefix, count in zip(shared, each)]


def compare_prefix(report, table, model, subjects, *, device, rounds):
    """Scores drawn_prompts in two ways, in turn: with the keys and values of a subject's header and
    shots computed once, and every prompt whole. Returns {way: seconds of each round}."""
    letters = [5, 6, 7, 8]
    batches, shared, whole = [], [], []

    def score_shared():
        batches.clear(), shared.clear()
        for prompts in subjects:
            for batch, logprobs in score_prompts(model, prompts, letters, batch_size=8):
                batches.append([prompts[i][0] for i in batch])
                shared.extend(logprobs)

    def score_whole():
        whole.clear()
        for rows in batches:
            whole.extend(letter_logprobs(model, rows, letters))

    list(score_prompts(model, subjects[0][:8], letters, batch_size=8))  # warm
    seconds = time_rounds({"shared prefix": score_shared, "whole": score_whole}, rounds, device)
    middle = steps.medians(seconds)
    for way, value in middle.items():
        report.row(table, {"prompts": way, "questions": len(shared), "seconds": value,
                           "questions/s": len(shared) / value})
    a, b = torch.tensor(shared), torch.tensor(whole)
    report.note(f"MMLU: the shared prefix is {middle['whole'] / middle['shared prefix']:.2f} times "
                f"as fast; {(a.argmax(1) == b.argmax(1)).sum().item()} of {len(a)} answers are the "
                f"same, log-probabilities within {(a - b).abs().max().item():.2g}")
    return seconds


# ================================================================ the parts of gpu.py


@dataclass
class Scale:
    """The sizes of everything that gpu.py measures."""
    seven: dict  # ModelArgs of 7B, and of 13B
    thirteen: dict
    tokens: int = 1024
    rounds: int = 5
    budget: float = 16.0  # seconds after which the rounds of one table end
    dolly: int = 12  # records that represent Dolly's lengths
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
    lines: int = 0  # records of the world that the main command reads, 0: all


CHECKPOINT = {"plain": False, "checkpointed": True}
FULL = Scale(seven=steps.LLAMA_7B, thirteen=steps.LLAMA_13B)
SMALL = dict(dim=128, n_layers=2, n_heads=2, vocab_size=768, multiple_of=32, max_seq_len=256)
TINY = Scale(seven=SMALL, thirteen={**SMALL, "n_layers": 3}, tokens=48, rounds=1, dolly=2,
             heads=(1, 2), ranks=(4, 8), lengths=(32, 64), product=128, subjects=2, questions=6,
             shots=(20, 30), records=(60, 16), k_max=3, backend="eager", lines=48,
             main=("--max-steps", "3", "--max-seq-len", "128"))


def dolly_batches(count, tokens):
    """Batches of one record each, whose lengths are spread like Dolly's."""
    chosen = steps.evenly_chosen(length_batches(steps.dolly_sequences(), 1), count)
    return [steps.shortened(batch, tokens + 1) for batch in chosen]


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
             "Dolly's lengths, one record a step": dolly_batches(scale.dolly, scale.tokens)}
    for kind, checkpoint in CHECKPOINT.items():
        methods = {name: partial(make, checkpoint=checkpoint) for name, make in METHODS.items()}
        for case, batches in cases.items():
            seconds = compare_methods(report, f"{case}, {kind}", methods, base, batches,
                                      device=device, product=product, rounds=scale.rounds,
                                      budget=scale.budget)
            steps.free(device)
            if kind == "plain" and case == whole:
                report_aims(report, "aims, as on a CPU", seconds)


def measure_growth(report, scale, device):
    base = random_base(scale.seven, device, torch.bfloat16)
    axes = {"heads": scale.heads, "rank": scale.ranks, "length": scale.lengths}
    compare_growth(report, base, axes, tokens=scale.tokens, device=device, rounds=scale.rounds)


def launches(method, batches, seconds):
    """What a GPU launches in a step of so many seconds, as cells of a row; {} on a CPU."""
    with torch.profiler.profile() as record:
        method.steps(batches)
    kernels = [event for event in record.key_averages()
               if event.device_type != torch.autograd.DeviceType.CPU]
    if not kernels:
        return {}
    busy = sum(event.self_device_time_total for event in kernels) / 1e6 / seconds
    return {"kernels": sum(event.count for event in kernels),
            "share with a kernel running": busy, "share waiting for a launch": 1 - busy}


def measure_profile(report, scale, device):
    base = random_base(scale.seven, device, torch.bfloat16)
    exact = dolly_batches(scale.dolly, scale.tokens)
    whole = [random_batch(1, scale.tokens, base.args.vocab_size)]
    cases = {f"1 x {scale.tokens} tokens": whole, "Dolly's lengths": exact,
             "Dolly's lengths up to multiples of 64": rounded_up(exact)}
    method = ours(base, rank=8, heads=3)
    for case, batches in cases.items():
        method.steps(batches)
        works = {case: partial(method.steps, batches)}
        seconds = median(time_rounds(works, scale.rounds, device)[case])
        report.row("launches", {"case": case, "seconds": seconds,
                                **launches(method, batches, seconds)})
    profile(report, method, whole[0], device)
    del cases["Dolly's lengths"]  # every length would be another graph
    compare_compiled(report, base, cases, backend=scale.backend, device=device,
                     rounds=scale.rounds)


def measure_main(report, scale, device):
    """The first command of the README, whole, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        flags = ["--heads", "3", "--rank", "8", "--device", device, "--out", str(run), *scale.main]
        if scale.lines:
            for flag, name in (("--data", "train"), ("--val-data", "val")):
                lines = (WORLD / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
                Path(folder, name).write_text("\n".join(lines[:scale.lines]), encoding="utf-8")
                flags += [flag, f"{folder}/{name}"]
        said = io.StringIO()
        started = time.perf_counter()
        with redirect_stdout(said), redirect_stderr(said):
            status = train.main(flags)
        seconds = time.perf_counter() - started
        if status:
            raise RuntimeError(said.getvalue().strip().split("\n")[-1])
        result = read_json(run / "run.json")
    report.row("the main command", {
        "dtype": result["settings"]["dtype"], "seconds": seconds, "training": result["seconds"],
        "loss base": result["metrics"]["val_loss_base"], "tuned": result["metrics"]["val_loss"],
        "exact match": result["metrics"]["exact_match"],
        "peak GiB": result["peak_gib"] if steps.allocated(device) else None})


def measure_mmlu(report, scale, device):
    model = random_base(scale.seven, device, torch.bfloat16).eval()
    subjects = drawn_prompts(scale.subjects, scale.questions, scale.shots, model.args.vocab_size)
    compare_prefix(report, "MMLU, five shots, drawn prompts", model, subjects, device=device,
                   rounds=1)


def measure_kmeans(report, scale, device):
    generator = torch.Generator().manual_seed(0)
    count, width = scale.records
    centres = torch.randn(8, width, generator=generator)
    x = centres[torch.randint(8, (count,), generator=generator)]
    x = (x + torch.randn(count, width, generator=generator)).to(device)
    for k in range(1, scale.k_max + 1):
        steps.wait(device)
        started = time.perf_counter()
        _, _, inertia = kmeans(x, k)
        seconds = time.perf_counter() - started
        report.row(f"k-means, {count:,} x {width:,}", {
            "k": k, "seconds": seconds, "inertia": inertia})


def measure_commands(report, scale, device):
    for name, measure in (("k-means", measure_kmeans), ("the main command", measure_main),
                          ("MMLU", measure_mmlu)):
        attempt(report, name, device, partial(measure, report, scale, device))
        steps.free(device)


def total_memory(device):
    """Bytes of the card; no bound on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    return math.inf


def peak_of_step(shape, tokens, checkpoint, device):
    """Bytes allocated at most in HydraLoRA's second step, everything included; 0 on a CPU."""
    base = random_base(shape, device, torch.bfloat16)
    method = ours(base, rank=8, heads=3, checkpoint=checkpoint)
    batch = [Sequence([5] * (tokens + 1), 1, 0, "")]  # every token a target, as in --dry-run
    method.step(batch)
    steps.peak_beyond(partial(method.step, batch), device)
    return steps.allocated(device, peak=True)


def measure_memory(report, scale, device):
    """Each size with what --dry-run computes and what it takes; what cannot fit is not tried."""
    for size, shape in (("7B", scale.seven), ("13B", scale.thirteen)):
        for kind, checkpoint in CHECKPOINT.items():
            need = memory.measure_step(
                ModelArgs(**shape), dict(rank=8, heads=3, dropout=steps.DROPOUT), dtype="bf16",
                make_optimizer=partial(train.make_optimizer, lr=steps.LR), step=steps.take_step,
                batch_size=1, length=scale.tokens, checkpoint=checkpoint)
            if need.gpu > total_memory(device):
                report.note(f"{size}, {kind}: skipped, too little memory on the card "
                            f"({need.gpu / GIB:.1f} GiB are needed)")
                continue
            peak = attempt(report, f"{size}, {kind}", device, partial(
                peak_of_step, shape, scale.tokens, checkpoint, device))
            measured = {}
            if peak:
                reserved = torch.get_device_module(device).max_memory_reserved(device)
                measured = {"measured GiB": peak / GIB,
                            "measured over computed": peak / need.total,
                            "held by torch GiB": reserved / GIB}
            report.row("peak of a step and --dry-run's sum", {
                "size": size, "activations": kind, "computed GiB": need.total / GIB, **measured,
                "a GPU needs, by --dry-run": need.gpu / GIB})
            steps.free(device)


MEASURES = {"step": measure_step, "memory": measure_memory, "commands": measure_commands,
            "growth": measure_growth, "profile": measure_profile}
