"""The parts of gpu.py: each takes a Report, a Scale and a device, and reports as it goes.

    python -m experiments.gpu --part step

Methods and profile are those of benchmark.py, on a device and with a base in bf16. Times are the
clock's between two waits for the device; memory is what torch has allocated at most.
"""

import gc
import io
import random
import statistics
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from cluster import kmeans
from data import WORLD
from data.corpus import Sequence, length_batches
from eval_mmlu import score_prompts
from experiments.benchmark import (
    ALPHA,
    DROPOUT,
    FRAMEWORKS,
    Floor,
    Framework,
    Ours,
    bounds,
    dolly_sequences,
    profile,
    stand_ins,
)
from model import ModelArgs, Transformer
from support.cli import one_line, out_of_memory
from support.memory import GIB, needs

CHECKPOINT = {"plain": [], "checkpointed": ["--checkpoint-activations"]}


@dataclass
class Scale:
    """The sizes of everything that is measured."""
    seven: dict  # ModelArgs of 7B, and of 13B
    thirteen: dict
    tokens: int = 1024
    rounds: int = 5
    budget: float = 16.0  # seconds after which the rounds of one table end
    dolly: int = 12  # records that stand for Dolly's lengths
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
    main: list = field(default_factory=list)  # further flags of the main command
    lines: int = 0  # records of the world that the main command reads, 0: all


def shape(dim, layers):
    """Meta's params.json of a LLaMA 2 of that size, and the length it was made for."""
    return dict(dim=dim, n_layers=layers, n_heads=dim // 128, vocab_size=32000, multiple_of=256,
                max_seq_len=4096)


FULL = Scale(seven=shape(4096, 32), thirteen=shape(5120, 40))
SMALL = dict(dim=128, n_layers=2, n_heads=2, vocab_size=768, multiple_of=32, max_seq_len=256)
TINY = Scale(seven=SMALL, thirteen={**SMALL, "n_layers": 3}, tokens=48, rounds=1, dolly=2,
             heads=(1, 2), ranks=(4, 8), lengths=(32, 64), product=128, subjects=2, questions=6,
             shots=(20, 30), records=(60, 16), k_max=3, backend="eager", lines=48,
             main=["--max-steps", "3", "--max-seq-len", "128"])

# ---------------------------------------------------------------- models, batches, clocks


def random_base(args, device):
    """A Transformer of random bf16 weights, made on the device."""
    with torch.device("meta"):
        model = Transformer(ModelArgs(**args)).to(torch.bfloat16)
    model.to_empty(device=device).requires_grad_(False)
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.normal_(std=0.02) if weight.ndim == 2 else weight.fill_(1)
    return model


