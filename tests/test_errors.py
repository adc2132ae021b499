"""Errors on their way to another process, and back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest

from heedful.core.errors import CatalogueError, FieldError, HeedfulError, StatisticError, UnknownFieldError


@pytest.mark.parametrize("sent", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])
def test_an_error_that_is_sent_says_the_same(sent: Callable[[HeedfulError], HeedfulError]) -> None:
    def unsent() -> None:
        """A function within another cannot be pickled, and what an error was raised about need not be."""

    for error in (
        StatisticError("x"),
        CatalogueError("no 'x'"),
        FieldError(unsent, "field", unsent, "must be", 2),
        UnknownFieldError("M", "odd", unsent, ["even"]),
    ):
        error.add_note("while reading")
        found = sent(error)
        assert type(found) is type(error)
        assert str(found) == str(error)
        assert found.__notes__ == ["while reading"]
