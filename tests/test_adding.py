"""What a method adds to scores without a look at them: in tiles, and in the native kernel, there and back."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock
from weakref import ref

import pytest
import torch
from torch import Tensor

from heedful import attach, explain, models
from heedful.authoring import Layer, Method, Stack
from heedful.conformance.tolerances import LOW_PRECISION, close, close_model, error, within_budget
from heedful.core.call import Call
from heedful.core.errors import BackendError, SiteError
from heedful.core.mask import Blocks, Mask, Rule, Where
from heedful.core.sites import Site, adds, at
from heedful.engine import attend as attend_module
from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends import native, native_call, tiled
from heedful.engine.distances import by_distance

from .kernel_calls import (
    BIASES,
    CAUSAL,
    RULES,
    WEIGHINGS,
    Everything,
    Halved,
    Same,
    Weighed,
    a_bias,
    a_call,
    compare_pulled,
    draw,
    pulled,
    run,
)  # fmt: skip
from .samples import PAPER, Sharpness
from .test_native import SHAPES, pytestmark
from .test_native_extremes import path

__all__ = ["path", "pytestmark"]  # these tests too need a kernel, and run on each of its paths

SHAPE = (2, 4, 2, 40, 40, 16, 16)
ODD = (*CAUSAL, Where(lambda q, k: (q - k) % 2 == 0))  # more stretches than ranges may be


class Waves(Method):
    """Adds a wave over queries, keys, both or heads."""

    paper = PAPER
    over: str = "qk"

    @adds
    def swell(self, call: Call) -> Tensor | None:
        heads = torch.arange(call.heads)[None, :, None, None] if "h" in self.over else torch.zeros(1, 1, 1, 1)
        if not self.over:
            return None
        places = (call.pairs.q if "q" in self.over else 0) * 3 + (call.pairs.k if "k" in self.over else 0)
        return 2 * (places + heads).double().sin()


class Shown(Waves):
    """The same, as an edit of the scores that it is shown."""

    @at(Site.SCORES)
    def swell(self, scores: Tensor, call: Call) -> Tensor:  # type: ignore[override]
        more = Waves.swell(self, call)
        return scores if more is None else scores + more.to(scores.dtype)


class Learned(Method):
    """Adds what is learned of each distance, and of the query."""

    paper = PAPER

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"table": torch.linspace(-1, 1, layer.heads * 40).view(layer.heads, 40).sin()}

    @adds
    def lean(self, call: Call) -> Tensor:
        assert call.query is not None
        asked = call.query[:, :, call.rows].mean(-1, keepdim=True) * call.pairs.k.cos()
        return asked + by_distance(lambda far: call.params["table"][:, far.clamp(0, 39)], call)


class Shy(Learned):
    """The same, as an edit of the scores that it is shown."""

    @at(Site.SCORES)
    def lean(self, scores: Tensor, call: Call) -> Tensor:  # type: ignore[override]
        return scores + Learned.lean(self, call)


@pytest.fixture(params=[1, 2])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows, kept for the way back, or not."""
    monkeypatch.setattr(tiled, "MOST", 16)
    if request.param == 2:
        monkeypatch.setattr(tiled, "KEPT_BYTES", 0)


@pytest.mark.parametrize("backend", ["reference", "tiled", "native"])
@pytest.mark.parametrize("over", ["qk", "k", "q", "h", "hqk", ""])
def test_scores_gain_it(over: str, backend: str, cut: None) -> None:
    q, k, v = draw(SHAPE)
    call = a_call(SHAPE, CAUSAL, torch.tensor([0, 7]))
    found = run(backend, Waves(over), q, k, v, call)
    want, exact = (run("reference", Shown(over), *(x.to(t) for x in (q, k, v)), call) for t in (q.dtype, torch.float64))
    text = call.is_text[..., None].expand(found.shape)
    assert within_budget(found[text], want[text], exact[text])
    assert bool(close(found, run("reference", Waves(""), q, k, v, call))) == (over in ("q", "h", ""))


@pytest.mark.parametrize("backend", ["tiled", "native"])
def test_some_heads_alone(backend: str) -> None:
    q, k, v = draw(SHAPE)
    call = a_call(SHAPE, CAUSAL)
    plain, all_, some = (
        run(backend, part, q, k, v, call)
        for part in (Waves(""), Waves(), Waves().on(heads=[1, 2]))  # type: ignore[arg-type]
    )
    assert close(some[:, 1:3], all_[:, 1:3])
    assert close(some[:, ::3], plain[:, ::3])
    assert not close(all_[:, ::3], plain[:, ::3])


