"""Talk to a model: prompt in, text out as it comes, from the base, an adapter, or both.

    python -m tools.generate                                # the adapter of the first command
    python -m tools.generate "What is 3 plus 4?" --compare --show-routing
    python -m tools.generate "Give me three ideas." --weights llama-2-7b --adapter adapter.pt
    python -m tools.generate --data FILE --out answers.jsonl           # a whole file of records

A prompt is taken as an instruction, as in training: BOS, prompt, EOS, and the answer follows
(HydraLoRA, section 4); --raw continues it instead. --show-routing is section 3.2.2 made visible:
which of the B matrices the router chose for each token.

Shapes: T tokens, N heads.
"""

import os
import sys
from pathlib import Path

import torch

from data import WORLD
from data.corpus import prompt_text, read_records
from hydralora import adapters_disabled, hydra_layers, record_gates
from model import generate_tokens
from support.cli import Parser, check_min, flag, run_script
from support.device import add_device_flags, pick_device, pick_dtype
from support.distributed import add_shard_flag, process_group
from support.evaluation import most_specialised_layer
from support.lock import file_lock
from support.run_folder import load_model_and_adapter
from tools.answers import answer_file, encode_prompt, sampling, text_pieces

ADAPTER, MADE_BY = Path("runs/hydralora/adapter.pt"), "python train.py --heads 3 --rank 8"
FAMILIES_SHOWN = 8  # of the embedded world: a record of each is answered without a prompt
NO_ROUTER = "has no router (one head, or the uniform gate)"
COLOURS = [31, 32, 34, 33, 35, 36, 91, 92, 94, 93, 95, 96]  # ANSI: red, green, blue, ...


def answer(model, tokenizer, ids, args):
    """Prints the completion of ids token by token and returns its tokens."""
    new = []

    def tokens():
        for token, in generate_tokens(model, tokenizer, [ids], **sampling(args)):
            new.append(token)
            yield token

    for piece in text_pieces(tokenizer, tokens(), before=ids if args.raw else ()):
        print(piece, end="", flush=True)
    print()
    return new


# ---------------------------------------------------------------- routing


@torch.no_grad()
def gates_of(model, ids):
    """{layer: gate (T, N)} of the layers with a router, in one pass over ids."""
    routed = {name for name, layer in hydra_layers(model).items() if layer.router is not None}
    with record_gates(model) as gates:
        model(torch.tensor([ids], device=model.tok_embeddings.weight.device))
    return {name: gate[0].cpu() for name, gate in gates.items() if name in routed}


def painter(coloured):
    """paint(head, text): in the head's colour, or as [head] text where colours are not wanted."""
    def paint(head, text):
        if not coloured:
            return f"[{head + 1}]{text}"
        return f"\033[{COLOURS[head % len(COLOURS)]}m{text}\033[0m"
    return paint


def show_routing(model, tokenizer, prompt, new, coloured):
    """Prints the text with every token marked by its strongest head in one layer, and the mean gate
    of each layer. Head 1 of one layer has nothing to do with head 1 of another, so it is the layer
    that divides these tokens most. A token's gate is the one with which it was read."""
    ids = prompt + new
    gates = gates_of(model, ids)
    name = most_specialised_layer(gates)
    strongest = gates[name].argmax(-1).tolist()
    paint, count = painter(coloured), gates[name].shape[1]
    print(f"the strongest head of each token in {name}, which divides them most: "
          + " ".join(paint(i, f"head {i + 1}") for i in range(count)))
    # prompt and answer are decoded apart, as they were encoded
    pieces = [*text_pieces(tokenizer, prompt), " | ", *text_pieces(tokenizer, new)]
    strongest.insert(len(prompt), None)
    line, last = "", None
    for head, piece in zip(strongest, pieces):
        if head is None or not piece:  # the line between the two; BOS and EOS have no text
            line += piece
        else:  # uncoloured, a mark holds until the next one
            line += paint(head, piece) if coloured or head != last else piece
            last = head
    print(line)
    print(f"\n{'mean gate':32}" + "".join(f"{f'head {i + 1}':>9}" for i in range(count)))
    for layer, gate in gates.items():
        print(f"{layer:32}" + "".join(f"{w:9.3f}" for w in gate.mean(0).tolist()))


# ---------------------------------------------------------------- the run


def talk(model, tokenizer, prompt, args):
    """Answers one prompt: with the adapter if there is one, with --compare without it first."""
    ids = encode_prompt(model, tokenizer, prompt, args)
    if args.compare:
        print("base:     ", end="")
        with adapters_disabled(model):
            answer(model, tokenizer, ids, args)
    print("adapter:  " if args.adapter else "answer:   ", end="")
    new = answer(model, tokenizer, ids, args)
    if args.show_routing:
        print()
        coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        show_routing(model, tokenizer, ids, new, coloured)


