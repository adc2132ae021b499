"""The native kernel on every instruction set of this machine: scores at the ends of float32, and sums of threads."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import native
from heedful.conformance.tolerances import LOW_PRECISION, close, error
from heedful.core.call import Call
from heedful.core.key_ranges import tidy
from heedful.core.mask import Blocks, Rule, Where
from heedful.core.method import Method
from heedful.core.reweight import Reweight, reweights
from heedful.core.rules import Ranged
from heedful.core.summary import PARTS, Summary
from heedful.engine.backends import native as backend

from .kernel_calls import CAUSAL, WEIGHINGS, Everything, Same, Weighed, a_call, compare, compare_pulled, draw, run
from .samples import PAPER
from .test_native import pytestmark

__all__ = ["pytestmark"]  # these tests too need a kernel

KERNEL = native.library()
PATHS = () if isinstance(KERNEL, str) else KERNEL.paths
ONE_BEHIND: tuple[Rule, ...] = (*CAUSAL, Where(lambda q, k: q - k == 1))  # the first row sees nothing


@pytest.fixture(params=PATHS, autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    assert isinstance(KERNEL, native.Library)
    kernel = dataclasses.replace(KERNEL, path=request.param)
    monkeypatch.setattr(backend, "library", lambda: kernel)
    return kernel.path


def both(q: Tensor, k: Tensor, v: Tensor, rules: tuple[Rule, ...], sink: Tensor | None = None) -> list[Tensor]:
    shape = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    return [run(name, Same(), q, k, v, a_call(shape, rules), sink) for name in ("native", "reference")]


def same(found: Tensor, want: Tensor) -> bool:
    """No number in the same places, and close in the others."""
    return torch.equal(found.isnan(), want.isnan()) and close(found.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [40, 1])
@pytest.mark.parametrize("rules", [CAUSAL, ONE_BEHIND])
def test_scores_may_lie_at_any_depth(n: int, rules: tuple[Rule, ...], dtype: torch.dtype) -> None:
    """Queries and keys times 1e15: scores of 1e30 and more on both sides of zero, and rows of negative ones alone."""
    shape = (1, 4, 2, n, 40, 16, 16)
    q, k, v = draw(shape)
    q[:, :2], k[:, 0] = q[:, :2].abs(), -k[:, 0].abs()  # the first group's scores are negative
    q, k, v = (1e15 * q).to(dtype), (1e15 * k).to(dtype), v.to(dtype)
    call = a_call(shape, rules)
    heard: list[Summary] = []
    found, want = (run(name, Everything(heard), q, k, v, call) for name in ("native", "reference"))
    assert bool(want[:, :2, -1].any())
    assert close(found, want)
    for part in ("received", "peak", "place", "first", "distance", "carried", "seen"):
        assert close(getattr(heard[0], part).float(), getattr(heard[1], part).float()), part
    assert float(heard[0].entropy.abs().max()) == 0.0, "one key has it all"  # type: ignore[union-attr]


@pytest.mark.parametrize("n", [700, 40, 1])
def test_a_row_of_nothing_but_minus_infinity_is_no_number(n: int) -> None:
    shape = (1, 4, 2, n, 700, 8, 8)
    q, k, v = draw(shape)
    q, k = q.abs() * 1e20, k.abs() * 1e20
    k[:, 0] = -k[:, 0]  # all that the first group sees is minus infinity
    k[:, 1] /= 1e20
    k[:, 1, :600] *= -1e20  # the other's last rows see numbers too, in a later chunk
    found, want = both(q, k, v, ())
    assert bool(want[:, :2].isnan().all())
    assert bool(want[:, 2:].isfinite().all())
    assert same(found, want)
    # under a causal mask too, where the reference's rows turn to what is hidden
    found, _ = both(q, k, v, CAUSAL)
    assert bool(found[:, :2].isnan().all())
    assert found[0, 2:].isnan().any(-1).all(0).tolist() == [700 - n + i < 600 for i in range(n)]


@pytest.mark.parametrize("n", [40, 1])
def test_a_row_that_sees_nothing_is_zero_whatever_is_hidden(n: int) -> None:
    shape = (1, 4, 2, n, 40, 8, 8)
    q, k, v = draw(shape)
    q, k = q.abs() * 1e20, k.abs() * -1e20
    table = torch.zeros(1, 1, math.ceil(n / 32), 2, dtype=torch.bool)
    hidden: list[tuple[Rule, ...]] = [(Where(lambda q, k: q + k < 0),), (*CAUSAL, Blocks(table, 32))]
    for rules in hidden:
        heard: list[Summary] = []
        assert not bool(run("native", Everything(heard), q, k, v, a_call(shape, rules)).any())
        assert not any(bool(getattr(heard[0], part).any()) for part in PARTS)


@pytest.mark.parametrize("n", [40, 1])
@pytest.mark.parametrize("size", [1e31, -1e31, -math.inf])
def test_a_sink_logit_may_lie_at_any_depth(n: int, size: float) -> None:
    q, k, v = draw((1, 4, 2, n, 40, 8, 8))
    sink = torch.full((1, 4, 1, 1), size)
    for rules in (CAUSAL, ONE_BEHIND):
        assert close(*both(q, k, v, rules, sink))
    # with a sink that is a number to look at, a row of minus infinities is a number after all
    assert same(*both(q.abs() * 1e20, k.abs() * -1e20, v, (), sink))


@pytest.mark.parametrize("n", [40, 1])
def test_a_weight_too_small_for_a_number_carries_nothing(n: int) -> None:
    q, k, v = draw((1, 4, 2, n, 40, 8, 8))
    q, k = q.abs() + 1, k.abs() + 1
    k[:, :, 3] *= -200
    v[:, :, 3] = 1e38
    assert close(*both(q, k, v, ()))


@pytest.mark.parametrize("shape", [(0, 1), (1, 0)], ids=["no text", "no query"])
def test_a_call_without_queries_does_nothing(shape: tuple[int, int], path: str) -> None:
    assert isinstance(KERNEL, native.Library)
    batch, queries = shape
    problem = native.Problem(batch, 2, 1, queries, 4, 8, 8)
    problem.threads = 1
    dataclasses.replace(KERNEL, path=path).attend(problem)


@pytest.mark.parametrize("heads", [(6, 2), (4, 1), (5, 5)])
def test_the_number_of_threads_changes_no_bit(heads: tuple[int, int]) -> None:
    shape = (2, *heads, 700, 700, 16, 16)
    q, k, v = draw(shape)
    before = torch.get_num_threads()
    told: list[Summary] = []
    try:
        for threads in (1, 2, 2, 2, 2, 5):
            torch.set_num_threads(threads)
            run("native", Everything(told), q, k, v, a_call(shape, CAUSAL))
    finally:
        torch.set_num_threads(before)
    for part in PARTS:
        first = getattr(told[0], part)
        assert all(torch.equal(getattr(x, part), first) for x in told[1:]), part


@pytest.mark.parametrize(
    "shape", [(2, 6, 2, 150, 150, 33, 21), (1, 4, 1, 7, 600, 64, 64), (1, 2, 2, 1, 90, 16, 7)], ids=str
)
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_bfloat16_is_as_exact_as_torchs_and_its_sums_as_float32(shape: tuple[int, ...], mean: float) -> None:
    """Weights may be rounded on their way to the values, as torch's own kernel does it, but not where they are told."""
    q, k, v = (x.bfloat16() for x in draw(shape))
    v = v + mean
    call = a_call(shape, CAUSAL)
    heard: list[Summary] = []
    found, eager = (run(name, Everything(heard), q, k, v, call) for name in ("native", "reference"))
    exact = run("reference", Same(), q.double(), k.double(), v.double(), call)
    assert error(found, exact) <= LOW_PRECISION * error(eager, exact)
    for part in PARTS:
        assert close(getattr(heard[0], part).float(), getattr(heard[1], part).float()), part


