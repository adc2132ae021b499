"""The tool that changes formulas: what it changes, what it leaves alone, and that a test's silence is seen."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.mutants import __main__ as tool
from benchmarks.mutants import changes, page
from benchmarks.mutants.page import BAR, EQUIVALENT, RECORD, ROOT

TOY = '''
class Toy:
    """1 + 1"""

    def __post_init__(self):
        self.x = 1 + 1

    def share(self, xs):
        """2 * 2"""
        if not xs:
            raise ValueError(f"{len(xs) + 1}" + "none")
        return xs[-1] / sum(xs)

    def size(self, x):
        return abs(x)

    def count(self, n):
        i = 0
        while i < n:
            i += 1
        return i


if __name__ == "__main__":
    print(3 + 3)
'''
TESTS = """
from toy import Toy

def test_share():
    assert Toy().share([1, 3]) == 0.75

def test_size():
    assert Toy().size(2) == 2

def test_count():
    assert Toy().count(3) == 3
    assert Toy().count(0) == 0
"""
RUN = """
import gc
import json
from pathlib import Path
import pytest  # once for all trials
from heedful import check
from heedful.conformance import laws
from benchmarks.mutants import changes, probe
laws()
gc.freeze()
path, tests = Path("toy.py").resolve(), [Path("test_toy.py").resolve()]
found = {"": probe.survives("toy", path, tests, None, 60.0)}
for m in changes.mutants(path.read_text()):
    hangs = "i -= 1" in m.name or "not i < n" in m.name
    found[m.name] = probe.survives("toy", path, tests, changes.changed(path.read_text(), m), 1.0 if hangs else 60.0)
