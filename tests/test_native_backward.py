"""The way back through the native kernel on every instruction set of this machine, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from heedful import attach
from heedful.conformance.tolerances import close, close_model, error
from heedful.core.errors import BackendError
from heedful.core.mask import Blocks, First, Rule, Where, Window
from heedful.core.method import Method, Stack
from heedful.core.summary import Summary
from heedful.engine.backends.tiled import Tiled
from heedful.tiny import tiny, tiny_inputs

from .kernel_calls import (
    BIASES,
    CAUSAL,
    RULES,
    WEIGHINGS,
    Court,
    Everything,
    Halved,
    Same,
    Weighed,
    a_bias,
    a_call,
    banded,
    compare_pulled,
    draw,
    pulled,
    run,
)  # fmt: skip
from .samples import Scale
from .test_native import SHAPES, pytestmark
from .test_native_extremes import path

__all__ = ["path", "pytestmark"]  # these tests too need a kernel, and run on each of its paths


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_agrees_with_the_reference(shape: tuple[int, ...], rules: tuple[Rule, ...]) -> None:
    compare_pulled("native", shape, rules)


@pytest.mark.parametrize("n", [40, 3, 1])
def test_padding(n: int) -> None:
    compare_pulled("native", (2, 4, 2, n, 40, 16, 16), (*CAUSAL, Window(9) | First(2)), pad=torch.tensor([0, 7]))


@pytest.mark.parametrize("softcap", [None, 2.0, 20.0])
@pytest.mark.parametrize("biases", [None, *BIASES])
def test_soft_caps_biases_and_sinks(softcap: float | None, biases: tuple[bool, ...] | None) -> None:
    shape = (2, 4, 2, 20, 700, 16, 16)
    bias = None if biases is None else a_bias(shape, biases)
    compare_pulled("native", shape, softcap=softcap, bias=bias, sink=torch.linspace(-1, 4, 4).view(1, 4, 1, 1))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_block_tables(heads: int) -> None:
    """One for each query head goes through the heads of a group one after another."""
    table = torch.rand(2, heads, 10, 10, generator=torch.Generator().manual_seed(1)) < 0.5
    compare_pulled("native", (2, 4, 2, 300, 300, 16, 16), (*CAUSAL, Blocks(table, 32)))


@pytest.mark.parametrize("biases", [None, BIASES[2]])
def test_tables_of_keys(biases: tuple[bool, ...] | None) -> None:
    shape = (1, 4, 2, 100, 700, 16, 16)
    bias = None if biases is None else a_bias(shape, biases)
    compare_pulled("native", shape, (banded(100, 700),), learned=() if bias is None else ("bias",), bias=bias)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_loss_on_what_keys_receive(shape: tuple[int, ...], rules: tuple[Rule, ...]) -> None:
    compare_pulled("native", shape, rules, method=Court())


def test_such_a_loss_under_all_else() -> None:
    """Padding, whose rows count for nothing, a soft cap, a bias and sinks, and a table of blocks."""
    shape, sink = (2, 4, 2, 300, 300, 16, 16), torch.linspace(-1, 4, 4).view(1, 4, 1, 1)
    table = torch.rand(2, 4, 10, 10, generator=torch.Generator().manual_seed(1)) < 0.5
    for rules in ((), (*CAUSAL, Blocks(table, 32))):
        bias = a_bias(shape, (True, True, True))
        more = {"method": Court(), "bias": bias, "sink": sink, "softcap": 5.0}
        compare_pulled("native", shape, rules, pad=None if rules else torch.tensor([0, 7]), **more)


@settings(max_examples=25)
@example(n=1, past=1, heads=(1, 1), d=1, e=27, window=2)  # two numbers that are nearly alike
@given(
    n=st.integers(1, 200), past=st.integers(0, 300), heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (5, 5)]),
    d=st.integers(1, 70), e=st.integers(1, 70), window=st.integers(1, 300),
)  # fmt: skip
def test_any_shape_agrees(n: int, past: int, heads: tuple[int, int], d: int, e: int, window: int) -> None:
    compare_pulled("native", (1, *heads, n, n + past, d, e), (*CAUSAL, Window(window)))


def test_bfloat16_is_as_good_as_torchs_own() -> None:
    shape = (2, 6, 2, 60, 60, 32, 32)
    tensors = tuple(x.bfloat16() for x in draw(shape))
    exact = pulled("reference", tuple(x.double() for x in tensors), shape)
    leaves = [x.detach().requires_grad_() for x in tensors]
    plain = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    waves = torch.arange(plain.numel(), dtype=torch.float64).view_as(plain).sin()
    torchs = torch.autograd.grad(plain, leaves, waves.bfloat16())
    for a, b, c in zip(pulled("native", tensors, shape), torchs, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert error(a, c) <= 2 * error(b, c)


def test_steep_scores_give_no_weight_above_one() -> None:
    """Scores of 1e6 and more are rounded by more than one another's distance, but a weight is a share."""
    shape = (1, 4, 2, 200, 200, 16, 16)
    q, k, v = draw(shape)
    found, want = (pulled(name, (1e3 * q, 1e3 * k, v), shape) for name in ("native", "reference"))
    assert close(found[2], want[2])
    assert all(bool(x.isfinite().all()) for x in found)


