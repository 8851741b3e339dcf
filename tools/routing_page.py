"""The router on one page: which head takes which token, layer by layer, in any browser.

    python -m tools.routing_page "What is 3 plus 4?" --out routing.html

HydraLoRA, section 3.2.2: the gates w(x) of every token of prompt and answer, to the
thousandth. The page is the template routing_page.html with the numbers put into it; it
needs no network.

Shapes: T tokens, L layers, N heads.
"""

import base64
import json
import sys
from pathlib import Path

import torch

from data.records import NO_CATEGORY
from model import generate_ids
from support.cli import Parser, run_script
from support.device import autocast
from support.distributed import process_group
from support.evaluation import check_routing, most_specialised_layer
from support.files import read_json, write_text
from tools import generate

TEMPLATE, MARK = Path(__file__).with_suffix(".html"), "@DATA@"  # the mark is where the data goes


def packed(gates):
    """Gates (rows, L, N) in thousandths as base64: a fifth of the size of digits."""
    return base64.b64encode((gates * 1000).round().short().numpy().astype("<i2").tobytes()).decode()


def labelled(tokenizer, ids, before=()):
    """[text, mark] of each token; the mark names a token that has no text of its own."""
    names = {tokenizer.bos_id: "BOS", tokenizer.eos_id: "EOS"}

    def mark(token):
        return names.get(token) or ("byte" if tokenizer.model.is_byte(token) else "space")

    return [[piece, "" if piece else mark(token)]
            for token, piece in zip(ids, generate.text_pieces(tokenizer, ids, before))]


def run_table(adapter, layers):
    """The mean gates per family in the run.json beside an adapter.pt, as a table of the
    page. None if there is no such run, or if its router has other layers."""
    path = adapter.parent / "run.json"
    if adapter.name != "adapter.pt" or not path.is_file():
        return None
    routing = read_json(path).get("routing")
    if not routing:
        return None
    try:
        check_routing(routing)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; move it away, or take the run's own") from error
    gate = routing["gate"]
    if gate.keys() != set(layers):
        return None
    families = list(gate[layers[0]])
    means = torch.tensor([[gate[layer][family] for layer in layers] for family in families])
    return {"title": "validation records of the run",
            "rows": [family or NO_CATEGORY for family in families], "gates": packed(means)}


def page_data(texts, gates_of_texts, run_means=None):
    """The data of the page: texts [{name, expected, tokens, prompt}] with their gates
    [{layer: (T, N)}], the mean gates of each, and the table of the run."""
    layers = list(gates_of_texts[0])
    stacks = [torch.stack(list(gates.values()), dim=1) for gates in gates_of_texts]  # (T, L, N)
    together = torch.cat(stacks)
    tables = [{"title": "mean over the tokens above", "rows": [text["name"] for text in texts],
               "gates": packed(torch.stack([gates.mean(0) for gates in stacks]))}]
    if run_means:
        tables.append(run_means)
    divided = most_specialised_layer(dict(zip(layers, together.unbind(1))))
    return {"layers": layers, "heads": together.shape[2], "divided": layers.index(divided),
            "texts": [{**text, "gates": packed(gates)} for text, gates in zip(texts, stacks)],
            "all": packed(together.mean(0, keepdim=True)), "tables": tables}


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
    texts, gates_of_texts = [], []
    for prompt, expected, name in generate.prompts_of(args):
        ids = generate.encode_prompt(model, tokenizer, prompt, args)
        new = generate_ids(model, tokenizer, [ids], choose=generate.choose,
                           **generate.sampling(args))[0]
        # prompt and answer are decoded apart, as they were encoded
        tokens = labelled(tokenizer, ids)
        tokens += labelled(tokenizer, new, before=ids if args.raw else ())
        texts.append({"name": name, "expected": expected, "tokens": tokens, "prompt": len(ids)})
        gates_of_texts.append(generate.gates_of(model, ids + new))
    data = page_data(texts, gates_of_texts, run_table(args.adapter, list(gates_of_texts[0])))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, page(data))
    print(f"wrote {args.out}: {len(texts)} texts, {len(data['layers'])} layers, {data['heads']} "
          "heads; open it in a browser")


def parse_args(argv):
    p = Parser("routing_page.py", __doc__)
    generate.add_talk_flags(p)
    p.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="page to write")
    return p.parse_args(argv)


def run(args):
    generate.resolve_talk_args(args, has_input=args.prompts)
    with process_group(args.device, args.shard_base), autocast(args.device, args.dtype):
        write_page(args)


def main(argv=None):
    return run_script("routing_page.py", parse_args, run, argv,
                      memory="a smaller --max-seq-len or --dtype bf16 needs less")


if __name__ == "__main__":
    sys.exit(main())
