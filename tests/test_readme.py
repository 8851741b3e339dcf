"""The pages say what is there: README.md's length, links, and commands that parse."""

import contextlib
import functools
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap

import pytest
import torch

from hydralora import adapter_parameters, hydra_layers
from model import save_llama
from tests.conftest import ROOT, WORLD, tiny_model

PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "experiments" / "README.md",
         *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)


def read(page):
    return page.read_text(encoding="utf-8")


def anchors(page):
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", read(page)), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def commands(page):
    """The words of every command that starts with python, in code blocks and within the text."""
    text = read(page)
    lines = "\n".join(FENCE.findall(text)).replace("\\\n", " ").splitlines()
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part, comments=True) for part in parts if part.startswith("python ")]


@functools.cache
def help_of(module):
    """What the script prints for --help: its parser runs, and nothing after it."""
    script, printed = importlib.import_module(module), io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        parse = script.parse_args if hasattr(script, "parse_args") else script.main
        parse(["--help"])
    return printed.getvalue()


def test_the_readmes_use_in_python_runs_as_it_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", read(ROOT / "README.md"), re.S)[1]
    model = tiny_model()
    names = {"torch": torch, "model": model, "batch": torch.arange(6)[None],
             "loss_of": lambda logits: logits.square().mean()}
    exec(code, names)
    layers = hydra_layers(model).values()
    assert names["trainable"] == sum(p.numel() for p in adapter_parameters(model).values())
    assert len(layers) == 6 and all(layer.lora_B.any() for layer in layers)  # it was trained


FORKED = """
import torch, train
from hydralora import HydraLinear
layer = HydraLinear(torch.nn.Linear(6, 4), top_k=1)
layer.lora_B.data.normal_()
layer(torch.randn(9, 6)).sum().backward()
assert layer.router.grad.any()  # it trains though one head is left
for method in train.METHODS:
    for k in (0, 1, 2, 4, -1):
        try:
            status = train.main([*FLAGS, "--method", method, "--top-k", str(k), "--overwrite"])
        except SystemExit as refused:
            status = refused.code
        heads = {"lora": 1, "full": None}.get(method, 3)
        assert status == (0 if heads == 3 and 0 <= k <= heads else 2), (method, k, status)
"""


@pytest.mark.slow
def test_the_readmes_recipes_run_as_they_are_printed_in_every_method(tmp_path):
    pages = read(ROOT / "README.md") + read(ROOT / "docs" / "fork.md")
    blocks = re.findall(r"```python\n(.*?)\n```", pages, re.S)
    [balance] = [block for block in blocks if "balance" in block]
    [top_k] = [block for block in blocks if "top_k" in block]
    setting, check, gate, flag = top_k.split("\n\n")
    begin, _, rest = balance.partition("\n    ...\n")

    def put(path, *changes):
        text = read(ROOT / path)
        for old, new, column in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, textwrap.indent(new, " " * column) + "\n")
        (tmp_path / path).write_text(text, encoding="utf-8")

    put("train.py", ("        with precision:\n", begin, 8), (
        "        loss = weight * loss / n_targets\n", rest, 8),
        ("    # optimization\n", flag, 4), ("    target_layers,\n",
                                            "target_layers,\nrecord_gates,", 4))
    put("hydralora.py", ("    def __post_init__(self):\n", f"{setting}\n\n"
                         f"def __post_init__(self):\n{textwrap.indent(check, '    ')}", 4),
        ("        return scores.float().softmax(-1)\n", gate, 8))
    save_llama(tiny_model(n_layers=1), WORLD / "base" / "tokenizer.model", tmp_path / "w")
    rows = [{"instruction": f"Count to {i}.", "response": f"{i}."} for i in range(12)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--weights", "w", "--data", "d.jsonl", "--device", "cpu", "--max-steps", "1", "--out",
             "run"]
    done = subprocess.run([sys.executable, "-c", FORKED.replace("*FLAGS", f"*{flags}")],
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert all("top_k must be" in line or "no router to balance" in line for line in lines)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_and_picture_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page)))
    for link in links:
        if not link.startswith(("http://", "https://")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_shown_is_one_that_its_script_knows(page):
    for _, *words in commands(page):
        if words[0] == "-m":
            module, flags = words[1], words[2:]
            assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").is_file(), words
        else:
            module, flags = words[0].removesuffix(".py"), words[1:]
            assert "/" not in words[0] and (ROOT / words[0]).is_file(), words
        if module != "pytest":
            known = set(re.findall(r"--[a-z][a-z-]*", help_of(module)))
            assert {word for word in flags if word.startswith("--")} <= known, words


def test_commands_are_found_in_blocks_and_in_text(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```\npip install x && python train.py --rank 8 \\\n    --heads 3  # a remark\n"
                    "```\nor `python -m\ntools.generate --raw`.\n", encoding="utf-8")
    assert commands(page) == [["python", "train.py", "--rank", "8", "--heads", "3"],
                              ["python", "-m", "tools.generate", "--raw"]]
