"""docs/tutorial: the notebook is the Python file, the code runs, the prose says what it shows.

Also what newcomers and their tools read first: AGENTS.md, CITATION.cff, the workflow.
"""

import base64
import json
import re
import struct
import time

import pytest
import torch

from hydralora import add_hydralora, remove_adapters
from model import load_llama
from tests.conftest import ROOT, WORLD
from tools import notebook

PATH = ROOT / "docs" / "tutorial.py"
CELLS = notebook.read_cells(PATH)
PROSE = " ".join(" ".join(cell.source.split()) for cell in CELLS if cell.kind == "[markdown]")
STORED = json.loads(PATH.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
SOLUTIONS = [solution for cell in CELLS if cell.kind == "[markdown]"
             for solution in re.findall(r"```python\n(.*?)```", cell.source, re.S)]


def stored_text(cell):
    """What a cell of the notebook has printed."""
    return "".join(line for output in cell.get("outputs", []) for line in output.get("text", []))


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))]


# ---------------------------------------------------------------- the notebook


def test_the_notebook_holds_the_cells_of_the_python_file():
    made = notebook.notebook(CELLS, [("", [])] * len(CELLS))["cells"]
    hint = "run: python -m tools.notebook docs/tutorial.py"
    assert [(c["cell_type"], c["source"]) for c in STORED] == [
        (c["cell_type"], c["source"]) for c in made], hint


def test_what_the_cells_print_and_draw_is_stored():
    pictures = []
    for cell, stored in zip(CELLS, STORED):
        pngs = [base64.b64decode(output["data"]["image/png"])
                for output in stored.get("outputs", []) if "data" in output]
        assert len(pngs) == (cell.kind == "picture"), cell.source
        # once its functions are defined, a cell of code prints something
        if cell.kind == "" and re.search(r"^ *print\(", cell.source, re.M):
            assert stored_text(stored), cell.source
        pictures += pngs
    assert [struct.unpack(">I", png[16:20])[0] for png in pictures] == [800] * 5  # widths
    assert (ROOT / "docs" / "pictures" / "tutorial.png").read_bytes() in pictures


def test_cells_share_names_and_keep_what_they_print(tmp_path):
    path = tmp_path / "page.py"
    path.write_text("# %% [markdown]\n# # A *title*\n#\n# and text\n\n# %%\nx = 3\n\n# %%\n"
                    "print(x)\nprint('é')\n", encoding="utf-8")
    assert notebook.main([str(path)]) == 0
    made = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert made["nbformat"] == 4
    assert ["".join(cell["source"]) for cell in made["cells"]] == [
        "# A *title*\n\nand text", "x = 3", "print(x)\nprint('é')"]
    assert [stored_text(cell) for cell in made["cells"]] == ["", "", "3\né\n"]


def test_an_error_names_the_line_of_the_file_and_no_notebook_is_written(tmp_path, capsys):
    path = tmp_path / "page.py"
    path.write_text("# %%\nx = 3\n\n# %%\nx += 1\nint('a')\n", encoding="utf-8")
    assert notebook.main([str(path), "--debug"]) == 2
    assert f'"{path}", line 6' in capsys.readouterr().err
    assert not path.with_suffix(".ipynb").exists()


