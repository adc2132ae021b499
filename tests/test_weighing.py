"""Weights that are each made of their own score: in torch, and on both kernels, there and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from heedful import attach, check, explain
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.authoring import Call, Method, Weighing, weighs
from heedful.conformance.bare import serving
from heedful.conformance.tolerances import close, close_model, error, within_budget
from heedful.core.errors import BackendError, DefinitionError, SiteError
from heedful.core.mask import Blocks, Rule, Where
from heedful.core.method import Part, Stack
from heedful.core.ragged import Ragged, padded
from heedful.core.summary import Summary
from heedful.diagnosis.measures import DEFAULT
from heedful.engine import attend as attend_module
from heedful.engine.backends import native
from heedful.methods import ACT, RandomFeatureHeads, RectifiedAttention, SigmoidAttention, SnapKV
from heedful.native import Library, library
from heedful.tiny import tiny, tiny_inputs

from .kernel_calls import (
    CAUSAL,
    DEVICE,
    RULES,
    WEIGHINGS,
    Court,
    Weighed,
    a_bias,
    a_call,
    compare,
    compare_pulled,
    draw,
    interpreting,
    pulled,
    run,
)
from .samples import PAPER
from .test_native_flat import Columns, flat_step
from .test_triton_step import chosen, steps

__all__ = ["steps"]

SHAPES = [(2, 4, 2, 19, 19, 8, 8), (1, 6, 2, 1, 50, 64, 64), (1, 3, 1, 40, 70, 10, 6)]
LARGE = [(1, 2, 2, 140, 140, 16, 256), (1, 7, 1, 65, 129, 128, 128)]
KERNEL = library()
PATHS = KERNEL.paths if isinstance(KERNEL, Library) else ()
KERNELS = ["triton", *(["native"] if PATHS else [])]
METHODS = [SigmoidAttention, RectifiedAttention, RandomFeatureHeads]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreting(monkeypatch)


@pytest.fixture(params=["triton", *(f"native, {path}" for path in PATHS)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel; the native one on each instruction set of this machine."""
    name, _, path = str(request.param).partition(", ")
    if path and isinstance(KERNEL, Library):
        kernel = replace(KERNEL, path=path)
        monkeypatch.setattr(native, "library", lambda: kernel)
    return name


@pytest.mark.parametrize("how", WEIGHINGS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_make_each_weight_of_its_score(how: Weighing, causal: bool) -> None:
    shape = (1, 2, 1, 5, 7, 4, 3)
    q, k, v = draw(shape)
    want = torch.zeros(1, 2, 5, 3)
    for h in range(2):
        for i in range(5):
            seen = range(i + 3 if causal else 7)
            for j in seen:
                x = sum(float(q[0, h, i, d] * k[0, 0, j, d]) for d in range(4)) * 0.5 + how.shift
                weight = 1 / (1 + 2.718281828459045**-x) if how.form == "sigmoid" else max(x, 0.0)
                want[0, h, i] += weight / (len(seen) if how.mean else 1) * v[0, 0, j]
    for backend in ("reference", "tiled"):
        assert close(run(backend, Weighed(how), q, k, v, a_call(shape, CAUSAL if causal else ())), want)


@pytest.mark.parametrize(
    "how", [*WEIGHINGS[2:], *(pytest.param(x, marks=pytest.mark.slow) for x in WEIGHINGS[:2])], ids=str
)
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    "shape", [SHAPES[0], *(pytest.param(x, marks=pytest.mark.slow) for x in (*SHAPES[1:], *LARGE))], ids=str
)
def test_kernels_agree_with_the_reference(
    shape: tuple[int, ...], rules: tuple[Rule, ...], how: Weighing, backend: str
) -> None:
    compare(backend, shape, rules, how=how)
    compare_pulled(backend, shape, rules, method=Weighed(how))


