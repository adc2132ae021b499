"""Rules of a mask: pair by pair by loops, alone and joined; ranges, spans, columns and tiles tell the same pairs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from heedful.conformance.tolerances import close
from heedful.core.column_ranges import Ranges
from heedful.core.key_ranges import counts, encode
from heedful.core.mask import (
    Ahead,
    Blocks,
    Both,
    Causal,
    Dense,
    Either,
    First,
    FirstQueries,
    Mask,
    OnHeads,
    Padding,
    Rule,
    Where,
    Window,
)
from heedful.core.positions import Pairs, Positions, spread_heads
from heedful.core.rules import Arranged, Ranged
from heedful.kit.chosen import Shown
from heedful.kit.chunks import Chunk

HEADS, KEYS = 2, 11
Sees = Callable[[int, int, int, int], bool]  # text, head, query and key, counted in the call
Told = tuple[Rule, Sees]


class Laid:
    """Queries, and keys the first of which are gone, of texts with padding before them."""

    def __init__(self, pads: list[int], ahead: int, rows: int, gone: int = 0) -> None:
        self.pads, self.first, self.gone, self.rows, self.texts = pads, gone + ahead, gone, rows, len(pads)
        pad = torch.tensor(pads)
        self.q, self.k = Positions.row(self.first, rows, pad=pad), Positions.row(gone, KEYS, pad=pad)

    def place(self, text: int, query: int, key: int) -> tuple[int, int]:
        return self.first + query - self.pads[text], self.gone + key - self.pads[text]

    def pairs(self, rows: slice = slice(None), cols: slice | Tensor = slice(0, KEYS)) -> Pairs:
        start, stop, _ = rows.indices(self.rows)
        return Pairs(self.q.take(slice(start, stop)), self.k.take(cols), HEADS, slice(start, stop), cols)

    def whole(self, x: Tensor) -> Tensor:
        return x.expand(self.texts, HEADS, self.rows, KEYS)

    def inside(self, ranges: Tensor) -> Tensor:
        """The pairs in some range `[b|1 h|1 q n 2]` of their query."""
        start, stop = spread_heads(ranges, HEADS)[..., None, :].unbind(-1)
        key = torch.arange(KEYS)
        return self.whole(((key >= start) & (key < stop)).any(-2))

    def wanted(self, sees: Sees) -> Tensor:
        texts, heads, rows, keys = self.texts, HEADS, self.rows, KEYS
        flat = [sees(b, h, i, j) for b in range(texts) for h in range(heads) for i in range(rows) for j in range(keys)]
        return torch.tensor(flat).view(texts, heads, rows, keys)


def by_places(laid: Laid, rule: Rule, sees: Callable[[int, int], bool]) -> Told:
    return rule, lambda b, h, i, j: sees(*laid.place(b, i, j))


def by_table(laid: Laid, how: str, seed: int, share: float) -> Told:
    """A rule that is told of every pair, of each head and text its own."""
    draw = torch.Generator().manual_seed(seed)
    keep = torch.rand(laid.texts, HEADS, laid.rows, KEYS, generator=draw) < share
    if how in ("text", "one piece"):  # nothing is said of the last
        text = torch.cat([keep[:, 0, 0, : laid.gone], keep[:, 0, 0]], -1)[:, : laid.gone + KEYS - 1]
        if how == "one piece":
            start, stop = torch.randint(0, text.shape[1] + 2, (2, laid.texts, 1), generator=draw)
            text = (torch.arange(text.shape[1]) >= start) & (torch.arange(text.shape[1]) < stop)
        return Padding(text), lambda b, h, i, j: j < KEYS - 1 and bool(text[b, laid.gone + j])
    if how == "blocks":
        size, first = 1 + seed % 3, None if seed > 3 else torch.randint(0, 3, (laid.texts, 2), generator=draw)
        at = torch.zeros(laid.texts, 2, dtype=torch.long) if first is None else first
        table = keep[:1] if seed % 2 else keep[:, :1]
        return Blocks(table, size, first), lambda b, h, i, j: bool(
            table.expand_as(keep)[b, h, max(0, i - int(at[b, 0])) // size, max(0, j - int(at[b, 1])) // size]
        )
    if how == "shown":
        shown = keep[:, :, 0]
        return Shown(shown), lambda b, h, i, j: bool(shown[b, h, j])
    if how == "row":
        return Dense(keep[:, :, :1]), lambda b, h, i, j: bool(keep[b, h, 0, j])
    if how == "dense":
        return Dense(keep), lambda b, h, i, j: bool(keep[b, h, i, j])
    ranges = encode(lambda start, stop: keep[:, :, start:stop], laid.rows)
    assert ranges is not None
    if how == "ranged":
        return Ranged(ranges.int()), lambda b, h, i, j: bool(keep[b, h, i, j])
    place = torch.stack([torch.randperm(KEYS, generator=draw) for _ in range(HEADS)])[None]
    return Arranged(ranges.int(), place.int()), lambda b, h, i, j: bool(keep[b, h, i, place[0, h, j]])


def one(laid: Laid) -> st.SearchStrategy[Told]:
    """A rule, and by loops what it keeps."""
    some = st.integers(0, 6)
    several = some.map(lambda n: n + 1)
    causal = by_places(laid, Causal(), lambda q, k: k <= q)
    return st.one_of(
        st.just(causal),
        several.map(lambda n: by_places(laid, Window(n), lambda q, k: q - k < n)),
        several.map(lambda n: by_places(laid, Ahead(n), lambda q, k: k - q < n)),
        some.map(lambda n: by_places(laid, First(n), lambda q, k: k < n)),
        some.map(lambda n: by_places(laid, FirstQueries(n), lambda q, k: q < n)),
        several.map(lambda n: by_places(laid, Where(lambda q, k: (q + k) % n == 0), lambda q, k: (q + k) % n == 0)),
        st.tuples(several, st.none() | some, some).map(
            lambda x: by_places(
                laid,
                Chunk(*x),
                lambda q, k: (x[1] is None or k >= q // x[0] * x[0] - x[1]) and k < q // x[0] * x[0] + x[0] + x[2],
            )
        ),
        st.tuples(
            st.sampled_from(["text", "one piece", "shown", "row", "dense", "ranged", "arranged", "blocks"]),
            some,
            st.sampled_from([0.2, 0.7]),
        ).map(lambda x: by_table(laid, *x)),
    )


def joined(laid: Laid, rules: st.SearchStrategy[Told]) -> st.SearchStrategy[Told]:
    def on(told: Told, heads: tuple[int, ...]) -> Told:
        return told[0].on(heads, HEADS), lambda b, h, i, j: h not in heads or told[1](b, h, i, j)

    return st.one_of(
        st.tuples(rules, rules).map(
            lambda x: (x[0][0] | x[1][0], lambda b, h, i, j: x[0][1](b, h, i, j) or x[1][1](b, h, i, j))
        ),
        st.tuples(rules, rules).map(
            lambda x: (x[0][0] & x[1][0], lambda b, h, i, j: x[0][1](b, h, i, j) and x[1][1](b, h, i, j))
        ),
        st.tuples(rules, st.sampled_from([(0,), (1,), (0, 1)])).map(lambda x: on(*x)),
    )


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Laid, Rule, Tensor]:
    pads, ahead, rows = st.lists(st.integers(0, 4), min_size=1, max_size=2), st.integers(0, 5), st.integers(1, 6)
    laid = Laid(draw(pads), draw(ahead), draw(rows), draw(st.sampled_from([0, 3])))
    rule, sees = draw(st.recursive(one(laid), lambda rules: joined(laid, rules), max_leaves=3))
    return laid, rule, laid.wanted(sees)


def columns(told: Ranges) -> set[int]:
    return {i for lo, hi in told for i in range(max(lo, 0), min(hi, KEYS))}


@settings(max_examples=300)
@given(drawn())
def test_ranges_spans_columns_and_tiles_tell_the_pairs_of_the_loops(told: tuple[Laid, Rule, Tensor]) -> None:
    laid, rule, want = told
    found = laid.whole(rule.keeps(laid.pairs()))
    assert torch.equal(found, want)
    ranges = rule.key_ranges(laid.q, laid.k)
    if ranges is not None and not rule.scattered:
        assert torch.equal(laid.inside(ranges), want)
    seen = set(want.flatten(0, -2).any(0).nonzero().flatten().tolist())
    for told_of in (rule.span(laid.q, laid.k), Mask((rule,)).columns(laid.q, laid.k, slice(0, laid.rows))):
        assert told_of is None or seen <= columns(told_of)
    if rule.idle(laid.q, laid.k):
        assert bool(want.all())
    if isinstance(rule, Blocks):
        for some in (slice(0, laid.rows), slice(0, 1), slice(laid.rows - 1, laid.rows)):
            assert columns(rule.columns(some)) == {j for j in range(KEYS) if bool(want[:, :, some, j].any())}
    rows = slice(laid.rows // 3, max(1, laid.rows - 1))
    for cols in (slice(2, 7), slice(None, 5), torch.tensor([0, 3, 4, 9])):
        pairs = laid.pairs(rows, cols)
        tile = rule.keeps(pairs).expand(laid.texts, HEADS, len(pairs.queries), len(pairs.keys))
        assert torch.equal(tile, want[:, :, pairs.rows][..., cols])


@settings(max_examples=100)
@given(st.data())
def test_a_masks_ranges_are_what_all_of_its_rules_keep(data: st.DataObject) -> None:
    laid = Laid([0, 2], 4, 5, data.draw(st.sampled_from([0, 3])))
    told = data.draw(st.lists(one(laid).filter(lambda told: not isinstance(told[0], Blocks)), max_size=3))
    mask, want = Mask(tuple(rule for rule, _ in told)), laid.wanted(lambda *at: all(sees(*at) for _, sees in told))
    kept = mask.keeps(laid.pairs())
    assert torch.equal(want, torch.ones_like(want) if kept is None else laid.whole(kept))
    ranges = mask.key_ranges(laid.q, laid.k, HEADS)
    assume(ranges is not None)
    assert ranges is not None
    assert torch.equal(laid.inside(ranges), want)


@pytest.mark.parametrize("join", [Either, Both])
def test_what_one_rule_does_not_know_the_other_may_tell(join: Callable[[Rule, Rule], Rule]) -> None:
    laid, unknown, known = Laid([0], 4, 3), Where(lambda q, k: q >= k), Window(2)
    assert unknown.span(laid.q, laid.k) is unknown.key_ranges(laid.q, laid.k) is None
    for rule in (join(unknown, known), join(known, unknown)):
        assert rule.span(laid.q, laid.k) == (None if join is Either else known.span(laid.q, laid.k))
        assert rule.key_ranges(laid.q, laid.k) is None
    both = join(known, Ahead(2))
    assert both.key_ranges(laid.q, laid.k) is not None
    assert both.span(laid.q, laid.k) == (((0, 11),) if join is Either else ((3, 8),))


def test_where_keys_lie_apart_by_nature_nobody_looks_for_ranges() -> None:
    table = torch.ones(1, 1, 3, KEYS, dtype=torch.bool)
    apart, near = Dense(table, apart=True), Dense(table)
    for rule in (apart, apart | Causal(), Causal() | apart, Causal() & apart, apart & Causal(), apart.on((0,), HEADS)):
        assert rule.scattered
    for rule in (near, near | Causal(), near & Causal(), near.on((0,), HEADS)):
        assert not rule.scattered
    laid = Laid([0], 0, 3)
    assert Mask((Causal(), apart)).key_ranges(laid.q, laid.k, HEADS) is None
    assert Mask((Causal(), near)).key_ranges(laid.q, laid.k, HEADS) is not None


def test_blocks_lie_beside_what_a_masks_ranges_say() -> None:
    laid = Laid([0], 0, 5)
    mask = Mask((Causal(), Blocks(torch.zeros(1, 1, 2, 3, dtype=torch.bool), 4)))
    ranges = mask.key_ranges(laid.q, laid.k, HEADS)
    assert ranges is not None
    assert ranges[0, 0, :, 0].tolist() == [[0, i + 1] for i in range(5)]
    assert type(Causal().on((0,), HEADS)) is OnHeads


def test_what_a_mask_says_of_itself() -> None:
    laid, text = Laid([0], 5, 1), Padding(torch.ones(1, KEYS, dtype=torch.bool))
    for rules, causal, only, plain in (
        ((), False, False, True),
        ((Causal(),), True, True, True),
        ((Causal(), text), True, False, True),
        ((text,), False, False, True),
        ((Window(2), Causal()), True, False, False),
        ((Window(2),), False, False, False),
    ):
        mask = Mask(rules)
        assert (mask.causal, mask.only_causal, mask.plain) == (causal, only, plain)
        assert mask.padding is (text if text in rules else None)
        assert mask.idle(laid.q, laid.k) is (not rules)
    behind = Positions(laid.k.index, laid.k.index, None, last=KEYS - 1)
    for first, idle in ((KEYS - 2, False), (KEYS - 1, True), (KEYS, True)):
        query = Positions.row(first, 1)
        assert Mask((Causal(),)).idle(query, behind) is idle
        assert not Causal().idle(Positions(query.index, query.index), behind)
        assert (Mask((Causal(), text)).acting(query, behind) == [text]) is idle


def test_the_last_places_of_a_row_are_those_that_hold_a_key() -> None:
    index, filled = torch.arange(KEYS).view(1, 1, KEYS), torch.tensor([[3, KEYS]])
    k = Positions(index, index, 0, (0, 0), index >= KEYS - filled[..., None], filled=filled)
    for rules, stop in (((), KEYS), ((Causal(),), 10)):
        ranges = Mask(rules).key_ranges(Positions.row(9, 1), k, 4)
        assert ranges is not None
        assert ranges.expand(1, 4, -1, -1, -1)[0, :, 0, 0].tolist() == [[8, stop], [8, stop], [0, stop], [0, stop]]


def test_tables_of_blocks_are_one_where_they_begin_at_the_same_places() -> None:
    """Of unlike sizes, for all heads or for each; behind the shorter of two nothing is said."""
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.rand(1, h, 12 // s, 12 // s, generator=draw) < 0.6 for h, s in ((1, 4), (HEADS, 6)))
    at, elsewhere = torch.tensor([[1, 2]]), torch.tensor([[1, 3]])
    for first in (None, at):
        (found,) = Mask((Blocks(one, 4, first), Causal(), Blocks(other, 6, first))).blocks
        assert (found.size, found.first) == (2, first)
        rows, cols = torch.arange(12)[:, None], torch.arange(12)
        want = one[..., rows // 4, cols // 4] & other[..., rows // 6, cols // 6]
        assert torch.equal(found.table, want[..., ::2, ::2])
    longer = Mask((Blocks(one, 4), Blocks(torch.ones(1, 1, 2, 5, dtype=torch.bool), 4))).blocks[0]
    assert torch.equal(longer.table, one[..., :2, :])
    for a, b in ((None, at), (at, None), (at, elsewhere)):
        apart = Mask((Blocks(one, 4, a), Blocks(other, 6, b), Blocks(other, 6, b))).blocks
        assert [x.size for x in apart] == [4, 6]
        assert Blocks(one, 4, a).joined(Blocks(other, 6, b)) is None


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(0, 8), st.integers(1, 4), st.sampled_from([0, 3]))
def test_a_plain_texts_span_is_from_the_first_key_seen_to_the_last(n: int, ahead: int, rows: int, gone: int) -> None:
    laid = Laid([0], ahead, rows, gone)
    index = laid.q.index
    for rule in (Causal(), Window(n), Ahead(n), First(n), FirstQueries(n)):
        seen = laid.whole(rule.keeps(laid.pairs())).flatten(0, -2).any(0).nonzero().flatten().tolist()
        told = rule.span(laid.q, laid.k)
        assert told is not None
        assert columns(told) == (set(range(seen[0], seen[-1] + 1)) if seen else set())
        unknown = [rule.span(Positions(index, index), laid.k), rule.span(laid.q, Positions(laid.k.index, laid.k.index))]
        assert None in unknown
        assert rule.span(Positions(index, index), Positions(laid.k.index, laid.k.index)) is None
    for placed in (Window(n), Ahead(n), First(n), Chunk(n)):  # positions may begin anew
        assert placed.key_ranges(laid.q, Positions(laid.k.index, laid.k.index, gone)) is None
        assert placed.key_ranges(laid.q, laid.k) is not None


def test_a_text_in_one_piece_is_one_range() -> None:
    laid, inside = Laid([0], 0, 2), torch.arange(KEYS)
    text = torch.stack([(inside >= a) & (inside < b) for a, b in ((0, KEYS), (3, KEYS), (2, 5), (4, 4))])
    ranges = Padding(text).key_ranges(laid.q, laid.k)
    assert ranges is not None
    assert ranges[:, 0, 1, 0].tolist() == [[0, KEYS], [3, KEYS], [2, 5], [0, 0]]
    text[2, 9] = True
    assert Padding(text).key_ranges(laid.q, laid.k) is None


def test_how_much_the_queries_that_see_a_key_weigh() -> None:
    draw = torch.Generator().manual_seed(0)
    keep = torch.rand(2, HEADS, 5, KEYS, generator=draw) < 0.5
    ranges = encode(lambda start, stop: keep[:, :, start:stop], 5)
    assert ranges is not None
    weight = torch.rand(2, HEADS, 5, generator=draw)
    found = counts(ranges, weight[..., None].expand(ranges.shape[:-1]), KEYS)
    assert close(found, (keep * weight[..., None]).sum(2))
