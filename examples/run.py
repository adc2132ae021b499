"""Executes the examples and writes each as a notebook with its outputs.

python -m examples.run [NAME ...]
python -m examples.run --prose    # takes over prose that was changed, and executes nothing

An example is a Python file of cells, each begun by a line `# %%`, or `# %% [markdown]` where it is prose. What a cell's
last line gives is shown as a notebook would show it; plots become pictures, so that it is whole wherever it is read.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "examples.md"
WIDTH, HEIGHT, SCALE = 860, 420, 1.5  # pixels of a plot
Draw = Callable[[Any], bytes]  # a plotly figure as a PNG file


@dataclass(frozen=True)
class Cell:
    """A part of an example: prose or code."""

    kind: str  # "markdown" or "code"
    text: str


def names() -> list[str]:
    """Every example, in the order in which they are to be read."""
    return sorted(path.stem for path in HERE.glob("[0-9]*.py"))


def cells(name: str) -> list[Cell]:
    """The cells of an example's source."""
    found: list[Cell] = []
    for part in ("\n" + (HERE / f"{name}.py").read_text()).split("\n# %%")[1:]:
        first, _, body = part.partition("\n")
        prose = first.strip() == "[markdown]"
        lines = body.strip("\n").splitlines()
        text = "\n".join(line.removeprefix("#").removeprefix(" ") if prose else line for line in lines)
        found.append(Cell("markdown" if prose else "code", text))
    return found


def picture(figure: Any) -> bytes:
    """A plot as a PNG file, by kaleido and a Chromium."""
    return bytes(figure.to_image("png", width=WIDTH, height=figure.layout.height or HEIGHT, scale=SCALE))


def execute(name: str, draw: Draw = picture) -> dict[str, Any]:
    """The notebook of an example, run from scratch; an error of a cell is raised as it is."""
    made, count, begin, worked = [], 0, time.perf_counter(), time.process_time()
    with _elsewhere(), _main() as space, torch.enable_grad(), torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of the libraries below, for their authors
        for number, cell in enumerate(cells(name)):
            row: dict[str, Any] = {"cell_type": cell.kind, "id": f"cell-{number}", "metadata": {}}
            if cell.kind == "code":
                count += 1
                row |= {"execution_count": count, "outputs": list(_outputs(cell.text, space, count, draw))}
            made.append(row | {"source": cell.text.splitlines(keepends=True)})
    about = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "heedful": {"seconds": round(time.perf_counter() - begin), "cpu": round(time.process_time() - worked)},
    }
    return {"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def _outputs(code: str, space: dict[str, Any], count: int, draw: Draw) -> Iterator[dict[str, Any]]:
    tree, shown, printed = ast.parse(code), None, io.StringIO()
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), space)
        if last is not None:
            shown = eval(compile(ast.Expression(last.value), "<cell>", "eval"), space)
    if printed.getvalue():
        yield {"name": "stdout", "output_type": "stream", "text": printed.getvalue().splitlines(keepends=True)}
    if shown is not None:
        data = {kind: text.splitlines(keepends=True) for kind, text in _shown(shown, draw).items()}
        yield {"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"}


def _shown(value: Any, draw: Draw) -> dict[str, str]:
    """A value by the types that a notebook asks it for, the richest that stays whole without a script."""
    if hasattr(value, "to_image"):
        title = value.layout.title.text or "a plot"
        return {"image/png": base64.b64encode(draw(value)).decode(), "text/plain": title.split("<br>")[0]}
    printer = Printer()
    if hasattr(value, "_repr_pretty_"):
        value._repr_pretty_(printer, False)
    found = {"text/plain": printer.said or repr(value)}
    html = value._repr_html_() if hasattr(value, "_repr_html_") else None
    return found | ({"text/html": html} if html and "<iframe" not in html else {})


class Printer:
    """As much of IPython's printer as values of heedful use."""

    said = ""

    def text(self, words: str) -> None:
        self.said += words


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """An empty folder to work in, since examples save what they make."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


@contextlib.contextmanager
def _main() -> Iterator[dict[str, Any]]:
    """The names of a fresh main module, where classes of a notebook are looked for by whoever saves them."""
    before = sys.modules["__main__"]
    sys.modules["__main__"] = made = ModuleType("__main__")
    try:
        yield vars(made)
    finally:
        sys.modules["__main__"] = before


def notebook(name: str) -> dict[str, Any]:
    """An example's committed notebook."""
    found: dict[str, Any] = json.loads((HERE / f"{name}.ipynb").read_text())
    return found


def page() -> str:
    """The list of examples for the docs: the question of each, and what it concludes."""
    rows = [
        "# Examples\n",
        "Notebooks on the embedded model, without a network. Each asks one question and is run anew by `python -m "
        "examples.run NAME`; the test suite executes them all. The "
        "times are of two CPU cores with little else to do.\n",
    ]
    for name in names():
        prose = [cell.text for cell in cells(name) if cell.kind == "markdown"]
        title, question = prose[0].split("\n\n")[:2]
        seconds = notebook(name)["metadata"]["heedful"]["seconds"]
        rows.append(f"## [{title.removeprefix('# ')}](../examples/{name}.ipynb)\n")
        rows.append(f"{_flat(question)} ({seconds} s)\n")
        _, told = prose[-1].split("\n\n", 1)
        rows.append(f"{_flat(told)}\n")
    return "\n".join(rows)


def _flat(text: str) -> str:
    return " ".join(text.split())


def retold(name: str) -> dict[str, Any]:
    """An example's committed notebook with the prose of its source; refused where code was changed too."""
    old, now = notebook(name), cells(name)
    code = ["".join(row["source"]) for row in old["cells"] if row["cell_type"] == "code"]
    if code != [cell.text for cell in now if cell.kind == "code"] or len(old["cells"]) != len(now):
        raise SystemExit(f"{name}: its code was changed as well; execute it: python -m examples.run {name}")
    rows = [row | {"source": cell.text.splitlines(keepends=True)} for row, cell in zip(old["cells"], now, strict=True)]
    return old | {"cells": rows}


def put(name: str, made: dict[str, Any]) -> None:
    (HERE / f"{name}.ipynb").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")


def main(wanted: list[str]) -> None:
    if wanted == ["--prose"]:
        for name in names():
            put(name, retold(name))
        PAGE.write_text(page())
        return
    for name in wanted or names():
        made = execute(name)
        put(name, made)
        took = made["metadata"]["heedful"]
        print(f"{name}: {took['seconds']} s, of which {took['cpu']} s of CPU")
    if all((HERE / f"{name}.ipynb").exists() for name in names()):
        PAGE.write_text(page())


if __name__ == "__main__":
    main(sys.argv[1:])
