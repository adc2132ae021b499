"""What the methods that skip blocks have in common: the grid, its tables as masks, and that kernels skip them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.speed import sparse
from benchmarks.speed.bars import fastest
from benchmarks.speed.sparse import best
from heedful import attach, models
from heedful.catalogue import find
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.call import Call, Phase
from heedful.core.errors import FieldError
from heedful.core.mask import Blocks, Causal, Dense, First, Mask, OnHeads, Padding, Rule, Window
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, at
from heedful.kit.blocks import BlockSparse, Grid, cover, density, fold, hide, means
from heedful.methods.sparse.prefill.hylra import HyLRA
from heedful.methods.sparse.prefill.sink_window import SinkWindow
from heedful.methods.sparse.prefill.sparge_attn import SpargeAttn

PADDED = torch.arange(19)[None] >= torch.tensor([[0], [5]])
LONG = torch.arange(150)[None] >= torch.tensor([[0], [5]])  # rows and blocks of which methods read a few at a time
TEXTS = pytest.mark.parametrize("text", [None, PADDED, LONG], ids=["plain", "padded", "long"])
SETTINGS: dict[str, dict[str, Any]] = {
    "SpargeAttn": dict(mass=0.5, alike=-1.0),
    "FlexPrefill": dict(mass=0.4, least=0),
    "SampleAttention": dict(mass=0.3, rows=0.1, window=0.0),
    "QAdA": dict(share=0.25, window=4, sinks=1),
}


def call_of(bare: Bare) -> Call:
    return replace(bare.call, query=bare.q, key=bare.k, value=bare.v)


def bare_of(text: Tensor | None) -> Bare:
    n = 19 if text is None else text.shape[1]
    return Bare(Shape(q=n, k=n), text=text)


def grid_of(bare: Bare, size: int) -> Grid:
    grid = Grid.of(call_of(bare), size)
    assert grid is not None
    return grid


def whole_table(table: Tensor, size: int) -> Tensor:
    return table.repeat_interleave(size, -2).repeat_interleave(size, -1)


def true_map(bare: Bare, text: int) -> Tensor:
    """The weights of one text, every head, by the plain formula; rows that see nothing are zeros."""
    call, h = bare.call, bare.shape.h
    pairs = call.tile(slice(0, bare.shape.q), slice(0, bare.shape.k)).pairs
    keep = call.mask.keeps(pairs)
    keep = torch.ones(1, 1, bare.shape.q, bare.shape.k, dtype=torch.bool) if keep is None else keep
    keep = keep.expand(bare.shape.b, h, -1, -1)[text]
    scores = bare.q[text] @ call.spread(bare.k)[text].mT * call.scale
    return scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num()


@pytest.mark.parametrize("mass", [0.3, 0.8, 1.0])
def test_cover_takes_the_fewest_that_reach_a_share(mass: float) -> None:
    weight = torch.rand(4, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cover(weight / 100, mass), cover(weight, mass))
    for row, chosen in zip(weight, cover(weight, mass), strict=True):
        taken = sorted(row.tolist(), reverse=True)[: int(chosen.sum())]
        assert sum(row[chosen].tolist()) == pytest.approx(sum(taken))
        if mass < 1:
            assert sum(taken) >= mass * float(row.sum()) > sum(taken[:-1])
        else:
            assert chosen.all()


@pytest.mark.parametrize("tail", [0.0, 1.0, 6.0])
def test_cover_needs_no_whole_order(tail: float) -> None:
    weight = (tail * torch.randn(3, 4, 300, generator=torch.Generator().manual_seed(0))).softmax(-1)
    weight[0, 0, 50:] = 0
    values, order = weight.sort(dim=-1, descending=True)
    for mass in (0.01, 0.5, 0.9, 0.999):
        taken = values.cumsum(-1) - values < mass * weight.sum(-1, keepdim=True)
        found = cover(weight, mass)
        if tail:
            assert torch.equal(found, torch.zeros_like(taken).scatter(-1, order, taken)), mass
        assert torch.equal(found.sum(-1)[1:], taken.sum(-1)[1:]), mass
    assert not cover(torch.zeros(2, 5), 0.5).any()


def test_fold_begins_where_a_text_does() -> None:
    x = torch.arange(1, 8).view(1, 1, 7, 1)
    found = fold(x, 3, torch.tensor([0, 2]))[:, 0, ..., 0]
    assert found.tolist() == [[[1, 2, 3], [4, 5, 6], [7, 0, 0]], [[3, 4, 5], [6, 7, 0], [0, 0, 0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hidden_scores_are_the_least_number(dtype: torch.dtype) -> None:
    scores = torch.tensor([[3.0, -40.0], [1.0, 2.0]], dtype=dtype)
    hide(scores, torch.tensor([[True, False], [True, True]]))
    least = torch.finfo(dtype).min
    assert scores.tolist() == [[least, -40.0], [least, least]]


def test_means_leave_out_what_is_not_text() -> None:
    x = torch.tensor([1.0, 3.0, 5.0, 9.0]).view(1, 1, 2, 2, 1)
    is_text = torch.tensor([True, True, False, True]).view(1, 1, 2, 2)
    assert means(x, is_text).flatten().tolist() == [2.0, 9.0]
    assert means(x, torch.ones_like(is_text)).flatten().tolist() == [2.0, 7.0]


@pytest.mark.parametrize("rules", [(Causal(),), (Causal(), Window(4) | First(2)), ()], ids=["causal", "sinks", "all"])
@pytest.mark.parametrize("shape", [Shape(), Shape(q=9)], ids=["prompt", "chunk"])
def test_open_blocks_are_those_with_a_pair(rules: tuple[Rule, ...], shape: Shape) -> None:
    bare = Bare(shape, rules=rules)
    grid = grid_of(bare, 4)
    pairs = bare.call.tile(slice(0, shape.q), slice(0, 19)).pairs
    kept = bare.call.mask.keeps(pairs)
    kept = torch.ones(1, 1, shape.q, 19, dtype=torch.bool) if kept is None else kept
    wanted = torch.nn.functional.max_pool2d(kept.float()[:, 0], 4, ceil_mode=True) > 0
    assert torch.equal(grid.open[:, 0], wanted)


def test_padded_texts_have_the_grid_that_they_have_alone() -> None:
    grid = grid_of(Bare(text=PADDED), 4)
    alone = grid_of(Bare(Shape(b=1, q=14, k=14)), 4)
    assert grid.length.tolist() == [19, 14]
    assert torch.equal(grid.open[1, :, :4, :4], alone.open[0])
    assert not grid.open[1, :, 4:].any()
    assert not grid.open[1, ..., 4:].any()
    assert grid.cols.sum((1, 2, 3)).tolist() == [19, 14]


@pytest.mark.parametrize(
    "rules",
    [(Causal(),), (Causal(), Window(4)), (Causal(), Window(4) | First(2)), ()],
    ids=["causal", "window", "sinks", "all"],
)
@pytest.mark.parametrize("text", [None, PADDED], ids=["plain", "padded"])
def test_weights_of_some_rows_are_true(text: Tensor | None, rules: tuple[Rule, ...]) -> None:
    bare = Bare(text=text, rules=rules if text is None else (*rules, Padding(text)))
    at = torch.tensor([[0, 3, 7, 13, 18]])
    for chunk, rows in grid_of(bare, 4).weights(at, 2):
        for b, pad in enumerate((0, 0 if text is None else 5)):
            for i, row in enumerate(rows[b].tolist()):
                found = chunk[b, :, i].flatten(1)
                wanted = torch.zeros(4, 20)
                if row + pad < 19:
                    wanted[:, : 19 - pad] = true_map(bare, b)[:, row + pad, pad:]
                assert close(found, wanted[:, : found.shape[1]])
                assert not wanted[:, found.shape[1] :].any()


def test_layers_of_one_forward_share_a_grid_and_nothing_else() -> None:
    one, other = call_of(Bare()), call_of(Bare(seed=1))
    first = Grid.of(one, 4)
    layer = replace(one, layer=1, query=other.query, key=other.key)
    second = Grid.of(layer, 4)
    assert first is not None
    assert second is not None
    assert second.open is first.open
    assert second.call is layer
    assert torch.equal(second.query.flatten(2, 3)[:, :, :19], other.query)
    finer, narrow = Grid.of(layer, 2), Grid.of(replace(layer, mask=layer.mask & Window(4)), 4)
    assert narrow is not None
    assert finer is not None
    assert not torch.equal(narrow.open, first.open)
    assert finer.open.shape[-1] == 10
    assert all(grid.call.query is None for grid in one.state.forward.values())  # nothing of a layer stays behind


def test_scores_are_capped_as_the_model_caps_them() -> None:
    bare = Bare()
    call = replace(call_of(bare), softcap=0.5)
    grid = Grid.of(call, 1)
    assert grid is not None
    pairs = call.tile(slice(0, 19), slice(0, 19)).pairs
    scores = 0.5 * torch.tanh(bare.q @ call.spread(bare.k).mT * call.scale / 0.5)
    wanted = scores.masked_fill(~call.mask.keeps(pairs), -torch.inf).softmax(-1)
    (found, _) = next(grid.weights(torch.arange(19)[None]))
    assert close(found[..., 0], wanted)
    assert close(grid.pooled(means(grid.query, grid.rows), means(grid.key, grid.cols)), wanted)


def test_a_band_holds_the_newest_keys() -> None:
    grid = grid_of(Bare(Shape(q=9)), 4)
    for width in (1, 3, 6):
        wanted = torch.zeros(3, 5, dtype=torch.bool)
        for row in range(12):
            for col in range(max(0, 10 + row - width + 1), min(19, 10 + row) + 1):
                wanted[row // 4, col // 4] = True
        assert torch.equal(grid.band(width)[0, 0], wanted), width


def test_a_text_that_needs_most_blocks_keeps_all_of_them() -> None:
    bare = Bare()
    grid = grid_of(bare, 4)
    table = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    table[0] = True
    mask = grid.narrow(bare.call.mask, table, 0.8)
    (rule,) = mask.blocks
    assert torch.equal(rule.table[0], grid.open[0])
    assert torch.equal(rule.table[1, 0], torch.eye(5, dtype=torch.bool))
    assert density(rule.table, grid.open).tolist() == [1.0, pytest.approx(5 / 15)]
    assert grid.narrow(bare.call.mask, table[:1], 0.8) is bare.call.mask


def test_blocks_that_begin_with_each_text() -> None:
    table = torch.rand(2, 2, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    first = torch.tensor([[0, 0], [5, 5]])
    wanted = torch.zeros(2, 2, 19, 19, dtype=torch.bool)
    for row in range(19):
        for col in range(19):
            for text, pad in enumerate((0, 5)):
                wanted[text, :, row, col] = table[text, :, max(0, row - pad) // 4, max(0, col - pad) // 4]
    rule = Blocks(table, 4, first)
    for rows in (slice(0, 19), slice(3, 8)):
        for cols in (slice(0, 19), torch.tensor([2, 6, 18])):
            found = rule.keeps(Bare().call.tile(rows, cols).pairs)
            assert torch.equal(found, wanted.repeat_interleave(2, 1)[..., rows, :][..., cols])
        inside = torch.zeros(19, dtype=torch.bool)
        for lo, hi in rule.columns(rows):
            inside[lo:hi] = True
        assert torch.equal(inside, wanted[..., rows, :].flatten(0, -2).any(0))


def test_blocks_for_some_heads_stay_blocks() -> None:
    table = torch.rand(1, 2, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    pairs = Bare().call.tile(slice(0, 19), slice(0, 19)).pairs
    rule = Blocks(table, 4).on((0, 2), 4)
    assert isinstance(rule, Blocks)
    assert torch.equal(rule.keeps(pairs), OnHeads(Blocks(table, 4), (0, 2), 4).keeps(pairs))
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model, length=100)
    part = SpargeAttn(0.3, -1.0, block=32, most=1.0).on(heads=[0, 3])
    with torch.no_grad(), attach(model, part, backend="native") as run:
        found = run(**inputs).logits
    with torch.no_grad(), attach(model, part, backend="reference") as run:
        assert close(found, run(**inputs).logits, 1024)


def test_two_tables_are_joined_into_one() -> None:
    draw = torch.Generator().manual_seed(0)
    fine = Blocks(torch.rand(1, 4, 7, 7, generator=draw) < 0.7, 32)
    wide = Blocks(torch.rand(2, 2, 3, 4, generator=draw) < 0.7, 96)
    bare = Bare(Shape(q=200, k=200), rules=(Causal(), fine, wide))
    (one,) = bare.call.mask.blocks
    assert one.size == 32
    pairs = bare.call.tile(slice(0, 200), slice(0, 200)).pairs
    assert torch.equal(one.keeps(pairs), fine.keeps(pairs) & wide.keeps(pairs))
    assert close(bare.run(Same(), "native")[0], bare.run(Same(), "reference")[0])
    moved = Blocks(torch.ones(1, 1, 7, 7, dtype=torch.bool), 32, torch.tensor([[3, 3]]))
    assert Mask((fine, moved)).blocks == (fine, moved)


class Lent(HyLRA):
    """A layer behind a full one: its forward's state holds what that one chose."""

    def choose(self, grid: Grid) -> Tensor | None:
        super().choose(replace(grid, call=replace(grid.call, layer=0)))
        return super().choose(replace(grid, call=replace(grid.call, layer=1)))


