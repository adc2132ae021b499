"""A backend that passes on a call for no reason is told, whatever the laws forgive it for masks."""

from __future__ import annotations

import pytest
from torch import Tensor

from heedful import check
from heedful.conformance.call_laws import backends_agree, masked_rows
from heedful.core.call import Call
from heedful.core.mask import Mask, Where
from heedful.core.method import Method
from heedful.core.sites import Site, at
from heedful.engine.backends import BACKENDS
from heedful.engine.needs import Needs

from .samples import PAPER, Scale

LAWS = ("masked_rows", "backends_agree")


class Odd(Method):
    """Every other key, more stretches than a kernel takes."""

    paper = PAPER

    @at(Site.MASK)
    def thin(self, mask: Mask, call: Call) -> Mask:
        return mask & Where(lambda q, k: k % 2 == 0)


class Late(Method):
    """Goes by the size of the tile, from the second layer on."""

    paper = PAPER

    @at(Site.SCORES)
    def scale(self, scores: Tensor, call: Call) -> Tensor:
        return scores * scores.shape[-2] if call.layer else scores


def test_what_a_method_does_after_the_first_layer_is_tried_too() -> None:
    report = check(Late(), only=("any_tile", "backends_agree"))
    assert {law.outcome for law in report.verdicts} == {"broken"}


@pytest.mark.parametrize("backend", ["native", "sdpa", "tiled"])
def test_a_backend_that_passes_for_no_reason_is_told(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    one = BACKENDS[backend]
    honest = type(one).refuses

    def refuses(self: object, needs: Needs) -> list[str]:
        return honest(self, needs) if needs.call is None else ["no"]  # type: ignore[arg-type]

    assert check(Scale(), only=LAWS).ok
    if honest(one, Needs()):  # type: ignore[arg-type]
        pytest.skip(f"{backend} is not here")
    monkeypatch.setattr(type(one), "refuses", refuses)
    report = check(Scale(), only=LAWS)
    for name in LAWS:
        assert report[name].outcome == "broken"
        assert f"{backend}: no" in report[name].reason


def test_what_a_method_makes_of_the_mask_may_be_nothing_for_a_kernel() -> None:
    for law in (masked_rows, backends_agree):
        law(Odd())
