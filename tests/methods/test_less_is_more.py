"""LessIsMore: layers that see all choose one set of tokens for the heads of the layers after them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.mask import Blocks, Causal, Mask, Padding, Window
from heedful.core.positions import Positions
from heedful.methods import LessIsMore

N = 19


def _bare(shape: Shape | None = None, text: Tensor | None = None, seed: int = 0) -> Bare:
    bare = Bare(shape or Shape(), text=text, seed=seed)
    bare.call = replace(bare.call, query=bare.q, key=bare.k, value=bare.v)
    return bare


def _shared(method: LessIsMore, call: Call, layer: int = 1) -> Mask:
    """The mask of a layer after one that chose."""
    assert method.share(call.mask, replace(call, layer=0)) is call.mask
    return method.share(call.mask, replace(call, layer=layer, query=-call.query))


def _kept(mask: Mask, call: Call) -> Tensor:
    part = call.tile(slice(0, len(call.queries)), slice(0, len(call.keys)))
    return mask.keeps(part.pairs)


def _by_loops(bare: Bare, method: LessIsMore, pads: list[int]) -> Tensor:
    """Which keys each query sees `[b n n]`, as the authors' code goes about it for one new token."""
    s = bare.shape
    out = torch.zeros(s.b, s.q, s.k, dtype=torch.bool)
    for b, pad in enumerate(pads):
        for i in range(s.q):
            length = s.k - s.q + i - pad + 1
            if length < 1:
                continue
            budget = method.budget if isinstance(method.budget, int) else -int(-method.budget * length // 1)
            budget = min(budget, length)
            middle = int(budget * (1 - method.recent))
            newest, sinks = budget - middle, method.sinks
            if newest < sinks:
                sinks = 0
            else:
                newest -= sinks
            choice = range(sinks, length - newest)
            tops = []
            for h in range(s.h):
                score = {k: float(bare.q[b, h, i] @ bare.k[b, h // (s.h // s.g), pad + k]) for k in choice}
                tops.append(sorted(score, key=lambda k: -score[k])[:middle])
            union = list(dict.fromkeys(k for rank in zip(*tops, strict=True) for k in rank))[:middle]
            for k in (*range(sinks), *union, *range(length - newest, length)):
                out[b, i, pad + k] = True
    return out


@pytest.mark.parametrize("pads", [[0, 0], [0, 5]])
@pytest.mark.parametrize("shape", [Shape(), Shape(q=7), Shape(q=1), Shape(g=4)])
@pytest.mark.parametrize(
    "method",
    [
        LessIsMore(8, 0.5, 2, (0,)),
        LessIsMore(8, 0.25, 0, (0,)),
        LessIsMore(8, 0.25, 4, (0,)),  # no room for sinks
        LessIsMore(0.5, 0.4, 1, (0,)),
        LessIsMore(5, 1.0, 2, (0,)),
        LessIsMore(5, 0.0, 0, (0,)),
        LessIsMore(1, 1.0, 0, (0,)),  # itself alone
    ],
    ids=repr,
)
def test_the_formula(method: LessIsMore, shape: Shape, pads: list[int]) -> None:
    text = torch.arange(N) >= torch.tensor(pads)[:, None]
    bare = _bare(shape, text)
    is_text = text[:, N - shape.q :, None]
    kept = _kept(_shared(method, bare.call), bare.call)
    assert kept.shape[1] == 1, "one set for all heads"
    assert torch.equal(kept[:, 0] & is_text, _by_loops(bare, method, pads) & is_text)


def test_many_rows_choose_as_few_do() -> None:
    bare = _bare(Shape(b=1, q=150, k=150))
    method = LessIsMore(12, 0.25, 1, (0,))
    assert torch.equal(_kept(_shared(method, bare.call), bare.call)[:, 0], _by_loops(bare, method, [0]))


def test_first_ranks_come_before_second_ones() -> None:
    """Two heads, scores by hand: one's second choice outweighs all, and the other's first comes before it."""
    bare = _bare(Shape(b=1, h=2, g=2, q=1, k=6, d=1))
    key = torch.tensor([[9.0, 8, 1, 0, 0, 0], [0, 0, 0, 0.1, 0.2, 0]])[None, ..., None]
    call = replace(bare.call, query=torch.ones(1, 2, 1, 1), key=key)
    for room, wanted in ((1, {0}), (2, {0, 4}), (3, {0, 4, 1}), (4, {0, 4, 1, 3})):
        method = LessIsMore(room + 1, 1 / (room + 1), 0, (0,))
        kept = _kept(_shared(method, replace(call, state=replace(call.state, forward={}))), call)[0, 0, 0]
        assert set(kept.nonzero().flatten().tolist()) == wanted | {5}


def test_what_a_mask_hides_takes_nobodys_room() -> None:
    bare = _bare(Shape(b=1, q=1))
    narrow = replace(bare.call, mask=Mask((Causal(), Window(9))))
    kept = _kept(_shared(LessIsMore(6, 0.5, 0, (0,)), narrow), narrow)[0, 0, 0]
    assert int(kept.sum()) == 6
    assert not kept[: N - 9].any()
    method = LessIsMore(18, 0.2, 0, (0,))
    method.share(narrow.mask, narrow)
    wide = replace(bare.call, layer=1)
    assert int(_kept(method.share(wide.mask, wide), wide).sum()) == 9, "fewer candidates than room"


@pytest.mark.parametrize("n", [N, 70])
def test_blocks_of_other_methods_say_what_is_hidden(n: int) -> None:
    """Every other block of four, the last one cut short: a query takes its room from these alone."""
    bare = _bare(Shape(b=1, q=n, k=n))
    block = torch.arange(-(-n // 4))
    table = (block[:, None] - block) % 2 == 0
    call = replace(bare.call, mask=Mask((Causal(), Blocks(table[None, None], 4))))
    kept = _kept(_shared(LessIsMore(6, 0.0, 0, (0,)), call), call)[0, 0]
    open_ = [[j for j in range(i + 1) if (i // 4 - j // 4) % 2 == 0] for i in range(n)]
    assert all(set(row.nonzero().flatten().tolist()) <= set(free) for row, free in zip(kept, open_, strict=True))
    assert kept.sum(-1).tolist() == [min(6, len(free)) for free in open_]


def test_tiles_ask_for_their_own_rows_and_empty_columns_are_nobodys() -> None:
    bare = _bare(Shape(b=1))
    mask = _shared(LessIsMore(6, 0.5, 1, (0,)), bare.call)
    whole = _kept(mask, bare.call)
    for rows in (slice(0, 7), slice(7, 12)):
        part = bare.call.tile(rows, slice(0, N))
        assert torch.equal(mask.keeps(part.pairs), whole[:, :, rows])
    longer = replace(bare.call, layer=1, keys=Positions.row(0, N + 4))
    kept = _kept(LessIsMore(6, 0.5, 1, (0,)).share(longer.mask, longer), longer)
    assert torch.equal(kept[..., :N], whole)
    assert not kept[..., N:].any()


def test_sets_are_shared_by_index_with_caches_that_dropped_others() -> None:
    bare, method = _bare(Shape(b=1, q=1)), LessIsMore(6, 0.5, 1, (0,))
    whole = _by_loops(bare, method, [0])[0, 0]
    method.share(bare.call.mask, bare.call)
    index = torch.stack([torch.tensor([0, 3, *range(9, N), 0]), torch.tensor([*range(6, N)])])[None]
    valid = torch.ones(1, 2, 13, dtype=torch.bool)
    valid[0, 0, -1] = False
    call = replace(bare.call, layer=1, keys=Positions(index, index, is_filled=valid))
    kept = _kept(method.share(call.mask, call), call)[0, :, 0]
    for h in range(4):
        assert torch.equal(kept[h], whole[index[0, h // 2]] & valid[0, h // 2])


def test_heads_that_hold_unlike_tokens_rank_what_they_hold() -> None:
    """As if each head gave what it does not hold no score; an empty slot may bear the index of a token."""
    bare, method = _bare(Shape(b=1, q=1)), LessIsMore(7, 0.5, 1, (0,))
    held = torch.ones(2, N, dtype=torch.bool)
    held[0, 4:9] = held[1, 2:7] = False
    index = torch.stack([torch.cat([x.nonzero().flatten(), torch.tensor([4, 0])]) for x in held])[None]
    valid = (torch.arange(N - 3) < N - 5).expand(1, 2, -1)
    key = torch.stack([bare.k[0, g, index[0, g]] for g in range(2)])[None]
    call = replace(bare.call, key=key, keys=Positions(index, index, is_filled=valid))
    method.share(call.mask, call)
    (seen,) = call.state.forward["seen"][0]
    tops = []
    for h in range(4):
        score = bare.k[0, h // 2] @ bare.q[0, h, 0]
        open_ = [k for k in range(1, N - 3) if held[h // 2, k]]
        tops.append(sorted(open_, key=lambda k, score=score: -float(score[k]))[:3])
    best = list(dict.fromkeys(k for rank in zip(*tops, strict=True) for k in rank))[:3]
    assert set(seen.nonzero().flatten().tolist()) == {0, *best, N - 3, N - 2, N - 1}


def test_selecting_layers_see_all_and_others_what_the_last_of_them_chose() -> None:
    model = models.tiny("llama", num_hidden_layers=6).eval()
    ids = models.tiny_inputs(model, length=N)["input_ids"]
    dense = sum(range(1, N + 1)) / N**2
    sparse = sum(min(i, 6) for i in range(1, N + 1)) / N**2
    with attach(model, LessIsMore(6, 0.5, 1, (1, 4))) as run, torch.no_grad():
        run(input_ids=ids)
    assert run.activity().density == pytest.approx({1: dense, 2: sparse, 3: sparse, 4: dense, 5: sparse})
    first, second = (_bare(Shape(q=1), seed=seed) for seed in (0, 1))
    method = LessIsMore(6, 0.5, 1, (0, 2))
    call = first.call
    for bare, chooses, reads in ((first, 0, 1), (second, 2, 3)):
        method.share(call.mask, replace(call, layer=chooses, query=bare.q, key=bare.k))
        kept = _kept(method.share(call.mask, replace(call, layer=reads)), call)[:, 0]
        assert torch.equal(kept, _by_loops(bare, method, [0, 0]))


def test_without_a_choice_layers_see_all() -> None:
    bare, method = _bare(), LessIsMore(6, 0.5, 1, (0,))
    assert method.share(bare.call.mask, replace(bare.call, layer=1)) is bare.call.mask
    both = Mask((Padding(torch.ones(2, N, dtype=torch.bool)),))
    assert method.share(both, replace(bare.call, mask=both)) is both
    assert "seen" not in bare.call.state.forward
    assert method.idle(replace(bare.call, cross=True))
    assert LessIsMore(selecting=(2,)).idle(replace(bare.call, layer=1))
    assert not LessIsMore(selecting=(2,)).idle(replace(bare.call, layer=2))
    short = _shared(LessIsMore(N, 0.5, 1, (0,)), bare.call)
    assert torch.equal(_kept(short, bare.call).expand(2, 1, N, N), torch.ones(2, 1, N, N, dtype=torch.bool).tril())


def test_decoding_is_the_whole_and_prompts_may_see_all() -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=N)["input_ids"]
    method = LessIsMore(6, 0.5, 1, (0,))
    with torch.no_grad(), attach(model, method) as run:
        whole, cache, parts = run(input_ids=ids).logits, None, []
        for start, stop in itertools.pairwise((0, 8, 9, 10, 17, N)):
            out = run(input_ids=ids[:, start:stop], use_cache=True, **{CACHE: cache})
            cache = out[CACHE]
            parts.append(out.logits)
        assert close_model(torch.cat(parts, 1), whole)
    with torch.no_grad(), attach(model, method.when("decode")) as run:
        out = run(input_ids=ids, use_cache=True)
        assert torch.equal(out.logits, model(input_ids=ids).logits)
        run.state.calls.clear()
        run(input_ids=ids[:, :1], use_cache=True, **{CACHE: out[CACHE]})
        assert run.activity().density[1] == pytest.approx(6 / (N + 1))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"budget": 0}, r"LessIsMore\.budget"),
        ({"recent": 1.5}, r"LessIsMore\.recent = 1.5: must lie from 0 to 1"),
        ({"sinks": -1}, r"LessIsMore\.sinks"),
        ({"selecting": ()}, r"LessIsMore\.selecting"),
        ({"selecting": (-1, 3)}, r"LessIsMore\.selecting"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, object], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        LessIsMore(**settings)  # type: ignore[arg-type]


def test_a_short_text_is_left_whole_and_told_so() -> None:
    assert LessIsMore(5).rests(5) == "there is room for 5 tokens, and the text has 5: budget=0.5 would act"
    assert LessIsMore(5).rests(6) is None
