"""A softmax over some columns of each group, in loops."""

from __future__ import annotations

import math

import torch

from heedful.conformance.tolerances import close
from heedful.methods.mechanisms.normalise._grouped import softmax_by_group

SCORES = torch.tensor([[1.0, 2.0, 3.0, -1.0, 0.5, 90.0]], dtype=torch.float64)
AMONG = torch.tensor([[True, True, False, True, True, False]])
NUMBER = torch.tensor([[0, 2, 0, 2, 1, 3]])


def test_each_group_by_itself() -> None:
    wanted = torch.zeros(1, 6, dtype=torch.float64)
    for j in range(6):
        if AMONG[0, j]:
            group = [i for i in range(6) if AMONG[0, i] and NUMBER[0, i] == NUMBER[0, j]]
            wanted[0, j] = 1 / sum(math.exp(float(SCORES[0, i] - SCORES[0, j])) for i in group)
    assert close(softmax_by_group(SCORES, AMONG, NUMBER), wanted)


def test_of_scores_far_apart_and_its_gradient() -> None:
    x = (SCORES * torch.tensor([1.0, 1.0, 1.0, 1.0, -2000.0, 1.0])).requires_grad_()
    found = softmax_by_group(x, AMONG, NUMBER)
    assert found[0, 4] == 1
    found[0, 1].backward()
    assert x.grad is not None
    share = 1 / (1 + math.exp(-3))
    expected = torch.tensor([[0.0, share * (1 - share), 0.0, -share * (1 - share), 0.0, 0.0]], dtype=torch.float64)
    assert close(x.grad, expected)


def test_times_the_shares_of_groups() -> None:
    share = torch.tensor([[0.5, 0.25, 3.0, 7.0]], dtype=torch.float64)
    wanted = softmax_by_group(SCORES, AMONG, NUMBER) * share[0, NUMBER]
    assert close(softmax_by_group(SCORES, AMONG, NUMBER, share), wanted)
