"""Talk to a model: prompt in, text out as it comes, from the base, an adapter, or both.

    python -m tools.generate "What is 3 plus 4?" --weights llama-2-7b --adapter adapter.pt
    python -m tools.generate "Name a fish." "And a bird." --chat   # one conversation
    python -m tools.generate --data FILE --out answers.jsonl       # a whole file of records

A prompt is taken as an instruction, as in training: BOS, prompt, EOS, and the answer
follows (HydraLoRA, section 4); --raw continues the prompt instead. --show-routing makes
section 3.2.2 visible: the B matrix that the router prefers for each token.

Shapes: T tokens, N heads.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

try:
    from data import WORLD, corpus
except ModuleNotFoundError as error:  # python tools/generate.py, and python -P
    raise SystemExit(f"{error}: start it in the repository as `python -m tools.generate`") from None
from hydralora import adapters_disabled, hydra_layers, record_gates
from model import generate_ids, generate_tokens, sample
from support.base import base_digest, check_unchanged, load_model_and_adapter, model_length
from support.cli import Parser, check_min, flag, progress, run_script
from support.device import add_device_flags, autocast, pick_device, pick_dtype
from support.distributed import add_shard_flag, from_rank0, process_group
from support.evaluation import TOTAL, most_specialised_layer, row_name
from support.files import digest, write_text
from support.jsonl_resume import append_row, open_partial, read_partial, remove_partial
from support.lock import file_lock
from support.quantize import add_quantize_flag

ADAPTER = Path("runs/hydralora/adapter.pt")  # of the README's first command
FAMILIES_SHOWN = 8  # of the embedded world: a record of each is answered without prompts
SMALLEST = 1e-6  # temperature and top-p: in fp32, less makes infinities
NO_ROUTER = "has no router (one head, or the uniform gate)"
COLOURS = [31, 32, 34, 33, 35, 36, 91, 92, 94, 93, 95, 96]  # ANSI: red, green, blue, ...


# ---------------------------------------------------------------- text and tokens


def encode_prompt(model, tokenizer, prompt, args, place="", before=()):
    """The tokens of a prompt: BOS, prompt, EOS; with --raw no EOS; in a conversation the
    tokens `before` it instead of BOS. Raises ValueError, which begins with `place`, if the
    longest answer does not fit after them."""
    ids = list(before) or [tokenizer.bos_id]
    ids += tokenizer.encode(prompt, bos=False, eos=not args.raw)
    limit = model.args.max_seq_len
    if len(ids) + args.max_new_tokens > limit:
        length = f"--max-seq-len {limit}" if args.max_seq_len else model_length(args.weights, limit)
        raise ValueError(f"{place}the prompt's {len(ids)} tokens and --max-new-tokens "
                         f"{args.max_new_tokens} exceed {length}: shorten one of them")
    return ids


def text_of(tokenizer, tokens, before=()):
    """The text that tokens add to those before them, up to the last whole character."""
    text = tokenizer.decode([*before, *tokens])
    return text[len(tokenizer.decode(before)):].rstrip("\ufffd")


def text_pieces(tokenizer, tokens, before=()):
    """[text that each token adds]: "" for BOS, EOS, and a character's first bytes."""
    texts = [text_of(tokenizer, tokens[:i], before) for i in range(len(tokens) + 1)]
    return [text[len(shown):] for shown, text in zip(texts, texts[1:])]


def choose(logits, *settings):
    """The next tokens, as rank 0 samples them: the ranks of a shared base must go on with the
    same ones, and a near tie may round differently on each GPU."""
    return from_rank0(sample(logits, *settings))


def sampling(args):
    """The flags that generate_tokens takes."""
    return {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature,
            "top_p": args.top_p, "seed": args.seed}


# ---------------------------------------------------------------- prompts


def prompts_of(args, families=None):
    """[(prompt, expected answer or None, name)] of the prompts given, else of a validation
    record of each family of the world, the first `families` of them."""
    if args.prompts:
        return [(prompt, None, f"prompt {i}") for i, prompt in enumerate(args.prompts, start=1)]
    first = {}
    for record in corpus.read_records(WORLD / "val.jsonl"):
        first.setdefault(record["category"], record)
    records = [*first.values()][:families]
    return [(corpus.prompt_text(r), r["response"], r["category"]) for r in records]


