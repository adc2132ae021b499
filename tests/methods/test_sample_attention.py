"""SampleAttention: key blocks that a sample of rows looks at, and a window that grows with the text."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Bare, Shape
from heedful.core.errors import FieldError
from heedful.methods.sparse.prefill.sample_attention import SampleAttention
from tests.test_blocks import TEXTS, bare_of, call_of, true_map


def _by_loops(weights: Tensor, ahead: int, alpha: float, step: int, window: float) -> Tensor:
    """The table of one head from its true map `[q k]`, for blocks of 4."""
    q, k = weights.shape
    received = weights[::step].sum(0)
    blocks = {j: float(received[4 * j : 4 * j + 4].sum()) for j in range(-(-k // 4))}
    stripes, total = set(), 0.0
    for j in sorted(blocks, key=lambda j: -blocks[j]):
        if total < alpha * sum(blocks.values()):
            stripes.add(j)
        total += blocks[j]
    width = max(1, math.ceil(window * k))
    table = torch.zeros(-(-q // 4), len(blocks), dtype=torch.bool)
    for i in range(len(table)):
        for row in range(4 * i, 4 * i + 4):
            for col in range(max(0, row + ahead - width + 1), min(k, row + ahead + 1)):
                table[i, col // 4] = True
        for j in stripes:
            table[i, j] |= 4 * j <= 4 * i + 3 + ahead
    return table


@pytest.mark.parametrize(("alpha", "rows", "window"), [(0.5, 0.25, 0.0), (0.3, 1.0, 0.3), (0.8, 0.1, 0.2)])
@TEXTS
def test_the_rule(alpha: float, rows: float, window: float, text: Tensor | None) -> None:
    bare = bare_of(text)
    (rule,) = SampleAttention(alpha, rows, window, block=4, most=1.0).skip(bare.call.mask, call_of(bare)).blocks
    for b, pad in enumerate((0, 0 if text is None else 5)):
        for h, weights in enumerate(true_map(bare, b)):
            wanted = _by_loops(weights[pad:, pad:], 0, alpha, round(1 / rows), window)
            n = len(wanted)
            assert torch.equal(rule.table[b, h, :n, :n], wanted), (b, h)


def test_a_later_call_sees_the_cache() -> None:
    bare = Bare(Shape(b=1, q=8, k=24))
    (rule,) = SampleAttention(0.4, 0.5, 0.4, block=4, most=1.0).skip(bare.call.mask, call_of(bare)).blocks
    for h, weights in enumerate(true_map(bare, 0)):
        assert torch.equal(rule.table[0, h], _by_loops(weights, 16, 0.4, 2, 0.4)), h


@pytest.mark.parametrize("settings", [{"mass": 0.0}, {"rows": 0.0}, {"window": -0.1}])
def test_wrong_fields_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(FieldError, match=f"SampleAttention.{next(iter(settings))}"):
        SampleAttention(**settings)
