"""The pages say what is there: README.md's length, links, and commands that parse."""

import contextlib
import functools
import importlib
import io
import re
import shlex

import pytest
import torch

from hydralora import adapter_parameters, hydra_layers
from tests.conftest import ROOT, tiny_model

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
