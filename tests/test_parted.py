"""Parts of a call that are gathered with the keys that they see: as the whole has it, there and back."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from heedful.conformance.tolerances import close, within_budget
from heedful.core.flags import apart, meets
from heedful.core.mask import Ahead, Causal, Rule
from heedful.core.method import Method
from heedful.core.positions import Positions
from heedful.core.regions import marks
from heedful.core.sites import adds
from heedful.engine.backends import native, parted, tiled
from heedful.kit.chosen import Chosen, Reached, by_block, meeting
from heedful.methods import MoBA

from .kernel_calls import BIASES, WEIGHINGS, Halved, Same, Weighed, a_bias, a_call, compare_pulled, draw, run
from .samples import PAPER
from .test_native import pytestmark
from .test_native_extremes import path

__all__ = ["path", "pytestmark"]  # these tests too need a kernel, and run on each of its paths

SHAPE = (2, 4, 2, 40, 40, 16, 16)


def chosen(texts: int, heads: int, parts: int, seed: int = 0, share: float = 0.2) -> tuple[Tensor, Tensor]:
    """Which queries and keys are in each of some parts, `[b h parts n]`."""
    made = torch.Generator().manual_seed(seed)
    asking, giving = (torch.rand(texts, heads, parts, 40, generator=made) < share for _ in range(2))
    return asking, giving


def groups(texts: int, heads: int) -> Reached:
    """Each query is in one of three parts, or in none."""
    made = torch.Generator().manual_seed(1)
    number = torch.randint(0, 4, (texts, heads, 1, 40), generator=made)
    asking = number == torch.arange(3)[:, None]
    return meet(asking, chosen(texts, heads, 3)[1], shared=False)


def meet(asking: Tensor, giving: Tensor, shared: bool) -> Reached:
    codes = [(x << torch.arange(x.shape[2])[:, None]).sum(2).short() for x in (asking.long(), giving.long())]

    def alone(rows: Tensor, cols: Tensor, those: slice) -> Tensor:
        earlier = (1 << torch.arange(asking.shape[2])[those]).short()[:, None] - 1
        one, other = (
            x[:, :, None].expand(-1, -1, rows.shape[2], -1).gather(-1, at)
            for x, at in zip(codes, (rows, cols), strict=True)
        )
        return apart(((one & earlier)[..., None], other[..., None, :]))

    def pick(rows: slice, cols: slice | Tensor) -> Tensor:
        return meets((codes[0][:, :, rows, None], codes[1][:, :, None, cols]))

    gather = lambda: meeting(asking, giving, alone if shared else None)  # noqa: E731
    return Reached(pick, lambda rows: torch.ones(40, dtype=torch.bool), gather=gather)


def clusters(texts: int, heads: int) -> Reached:
    """Queries are in none, one or several of seven parts."""
    return meet(*chosen(texts, heads, 7), shared=True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Asked whenever parts are gathered; they are, whatever they cost."""
    monkeypatch.setattr("heedful.kit.chosen.SPARSE", 9.0)
    seen = Mock()
    for module, name in ((tiled, "in_parts"), (native, "merged")):

        def noted(act: Any, *given: Any) -> Tensor:
            seen()
            return act(*given)

        monkeypatch.setattr(module, name, partial(noted, getattr(module, name)))
    return seen


class Near(Method):
    """Adds what goes by places and queries of the tile alone."""

    paper = PAPER
    anywhere = True

    @adds
    def lean(self, call: Any) -> Tensor:
        assert call.query is not None
        asked = call.query[:, :, call.rows].mean(-1, keepdim=True)
        return asked * (call.pairs.q - call.pairs.k).to(asked.dtype).sin()


