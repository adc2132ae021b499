"""The examples: committed notebooks are whole and say what their sources say; all of them run from scratch."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import run

NAMES = run.names()


def outputs(notebook: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for cell in notebook["cells"]:
        yield from cell.get("outputs", ())


def require_whole(notebook: dict[str, Any]) -> None:
    """A notebook in version 4 of the format, whose plots are pictures and whose cells all say something."""
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [cell["source"] for cell in code[1:] if not cell["outputs"]]
    for output in outputs(notebook):
        assert output["output_type"] in ("stream", "execute_result"), output
        data = output.get("data", {"text/plain": output.get("text")})
        assert "".join(data["text/plain"]).strip()
        assert "<script" not in "".join(data.get("text/html", ""))
        assert base64.b64decode("".join(data.get("image/png", "iVBORw=="))).startswith(b"\x89PNG")


def test_there_are_examples_and_each_is_committed() -> None:
    assert NAMES
    assert sorted(path.stem for path in run.HERE.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_notebook_is_its_source_executed(name: str) -> None:
    notebook = run.notebook(name)
    require_whole(notebook)
    assert [run.Cell(c["cell_type"], "".join(c["source"])) for c in notebook["cells"]] == run.cells(name)
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))


@pytest.mark.parametrize("name", NAMES)
def test_an_example_asks_and_concludes(name: str) -> None:
    first, *_, last = (cell.text for cell in run.cells(name) if cell.kind == "markdown")
    assert first.startswith("# ")
    assert last.startswith("## What to conclude\n\n")


def test_the_page_of_examples_is_up_to_date() -> None:
    assert run.PAGE.read_text() == run.page()


def written(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    monkeypatch.setattr(run, "HERE", tmp_path)
    (tmp_path / "1_planted.py").write_text(text)
    return "1_planted"


def test_a_notebook_shows_what_is_printed_and_what_the_last_line_gives(tmp_path, monkeypatch) -> None:
    name = written(tmp_path, monkeypatch, "# %% [markdown]\n# # Title\n#\n# Why?\n\n# %%\nx = 6\nprint('so')\nx * 7\n")
    made = run.execute(name)
    assert [cell.text for cell in run.cells(name)] == ["# Title\n\nWhy?", "x = 6\nprint('so')\nx * 7"]
    said = [o.get("text") or o["data"]["text/plain"] for o in outputs(json.loads(json.dumps(made)))]
    assert said == [["so\n"], ["42"]]
    require_whole(made)


@pytest.mark.parametrize(
    ("code", "fault"),
    [("1 / 0", ZeroDivisionError), ("import warnings\nwarnings.warn('no', stacklevel=1)", UserWarning)],
)
def test_a_cell_that_raises_or_warns_fails(code: str, fault: type[Exception], tmp_path, monkeypatch) -> None:
    name = written(tmp_path, monkeypatch, f"# %%\n{code}\n")
    with pytest.raises(fault):
        run.execute(name)


def test_an_example_leaves_nothing_behind_for_the_next(tmp_path, monkeypatch) -> None:
    here = Path.cwd()
    name = written(tmp_path, monkeypatch, "# %%\nimport torch\ntorch.set_grad_enabled(False)\ntorch.manual_seed(1)\n")
    torch.manual_seed(0)
    run.execute(name)
    assert torch.is_grad_enabled()
    assert torch.initial_seed() == 0
    assert Path.cwd() == here


def test_a_cell_that_shows_nothing_is_noticed(tmp_path, monkeypatch) -> None:
    name = written(tmp_path, monkeypatch, "# %%\nx = 1\n# %%\ny = 2\n")
    with pytest.raises(AssertionError):
        require_whole(run.execute(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_scratch(name: str) -> None:
    def drawn(figure: Any) -> bytes:
        assert figure.data
        return b"\x89PNG"  # that a browser draws it is tested with the report

    require_whole(made := run.execute(name, drawn))
    assert len(list(outputs(made))) == len(list(outputs(run.notebook(name))))
