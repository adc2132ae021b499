"""One call: stages, backends, tiles, restriction to heads, and what is refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heedful import Method, Site, explain
from heedful.authoring import at, reads
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, error, within_budget
from heedful.core.call import Call
from heedful.core.errors import BackendError, DefinitionError, FieldError, SiteError
from heedful.core.mask import Blocks, Causal, Dense, Mask, Rule
from heedful.core.method import Stack
from heedful.core.stats import Sum
from heedful.engine.attend import attend
from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends import BACKENDS
from heedful.engine.needs import Needs
from heedful.engine.run_state import RunState
from heedful.engine.select import backend_named, select
from heedful.methods import SinkRate, TempScale
from heedful.native import library

from .samples import PAPER, Keep, Narrow, Scale, Shares, Zero


def run(what: Method | Stack, bare: Bare, backend: str = "reference", **job: object) -> Tensor:
    run_state = RunState(what if isinstance(what, Stack) else Stack((what,)))
    run_state.new_forward()
    plan = run_state.plan(bare.call)
    job_of = AttentionCall(plan, run_state, bare.call, **job)  # type: ignore[arg-type]
    return attend(job_of, bare.q, bare.k, bare.v, lambda needs: select(backend, needs))[0]


def by_hand(bare: Bare, bias: Tensor | None = None) -> Tensor:
    """Causal attention in float64, written out."""
    k, v = (x.double().repeat_interleave(bare.shape.h // bare.shape.g, 1) for x in (bare.k, bare.v))
    scores = bare.q.double() @ k.mT * bare.call.scale
    if bias is not None:
        scores = scores + bias
    rows = torch.arange(bare.shape.k - bare.shape.q, bare.shape.k)[:, None]
    scores = scores.masked_fill(torch.arange(bare.shape.k) > rows, -torch.inf)
    return scores.softmax(-1) @ v


NOTHING = Stack()


HERE = [name for name in BACKENDS if name != "triton"]  # which test_triton.py tries


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("shape", [Shape(), Shape(g=4), Shape(g=1), Shape(q=1), Shape(q=5), Shape(d=10, dv=6)])
def test_backends_compute_attention(backend: str, shape: Shape) -> None:
    bare = Bare(shape)
    assert close(run(NOTHING, bare, backend), by_hand(bare).float())


def in_chunks(bare: Bare, chunk: int = 3) -> Tensor:
    """Rabe and Staats (arXiv 2112.05682), row by row: chunks, a running maximum, sums rescaled with it."""
    b, h, n, _ = bare.q.shape
    group, past = h // bare.k.shape[1], bare.shape.k - n
    out = torch.zeros(b, h, n, bare.v.shape[-1], dtype=torch.float64)
    for text, head, row in itertools.product(range(b), range(h), range(n)):
        q = bare.q[text, head, row].double() * bare.call.scale
        top, total, summed = -math.inf, 0.0, torch.zeros(bare.v.shape[-1], dtype=torch.float64)
        for start in range(0, past + row + 1, chunk):
            cols = slice(start, min(start + chunk, past + row + 1))
            scores = bare.k[text, head // group, cols].double() @ q
            higher = max(top, float(scores.max()))
            part, shrink = (scores - higher).exp(), math.exp(top - higher)
            total = total * shrink + float(part.sum())
            summed = summed * shrink + part @ bare.v[text, head // group, cols].double()
            top = higher
        out[text, head, row] = summed / total
    return out


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("size", [1.0, 60.0])  # of queries: so large, an exponential of a score overflows
def test_attention_in_chunks_is_attention(backend: str, size: float) -> None:
    bare = Bare()
    bare.q *= size
    assert close(run(NOTHING, bare, backend), in_chunks(bare).float())


class Block(Method):
    """Hides the first key, as many papers do."""

    paper = PAPER
    low: float | None = None  # the score of what is hidden; None: minus infinity, which no field holds

    @at(Site.SCORES)
    def block(self, scores: Tensor, call: Call) -> Tensor:
        return scores.where(call.pairs.k > 0, -torch.inf if self.low is None else self.low)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("low", [None, torch.finfo(torch.float32).min])
def test_an_edit_that_hides_all_that_a_query_may_see_shows_it_nothing_else(backend: str, low: float | None) -> None:
    bare = Bare()
    before = run(Block(low), bare, backend)
    if low is None:
        assert not before[:, :, 0].any()
    bare.v[:, :, 3:] += 100
    assert torch.equal(run(Block(low), bare, backend)[:, :, :3], before[:, :, :3])


class Smeared(Method):
    """Scores times the sum of their row, of which minus infinity makes no number."""

    paper = PAPER

    @at(Site.SCORES)
    def smear(self, scores: Tensor, call: Call) -> Tensor:
        seen = scores if call.keep is None else scores.masked_fill(~call.keep, 0.0)
        return scores * seen.sum(-1, keepdim=True)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("rules", [None, ()], ids=["causal", "both sides"])
def test_a_pair_that_a_step_hid_is_masked_for_those_that_follow(backend: str, rules: tuple[Rule, ...] | None) -> None:
    class Seen(Method):
        paper = PAPER

        @at(Site.PATTERN)
        def look(self, weights: Tensor, call: Call) -> Tensor:
            assert call.keep is not None
            assert not call.keep[..., 0].any()
            return weights

    found = run(Block() | Smeared() | Seen(), Bare(rules=rules), backend)
    bare = Bare(rules=rules)
    rows = torch.arange(bare.shape.q)[:, None]
    later = torch.arange(bare.shape.k) > rows if rules is None else torch.zeros(len(rows), bare.shape.k).bool()
    hidden = later | (torch.arange(bare.shape.k) == 0)
    k, v = (x.double().repeat_interleave(bare.shape.h // bare.shape.g, 1) for x in (bare.k, bare.v))
    scores = bare.q.double() @ k.mT * bare.call.scale
    scores = scores * scores.masked_fill(hidden, 0.0).sum(-1, keepdim=True)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    assert close(found, (weights @ v).float())


class Tripled(Method):
    paper = PAPER

    @at(Site.KEY)
    def triple(self, k: Tensor, call: Call) -> Tensor:
        return k.mul_(3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_in_place_is_an_error(mode: type) -> None:
    with mode():
        bare = Bare()
        with pytest.raises(SiteError, match="changed its input in place"):
            run(Tripled(), bare)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 40), q=st.integers(1, 30), extra=st.integers(0, 10), window=st.integers(1, 12),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]),
)  # fmt: skip
def test_tiles_of_any_size_agree(rows: int, q: int, extra: int, window: int, heads: tuple[int, int]) -> None:
    bare = Bare(Shape(h=heads[0], g=heads[1], q=q, k=q + extra))
    whole, _ = bare.run(Narrow(window), "reference")
    tiles, _ = bare.run(Narrow(window), "tiled", tile_rows=rows)
    assert close(tiles, whole)


@settings(max_examples=20)
@given(seed=st.integers(0, 99), rows=st.integers(1, 20), size=st.sampled_from([2, 4, 5]))
def test_a_block_table_is_a_table_of_its_blocks(seed: int, rows: int, size: int) -> None:
    blocks = torch.rand(1, 4, -(-19 // size), -(-19 // size), generator=torch.Generator().manual_seed(seed)) < 0.4
    table = blocks.repeat_interleave(size, 2).repeat_interleave(size, 3)[..., :19, :19]
    wanted, _ = Bare(rules=(Causal(), Dense(table))).run(Scale(1.0), "reference")
    bare = Bare(rules=(Causal(), Blocks(blocks, size)))
    for backend in ("reference", "tiled"):
        assert close(bare.run(Scale(1.0), backend, tile_rows=rows)[0], wanted)


def test_blocks_that_nobody_computes_are_never_touched() -> None:
    blocks = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    blocks[..., 0], blocks[..., range(5), range(5)] = True, True
    bare = Bare(rules=(Causal(), Blocks(blocks, 4)))
    _, told = bare.run(Keep(), "tiled", tile_rows=4)
    widths = {name: pattern.shape[-1] for name, pattern in told["keep, layer 0"].tensors().items()}
    assert widths == {"000.00000": 4, "000.00004": 8, "000.00008": 8, "000.00012": 8, "000.00016": 7}


def test_a_tile_knows_its_place_among_the_keys() -> None:
    part = Bare().call.tile(slice(3, 5), torch.tensor([0, 7, 9]))
    laid = part.by_key(torch.tensor([[1.0, 2.0, 3.0]]), 19)
    assert laid.nonzero()[:, 1].tolist() == [0, 7, 9]
    assert part.distance.shape == (1, 1, 2, 3)
    assert part.distance[0, 0, 1].tolist() == [4, -3, -5]


@pytest.mark.parametrize("backend", ["sdpa", "tiled", "reference"])
def test_a_bias_is_added(backend: str) -> None:
    bare = Bare()
    bias = torch.randn(1, 4, 19, 19, dtype=torch.float64)
    assert close(run(NOTHING, bare, backend, bias=bias.float()), by_hand(bare, bias).float())


@pytest.mark.parametrize("backend", ["native", "tiled", "reference"])
def test_sink_logits_take_their_share(backend: str) -> None:
    bare = Bare()
    sink = torch.full((1, 4, 1, 1), 30.0)
    assert float(run(NOTHING, bare, backend, sink=sink).abs().max()) < 1e-6
    assert close(run(NOTHING, bare, backend, sink=-1e4 * sink), by_hand(bare).float())


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, d) for b in HERE for d in (torch.bfloat16, torch.float16) if (b, d) != ("native", torch.float16)],
)
def test_low_precision_stays_within_what_low_precision_costs(backend: str, dtype: torch.dtype) -> None:
    bare = Bare(dtype=dtype)
    k, v = (x.repeat_interleave(2, 1) for x in (bare.k, bare.v))
    scores = (bare.q @ k.mT * bare.call.scale).masked_fill(torch.ones(19, 19).triu(1).bool(), -torch.inf)
    eager = scores.softmax(-1) @ v
    assert within_budget(run(NOTHING, bare, backend), eager, by_hand(bare))


def test_methods_act_in_the_order_of_sites_then_of_parts() -> None:
    bare = Bare()
    plain = run(NOTHING, bare)
    assert close(run(Scale(2.0) | Scale(3.0), bare), 6 * plain)
    assert not bool(run(Scale(2.0) | Zero(), bare).any())


def test_heads_restrict_an_edit_and_a_reader() -> None:
    bare = Bare()
    plain, scaled = run(NOTHING, bare), run(Stack((Scale(2.0).on(heads=[1, 3]),)), bare)
    assert torch.equal(scaled[:, [0, 2]], plain[:, [0, 2]])
    assert close(scaled[:, [1, 3]], 2 * plain[:, [1, 3]])
    narrow = run(Stack((Narrow(2).on(heads=[0]),)), bare)
    assert torch.equal(narrow[:, 1:], plain[:, 1:])
    assert not torch.equal(narrow[:, 0], plain[:, 0])
    run_state = RunState(Stack((Shares().on(heads=[2]),)))
    run_state.new_forward()
    plan = run_state.plan(bare.call)
    attend(AttentionCall(plan, run_state, bare.call), bare.q, bare.k, bare.v, lambda _: BACKENDS["tiled"])
    run_state.close_call(plan, bare.call)
    assert run_state.statistics[0, "first", 0].value.shape == (1,)


class Halves(Method):
    """Half of softmax's weights."""

    paper = PAPER

    @at(Site.NORMALISE)
    def halve(self, scores: Tensor, call: Call) -> Tensor:
        return scores.softmax(-1) / 2