print(json.dumps(found))
"""


def test_what_is_changed_and_what_is_not() -> None:
    found = changes.mutants(TOY)
    assert [m.name for m in found] == [
        "Toy.share: xs[-1] / sum(xs) -> xs[-1] * sum(xs)",
        "Toy.share: -1 -> -2",
        "Toy.size: abs(x) -> x",
        "Toy.count: 0 -> 1",
        "Toy.count: while i < n: -> while not i < n:",
        "Toy.count: i < n -> i <= n",
        "Toy.count: i += 1 -> i -= 1",
        "Toy.count: 1 -> 2",
    ]
    assert [m.line for m in found] == [12, 12, 15, 18, 19, 19, 20, 20]
    for m in found:
        assert ast.unparse(changes.changed(TOY, m)) != ast.unparse(ast.parse(TOY))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("x.sum(-1)", "x.mean(-1)"),
        ("x.amax(-2)", "x.amin(-2)"),
        ("x.norm(dim=-1)", "x.norm(dim=-1, p=1)"),
        ("x.log()", "x"),
        ("torch.exp(x)", "x"),
        ("x & ~y", "x & y"),
        ("x & y", "x | y"),
        ("-x", "x"),
        ("f(largest=True)", "f(largest=False)"),
        ("x == y", "x != y"),
        ("x >= y", "x > y"),
        ("a if b else c", "a if not b else c"),
        ("x.softmax(-1)", "x.softmax(-2)"),
        ("0.5 * x", "1.5 * x"),
    ],
)
def test_each_kind_of_change(before: str, after: str) -> None:
    source = f"def f(x):\n    return {before}\n"
    made = [ast.unparse(changes.changed(source, m)) for m in changes.mutants(source)]
    assert ast.unparse(ast.parse(f"def f(x):\n    return {after}\n")) in made


def test_the_choice_is_seeded_and_spread() -> None:
    found = changes.mutants(Path(changes.__file__).read_text())
    chosen = changes.choose(found, 10, "a")
    assert chosen == changes.choose(found[::-1], 10, "a") != changes.choose(found, 10, "b")
    assert len(set(chosen)) == 10
    assert len({m.kind for m in chosen}) >= 4
    assert len({m.function for m in chosen}) >= 4


def test_a_row_outlives_what_only_readers_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "toy.py"
    monkeypatch.setattr(tool, "tests_of", lambda path: [path])

    def state(source: str) -> str:
        home.write_text(source)
        return tool._state(home)

    first = state(TOY)
    for reads in (
        ("2 * 2", "3 * 3"),
        ("i = 0", "i = (0)  # none yet"),
        ("x = 1 + 1", "x: int = 2"),
        ("(self, n)", "(self, n: int)"),
    ):
        assert state(TOY.replace(*reads)) == first
    alike = ("i: int = 0", "i: float = 0"), ("i = f(0, match='a')", "i = f(0, match='b')")
    for one, other in alike:
        assert state(TOY.replace("i = 0", one)) == state(TOY.replace("i = 0", other))
    assert state(TOY.replace("i = 0", "i = f(way='a')")) != state(TOY.replace("i = 0", "i = f(way='b')"))
    for does in (("i = 0", "i = 3"), ("print(3 + 3)", "print(3 + 4)"), ("len(xs) + 1", "len(xs)")):
        assert state(TOY.replace(*does)) != first, "what is left alone may matter to what is changed"


def test_silence_is_seen(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "test_toy.py").write_text(TESTS)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    env = os.environ | {"PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(done.stdout)
    assert [name for name, survives in found.items() if survives] == ["", "Toy.size: abs(x) -> x"]


def test_the_page_leaves_out_files_that_have_nothing_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"a": (10, 10), "_b": (0, 0), "c": (10, 9), "d": (0, 0)}
    record = {
        name: {"state": "", "made": made, "caught": caught, "survivors": [{"line": 3, "change": "x"}] * (made - caught)}
        for name, (made, caught) in rows.items()
    }
    monkeypatch.setattr(page, "RECORD", tmp_path / "mutants.json")
    page.RECORD.write_text(json.dumps(record))
    told = page.page()
    assert "19 of 20 changes in 2 files were caught, and 2 have nothing to change; below 95%: c." in told
    assert [line.split(" | ")[0] for line in told.splitlines() if " of " in line and "|" in line] == ["| a", "| c"]


def test_the_record_has_every_file_above_the_bar() -> None:
    record = json.loads(RECORD.read_text())
    assert set(record) == {path.stem for path in tool.files()}
    assert all(tool.tests_of(path) for path in tool.files())
    assert all(row["made"] == row["caught"] + len(row["survivors"]) for row in record.values())
    assert {name: row for name, row in record.items() if row["caught"] < BAR * row["made"]} == {}


def test_what_methods_share_is_tried_with_the_tests_of_those_who_use_it() -> None:
    paths = {path.stem: path for path in tool.files()}
    assert len(paths) == len(tool.files()), "rows go by the name of the file"
    assert {path.stem for path in tool.files() if tool.is_shared(path)} >= {
        "blocks",
        "rotary",
        "topk",
        "_voted",
        "_fits",
    }
    assert paths["knorm"] in tool.users(paths["topk"]), "by way of budget and scored_cache"
    voted = [path.stem for path in tool.users(paths["_voted"])]
    assert voted == ["ada_kv", "pyramid_kv", "snap_kv", "sparse_mm", "task_kv"]
    tests = [path.stem for path in tool.tests_of(paths["topk"])]
    assert tests[0] == "test_topk"
    assert "test_knorm" in tests
    assert not tool.is_shared(paths["knorm"])
    with pytest.raises(SystemExit, match="needs a file of tests"):
        tool.tests_of(paths["knorm"].with_name("none_such.py"))


def test_what_verbs_share_is_tried_with_the_tests_of_those_who_use_it() -> None:
    paths = {path.stem: path for path in tool.files()}
    verbs = [path for path in paths.values() if path.parent == tool.EXPLAINING]
    assert [path.stem for path in verbs if tool.is_shared(path)] == ["aim", "drawn", "states", "stream"]
    assert [path.stem for path in tool.users(paths["stream"])] == ["logits", "tracing"]
    tests = [path.stem for path in tool.tests_of(paths["states"])]
    assert tests == ["test_depth", "test_gradients", "test_importance", "test_likening", "test_linear"]
    assert paths["gradients"] in tool.users(paths["labels"]), "what the kit holds is not for methods alone"
    for path in verbs:
        if not tool.is_shared(path):
            assert tool.tests_of(path)[0].stem == f"test_{path.stem}"


def test_what_is_left_out_is_still_there() -> None:
    sources = {path.stem: path.read_text() for path in tool.files()}
    for name, left_out in json.loads(EQUIVALENT.read_text()).items():
        assert set(left_out) <= {m.name for m in changes.mutants(sources[name])}, name
        assert all(left_out.values()), name
