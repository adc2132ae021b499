"""Errors on their way to another process, and back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import heedful
from heedful.core.errors import CatalogueError, FieldError, HeedfulError, StatisticError, UnknownFieldError
from heedful.core.sites import Site


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


def test_a_good_value_can_be_copied_and_a_site_has_its_name() -> None:
    with pytest.raises(FieldError, match=r"site = Site\.MASK: .*for example site=Site\.HEAD_OUTPUT$"):
        heedful.explaining.activations(heedful.models.tiny("llama"), [1, 2], Site.MASK)
    with pytest.raises(FieldError, match=r"for example site=Site\.HEAD_OUTPUT$"):
        heedful.edit("pattern", lambda x, call: x)  # type: ignore[arg-type]
    with pytest.raises(FieldError, match=r"site = \[Site\.PATTERN\]: .*for example site=Site\.HEAD_OUTPUT$"):
        heedful.explaining.activations(heedful.models.tiny("llama"), [1, 2], [Site.PATTERN])
    with pytest.raises(FieldError, match=r"for example function=lambda value, call: 2 \* value$"):
        heedful.edit(Site.PATTERN, lambda x: x)  # type: ignore[arg-type]


def test_what_holds_something_that_would_do_is_told_what() -> None:
    pipeline = SimpleNamespace(scheduler=None, transformer=heedful.models.tiny("llama"), _own=torch.nn.Linear(1, 1))
    with pytest.raises(FieldError, match=r"must be a model .* gives, such as its transformer; for example"):
        heedful.attach(pipeline, heedful.methods.TempScale(0.9))  # type: ignore[arg-type]