def row_of(tokens, vocab, seed=0):
    """A batch of one sequence that makes `tokens` positions, the loss on its second half."""
    numbers = random.Random(seed)
    ids = [numbers.randrange(3, vocab) for _ in range(tokens + 1)]
    return [Sequence(ids, tokens // 2 + 1, 0, "")]


def dolly_rows(scale):
    """Batches of one record each, whose lengths are spread like Dolly's."""
    sequences = dolly_sequences(SimpleNamespace(data=None, tokenizer=None))
    rows = stand_ins(length_batches(sequences, 1), scale.dolly, 0.5)
    return [[Sequence(s.ids[:scale.tokens + 1], min(s.response_start, scale.tokens), s.record, "")]
            for (s,) in rows]


def positions(batches):
    return sum(len(s.ids) - 1 for batch in batches for s in batch)


def flags_of(device, *more):
    return ["--device", device, "--dtype", "bf16", *more]


def wait(device):
    torch.get_device_module(device).synchronize()


def timed(device, work):
    """Seconds of work() on the device, whatever was queued before it."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def allocated(device, peak=False):
    """Bytes that torch has allocated on a GPU, now or at most; 0 on a CPU, which does not tell."""
    module = torch.get_device_module(device)
    if not hasattr(module, "memory_allocated"):
        return 0
    return module.max_memory_allocated(device) if peak else module.memory_allocated(device)


def peak_beyond(device, work):
    """Bytes that work() allocates at most beyond those that stood before it."""
    wait(device)
    before, module = allocated(device), torch.get_device_module(device)
    if before:
        module.reset_peak_memory_stats(device)
    work()
    wait(device)
    return allocated(device, peak=True) - before


def free(device):
    gc.collect()
    module = torch.get_device_module(device)
    if hasattr(module, "empty_cache"):
        module.empty_cache()


def attempt(report, name, device, work, foreign=False):
    """work(), or None with a note where the card's memory does not reach; where it is foreign code,
    whatever its error is."""
    try:
        return work()
    except Exception as error:
        if not (foreign or out_of_memory(error)):
            raise
        reason = one_line(str(error).split(". ")[0])
        kind = "too little memory on the card" if out_of_memory(error) else type(error).__name__
    report.note(f"{name}: skipped, {kind} ({reason})")
    free(device)
    return None


def standing(model, optimizer):
    """Bytes of a method between two steps: weights, adapters, the optimiser's state."""
    return (sum(p.nbytes for p in model.parameters())
            + sum(value.nbytes for state in optimizer.state.values()
                  for value in state.values() if torch.is_tensor(value)))


# ---------------------------------------------------------------- 1. a step of 7B's shape


def product_flops(scale, device):
    """Operations a second of a large bf16 product: what this card reaches at best."""
    a = torch.randn(scale.product, scale.product, device=device).bfloat16()
    for _ in range(3):
        a @ a
    seconds = timed(device, lambda: [a @ a for _ in range(10)])
    return 10 * 2 * scale.product**3 / seconds


def load_frameworks(report, device):
    """experiments/frameworks.py, or None with a note where what it imports is missing."""
    if not FRAMEWORKS:
        return report.note("PEFT's LoRA and the looped HydraLoRA: skipped, transformers or peft is "
                           "not installed")

    def load():
        from experiments import frameworks
        return frameworks

    return attempt(report, "PEFT's LoRA and the looped HydraLoRA", device, load, foreign=True)


def makers(base, flags, frameworks):
    """{method: how to make it}, all on the base's own weights."""
    found = {"HydraLoRA 3 x 8": lambda: Ours(base, rank=8, heads=3, flags=flags),
             "LoRA r24": lambda: Ours(base, rank=24, heads=1, flags=flags),
             "floor": lambda: Floor(base, flags)}
    if frameworks:
        common = dict(alpha=ALPHA, dropout=DROPOUT, base=base)

        def framework(make, **settings):
            model = make(base.args, **settings, **common)
            if "--checkpoint-activations" in flags:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            return Framework(model, frameworks.train_step)

        found |= {"PEFT LoRA r24": lambda: framework(frameworks.peft_lora, rank=24),
                  "looped HydraLoRA 3 x 8":
                      lambda: framework(frameworks.looped_hydra, rank=8, heads=3)}
    return found


def take(method, batches):
    """A step of each batch; transformers shifts the labels itself, so it is given one token less.
    """
    for batch in batches:
        if isinstance(method, Framework):
            batch = [Sequence(s.ids[:-1], min(s.response_start, len(s.ids) - 2), s.record, "")
                     for s in batch]
        method.step(batch)


def warm(method, batches):
    """The first step of each batch, and the operations of its products and attention."""
    with FlopCounterMode(display=False) as counter:
        take(method, batches)
    return counter.get_total_flops()


def compare_methods(report, table, found, batches, *, scale, device, peak, aims):
    """Rows of a table: every method's steps on the batches in turn, round by round."""
    flops, extra, seconds = {}, {}, {name: [] for name in found}
    for name in [*found]:
        def first(name=name):
            flops[name] = warm(found[name], batches)
            extra[name] = peak_beyond(device, lambda: take(found[name], batches))
            return True
        foreign = isinstance(found[name], Framework)
        if not attempt(report, f"{name}, {table}", device, first, foreign):
            del found[name], seconds[name]
            free(device)
    started = time.perf_counter()
    for _ in range(scale.rounds):
        for name, method in found.items():
            seconds[name].append(timed(device, lambda method=method: take(method, batches)))
        if time.perf_counter() - started > scale.budget:
            break
    ours = seconds.get("HydraLoRA 3 x 8")
    ratio = {name: statistics.median(a / b for a, b in zip(ours, values))
             for name, values in seconds.items()} if ours else {}
    for name, values in seconds.items():
        median = statistics.median(values)
        whole = standing(found[name].model, found[name].optimizer) + extra[name]
        report.row(table, method=name, seconds=median, **{
            "tokens/s": positions(batches) / median, "records/s": len(batches) / median,
            "HydraLoRA's time against it": ratio.get(name),
            "peak GiB": whole / GIB if allocated(device) else None,
            "share of the peak": flops[name] / median / peak, "rounds": len(values)})
    for claim, value, relation, bound in bounds(ratio) if aims else []:
        holds = value <= bound if relation == "<=" else value >= bound
        report.row("aims, as on a CPU", aim=claim, wanted=f"{relation} {bound}", measured=value,
                   holds=holds)


def measure_step(report, scale, device):
    base = attempt(report, "7B's shape", device, lambda: random_base(scale.seven, device))
    if base is None:
        return
    peak = product_flops(scale, device)
    report.row("the card", **{"bf16 product, width": scale.product, "TFLOP/s": peak / 1e12})
    report.note("share of the peak: products and attention that a step computes, recomputed ones "
                "too, a second, over those of the large product above")
    frameworks = load_frameworks(report, device)
    cases = {f"1 x {scale.tokens} tokens": [row_of(scale.tokens, base.args.vocab_size)],
             "Dolly's lengths, one record a step": dolly_rows(scale)}
    for kind, more in CHECKPOINT.items():
        found = {}
        for name, make in makers(base, flags_of(device, *more), frameworks).items():
            foreign = name.startswith(("PEFT", "looped"))
            method = attempt(report, f"{name}, {kind}", device, make, foreign)
            if method:
                found[name] = method
        for case, batches in cases.items():
            compare_methods(report, f"{case}, {kind}", found, batches, scale=scale, device=device,
                            peak=peak, aims=kind == "plain" and len(batches) == 1)
        del found
        free(device)


# ---------------------------------------------------------------- 2. growth


def measure_growth(report, scale, device):
    base = attempt(report, "7B's shape", device, lambda: random_base(scale.seven, device))
    if base is None:
        return
    usual = dict(heads=3, rank=8, length=scale.tokens)
    axes = {"heads": scale.heads, "rank": scale.ranks, "length": scale.lengths}
    for axis, value in [(axis, value) for axis, values in axes.items() for value in values]:
        heads, rank, length = {**usual, axis: value}.values()
        batches = [row_of(length, base.args.vocab_size)]

        def point(heads=heads, rank=rank, batches=batches):
            method = Ours(base, heads=heads, rank=rank, flags=flags_of(device))
            take(method, batches)
            extra = peak_beyond(device, lambda: take(method, batches))
            spent = [timed(device, lambda: take(method, batches)) for _ in range(scale.rounds)]
            return statistics.median(spent), standing(method.model, method.optimizer) + extra

        found = attempt(report, f"{axis} {value}", device, point)
        if found:
            report.row(axis, **{axis: value, "tokens/s": length / found[0],
                                "peak GiB": found[1] / GIB if allocated(device) else None})
        free(device)


# ---------------------------------------------------------------- 3. where the time goes


def launches(method, batches, seconds):
    """{kernels, busy: share of the step's seconds in which one runs}; None on a CPU."""
    with torch.profiler.profile() as record:
        take(method, batches)
    kernels = [event for event in record.key_averages()
               if event.device_type != torch.autograd.DeviceType.CPU]
    if not kernels:
        return None
    return {"kernels": sum(event.count for event in kernels),
            "busy": sum(event.self_device_time_total for event in kernels) / 1e6 / seconds}


def measure_profile(report, scale, device):
    base = attempt(report, "7B's shape", device, lambda: random_base(scale.seven, device))
    if base is None:
        return
    exact = dolly_rows(scale)
    up = [[Sequence(s.ids + [5] * (-(len(s.ids) - 1) % 64), s.response_start, s.record, "")
           for s in batch] for batch in exact]  # positions in multiples of 64
    cases = {f"1 x {scale.tokens} tokens": [row_of(scale.tokens, base.args.vocab_size)],
             "Dolly's lengths": exact, "Dolly's lengths up to multiples of 64": up}
    plain = attempt(report, "HydraLoRA", device,
                    lambda: Ours(base, rank=8, heads=3, flags=flags_of(device)))
    if plain is None:
        return
    plain_seconds = {}
    for case, batches in cases.items():
        def steps(batches=batches):
            take(plain, batches)
            return statistics.median(timed(device, lambda: take(plain, batches))
                                     for _ in range(scale.rounds))
        plain_seconds[case] = attempt(report, f"plain, {case}", device, steps)
        if plain_seconds[case] is None:
            return
        found = launches(plain, batches, plain_seconds[case])
        report.row("launches", case=case, seconds=plain_seconds[case], **({} if not found else {
            "kernels": found["kernels"], "share with a kernel running": found["busy"],
            "share waiting for a launch": 1 - found["busy"]}))
    for where, share in profile(plain, *cases[f"1 x {scale.tokens} tokens"]).items():
        report.row("where a step's time goes", where=where, share=share)
    measure_compiled(report, scale, device, plain, cases=cases, plain_seconds=plain_seconds)


def measure_compiled(report, scale, device, method, *, cases, plain_seconds):
    """The same method with every block compiled; all blocks are one graph."""
    from torch._dynamo.utils import counters
    for layer in method.model.layers:
        layer.compile(backend=scale.backend)
    for case, batches in cases.items():
        if case == "Dolly's lengths":
            continue  # every length would be another graph
        first = timed(device, lambda batches=batches: take(method, batches[:1]))
        take(method, batches)
        seconds = statistics.median(timed(device, lambda batches=batches: take(method, batches))
                                    for _ in range(scale.rounds))
        report.row(f"torch.compile ({scale.backend}) of the blocks", case=case, plain=plain_seconds[
            case], compiled=seconds, **{
            "time, times": seconds / plain_seconds[case], "first step, s": first,
            "graphs": counters["stats"]["unique_graphs"],
            "graph breaks": sum(counters["graph_break"].values())})


# ---------------------------------------------------------------- 4. the commands


def measure_main(report, scale, device):
    """The first command of the README, whole, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--heads", "3", "--rank", "8", "--device", device, "--out", f"{folder}/run",
                 *scale.main]
        if scale.lines:
            for flag, name in (("--data", "train"), ("--val-data", "val")):
                text = (WORLD / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
                Path(folder, name).write_text("\n".join(text[:scale.lines]), encoding="utf-8")
                flags += [flag, f"{folder}/{name}"]
        said = io.StringIO()
        started = time.perf_counter()
        with redirect_stdout(said), redirect_stderr(said):
            status, result = train.run_training(train.parse_args(flags))
        seconds = time.perf_counter() - started
    if status:
        raise KeyboardInterrupt
    report.row("the main command", **{
        "dtype": result["settings"]["dtype"], "seconds": seconds, "training": result["seconds"],
        "loss base": result["metrics"]["val_loss_base"], "tuned": result["metrics"]["val_loss"],
        "exact match": result["metrics"]["exact_match"],
        "peak GiB": result["peak_gib"] if allocated(device) else None})


def drawn_prompts(scale, vocab):
    """[(ids, shots kept)] a subject: a header and five shots of its own, and 20 to 130 tokens a
    question, as a subject of MMLU has them in the median."""
    numbers = random.Random(0)

    def ids(count):
        return [numbers.randrange(3, vocab) for _ in range(count)]

    shared = [[1, *ids(numbers.randint(*scale.shots))] for _ in range(scale.subjects)]
    each = [scale.questions // scale.subjects + (i < scale.questions % scale.subjects)
            for i in range(scale.subjects)]
    return [[(prefix + ids(numbers.randint(20, 130)), 5) for _ in range(count)]
            for prefix, count in zip(shared, each)]


def measure_mmlu(report, scale, device):
    model = random_base(scale.seven, device).eval()
    subjects = drawn_prompts(scale, model.args.vocab_size)
    letters, answers, spent = [5, 6, 7, 8], {}, {}
    list(score_prompts(model, subjects[0][:8], letters, batch_size=8))  # warm
    for share in (True, False):
        def score(share=share):
            answers[share] = [
                (subject, i, four) for subject, prompts in enumerate(subjects)
                for batch, logprobs in score_prompts(model, prompts, letters, batch_size=8,
                                                     share_prefix=share)
                for i, four in zip(batch, logprobs)]
        spent[share] = timed(device, score)
        report.row("MMLU, five shots, drawn prompts", prompts="shared prefix" if share else "whole",
                   questions=scale.questions, seconds=spent[share], **{
            "questions/s": scale.questions / spent[share]})
    pairs = [(a[2], b[2]) for a, b in zip(sorted(answers[True]), sorted(answers[False]))]
    apart = max(abs(x - y) for a, b in pairs for x, y in zip(a, b))
    same = sum(a.index(max(a)) == b.index(max(b)) for a, b in pairs)
    report.note(f"MMLU: the shared prefix is {spent[False] / spent[True]:.2f} times as fast; "
                f"{same} of {len(pairs)} answers are the same, log-probabilities within "
                f"{apart:.2g}")


def measure_kmeans(report, scale, device):
    generator = torch.Generator().manual_seed(0)
    m, f = scale.records
    centres = torch.randn(8, f, generator=generator)
    x = centres[torch.randint(8, (m,), generator=generator)]
    x = (x + torch.randn(m, f, generator=generator)).to(device)
    for k in range(1, scale.k_max + 1):
        found = []
        seconds = timed(device, lambda k=k, found=found: found.append(kmeans(x, k)))
        report.row(f"k-means, {m:,} x {f:,}", k=k, seconds=seconds, inertia=found[0][2])


def measure_commands(report, scale, device):
    for name, measure in (("k-means", measure_kmeans), ("the main command", measure_main),
                          ("MMLU", measure_mmlu)):
        attempt(report, name, device, lambda measure=measure: measure(report, scale, device))
        free(device)


# ---------------------------------------------------------------- 5. memory


def total_memory(device):
    """Bytes of the card; no bound on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return float("inf")


def measure_memory(report, scale, device):
    """Each size with what it needs by --dry-run and what it takes; what cannot fit is not tried."""
    batch = row_of(scale.tokens, 768)
    for size, args in (("7B", scale.seven), ("13B", scale.thirteen)):
        with torch.device("meta"):
            empty = Transformer(ModelArgs(**args))
        train.add_adapters(empty, train.parse_args(flags_of("cpu")))
        wanted = {kind: needs(empty, train.parse_args(flags_of("cpu")), checkpoint=bool(more))
                  for kind, more in CHECKPOINT.items()}
        fits = {kind: need.total(scale.tokens) + need.overhead(scale.tokens)
                for kind, need in wanted.items()}
        for kind in [kind for kind in fits if fits[kind] > total_memory(device)]:
            report.note(f"{size}, {kind}: skipped, too little memory on the card "
                        f"({fits.pop(kind) / GIB:.1f} GiB are needed)")
        base = attempt(report, size, device, lambda args=args: random_base(args, device)
                       ) if fits else None
        for kind in fits if base else []:
            more, computed = CHECKPOINT[kind], wanted[kind].total(scale.tokens)
            whole = attempt(report, f"{size}, {kind}", device, lambda base=base, more=more:
                            whole_peak(base, batch, device, more))
            found = {} if not whole else {
                "measured GiB": whole / GIB, "measured over computed": whole / computed,
                "held by torch GiB":
                    torch.get_device_module(device).max_memory_reserved(device) / GIB}
            report.row("peak of a step and --dry-run's sum", size=size, activations=kind, **{
                "computed GiB": computed / GIB, **found,
                "a GPU needs, by --dry-run": fits[kind] / GIB})
            free(device)
        del base
        free(device)


def whole_peak(base, batch, device, more):
    """Bytes allocated at most in HydraLoRA's second step, of this process, which holds nothing but
    the base; 0 on a CPU."""
    method = Ours(base, rank=8, heads=3, flags=flags_of(device, *more))
    take(method, [batch])
    peak_beyond(device, lambda: take(method, [batch]))
    return allocated(device, peak=True)


MEASURES = {"step": measure_step, "memory": measure_memory, "commands": measure_commands,
            "growth": measure_growth, "profile": measure_profile}