def stream_answer(model, tokenizer, ids, args):
    """Prints the answer to an encoded prompt token by token, and returns its tokens."""
    before = ids if args.raw else []
    new, shown = [], ""
    for step in generate_tokens(model, tokenizer, [ids], choose=choose, **sampling(args)):
        new += step
        text = text_of(tokenizer, new, before)
        print(text[len(shown):], end="", flush=True)
        shown = text
    print()
    return new


def answer_prompts(args):
    """Prints the answer to each prompt, and what --compare and --show-routing ask for."""
    model, tokenizer = load(args)
    if args.show_routing and not has_router(model):
        raise ValueError(f"--show-routing: {args.adapter} {NO_ROUTER}")
    before = []  # the tokens of the conversation
    for prompt, expected, _ in prompts_of(args, FAMILIES_SHOWN):
        print(f"> {prompt}")
        if expected is not None:
            print(f"expected: {expected}")
        ids = encode_prompt(model, tokenizer, prompt, args, before=before)
        if args.compare:
            print("base:     ", end="")
            with adapters_disabled(model):
                stream_answer(model, tokenizer, ids, args)
        print("adapter:  " if args.adapter else "answer:   ", end="")
        new = stream_answer(model, tokenizer, ids, args)
        if args.show_routing:
            print()
            show_routing(model, tokenizer, ids, new)
        if args.chat:
            before = [*ids, *new, tokenizer.eos_id]
        print()


# ---------------------------------------------------------------- routing


def has_router(model):
    return any(layer.router is not None for layer in hydra_layers(model).values())


@torch.no_grad()
def gates_of(model, ids):
    """{layer: gate (T, N)} from one pass over the tokens ids."""
    with record_gates(model) as gates:
        model(torch.tensor([ids], device=model.tok_embeddings.weight.device))
    return {name: gate[0].cpu() for name, gate in gates.items()}


def paint(head, text, coloured):
    """The text in the colour of a head, or without colours after "[head]"."""
    if not coloured:
        return f"[{head + 1}]{text}"
    return f"\033[{COLOURS[head % len(COLOURS)]}m{text}\033[0m"


def show_routing(model, tokenizer, prompt, new):
    """Prints the text with every token marked by its strongest head in the layer whose gates
    differ most between these tokens, and the mean gate of each layer. A token's gate is the
    one computed from it."""
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    gates = gates_of(model, prompt + new)
    name = most_specialised_layer(gates)
    heads = range(gates[name].shape[1])
    print(f"the strongest head of each token in {name}, the most specialised layer: "
          + " ".join(paint(i, f"head {i + 1}", coloured) for i in heads))
    strongest = gates[name].argmax(-1).tolist()
    # prompt and answer are decoded apart, as they were encoded
    pieces = [*text_pieces(tokenizer, prompt), " | ", *text_pieces(tokenizer, new)]
    strongest.insert(len(prompt), None)
    line, last = "", None
    for head, piece in zip(strongest, pieces):
        # the line between the two has no head, BOS and EOS have no text, and without colours a
        # mark holds until the next one
        if head is None or not piece or (head == last and not coloured):
            line += piece
        else:
            line += paint(head, piece, coloured)
            last = head
    print(line)
    print(f"\n{'mean gate':32}" + "".join(f"{f'head {i + 1}':>9}" for i in heads))
    for layer, gate in gates.items():
        print(f"{layer:32}" + "".join(f"{w:9.3f}" for w in gate.mean(0).tolist()))


# ---------------------------------------------------------------- a whole file of records


def encode_file(model, tokenizer, records, args):
    """A Sequence of every record's prompt, or ValueError before the first answer."""
    sequences = []
    for index, record in enumerate(records):
        turns = corpus.turns_of(record)
        ids, prompts = corpus.encode_turns(turns, tokenizer)
        ids = encode_prompt(model, tokenizer, turns[-1][0], args,
                            before=ids[:prompts[-1][0]], place=f"{args.data}, {record.place}: ")
        sequences.append(corpus.Sequence(ids, len(ids), index, record["category"], record.place))
    return sequences


def batch_answers(model, tokenizer, batch, args):
    """[(text that stream_answer would print, whether it was cut at --max-new-tokens)], one for
    each Sequence."""
    ids = [s.ids for s in batch]
    new = generate_ids(model, tokenizer, ids, choose=choose, **sampling(args))
    return [(text_of(tokenizer, answer, prompt if args.raw else ()),
             len(answer) == args.max_new_tokens) for prompt, answer in zip(ids, new)]


