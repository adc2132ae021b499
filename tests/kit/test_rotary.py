"""How fast dimensions turn, against angles that are known; the two ways of pairing them, padding, parts of a head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.method import Method
from heedful.core.positions import Positions
from heedful.core.sites import Site, reads
from heedful.kit.rotary import periods, turned_back
from tests.samples import PAPER

SPEEDS = (3.0, 1.0, 0.3, 0.01)  # radians a token; the first is nearly half a turn


def turning(angles: Tensor, halves: bool) -> Callable[[Tensor], Tensor]:
    """Turns pairs of `x [1 1 n d]` by `angles [n pairs]`: (j, j + half), or (2j, 2j + 1); what lies behind stays."""

    def turn(x: Tensor) -> Tensor:
        out = x.clone()
        pairs = angles.shape[1]
        for j in range(pairs):
            a, b = (j, j + pairs) if halves else (2 * j, 2 * j + 1)
            cos, sin = angles[:, j].cos(), angles[:, j].sin()
            out[0, 0, :, a] = x[0, 0, :, a] * cos - x[0, 0, :, b] * sin
            out[0, 0, :, b] = x[0, 0, :, b] * cos + x[0, 0, :, a] * sin
        return out

    return turn


def call_of(rotate: Callable[[Tensor], Tensor] | None, n: int, text: Tensor | None = None) -> Call:
    queries = Positions.row(0, n, is_filled=None if text is None else text[None, None])
    return replace(Bare(Shape(b=1)).call, queries=queries, rotate=rotate)


def angles(n: int, start: int = 0, sign: float = 1.0) -> Tensor:
    return sign * (start + torch.arange(n, dtype=torch.float64))[:, None] * torch.tensor(SPEEDS, dtype=torch.float64)


def expected(halves: bool, width: int) -> Tensor:
    out = torch.full((width,), math.inf, dtype=torch.float64)
    for j, speed in enumerate(SPEEDS):
        for i in (j, j + len(SPEEDS)) if halves else (2 * j, 2 * j + 1):
            out[i] = 2 * math.pi / speed
    return out


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("width", [8, 11])
@pytest.mark.parametrize(("n", "start", "sign"), [(3, 0, 1.0), (8, 5, 1.0), (9, 2, -1.0), (40, 7, 1.0)])
def test_periods_are_those_of_the_angles(halves: bool, width: int, n: int, start: int, sign: float) -> None:
    found = periods(call_of(turning(angles(n, start, sign), halves), n), width)
    assert found is not None
    want = expected(halves, width)
    assert found.isinf().tolist() == want.isinf().tolist()
    assert close(found[:8].float(), want[:8].float())


def test_two_tokens_are_enough_and_one_is_not() -> None:
    quarter = torch.tensor([[0.0], [math.pi / 2]])  # the second of a pair (1, 1) stays 1
    turn = turning(quarter, False)

    def exact(x: Tensor) -> Tensor:
        return turn(x).round()

    found = periods(call_of(exact, 2), 4)
    assert found is not None
    assert found.tolist() == [4.0, 4.0, math.inf, math.inf]
    assert periods(call_of(turning(angles(1), True), 1), 8) is None
    assert periods(call_of(None, 9), 8) is None


def test_padding_turns_nothing() -> None:
    """Rows that are no text may be turned in any way."""
    n, text = 9, torch.tensor([False] * 3 + [True] * 4 + [False] * 2)
    turned = angles(n)
    turned[:3], turned[7:] = 100 * torch.rand(3, 4), 17.0
    found = periods(call_of(turning(turned, True), n, text), 8)
    assert found is not None
    assert close(found.float(), expected(True, 8).float())


def test_what_does_not_turn_and_what_cannot_be_turned() -> None:
    still = periods(call_of(lambda x: x, 5), 6)
    assert still is not None
    assert bool(still.isinf().all())
    assert len(still) == 6

    def too_wide(x: Tensor) -> Tensor:
        return x * torch.ones(4)

    assert periods(call_of(too_wide, 5), 6) is None


def test_what_turns_by_the_same_angles_is_measured_once() -> None:
    turned: list[Tensor] = []

    def rotation(speed: float) -> Callable[[Tensor], Tensor]:
        turn = turning(angles(9, sign=speed), True)
        return lambda x: turned.append(x) or turn(x)  # type: ignore[func-returns-value]

    call = call_of(rotation(1.0), 9)
    first = periods(call, 8)
    assert periods(replace(call, layer=1), 8) is first
    assert len(turned) == 1
    slower = periods(replace(call, layer=2, rotate=rotation(0.5)), 8)
    assert first is not None
    assert slower is not None
    assert close(slower.float(), 2 * first.float())
    wider = periods(call, 10)
    assert wider is not None
    assert len(wider) == 10
    fewer = replace(call, queries=Positions.row(0, 9, is_filled=(torch.arange(9) < 1)[None, None]))
    assert periods(fewer, 8) is None
    assert len(turned) == 3


class Looks(Method):
    paper = PAPER

    @reads(Site.QUERY)
    def look(self, query: Tensor, call: Call) -> None:
        FOUND.append(periods(call, query.shape[-1]))


FOUND: list[Tensor | None] = []


@torch.no_grad()
def test_those_of_a_llama_are_the_powers_of_its_base() -> None:
    FOUND.clear()
    with attach(models.tiny("llama"), Looks()) as run:
        run(input_ids=torch.arange(3, 23)[None])
    want = torch.tensor([2 * math.pi * 10000 ** (2 * j / 8) for j in range(4)] * 2)
    assert len(FOUND) == 2
    for found in FOUND:
        assert found is not None
        assert bool(((found.float() / want - 1).abs() < 1e-3).all())


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("behind", [0, 3])
def test_queries_are_turned_back(halves: bool, scale: float, behind: int) -> None:
    """In models that scale what they turn, and with dimensions behind that are not turned."""
    angles = torch.arange(5.0)[:, None] * torch.tensor(SPEEDS) + 0.2
    turn, width = turning(angles, halves), 2 * len(SPEEDS)

    def rotate(x: Tensor) -> Tensor:
        turned = torch.cat([turn(row[None, None]) for row in x.flatten(0, 1)], 1).view(x.shape)
        return torch.cat([scale * turned[..., :width], turned[..., width:]], -1)

    x = torch.randn(2, 3, 5, width + behind, generator=torch.Generator().manual_seed(0))
    assert close(turned_back(replace(Bare().call, rotate=rotate), rotate(x)), x)


def test_a_token_that_was_turned_the_other_way_is_turned_back() -> None:
    """From which the pairs are told as well."""
    turn = turning(-0.2 * torch.tensor([SPEEDS]), halves=True)
    x = torch.randn(1, 1, 1, 2 * len(SPEEDS), generator=torch.Generator().manual_seed(0))
    assert close(turned_back(replace(Bare().call, rotate=turn), turn(x)), x)


def test_what_was_not_turned_stays() -> None:
    x = torch.randn(2, 3, 5, 6)
    assert turned_back(replace(Bare().call, rotate=None), x) is x
    assert close(turned_back(replace(Bare().call, rotate=lambda y: y), x), x)


def test_a_models_own_queries_are_turned_back() -> None:
    """Also of padded texts, whose rows stand at other places."""

    class Both(Method):
        paper = PAPER

        @reads(Site.QUERY)
        def look(self, query: Tensor, call: Call) -> None:
            found.append((turned_back(call, query), query))

    model, found, wanted = models.tiny("llama"), [], []
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    ids = torch.arange(3, 17).view(2, 7)
    proj = model.model.layers[0].self_attn.q_proj
    handle = proj.register_forward_hook(lambda _, args, out: wanted.append(out.unflatten(-1, (4, -1)).transpose(1, 2)))
    with torch.inference_mode(), attach(model, Both()) as run:
        run(ids, attention_mask=mask, position_ids=place)
    handle.remove()
    assert close(found[0][0], wanted[0])
    assert not close(found[0][1], wanted[0])