def test_of_several_and_of_the_model_the_sum_counts() -> None:
    q, k, v = draw(SHAPE)
    call, bias = a_call(SHAPE, CAUSAL), a_bias(SHAPE, BIASES[2])
    both = Stack((Waves(), Waves("k")))
    found, want = (run(name, both, q, k, v, call, bias=bias) for name in ("native", "reference"))
    assert close(found, want)
    assert close(run("native", Waves("k"), q, k, v, call, bias=bias + Waves().swell(call).float()), want)  # type: ignore[union-attr]


@pytest.mark.parametrize("method", [Waves(), Waves("k"), Waves("hqk")], ids=repr)
def test_what_it_has_no_part_in_has_its_gradients(method: Method, cut: None) -> None:
    compare_pulled("native", SHAPE, method=method, softcap=3.0)
    assert all(
        close(a, b)
        for a, b in zip(
            pulled("native", draw(SHAPE), SHAPE, method=method),
            pulled("reference", draw(SHAPE), SHAPE, method=Shown(method.over)),  # type: ignore[attr-defined]
            strict=True,
        )
    )


def test_what_it_learns_has_its_gradients(cut: None) -> None:
    def learned(method: Method, backend: str) -> list[Tensor]:
        model = models.tiny("llama")
        with attach(model, method, backend=backend) as run:
            ids = torch.arange(3, 43)[None]
            run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            return [p.grad for p in [*run.parameters(), *model.parameters()] if p.grad is not None]

    found, want = learned(Learned(), "native"), learned(Shy(), "reference")
    assert len(found) == len(want)
    assert bool(want[0].any())
    assert all(close_model(a, b) for a, b in zip(found, want, strict=True))


def test_it_is_derived_twice(cut: None) -> None:
    q, k, v = draw((1, 2, 1, 20, 20, 8, 8))
    call = a_call((1, 2, 1, 20, 20, 8, 8), ODD)

    def twice(backend: str) -> Tensor:
        query, bias = q.clone().requires_grad_(), a_bias((1, 2, 1, 20, 20, 8, 8), BIASES[2]).requires_grad_()
        heads = run(backend, Waves(), query, k, v, call, bias=bias)
        first = torch.autograd.grad(heads.square().sum(), [query, bias], create_graph=True)
        return torch.cat(
            [x.flatten() for x in torch.autograd.grad(sum(x.square().sum() for x in first), [query, bias])]
        )  # type: ignore[arg-type]

    assert close(twice("native"), twice("reference"))


@pytest.mark.parametrize("method", [Same(), Waves()], ids=repr)
def test_a_bias_that_learns_alone(method: Method, cut: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v), bias = draw(SHAPE), a_bias(SHAPE, BIASES[1])
    monkeypatch.setattr(native_call, "pulled", asked := Mock(wraps=native_call.pulled))

    def learned(backend: str) -> Tensor:
        leaf = bias.clone().requires_grad_()
        heads = run(backend, method, q, k, v, a_call(SHAPE, CAUSAL), bias=leaf)
        return torch.autograd.grad(heads.square().sum(), leaf)[0]

    assert close(learned("native"), learned("reference"))
    assert max(call.args[1].queries for call in asked.call_args_list) == 16, "no table of all pairs is held"


@pytest.mark.parametrize("backend", ["tiled", "native"])
def test_a_bias_for_all_rows_has_its_gradients_added_up_in_single_precision(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled, "MOST", 1)
    monkeypatch.setattr(tiled, "LEAST", 1)
    shape = (1, 2, 2, 512, 8, 16, 16)
    q, k, v = draw(shape)

    def learned(backend: str, dtype: torch.dtype) -> Tensor:
        leaf = torch.zeros(1, 1, 1, 8, dtype=dtype).requires_grad_()
        given = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v + torch.arange(8)[:, None]))
        heads = run(backend, Waves(""), *given, a_call(shape, ()), bias=leaf)
        return torch.autograd.grad(heads.sum(), leaf)[0]

    exact = learned("reference", torch.float64)
    assert error(learned(backend, torch.bfloat16), exact) <= LOW_PRECISION * error(exact.bfloat16(), exact)