@pytest.mark.parametrize("how", WEIGHINGS, ids=str)
def test_a_long_cache_and_one_query(how: Weighing, backend: str, steps: list[Any]) -> None:
    """On a GPU the keys are divided among programs, on a CPU among threads."""
    shape = (1, 4, 2, 1, 700, 16, 16)
    for rules in (CAUSAL, (*CAUSAL, chosen(shape, 2)), (*CAUSAL, chosen(shape, 4)), (Where(lambda q, k: k < 0),)):
        compare(backend, shape, rules, how=how)
    more = {"bias": a_bias(shape, (True, True, True)), "softcap": 5.0, "pad": torch.tensor([9])}
    compare(backend, shape, (*CAUSAL, chosen(shape, 2)), how=how, **more)  # type: ignore[arg-type]
    assert len(steps) == (5 if backend == "triton" else 0)
    q, k, v = draw(shape)
    plain, want = (run(name, Weighed(how), q, k, v, a_call(shape, CAUSAL)) for name in (backend, "reference"))
    assert close(plain, want)


@pytest.mark.parametrize("how", WEIGHINGS[2:], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("picks", [False, True])
@pytest.mark.parametrize("counts", [(40, 9, 0, 7), (3, 600, 600, 599)], ids=str)
def test_one_query_reads_uneven_heads_where_they_lie(
    counts: tuple[int, ...], picks: bool, heads: tuple[int, int], how: Weighing, backend: str
) -> None:
    q, k, v, call = flat_step(counts, heads)
    if picks:
        call = replace(call, mask=call.mask & chosen((2, heads[0], 2, 1, max(counts)), heads[0], 2))
    told: dict[str, list[Summary]] = {backend: [], "reference": []}
    found = run(backend, Columns(told[backend]) | Weighed(how), q, k, v, call)
    assert isinstance(k, Ragged)
    assert isinstance(v, Ragged)
    assert k._whole is None, "nothing was padded"
    assert v._whole is None
    wide = [padded(x).double() for x in (q, k, v)]
    plain = run("reference", Weighed(how), q, k, v, call)
    assert within_budget(found, plain, run("reference", Columns(told["reference"]) | Weighed(how), *wide, call))
    for part in ("received", "entropy", "peak"):
        assert close(*(getattr(heard[0], part).cpu().float() for heard in told.values())), part


def test_a_model_goes_on_from_its_cache_as_without_the_kernel(backend: str, steps: list[Any]) -> None:
    model = tiny().to(DEVICE if backend == "triton" else "cpu")
    ids = torch.randint(3, 99, (1, 30), generator=torch.Generator().manual_seed(0)).to(model.device)

    def told(name: str) -> Tensor:
        with torch.no_grad(), attach(model, SigmoidAttention() | SnapKV(budget=12), backend=name) as heard:
            out = heard(input_ids=ids, use_cache=True)
            assert set(heard.state.backends.values()) == {name}
            return torch.cat([
                heard(input_ids=ids[:, i : i + 1], use_cache=True, **{CACHE: cache_of(out)}).logits
                for i in range(3)
            ])  # fmt: skip

    assert close_model(told(backend), told("reference"))
    assert bool(steps) == (backend == "triton")


def test_the_default_measures_of_a_model_of_sigmoids_stay_on_the_kernel(backend: str) -> None:
    model = tiny("llama").to(DEVICE if backend == "triton" else "cpu")
    stack = Stack((SigmoidAttention(), *(x for x in DEFAULT if isinstance(x, Part))))
    with torch.no_grad(), attach(model, stack, backend=backend) as heard:
        heard(**tiny_inputs(model))
        assert set(heard.state.backends.values()) == {backend}


@pytest.mark.parametrize("how", WEIGHINGS[1:3], ids=str)
def test_padding_soft_caps_biases_and_a_loss_on_sums(how: Weighing, backend: str) -> None:
    shape, pad = (2, 4, 2, 20, 40, 16, 16), torch.tensor([0, 23])
    more = {"bias": a_bias(shape, (True, True, True)), "softcap": 5.0}
    compare(backend, shape, (), pad=pad, how=how, **more)  # type: ignore[arg-type]
    learned = ("bias",) if backend == "triton" else ()
    compare_pulled(backend, shape, (), learned, pad=pad, method=Weighed(how) | Court(), **more)


def test_block_tables(backend: str) -> None:
    shape, how = (1, 2, 1, 70, 70, 16, 16), WEIGHINGS[2]
    rules = (*CAUSAL, Blocks(torch.tensor([[True, False], [False, True]])[None, None], 64))
    compare(backend, shape, rules, how=how)
    compare_pulled(backend, shape, rules, method=Weighed(how))


@pytest.mark.parametrize("how", WEIGHINGS[:2], ids=str)
def test_bfloat16_is_as_good_as_torch_s_own(how: Weighing, backend: str) -> None:
    shape = (2, 6, 2, 60, 60, 32, 32)
    tensors = tuple(x.bfloat16() for x in draw(shape))
    exact = pulled("reference", tuple(x.double() for x in tensors), shape, method=Weighed(how))
    leaves = [x.detach().requires_grad_() for x in tensors]
    q, k, v = (x if len(x[0]) == 6 else x.repeat_interleave(3, 1) for x in leaves)
    plain = getattr(torch, how.form)(q @ k.mT * 32**-0.5 + how.shift).tril() @ v
    waves = torch.arange(plain.numel(), dtype=torch.float64).view_as(plain).sin()
    torch_s = torch.autograd.grad(plain, leaves, waves.bfloat16())
    for a, b, c in zip(pulled(backend, tensors, shape, method=Weighed(how)), torch_s, exact, strict=True):
        assert error(a, c) <= 2 * error(b, c)
    call = a_call(shape, CAUSAL)
    found, whole = (
        run(backend, Weighed(how), *tensors, call),
        run("reference", Weighed(how), *(x.double() for x in tensors), call),
    )
    assert error(found, whole) <= 2 * error(plain, whole)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_masked_may_hold_anything(backend: str) -> None:
    shape, method = (1, 4, 2, 70, 70, 8, 8), Weighed(WEIGHINGS[0])
    q, k, v = draw(shape)
    rules = (*CAUSAL, Where(lambda a, b: b < 61))
    before = pulled(backend, (q, k, v), shape, rules, method=method)
    k[:, :, 61:], v[:, :, 61:] = 1e30, 3e38
    after = pulled(backend, (q, k, v), shape, rules, method=method)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :, :61], b[:, :, :61])
        assert bool(b.isfinite().all())


