"""What is known of tensors, modules and things while a look or a run is there, and for how long."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import heedful
from heedful import Site, attach
from heedful.adapters.operations.uses import Origin, Use, Uses
from heedful.core.errors import SiteError
from heedful.engine import leaving
from heedful.engine.leaving import Before
from tests.test_written_out_uses import REPLACED, refused, served, x

__all__ = ["x"]
IDS = torch.arange(3, 11)[None]


class Mixed(nn.Module):
    """One attention, causal or not."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(heads, heads, heads, is_causal=self.causal)
        return out.transpose(1, 2).flatten(2)


def test_what_one_layer_hides_the_next_may_show() -> None:
    """Only cross-attention takes the order of its queries from the layers before it."""
    model, found = nn.Sequential(Mixed(causal=True), Mixed(causal=False)), list[bool]()
    seen = heedful.edit(Site.SCORES, lambda scores, call: (found.append(call.causal), 2 * scores)[1])
    given = torch.randn(1, 5, 8)
    with torch.no_grad(), attach(model, seen, inputs=given) as run:
        run(given)
    assert found == [True, False]


def fails(*_: Any) -> Tensor:
    raise SiteError("on purpose")


def test_an_error_that_somebody_keeps_holds_no_model() -> None:
    """Its traceback leads to what the run knew of the layers; the model is free all the same."""
    model = heedful.models.tiny("llama")
    with pytest.raises(SiteError, match="on purpose") as kept, attach(model, heedful.edit(Site.HIDDEN, fails)):
        model(IDS)
    assert kept.value.__traceback__ is not None
    with attach(model, heedful.edit(Site.SCORES, lambda scores, call: 2 * scores)) as run:
        run(IDS)


class Held(nn.Module):
    """Holds a list that holds itself, one thing twice, and a parameter outside its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.notes: list[Any] = []
        self.mine = torch.zeros(2)
        self.notes += [self.notes, self.mine, [self.mine], self.inner, self.inner.weight]


def test_each_thing_is_kept_once_and_parameters_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = Held(), list[Tensor]()
    monkeypatch.setattr(leaving, "_tensor", lambda x: (kept.append(x), lambda: None)[1])
    before = Before(model, {"again": model.notes, "inner": model.inner})
    assert len(kept) == 1
    assert kept[0] is model.mine
    model.notes.clear()
    before.back()
    assert model.notes[0] is model.notes


def test_what_came_of_a_product_is_known_as_long_as_it_lives() -> None:
    uses, use = Uses(), Use(Origin())
    for _ in range(100):  # a tensor that is gone leaves its place to the next one
        tensor = torch.zeros(3)
        assert uses.of(tensor) == ()
        uses.note(tensor, use)
        assert uses.of(tensor) == (use,)
        uses.note(tensor, use, use)
        assert uses.of(tensor) == (use, use)
    del tensor
    assert not uses._known


def adds_to_some(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    scores[..., 1:] += 0.5
    scores[..., :2] -= torch.ones(2)
    weights = scores.softmax(-1)
    return weights @ v, weights


def adds_to_some_anew(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    part = scores[..., 1:]
    part = part.unsqueeze(0).squeeze(0)
    part += 0.5
    scores[..., 1:] = part
    weights = scores.softmax(-1)
    return weights @ v, weights


@pytest.mark.parametrize("writes", [adds_to_some, adds_to_some_anew])
def test_what_is_added_to_some_of_the_scores_stays_theirs(writes: Any, x: Tensor) -> None:
    served(writes, x, louder=False)


def adds_one_part_to_another(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    scores[..., :1] = scores[..., :1] + scores[..., 1:2]
    return scores.softmax(-1) @ v, None


def test_what_comes_of_two_parts_is_neither(x: Tensor) -> None:
    refused(adds_one_part_to_another, x, REPLACED)
