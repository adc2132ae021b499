"""Masks as ranges of columns: what each rule says by algebra is what its table says pair by pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heedful.core.key_ranges import MOST, encode, intersection, single, union
from heedful.core.mask import Causal, First, Mask, Padding, Rule, Where, Window
from heedful.core.positions import Pairs, Positions
from heedful.kit.chosen import Chosen

TEXT = torch.arange(20)[None] >= torch.tensor([0, 3])[:, None]
RULES: dict[str, tuple[Rule, ...]] = {
    "none": (),
    "causal": (Causal(),),
    "window": (Causal(), Window(4)),
    "sinks and window": (Causal(), Window(4) | First(2)),
    "both": (Causal(), Window(7) & First(9)),
    "padding": (Causal(), Padding(TEXT)),
    "padding, sinks and window": (Causal(), Padding(TEXT), Window(3) | First(2)),
    "a condition": (Causal(), Where(lambda q, k: (q - k) % 5 != 2)),
    "some heads": (Causal(), (Window(3) | First(1)).on((1,), 2)),
    "some heads, each with its own range": (Causal(), Padding(TEXT), Window(3).on((0,), 2), First(2).on((0, 1), 2)),
}


def table(rows: Tensor, keys: int) -> Tensor:
    column = torch.arange(keys)
    return ((column >= rows[..., :1]) & (column < rows[..., 1:])).any(-2)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("size", [(0, 13, 0, 13), (5, 4, 0, 9), (8, 1, 0, 9), (12, 3, 4, 11)])
@pytest.mark.parametrize("pad", [None, (0, 3)])
def test_ranges_say_what_the_table_says(
    rules: tuple[Rule, ...], size: tuple[int, int, int, int], pad: tuple[int, int] | None
) -> None:
    start, n, first, m = size
    left = None if pad is None else torch.tensor(pad)
    q, k = Positions.row(start, n, pad=left), Positions.row(first, m, pad=left)
    mask = Mask(rules)
    kept = mask.keeps(Pairs(q, k, 2, slice(0, n), slice(0, m)))
    found = mask.key_ranges(q, k, 2)
    assert found is not None
    want = torch.ones(1, 1, n, m, dtype=torch.bool) if kept is None else kept
    assert torch.equal(*torch.broadcast_tensors(table(found, m), want))
    ends = found[..., 1][found[..., 0] < found[..., 1]]
    assert bool((ends <= m).all())


def tidy(rows: Tensor) -> bool:
    """Whether ranges are sorted and disjoint, and empty ones 0."""
    lo, hi = rows.unbind(-1)
    filled = lo < hi
    reached = hi.cummax(-1).values
    later = ~filled[..., 1:] | (lo[..., 1:] >= reached[..., :-1])
    return bool((rows >= 0).all() and (rows[~filled] == 0).all() and later.all())


@settings(max_examples=60)
@given(
    seed=st.integers(0, 9999), a=st.integers(1, 3), b=st.integers(1, 3), heads=st.sampled_from([(1, 1), (1, 2), (2, 1)])
)
def test_ranges_join_as_their_tables_do(seed: int, a: int, b: int, heads: tuple[int, int]) -> None:
    made = torch.Generator().manual_seed(seed)
    parts = []
    for count, h in zip((a, b), heads, strict=True):
        lo, hi = (torch.randint(-3, 12, (1, h, 4, 1), generator=made) for _ in range(2))
        rows = single(lo[..., 0], hi[..., 0])
        for _ in range(count - 1):
            lo, hi = (torch.randint(-3, 12, (1, h, 4, 1), generator=made) for _ in range(2))
            rows = union(rows, single(lo[..., 0], hi[..., 0]))
        parts.append(rows)
        assert tidy(rows)
    one, other = (table(rows, 12) for rows in parts)
    for join, want in ((union, one | other), (intersection, one & other)):
        found = join(*parts)
        assert torch.equal(table(found, 12), want)
        assert tidy(found)


def test_a_long_range_swallows_all_that_begin_in_it() -> None:
    long, short, late = (torch.tensor([[[[[lo, hi]]]]]) for lo, hi in ((0, 10), (2, 3), (5, 12)))
    assert union(union(long, short), late).flatten().tolist() == [0, 10, 10, 12]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("block", [1, 4, 512])
def test_a_mask_is_read_block_by_block(heads: int, block: int) -> None:
    kept = torch.rand(2, heads, 11, 13, generator=torch.Generator().manual_seed(0)) < 0.4
    kept[:, :, 3], kept[0, :, 5:], kept[1, :, -1] = True, False, False
    found = encode(lambda start, stop: kept[:, :, start:stop], 11, block)
    assert found is not None
    most = found.shape[3]
    for row, ranges in zip(kept.flatten(0, 2).tolist(), found.flatten(3).flatten(0, 2).tolist(), strict=True):
        sees = [False, *row, False]
        ends = [i for i in range(14) if sees[i] != sees[i + 1]]  # of first all that it sees, then nothing
        assert ranges == ends + [0] * (2 * most - len(ends))
    assert bool(found[..., -1, :].any()), "no more room than the fullest row needs"


def test_rows_that_see_nothing_have_one_range_of_nothing() -> None:
    found = encode(lambda start, stop: torch.zeros(1, 2, stop - start, 6, dtype=torch.bool), 5, block=3)
    assert torch.equal(found, torch.zeros(1, 2, 5, 1, 2, dtype=torch.long))  # type: ignore[arg-type]


def test_holes_in_a_text_and_dropped_keys() -> None:
    text = TEXT.clone()
    text[0, 5] = False
    q = k = Positions.row(0, 20)
    assert torch.equal(table(Mask((Padding(text),)).key_ranges(q, k, 1), 20)[:, 0, 0], text)  # type: ignore[arg-type]
    dropped = Positions(k.index, k.position, 0, (0, 0), is_filled=text[:1, None])
    rows = Mask((Causal(),)).key_ranges(q, dropped, 1)
    assert rows is not None
    assert torch.equal(table(rows, 20)[0, 0], text[0] & torch.ones(20, 20).tril().bool())


def test_rules_for_some_heads_need_no_looking() -> None:
    q = k = Positions.row(0, 20, pad=torch.tensor([0, 3]))
    rule = (Window(3) | First(1)).on((1, 3), 4)
    found = rule.key_ranges(q, k)
    assert found is not None
    whole = slice(0, 20)
    kept = rule.keeps(Pairs(q, k, 4, whole, whole))
    assert torch.equal(table(found, 20), kept.expand(table(found, 20).shape))


def test_scattered_keys_are_not_picked_to_look_for_ranges() -> None:
    def pick(rows: slice) -> Tensor:
        raise AssertionError("picked")

    q = k = Positions.row(0, 20)
    rule = Chosen(pick)
    for scattered in (rule, rule | First(2), rule & Window(3), rule.on((0,), 2), (First(1) | rule).on((1,), 2)):
        assert Mask((Causal(), scattered)).key_ranges(q, k, 2) is None


def test_too_many_ranges_are_no_ranges() -> None:
    for step, n in ((2, 2 * MOST), (4, 2 * MOST + 2)):
        q = k = Positions.row(0, n)
        assert Mask((Where(lambda a, b, step=step: b % step == 0),)).key_ranges(q, k, 1) is not None
    q = k = Positions.row(0, 2 * MOST + 1)
    every_second = Where(lambda a, b: b % 2 == 0)
    assert Mask((every_second,)).key_ranges(q, k, 1) is None
    assert Mask((Causal(), every_second)).key_ranges(q, k, 1) is None, "in the last row alone"


def test_scattered_masks_are_counted_before_their_places_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    def places(*_: object, **__: object) -> Tensor:
        raise AssertionError("held")

    monkeypatch.setattr(Tensor, "nonzero", places)
    kept = torch.arange(4 * MOST) % 2 == 0
    assert encode(lambda start, stop: kept.expand(1, 1, stop - start, -1), 3) is None


def test_another_call_is_asked_again() -> None:
    mask = Mask((Causal(),))
    for n in (3, 5, 3):
        positions = Positions.row(0, n)
        assert table(mask.key_ranges(positions, positions, 1), n).sum() == n * (n + 1) // 2  # type: ignore[arg-type]