def has_router(model):
    return any(layer.router is not None for layer in hydra_layers(model).values())


def world_prompts():
    """(prompt, expected answer, family) of one validation record of each family of the world."""
    first = {}
    for record in read_records(WORLD / "val.jsonl"):
        first.setdefault(record["category"], record)
    return [(prompt_text(r), r["response"], r["category"]) for r in first.values()]


def settle_and_answer(args):
    resolve_args(args, args.prompts or args.data)
    settle_data(args)
    with process_group(args):
        if not args.data:
            return answer_prompts(args)
        with file_lock(f"{args.out}.lock", args.out):
            return answer_file(*load_model_and_adapter(args), args)


def answer_prompts(args):
    model, tokenizer = load_model_and_adapter(args)
    if args.show_routing and not has_router(model):
        raise ValueError(f"--show-routing: {args.adapter} {NO_ROUTER}")
    prompts = [(prompt, None, None) for prompt in args.prompts]
    for prompt, expected, _ in prompts or world_prompts()[:FAMILIES_SHOWN]:
        print(f"> {prompt}")
        if expected is not None:
            print(f"expected: {expected}")
        talk(model, tokenizer, prompt, args)
        print()


def resolve_args(args, asked):
    """Fills in the adapter, the device and the dtype, and refuses what cannot be meant; `asked`
    says whether there is anything to answer but the world's own records."""
    args.device = pick_device(args.device)
    args.dtype = pick_dtype(args.dtype, args.device)
    if not args.weights and not args.adapter:
        if not ADAPTER.is_file():
            raise ValueError(f"there is no {ADAPTER}: make it with `{MADE_BY}`, or name another "
                             "adapter with --adapter, or a model with --weights")
        args.adapter = ADAPTER
    args.weights = args.weights or WORLD / "base"
    if args.weights.resolve() != WORLD / "base" and not asked:
        raise ValueError("give a prompt: the embedded world's records are for its own model")
    if args.max_new_tokens < 1 or args.temperature < 0 or not 0 < args.top_p <= 1:
        raise ValueError("--max-new-tokens must be at least 1, --temperature not negative, and "
                         "--top-p above 0 and at most 1")


def settle_data(args):
    """Refuses flags of this script that do not go together."""
    check_min(args, batch_size=1)
    for name in ("compare", "show_routing"):
        if getattr(args, name) and not args.adapter:
            raise ValueError(f"{flag(name)} needs --adapter FILE")
    if bool(args.data) != bool(args.out):
        raise ValueError("--data needs --out FILE" if args.data else "--out needs --data FILE")
    if args.data:
        if args.prompts or args.show_routing:
            raise ValueError("give prompts or --data, not both; --show-routing is for prompts")
        if args.out.is_dir():
            raise ValueError(f"--out {args.out} is a folder: name a file in it")
        if args.out.resolve() == args.data.resolve():
            raise ValueError(f"--out {args.out} is the data itself: name another file")


def add_talk_flags(p):
    """The flags that say who answers what, and how."""
    p.add_argument("prompts", metavar="PROMPT", nargs="*",
                   help="what to answer (records of the embedded world)")
    p.add_argument("--weights", type=Path,
                   help="checkpoint folder in Meta's layout (the embedded world's)")
    p.add_argument("--adapter", type=Path,
                   help=f"adapter.pt to put on it (none with --weights, else {ADAPTER})")
    p.add_argument("--raw", action="store_true",
                   help="continue the prompt as text: no EOS after it (off)")
    p.add_argument("--max-new-tokens", type=int, default=128, help="tokens of an answer (128)")
    p.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token (0)")
    p.add_argument("--top-p", type=float, default=1.0, help="draw from this much, 1: all (1)")
    p.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    p.add_argument("--max-seq-len", type=int, help="tokens of context (the checkpoint's)")
    add_device_flags(p)
    add_shard_flag(p)


def main(argv=None):
    p = Parser("generate.py", __doc__)
    add_talk_flags(p)
    p.add_argument("--compare", action="store_true", help="the base's answer as well (off)")
    p.add_argument("--show-routing", action="store_true",
                   help="mark each token by its strongest head, in colours on a terminal (off)")
    p.add_argument("--data", type=Path, help="answer every record of this file (off)")
    p.add_argument("--out", type=Path, help="with --data: the answers, a line of JSON a record")
    p.add_argument("--batch-size", type=int, default=8,
                   help="with --data: records answered at a time (8)")
    args = p.parse_args(argv)
    goes_on = "the same command{} goes on from here" if args.data else None
    return run_script("generate.py", lambda: settle_and_answer(args), argv,
                      stopped=f"stopped; {goes_on.format('')}" if goes_on else "interrupted",
                      memory=goes_on.format(" with a smaller --batch-size") if goes_on else
                      "a smaller --max-seq-len or --dtype bf16 needs less")


if __name__ == "__main__":
    sys.exit(main())