class Far(Near):
    """The same, and not said to be of a tile alone."""

    anywhere = False


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("made", [groups, clusters])
def test_there_and_back(
    made: Any, texts: int, heads: int, cut: bool, asked: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cut:
        monkeypatch.setattr(parted, "TILE_BYTES", 1)
        monkeypatch.setattr(parted, "KEPT", 0)
    rule = made(texts, heads)
    q, k, v = draw(SHAPE)
    for backend in ("native", *(("tiled",) if made is groups else ())):
        before = asked.call_count
        found = run(backend, Same(), q, k, v, a_call(SHAPE, (rule,)))
        want = run("reference", Same(), q, k, v, a_call(SHAPE, (rule,)))
        assert asked.call_count == before + 1
        assert close(found, want)
        compare_pulled(backend, SHAPE, (rule,), softcap=3.0)


@pytest.mark.parametrize("how", WEIGHINGS, ids=repr)
def test_weights_that_are_each_made_of_their_own_score(how: Any, asked: Mock) -> None:
    for rule, gathered in ((groups(2, 1), True), (clusters(2, 1), False)):
        compare_pulled("native", SHAPE, (rule,), method=Weighed(how))
        assert asked.called == gathered
        asked.reset_mock()


@pytest.mark.parametrize("backend", ["native", "tiled"])
@pytest.mark.parametrize("method", [Near(), Far()], ids=repr)
@pytest.mark.parametrize("heads", [1, 4])
def test_what_scores_gain(method: Method, heads: int, backend: str, asked: Mock) -> None:
    compare_pulled(backend, SHAPE, (groups(1, heads),), method=method)
    assert asked.called == (heads == 1 and method.anywhere)


COLUMNS = Positions.row(0, 40)
PLACES = {
    "in threes": (Positions(COLUMNS.index, COLUMNS.index // 2 * 3),) * 2,
    "behind keys": (Positions.row(7, 40), COLUMNS),
    "behind padding": (Positions.row(0, 40, pad=torch.tensor([1, 3])), COLUMNS),
}


@pytest.mark.parametrize(("queries", "keys"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("backend", ["native", "tiled"])
def test_places_that_are_not_columns_go_with_their_tokens(
    backend: str, queries: Positions, keys: Positions, asked: Mock
) -> None:
    call = replace(a_call(SHAPE, (groups(1, 1),)), queries=queries, keys=keys)
    found, want = (run(name, Near(), *draw(SHAPE), call) for name in (backend, "reference"))
    assert close(found, want)
    assert asked.called


@pytest.mark.parametrize("method", [Near(), Far()], ids=repr)
def test_what_scores_gain_where_parts_share_queries(method: Method, asked: Mock) -> None:
    compare_pulled("native", SHAPE, (clusters(1, 1),), method=method)
    assert not asked.called


def others(rule: Reached) -> dict[str, tuple[tuple[Rule, ...], dict[str, Any]]]:
    """Of calls that are computed as their tokens stand: rules, and what else there is."""
    return {
        "beside another": ((Ahead(9), rule), {}),
        "causal": ((Causal(), rule), {}),
        "with sinks": ((rule,), {"sink": torch.linspace(-1, 1, 4).view(1, 4, 1, 1)}),
        "with a bias": ((rule,), {"bias": a_bias(SHAPE, BIASES[0])}),
        "padded": ((rule,), {"pad": torch.tensor([0, 7])}),
        "with keys that are gone": ((rule,), {"filled": torch.arange(40) % 3 > 0}),
        "with roles of each text": ((rule,), {"roles": marks([{"x": ((0, 3),)}, {"x": ((2, 4),)}])}),
    }


@pytest.mark.parametrize("made", [groups, clusters])
@pytest.mark.parametrize("name", others(groups(1, 1)))
def test_others_are_computed_as_their_tokens_stand(name: str, made: Any, asked: Mock) -> None:
    given, more = others(made(1, 1))[name]
    call = a_call(SHAPE, given, more.pop("pad", None))
    if (filled := more.pop("filled", None)) is not None:
        call = replace(call, keys=replace(call.keys, is_filled=filled[None, None]))
    call = replace(call, roles=more.pop("roles", {}))
    found, want = (run(backend, Same(), *draw(SHAPE), call, **more) for backend in ("native", "reference"))
    text = call.is_text[..., None].expand(found.shape)
    assert close(found[text], want[text])
    assert not asked.called


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("texts", [1, 2])
def test_parts_of_the_past_say_what_causality_does(
    texts: int, heads: int, asked: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heedful.kit.chosen.ROWS", 8)
    picked = torch.rand(texts, heads, 40, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    own = torch.arange(40)[:, None] // 8 == torch.arange(5)
    rule = Chosen(
        lambda rows: (picked | own)[:, :, rows],
        lambda met, cols: met.repeat_interleave(8, -1)[..., cols],
        gather=lambda: by_block(picked, 8),
    )
    compare_pulled("native", SHAPE, (Causal(), rule))
    assert asked.call_count == 1
    found, want = (run(x, Same(), *draw(SHAPE), a_call(SHAPE, (Causal(), Ahead(9), rule))) for x in ("native", "tiled"))
    assert close(found, want)
    assert asked.call_count == 1


@pytest.mark.parametrize(("first", "pad", "gathered"), [(0, None, 1), (0, torch.tensor([0, 7]), 0), (20, None, 0)])
def test_blocks_that_queries_choose_are_gathered_where_texts_are_read_whole(
    first: int, pad: Tensor | None, gathered: int, asked: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heedful.kit.chosen.ROWS", 8)
    shape = (2, 4, 2, 40 - first, 40, 16, 16)
    call = a_call(shape, (Causal(),), pad)
    found, want = (run(name, MoBA(4, 3), *draw(shape), call) for name in ("native", "reference"))
    text = call.is_text[..., None].expand(found.shape)
    assert close(found[text], want[text])
    assert asked.call_count == gathered


def test_tiles_that_share_queries_are_put_together_by_the_kernel_alone(asked: Mock) -> None:
    rule = clusters(1, 4)
    found, want = (run(name, Same(), *draw(SHAPE), a_call(SHAPE, (rule,))) for name in ("tiled", "reference"))
    assert close(found, want)
    assert not asked.called


class Moved(Halved):
    """What it moves goes by the columns of the whole call."""

    anywhere = True


def test_weights_that_are_moved_and_many_inputs_at_once_are_computed_as_their_tokens_stand(asked: Mock) -> None:
    rule, (q, k, v) = groups(1, 1), draw(SHAPE)
    found, want = (run(name, Moved(), q, k, v, a_call(SHAPE, (rule,))) for name in ("tiled", "reference"))
    assert close(found, want)
    both = torch.stack([q, q.cos()])
    found = vmap(lambda x: run("tiled", Same(), x, k, v, a_call(SHAPE, (rule,))))(both)
    assert close(found, torch.stack([run("reference", Same(), x, k, v, a_call(SHAPE, (rule,))) for x in both]))
    assert not asked.called


@pytest.mark.parametrize(("kept", "again"), [(2, True), (3, False)])
def test_as_many_parts_at_once_as_a_tile_has_room_for(
    kept: int, again: bool, asked: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, q, k, v = groups(1, 1), *draw(SHAPE)
    (part,) = rule.parts()
    monkeypatch.setattr(parted, "TILE_BYTES", 4 * 2 * 4 * part.rows.shape[3] * part.cols.shape[3])  # of one part
    monkeypatch.setattr(parted, "KEPT", kept)
    monkeypatch.setattr(parted, "recomputed", seen := Mock(wraps=parted.recomputed))
    assert [fold.rows.shape[2] for fold in parted.folded(part, (q, k, v))] == [1, 1, 1]
    run("tiled", Same(), q.requires_grad_(), k, v, a_call(SHAPE, (rule,)))
    assert seen.call_count == (3 if again else 0)
    monkeypatch.setattr(parted, "TILE_BYTES", 2 * parted.TILE_BYTES)
    assert [fold.rows.shape[2] for fold in parted.folded(part, (q, k, v))] == [2, 1]


@pytest.mark.parametrize("made", [groups, clusters])
def test_it_is_derived_twice(made: Any, asked: Mock) -> None:
    rule, (q, k, v) = made(1, 4), draw(SHAPE)

    def twice(backend: str) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        heads = run(backend, Same(), *leaves, a_call(SHAPE, (rule,)))  # type: ignore[arg-type]
        first = torch.autograd.grad(heads.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)  # type: ignore[arg-type]

    for one, other in zip(twice("native"), twice("reference"), strict=True):
        assert close(one, other)
    assert asked.called


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("empty", [0, 1], ids=["nobody asks", "nobody gives"])
def test_parts_without_a_query_or_a_key(empty: int, shared: bool, asked: Mock) -> None:
    flags = list(chosen(2, 4, 1))
    flags[empty] = torch.zeros_like(flags[empty])
    rule = meet(*flags, shared=shared)
    for backend in ("native", *(() if shared else ("tiled",))):
        before = asked.call_count
        leaves = [x.requires_grad_() for x in draw(SHAPE)]
        heads = run(backend, Same(), *leaves, a_call(SHAPE, (rule,)))  # type: ignore[arg-type]
        assert asked.call_count == before + 1
        assert not any(bool(x.any()) for x in (heads, *torch.autograd.grad(heads.sum(), leaves)))


def test_half_precision(asked: Mock) -> None:
    for rule in (groups(2, 4), clusters(2, 4)):
        q, k, v = (x.bfloat16() for x in draw(SHAPE))
        found = run("native", Same(), q, k, v, a_call(SHAPE, (rule,)))
        assert found.dtype == torch.bfloat16
        want, exact = (
            run("reference", Same(), *(x.to(t) for x in (q, k, v)), a_call(SHAPE, (rule,)))
            for t in (torch.bfloat16, torch.float64)
        )
        assert within_budget(found, want, exact)
    assert asked.call_count == 2


def test_a_rule_without_parts() -> None:
    assert Causal().parts() == ()
    assert Reached(lambda rows, cols: torch.ones(1, 1, 1, 1), lambda rows: torch.ones(1)).parts() == ()