@pytest.mark.parametrize("how", WEIGHINGS[2:], ids=str)
def test_a_row_that_sees_nothing_has_a_number_on_the_way_back(how: Weighing) -> None:
    shape = (1, 2, 1, 6, 6, 8, 8)
    with torch.autograd.set_detect_anomaly(True):  # which refuses what is no number, whoever leaves it out further on
        pulled("reference", draw(shape), shape, (*CAUSAL, Where(lambda q, k: q > 2)), method=Weighed(how))


def test_steep_scores_saturate(backend: str) -> None:
    """Neither a sigmoid nor its slope overflows."""
    shape = (1, 2, 1, 20, 20, 8, 8)
    q, k, v = draw(shape)
    for how in WEIGHINGS[:2]:
        both = [pulled(name, (1e2 * q, 1e2 * k, v), shape, method=Weighed(how)) for name in (backend, "reference")]
        assert all(bool(x.isfinite().all()) for x in both[0])
        assert close(both[0][2] / 1e4, both[1][2] / 1e4)


@pytest.mark.parametrize("kind", METHODS)
def test_methods_keep_their_laws_on_the_kernels(kind: type[Method]) -> None:
    assert {"native", "triton"} <= set(serving(kind.example() or kind()))
    report = check(kind, ("backends_agree", "told_alike", "masked_rows"), DEVICE)
    assert report.ok, report