class Same(Method):
    """Changes nothing, so that our own backends have to serve."""

    paper = Paper("none", "x", "x", 2026)

    @at(Site.QUERY)
    def keep(self, q: Tensor, call: Call) -> Tensor:
        return q


@pytest.mark.parametrize("name", [*SETTINGS, "HyLRA"])
@pytest.mark.parametrize("shape", [Shape(q=300, k=300, d=16), Shape(q=150, k=333, d=16)], ids=["prompt", "chunk"])
def test_kernels_skip_what_is_chosen(name: str, shape: Shape) -> None:
    kind = Lent if name == "HyLRA" else find(name)
    assert issubclass(kind, BlockSparse)
    method = kind(**SETTINGS.get(name, {}), block=32, most=1.0)
    bare = Bare(shape)
    wanted, _ = bare.run(method, "reference")
    assert close(bare.run(method, "native")[0], wanted)
    assert close(bare.run(method, "tiled", tile_rows=50)[0], wanted)
    mask = method.skip(bare.call.mask, call_of(bare))
    assert 0.1 < float(density(mask.blocks[0].table, grid_of(bare, 32).open).mean()) < 0.9


@pytest.mark.parametrize("backend", ["native", "tiled"])
def test_sinks_and_window_read_nothing_between(backend: str) -> None:
    bare = Bare(Shape(q=512, k=512))
    method = SinkWindow(4, 64)
    wanted, _ = bare.run(method, backend)
    bare.k[:, :, 64:256] = bare.v[:, :, 64:256] = float("nan")
    found, _ = bare.run(method, backend, tile_rows=32 if backend == "tiled" else None)
    assert close(found[:, :, 416:], wanted[:, :, 416:])


