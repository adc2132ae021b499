"""TokenSelect: chunks of queries see the tokens that their heads vote for."""

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
from heedful.core.positions import Positions
from heedful.methods.sparse.decode.token_select import TokenSelect
from heedful.methods.sparse.prefill.sink_window import SinkWindow

N = 19


def _bare(shape: Shape | None = None, text: Tensor | None = None) -> Bare:
    bare = Bare(shape or Shape(), text=text)
    bare.call = replace(bare.call, query=bare.q, key=bare.k, value=bare.v)
    return bare


def _by_loops(bare: Bare, method: TokenSelect, pads: list[int]) -> Tensor:
    """Which keys each query sees `[b n n]`, from the formula."""
    s = bare.shape
    out = torch.zeros(s.b, s.q, s.k, dtype=torch.bool)
    before = s.k - s.q
    for b, pad in enumerate(pads):
        positions = [before + i - pad for i in range(s.q)]
        for i, place in enumerate(positions):
            if place < 0:
                continue
            chunk = [
                j for j, other in enumerate(positions) if other >= 0 and other // method.chunk == place // method.chunk
            ]
            end = positions[chunk[-1]] + 1
            middle = [k for k in range(s.k) if method.sinks <= k - pad < end - method.window]
            room = method.budget if isinstance(method.budget, int) else -int(-method.budget * end // 1)
            room = max(0, room - method.sinks - method.window)
            votes = torch.zeros(len(middle))
            for h in range(s.h):
                mean = bare.q[b, h, chunk].mean(0)
                votes += (bare.k[b, h // (s.h // s.g), middle] @ mean).softmax(0)
            best = {middle[k] for k in votes.argsort(descending=True)[:room].tolist()}
            for k in range(pad, before + i + 1):
                out[b, i, k] = k - pad < method.sinks or k - pad >= end - method.window or k in best
    return out


@pytest.mark.parametrize("pads", [[0, 0], [0, 5]])
@pytest.mark.parametrize("shape", [Shape(), Shape(q=7), Shape(q=1), Shape(g=4)])
@pytest.mark.parametrize("method", [TokenSelect(9, 2, 4, 4), TokenSelect(0.5, 1, 4, 3), TokenSelect(5, 1, 4, 4)])
def test_the_formula(method: TokenSelect, shape: Shape, pads: list[int]) -> None:
    text = torch.arange(N) >= torch.tensor(pads)[:, None]
    bare = _bare(shape, text)
    part = bare.call.tile(slice(0, shape.q), slice(0, N))
    is_text = text[:, N - shape.q :, None]
    kept = method.select(bare.call.mask, bare.call).keeps(part.pairs)[:, 0]
    assert torch.equal(kept & is_text, _by_loops(bare, method, pads))


def test_a_budget_beyond_the_text_has_room_for_all() -> None:
    bare = _bare()
    part = bare.call.tile(slice(0, N), slice(0, N))
    kept = TokenSelect(60, 2, 4, 4).select(bare.call.mask, bare.call).keeps(part.pairs)
    assert torch.equal(kept, bare.call.mask.keeps(part.pairs).expand_as(kept))


def test_tiles_fetch_no_column_that_nobody_chose() -> None:
    bare = _bare(Shape(b=1, q=1, k=400))
    mask = TokenSelect(20, 4, 8, 8).select(bare.call.mask, bare.call)
    (lo, hi), *more = columns = mask.columns(bare.call.queries, bare.call.keys, slice(0, 1))
    kept = mask.keeps(bare.call.tile(slice(0, 1), slice(0, 400)).pairs)[0, 0, 0]
    fetched = torch.zeros(400, dtype=torch.bool)
    for lo, hi in columns:
        fetched[lo:hi] = True
    assert len(more) > 1
    assert int(kept.sum()) == 20
    assert not (kept & ~fetched).any()
    assert int(fetched.sum()) <= 20 * 16
    reference, tiled = (bare.run(TokenSelect(20, 4, 8, 8), backend)[0] for backend in ("reference", "tiled"))
    assert close_model(tiled, reference)


def test_the_cache_keeps_all_and_steps_see_few() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=24)["input_ids"]
    with torch.no_grad(), attach(model, TokenSelect(8, 1, 4, 4)) as run:
        out = run(input_ids=ids, use_cache=True)
        run.state.calls.clear()
        out = run(input_ids=ids[:, :1], **{CACHE: out[CACHE]}, use_cache=True)
    assert out[CACHE].layers[0].keys.shape[2] == 25
    assert set(run.activity().density.values()) == {8 / 25}


def test_heads_with_unlike_caches_are_refused() -> None:
    bare = _bare(Shape(q=1))
    index = torch.stack([torch.arange(N), torch.arange(N) + (torch.arange(N) < 4)]).expand(2, 2, N)
    is_filled = torch.ones(2, 2, N, dtype=torch.bool)
    is_filled[1, 0, 3] = False
    alike = torch.arange(N).expand(2, 2, N)
    for keys in (Positions(index, index), Positions(alike, alike, is_filled=is_filled)):
        with pytest.raises(SiteError, match="unlike tokens"):
            TokenSelect(5, 1, 2, 2).select(bare.call.mask, replace(bare.call, keys=keys))


def test_heads_that_hold_the_same_tokens_vote_on_them() -> None:
    bare, method = _bare(Shape(q=1)), TokenSelect(7, 1, 2, 2)
    index, is_filled = (x.expand(2, 1, N) for x in (torch.arange(N), torch.arange(N) > 2))
    one, both = (
        replace(
            bare.call, keys=Positions(index.expand(2, g, N), index.expand(2, g, N), is_filled=is_filled.expand(2, g, N))
        )
        for g in (1, 2)
    )
    found, wanted = (method.select(x.mask, x).keeps(x.tile(slice(0, 1), slice(0, N)).pairs) for x in (both, one))
    assert torch.equal(*torch.broadcast_tensors(found, wanted))
    assert (wanted & is_filled[:, None]).sum(-1).unique().tolist() == [6]  # the sink is not there


def test_a_cache_that_dropped_the_same_of_all_heads_can_be_chosen_from() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, length=24)["input_ids"]
    with torch.no_grad(), attach(model, SinkWindow(2, 12) | TokenSelect(8, 1, 4, 4)) as run:
        out = run(input_ids=ids, use_cache=True)
        run.state.calls.clear()
        run(input_ids=ids[:, :1], **{CACHE: out[CACHE]}, use_cache=True)
    assert set(run.activity().density.values()) == {8 / 14}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"budget": 0}, r"TokenSelect\.budget"),
        ({"budget": 8}, r"TokenSelect\.budget = 8: must hold the 128 sinks and the window of 512"),
        ({"sinks": -1}, r"TokenSelect\.sinks"),
        ({"chunk": 0}, r"TokenSelect\.chunk"),
        ({"window": 4, "chunk": 8}, r"TokenSelect\.window = 4: must hold the chunk of 8"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, int], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        TokenSelect(**settings)


def test_it_is_idle_where_the_budget_is_the_whole_text() -> None:
    call = _bare().call
    found = [TokenSelect(budget, 0, 1, 1).idle(call) for budget in (1.0, 0.5, 1)]
    assert found == [True, False, False]  # the number 1 is one entry


def test_a_short_text_is_left_whole_and_told_so() -> None:
    told = "there is room for {0} tokens, and the text has {0}: smaller sinks, window and budget would act"
    for budget, most in ((5, 5), (0.1, 3)):  # sinks and window always have room
        method = TokenSelect(budget, sinks=1, window=2, chunk=2)
        assert method.rests(most) == told.format(most)
        assert method.rests(most + 1) is None