@pytest.mark.parametrize("kind", METHODS)
def test_a_model_learns_through_them_what_it_learns_without(kind: type[Method]) -> None:
    model = tiny("llama")
    feed = tiny_inputs(model)
    feed["labels"] = feed["input_ids"]
    found: dict[str, list[Tensor]] = {}
    for backend in ("reference", *KERNELS):
        model.zero_grad()
        with attach(model, kind.example() or kind(), backend=backend) as seen:
            seen(**feed).loss.backward()
            assert set(seen.state.backends.values()) == {backend}
            assert all(step in seen.state.changed for step in seen.stack.steps() if step.edit.weighs)
        found[backend] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for backend in KERNELS:
        assert all(close_model(a, b) for a, b in zip(found[backend], found["reference"], strict=True))


def test_what_kernels_cannot_serve_they_say() -> None:
    shape = (1, 4, 2, 20, 20, 8, 8)
    q, k, v = draw(shape)
    how = Weighed(WEIGHINGS[0])
    sink = torch.zeros(1, 4, 1, 1)
    for backend in KERNELS:
        with pytest.raises(BackendError, match="sink logits, which only softmax knows"):
            run(backend, how, q, k, v, a_call(shape, CAUSAL), sink=sink)
        with pytest.raises(BackendError, match=r"leaves rows without a sum for ACT"):
            run(backend, how | ACT.example(), q, k, v, a_call(shape, CAUSAL))
    scattered = a_call(shape, (Where(lambda a, b: b % 2 == 0),))
    with pytest.raises(BackendError, match="too many separate stretches"):
        run("triton", how, q, k, v, scattered)
    assert close(run("native", how, q, k, v, scattered), run("reference", how, q, k, v, scattered))
    with pytest.raises(SiteError, match="learned sink logits, which only softmax knows"):
        run("tiled", how, q, k, v, a_call(shape, CAUSAL), sink=sink)


def test_some_heads_alone_are_left_to_tiles() -> None:
    shape = (1, 4, 2, 20, 20, 8, 8)
    q, k, v = draw(shape)
    some = Weighed(WEIGHINGS[0]).on(heads=[1, 2])
    with pytest.raises(BackendError, match="needs the scores or weights"):
        run("native", some, q, k, v, a_call(shape, CAUSAL))
    found = run("tiled", some, q, k, v, a_call(shape, CAUSAL))
    for one, heads in ((Weighed(WEIGHINGS[0]), [1, 2]), (Weighed(WEIGHINGS[1]).on(heads=[0]), [3])):
        whole = run("reference", one, q, k, v, a_call(shape, CAUSAL))
        assert close(found[:, heads], whole[:, heads])


def test_no_softmax_is_made_of_what_no_head_has_one_of(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, made = (1, 4, 2, 20, 20, 8, 8), Mock(wraps=attend_module.softmax)
    monkeypatch.setattr(attend_module, "softmax", made)
    for method, times in ((Weighed(WEIGHINGS[0]), 0), (Weighed(WEIGHINGS[0]).on(heads=[1, 2]), 1)):
        run("reference", method, *draw(shape), a_call(shape, CAUSAL))
        assert made.call_count == times


def test_explain_names_the_kernel() -> None:
    found = str(explain(SigmoidAttention()))
    assert "triton     possible, but dearer: weigh_rows, and attend_step for one query; block sizes" in found
    assert "sdpa       no" in found


def test_values_are_checked() -> None:
    with pytest.raises(DefinitionError, match=r"Weighing\('sigmod'\): no such form; there are sigmoid, relu.*sigmoid"):
        Weighing("sigmod")  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match=r"Weighing\(shift=inf\): must be finite, for example"):
        Weighing("relu", float("inf"))

    class Wrong(Method):
        paper = PAPER

        @weighs
        def weigh(self, call: Call) -> float:
            return 1.0

    shape = (1, 4, 2, 20, 20, 8, 8)
    for backend in ("tiled", *KERNELS):
        with pytest.raises(SiteError, match="must return a Weighing, got float"):
            run(backend, Wrong(), *draw(shape), a_call(shape, CAUSAL))
