"""MoBA against the authors' plain code, read in loops."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Phase
from heedful.core.errors import FieldError
from heedful.core.mask import Causal, Mask, Padding, Window
from heedful.core.positions import Positions
from heedful.methods import MoBA
from tests.by_hand import in_pieces

SIZE = 4


def seen_by(q: Tensor, keys: dict[int, Tensor], place: int, size: int, blocks: int) -> list[int]:
    """The places that a query sees, of those whose keys are there."""
    gates = {}
    for block in range(place // size):
        held = [keys[p] for p in range(block * size, (block + 1) * size) if p in keys]
        if held:
            gates[block] = float(q @ (sum(held[1:], held[0]) / len(held)))
    chosen = sorted(gates, key=lambda n: -gates[n])[: blocks - 1]
    return [p for p in keys if p <= place and p // size in [*chosen, place // size]]


def by_hand(bare: Bare, blocks: int, pads: tuple[int, ...] = (0, 0), held: Tensor | None = None) -> Tensor:
    """Heads of all rows that are text; zeros elsewhere."""
    s = bare.shape
    out = torch.zeros(s.b, s.h, s.q, s.dv, dtype=torch.float64)
    for b in range(s.b):
        for h in range(s.h):
            g = h * s.g // s.h
            there = [j for j in range(pads[b], s.k) if held is None or held[0, g, j]]
            keys = {j - pads[b]: bare.k[b, g, j] for j in there}
            for i in range(s.q):
                place = s.k - s.q + i - pads[b]
                if place >= 0:
                    seen = seen_by(bare.q[b, h, i], keys, place, SIZE, blocks)
                    if seen:
                        scores = torch.stack([bare.q[b, h, i] @ keys[p] for p in seen]) / s.d**0.5
                        out[b, h, i] = scores.softmax(0) @ bare.v[b, g, [p + pads[b] for p in seen]]
    return out


@pytest.mark.parametrize("blocks", [1, 2, 3, 9])
@pytest.mark.parametrize("rows", [18, 5, 1])
def test_each_query_sees_its_own_block_and_the_best_of_the_past(blocks: int, rows: int) -> None:
    bare = Bare(Shape(q=rows, k=18), dtype=torch.float64)
    want = by_hand(bare, blocks)
    for backend, tile in (("reference", None), ("tiled", 3)):
        assert close(bare.run(MoBA(SIZE, blocks), backend, tile)[0], want)


def test_blocks_are_counted_from_where_each_text_begins() -> None:
    pads = (0, 3)
    text = torch.ones(2, 18, dtype=torch.bool)
    text[1, :3] = False
    bare = Bare(Shape(q=18, k=18), dtype=torch.float64, text=text)
    assert close(bare.run(MoBA(SIZE, 2), "reference")[0], by_hand(bare, 2, pads))


def test_means_are_of_the_keys_that_a_head_still_holds() -> None:
    bare = Bare(Shape(q=3, k=18), dtype=torch.float64)
    held = torch.rand(1, 2, 18, generator=torch.Generator().manual_seed(1)) < 0.6
    held[0, 0, 4:8] = False  # nothing left of a block
    held[..., -3:] = True
    held[..., 0] = True  # the first token counts like any other
    whole = Positions.row(0, 18)
    bare.call = replace(bare.call, keys=Positions(whole.index, whole.position, is_filled=held))
    assert close(bare.run(MoBA(SIZE, 3), "reference")[0], by_hand(bare, 3, held=held))


@pytest.mark.parametrize("window", [6, 9, 30])
@pytest.mark.parametrize("pads", [(0, 0), (0, 3)])
def test_behind_a_window_a_query_chooses_among_blocks_of_which_it_sees_every_key(
    window: int, pads: tuple[int, int]
) -> None:
    text = torch.arange(18) >= torch.tensor(pads)[:, None]
    bare = Bare(Shape(q=18, k=18), dtype=torch.float64, text=text, rules=(Causal(), Padding(text), Window(window)))
    out = torch.zeros(2, 4, 18, bare.shape.dv, dtype=torch.float64)
    for b, h, i in product(range(2), range(4), range(18)):
        place = i - pads[b]
        near = range(max(0, place - window + 1), place + 1)
        whole = {p for p in near if all(q in near for q in range(p // SIZE * SIZE, p // SIZE * SIZE + SIZE))}
        keys = {p: bare.k[b, h // 2, p + pads[b]] for p in whole | {p for p in near if p // SIZE == place // SIZE}}
        if place >= 0:
            seen = seen_by(bare.q[b, h, i], keys, place, SIZE, 2)
            scores = torch.stack([bare.q[b, h, i] @ keys[p] for p in seen]) / bare.shape.d**0.5
            out[b, h, i] = scores.softmax(0) @ bare.v[b, h // 2, [p + pads[b] for p in seen]]
    for backend, rows in (("reference", None), ("tiled", 5)):
        found = bare.run(MoBA(SIZE, 2), backend, rows)[0]
        assert close(found * text[:, None, :, None], out)


def test_a_text_in_pieces_is_the_text_though_the_cache_rolls() -> None:
    model = models.tiny("mistral").eval()
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), attach(model, MoBA(2, 2)) as run:
        assert close_model(in_pieces(run, ids, (5, 1, 1, 4, 1))[0], run(input_ids=ids).logits)


def test_the_highest_gate_wins_though_none_is_above_zero() -> None:
    bare = Bare(Shape(b=1, h=1, g=1, q=1, k=9, d=1, dv=1), dtype=torch.float64)
    bare.q, bare.k = torch.ones_like(bare.q), torch.tensor([-3.0] * 4 + [-2.0] * 4 + [-1.0]).view_as(bare.k).double()
    keep = MoBA(SIZE, 2).route(Mask(), replace(bare.call, query=bare.q, key=bare.k)).keeps(bare.call.pairs)
    assert keep is not None
    assert keep.flatten().tolist() == [False] * 4 + [True] * 5


def test_gates_are_no_coarser_than_float32() -> None:
    bare = Bare(Shape(b=1, h=1, g=1, q=1, k=9, d=1, dv=1), dtype=torch.bfloat16)
    key = torch.tensor([1.0, 1.0, 1.0, 1.0078125, 1.0, 1.0, 1.0, 1.0, 1.0]).view(1, 1, 9, 1).bfloat16()
    call = replace(bare.call, query=torch.ones_like(bare.q), key=key)
    keep = MoBA(SIZE, 2).route(Mask(), call).keeps(call.pairs)
    assert keep is not None
    assert keep.flatten().tolist() == [True] * 4 + [False] * 4 + [True]


def test_it_declares_the_pairs_that_it_computes() -> None:
    bare = Bare(Shape(b=1, q=18, k=18), dtype=torch.float64)
    pairs = sum(len(seen_by(bare.q[0, 0, i], {j: bare.k[0, 0, j] for j in range(18)}, i, SIZE, 3)) for i in range(18))
    assert MoBA(SIZE, 3).declares(18) == {"density": pairs / 18**2}


def test_what_it_leaves_alone() -> None:
    call = Bare().call
    assert MoBA(SIZE, 2).idle(replace(call, cross=True))
    assert not MoBA(SIZE, 2).idle(call)
    assert not MoBA(SIZE, 2).idle(replace(call, phase=Phase.DECODE))
    for lacking in ({"query": Bare().q}, {"key": Bare().k}):
        assert MoBA(SIZE, 2).route(call.mask, replace(call, **lacking)) is call.mask


def test_fields() -> None:
    assert (MoBA().block, MoBA().blocks) == (512, 3)
    assert MoBA.example() == MoBA(4, 2)
    with pytest.raises(FieldError, match=r"block = 0: must be 1 or more"):
        MoBA(0)
    with pytest.raises(FieldError, match=r"blocks = 0: must be 1 or more"):
        MoBA(4, 0)
    assert MoBA(1, 1).block == 1


@pytest.mark.parametrize("blocks", [1, 2, 9])
@pytest.mark.parametrize("rows", [18, 5])
def test_ranges_of_columns_say_the_same(blocks: int, rows: int) -> None:
    text = torch.ones(2, 18, dtype=torch.bool)
    text[1, :3] = False
    bare = Bare(Shape(q=rows, k=18), text=text)
    call = replace(bare.call, query=bare.q, key=bare.k)
    mask = MoBA(SIZE, blocks).route(call.mask, call)
    kept, ranges = mask.keeps(call.pairs), mask.key_ranges(call.queries, call.keys, 4)
    assert kept is not None
    assert ranges is not None
    assert ranges.shape[3] <= min(blocks, 5)
    rule = mask.rules[-1]  # without causality too
    for told, pairs in ((ranges, kept), (rule.key_ranges(call.queries, call.keys), rule.keeps(call.pairs))):
        assert told is not None
        inside = (torch.arange(18) >= told[..., :1]) & (torch.arange(18) < told[..., 1:])
        assert torch.equal(inside.any(-2).expand_as(pairs), pairs)
    found, want = (bare.run(MoBA(SIZE, blocks), backend)[0] for backend in ("native", "reference"))
    assert close(found[0], want[0])
    assert close(found[1, :, 3 - 18 + rows if rows == 18 else 0 :], want[1, :, 3 - 18 + rows if rows == 18 else 0 :])


@pytest.mark.parametrize("padding", [0, 7])
def test_a_long_text_is_gathered_by_block_where_it_is_whole(padding: int) -> None:
    text = torch.arange(1024)[None] >= torch.tensor([[padding]])
    bare = Bare(Shape(b=1, h=1, g=1, q=1024, k=1024), text=text if padding else None)
    call = replace(bare.call, query=bare.q, key=bare.k)
    (rule,) = MoBA(32, 2).route(call.mask, call).rules[-1:]
    assert bool(rule.parts()) == (not padding)
    found, want = (bare.run(MoBA(32, 2), backend)[0] for backend in ("native", "reference"))
    assert close(found[:, :, padding:], want[:, :, padding:])


def test_of_several_texts_in_a_row_no_ranges_are_told() -> None:
    bare = Bare(Shape(b=1, q=18, k=18))
    index = torch.arange(18)[None, None]
    packed = Positions(index, index % 10)
    call = replace(bare.call, query=bare.q, key=bare.k, queries=packed, keys=packed)
    assert MoBA(SIZE, 2).route(Mask(), call).rules[0].scattered
    assert not MoBA(SIZE, 2).route(Mask(), replace(bare.call, query=bare.q, key=bare.k)).rules[0].scattered
