"""LeoAM: chunks are split from the largest down, by the most that their keys could score, query by query."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Mask
from heedful.core.positions import Positions
from heedful.methods.sparse.cache.tova import TOVA
from heedful.methods.sparse.decode.leo_am import LeoAM

N = 19


def _bare(shape: Shape | None = None, text: Tensor | None = None) -> Bare:
    bare = Bare(shape or Shape(), text=text)
    bare.call = replace(bare.call, query=bare.q, key=bare.k, value=bare.v)
    return bare


def bound(query: Tensor, keys: list[Tensor]) -> float:
    """Channel by channel the larger of what the highest and the lowest number of any key would give."""
    total = 0.0
    for c in range(len(query)):
        column = [float(key[c]) for key in keys]
        total += max(float(query[c]) * max(column), float(query[c]) * min(column))
    return total


def _by_loops(bare: Bare, method: LeoAM, pads: list[int]) -> Tensor:
    """Which keys each query sees `[b h n n]`, from the description."""
    s = bare.shape
    out = torch.zeros(s.b, s.h, s.q, s.k, dtype=torch.bool)
    for b, pad in enumerate(pads):
        for h in range(s.h):
            keys = bare.k[b, h // (s.h // s.g), pad:]
            for i in range(s.q):
                place = s.k - s.q + i - pad
                if place < 0:
                    continue
                room = method.budget if isinstance(method.budget, int) else -int(-method.budget * (place + 1) // 1)
                room = max(1, room // method.grain)
                size = method.grain * 2**method.splits
                starts = list(range(0, len(keys), size))
                while True:
                    whole = [x for x in starts if x + size <= place // size * size]
                    whole.sort(key=lambda x: -bound(bare.q[b, h, i], list(keys[x : x + size])))
                    kept = [*whole[:room], place // size * size]
                    if size == method.grain:
                        break
                    size //= 2
                    starts = [y for x in kept for y in (x, x + size)]
                for x in kept:
                    out[b, h, i, pad + x : pad + min(x + size, place + 1)] = True
    return out


@pytest.mark.parametrize("pads", [[0, 0], [0, 5]])
@pytest.mark.parametrize("shape", [Shape(), Shape(q=7), Shape(q=1), Shape(g=4)])
@pytest.mark.parametrize("method", [LeoAM(4, 2, 2), LeoAM(0.4, 1, 3), LeoAM(6, 3, 0), LeoAM(1, 2, 1), LeoAM(0.3, 2, 5)])
def test_the_best_chunks_are_split(method: LeoAM, shape: Shape, pads: list[int]) -> None:
    text = torch.arange(N) >= torch.tensor(pads)[:, None]
    bare = _bare(shape, text)
    part = bare.call.tile(slice(0, shape.q), slice(0, N))
    is_text = text[:, None, N - shape.q :, None]
    kept = method.search(bare.call.mask, bare.call).keeps(part.pairs)
    assert torch.equal(kept & is_text, _by_loops(bare, method, pads))


def test_the_key_that_scores_highest_is_found_where_one_chunk_stands_out() -> None:
    bare = _bare(Shape(b=1, q=1, k=64))
    bare.k[:] = 0.01 * bare.k
    bare.k[0, :, 21] = 3.0
    bare.q[:] = bare.q.abs()
    bare.call = replace(bare.call, query=bare.q, key=bare.k)
    part = bare.call.tile(slice(0, 1), slice(0, 64))
    kept = LeoAM(2, 2, 4).search(bare.call.mask, bare.call).keeps(part.pairs)
    assert bool(kept[..., 20:22].all())
    assert int(kept[0, 0, 0].sum()) == 4


def test_what_a_cache_no_longer_holds_is_in_no_chunk() -> None:
    """Chunks of which nothing is left are not chosen, and slots that hold nothing have no say, head by head."""
    bare = _bare(Shape(b=1, q=1, k=12))
    places = torch.tensor([0, 1, 2, 3, 9, 10, 17, 20, 21, 28, 29, 30])[None, None].expand(1, bare.shape.g, 12)
    filled = torch.ones_like(places, dtype=torch.bool)
    filled[0, 0, [1, 4, 5]] = False
    filled[0, 1, [7, 8]] = False
    bare.k[0, 0, [1, 4, 5]] = 100.0
    bare.k[0, 1, [7, 8]] = -100.0
    keys = Positions(places, places, is_filled=filled)
    call = replace(bare.call, key=bare.k, keys=keys, queries=Positions.row(30, 1))
    method = LeoAM(6, 2, 3)
    kept = method.search(call.mask, call).keeps(call.tile(slice(0, 1), slice(0, 12)).pairs)
    for h in range(bare.shape.h):
        group = h // (bare.shape.h // bare.shape.g)
        held = {int(places[0, group, n]): bare.k[0, group, n] for n in range(12) if filled[0, group, n]}
        starts, size = list(range(0, 32, 16)), 16
        while True:
            mine = {x: [held[n] for n in held if x <= n < x + size] for x in starts if x + size <= 30 // size * size}
            whole = sorted((x for x in mine if mine[x]), key=lambda x: -bound(bare.q[0, h, 0], mine[x]))
            chosen = [*whole[:3], 30 // size * size]
            if size == 2:
                break
            size //= 2
            starts = [y for x in chosen for y in (x, x + size)]
        for n in range(12):
            if filled[0, group, n]:
                assert bool(kept[0, h, 0, n]) == any(x <= int(places[0, group, n]) < x + 2 for x in chosen)


@pytest.mark.usefixtures("poison")
def test_entries_that_a_cache_dropped_have_no_say() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=24)["input_ids"]
    outs = []
    for _ in range(2):
        with torch.no_grad(), attach(model, TOVA(10) | LeoAM(4, 2, 1)) as run:
            out = run(input_ids=ids, use_cache=True)
            outs.append(run(input_ids=ids[:, :1], **{CACHE: out[CACHE]}, use_cache=True).logits)
    assert bool(outs[0].isfinite().all())
    assert torch.equal(*outs)


def test_a_prompt_is_read_as_its_tokens_one_by_one() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=20)["input_ids"]
    with torch.no_grad(), attach(model, LeoAM(4, 2, 2)) as run:
        whole = run(input_ids=ids).logits
        cache, last = None, []
        for n in range(20):
            out = run(input_ids=ids[:, n : n + 1], use_cache=True, **({} if cache is None else {CACHE: cache}))
            cache = out[CACHE]
            last.append(out.logits)
    assert close_model(torch.cat(last, 1), whole)


def test_what_leaves_all_is_left() -> None:
    bare = _bare()
    open_ = Mask(())
    assert LeoAM(4, 2, 1).search(open_, bare.call) is open_
    assert LeoAM(1.0).idle(bare.call)
    assert not LeoAM(0.5).idle(bare.call)
    assert LeoAM(30).rests(30) is not None
    assert LeoAM(30).rests(31) is None
    assert LeoAM(0.5, grain=8).rests(8) is not None
    assert LeoAM(0.5, grain=8).rests(9) is None


def test_says_what_is_wrong() -> None:
    for bad in ({"budget": 0}, {"grain": 0}, {"splits": -1}, {"splits": 21}):
        with pytest.raises(FieldError, match=f"LeoAM.{next(iter(bad))}"):
            LeoAM(**bad)
    assert LeoAM(1, 1, 0).splits == 0
    assert LeoAM(1, 1, 20).splits == 20
    bare = _bare()
    for missing in ("query", "key"):
        with pytest.raises(SiteError, match="layer 0: bounds scores"):
            LeoAM(4).search(bare.call.mask, replace(bare.call, **{missing: None}))