class SeesRules(Method):
    """How many rules the mask has."""

    paper = PAPER

    @reads(Site.MASK)
    def count(self, mask: Mask, call: Call) -> Sum:
        return Sum.of(torch.tensor([len(mask.rules), call.heads]))


def test_a_reader_of_the_mask_for_some_heads_is_handed_all_of_it() -> None:
    bare = Bare()
    run_state = RunState(Stack((SeesRules().on(heads=[2]),)))
    run_state.new_forward()
    plan = run_state.plan(bare.call)
    attend(AttentionCall(plan, run_state, bare.call), bare.q, bare.k, bare.v, lambda _: BACKENDS["tiled"])
    run_state.close_call(plan, bare.call)
    assert run_state.statistics[0, "count", 0].value.tolist() == [1, 4]


class Double(Method):
    """Doubles the keys."""

    paper = PAPER

    @at(Site.KEY)
    def double(self, k: Tensor, call: Call) -> Tensor:
        return 2 * k


def test_key_heads_are_chosen_by_whole_groups() -> None:
    bare = Bare()
    half = run(Stack((Double().on(heads=[2, 3]),)), bare)
    assert torch.equal(half[:, :2], run(NOTHING, bare)[:, :2])
    assert torch.equal(half[:, 2:], run(Double(), bare)[:, 2:])
    with pytest.raises(SiteError, match=r"shared by groups of 2 heads.*name whole groups, for example heads=\[0, 1\]"):
        run(Stack((Double().on(heads=[1, 2]),)), bare)
    with pytest.raises(SiteError, match="heads must be below 4"):
        run(Stack((Scale().on(heads=[9]),)), bare)


