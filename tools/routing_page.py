"""The router on one page: which head takes which token, layer by layer, in any browser.

    python -m tools.routing_page --out routing.html          # a record of each family of the world
    python -m tools.routing_page "What is 3 plus 4?" --weights llama-2-7b --adapter adapter.pt \\
        --out routing.html

HydraLoRA, section 3.2.2: the gates w(x) of every token of prompt and answer. The page is
routing_page.html, the template beside this file, with the numbers put into it; it asks no network.
A gate is kept to a thousandth, which is what the page shows.

Shapes: T tokens, L layers, N heads.
"""

import base64
import json
import sys
from pathlib import Path

import torch

from support.cli import Parser, run_script
from support.distributed import process_group
from support.evaluation import most_specialised_layer
from support.files import read_json, write_text
from support.run_folder import load_model_and_adapter
from tools.answers import answer_tokens, encode_prompt, text_pieces
from tools.generate import (
    NO_ROUTER,
    add_talk_flags,
    gates_of,
    has_router,
    resolve_args,
    world_prompts,
)

TEMPLATE, PLACE = Path(__file__).with_suffix(".html"), "@DATA@"


def packed(gates):
    """Base64 of thousandths, 16 bits each, of gates (rows, L, N): a fifth of the digits' size."""
    return base64.b64encode((gates * 1000).round().short().numpy().astype("<i2").tobytes()).decode()


def stacked(gates):
    """(T, L, N) of {layer: gate (T, N)}."""
    return torch.stack(list(gates.values()), dim=1)


def marks(tokenizer, ids, before=()):
    """[text, mark] of each token: a mark names what has no text of its own, such as a space before
    the first word."""
    def mark(token):
        names = {tokenizer.bos_id: "BOS", tokenizer.eos_id: "EOS"}
        return names.get(token) or ("byte" if tokenizer.model.is_byte(token) else "space")

    return [[piece, "" if piece else mark(token)]
            for token, piece in zip(ids, text_pieces(tokenizer, ids, before))]


def ask(model, tokenizer, prompt, args):
    """({tokens, prompt}, {layer: gate (T, N)}): the text of a prompt and of the answer to it, token
    by token, and how many of the tokens are the prompt's."""
    ids = encode_prompt(model, tokenizer, prompt, args)
    new, = answer_tokens(model, tokenizer, [ids], args)
    # prompt and answer are decoded apart, as they were encoded
    tokens = marks(tokenizer, ids) + marks(tokenizer, new, before=ids if args.raw else ())
    return {"tokens": tokens, "prompt": len(ids)}, gates_of(model, ids + new)


def run_table(adapter, layers):
    """The mean gates by family that the run.json beside an adapter.pt holds, as a table of the
    page; None where there is no such run, or its router has other layers."""
    path = Path(adapter).parent / "run.json"
    if Path(adapter).name != "adapter.pt" or not path.is_file():
        return None
    gate = (read_json(path).get("routing") or {}).get("gate", {})
    if gate.keys() != set(layers):
        return None
    families = list(gate[layers[0]])
    means = torch.tensor([[gate[layer][family] for layer in layers] for family in families])
    return {"title": "validation records of the run",
            "rows": [family or "all" for family in families], "gates": packed(means)}


def page_data(texts, all_gates, more=None):
    """What the page shows: texts [{name, tokens, prompt, expected}] with their gates
    [{layer: (T, N)}], and a further table."""
    layers = list(all_gates[0])
    together = {name: torch.cat([gates[name] for gates in all_gates]) for name in layers}
    means = torch.stack([stacked(gates).mean(0) for gates in all_gates])
    tables = [{"title": "mean over the tokens above", "rows": [text["name"] for text in texts],
               "gates": packed(means)}]
    return {"layers": layers, "heads": together[layers[0]].shape[1],
            "divided": layers.index(most_specialised_layer(together)),
            "texts": [{**text, "gates": packed(stacked(gates))}
                      for text, gates in zip(texts, all_gates)],
            "all": packed(stacked(together).mean(0, keepdim=True)),
            "tables": tables + [more] * (more is not None)}


def page(data):
    """The template with the data in it. In a script element `<` could end it or open a comment, so
    JSON writes it as \\u003c."""
    text = json.dumps(data, separators=(",", ":")).replace("<", r"\u003c")
    before, after = TEMPLATE.read_text(encoding="utf-8").split(PLACE)
    return before + text + after


def write_page(args):
    resolve_args(args, args.prompts)
    with process_group(args):
        write_gates(args)


def write_gates(args):
    model, tokenizer = load_model_and_adapter(args)
    if not has_router(model):
        raise ValueError(f"{args.adapter or args.weights} {NO_ROUTER}")
    given = [(prompt, None, f"prompt {i}") for i, prompt in enumerate(args.prompts, start=1)]
    texts, all_gates = [], []
    for prompt, expected, name in given or world_prompts():
        text, gates = ask(model, tokenizer, prompt, args)
        texts.append({"name": name, "expected": expected, **text})
        all_gates.append(gates)
    data = page_data(texts, all_gates, run_table(args.adapter, list(all_gates[0])))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, page(data))
    print(f"wrote {args.out}: {len(texts)} texts, {len(data['layers'])} layers, {data['heads']} "
          "heads; open it in a browser")


def main(argv=None):
    p = Parser("routing_page.py", __doc__)
    add_talk_flags(p)
    p.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="page to write")
    args = p.parse_args(argv)
    return run_script("routing_page.py", lambda: write_page(args), argv, stopped="interrupted",
                      memory="a smaller --max-seq-len or --dtype bf16 needs less")


if __name__ == "__main__":
    sys.exit(main())
