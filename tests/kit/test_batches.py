"""Batches of a fit: the roles that they must name, and what a reader finds in them under these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import fit, models
from heedful.core.call import Call
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.sites import Site, reads
from heedful.core.stats import Sum
from heedful.kit.batches import at_least_one, read, with_roles
from tests.samples import PAPER

IDS, GOOD = torch.arange(3, 15).view(2, 6), [{"roles": {"a": ((0, 1),)}}]


class Marks(Method):
    """How many tokens of each text are marked, over all batches, and whether gradients are kept."""

    paper = PAPER

    @reads(Site.HIDDEN)
    def count(self, hidden: Tensor, call: Call) -> Sum:
        told = torch.zeros(len(hidden), 2, dtype=torch.double)
        if "a" in call.roles:
            told[:, 0] = call.marked_queries("a")[:, 0].sum(-1)
        told[:, 1] = torch.is_grad_enabled()
        return Sum.of(told)

    def answer(self, readings: Readings) -> list[list[float]]:
        return [stat.value.tolist() for stat in readings.values()]

    def fit(self, context: FitContext, batches: Any) -> Any:
        return read(context, self, batches)


def test_a_reader_is_shown_each_batch_under_its_own_roles() -> None:
    model = models.tiny("llama")
    own = [{"a": ((0, 2),)}, {"a": ((1, 6),)}]
    batches = [
        {"input_ids": IDS, "roles": {"a": ((0, 3),)}},
        {"input_ids": IDS, "roles": own, "attention_mask": torch.ones_like(IDS)},
        {"input_ids": IDS},
    ]
    found: Any = fit(Marks(), model, iter(batches))
    assert found == [[[5.0, 0.0], [8.0, 0.0]]] * 2
    assert "roles" in batches[0]


def test_a_model_is_given_all_of_a_batch_but_its_roles() -> None:
    model, given = models.tiny("llama"), []
    mask = torch.ones_like(IDS).index_fill(1, torch.tensor([0]), 0)
    hook = model.register_forward_pre_hook(lambda _, args, told: given.append((args, told)), with_kwargs=True)
    fit(Marks(), model, [{"input_ids": IDS, "attention_mask": mask, "use_cache": False, "roles": {"a": ((1, 3),)}}])
    hook.remove()
    ((args, told),) = given
    assert args == ()
    assert told.keys() == {"input_ids", "attention_mask", "use_cache"}
    assert told["input_ids"] is IDS
    assert told["attention_mask"] is mask


def test_roles_that_are_not_named() -> None:
    both, own = {"a": ((0, 1),), "b": (), "c": ()}, [{"a": ((0, 1),)}, {"a": (), "b": ()}]
    assert with_roles("Fit", iter([{"roles": both}]), "a", "b", good=GOOD) == [{"roles": both}]
    assert with_roles("Fit", [{"roles": own}], "a", good=GOOD) == [{"roles": own}]
    cases: tuple[tuple[list[Any], int], ...] = (
        ([], 0), ([{"input_ids": IDS}], 1), ([{"roles": {"a": ()}}], 1), ([{"roles": both}, {"roles": own}], 2),
    )  # fmt: skip
    for batches, count in cases:
        rule = rf'Fit\.batches = {count}: must be 1 or more, each with roles naming "a" and "b"; .*\(\(0, 1\),\)'
        with pytest.raises(FieldError, match=rule):
            with_roles("Fit", batches, "a", "b", good=GOOD)
    with pytest.raises(FieldError, match=r'each with roles naming "b"; '):
        with_roles("Fit", [{"roles": own}], "b", good=GOOD)


def test_there_must_be_a_batch() -> None:
    assert list(at_least_one("Fit", iter([{"a": 1}, {}]))) == [{"a": 1}, {}]
    assert list(at_least_one("Fit", [{}])) == [{}]
    with pytest.raises(FieldError, match=r"Fit\.batches = 0: must be 1 or more; for example batches=\[{'b': 2}\]"):
        list(at_least_one("Fit", [], {"b": 2}))
