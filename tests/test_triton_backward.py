"""The way back through the GPU's kernels, in triton's interpreter, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heedful import attach, check
from heedful.conformance.bare import serving
from heedful.conformance.tolerances import close_model, error
from heedful.core.errors import BackendError
from heedful.core.mask import Blocks, First, Rule, Where, Window
from heedful.core.method import Method
from heedful.methods import ACT, SinkRate, SpargeAttn
from heedful.tiny import tiny, tiny_inputs

from .kernel_calls import (
    BIASES,
    CAUSAL,
    DEVICE,
    RULES,
    Court,
    Everything,
    Halved,
    Same,
    a_bias,
    a_call,
    compare_pulled,
    draw,
    interpreting,
    pulled,
    run,
)
from .samples import Scale

SHAPES = [(2, 4, 2, 19, 19, 8, 8), (1, 4, 1, 50, 50, 10, 6), (1, 6, 2, 1, 50, 64, 64)]
LARGE = [(1, 2, 2, 140, 140, 16, 256), (1, 7, 1, 65, 129, 128, 128)]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreting(monkeypatch)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(x, marks=pytest.mark.slow) for x in LARGE)], ids=str)
def test_it_agrees_with_the_reference(shape: tuple[int, ...], rules: tuple[Rule, ...]) -> None:
    compare_pulled("triton", shape, rules)


@pytest.mark.parametrize("n", [40, 3])
def test_padding(n: int) -> None:
    compare_pulled("triton", (2, 4, 2, n, 40, 16, 16), (*CAUSAL, Window(9) | First(2)), pad=torch.tensor([0, 7]))


@pytest.mark.parametrize("softcap", [2.0, 20.0])
@pytest.mark.parametrize("biases", [None, *BIASES])
def test_soft_caps_biases_and_sinks(softcap: float, biases: tuple[bool, ...] | None) -> None:
    shape = (2, 4, 2, 20, 40, 16, 16)
    bias = None if biases is None else a_bias(shape, biases)
    sink = torch.linspace(-1, 4, 4).view(1, 4, 1, 1)
    learned = ("sink",) if bias is None else ("bias", "sink")
    compare_pulled("triton", shape, CAUSAL, learned, softcap=softcap, bias=bias, sink=sink)


APART = [(False, False, False), (False, True, False), (True, True, False), (False, True, True), (True, False, True)]


@pytest.mark.parametrize("apart", APART, ids=str)
@pytest.mark.parametrize("rules", [(), (*CAUSAL, Window(30) | First(2))], ids=["everything", "sinks and a window"])
def test_what_a_bias_is_given_is_that_of_all_it_stands_for(apart: tuple[bool, ...], rules: tuple[Rule, ...]) -> None:
    shape = (2, 2, 1, 70, 90, 16, 16)
    compare_pulled("triton", shape, rules, ("bias",), bias=a_bias(shape, apart))


def test_a_bias_under_padding_and_a_table() -> None:
    shape = (2, 4, 2, 70, 70, 16, 16)
    table = torch.tensor([[True, False], [True, True]])[None, None]
    compare_pulled("triton", shape, (*CAUSAL, Blocks(table, 64)), ("bias",), bias=a_bias(shape, (True, True, True)))
    compare_pulled(
        "triton", shape, CAUSAL, ("bias",), pad=torch.tensor([0, 7]), bias=a_bias(shape, (False, True, False))
    )


def test_a_sink_gives_nothing_where_nothing_is_seen() -> None:
    rules, sink = (*CAUSAL, Where(lambda q, k: q != 6)), torch.tensor([-1.0, 3.0]).view(1, 2, 1, 1)
    compare_pulled("triton", (1, 2, 1, 9, 9, 8, 8), rules, ("sink",), sink=sink)


def test_a_bias_alone_may_learn() -> None:
    """Queries, keys and values that need nothing are given nothing."""
    shape = (1, 4, 2, 20, 20, 8, 8)
    for name in ("reference", "triton"):
        bias = a_bias(shape, BIASES[0]).requires_grad_()
        tensors = draw(shape)
        run(name, Same(), *tensors, a_call(shape, CAUSAL), bias=bias).sum().backward()
        assert bias.grad is not None
        assert all(x.grad is None for x in tensors)


@pytest.mark.parametrize("heads", [1, 2])
def test_block_tables(heads: int) -> None:
    table = torch.rand(1, heads, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    compare_pulled("triton", (1, 4, 2, 150, 150, 16, 16), (*CAUSAL, Blocks(table, 64)))


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(x, marks=pytest.mark.slow) for x in LARGE)], ids=str)
def test_a_loss_on_what_keys_receive(shape: tuple[int, ...], rules: tuple[Rule, ...]) -> None:
    compare_pulled("triton", shape, rules, method=Court())


def test_such_a_loss_under_all_else() -> None:
    """Padding, whose rows count for nothing, a soft cap, a bias and sinks that learn."""
    shape, sink = (2, 4, 2, 20, 40, 16, 16), torch.linspace(-1, 4, 4).view(1, 4, 1, 1)
    more = {"method": Court(), "bias": a_bias(shape, (True, True, True)), "sink": sink, "softcap": 5.0}
    compare_pulled("triton", shape, (), ("bias", "sink"), pad=torch.tensor([0, 23]), **more)


def test_such_a_loss_under_a_table() -> None:
    table = torch.tensor([[True, False], [True, True]])[None, None]
    compare_pulled("triton", (1, 2, 1, 70, 70, 16, 16), (*CAUSAL, Blocks(table, 64)), method=Court())


@settings(max_examples=5)
@given(
    n=st.integers(1, 70), past=st.integers(0, 40), heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (5, 5)]),
    d=st.integers(1, 40), e=st.integers(1, 40), window=st.integers(1, 100),
)  # fmt: skip
def test_any_shape_agrees(n: int, past: int, heads: tuple[int, int], d: int, e: int, window: int) -> None:
    compare_pulled("triton", (1, *heads, n, n + past, d, e), (*CAUSAL, Window(window)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_loss_on_sums_in_low_precision(dtype: torch.dtype) -> None:
    """Queries and keys are given as good as by the map in the same precision."""
    shape = (2, 6, 2, 60, 60, 32, 32)
    tensors = tuple(x.to(dtype) for x in draw(shape))
    exact = pulled("reference", tuple(x.double() for x in tensors), shape, method=Court())
    q, k = (x.detach().requires_grad_() for x in tensors[:2])
    scores = (q @ k.repeat_interleave(3, 1).mT * 32**-0.5).masked_fill(torch.ones(60, 60).triu(1) > 0, -torch.inf)
    weights = scores.softmax(-1)
    heads, received = weights @ tensors[2].repeat_interleave(3, 1), weights.sum(-2)
    off = received - torch.arange(received.numel()).view_as(received).cos()
    waves = torch.arange(heads.numel(), dtype=torch.float64).view_as(heads).sin()
    map_s = torch.autograd.grad((heads * waves).sum() + off.square().sum(), (q, k))
    for a, b, c in zip(pulled("triton", tensors, shape, method=Court()), map_s, exact, strict=False):
        assert error(a, c) <= 2 * error(b, c)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_torch_s_own(dtype: torch.dtype) -> None:
    shape = (2, 6, 2, 60, 60, 32, 32)
    tensors = tuple(x.to(dtype) for x in draw(shape))
    exact = pulled("reference", tuple(x.double() for x in tensors), shape)
    leaves = [x.detach().requires_grad_() for x in tensors]
    plain = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    waves = torch.arange(plain.numel(), dtype=torch.float64).view_as(plain).sin()
    torch_s = torch.autograd.grad(plain, leaves, waves.to(dtype))
    for a, b, c in zip(pulled("triton", tensors, shape), torch_s, exact, strict=True):
        assert a.dtype == dtype
        assert error(a, c) <= 2 * error(b, c)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what a GPU does silently
def test_what_is_masked_may_hold_anything() -> None:
    shape = (1, 4, 2, 70, 70, 8, 8)
    q, k, v = draw(shape)
    rules = (*CAUSAL, Where(lambda a, b: b < 61))
    before = pulled("triton", (q, k, v), shape, rules, softcap=5.0)
    k[:, :, 61:], v[:, :, 61:] = 1e30, float("nan")
    after = pulled("triton", (q, k, v), shape, rules, softcap=5.0)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :, :61], b[:, :, :61])
    assert not any(bool(x[:, :, 61:].any()) for x in after[1:])


def test_readers_are_told_the_same_on_the_way() -> None:
    shape = (1, 4, 2, 20, 20, 8, 8)
    alone: list[object] = []
    beside: list[object] = []
    run("triton", Everything(alone), *draw(shape), a_call(shape, CAUSAL))  # type: ignore[arg-type]
    pulled("triton", draw(shape), shape, method=Everything(beside))  # type: ignore[arg-type]
    assert torch.equal(alone[0].received, beside[0].received)  # type: ignore[attr-defined]
    assert not beside[0].received.requires_grad  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "t5"])
def test_a_model_learns_through_it_what_it_learns_without(kind: str) -> None:
    """Sink logits and a bias of its own too."""
    model = tiny(kind).to(DEVICE)
    feed = {name: x.to(DEVICE) for name, x in tiny_inputs(model).items()}
    feed["labels"] = feed.get("decoder_input_ids", feed["input_ids"])

    def learned() -> list[Tensor]:
        model.zero_grad()
        model(**feed).loss.backward()
        return [x.grad.clone() for x in model.parameters() if x.grad is not None]

    with attach(model, Scale(), backend="reference"):
        wanted = learned()
    with attach(model, Scale(), backend="triton"):
        found = learned()
    assert all(close_model(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", [ACT, SinkRate, SpargeAttn])  # moves weight, reads sums, narrows the mask
def test_methods_keep_their_laws_on_the_kernel(kind: type[Method]) -> None:
    only = ("backends_agree", "told_alike", "masked_rows")
    assert "triton" in serving(kind.example())
    report = check(kind, only, DEVICE)
    assert report.ok, report


def test_what_has_no_way_back_is_refused() -> None:
    shape = (1, 4, 2, 20, 20, 8, 8)
    with pytest.raises(BackendError, match=r"through what Halved\(\).* moves"):
        pulled("triton", draw(shape), shape, method=Halved())
    q, k, v = (x.requires_grad_() for x in draw(shape))
    losses: list[Tensor] = []
    heads = run("triton", Court(), q, k, v, a_call(shape, CAUSAL), losses=losses)
    for x in (heads.sum(), losses[0]):
        with pytest.raises(BackendError, match="no second derivatives"):
            torch.autograd.grad(x, q, create_graph=True)
