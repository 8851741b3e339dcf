"""The router on one page: which head takes which token, layer by layer, in any browser.

    python -m tools.routing_page --out routing.html          # a record of each family of the world
    python -m tools.routing_page "What is 3 plus 4?" --weights llama-2-7b --adapter adapter.pt \\
        --out routing.html

HydraLoRA, section 3.2.2: the gates w(x) of every token of prompt and answer. The page
is the template routing_page.html with the numbers put into it; it needs no network.
Gates are rounded to thousandths, as the page shows them.

Shapes: T tokens, L layers, N heads.
"""

import base64
import json
import sys
from pathlib import Path

import torch

from model import generate_ids
from support.cli import Parser, run_script
from support.distributed import process_group
from support.evaluation import most_specialised_layer
from support.files import read_json, write_text
from tools import generate

TEMPLATE, MARK = Path(__file__).with_suffix(".html"), "@DATA@"  # the mark is where the data goes


def packed(gates):
    """Gates (rows, L, N) in thousandths as base64: a fifth of the size of digits."""
    return base64.b64encode((gates * 1000).round().short().numpy().astype("<i2").tobytes()).decode()


def stacked(gates):
    """(T, L, N) of {layer: gate (T, N)}."""
    return torch.stack(list(gates.values()), dim=1)


def labelled(tokenizer, ids, before=()):
    """[text, mark] of each token; the mark names a token that has no text of its own,
    such as the space before the first word."""
    names = {tokenizer.bos_id: "BOS", tokenizer.eos_id: "EOS"}

    def mark(token):
        return names.get(token) or ("byte" if tokenizer.model.is_byte(token) else "space")

    return [[piece, "" if piece else mark(token)]
            for token, piece in zip(ids, generate.text_pieces(tokenizer, ids, before))]


def answer_and_gates(model, tokenizer, prompt, args):
    """({tokens, prompt}, {layer: gate (T, N)}): the labelled tokens of a prompt and its
    answer, how many of them are the prompt's, and the gates of all."""
    ids = generate.encode_prompt(model, tokenizer, prompt, args)
    new = generate_ids(model, tokenizer, [ids], **generate.sampling(args))[0]
    # prompt and answer are decoded apart, as they were encoded
    tokens = labelled(tokenizer, ids) + labelled(tokenizer, new, before=ids if args.raw else ())
    return {"tokens": tokens, "prompt": len(ids)}, generate.gates_of(model, ids + new)


def run_table(adapter, layers):
    """The mean gates per family in the run.json beside an adapter.pt, as a table of the
    page. None if there is no such run, or if its router has other layers."""
    path = adapter.parent / "run.json"
    if adapter.name != "adapter.pt" or not path.is_file():
        return None
    gate = (read_json(path).get("routing") or {}).get("gate", {})
    if gate.keys() != set(layers):
        return None
    families = list(gate[layers[0]])
    means = torch.tensor([[gate[layer][family] for layer in layers] for family in families])
    return {"title": "validation records of the run",
            "rows": [family or "all" for family in families], "gates": packed(means)}


def page_data(texts, gates_of_texts, run_means=None):
    """The data of the page: texts [{name, tokens, prompt, expected}] with their gates
    [{layer: (T, N)}], the mean gates of each, and the table of the run."""
    layers = list(gates_of_texts[0])
    together = {name: torch.cat([gates[name] for gates in gates_of_texts]) for name in layers}
    means = torch.stack([stacked(gates).mean(0) for gates in gates_of_texts])
    tables = [{"title": "mean over the tokens above", "rows": [text["name"] for text in texts],
               "gates": packed(means)}]
    if run_means:
        tables.append(run_means)
    return {"layers": layers, "heads": together[layers[0]].shape[1],
            "divided": layers.index(most_specialised_layer(together)),
            "texts": [{**text, "gates": packed(stacked(gates))}
                      for text, gates in zip(texts, gates_of_texts)],
            "all": packed(stacked(together).mean(0, keepdim=True)), "tables": tables}


def page(data):
    """The template with the data in it. In a script element `<` could end it or open a
    comment, so JSON writes it as \\u003c."""
    text = json.dumps(data, separators=(",", ":")).replace("<", r"\u003c")
    before, after = TEMPLATE.read_text(encoding="utf-8").split(MARK)
    return before + text + after


def write_page(args):
    model, tokenizer = generate.load(args)
    if not generate.has_router(model):
        raise ValueError(f"{args.adapter or args.weights} {generate.NO_ROUTER}")
    given = [(prompt, None, f"prompt {i}") for i, prompt in enumerate(args.prompts, start=1)]
    texts, gates_of_texts = [], []
    for prompt, expected, name in given or generate.world_prompts():
        text, gates = answer_and_gates(model, tokenizer, prompt, args)
        texts.append({"name": name, "expected": expected, **text})
        gates_of_texts.append(gates)
    data = page_data(texts, gates_of_texts, run_table(args.adapter, list(gates_of_texts[0])))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, page(data))
    print(f"wrote {args.out}: {len(texts)} texts, {len(data['layers'])} layers, {data['heads']} "
          "heads; open it in a browser")


def parse_args(argv):
    p = Parser("routing_page.py", __doc__)
    generate.add_talk_flags(p)
    p.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="page to write")
    args = p.parse_args(argv)
    try:
        generate.resolve_talk_args(args, has_input=args.prompts)
    except ValueError as error:
        p.error(str(error))
    return args


def run(args):
    with process_group(args.device, args.shard_base):
        write_page(args)


def main(argv=None):
    return run_script("routing_page.py", parse_args, run, argv,
                      memory="a smaller --max-seq-len or --dtype bf16 needs less")


if __name__ == "__main__":
    sys.exit(main())