@pytest.mark.parametrize("name", [*SETTINGS, "HyLRA"])
def test_what_stays_dense(name: str) -> None:
    kind = find(name)
    assert issubclass(kind, BlockSparse)
    call = call_of(Bare())
    for method, seen in (
        (kind.example(), replace(call, phase=Phase.DECODE)),
        (kind.example(), replace(call, cross=True)),
        (kind.neutral(), call),
    ):
        assert method is not None
        assert method.idle(seen)
    comb = Mask((Dense(torch.ones(19, 19, dtype=torch.bool).tril() & (torch.arange(19) % 2 == 0)),))
    assert kind.example().skip(comb, call) is comb


@pytest.mark.parametrize("name", [*SETTINGS, "HyLRA"])
@pytest.mark.parametrize(("field", "value"), [("block", 0), ("most", 1.5)])
def test_wrong_fields_are_refused(name: str, field: str, value: float) -> None:
    with pytest.raises(FieldError, match=rf"{name}\.{field}"):
        find(name)(**{field: value})


@pytest.mark.parametrize(("rises", "ratio"), [((0.004, 0.2), 0.7), ((0.05, 0.2), float("inf")), ((None, None), None)])
def test_a_speed_bar_is_missed_where_every_method_costs_too_much(
    rises: tuple[float | None, ...], ratio: float | None
) -> None:
    rows = [
        {"method": name, "tokens": 8192, "rise": rise, "found": {"attention": {"ratio": time}}}
        for name, rise, time in zip("ab", rises, (0.7, 0.3), strict=True)
    ]
    found = best(rows)
    assert [fastest(row) for row in found] == ([] if ratio is None else [ratio])
    assert all(row["best"] == "a" for row in found)


