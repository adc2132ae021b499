"""What goes by distance, against each pair looked up by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.positions import Positions
from heedful.engine.distances import by_distance
from tests.kernel_calls import a_call

TABLE = torch.randn(2, 99, generator=torch.Generator().manual_seed(0))
LATE = Positions.row(5, 6).index  # the first query's place, behind some of the keys'


def told(far: Tensor, asked: list[int]) -> Tensor:
    asked.append(len(far))
    return TABLE[:, far + 40]


def compare(call: Call) -> int:
    """How many distances were asked for, once the pairs are found right."""
    asked: list[int] = []
    found = by_distance(lambda far: told(far, asked), call)
    for h in range(2):
        want = TABLE[h, call.distance[:, h % call.distance.shape[1]] + 40]
        assert close(found[:, h].expand_as(want), want)
    assert len(asked) == 1
    return asked[0]


@pytest.mark.parametrize("rows", [slice(0, 20), slice(7, 9), slice(19, 20)])
@pytest.mark.parametrize("cols", [slice(0, 20), slice(3, 11), slice(8, 9)])
def test_tokens_that_follow_one_another_are_asked_for_each_distance_once(rows: slice, cols: slice) -> None:
    for pad in (None, torch.tensor([0, 3])):
        part = a_call((2, 2, 1, 20, 20, 4, 4), (), pad).tile(rows, cols)
        assert compare(part) == len(part.queries) + len(part.keys) - 1


@pytest.mark.parametrize(
    "keys",
    [
        torch.tensor([[[0, 1, 3, 4]]]),
        torch.tensor([[[0, 1, 2, 3]], [[1, 2, 3, 4]]]),  # as far apart in no two texts
        torch.tensor([[[0, 1, 2, 3], [0, 2, 3, 4]]]),
        torch.tensor([[[4, 3, 2, 1]]]),
    ],
)
def test_others_are_looked_up_pair_by_pair(keys: Tensor) -> None:
    call = a_call((1, 2, 2, 6, 6, 4, 4), ())
    compare(replace(call, queries=Positions(LATE, LATE), keys=Positions(keys, keys)))
    compare(replace(call, queries=Positions(2 * LATE, 2 * LATE), keys=Positions(keys[:1, :1], keys[:1, :1])))


def test_gradients_reach_what_is_told() -> None:
    table = TABLE.clone().requires_grad_()
    call = a_call((1, 2, 1, 9, 9, 4, 4), ())
    waves = torch.arange(162.0).view(1, 2, 9, 9).sin()
    (given,) = torch.autograd.grad((by_distance(lambda far: table[:, far + 40], call) * waves).sum(), table)
    want = torch.zeros_like(TABLE)
    for h in range(2):
        for i in range(9):
            for j in range(9):
                want[h, i - j + 40] += waves[0, h, i, j]
    assert close(given, want)