class Quieter(Method):
    """Takes most of the weight from the first two keys, and gives it to the others."""

    paper = PAPER
    causal = False

    @reweights()
    def move(self, summary: Summary, call: Call) -> Reweight:
        loud = (call.pairs.k_index[:, :, 0] < 2).expand(-1, call.heads, -1)
        return Reweight(torch.where(loud, 0.01, 1.0), ~loud)


def test_what_a_shift_takes_away_was_not_rounded_before() -> None:
    """Where keys had most of the weight and all but lose it, roundings of theirs would be most of what is left."""
    shape = (1, 4, 2, 50, 200, 16, 16)
    q, k, v = draw(shape)
    q, k, v = torch.ones_like(q), k / 10, v / 100
    k[:, :, 0], k[:, :, 1], v[:, :, :2] = 1.4, 1.35, 10.0
    q, k, v = (x.bfloat16() for x in (q, k, v))
    call = a_call(shape, CAUSAL)
    found, eager = (run(name, Quieter(), q, k, v, call) for name in ("native", "reference"))
    exact = run("reference", Quieter(), q.double(), k.double(), v.double(), call)
    assert error(found, exact) <= LOW_PRECISION * error(eager, exact)


def few_stretches(queries: int, keys: int) -> Ranged:
    """Of each query two ranges of keys, near or in several chunks; some see nothing, and some one key."""
    made = torch.Generator().manual_seed(2)
    start = torch.randint(0, keys, (1, 4, queries, 2), generator=made)
    stop = (start + torch.randint(0, 90, start.shape, generator=made) * (start % 3 != 0)).clamp(max=keys)
    stop[:, :, ::7, 0], start[:, :, ::7, 0] = keys, keys - 1
    start[:, :, 5::11] = stop[:, :, 5::11] = 0
    return Ranged(tidy(torch.stack([start, stop], -1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [None, *WEIGHINGS], ids=repr)
def test_rows_that_see_some_stretches_of_some_chunks(how: Any, dtype: torch.dtype) -> None:
    shape = (2, 4, 2, 70, 600, 16, 16)
    compare("native", shape, (few_stretches(70, 600),), dtype=dtype, how=how)
    if dtype == torch.float32:
        method = Same() if how is None else Weighed(how)
        compare_pulled("native", shape, (few_stretches(70, 600),), method=method, softcap=3.0)


def test_what_no_row_near_sees_is_not_multiplied() -> None:
    """A value that is no number reaches the rows that see it, and none of the others in their block."""
    shape = (1, 1, 1, 96, 600, 16, 16)
    q, k, v = draw(shape)
    ranges = torch.tensor([[0, 10]]).where(torch.arange(96).view(1, 1, 96, 1, 1) < 48, torch.tensor([[500, 510]]))
    odd = v.index_fill(2, torch.tensor([3]), torch.nan)
    found, want = (run("native", Same(), q, k, x, a_call(shape, (Ranged(ranges),))) for x in (odd, v))
    assert found[:, :, :48].isnan().all()
    assert torch.equal(found[:, :, 48:], want[:, :, 48:])