def test_a_bench_that_goes_on_measures_what_it_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Method | None] = []

    def loss(model: Any, ids: Tensor, what: Method | None) -> tuple[float, float]:
        asked.append(what)
        return 2.2, 0.25

    monkeypatch.setattr(sparse, "loss", loss)
    monkeypatch.setattr(sparse, "METHODS", {"a": SinkWindow(4, 8), "b": SinkWindow(4, 16), "c": SinkWindow(4, 32)})
    times = {"found": {"attention": {"ratio": 0.5}}, "tokens": 20}
    rows = [{"method": name, "settings": repr(x), **times} for name, x in sparse.METHODS.items()]
    known = [
        {"settings": repr(SinkWindow(4, 8)), "tokens": 20, "loss": 2.0, "rise": 0.3, "density_model": 0.5},
        {"settings": repr(SinkWindow(4, 16)), "tokens": 30, "loss": 1.0, "rise": 0.4, "density_model": 0.5},
        {"settings": repr(SinkWindow(4, 32)), "tokens": 20, "rise": None},
    ]
    kept: list[int] = []
    sparse.losses(None, torch.zeros(1, 20), rows, known, lambda: kept.append(sum("rise" in row for row in rows)))
    assert asked == [SinkWindow(4, 16), SinkWindow(4, 32)]
    assert [row["rise"] for row in rows] == [0.3, pytest.approx(0.1), pytest.approx(0.1)]
    assert [row["loss"] for row in rows] == [2.0, 2.0, 2.0]
    assert kept == [1, 2, 3]
    sparse.losses(None, torch.zeros(1, 20), rows, [], lambda: None)
    assert asked[2] is None
    assert len(asked) == 6
