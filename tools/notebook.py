"""A notebook made from a Python file: every cell is run, what it prints and draws is stored.

    python -m tools.notebook docs/tutorial.py        # writes docs/tutorial.ipynb
    python -m tools.notebook docs/tutorial.py --picture 2 docs/pictures/tutorial.png

A file is reviewed as text and scrolled through as a notebook. Its cells begin with a line

    # %% [markdown]   comment lines, which become text
    # %%              code
    # %% picture      code that draws with matplotlib, needed for these cells alone

which editors that know "# %%" cells understand too. Jupyter is not needed.
"""

import base64
import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from support.cli import Parser, run_script
from support.files import write_file, write_text
from support.pictures import plain_matplotlib

DPI = 100  # figures of 8 inches are 800 pixels wide
FENCE = "# %%"


@dataclass
class Cell:
    kind: str  # "[markdown]", "" (code) or "picture"
    line: int  # of the file, counted from 0, at which the source begins
    source: str


def read_cells(path):
    """The Cells of a file, in order."""
    cells = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")):
        if line.startswith(FENCE):
            cells.append(Cell(line.removeprefix(FENCE).strip(), number + 1, ""))
        elif cells:
            if cells[-1].kind == "[markdown]":
                line = line.removeprefix("#").removeprefix(" ")
            cells[-1].source += line + "\n"
    for cell in cells:
        cell.source = cell.source.strip("\n")
    if not cells:
        raise ValueError(f"{path} has no cells: a cell begins with a line {FENCE}")
    return cells


def run_cell(cell, path, namespace):
    """(what the cell prints, [PNGs of the figures that it opens and leaves open])."""
    # empty lines in front, so that an error names the line of the file
    if cell.kind == "picture":
        open_figures()  # of what was run before in this process
    code = compile("\n" * cell.line + cell.source, str(path), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    return printed.getvalue(), open_figures() if cell.kind == "picture" else []


def open_figures():
    """The PNGs of matplotlib's open figures, which are closed."""
    from matplotlib import pyplot
    pngs = []
    for number in pyplot.get_fignums():
        png = io.BytesIO()
        # without matplotlib's version in it, the same numbers give the same file
        pyplot.figure(number).savefig(png, dpi=DPI, metadata={"Software": None})
        pngs.append(png.getvalue())
    pyplot.close("all")
    return pngs


def notebook(cells, results):
    """The notebook, in nbformat 4.4, of cells and their (text, PNGs)."""
    written, count = [], 0
    for cell, (printed, pngs) in zip(cells, results):
        source = cell.source.splitlines(keepends=True)
        if cell.kind == "[markdown]":
            written.append({"cell_type": "markdown", "metadata": {}, "source": source})
            continue
        count += 1
        outputs = [{"output_type": "display_data", "metadata": {}, "data": {
            "image/png": base64.b64encode(png).decode(), "text/plain": ["<Figure>"]}}
            for png in pngs]
        if printed:
            outputs.insert(0, {"output_type": "stream", "name": "stdout",
                               "text": printed.splitlines(keepends=True)})
        written.append({"cell_type": "code", "execution_count": count, "metadata": {},
                        "outputs": outputs, "source": source})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": written, "nbformat": 4, "nbformat_minor": 4,
            "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}}}


def run(args):
    cells, namespace, results = read_cells(args.file), {"__name__": "__main__"}, []
    with plain_matplotlib():
        for cell in cells:
            result = ("", [])
            if cell.kind != "[markdown]":
                result = run_cell(cell, args.file, namespace)
            results.append(result)
            print(result[0], end="")
    text = json.dumps(notebook(cells, results), indent=1, ensure_ascii=False) + "\n"
    write_text(args.file.with_suffix(".ipynb"), text)
    if args.picture:
        number, path = args.picture
        png = [png for _, pngs in results for png in pngs][int(number) - 1]
        write_file(Path(path), lambda file: file.write(png))


def parse_args(argv):
    p = Parser("notebook.py", __doc__)
    p.add_argument("file", type=Path, help="Python file in cells; the notebook goes beside it")
    p.add_argument("--picture", nargs=2, metavar=("N", "FILE.png"),
                   help="also write the notebook's Nth picture to that file (none)")
    return p.parse_args(argv)


def main(argv=None):
    return run_script("notebook.py", parse_args, run, argv)


if __name__ == "__main__":
    sys.exit(main())
