"""The GPU's kernels as operators of torch's: whole graphs hold them, exports too, and torch's own checks pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful.conformance.tolerances import close

from .kernel_calls import interpreting

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # of inductor's import


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    interpreting(monkeypatch)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def problem(learns: bool = False, whole: bool = False, n: int = 20) -> Any:
    """A causal call of two texts; `whole`: with all that can be given and asked for."""
    from heedful.gpu.launch import Problem

    made = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made).requires_grad_(learns)

    stops = torch.arange(1, n + 1, dtype=torch.int32)
    ranges = torch.stack([torch.zeros_like(stops), stops], -1)[None, None, :, None]
    tensors = (
        draw(2, n, 4, 8).transpose(1, 2).contiguous().detach().requires_grad_(learns),
        draw(2, 2, n, 8),
        draw(2, 2, n, 6),
    )
    if not whole:
        return Problem(*tensors, ranges, 0.3)
    return Problem(
        *tensors, ranges, 0.3, softcap=5.0, bias=draw(1, 4, 1, n), sink=draw(4),
        table=torch.ones(1, 1, 1, 1, dtype=torch.uint8), block=64, is_text=torch.ones(2, n, dtype=torch.uint8),
        carry=torch.randn(2, n, 3), first_at=torch.zeros(2, dtype=torch.int32), entropy=True, place=True,
        received=True, reach=n,
    )  # fmt: skip


def weighed() -> Any:
    """A call whose weights are each made of their own score."""
    return replace(problem(True), received=True, form="sigmoid", shift=-1.0, mean=True)


def split() -> Any:
    """A call whose keys are divided among programs."""
    from heedful.gpu.launch import Problem

    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 300, 8), torch.randn(1, 1, 300, 6)
    return Problem(q, k, v, torch.tensor([0, 300], dtype=torch.int32).expand(1, 1, 3, 1, 2).contiguous(), 0.3)


def one_query(listed: bool = False, weights: bool = True) -> Any:
    from heedful.gpu.launch import Step

    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 6)
    ends = torch.tensor([0, 5], dtype=torch.int32).expand(2, 2, 2).contiguous()
    places = torch.randperm(30)[:5].to(torch.int32).expand(2, 2, 5).contiguous()
    more = {"places": places, "bias": torch.randn(1, 4, 1, 30), "sink": torch.randn(4), "softcap": 5.0}
    return Step(q, k, v, ends, 0.3, 30, 5, weights=weights, **(more if listed else {}))


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torch_s_own_checks_pass(learns: bool, whole: bool) -> None:
    from heedful.gpu import operators

    torch.library.opcheck(operators._attend, problem(learns, whole).parts)


@pytest.mark.parametrize("form", ["", "relu"])
def test_a_split_is_laid_out_as_foretold(form: str) -> None:
    from heedful.gpu import operators

    torch.library.opcheck(operators._attend, replace(split(), form=form).parts, test_utils="test_faketensor")


def test_weights_of_their_own_scores_pass_torch_s_checks() -> None:
    from heedful.gpu import operators

    torch.library.opcheck(operators._attend, weighed().parts, test_utils=("test_schema", "test_faketensor"))
    p = weighed()
    answer = operators.attend(p)
    (found,) = torch.autograd.grad(answer.out.sum(), p.q)
    compiled = torch.compile(lambda q: operators.attend(replace(p, q=q)).out.sum(), backend="aot_eager", fullgraph=True)
    (want,) = torch.autograd.grad(compiled(p.q), p.q)
    assert close(found, want)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_they_pass_for_the_way_back(whole: bool) -> None:
    from heedful.gpu import launch, operators

    p = problem(whole=whole)
    answer = launch.attend(p)
    columns = None if answer.received is None else answer.received.cos()
    given = answer.out, answer.lse, answer.out.sin(), columns
    torch.library.opcheck(operators._pull, (*given, whole, whole, *p.parts))


@pytest.mark.parametrize(("listed", "weights"), [(False, True), (True, True), (True, False)])
def test_they_pass_for_one_query(listed: bool, weights: bool) -> None:
    from heedful.gpu import operators

    torch.library.opcheck(operators._step, one_query(listed, weights).parts)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_holds_them_in_one_graph(backend: str) -> None:
    from heedful.gpu.launch import Problem, Step
    from heedful.gpu.operators import attend, step

    p, one = problem(True, True), one_query(True)
    leaves = p.q, p.k, p.v, p.bias, p.sink

    def told(*parts: Any) -> tuple[Tensor, ...]:
        answer = attend(Problem(*parts))
        return answer.out.sin(), answer.lse.cos(), answer.received, *step(Step(*one.parts))

    compiled: Callable[..., tuple[Tensor, ...]] = torch.compile(told, backend=backend, fullgraph=True)
    found, want = compiled(*p.parts), told(*p.parts)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    pulled = [torch.autograd.grad(out[0].sum() + out[2].square().sum(), leaves) for out in (found, want)]
    assert all(close(a, b) for a, b in zip(*pulled, strict=True))
    assert [x.requires_grad for x in found] == [True, False, True, False, False]


def test_what_nobody_wants_the_way_back_of_costs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from heedful.gpu import launch
    from heedful.gpu.operators import attend

    called: list[str] = []
    plain = launch._call
    monkeypatch.setattr(
        launch, "_call", lambda kernel, *a, **b: (called.append(kernel.fn.__name__), plain(kernel, *a, **b))
    )
    p = problem(True, True)
    answer = attend(p)
    torch.autograd.grad(answer.out.sum(), p.q, retain_graph=True)
    assert "meet_columns" not in called
    assert answer.received is not None
    torch.autograd.grad(answer.received.square().sum(), p.q)
    assert "meet_columns" in called


def test_there_are_no_second_derivatives() -> None:
    from heedful.gpu.operators import attend

    p = problem(True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(attend(p).out.sum(), p.q, create_graph=True)


def test_an_export_holds_them() -> None:
    from heedful.gpu.launch import Problem, Step
    from heedful.gpu.operators import attend, step

    p, one = problem(), one_query()

    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return attend(Problem(q, k, v, p.ranges, p.scale)).out + 1, step(Step(*one.parts))[0]

    given = p.q.detach(), p.k.detach(), p.v.detach()
    made = torch.export.export(Layer(), given)
    assert {"heedful.attend.default", "heedful.step.default"} <= {str(x.target) for x in made.graph.nodes}
    assert all(torch.equal(a, b) for a, b in zip(made.module()(*given), Layer()(*given), strict=True))
