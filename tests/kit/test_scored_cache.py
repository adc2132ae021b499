"""What a cache with scores keeps: the best, and what must stay."""

from __future__ import annotations

import math

import pytest
from torch import Tensor

from heedful.conformance.bare import Bare, Shape
from heedful.core.call import CachedKV, Call
from heedful.core.errors import FieldError
from heedful.core.positions import Positions
from heedful.core.sites import Site, at
from heedful.kit.scored_cache import ScoredCache
from tests.samples import PAPER


class Late(ScoredCache):
    """Later entries are better; the first two stay in any case."""

    paper = PAPER

    @at(Site.CACHE)
    def choose(self, entries: CachedKV, call: Call) -> Tensor:
        return self.best(scores(entries), entries, call, entries.positions.index < 2)


def scores(entries: CachedKV) -> Tensor:
    return entries.positions.index.float().expand(entries.key.shape[:3])


def given(n: int) -> tuple[CachedKV, Call]:
    bare = Bare(Shape(b=1, q=n, k=n))
    return CachedKV(bare.k, bare.v, Positions.row(0, n), n), bare.call


@pytest.mark.parametrize(("budget", "count"), [(4, 4), (0.5, 5), (0.25, 3), (1.0, 10), (20, 10), (2, 2)])
def test_the_best_stay_beside_what_must(budget: float, count: int) -> None:
    entries, call = given(10)
    kept = Late(budget).choose(entries, call)
    want = sorted([0, 1, *range(9, 1, -1)][:count])
    assert kept.shape == entries.key.shape[:3]
    assert [row.nonzero().flatten().tolist() for row in kept[0]] == [want] * 2
    alone = Late(budget).best(scores(entries), entries, call)
    assert [row.nonzero().flatten().tolist() for row in alone[0]] == [list(range(10 - count, 10))] * 2


def test_budgets_of_all_kinds() -> None:
    assert Late.neutral().budget == 1.0
    assert Late.example().budget == 0.25
    assert Late().budget == 0.5
    assert not Late.chunk_invariant
    assert Late(4).declares(3) == {"kept": 3}
    assert Late(4).declares(9) == {"kept": 4}
    assert Late(0.3).declares(9) == {"kept": math.ceil(0.3 * 9)}
    assert Late(0.5).most(given(7)[1]).tolist() == [[[4]]]
    assert Late(4).rests(5) is None
    assert Late(4).rests(4) == "there is room for 4 tokens, and the text has 4: budget=0.5 would act"
    assert Late(0.5).rests(7) is None
    assert Late(1.0).rests(7) == "there is room for 7 tokens, and the text has 7: budget=0.5 would act"
    with pytest.raises(FieldError, match="budget = 0"):
        Late(0)
