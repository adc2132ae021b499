"""A comparison that goes on asks of the code that answered before: what was changed since is no longer the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from heedful import Site, edit, models
from heedful.bench.compare import compare
from heedful.bench.comparison import Comparison
from heedful.core.code import code_of
from heedful.core.errors import StatisticError
from heedful.core.files import RECORDS
from heedful.core.method import Method
from heedful.core.sites import at
from heedful.methods import SinkWindow, TempScale

from .samples import PAPER, Scale
from .test_compare import Echo


def scaled(factor: float) -> Callable[[Tensor, Any], Tensor]:
    return lambda weights, call: weights * factor


def changed(pattern: Callable[[Tensor, Any], Tensor]) -> Method:
    return edit(Site.PATTERN, pattern)


def test_functions_are_told_by_what_they_do() -> None:
    assert code_of(changed(lambda w, c: w * 0.5)) == code_of(changed(lambda w, c: w * 0.5))
    ways = [
        changed(lambda w, c: w * 0.5), changed(lambda w, c: w * 0.25), changed(lambda w, c: w / 0.5),
        changed(lambda w, c: w.tanh()), changed(lambda w, c: w.exp()), changed(scaled(0.5)), changed(scaled(0.7)),
        changed(lambda w, c, by=0.5: w * by), changed(lambda w, c, by=0.7: w * by), TempScale(), Scale(),
        TempScale() | changed(scaled(0.5)), changed(scaled(0.5)) | TempScale(),
    ]  # fmt: skip
    assert len({code_of(way) for way in ways}) == len(ways)
    assert code_of(TempScale(0.5).on(layers=1)) == code_of(TempScale())  # settings are told apart by their names
    assert code_of(SinkWindow(4, 64)) != code_of(TempScale())


def test_a_class_typed_at_a_prompt_is_told_by_its_functions() -> None:
    def made(by: float) -> Method:
        body = {"paper": PAPER, "__module__": "typed", "act": at(Site.PATTERN)(lambda self, x, call: x * by)}
        kind: Any = type("Typed", (Method,), body)
        found: Method = kind()
        return found

    assert code_of(made(0.5)) == code_of(made(0.5)) != code_of(made(0.25))


def test_another_process_gives_the_same_names() -> None:
    """Sets have another order there, and objects other addresses."""
    script = (
        "from heedful import Site, edit; from heedful.core.code import code_of\n"
        "print(code_of(edit(Site.PATTERN, lambda w, c, o=object(): w if c.name in {'a', 'b', 'c', 'd'} else 2 * w)))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1


def test_answers_of_other_code_are_not_taken(tmp_path: Path) -> None:
    loaded = models.Loaded(models.tiny("llama"), object(), "tiny")

    def asked(by: float, name: str = "mine", out: Path | None = tmp_path) -> Comparison:
        return compare(loaded, {name: changed(scaled(by))}, [Echo()], prompts=3, turns=0, out=out)

    first = asked(0.9)
    assert asked(0.9).results == first.results
    with pytest.raises(StatisticError, match="answers of 'mine' are from before and from after its code was changed"):
        asked(0.1)
    assert asked(0.1, "other").results[-1].score == asked(0.1, out=None).results[-1].score
    with pytest.raises(StatisticError, match="answers of 'mine' are from before"):
        asked(0.1)
    with pytest.raises(StatisticError, match="answers of 'mine' are from before"):
        first + asked(0.1, out=None)
    records = tmp_path / RECORDS
    records.write_text(records.read_text() + json.dumps({"record": "facts", "code": 3}) + "\n")
    with pytest.raises(StatisticError, match="code must be the name of each contender's and task's code"):
        asked(0.9)


def test_answers_to_a_task_of_other_code_are_not_taken(tmp_path: Path) -> None:
    """A task that is typed at a prompt, as one that is kept in a file, may be changed between two calls."""
    loaded = models.Loaded(models.tiny("llama"), object(), "tiny")

    def asked(right: float, out: Path | None = tmp_path) -> Comparison:
        body = {"__module__": "typed", "name": "typed", "score": lambda self, item, sheet: right}
        kind: Any = type("Typed", (Echo,), body)
        return compare(loaded, [TempScale(0.5)], [kind()], prompts=3, turns=0, out=out)

    first = asked(0.5)
    assert asked(0.5).results == first.results
    rule = r"answers of 'Typed\(length=20\)' are from before and from after its code was changed: name another folder"
    with pytest.raises(StatisticError, match=rule):
        asked(1.0)
    with pytest.raises(StatisticError, match=rule):
        first + asked(1.0, out=None)
    assert {r.score for r in asked(1.0, out=tmp_path / "other").results} == {1.0}
