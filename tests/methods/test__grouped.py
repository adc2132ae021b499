"""Sums and softmax of groups of columns, in loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful.conformance.tolerances import close
from heedful.methods.mechanisms.normalise._grouped import Groups

SCORES = torch.tensor([[1.0, 2.0, 3.0, -1.0, 0.5, 90.0]], dtype=torch.float64)
AMONG = torch.tensor([[True, True, False, True, True, False]])
NUMBER = torch.tensor([[0, 2, 0, 2, 1, 3]])
LAID = Groups.of(NUMBER)
WAYS = {"laid": LAID, "scattered": LAID._replace(laid=None)}


def by_loops(scores: Tensor, among: Tensor, number: Tensor) -> Tensor:
    wanted = torch.zeros_like(scores)
    for i, j in torch.cartesian_prod(*map(torch.arange, scores.shape)).tolist():
        if among[i, j]:
            group = [n for n in range(scores.shape[1]) if among[i, n] and number[0, n] == number[0, j]]
            wanted[i, j] = 1 / sum(math.exp(float(scores[i, n] - scores[i, j])) for n in group)
    return wanted


@pytest.mark.parametrize("way", WAYS)
def test_each_group_by_itself(way: str) -> None:
    assert close(WAYS[way].softmax(SCORES, AMONG), by_loops(SCORES, AMONG, NUMBER))
    assert close(WAYS[way].sums(SCORES), torch.tensor([[4.0, 0.5, 1.0, 90.0]], dtype=torch.float64))
    every = torch.ones_like(AMONG)
    assert close(WAYS[way].softmax(SCORES, every), by_loops(SCORES, every, NUMBER))


@pytest.mark.parametrize("way", WAYS)
def test_of_scores_far_apart_and_its_gradient(way: str) -> None:
    x = (SCORES * torch.tensor([1.0, 1.0, 1.0, 1.0, -2000.0, 1.0])).requires_grad_()
    found = WAYS[way].softmax(x, AMONG)
    assert found[0, 4] == 1
    found[0, 1].backward()
    assert x.grad is not None
    share = 1 / (1 + math.exp(-3))
    expected = torch.tensor([[0.0, share * (1 - share), 0.0, -share * (1 - share), 0.0, 0.0]], dtype=torch.float64)
    assert close(x.grad, expected)


@pytest.mark.parametrize("way", WAYS)
def test_times_the_shares_of_groups(way: str) -> None:
    share = torch.tensor([[0.5, 0.25, 3.0, 7.0]], dtype=torch.float64)
    wanted = by_loops(SCORES, AMONG, NUMBER) * share[0, NUMBER]
    assert close(WAYS[way].softmax(SCORES, AMONG, share), wanted)


def test_every_text_and_head_has_groups_of_its_own() -> None:
    draw = torch.Generator().manual_seed(0)
    number = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 0, 2, 2, 2, 1], [2, 0, 0, 0, 1, 1, 1, 1]])
    scores, among = torch.randn(3, 4, 8, generator=draw), torch.rand(3, 4, 8, generator=draw) < 0.7
    groups = Groups.of(number[:, None])
    assert groups.laid is not None
    found, sums = groups.softmax(scores, among), groups.sums(scores)
    for row in range(3):
        assert close(found[row], by_loops(scores[row], among[row], number[row : row + 1]))
        for group in range(3):
            assert close(sums[row, :, group], scores[row][:, number[row] == group].sum(-1))


@pytest.mark.parametrize(("largest", "laid"), [(4, True), (5, False)])
def test_a_table_has_at_most_twice_as_many_places_as_columns(largest: int, laid: bool) -> None:
    """Of four groups: 8 columns in 16 places, and 9 in 20."""
    number = torch.tensor([[0] * largest + [1, 1, 2, 3]])
    groups = Groups.of(number)
    assert (groups.laid is not None) == laid
    scores = torch.randn(2, number.shape[1], generator=torch.Generator().manual_seed(0))
    every = torch.ones_like(scores, dtype=torch.bool)
    assert close(groups.softmax(scores, every), by_loops(scores, every, number))
