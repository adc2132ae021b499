"""The beginning of a method, written and tried as its author would."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from heedful import rooms
from heedful.cli.app import app
from heedful.cli.new import NUMBER, snake
from heedful.core.errors import FieldError
from heedful.core.paper import Paper

from . import apart

RUN = CliRunner()


def clone(tmp_path: Path) -> Path:
    for folder in ("src/heedful/methods/intervene/language", "tests/methods", "claims"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "src/heedful/methods/intervene/language/__init__.py").touch()
    return tmp_path


def test_names_of_files() -> None:
    assert [snake(x) for x in ("SnapKV", "QFilters", "ACT", "Steer2Edit", "PruneHeads")] == [
        "snap_kv", "q_filters", "act", "steer2_edit", "prune_heads"
    ]  # fmt: skip


def test_what_is_written_runs(tmp_path: Path) -> None:
    """The method keeps its laws, its test passes, and the claim says what is to be done."""
    root = clone(tmp_path)
    told = RUN.invoke(app, ["new", "method", "SharperStill", "--root", str(root), "--key", "P998"])
    assert told.exit_code == 0, told.output
    method = root / "src/heedful/methods/intervene/language/sharper_still.py"
    script = f"""
import importlib.util, sys
import heedful, heedful.methods.intervene
spec = importlib.util.spec_from_file_location("heedful.methods.intervene.language.sharper_still", {str(method)!r})
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
report = heedful.check(module.SharperStill)
bad = [v.law for v in report if v.outcome == "broken" and v.law != "is_documented"]
assert not bad, str(report)
spec = importlib.util.spec_from_file_location("t", {str(root / "tests/methods/test_sharper_still.py")!r})
test = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test)
test.test_it_is_the_papers_formula()
"""
    done = apart.script(script)
    assert done.returncode == 0, done.stderr
    assert "claims/P998.py: measure" in (root / "claims/P998.py").read_text()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["snapkv"], "must be the name of a class"),
        (["SnapKV"], "exists, in heedful.methods"),
        (["Sharper", "--family", "nowhere"], "must be one of intervene/language; "),
        (["Sharper", "--root", "/nowhere"], "must be a clone of heedful"),
    ],
)
def test_wrong_words_write_nothing(tmp_path: Path, words: list[str], reason: str) -> None:
    root = clone(tmp_path)
    before = sorted(root.rglob("*"))
    more = [] if "--root" in words else ["--root", str(root)]
    told = RUN.invoke(app, ["new", "method", *words, *more])
    assert isinstance(told.exception, FieldError)
    assert reason in str(told.exception)
    assert all(f"new method.{option} = " in str(told.exception) for option in words if option.startswith("--"))
    assert sorted(root.rglob("*")) == before


def test_every_room_says_what_lives_there() -> None:
    said = rooms.rooms()
    assert len(set(said.values())) == len(said), "each in words of its own"
    assert all(15 < len(text) < 100 and text.endswith(".") and "\n" not in text for text in said.values())


def test_nothing_is_written_over(tmp_path: Path) -> None:
    root = clone(tmp_path)
    ours = {"claims/P000.py": "key = 'P000'", "tests/methods/test_sharper.py": "name = 'Sharper'"}
    for file, culprit in ours.items():
        (root / file).write_text("mine")
        told = RUN.invoke(app, ["new", "method", "Sharper", "--root", str(root), "--key", "P000"])
        assert culprit in str(told.exception)
        assert "would write over" in str(told.exception)
        assert (root / file).read_text() == "mine"
        (root / file).unlink()


def test_in_this_clone_a_method_can_be_begun_without_further_words() -> None:
    root = Path(__file__).parents[1]
    assert not (root / "claims" / f"{Paper(NUMBER, 'Any', '', 2026).claim}.py").exists()


def test_a_paper_is_named_by_its_number(tmp_path: Path) -> None:
    root = clone(tmp_path)
    told = RUN.invoke(app, ["new", "method", "Sharper", "--root", str(root), "--key", "2601.00001"])
    assert told.exit_code == 0, told.output
    written = (root / "src/heedful/methods/intervene/language/sharper.py").read_text()
    assert 'Paper("2601.00001", "The Paper\'s Title", "Ada Author, Bo Writer", 2026, "2601.00001"' in written
    claim = (root / "claims/A2601_00001.py").read_text()
    assert 'key="2601.00001"' in claim
    assert "claims/A2601_00001.py: measure" in claim
