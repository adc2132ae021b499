"""FlexPrefill: vertical and slash blocks by the last queries, block means where they predict these well."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.mask import Mask
from heedful.methods.sparse.prefill.flex_prefill import FlexPrefill
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
    method = FlexPrefill(gamma, 0.0, least, block=4, most=1.0)
    (rule,) = method.skip(bare.call.mask, call_of(bare)).blocks
    for b, pad in enumerate((0, 0 if text is None else 5)):
        for h, rows in enumerate(true_map(bare, b)):
            wanted = _vertical_slash(rows[-4:, pad:], 4, gamma, least)
            n = len(wanted)
            assert torch.equal(rule.table[b, h, :n, :n] & torch.ones(n, n).tril().bool(), wanted), (b, h)


def test_a_later_call_has_its_slashes_where_its_own_keys_are() -> None:
    bare = Bare(Shape(b=1, q=8, k=24))
    (rule,) = FlexPrefill(0.7, 0.0, 0, block=4, most=1.0).skip(bare.call.mask, call_of(bare)).blocks
    for h, rows in enumerate(true_map(bare, 0)):
        seen = torch.ones(6, 6).tril().bool()[4:]
        assert torch.equal(rule.table[0, h] & seen, _vertical_slash(rows[-4:], 4, 0.7, 0)[4:]), h


def test_block_means_are_asked_by_all_rows_of_a_call_of_one_block() -> None:
    bare = Bare(Shape(b=1, q=4, k=24))
    told = FlexPrefill.estimate(grid_of(bare, 4), torch.arange(4)[None])
    for h in range(4):
        last, keys = bare.q[0, h].mean(0), _means(bare.k[0, h // 2], 4)
        assert close(told[0, h], torch.stack([last @ y / len(last) ** 0.5 for y in keys]).softmax(0))


def _means(x: Tensor, size: int) -> list[Tensor]:
    return [x[j : j + size].mean(0) for j in range(0, len(x), size)]


def _apart(rows: Tensor, q: Tensor, k: Tensor, size: int) -> float:
    """Root of the Jensen-Shannon divergence of the last rows' weight by blocks and of what block means say."""
    p = [float(rows[:, j : j + size].sum()) for j in range(0, rows.shape[1], size)]
    p = [x / sum(p) for x in p]
    last = q[-size:].mean(0)
    e = torch.stack([last @ y / q.shape[-1] ** 0.5 for y in _means(k, size)]).softmax(0).tolist()
    told = sum(x * math.log(2 * x / (x + y)) + y * math.log(2 * y / (x + y)) for x, y in zip(p, e, strict=True))
    return (told / 2) ** 0.5


def _by_means(q: Tensor, k: Tensor, size: int, gamma: float) -> Tensor:
    """The fewest blocks of the map of block means, over all of its rows at once, that reach gamma of it."""
    m = -(-len(q) // size)
    weight: dict[tuple[int, int], float] = {}
    for i, x in enumerate(_means(q, size)):
        row = torch.stack([x @ y / q.shape[-1] ** 0.5 for y in _means(k, size)[: i + 1]]).softmax(0)
        weight |= {(i, j): float(w) for j, w in enumerate(row)}
    table, total = torch.zeros(m, m, dtype=torch.bool), 0.0
    for at in sorted(weight, key=lambda at: -weight[at]):
        if total >= gamma * m:
            break
        table[at], total = True, total + weight[at]
    return table


@pytest.mark.parametrize("least", [0, 8])
@pytest.mark.parametrize("padded", [False, True])
def test_heads_that_block_means_predict_go_by_them(padded: bool, least: int) -> None:
    size, gamma, n = 4, 0.6, 19
    bare = bare_of(torch.arange(n)[None] >= torch.tensor([[0], [5]]) if padded else None)
    for x in (bare.q, bare.k):
        for b, pad in enumerate((0, 5 if padded else 0)):
            for j in range(pad, n, size):  # tokens of a block are nearly one and the same
                x[b, :2, j : j + size] = x[b, :2, j : j + 1] + 0.3 * x[b, :2, j : j + size]
    bare.k[:, 1] = torch.randn(bare.k[:, 1].shape, generator=torch.Generator().manual_seed(3)) * 3
    parts = {}
    for b, pad in enumerate((0, 5 if padded else 0)):
        for h, rows in enumerate(true_map(bare, b)):
            parts[b, h] = rows[-size:, pad:], bare.q[b, h, pad:], bare.k[b, h // 2, pad:]
    apart = {at: _apart(*part, size) for at, part in parts.items()}
    low, high = sorted(apart.values())[3:5]
    assert low < 0.9 * high
    method = FlexPrefill(gamma, (low + high) / 2, least, block=size, most=1.0)
    (rule,) = method.skip(bare.call.mask, call_of(bare)).blocks
    for (b, h), (rows, q, k) in parts.items():
        if apart[b, h] < method.tau:  # of vertical and slash only the least is left
            wanted = _vertical_slash(rows, size, 0.0, max(least, 1)) | _by_means(q, k, size, gamma)
        else:
            wanted = _vertical_slash(rows, size, gamma, least)
        m = len(wanted)
        assert torch.equal(rule.table[b, h, :m, :m] & torch.ones(m, m).tril().bool(), wanted), (b, h)


def test_texts_of_two_blocks_and_of_the_least_stay_whole() -> None:
    for tokens, least, whole in ((8, 0, True), (9, 0, False), (12, 12, True), (13, 12, False)):
        bare = Bare(Shape(b=1, q=tokens, k=tokens))
        table = FlexPrefill(0.01, 0.0, least, block=4).choose(grid_of(bare, 4))
        assert table is not None
        assert bool(table.all()) == whole, tokens


def test_short_texts_and_maps_that_are_not_causal_stay_dense() -> None:
    bare = Bare()
    assert FlexPrefill(0.3, block=4, most=0.99).skip(bare.call.mask, call_of(bare)) is bare.call.mask
    assert FlexPrefill(0.3, 0.1, 0, block=10, most=0.99).skip(bare.call.mask, call_of(bare)) is bare.call.mask
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


@pytest.mark.parametrize("settings", [{"mass": 0.0}, {"tau": 1.1}, {"least": -1}])
def test_wrong_fields_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(FieldError, match=f"FlexPrefill.{next(iter(settings))}"):
        FlexPrefill(**settings)  # type: ignore[arg-type]


def test_a_short_text_is_left_whole_and_told_so() -> None:
    told = "there is room for {0} tokens, and the text has {0}: a smaller least, or block, would act"
    for method, most in ((FlexPrefill(least=9, block=4), 9), (FlexPrefill(least=7, block=4), 8)):
        assert method.rests(most) == told.format(most)
        assert method.rests(most + 1) is None