@pytest.mark.parametrize("rules", [ODD, RULES["blind rows"]], ids=["odd", "blind rows"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_bias_that_learns(shape: tuple[int, ...], rules: tuple[Rule, ...], cut: None) -> None:
    for apart in BIASES:
        compare_pulled("native", shape, rules, learned=("bias",), bias=a_bias(shape, apart), softcap=5.0)


@pytest.mark.parametrize("how", [None, *WEIGHINGS], ids=repr)
@pytest.mark.parametrize("pad", [None, torch.tensor([0, 7])], ids=["whole", "padded"])
def test_masks_of_any_kind(how: Any, pad: Tensor | None, cut: None) -> None:
    q, k, v = draw(SHAPE)
    method = Halved() if how is None else Weighed(how)
    some = torch.rand(2, 4, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    moved = Blocks(torch.tensor([[True, False], [True, True]])[None, None], 32, torch.tensor([[0, 0], [7, 7]]))
    for rules in (ODD, (*CAUSAL, Blocks(some, 16)), (Where(lambda q, k: (q + k) % 3 == 0),), (moved,)):
        call = a_call(SHAPE, rules, pad)
        plain: Method = Waves("") if how is None else method
        found, want, exact = (
            run(name, plain, *(x.to(t) for x in (q, k, v)), call)
            for name, t in (("native", q.dtype), ("reference", q.dtype), ("reference", torch.float64))
        )
        text = call.is_text[..., None].expand(found.shape)
        assert within_budget(found[text], want[text], exact[text])
        compare_pulled("native", SHAPE, rules, method=plain, pad=pad)


@pytest.mark.parametrize("rules", [CAUSAL, ODD], ids=["ranges", "table"])
@pytest.mark.parametrize("method", [Same(), Waves()], ids=repr)
@pytest.mark.parametrize("learned", [(), ("bias",)], ids=repr)
def test_what_is_saved_elsewhere_may_come_back_laid_out_anew(
    learned: tuple[str, ...], method: Method, rules: tuple[Rule, ...], cut: None
) -> None:
    tensors, bias = draw(SHAPE), a_bias(SHAPE, BIASES[2])
    want = pulled("native", tensors, SHAPE, rules, learned, method=method, bias=bias)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().flatten().clone().view(x.shape), lambda x: x):
        found = pulled("native", tensors, SHAPE, rules, learned, method=method, bias=bias)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_nothing_of_a_tile_is_kept_for_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "KEPT_BYTES", 0)
    made: list[ref[Tensor]] = []

    def noted(job: AttentionCall, call: Call, like: Tensor) -> Tensor | None:
        found = attend_module.gained(job, call, like)
        made.extend(ref(x) for x in (found, call.keep) if x is not None)
        return found

    monkeypatch.setattr(native, "gained", noted)
    heads = run("native", Waves(), *(x.requires_grad_() for x in draw(SHAPE)), a_call(SHAPE, ODD))
    gc.collect()
    assert len(made) == 2
    assert not any(x() is not None for x in made)
    heads.sum().backward()
    assert len(made) == 4


@pytest.mark.parametrize(
    ("made", "got"),
    [
        (lambda call: torch.zeros(3, 1, 1, 1), r"\(3, 1, 1, 1\)"),
        (lambda call: torch.zeros(40, 40), r"\(40, 40\)"),
        (lambda call: 1.0, "float"),
    ],
)
def test_what_cannot_be_added(made: Callable[[Call], Any], got: str) -> None:
    class Wrong(Method):
        paper = PAPER

        @adds
        def add(self, call: Call) -> Tensor:
            return made(call)  # type: ignore[no-any-return]

    for backend in ("tiled", "native"):
        with pytest.raises(SiteError, match=rf"must return what scores gain.*{got}"):
            run(backend, Wrong(), *draw(SHAPE), a_call(SHAPE, CAUSAL))


class Hides(Method):
    """Lets a query see none of some keys, and some queries none at all."""

    paper = PAPER
    row: bool = True  # the same for all queries, or not
    by: str = "-inf"

    @adds
    def hide(self, call: Call) -> Tensor:
        hidden = call.pairs.k % 3 == 1
        if self.row:
            hidden = hidden | (call.pairs.q < 6) | (call.pairs.q == 20)
        return torch.zeros(hidden.shape).masked_fill(hidden, float(self.by))


class Unseen(Hides):
    """The same at MASK."""

    @at(Site.MASK)
    def hide(self, mask: Mask, call: Call) -> Mask:  # type: ignore[override]
        return mask & Where(lambda q, k: ~((k % 3 == 1) | ((q < 6) | (q == 20) if self.row else q < 0)))


@pytest.mark.parametrize("more", [None, *map(Weighed, WEIGHINGS)], ids=repr)
@pytest.mark.parametrize("backend", ["reference", "tiled", "native"])
@pytest.mark.parametrize("row", [True, False])
def test_minus_infinity_is_a_pair_that_is_not_seen(row: bool, backend: str, more: Method | None, cut: None) -> None:
    call, leaves = a_call(SHAPE, CAUSAL, torch.tensor([0, 7])), [x.requires_grad_() for x in draw(SHAPE)]

    def told(method: Method, backend: str) -> tuple[Tensor, ...]:
        heads = run(backend, method if more is None else method | more, *leaves, call)
        return heads.detach(), *torch.autograd.grad(heads.square().sum(), leaves)

    for found, want in zip(told(Hides(row), backend), told(Unseen(row), "reference"), strict=True):
        assert close(found, want)


@pytest.mark.parametrize("by", ["nan", "inf"])
@pytest.mark.parametrize("backend", ["reference", "tiled", "native"])
@pytest.mark.parametrize("row", [True, False])
def test_what_is_no_number_is_refused(row: bool, backend: str, by: str) -> None:
    place = r"\[0, 0, 0, 0\]" if row else r"\[0, 0, 0, 1\]"
    with pytest.raises(SiteError, match=rf"Hides\(.*scores gain {by} at {place}.*-inf where a pair is not to be seen"):
        run(backend, Hides(row, by), *draw(SHAPE), a_call(SHAPE, CAUSAL))


@pytest.mark.parametrize("backend", ["reference", "tiled", "native"])
def test_of_no_text_there_is_nothing_to_refuse(backend: str) -> None:
    shape = (0, *SHAPE[1:])
    assert run(backend, Waves(), *draw(shape), a_call(shape, CAUSAL)).shape == (0, 4, 40, 16)


def test_other_backends_and_sums_are_refused() -> None:
    call = a_call(SHAPE, CAUSAL)
    for stack in (Waves() | Everything([]), Waves() | Halved()):
        with pytest.raises(BackendError, match=r"Waves\(.*\) at SCORES says tile by tile what scores gain"):
            run("native", stack, *draw(SHAPE), call)
        assert run("auto", stack, *draw(SHAPE), call).isfinite().all()
        assert re.search(r"native     no\n.*tile by tile it sums nothing up", str(explain(stack)))
    assert re.search("native     (chosen|possible)", str(explain(Waves())))
    with pytest.raises(BackendError, match=r"Waves\(.*\) at SCORES needs the map"):
        run("sdpa", Waves(), *draw(SHAPE), call)
    assert run("tiled", Waves() | Sharpness(), *draw(SHAPE), call).isfinite().all()


def test_nothing_added_is_told_as_a_step_that_changed_nothing() -> None:
    model = models.tiny("llama")
    ids = {"input_ids": torch.arange(3, 20)[None]}
    for method, changed in ((Waves(), True), (Waves(""), False), (Zeros(), False)):
        with attach(model, method, backend="native") as run, torch.no_grad():
            run(**ids)
            assert bool(run.state.changed) == changed
            assert all(run.state.offered[step] for step in run.stack.steps())
            run.state.changed.update(run.stack.steps())  # so that nothing is warned of


class Zeros(Method):
    """Adds zeros."""

    paper = PAPER

    @adds
    def add(self, call: Call) -> Tensor:
        return torch.zeros(1, 1, 1, len(call.keys))


def test_an_own_rule_beside_it() -> None:
    class Odd(Waves):
        @at(Site.MASK)
        def thin(self, mask: Mask, call: Call) -> Mask:
            return mask & ODD[1]

    q, k, v = draw(SHAPE)
    found, want = (run(name, Odd(), q, k, v, a_call(SHAPE, CAUSAL)) for name in ("native", "reference"))
    assert close(found, want)


@pytest.mark.parametrize("backend", ["tiled", "native"])
def test_rows_above_are_for_those_who_are_shown_scores(backend: str, cut: None) -> None:
    class Tall(Waves):
        def above(self) -> int:
            return 2

    given = *draw(SHAPE), a_call(SHAPE, CAUSAL)
    assert torch.equal(run(backend, Tall(), *given), run(backend, Waves(), *given))
