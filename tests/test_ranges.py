"""Ranges of a setting, as the command line takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heedful.cli.app import app
from heedful.cli.ranges import ranged
from heedful.core.errors import FieldError
from tests.test_cli_compare import RUN, tiny  # noqa: F401 - a fixture


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("act", ["act"]),
        ("act()", ["act()"]),
        ("snapkv(budget=0.25)", ["snapkv(budget=0.25)"]),
        ("snapkv(budget=0.1..0.75)", [f"snapkv(budget={x})" for x in ("0.1", "0.2", "0.38", "0.75")]),
        ("needle(length=512..4096)", [f"needle(length={x})" for x in (512, 1024, 2048, 4096)]),
        ("needle(length=512..)", [f"needle(length={x})" for x in (512, 1024, 2048)]),
        ("a(x=1..2,y=3)|b(z=4)", ["a(x=1,y=3)|b(z=4)", "a(x=2,y=3)|b(z=4)"]),
        ("a(1..3, 0.5)", ["a(1, 0.5)", "a(2, 0.5)", "a(3, 0.5)"]),
        ("../notes/(length=64)", ["../notes/(length=64)"]),
    ],
)
def test_a_range_is_a_few_values(text: str, values: list[str]) -> None:
    assert ranged(text, most=3000) == values


def test_two_ranges_are_every_pair() -> None:
    assert ranged("a(x=1..2)|b(y=3..4)") == [f"a(x={x})|b(y={y})" for x in (1, 2) for y in (3, 4)]


@pytest.mark.parametrize(
    ("text", "rule", "good"),
    [
        ("a(x=0..1)", "the range 0..1 must begin above 0", "a(x=0.1..0.75)"),
        ("a(x=2..1)", "the range 2..1 must end above where it begins", "a(x=1..2)"),
        ("a(x=2..2)", "the range 2..2 must end above where it begins", "a(x=2..4)"),
        ("a(x=5..,y=1)", "the range 5.. needs an end", "a(x=5..20,y=1)"),
    ],
)
def test_bad_ranges_are_named_by_their_option(text: str, rule: str, good: str) -> None:
    with pytest.raises(FieldError) as found:
        ranged(text)
    assert str(found.value) == f"compare.--methods = {text!r}: {rule}; for example --methods={good!r}"
    with pytest.raises(FieldError, match=r"--tasks = .*begins above 4, .*for example --tasks='a\(x=2\.\.\)'"):
        ranged("a(x=5..)", most=4)


def test_the_command_line_expands_methods_and_lengths(tiny: None, tmp_path: Path) -> None:  # noqa: F811
    arguments = ["compare", "--methods", "sinkwindow(1,2..8)", "--tasks", "induction(length=200..)", "--prompts", "2"]
    told = RUN.invoke(app, [*arguments, "--turns", "0", "--no-page", "--json"])
    assert told.exit_code == 0, told.exception
    found = json.loads(told.stdout)
    assert set(found["facts"]["contenders"]) == {
        "SinkWindow(sinks=1, window=2)", "SinkWindow(sinks=1, window=3)", "SinkWindow(sinks=1, window=5)",
        "SinkWindow(sinks=1, window=8)",
    }  # fmt: skip
    assert list(found["facts"]["tasks"]) == ["Induction(length=200)"]
    assert "left out: Induction(length=400) is longer than the model takes" in told.stderr
    assert found["verdicts"]["SinkWindow(sinks=1, window=8)"] == "unclear"
