"""Chunk's pairs, and what it says of columns and ranges, against its pairs one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful.conformance.tolerances import close
from heedful.core.mask import Causal, Mask
from heedful.core.positions import Pairs, Positions
from heedful.kit.chunks import Chunk
from tests.kernel_calls import Same, a_call, draw, run


def by_hand(rule: Chunk, q: int, k: int) -> bool:
    chunk = range(q // rule.size * rule.size, (q // rule.size + 1) * rule.size)
    before = 1000 if rule.before is None else rule.before
    return chunk[0] - before <= k <= chunk[-1] + rule.after


RULES = [Chunk(1), Chunk(4), Chunk(4, 3, 2), Chunk(5, None), Chunk(3, None, 4), Chunk(7, 0, 1), Chunk(50, 2)]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("pad", [None, torch.tensor([0, 3, 7])], ids=["whole", "padded"])
@pytest.mark.parametrize(("first", "n", "at", "total"), [(0, 20, 0, 20), (11, 9, 0, 20), (11, 9, 6, 14), (8, 3, 6, 14)])
def test_pairs_ranges_and_columns(rule: Chunk, pad: Tensor | None, first: int, n: int, at: int, total: int) -> None:
    q, k = Positions.row(first, n, pad=pad), Positions.row(at, total, pad=pad)
    kept = rule.keeps(Pairs(q, k, 1, slice(0, n), slice(0, total)))
    ranges = rule.key_ranges(q, k)
    assert ranges is not None
    pads = [0] if pad is None else pad.tolist()
    for text, left in enumerate(pads):
        for i in range(n):
            want = [by_hand(rule, first + i - left, at + j - left) for j in range(total)]
            assert kept[text, 0, i].tolist() == want
            told = ranges[text, 0, i].tolist()
            assert [any(lo <= j < hi for lo, hi in told) for j in range(total)] == want
    ((start, stop),) = rule.span(q, k) or ((0, 0),)
    seen = kept.flatten(0, 2).any(0).nonzero().flatten().tolist()
    assert 0 <= start <= seen[0] < seen[-1] + 1 <= stop <= total
    if rule.size == 1 and pad is None:
        assert (start, stop) == (seen[0], seen[-1] + 1)


def test_where_places_are_not_known_it_says_nothing() -> None:
    whole = Positions.row(0, 9)
    loose = Positions(whole.index, whole.position)
    assert Chunk(4).span(loose, whole) is Chunk(4).span(whole, loose) is Chunk(4).key_ranges(whole, loose) is None
    assert Chunk(4).span(Positions(whole.index, whole.position, 0), whole) is None


@pytest.mark.parametrize("backend", ["tiled", "native"])
def test_a_kernel_takes_it(backend: str) -> None:
    shape = (1, 2, 1, 40, 40, 8, 8)
    for rules in ((Chunk(6, 2, 3),), (Causal(), Chunk(6, None))):
        call = a_call(shape, rules)
        assert Mask(rules).key_ranges(call.queries, call.keys, 2).shape[-2] == 1  # type: ignore[union-attr]
        found, want = (run(name, Same(), *draw(shape), call) for name in (backend, "reference"))
        assert close(found, want)
