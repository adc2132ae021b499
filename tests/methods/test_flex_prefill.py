"""FlexPrefill: vertical and slash blocks by the last queries, block means where they predict these well."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.blocks import cover, means
from heedful.core.errors import FieldError
from heedful.core.mask import Mask
from heedful.methods.sparse.flex_prefill import FlexPrefill
from tests.test_blocks import TEXTS, bare_of, call_of, grid_of, true_map


def _fewest(weight: list[float], share: float) -> int:
    total, count = 0.0, 0
    for x in sorted(weight, reverse=True):
        if total >= share * sum(weight):
            break
        total, count = total + x, count + 1
    return count


def _vertical_slash(rows: Tensor, size: int, gamma: float, least: int) -> Tensor:
    """The table of one head from the true weights `[size n]` of its last rows."""
    n = rows.shape[1]
    m = -(-n // size)
    own = range(n - size, n)
    vertical = [float(rows[:, c].mean()) for c in range(n)]
    slash = [sum(float(rows[i, r - t]) for i, r in enumerate(own) if r >= t) / size for t in range(n)]
    table = torch.zeros(m, m, dtype=torch.bool)
    for scores, diagonal in ((vertical, False), (slash, True)):
        count = max(_fewest(scores, gamma) // size + 1, -(-least // size))
        blocks = [sum(scores[j * size : (j + 1) * size]) for j in range(m)]
        for j in sorted(range(m), key=lambda j: (j != 0, -blocks[j]))[:count]:
            for i in range(m):
                if not diagonal and j <= i:
                    table[i, j] = True
                elif diagonal and j <= i:
                    table[i, i - j] = True
    return table


@pytest.mark.parametrize(("gamma", "least"), [(0.3, 0), (0.7, 0), (0.3, 12)])
@TEXTS
def test_vertical_and_slash(gamma: float, least: int, text: Tensor | None) -> None:
    bare = bare_of(text)
    method = FlexPrefill(gamma, 0.0, least, size=4, most=1.0)
    (rule,) = method.skip(bare.call.mask, call_of(bare)).blocks
    for b, pad in enumerate((0, 0 if text is None else 5)):
        for h, rows in enumerate(true_map(bare, b)):
            wanted = _vertical_slash(rows[-4:, pad:], 4, gamma, least)
            n = len(wanted)
            assert torch.equal(rule.table[b, h, :n, :n] & torch.ones(n, n).tril().bool(), wanted), (b, h)


def test_a_later_call_has_its_slashes_where_its_own_keys_are() -> None:
    bare = Bare(Shape(b=1, q=8, k=24))
    (rule,) = FlexPrefill(0.3, 0.0, 0, size=4, most=1.0).skip(bare.call.mask, call_of(bare)).blocks
    for h, rows in enumerate(true_map(bare, 0)):
        assert torch.equal(rule.table[0, h], _vertical_slash(rows[-4:], 4, 0.3, 0)[4:]), h


def test_heads_that_block_means_predict_go_by_them() -> None:
    bare = Bare()
    for x in (bare.q, bare.k):
        x[:, :2] = x[:, :2, ::4].repeat_interleave(4, 2)[:, :, :19]  # tokens of a block are one and the same
    bare.k[:, 1] = torch.randn(bare.k[:, 1].shape, generator=torch.Generator().manual_seed(3)) * 3
    grid = grid_of(bare, 4)
    at = grid.length[:, None] - 4 + torch.arange(4)
    ((weights, _),) = grid.weights(at, 4)
    blocks = weights.mean(2).sum(-1)
    estimate = FlexPrefill.estimate(grid, at)
    found = FlexPrefill.divergence(blocks, estimate)
    for b in range(2):
        for h in range(4):
            p, q = blocks[b, h].tolist(), estimate[b, h].tolist()
            wanted = sum(
                (x * math.log(2 * x / (x + y)) if x else 0) / 2 + (y * math.log(2 * y / (x + y)) if y else 0) / 2
                for x, y in zip(p, q, strict=True)
            )
            assert float(found[b, h]) == pytest.approx(wanted, abs=1e-6)
    tau = float(found.flatten().sort().values[3:5].mean().sqrt())
    by_shape = FlexPrefill(0.5, 0.0, 0, size=4).choose(grid)
    by_means = FlexPrefill(0.5, tau, 0, size=4).choose(grid)
    assert by_shape is not None
    assert by_means is not None
    moved = (by_shape != by_means).flatten(2).any(-1)
    trusted = found.sqrt() < tau
    assert torch.equal(moved | trusted, trusted)
    assert moved.any()
    pooled = grid.pooled(means(grid.query, grid.rows), means(grid.key, grid.cols))
    best = cover(pooled.flatten(-2), 0.5).view_as(pooled)
    assert not (best & ~by_means)[trusted].any()


def test_short_texts_and_maps_that_are_not_causal_stay_dense() -> None:
    bare = Bare()
    assert FlexPrefill(0.3, size=4, most=0.99).skip(bare.call.mask, call_of(bare)) is bare.call.mask
    assert FlexPrefill(0.3, 0.1, 0, size=10, most=0.99).skip(bare.call.mask, call_of(bare)) is bare.call.mask
    everything = Mask()
    assert FlexPrefill.example().skip(everything, call_of(bare)) is everything


def test_distances_are_counted_behind_the_row() -> None:
    weights = torch.tensor([[0.1, 0.2, 0.7, 0.0], [0.4, 0.3, 0.2, 0.1]])[None, None]
    found = FlexPrefill.by_distance(weights, torch.tensor([[2, 3]]))
    assert close(found, torch.tensor([[[0.4, 0.2, 0.2, 0.2]]]))
    weights = torch.rand(2, 3, 5, 12, generator=torch.Generator().manual_seed(0))
    own = torch.tensor([[7], [-2]]) + torch.arange(5)
    weights.masked_fill_(torch.arange(12) > own[:, None, :, None], 0)
    found = FlexPrefill.by_distance(weights, own)
    for text, first in enumerate((7, -2)):
        for t in range(12):
            wanted = sum(weights[text, :, i, first + i - t] for i in range(5) if first + i - t >= 0) / 5
            assert close(found[text, :, t], torch.as_tensor(wanted).expand(3)), (text, t)


@pytest.mark.parametrize("settings", [{"gamma": 0.0}, {"tau": 1.1}, {"least": -1}])
def test_wrong_fields_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(FieldError, match=f"FlexPrefill.{next(iter(settings))}"):
        FlexPrefill(**settings)  # type: ignore[arg-type]
