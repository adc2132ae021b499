"""Grids and compensated rounding, against loops over single numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful.conformance.tolerances import close
from heedful.kit.rounding import Rounding, compensated, damped, inverse_root


def weights(rows: int = 3, columns: int = 5) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64)


def nearest(x: float, values: list[float]) -> float:
    return min(values, key=lambda v: abs(v - x))


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_largest_magnitude_is_the_highest_value(bits: int) -> None:
    x = weights()
    found = Rounding.absmax(x, bits).of(x)
    for row, got in zip(x.tolist(), found.tolist(), strict=True):
        step = max(map(abs, row)) / (2 ** (bits - 1) - 1)
        values = [step * code for code in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]
        for number, rounded in zip(row, got, strict=True):
            assert math.isclose(rounded, nearest(number, values), abs_tol=1e-12)
    grid = Rounding.absmax(torch.tensor([[3.0, -1.0]]), 3)
    assert grid.codes(torch.tensor([[9.0, -9.0]])).tolist() == [[3.0, -4.0]]  # and beyond it is cut off


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_from_the_lowest_to_the_highest_with_zero_among_them(bits: int) -> None:
    x = torch.cat([weights(), weights(1).abs() + 1, -weights(1).abs() - 1])
    grid = Rounding.minmax(x, bits)
    found = grid.of(x)
    for row, got in zip(x.tolist(), found.tolist(), strict=True):
        low, high = min(0.0, *row), max(0.0, *row)
        step = (high - low) / (2**bits - 1)
        zero = round(-low / step)
        values = [step * (code - zero) for code in range(2**bits)]
        for number, rounded in zip(row, got, strict=True):
            assert math.isclose(rounded, nearest(number, values), abs_tol=1e-12)
    assert torch.equal(grid.of(torch.zeros_like(x)), torch.zeros_like(x))


def test_a_row_of_zeros_stays() -> None:
    x = torch.zeros(2, 3)
    for grid in (Rounding.absmax(x, 4), Rounding.minmax(x, 4)):
        assert grid.step.tolist() == [[1.0], [1.0]]
        assert torch.equal(grid.of(x), x)


def test_the_searched_step_is_the_best_of_eighty() -> None:
    x = weights(4, 9)
    grid = Rounding.absmax(x, 3)
    found = grid.searched(x, lambda e: e.square().sum(-1, keepdim=True))
    assert (found.low, found.high) == (-4, 3)
    for r, row in enumerate(x.tolist()):
        whole = max(map(abs, row)) / 3
        losses = {}
        for i in range(80):
            step = whole * (1 - i / 100)
            losses[i] = sum((number - step * max(-4, min(3, round(number / step)))) ** 2 for number in row)
        best = min(losses, key=lambda i: losses[i])
        assert math.isclose(found.step[r].item(), whole * (1 - best / 100), rel_tol=1e-9)
    assert (found.step < grid.step).any()
    assert torch.equal(grid.searched(x, lambda e: e[:, :1] * 0).step, grid.step)  # of equals the largest
    last = grid.searched(x, lambda e: -(e.abs() > 0).any(-1, keepdim=True).double() * (e.abs().amax(-1, keepdim=True)))
    assert close(last.step, grid.step * 0.21)


def test_damping_is_of_the_mean_diagonal_and_dead_inputs_count_alone() -> None:
    hessian = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    mean = (4 + 2 + 1) / 3
    wanted = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert close(damped(hessian), wanted + 0.01 * mean * torch.eye(3, dtype=torch.float64))
    assert close(damped(torch.stack([hessian, 2 * hessian]))[0], damped(hessian))


def spread(columns: int = 5) -> Tensor:
    inputs = torch.randn(40, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64)
    return inputs.T @ inputs


def test_the_root_is_of_the_inverse() -> None:
    hessian = torch.stack([damped(spread()), damped(spread())])
    root = inverse_root(hessian)
    assert torch.equal(root, root.triu())
    assert close(root.mT @ root @ hessian, torch.eye(5, dtype=torch.float64).expand(2, 5, 5))


def test_columns_make_up_for_those_before_them() -> None:
    """Each column is rounded; the later ones then take the values that make the loss least, given those before."""
    x, hessian = weights(), damped(spread())
    grid = Rounding.absmax(x, 3)
    found = compensated(x, inverse_root(hessian), grid)
    for r in range(3):
        wanted, rest = torch.zeros(5, dtype=torch.float64), x[r].clone()
        for i in range(5):
            wanted[i] = grid.step[r] * (rest[i] / grid.step[r]).round().clamp(-4, 3)
            error = wanted[: i + 1] - x[r, : i + 1]
            later = hessian[i + 1 :, i + 1 :]
            # the least of e H e' over what the later errors may be
            rest[i + 1 :] = x[r, i + 1 :] - torch.linalg.solve(later, hessian[i + 1 :, : i + 1] @ error)
        assert close(found[r], wanted)
    plain = grid.of(x)

    def loss(y: Tensor) -> float:
        return float(((y - x) @ hessian @ (y - x).T).trace())

    assert loss(found) < loss(plain)
    assert close(compensated(x, inverse_root(torch.eye(5, dtype=torch.float64)), grid), plain)
    both = compensated(torch.stack([x, x]), inverse_root(torch.stack([hessian, hessian])), Rounding.absmax(x, 3))
    assert torch.equal(both[0], both[1])
    assert close(both[0], found)


def test_columns_make_up_for_what_the_inputs_lack() -> None:
    """Inputs were x + d and are x: what a column no longer says, the later ones are to say."""
    x, inputs = weights(400), torch.randn(40, 5, dtype=torch.float64)
    lacks = torch.randn(40, 5, dtype=torch.float64) / 20
    hessian, cross = damped(inputs.T @ inputs), lacks.T @ inputs
    root = inverse_root(hessian)
    drift = (cross @ root.T).triu(1) @ root
    fine = Rounding(
        torch.full((400, 1), 2.0**-48, dtype=torch.float64), torch.zeros(400, 1, dtype=torch.float64), -(2**52), 2**52
    )
    found = compensated(x, root, fine, drift)
    target = x @ (inputs + lacks).T
    before = (x @ inputs.T - target).square().sum()
    after = (found @ inputs.T - target).square().sum()
    assert after < before  # of many rows together
    for r in range(3):
        rest = x[r].clone()
        for i in range(5):
            for j in range(i, 5):  # the drift of a column reaches itself by nothing, and those after it
                rest[j] += (
                    0 if j == i else rest[i] * sum((cross[i] @ root[m]) * root[m, j] for m in range(i + 1, j + 1))
                )
        assert close(found[r], rest)
