"""S2Attention against the authors' rule in loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from heedful import attach, models
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.call import CachedKV, Call
from heedful.core.errors import FieldError
from heedful.core.mask import Blocks, Mask, Where
from heedful.core.positions import Positions
from heedful.methods import S2Attention


def sees(i: int, j: int, group: int, heads: int, method: S2Attention) -> bool:
    """Whether the query at place i of a head of this group computes the key at place j."""
    query, key = i // method.block, j // method.block
    step = max(1, int(method.stride / heads))
    return j <= i and (query - key < method.local or (key + group * step) % method.stride == 0)


def tile(call: Call) -> Call:
    return call.tile(slice(0, len(call.queries)), slice(0, len(call.keys)))


def expected(call: Call, pads: tuple[int, ...], method: S2Attention) -> torch.Tensor:
    """The table `[b h q k]` of one call."""
    q, k = (x.index[0, 0].tolist() for x in (call.queries, call.keys))
    return torch.tensor([
        [[[sees(i - pad, j - pad, h * call.kv_heads // call.heads, call.heads, method) for j in k] for i in q]
         for h in range(call.heads)]
        for pad in pads
    ])  # fmt: skip


METHODS = [S2Attention(2, 1, 3), S2Attention(4, 2, 2), S2Attention(1, 3, 9), S2Attention(3, 1, 8)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [23, 6, 5, 1])
@pytest.mark.parametrize("pads", [(0, 0), (0, 5), (2, 3)])
def test_each_group_of_heads_sees_its_window_and_its_shard(
    method: S2Attention, rows: int, pads: tuple[int, int]
) -> None:
    text = torch.arange(23) >= torch.tensor(pads)[:, None]
    bare = Bare(Shape(q=rows, k=23), text=text if any(pads) else None)
    mask = method.narrow(bare.call.mask, bare.call)
    assert isinstance(mask.rules[-1], Blocks)
    if not any(pads):
        begins = (23 - rows) // method.block
        assert mask.rules[-1].table.shape == (1, 4, 22 // method.block + 1 - begins, 22 // method.block + 1)
    keep = mask.keeps(tile(bare.call).pairs)
    assert keep is not None
    want = expected(bare.call, pads, method) & text[:, None, None]
    real = text[:, 23 - rows :]
    for b in range(2):
        assert torch.equal(keep.expand(2, 4, -1, -1)[b][:, real[b]], want[b][:, real[b]])
    assert want[:, 0].ne(want[:, -1]).any() or rows == 1


def test_only_blocks_that_some_head_sees_are_read() -> None:
    bare = Bare(Shape(b=1, h=2, g=1, q=40, k=40))
    mask = S2Attention(4, 1, 5).narrow(bare.call.mask, bare.call)
    rows = slice(32, 36)
    assert mask.columns(bare.call.queries.take(rows), bare.call.keys, rows) == ((0, 4), (20, 24), (32, 36))


@pytest.mark.parametrize("method", METHODS[:2])
def test_heads_are_softmax_over_what_they_see(method: S2Attention) -> None:
    bare = Bare(Shape(q=23, k=23), dtype=torch.float64)
    k, v = (x.repeat_interleave(2, 1) for x in (bare.k, bare.v))
    scores = (bare.q @ k.mT / bare.shape.d**0.5).masked_fill(~expected(bare.call, (0, 0), method), -torch.inf)
    assert close(bare.run(method, "tiled", 5)[0], scores.softmax(-1) @ v)


def test_where_keys_are_missing_it_goes_by_their_places() -> None:
    bare = Bare(Shape(q=2, k=9))
    kept = torch.tensor([[0, 1, 2, 6, 7, 12, 13, 21, 22], [3, 4, 9, 10, 15, 16, 20, 21, 22]])[None]
    queries = Positions.row(21, 2)
    call = replace(bare.call, queries=queries, keys=Positions(kept, kept))
    method = S2Attention(3, 1, 3)
    mask = method.narrow(Mask(), call)
    assert isinstance(mask.rules[-1], Where)
    keep = mask.keeps(tile(call).pairs)
    assert keep is not None
    for h in range(4):
        for r, i in enumerate((21, 22)):
            want = [sees(i, j, h // 2, 4, method) or j > i for j in kept[0, h // 2].tolist()]
            assert keep.expand(1, 4, 2, 9)[0, h, r].tolist() == want


@pytest.mark.parametrize("lacking", [{"first": None}, {"pads": None}])
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_blocks_need_places_in_a_row(lacking: dict[str, None], side: str) -> None:
    call = Bare().call
    call = replace(call, **{side: replace(getattr(call, side), **lacking)})
    assert isinstance(S2Attention(2, 1, 3).narrow(Mask(), call).rules[-1], Where)


def test_the_cache_keeps_what_a_later_token_may_see() -> None:
    bare = Bare(Shape(q=1, k=23, h=4, g=2))
    entries = CachedKV(bare.k, bare.v, bare.call.keys, 1)
    method = S2Attention(3, 2, 4)
    kept = method.forget(entries, bare.call).expand(2, 2, 23)
    for g in range(2):
        for j in range(23):
            later = any(sees(i, j, g, 4, method) for i in range(23, 80))
            assert not later or kept[0, g, j]
            if kept[0, g, j] and not later:
                assert j >= 23 - method.local * method.block  # in a block that the window has half left
    assert [int(x) for x in kept[0].sum(-1)] == [sum(j // 3 % 4 == 0 or j > 17 for j in range(23)),
                                                 sum((j // 3 + 1) % 4 == 0 or j > 17 for j in range(23))]  # fmt: skip


def test_padding_is_not_kept() -> None:
    text = torch.arange(12) >= torch.tensor([0, 5])[:, None]
    bare = Bare(Shape(q=12, k=12), text=text)
    entries = CachedKV(bare.k, bare.v, bare.call.keys, 12, text[:, None].expand(2, 2, 12))
    assert not S2Attention(4, 2, 3).forget(entries, bare.call)[1, :, :5].any()


def test_a_cache_without_the_rest_goes_on_as_the_whole_text() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, 1, 30)["input_ids"]
    with torch.no_grad(), attach(model, S2Attention(2, 1, 3)) as run:
        whole = run(input_ids=ids, use_cache=False).logits
        out = run(input_ids=ids[:, :17])
        parts = [out.logits]
        for i in range(17, 30):
            out = run(input_ids=ids[:, i : i + 1], **{CACHE: cache_of(out)})
            parts.append(out.logits)
    assert close(torch.cat(parts, 1), whole)


def test_what_it_leaves_alone() -> None:
    call = Bare().call
    assert S2Attention.neutral().idle(call)
    assert S2Attention(2, 1, 2).idle(replace(call, cross=True))
    assert not S2Attention(2, 1, 2).idle(call)


def test_fields() -> None:
    assert (S2Attention().block, S2Attention().local, S2Attention().stride) == (64, 16, 8)
    assert S2Attention.example() == S2Attention(2, 1, 3)
    assert S2Attention.neutral().stride == 1
    with pytest.raises(FieldError, match=r"block = 0: must be 1 or more"):
        S2Attention(0)
    with pytest.raises(FieldError, match=r"local = 0: must be 1 or more"):
        S2Attention(2, 0)
    with pytest.raises(FieldError, match=r"stride = 0: must be 1 or more"):
        S2Attention(2, 1, 0)
