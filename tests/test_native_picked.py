"""The native kernel's decode step over keys that were picked one by one, read where they lie."""

from __future__ import annotations

import pytest
import torch

from heedful.conformance.tolerances import close, within_budget
from heedful.core.errors import BackendError
from heedful.core.mask import Rule, Where
from heedful.core.method import Method
from heedful.core.ragged import Ragged
from heedful.core.summary import Summary
from heedful.core.values import replace
from heedful.engine.backends.tiled import Tiled
from heedful.kit.chosen import Chosen
from heedful.methods.sparse.decode.loki import Loki
from heedful.methods.sparse.decode.token_select import TokenSelect

from .kernel_calls import BIASES, CAUSAL, Everything, Same, a_bias, a_call, compare, draw, run
from .test_native import pytestmark
from .test_native_extremes import path
from .test_native_flat import UNEVEN, Columns, flat_step

__all__ = ["path", "pytestmark"]  # these tests too need a kernel, and run on each of its paths


@pytest.fixture(autouse=True)
def no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tiles would do in its place is no answer of the kernel's."""
    monkeypatch.setattr(Tiled, "refuses", lambda self, needs: ["not in this test"])


def picked(*shape: int, share: float = 0.2) -> Rule:
    """Keys by chance, `[b|1 h|1 1 k]`, so scattered that no ranges tell them."""
    table = torch.rand(*shape, generator=torch.Generator().manual_seed(4)) < share
    return Chosen(lambda rows: table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alike", [(1, 1), (1, 6), (2, 1), (2, 6)], ids=["all", "heads", "texts", "each"])
@pytest.mark.parametrize(
    "shape", [(2, 6, 2, 1, 1300, 64, 64), (2, 6, 6, 1, 90, 33, 21), (2, 6, 1, 1, 7, 8, 20)], ids=str
)
def test_it_agrees_with_the_reference(shape: tuple[int, ...], alike: tuple[int, int], dtype: torch.dtype) -> None:
    for share in (0.06, 0.5):
        compare("native", shape, (*CAUSAL, picked(*alike, 1, shape[4], share=share)), dtype=dtype)


def test_any_condition_will_do() -> None:
    """What has too many stretches for ranges is picked too."""
    compare("native", (1, 4, 2, 1, 300, 16, 16), (*CAUSAL, Where(lambda q, k: (q - k) % 2 == 0)))


@pytest.mark.parametrize("heads", [1, 4])
def test_padding_biases_soft_caps_and_sinks(heads: int) -> None:
    shape = (2, 4, 2, 1, 700, 16, 16)
    rules, pad = (*CAUSAL, picked(1, heads, 1, 700)), torch.tensor([0, 630])
    sink = torch.randn(1, 4, 1, 1, generator=torch.Generator().manual_seed(2))
    for biases in BIASES:
        compare("native", shape, rules, pad=pad, softcap=5.0, bias=a_bias(shape, biases), sink=sink)


def test_a_head_for_which_nothing_was_picked_gives_nothing() -> None:
    shape = (1, 4, 2, 1, 700, 16, 16)
    table = torch.rand(1, 4, 1, 700, generator=torch.Generator().manual_seed(4)) < 0.1
    table[:, 1] = False
    table[:, 2:] = False
    heard: list[Summary] = []
    found = run("native", Everything(heard), *draw(shape), a_call(shape, (*CAUSAL, Chosen(lambda rows: table))))
    assert found.flatten(2).any(-1).tolist() == [[True, False, False, False]]
    assert bool((heard[0].received == 0).logical_or(table[:, :, 0]).all())  # type: ignore[union-attr]


def test_a_row_of_nothing_but_minus_infinity_is_no_number() -> None:
    shape = (1, 4, 2, 1, 700, 8, 8)
    q, k, v = draw(shape)
    q, k = q.abs() * 1e20, k.abs() * -1e20
    assert bool(run("native", Same(), q, k, v, a_call(shape, (picked(1, 4, 1, 700),))).isnan().all())


@pytest.mark.parametrize("heads", [1, 4])
def test_what_was_not_picked_is_not_read(heads: int) -> None:
    """By any head of a group: not even as no number."""
    shape = (1, 4, 2, 1, 700, 24, 24)
    q, k, v = draw(shape)
    call = a_call(shape, (*CAUSAL, rule := picked(1, heads, 1, 700)))
    before = run("native", Same(), q, k, v, call)
    assert isinstance(rule, Chosen)
    seen = rule.pick(slice(0, 1)).expand(1, 4, 1, 700)[:, :, 0].view(1, 2, 2, 700).any(2)
    k[~seen], v[~seen] = float("nan"), float("nan")
    assert torch.equal(run("native", Same(), q, k, v, call), before)


def test_the_number_of_threads_changes_no_bit() -> None:
    shape = (2, 6, 2, 1, 6000, 16, 16)
    q, k, v = draw(shape)
    before = torch.get_num_threads()
    outs, told = [], list[Summary]()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            call = a_call(shape, (*CAUSAL, picked(1, 6, 1, 6000)))
            outs.append(run("native", Everything(told), q, k, v, call))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, outs[0]) for x in outs)
    assert all(torch.equal(x.received, told[0].received) for x in told)  # type: ignore[arg-type]


@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("counts", UNEVEN, ids=str)
def test_heads_of_unlike_length_are_read_where_they_lie(counts: tuple[int, ...], heads: tuple[int, int]) -> None:
    for each in (1, heads[0]):
        q, k, v, call = flat_step(counts, heads)
        call = replace(call, mask=call.mask & picked(1, each, 1, max(counts), share=0.4))
        heard: list[Summary] = []
        found = run("native", Columns(heard), q, k, v, call)
        assert isinstance(k, Ragged)
        assert k._whole is None, "nothing was padded"
        want = run("reference", Columns(heard), q, k, v, call)
        assert within_budget(found, want, run("reference", Same(), *(x.double() for x in (q, k, v)), call))
        for part in ("received", "seen", "entropy", "peak"):
            assert close(getattr(heard[0], part), getattr(heard[1], part)), part


@pytest.mark.parametrize(
    "method", [Loki(budget=40, seed=0), TokenSelect(budget=40, sinks=1, window=3, chunk=1)], ids=repr
)
def test_methods_that_pick_keys_are_served(method: Method) -> None:
    shape = (2, 6, 2, 1, 500, 16, 16)
    q, k, v = draw(shape)
    found, want = (run(name, method, q, k, v, a_call(shape, CAUSAL)) for name in ("native", "reference"))
    assert close(found, want)
    assert not close(found, run("native", Same(), q, k, v, a_call(shape, CAUSAL)))


def test_of_more_queries_than_one_nothing_is_summed_up() -> None:
    shape = (1, 4, 2, 2, 500, 16, 16)
    with pytest.raises(BackendError, match="too many separate stretches"):
        run("native", Columns([]), *draw(shape), a_call(shape, (*CAUSAL, picked(1, 1, 2, 500))))