def answer_missing(model, tokenizer, sequences, args, done, file):
    """Adds the missing rows to `done`, {record's index: row}, and to the file. A
    resumed run has the batches of a whole one, so that sums are rounded alike."""
    with progress(total=len(sequences), initial=len(done), unit=" records") as bar:
        for batch in corpus.length_batches(sequences, args.batch_size):
            if all(s.record in done for s in batch):
                continue
            answers = {"": batch_answers(model, tokenizer, batch, args)}
            if args.compare:
                with adapters_disabled(model):
                    answers["base_"] = batch_answers(model, tokenizer, batch, args)
            for i, s in enumerate(batch):
                if s.record not in done:
                    row = {"index": s.record}
                    for base, column in answers.items():
                        row[f"{base}answer"], row[f"{base}cut"] = column[i]
                    done[s.record] = row
                    append_row(file, done[s.record])
            file.flush()
            bar.update(len(done) - bar.n)


def scored(record, row):
    """A line of the output: the record, the answers, which were cut at --max-new-tokens, and
    which equal the response."""
    line = dict(record)
    for base in ("", "base_"):
        if f"{base}answer" in row:
            line |= {key: row[key] for key in (f"{base}answer", f"{base}cut")}
            line[f"{base}exact"] = row[f"{base}answer"].strip() == record["response"].strip()
    return line


def print_exact(lines):
    """Prints the share of exact matches per category and in all."""
    columns = ["exact", "base_exact"] if "base_exact" in lines[0] else ["exact"]
    print(f"\n{'category':24}{'records':>8}"
          + "".join(f"{column.removesuffix('_exact'):>8}" for column in columns))
    parts = {}
    for line in lines:
        parts.setdefault(line["category"] or corpus.NO_CATEGORY, []).append(line)
    for category, part in [*sorted(parts.items()), (TOTAL, lines)]:
        shares = [sum(line[column] for line in part) / len(part) for column in columns]
        print(f"{row_name(category)}{len(part):8}" + "".join(f"{x:8.1%}" for x in shares))


def answer_file(args):
    """Answers every record of --data and writes --out, or resumes that."""
    model, tokenizer = load(args)
    records = corpus.read_records(args.data)
    records.print_remarks(args.data)
    sequences = encode_file(model, tokenizer, records, args)
    settings = {  # all that the answers depend on; the batch size is not among it
        "weights_digest": base_digest(model),
        "adapter_digest": digest(args.adapter.read_bytes()) if args.adapter else None,
        "data_digest": digest([*map(dict, records)]), "dtype": args.dtype,
        "raw": args.raw, "compare": args.compare, **sampling(args)}
    columns = {"index": int, "answer": str, "cut": bool}
    columns |= {"base_answer": str, "base_cut": bool} if args.compare else {}
    partial = Path(f"{args.out}.partial")
    rows = read_partial(partial, settings, columns=columns, name=("index",)).values()
    done = {row["index"]: row for row in rows}
    if not done.keys() <= set(range(len(records))):
        raise ValueError(f"{partial} is not of an interrupted run: delete it, or choose another "
                         "--out")
    before, started = len(done), time.perf_counter()
    with open_partial(partial, settings, done) as file:
        answer_missing(model, tokenizer, sequences, args, done, file)
    seconds = time.perf_counter() - started
    check_unchanged(model, settings["weights_digest"], args.weights, partial)
    lines = [scored(record, done[i]) for i, record in enumerate(records)]
    write_text(args.out, "".join(json.dumps(line) + "\n" for line in lines))
    remove_partial(partial)
    print_exact(lines)
    if cut := sum(line["cut"] for line in lines):
        print(f"{cut} of {len(lines)} answers were cut at --max-new-tokens {args.max_new_tokens}")
    print(f"\nwrote {len(lines)} answers to {args.out}, {len(lines) - before} of them new, in "
          f"{seconds:.1f} s")


# ---------------------------------------------------------------- flags, and the run


