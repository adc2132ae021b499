"""A verdict says why a law does not apply, and no law listens to warnings that nothing changed."""

from __future__ import annotations

import warnings

import pytest

from heedful import check
from heedful.conformance.verdict import law
from heedful.core.errors import FieldError, InactiveWarning
from heedful.methods import AttentionSorting
from tests.test_laws import Scale


def test_a_law_that_does_not_apply_says_why() -> None:
    verdict = check(Scale(), only=("statistics",))["statistics"]
    assert (verdict.outcome, verdict.reason) == ("does not apply", "reads nothing")


def test_a_law_that_is_for_other_kinds_has_no_verdict() -> None:
    report = check(AttentionSorting, only=("padding", "is_documented"))
    assert report["is_documented"].outcome == "kept"
    with pytest.raises(FieldError, match=r"'padding': was not tried on AttentionSorting.*; tried: is_documented"):
        report["padding"]


def test_a_law_is_deaf_to_warnings_that_nothing_changed() -> None:
    @law("it warns")
    def warns_of_nothing(entry: object) -> None:
        warnings.warn("this run changed nothing", InactiveWarning, stacklevel=2)

    warns_of_nothing(None)


def test_a_law_hands_on_what_it_is_told_beside_the_method() -> None:
    """As `composes` is, which the slow suite has try every pair."""
    told = []

    @law("it is told more")
    def asks_more(entry: object, every: bool = False) -> None:
        told.append(every)

    asks_more(None)
    asks_more(None, every=True)
    assert told == [False, True]