def bad(site: Site, result: object, read: bool = False) -> Method:
    mark = reads if read else at
    body = {"paper": PAPER, "edit": mark(site)(lambda self, x, call: result), "__module__": __name__}
    return type("Bad", (Method,), body)()


@pytest.mark.parametrize(
    ("method", "error_type", "message"),
    [
        (bad(Site.QUERY, torch.ones(2)), SiteError, r"must return a tensor of shape \[b h q d\] = \(2, 4, 19, 8\)"),
        (bad(Site.HEAD_OUTPUT, None), SiteError, "got NoneType"),
        (bad(Site.MASK, Mask()), SiteError, "must return the mask it was given, narrowed"),
        (bad(Site.NORMALISE, torch.ones(1)), SiteError, "must return weights of shape"),
        (bad(Site.MIX, torch.ones(1)), SiteError, "must return a tensor of shape"),
        (bad(Site.PATTERN, torch.ones(1), read=True), DefinitionError, "returns a statistic or None, not Tensor"),
        (bad(Site.NORMALISE, None, read=True), SiteError, "NORMALISE has nothing to read"),
    ],
)
def test_edits_that_return_what_a_site_cannot_hold(method: Method, error_type: type, message: str) -> None:
    with pytest.raises(error_type, match=message):
        run(method, Bare())


