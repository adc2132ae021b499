"""Ranges that are told for each query, of the columns as they stand or in an order of their own, on every backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from heedful.conformance.tolerances import close, within_budget
from heedful.core.errors import BackendError
from heedful.core.mask import Ahead, Causal, Mask, Rule
from heedful.core.positions import Pairs, Positions
from heedful.core.rules import Arranged, Ranged
from heedful.engine.backends import native

from .kernel_calls import (
    BIASES,
    WEIGHINGS,
    Everything,
    Same,
    Weighed,
    a_bias,
    a_call,
    compare_pulled,
    draw,
    run,
)  # fmt: skip
from .test_native import pytestmark
from .test_native_extremes import path

__all__ = ["path", "pytestmark"]  # these tests too need a kernel, and run on each of its paths

SHAPE = (2, 4, 2, 40, 40, 16, 16)


def told(texts: int = 2, heads: int = 4) -> tuple[Tensor, Tensor]:
    """Two ranges of each query, some of them empty, and an order of tokens."""
    made = torch.Generator().manual_seed(4)
    ends = torch.randint(0, 41, (texts, heads, 40, 4), generator=made).sort(-1).values.unflatten(-1, (2, 2))
    return ends, torch.rand(texts, heads, 40, generator=made).argsort(-1)


@pytest.mark.parametrize("cols", [slice(0, 40), slice(7, 31), slice(None, 9), torch.tensor([3, 4, 11, 39])])
@pytest.mark.parametrize("kind", [torch.int16, torch.long])
def test_pairs(cols: slice | Tensor, kind: torch.dtype) -> None:
    ranges, place = told()
    whole = Positions.row(0, 40)
    pairs = Pairs(whole.take(slice(5, 9)), whole.take(cols), 4, slice(5, 9), cols)
    loose, ordered = Ranged(ranges.to(kind)).keeps(pairs), Arranged(ranges.to(kind), place.to(kind)).keeps(pairs)
    for b in range(2):
        for h in range(4):
            for i in range(5, 9):
                sees = {j for lo, hi in ranges[b, h, i].tolist() for j in range(lo, hi)}
                at = torch.arange(40)[cols].tolist()
                assert loose[b, h, i - 5].tolist() == [j in sees for j in at]
                assert ordered[b, h, i - 5].tolist() == [int(place[b, h, j]) in sees for j in at]


def test_what_a_kernel_may_ask() -> None:
    ranges, place = told()
    whole = Positions.row(0, 40)
    found = Mask((Ranged(ranges),)).key_ranges(whole, whole, 4)
    assert found is not None
    kept = Ranged(ranges).keeps(Pairs(whole, whole, 4, slice(0, 40), slice(0, 40)))
    inside = (torch.arange(40) >= found[..., :1]) & (torch.arange(40) < found[..., 1:])
    assert torch.equal(inside.any(-2), kept)
    assert not Ranged(ranges).scattered
    assert Arranged(ranges, place).scattered


@pytest.mark.parametrize("how", [None, *WEIGHINGS], ids=repr)
@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("heads", [1, 4])
def test_there_and_back(how: Any, texts: int, heads: int) -> None:
    ranges, place = told(texts, heads)
    method = Same() if how is None else Weighed(how)
    for rule in (Arranged(ranges.short(), place.short()), Ranged(ranges)):
        call = a_call(SHAPE, (rule,))
        q, k, v = draw(SHAPE)
        found, want, exact = (
            run(name, method, *(x.to(t) for x in (q, k, v)), call)
            for name, t in (("native", q.dtype), ("reference", q.dtype), ("reference", torch.float64))
        )
        assert within_budget(found, want, exact)
        assert not close(want, run("reference", method, q, k, v, a_call(SHAPE, ())))
        assert close(run("tiled", method, q, k, v, call), want)
        compare_pulled("native", SHAPE, (rule,), method=method, softcap=3.0)


def rules(order: Arranged) -> dict[str, tuple[tuple[Rule, ...], dict[str, Any], bool]]:
    """Of calls: rules, what else there is, and whether tokens are put in order."""
    pad = torch.tensor([0, 7])
    return {
        "alone": ((order,), {}, True),
        "beside another": ((Ahead(9), order), {}, False),
        "with sinks": ((order,), {"sink": torch.linspace(-1, 1, 4).view(1, 4, 1, 1)}, True),
        "causal": ((Causal(), order), {}, False),
        "with a bias": ((order,), {"bias": a_bias(SHAPE, BIASES[0])}, False),
        "padded": ((order,), {"pad": pad}, False),
        "with keys that are gone": ((order,), {"filled": torch.arange(40) % 3 > 0}, False),
    }


@pytest.mark.parametrize("name", rules(Arranged(*told())))
def test_tokens_are_put_in_order_where_that_says_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, more, ordered = rules(Arranged(*told()))[name]
    monkeypatch.setattr(native, "_in_order", asked := Mock(wraps=native._in_order))
    q, k, v = draw(SHAPE)
    call = a_call(SHAPE, given, more.pop("pad", None))
    if (filled := more.pop("filled", None)) is not None:
        call = replace(call, keys=replace(call.keys, is_filled=filled[None, None]))
    found, want = (run(backend, Same(), q, k, v, call, **more) for backend in ("native", "reference"))
    text = call.is_text[..., None].expand(found.shape)
    assert close(found[text], want[text])
    assert bool(asked.called) == ordered


def test_nothing_is_summed_up_in_another_order() -> None:
    with pytest.raises(BackendError, match="tile by tile it sums nothing up"):
        run("native", Everything([]), *draw(SHAPE), a_call(SHAPE, (Arranged(*told()),)))