def test_what_is_masked_may_hold_anything() -> None:
    shape = (1, 4, 2, 300, 300, 8, 8)
    q, k, v = draw(shape)
    rules = (*CAUSAL, Where(lambda a, b: b < 61))
    before = pulled("native", (q, k, v), shape, rules, softcap=5.0)
    k[:, :, 61:], v[:, :, 61:] = 1e30, 3e38
    after = pulled("native", (q, k, v), shape, rules, softcap=5.0)
    assert torch.equal(after[0], before[0])
    for a, b in zip(before[1:], after[1:], strict=True):
        assert torch.equal(a[:, :, :61], b[:, :, :61])
        assert not bool(b[:, :, 61:].any())


@pytest.mark.parametrize("heads", [(6, 2), (4, 1), (5, 5)])
def test_the_number_of_threads_changes_no_bit(heads: tuple[int, int]) -> None:
    shape = (2, *heads, 700, 700, 16, 16)
    tensors, before, found = draw(shape), torch.get_num_threads(), []
    tables = (*CAUSAL, Blocks(torch.rand(1, heads[0], 22, 22, generator=torch.Generator().manual_seed(1)) < 0.7, 32))
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            found.append((*pulled("native", tensors, shape), *pulled("native", tensors, shape, tables)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_readers_are_told_the_same_on_the_way() -> None:
    shape = (1, 4, 2, 20, 20, 8, 8)
    alone: list[Summary] = []
    beside: list[Summary] = []
    run("native", Everything(alone), *draw(shape), a_call(shape, CAUSAL))
    pulled("native", draw(shape), shape, method=Everything(beside))
    assert torch.equal(alone[0].received, beside[0].received)  # type: ignore[arg-type]
    assert not beside[0].received.requires_grad  # type: ignore[union-attr]


@pytest.mark.parametrize("method", [Court(), *(Weighed(how) | Court() for how in WEIGHINGS[1:3])], ids=str)
def test_what_is_derived_twice_is_computed_in_tiles(method: Method | Stack) -> None:
    shape = (1, 4, 2, 20, 20, 8, 8)

    def twice(name: str) -> list[Tensor]:
        q, k, v = (x.requires_grad_() for x in draw(shape))
        losses: list[Tensor] = []
        heads = run(name, method, q, k, v, a_call(shape, CAUSAL), losses=losses)
        (first,) = torch.autograd.grad(heads.sin().sum() + losses[0], q, create_graph=True)
        return [first, *torch.autograd.grad(first.square().sum(), (q, k, v))]

    assert all(close(a, b) for a, b in zip(twice("native"), twice("reference"), strict=True))


def test_one_way_there_may_be_gone_back_more_than_once() -> None:
    shape = (1, 4, 2, 40, 40, 8, 8)
    leaves = [x.requires_grad_() for x in draw(shape)]
    heads = run("native", Same(), *leaves, a_call(shape, CAUSAL))
    first = torch.autograd.grad(heads.sum(), leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(heads.sum(), leaves), strict=True))


def test_gradients_of_keys_alone() -> None:
    shape = (1, 4, 2, 40, 40, 8, 8)
    q, k, v = draw(shape)
    every = pulled("native", (q, k, v), shape)
    out = run("native", Same(), q, k.requires_grad_(), v, a_call(shape, CAUSAL))
    waves = torch.arange(out.numel(), dtype=torch.float64).view_as(out).sin()
    (found,) = torch.autograd.grad(out, k, waves.to(out.dtype))
    assert torch.equal(found, every[1])


def test_a_model_learns_through_it_what_it_learns_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    feed = tiny_inputs(model)
    feed["labels"] = feed["input_ids"]

    def learned() -> list[Tensor]:
        model.zero_grad()
        model(**feed).loss.backward()
        return [x.grad.clone() for x in model.parameters() if x.grad is not None]

    with attach(model, Scale(), backend="reference"):
        wanted = learned()
    monkeypatch.setattr(Tiled, "refuses", lambda self, needs: ["not in this test"])
    with attach(model, Scale(), backend="native"):
        found = learned()
    assert all(close_model(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_has_no_way_back_is_refused() -> None:
    shape = (1, 4, 2, 20, 20, 8, 8)
    sink = torch.zeros(1, 4, 1, 1).requires_grad_()
    with pytest.raises(BackendError, match="gradients are wanted of sink logits"):
        run("native", Same(), *draw(shape), a_call(shape, CAUSAL), sink=sink)
    with pytest.raises(BackendError, match=r"gradients are wanted of what Halved\(\) at PATTERN moves"):
        pulled("native", draw(shape), shape, method=Halved())