def add_talk_flags(p):
    """The flags of this tool and of routing_page: which model, and how it answers."""
    p.add_argument("prompts", metavar="PROMPT", nargs="*",
                   help="what to answer (records of the embedded world)")
    p.add_argument("--weights", type=Path,
                   help="checkpoint folder in Meta's layout (the embedded world's)")
    p.add_argument("--adapter", type=Path,
                   help=f"adapter.pt to put on it (none with --weights, else {ADAPTER})")
    p.add_argument("--raw", action="store_true",
                   help="continue the prompt as text, without an EOS after it (off)")
    p.add_argument("--max-new-tokens", type=int, default=128, help="most tokens per answer (128)")
    p.add_argument("--temperature", type=float, default=0.0,
                   help="temperature of sampling; 0: always the most likely token (0)")
    p.add_argument("--top-p", type=float, default=1.0,
                   help="probability of the tokens to sample from; 1: all tokens (1)")
    p.add_argument("--seed", type=int, default=0, help="random seed of sampling (0)")
    p.add_argument("--max-seq-len", type=int, help="tokens of context (the checkpoint's)")
    add_device_flags(p)
    add_quantize_flag(p)
    add_shard_flag(p)


def resolve_talk_args(args, has_input):
    """Fills in adapter, weights, device and dtype, or raises ValueError."""
    check_min(args, max_new_tokens=1, temperature=0, seed=0)
    if not SMALLEST <= args.top_p <= 1 or 0 < args.temperature < SMALLEST:
        raise ValueError(f"--top-p must be above 0 and at most 1, and not below {SMALLEST}, like a "
                         f"--temperature above 0; got {args.top_p} and {args.temperature}")
    if not args.weights and not args.adapter:
        if not ADAPTER.is_file():
            raise ValueError(f"there is no {ADAPTER}: make it with `python train.py --heads 3 "
                             "--rank 8`, or name another adapter with --adapter, or a model with "
                             "--weights")
        args.adapter = ADAPTER
    args.weights = args.weights or WORLD / "base"
    if args.weights.resolve() != WORLD / "base" and not has_input:
        raise ValueError("give a prompt: the embedded world's records are for its own model")
    args.device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, args.device)


def check_file_args(args):
    """Raises ValueError for flags that do not go together."""
    check_min(args, batch_size=1)
    for name in ("compare", "show_routing"):
        if getattr(args, name) and not args.adapter:
            raise ValueError(f"{flag(name)} needs --adapter FILE")
    if args.chat and (args.raw or not args.prompts):
        raise ValueError("--chat needs prompts, and no --raw: an EOS ends every turn")
    if bool(args.data) != bool(args.out):
        raise ValueError("--data FILE and --out FILE need one another")
    if args.data and (args.prompts or args.show_routing):
        raise ValueError("give prompts or --data, not both; --show-routing is for prompts")
    if args.data and args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder: name a file in it")


def parse_args(argv):
    p = Parser("generate.py", __doc__)
    add_talk_flags(p)
    p.add_argument("--chat", action="store_true",
                   help="take the prompts as the user's turns of one conversation (off)")
    p.add_argument("--compare", action="store_true", help="print the base's answer as well (off)")
    p.add_argument("--show-routing", action="store_true",
                   help="mark each token by its strongest head, in colours on a terminal (off)")
    p.add_argument("--data", type=Path, help="file of records to answer (none)")
    p.add_argument("--out", type=Path,
                   help="file for the answers to --data, one line of JSON per record")
    p.add_argument("--batch-size", type=int, default=8, help="records of --data per batch (8)")
    return p.parse_args(argv)


def load(args):
    """(model with its adapter, tokenizer) that the flags name."""
    return load_model_and_adapter(args.weights, args.adapter, device=args.device, dtype=args.dtype,
                                  max_seq_len=args.max_seq_len, shard_base=args.shard_base,
                                  quantize=args.quantize)


def run(args):
    resolve_talk_args(args, has_input=args.prompts or args.data)
    check_file_args(args)
    with process_group(args.device, args.shard_base), autocast(args.device, args.dtype):
        if not args.data:
            return answer_prompts(args)
        with file_lock(f"{args.out}.lock", args.out):
            return answer_file(args)


def main(argv=None):
    return run_script(
        "generate.py", parse_args, run, argv,
        stopped="interrupted; with --data, rerun the same command to continue",
        memory="a smaller --batch-size or --max-seq-len, or --dtype bf16, needs less; with --data "
               "the same command continues")


if __name__ == "__main__":
    sys.exit(main())
