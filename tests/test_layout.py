"""Who may import whom, and that the two files that teach the method stand alone."""

import ast
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT, WORLD

FILES = [path.relative_to(ROOT) for path in sorted(ROOT.rglob("*.py"))
         if not {".venv", "runs", "tests"} & set(path.relative_to(ROOT).parts)]
ROOMS = {path.parts[0].removesuffix(".py") for path in FILES}
METHOD = {"model", "hydralora"}
# room: what it may import of the project
MAY_IMPORT = {
    "model": set(), "hydralora": set(), "data": {"model"}, "support": METHOD | {"data"},
    # cluster only inside the function that --heads auto reaches
    "train": METHOD | {"data", "support", "cluster"},
    "cluster": METHOD | {"data", "support"}, "eval_mmlu": METHOD | {"data", "support"},
    "docs": METHOD | {"data"},
    "tools": METHOD | {"data", "support", "train", "cluster", "eval_mmlu"},
    "experiments": METHOD | {"data", "support", "train", "cluster", "eval_mmlu", "tools"}}
ONLY_ON_DEMAND = {("train", "cluster"), ("train", "support.memory")}


def imports(path):
    """[(line, dotted name of what is imported, whether at the top of the file)]."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the whole name of the package"
            found += [(node.lineno, f"{node.module}.{alias.name}", top) for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_between_the_rooms_go_one_way(path):
    room = path.parts[0].removesuffix(".py")
    assert room in MAY_IMPORT, f"{room} is no room of the layout: say in this test what it imports"
    for line, name, top in imports(path):
        other = name.split(".")[0]
        if other in ROOMS - {room}:
            assert other in MAY_IMPORT[room], (
                f"{path}:{line} imports {name}: {room} may import "
                f"{', '.join(sorted(MAY_IMPORT[room])) or 'nothing of the project'}")
        if any(room == a and (name + ".").startswith(b + ".") for a, b in ONLY_ON_DEMAND):
            assert not top, f"{path}:{line} imports {name} at the top: a flag must ask for it"


def test_the_rooms_form_no_circle():
    arrows = {room: set() for room in ROOMS}
    for path in FILES:
        room = path.parts[0].removesuffix(".py")
        arrows[room] |= {name.split(".")[0] for _, name, _ in imports(path)} & (ROOMS - {room})
    while arrows:  # take away, again and again, what imports nothing that is left
        ground = {room for room, others in arrows.items() if not others & arrows.keys()}
        assert ground, f"a circle of imports: {arrows}"
        arrows = {room: others for room, others in arrows.items() if room not in ground}


def test_every_folder_with_code_is_a_package_and_nothing_bends_the_path():
    for path in FILES:
        if len(path.parts) > 1:
            assert (ROOT / path.parent / "__init__.py").exists(), path.parent
        text = (ROOT / path).read_text(encoding="utf-8")
        assert "sys.path" not in text and "noqa" not in text, path


def python(code, cwd, **environment):
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": "", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name, code", [
    ("hydralora.py", """
import torch, hydralora
model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4))
print(hydralora.add_hydralora(model, targets=["0"], rank=2, heads=3))
hydralora.save_adapter(model, "a.pt")
again = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4))
again.load_state_dict({k.replace(".base", ""): v for k, v in model.state_dict().items()
                       if "lora" not in k and "router" not in k})
print(hydralora.load_adapter(again, "a.pt")["heads"])"""),
    ("model.py", f"""
import model
llama, tokenizer = model.load_llama({str(WORLD / "base")!r})
print(len(model.generate(llama, tokenizer, ["Name some colours."], max_new_tokens=3)))""")])
def test_the_two_files_work_alone_in_an_empty_folder(tmp_path, name, code):
    shutil.copy(ROOT / name, tmp_path)
    assert python(code, tmp_path).split() == (["56", "3"] if name == "hydralora.py" else ["1"])


@pytest.mark.slow
@pytest.mark.parametrize("command", [["train.py", "--dry-run"], ["-m", "tools.generate", "--help"]])
def test_a_package_called_data_on_the_users_path_does_not_shadow_ours(tmp_path, command):
    for name in ("data", "support", "tools"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong one')")
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
