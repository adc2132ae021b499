"""What scores gain by distance, which the native kernel reads and sums up along diagonals, there and back."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from heedful.conformance.tolerances import LOW_PRECISION, close, error, within_budget
from heedful.core.call import Call
from heedful.core.errors import SiteError
from heedful.core.mask import Rule, Where
from heedful.core.method import Method
from heedful.core.sites import Site, adds_by_distance, at
from heedful.engine.backends import native_call

from .kernel_calls import CAUSAL, RULES, WEIGHINGS, Weighed, a_call, draw, run
from .samples import PAPER
from .test_native import pytestmark
from .test_native_extremes import path

__all__ = ["path", "pytestmark"]  # these tests too need a kernel, and run on each of its paths

FARTHEST = 180
# several heads to a group; more queries than a block has rows; keys from before; one query; one key
SHAPES = (
    (2, 4, 2, 40, 40, 16, 16), (1, 4, 1, 150, 150, 8, 24), (2, 6, 2, 33, 70, 16, 16),
    (2, 2, 1, 1, 30, 8, 8), (1, 3, 1, 1, 1, 8, 8),
)  # fmt: skip


def a_table(heads: int) -> Tensor:
    return torch.randn(heads, 2 * FARTHEST, generator=torch.Generator().manual_seed(5))


class Leaning(Method):
    """Adds what a table says of each distance."""

    paper = PAPER
    table: Tensor  # [h|1 m]

    @adds_by_distance
    def lean(self, apart: Tensor, call: Call) -> Tensor:
        return self.table[:, apart + FARTHEST]


class Shown(Leaning):
    """The same, pair by pair, as an edit of the scores that it is shown."""

    @at(Site.SCORES)
    def lean(self, scores: Tensor, call: Call) -> Tensor:  # type: ignore[override]
        return scores + torch.stack([head[call.distance[:, 0] + FARTHEST] for head in self.table], 1)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """What the kernel is asked for on the way back."""
    monkeypatch.setattr(native_call, "pulled", seen := Mock(wraps=native_call.pulled))
    return seen


def given_back(
    backend: str, method: type[Leaning], shape: tuple[int, ...], heads: int, more: Any = None, **beside: Any
) -> tuple[Tensor, ...]:
    """Heads, and what queries, keys, values and the table are given when these are given waves."""
    dtype = beside.pop("dtype", torch.float32)
    leaves = [x.to(dtype).requires_grad_() for x in (*draw(shape), a_table(heads))]
    stack = method(leaves[3]) if more is None else method(leaves[3]) | more
    call = a_call(shape, beside.pop("rules", CAUSAL), beside.pop("pad", None))
    found = run(backend, stack, *leaves[:3], call, **beside)
    text = call.is_text[..., None]
    waves = torch.arange(found.numel(), dtype=dtype).view_as(found).sin() * text
    return found.detach() * text, *torch.autograd.grad((found * waves).sum(), leaves)


@pytest.mark.parametrize(
    "rules", [CAUSAL, (), RULES["blind rows"], RULES["sliding"]], ids=["causal", "both", "blind rows", "sliding"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("each", [True, False], ids=["each head", "all heads"])
def test_there_and_back(each: bool, shape: tuple[int, ...], rules: tuple[Rule, ...], asked: Mock) -> None:
    heads = shape[1] if each else 1
    found = given_back("native", Leaning, shape, heads, rules=rules)
    (call,) = asked.call_args_list
    assert call.args[1].diagonal
    want, exact = (
        given_back("reference", Shown, shape, heads, rules=rules, dtype=t) for t in (torch.float32, torch.float64)
    )
    assert within_budget(found[0], want[0], exact[0])
    for one, other in zip(found[1:], exact[1:], strict=True):
        assert close(one, other.float())


@pytest.mark.parametrize("more", [None, *map(Weighed, WEIGHINGS)], ids=repr)
@pytest.mark.parametrize("pad", [None, torch.tensor([0, 7])], ids=["whole", "padded"])
def test_of_texts_that_begin_later_and_weights_of_other_kinds(pad: Tensor | None, more: Any, asked: Mock) -> None:
    found, want = (
        given_back(backend, method, SHAPES[0], 4, more, pad=pad)
        for backend, method in (("native", Leaning), ("reference", Shown))
    )
    assert asked.call_args.args[1].diagonal
    assert all(close(one, other) for one, other in zip(found, want, strict=True))


def test_beside_a_soft_cap_a_bias_and_in_some_heads_alone() -> None:
    shape = SHAPES[0]
    leaves = [x.requires_grad_() for x in (*draw(shape), a_table(4))]

    def told(backend: str, method: type[Leaning]) -> tuple[Tensor, ...]:
        stack = method(leaves[3]).on(heads=[1, 2]) | method(a_table(1))  # type: ignore[arg-type]
        heads = run(backend, stack, *leaves[:3], a_call(shape, CAUSAL), sink=torch.linspace(-1, 1, 4).view(1, 4, 1, 1))
        return heads.detach(), *torch.autograd.grad(heads.square().sum(), leaves)

    found, want = told("native", Leaning), told("reference", Shown)
    assert all(close(one, other) for one, other in zip(found, want, strict=True))
    assert not bool(found[4][[0, 3]].any())


@pytest.mark.parametrize("rules", [CAUSAL, ()], ids=["causal", "both"])
def test_it_is_derived_twice(rules: tuple[Rule, ...], asked: Mock) -> None:
    shape = (2, 4, 2, 20, 20, 8, 8)

    def twice(backend: str, method: type[Leaning]) -> tuple[Tensor, ...]:
        leaves = [x.requires_grad_() for x in (*draw(shape), a_table(4))]
        heads = run(backend, method(leaves[3]), *leaves[:3], a_call(shape, rules))
        first = torch.autograd.grad(heads.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)  # type: ignore[arg-type]

    for one, other in zip(twice("native", Leaning), twice("reference", Shown), strict=True):
        assert close(one, other)


def test_a_table_that_learns_alone_beside_one_query_whose_keys_are_scattered() -> None:
    shape, rules = SHAPES[3], (*CAUSAL, Where(lambda q, k: k % 2 == 0))
    found, want = [], []
    for backend, method, into in (("native", Leaning, found), ("reference", Shown, want)):
        leaf = a_table(2).requires_grad_()
        heads = run(backend, method(leaf), *draw(shape), a_call(shape, rules))
        into += [heads.detach(), *torch.autograd.grad(heads.square().sum(), leaf)]
    assert all(close(one, other) for one, other in zip(found, want, strict=True))


def test_what_is_gained_is_not_rounded_to_half_precision() -> None:
    shape, table = SHAPES[0], 16 + a_table(4)
    q, k, v = (x.bfloat16() for x in draw(shape))
    found = run("native", Leaning(table), q, k, v, a_call(shape, CAUSAL))
    exact = run("reference", Leaning(table.double()), q.double(), k.double(), v.double(), a_call(shape, CAUSAL))
    assert error(found, exact) <= LOW_PRECISION * error(exact.bfloat16(), exact)


@pytest.mark.parametrize("made", [torch.zeros, lambda n: torch.zeros(2, 1), lambda n: None, lambda n: 1.0])
@pytest.mark.parametrize("backend", ["tiled", "native"])
def test_what_cannot_be_added(backend: str, made: Any) -> None:
    class Wrong(Method):
        paper = PAPER

        @adds_by_distance
        def lean(self, apart: Tensor, call: Call) -> Tensor:
            return made(len(apart))

    with pytest.raises(
        SiteError, match=r"must return what scores gain at each distance, \[h\|1, m\] = \(4, \d+\), got"
    ):
        run(backend, Wrong(), *draw(SHAPES[0]), a_call(SHAPES[0], CAUSAL))
