"""Presets of compare, and what a comparison says of each method's worst task."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from heedful import models
from heedful.bench.comparison import Comparison
from heedful.bench.presets import PRESETS, SHARES, preset
from heedful.bench.records import Answered, Cost
from heedful.bench.results import PLAIN, SHARE
from heedful.bench.worst import listing, sentence, worst
from heedful.catalogue import parted, stack_from
from heedful.cli.app import app
from heedful.core.errors import CatalogueError
from heedful.core.method import Method
from heedful.tasks import find
from tests.test_cli_compare import Characters

PROMPTS = 40
NATS = {"a": (-0.1, -0.5, 0.3), "b": (-0.3, -0.2, -0.3), "same": (0.0, 0.0, 0.0)}  # by task, to the unedited model


def comparison(nats: Mapping[str, tuple[float, ...]], blind: str = "", idle: str = "same") -> Comparison:
    """Answers whose log-probabilities differ as told, the same for all prompts but for what they add up to."""
    count = max(map(len, nats.values()))
    about = {"about": "A.", "unit": SHARE, "more_is_better": True}
    facts = {"contenders": {n: n for n in nats}, "tasks": {f"t{i}": about | {"name": f"t{i}"} for i in range(count)}}
    records: list[Answered | Cost] = []
    for name, told in {PLAIN: (0.0,) * count, **nats}.items():
        records += [Cost(name, 40, "m", turn, 1.0, 1.0, 0, 50 if name == "a" else 100, None) for turn in (1, 2)]
        for task, gap in enumerate(told):
            score = 0.0 if f"t{task}" == blind else 0.8
            for n in range(PROMPTS):
                more = gap + 0.1 * (-1) ** n if gap else 0.0
                records.append(Answered(name, f"t{task}", 0, n, score, more - 1, 0.1, 0.1, name not in (PLAIN, idle)))
    return Comparison(facts, tuple(records))


def test_the_worst_task_is_where_the_right_answer_loses_most() -> None:
    found = worst(comparison(NATS))
    assert list(found) == ["a", "b"]  # what changed nothing has none
    assert (found["a"].task, found["b"].task) == ("t1", "t0")
    assert found["a"].gap.mean == pytest.approx(-0.5)
    assert found["a"].plain == found["b"].plain == pytest.approx(-1.0)
    assert found["a"].gap.low < -0.5 < found["a"].gap.high


def test_a_task_that_tells_nothing_is_no_worst_one_and_one_task_has_no_worst() -> None:
    found = worst(comparison(NATS, blind="t1"))
    assert (found["a"].task, found["a"].gap.mean) == ("t0", pytest.approx(-0.1))
    assert found["a"].of == 2
    for told in (comparison({"a": (-0.1,), "b": (-0.2,)}), comparison({"a": (-0.1, -0.4), "b": (-0.2, 0.0)}, "t0")):
        assert worst(told) == {}
        assert list(listing(told)) == []
        assert sentence(told) == ""


def test_it_is_told_in_a_table_and_in_a_sentence() -> None:
    told = comparison(NATS)
    (table,) = listing(told)
    assert [row[:6] for row in table.rows] == [
        ("b", "100%", None, "t0", pytest.approx(-1.0), pytest.approx(-0.3)),
        ("a", "50%", None, "t1", pytest.approx(-1.0), pytest.approx(-0.5)),
    ]
    low, high = table.rows[0][-2:]
    assert low < -0.3 < high
    assert sentence(told) == (
        "On the task where each does worst, b does best: -0.30 nats a token on t0, where the unedited model has -1.00."
    )
    description = told.description()
    assert sentence(told) in [finding.text for finding in description.findings]
    assert "worst" in [figure.key for figure in description.figures]
    assert sentence(comparison({"a": (-0.1, -0.2)})) == ""
    assert sentence(comparison({**NATS, "c": (0.0, -0.01)})) == sentence(told)  # never asked where the others lose


def test_every_preset_names_what_there_is() -> None:
    for name, each in PRESETS.items():
        assert preset(name) is each
        assert each.about.endswith(".")
        assert each.paper.link
        contenders = [stack_from(text) for text in parted(each.methods)]
        assert len({repr(what) for what in contenders}) == len(contenders) > 1
        assert len({repr(find(text)) for text in parted(each.tasks)}) > 1
    with pytest.raises(CatalogueError, match=r"no preset named 'sparse-frontir'\..* Known: sparse-frontier"):
        preset("sparse-frontir")


def test_the_frontier_has_each_budget_in_every_group() -> None:
    found: dict[str, list[float]] = {}
    for text in parted(preset("sparse-frontier").methods):
        method = stack_from(text)
        assert isinstance(method, Method)
        if hasattr(method, "budget"):
            found.setdefault(type(method).__name__, []).append(method.budget)
    assert found == {name: list(SHARES) for name in ("SnapKV", "AdaKV", "LeoAM", "TokenSelect")}


def test_the_command_takes_a_preset_and_ones_own_in_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded = models.Loaded(models.tiny("llama"), Characters(), "tiny")
    monkeypatch.setattr(models, "load", lambda _: loaded)
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    listed = run.invoke(app, ["compare", "--preset", "list"])
    assert all(name in listed.stdout for name in PRESETS)
    asked = ["compare", "--preset", "sparse-frontier", "--prompts", "2", "--turns", "0", "--no-page"]
    told = run.invoke(app, [*asked, "--tasks", "induction(length=20)"])
    assert told.exit_code == 0, told.exception
    assert re.search(r"SnapKV\(budget=0\.25\)", told.stdout)
    other = run.invoke(app, [*asked, "--tasks", "induction(length=20)", "--methods", "sinkwindow(1,8)"])
    assert "SinkWindow(sinks=1, window=8)" in other.stdout
    assert "SnapKV" not in other.stdout
    wrong = run.invoke(app, ["compare", "--preset", "frontier"])
    assert isinstance(wrong.exception, CatalogueError)