def test_mechanisms_without_a_map_refuse_what_they_cannot_honour() -> None:
    bare = Bare(rules=(Causal(), Dense(torch.ones(19, 19, dtype=torch.bool)[None, None])))
    with pytest.raises(SiteError, match="can honour causality and padding only"):
        run(bad(Site.MIX, None), bare)


def test_normalisers_refuse_learned_sinks() -> None:
    with pytest.raises(SiteError, match="learned sink logits, which only softmax knows"):
        run(bad(Site.NORMALISE, None), Bare(), sink=torch.zeros(1, 4, 1, 1))


def test_the_cheapest_backend_that_can_is_chosen_and_explained() -> None:
    assert select("auto", Needs()).name == "sdpa"
    assert select("auto", Needs.of(Stack((Shares(),)).steps())).name == "tiled"
    fast = "tiled" if isinstance(library(), str) else "native"
    assert select("auto", Needs.of(Stack((Narrow(),)).steps())).name == fast
    assert select("auto", Needs.of((), softcap=True)).name == fast
    assert select("auto", Needs.of((), pattern=True)).name == "reference"
    assert str(explain("tempscale(tau=0.5) | sinkrate")) == str(explain(TempScale(0.5) | SinkRate()))
    text = str(explain(Shares()))
    assert "tiled      chosen" in text
    assert "sdpa       no\n           - Shares() at PATTERN needs the map" in text
    assert "the model's own attention runs" in str(explain(bad(Site.OUTPUT, None)))
    assert "brings its own computation" in str(explain(bad(Site.MIX, None)))


def test_a_backend_asked_for_is_never_changed() -> None:
    with pytest.raises(BackendError, match="backend 'sdpa' cannot serve this call: Zero"):
        select("sdpa", Needs.of(Stack((Zero(),)).steps(), softcap=True, sink=True))
    with pytest.raises(BackendError, match=r"Narrow\(size=4\) at MASK narrows the mask, which this kernel takes"):
        select("sdpa", Needs.of(Stack((Narrow(),)).steps()))
    with pytest.raises(FieldError, match="must be one of auto, sdpa, native, triton, tiled, reference"):
        backend_named("flash")


def test_every_reason_against_a_backend_is_given_at_once() -> None:
    with pytest.raises(BackendError) as caught:
        select("sdpa", Needs.of(Stack((Zero(),)).steps(), softcap=True, sink=True, pattern=True))
    assert len(str(caught.value).split(";")) == 4


def test_values_that_only_one_reader_sees_do_not_change_the_output() -> None:
    bare = Bare()
    reader = bad(Site.SCORES, Sum.of(torch.ones(1)), read=True)
    assert torch.equal(run(reader, bare), run(NOTHING, bare))


def test_error_is_infinite_where_only_one_is_nan() -> None:
    assert error(torch.tensor([torch.nan]), torch.tensor([1.0])) == float("inf")
    assert error(torch.tensor([torch.nan]), torch.tensor([torch.nan])) == 0.0


def test_a_call_s_places_are_all_of_it_but_what_it_computes_with() -> None:
    bare = Bare()
    row = torch.zeros(1, 1, 1, 19)
    call = replace(bare.call, ids=row.long()[0, 0], query=bare.q, key=bare.k, value=bare.v, bias=row)
    call = replace(call, hidden=bare.hidden, rotate=torch.abs)
    kept = {field.name: getattr(call.places, field.name) for field in fields(call)}
    lost = {name for name, value in kept.items() if value is not getattr(call, name)}
    assert lost == {"ids", "query", "key", "value", "bias", "hidden", "rotate"}
    assert all(kept[name] is None for name in lost)
