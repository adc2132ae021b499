"""QAdA: far keys as a Gaussian cloud against the true sum over near ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods.sparse.prefill.qada import QAdA
from tests.test_blocks import PADDED, call_of, grid_of, whole_table


def _share(q: Tensor, keys: Tensor, near: Tensor, far: Tensor) -> float:
    """The predicted share of one query `[d]` on its near keys; `near` and `far [n]` choose among `keys [n d]`."""
    scale = len(q) ** -0.5
    local = math.log(sum(math.exp(float(q @ k) * scale) for k in keys[near]))
    if not far.any():
        return 1.0
    mean = keys[far].mean(0)
    spread = (keys[far] - mean).T @ (keys[far] - mean) / int(far.sum())
    bulk = math.log(int(far.sum())) + scale * float(q @ mean) + scale**2 / 2 * float(q @ spread @ q)
    return 1 / (1 + math.exp(bulk - local))


@pytest.mark.parametrize("text", [None, PADDED], ids=["plain", "padded"])
@pytest.mark.parametrize("shape", [Shape(), Shape(q=9)], ids=["prompt", "chunk"])
def test_the_formula(text: Tensor | None, shape: Shape) -> None:
    bare, method = Bare(shape, text=text), QAdA(0.5, 3, 2, block=4, most=1.0)
    grid = grid_of(bare, 4)
    sinks = torch.arange(grid.open.shape[-1]) * 4 < 2
    near_blocks = (grid.band(3) | sinks) & grid.open
    found = method.shares(grid, near_blocks)
    table = method.choose(grid) & grid.open
    for b, pad in enumerate((0, 0 if text is None else 5)):
        skip = max(0, pad - (19 - shape.q))  # rows of padding
        near = whole_table(near_blocks.expand(2, -1, -1, -1)[b, 0], 4)
        far = whole_table((grid.open & ~near_blocks).expand(2, -1, -1, -1)[b, 0], 4)
        for h in range(4):
            keys = bare.k[b, h // 2, pad:]
            n = len(keys)
            shares = torch.zeros(shape.q - skip)
            for row in range(shape.q - skip):
                sees = torch.arange(n) <= row + skip + (19 - shape.q) - pad
                shares[row] = _share(bare.q[b, h, row + skip], keys, near[row, :n] & sees, far[row, :n])
            assert close(found[b, h].flatten()[: len(shares)], shares, 4096)
            for i in range(-(-len(shares) // 4)):
                local = float(shares[4 * i : 4 * i + 4].mean()) >= 0.5
                blocks = (near_blocks if local else grid.open).expand(2, -1, -1, -1)[b, 0, i]
                assert torch.equal(table[b, h, i], blocks), (b, h, i)


def test_all_or_none_are_local() -> None:
    bare = Bare()
    assert QAdA(1.0, 3, 2, block=4, most=0.99).skip(bare.call.mask, call_of(bare)) is bare.call.mask
    (rule,) = QAdA(0.0, 3, 0, block=4, most=0.99).skip(bare.call.mask, call_of(bare)).blocks
    assert torch.equal(rule.table[0, 0], torch.ones(5, 5).tril().triu(-1).bool())


@pytest.mark.parametrize("settings", [{"share": 1.1}, {"window": 0}, {"sinks": -1}])
def test_wrong_fields_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(FieldError, match=f"QAdA.{next(iter(settings))}"):
        QAdA(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_far_keys_are_taken_for_gaussian(count: int) -> None:
    """log n + mean + half the variance of the scores of the far keys; one key has its score."""
    bare = Bare()
    grid = grid_of(bare, 1)
    far = torch.zeros(1, 1, 19, 19, dtype=torch.bool)
    far[..., 10, 2 : 2 + count] = True
    found = QAdA(block=1).far_mass(grid, far)
    for b in range(2):
        for h in range(4):
            scores = [float(bare.q[b, h, 10] @ bare.k[b, h // 2, j]) / 8**0.5 for j in range(2, 2 + count)]
            mean = sum(scores) / count
            wanted = math.log(count) + mean + sum((s - mean) ** 2 for s in scores) / count / 2
            assert close(found[b, h, 10, 0], torch.tensor(wanted))