def test_a_figure_is_stored_and_can_be_written_to_a_file(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "page.py"
    path.write_text("# %% picture\nfrom matplotlib import pyplot\npyplot.figure(figsize=(8, 1))\n"
                    "pyplot.plot([1, 2])\n", encoding="utf-8")
    assert notebook.main([str(path), "--picture", "1", str(tmp_path / "a.png")]) == 0
    output, = json.loads(path.with_suffix(".ipynb").read_text())["cells"][0]["outputs"]
    png = base64.b64decode(output["data"]["image/png"])
    assert png == (tmp_path / "a.png").read_bytes()
    assert struct.unpack(">I", png[16:20]) == (800,)


def test_a_file_without_cells_is_refused(tmp_path, capsys):
    (tmp_path / "page.py").write_text("x = 3\n")
    assert notebook.main([str(tmp_path / "page.py")]) == 2
    assert "has no cells" in capsys.readouterr().err


# ---------------------------------------------------------------- what the prose says


def near(value, wanted, by=0.03):
    return abs(value - wanted) < by


def picks_a_task_each(names):
    """The first head's weight: apart for the two tasks, and alike within one."""
    first, last = (rows["first"] for rows in (names["starts"]["random"][i] for i in (0, 100)))
    overlap = max(w.quantile(0.1) for w in first) < min(w.quantile(0.9) for w in first)
    apart = abs(last[0].mean() - last[1].mean()) > 0.4
    return overlap and apart and all(w.std() < 0.05 for w in last)


def shared_out_tokens(names):
    """Whether each head leads in some token of both records, in some layer."""
    leading = []
    with torch.no_grad(), names["record_gates"](names["model"]) as gates:
        for record in names["encode_records"](names["chosen"][:2], names["tokenizer"], 256)[0]:
            names["model"](torch.tensor([record.ids]))
            leading.append({layer: set(w[0].argmax(-1).tolist()) for layer, w in gates.items()})
    return len(leading[0]) == 18 and any(
        leading[0][layer] == leading[1][layer] == {0, 1, 2} for layer in leading[0])


# {words of the prose: whether they hold, given what the cells have computed}
SAID = {
    "Let a token be 30 random numbers": lambda n: n["WIDTH"] - 2 == 30,
    "at a right angle": lambda n: abs(n["task_b"][0].T @ n["task_b"][1]).max() < 1e-4,
    "in each of 300 steps": lambda n: len(n["starts"]["zero"]) == 300,
    "From rank 2 on half of the update is missing, and a higher rank does not help":
        lambda n: n["lora_missing"][1] > 0.6 and all(
            near(n["lora_missing"][rank], 0.5) for rank in (2, 4, 32)),
    "rank 32, which is as much as a layer of this width can have": lambda n: n["WIDTH"] == 32,
    "by hand, nothing is missing": lambda n: n["split_missing"][True] < 0.01,
    "Nobody tells it what a task is": lambda n: n["split_missing"][False] < 0.01,
    "the same numbers to a millionth": lambda n: n["difference"] < 1e-6,
    "It saves most where a layer's input is wider": lambda n: n["shared"] < 0.6 * n["split"],
    "an A of rank 2 cannot keep four": lambda n: [round(share, 1) for share in
                                                  n["own_missing"].values()] in (
        [0.0, 0.3, 0.0], [0.0, 0.4, 0.0]),
    "The heads would remain one LoRA for ever": lambda n: (
        near(n["starts"]["zero"][-1]["missing"], 0.5, by=0.1)
        and near(n["starts"]["zero"][-1]["alike"], 1, by=1e-5)),
    "A random router is what tells the heads apart": lambda n: (
        n["starts"]["random"][-1]["missing"] < 0.01 and n["starts"]["random"][-1]["alike"] < 0.5),
    "After a hundred steps it depends on the cue alone": picks_a_task_each,
    "At the same rank HydraLoRA still misses less. But its second B and its router cost "
    "parameters. LoRA of twice the rank trains just as many, and it is ahead.": lambda n: (
        2 * n["swiglu_missing"]["LoRA of rank 4"] < n["swiglu_missing"]["HydraLoRA 2 x rank 2"]
        < 0.8 * n["swiglu_missing"]["LoRA of rank 2"]),
    "a LLaMA of 1.3 million weights": lambda n: near(
        sum(p.numel() for p in n["model"].parameters()) - n["count"](n["model"]), 1.3e6, by=5e4),
    "a corpus of ten small tasks": lambda n: len({q["category"] for q in n["questions"]}) == 10,
    "see an eighth of the corpus": lambda n: len(n["batches"]) == 8 * 200,
    "enough for most of the answers below": lambda n: (
        n["unseen_after"] < 0.25 < 2 < n["unseen_before"]
        and not any(q["response"] == a for q, a in zip(n["chosen"], n["before"]))
        and sum(q["response"] == a for q, a in zip(n["chosen"], n["after"])) >= 2),
    "there are eighteen": shared_out_tokens,
    "The loss on what it knew rises": lambda n: n["known_after"] > 2 * n["known_before"],
    "Look at what became of them": lambda n: (
        n["base_facts"] == ["fish", "small", "bird", "Al"]
        and n["answers"](n["facts"]) != n["base_facts"]),
}
# {words of a solution: whether they hold after its code}
SOLVED = [
    ("The softmax of one number is 1", lambda n, text: float(text) < 1e-5),
    ("Half, as LoRA does", lambda n, text: near(n["blind_missing"], 0.5)),
    ("They are equal", lambda n, text: near(n["uniform_missing"], 0.5) and "True" in text),
    ("Half is missing", lambda n, text: near(n["merged_missing"], 0.5, by=0.1)),
    ("word for word", lambda n, text: text == "True\n"),
]


@pytest.mark.slow
def test_the_tutorial_runs_within_a_minute_and_shows_what_its_prose_says():
    try:
        import matplotlib
        matplotlib.use("Agg")
    except ImportError:
        matplotlib = None
    names, start = {"__name__": "__main__"}, time.process_time()
    for cell, stored in zip(CELLS, STORED):
        if cell.kind == "[markdown]" or (cell.kind == "picture" and not matplotlib):
            continue
        printed, pngs = notebook.run_cell(cell, PATH, names)
        assert len(pngs) == (cell.kind == "picture")
        if "answers(" not in cell.source:  # words of a model: another processor's may differ
            assert numbers(printed) == pytest.approx(numbers(stored_text(stored)), rel=0.2,
                                                     abs=4), cell.source
    seconds = time.process_time() - start  # of all cores: other programs do not count
    for words, holds in SAID.items():
        assert words in PROSE, words
        assert holds(names), words
    assert len(SOLUTIONS) == len(SOLVED)
    for solution, (words, holds) in zip(SOLUTIONS, SOLVED):
        printed, _ = notebook.run_cell(notebook.Cell("", 0, solution), "solution", names)
        assert words in PROSE and holds(names, printed), f"{words}\n{solution}{printed}"
    assert seconds < 2 * 60  # a minute of two cores


# ---------------------------------------------------------------- what is read first


def test_agents_md_is_short_and_names_what_exists():
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    for name in re.findall(r"[\w/]+(?:\.py|\.md|\.ipynb)\b|`\w+/`", text):
        assert (ROOT / name.strip("`")).exists(), name
    code = (ROOT / "hydralora.py").read_text(encoding="utf-8")
    code += (ROOT / "train.py").read_text(encoding="utf-8")
    for name in ("class HydraSettings", "def train_step", "METHODS", "def make_optimizer"):
        assert name in code and name.split()[-1] in text, name


def test_agents_md_compares_with_the_lora_of_its_size():
    rank = int(re.search(r"--method lora\s--rank (\d+)",
                         (ROOT / "AGENTS.md").read_text(encoding="utf-8"))[1])
    base = load_llama(WORLD / "base")[0]

    def trainable(**settings):
        count = add_hydralora(base, **settings)
        remove_adapters(base)
        return count

    wanted = trainable(rank=8, heads=3)
    distance = {r: abs(trainable(rank=r, heads=1) - wanted) for r in range(rank - 2, rank + 3)}
    assert min(distance, key=distance.get) == rank


def test_the_workflow_runs_what_the_readme_and_the_style_check_say():
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^pip install .*pytest.*$", readme, re.M)[0]
    assert f"run: {command}\n" in text and "&& ruff check\n" in text
    oldest = re.search(r"torch>=([\d.]+)", (ROOT / "requirements.txt").read_text())[1]
    newest = re.search(r"torch==([\d.]+)", (ROOT / ".ci" / "constraints.txt").read_text())[1]
    assert re.findall(r'torch: "([\d.]+)"', text) == [f"{oldest}.0", newest]
