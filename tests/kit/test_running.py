"""Sums over the keys so far: in chunks, call by call, padded and grouped, against loops over pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.errors import SiteError
from heedful.core.mask import Causal, Mask, Padding
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.kit.running import Running, divided, grouped, wide

N = 19
PADDED = torch.ones(2, N, dtype=torch.bool)
PADDED[0, :4] = False
PADDED[0, 9:11] = False
PADDED[1, 15:] = False
RATES = torch.tensor([0.5, 0.1, 2.0, 0.0], dtype=torch.float64)


def _call(first: int, n: int, state: State, text: Tensor | None, causal: bool = True) -> Call:
    rules = ((Causal(),) if causal else ()) + (() if text is None else (Padding(text),))
    return replace(
        Bare().call, queries=Positions.row(first, n), keys=Positions.row(0, first + n), mask=Mask(rules), state=state
    )


def _drawn() -> tuple[Tensor, Tensor, Tensor]:
    bare = Bare(dtype=torch.float64)
    return bare.q, bare.k, bare.v


def _loops(q: Tensor, k: Tensor, v: Tensor, text: Tensor | None, causal: bool, rates: Tensor | None) -> Tensor:
    text = torch.ones(2, N, dtype=torch.bool) if text is None else text
    out = torch.zeros(2, 4, N, v.shape[-1], dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            for i in range(N):
                for j in range(N):
                    if not text[b, j] or (causal and j > i):
                        continue
                    later = int(text[b, j + 1 : i + 1].sum())
                    far = 1.0 if rates is None else float(torch.exp(-rates[h] * later))
                    out[b, h, i] += far * (q[b, h, i] @ k[b, h // 2, j]) * v[b, h // 2, j]
    return out


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("text", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("rates", [None, RATES], ids=["even", "decay"])
def test_chunks_are_the_sum_over_pairs(chunk: int, text: Tensor | None, rates: Tensor | None) -> None:
    q, k, v = _drawn()
    running = Running(_call(0, N, State(), text), k, chunk)
    found = running.mixed("x", q, running.cut(k), running.cut(v), decay=rates)
    assert close(found, _loops(q, k, v, text, True, rates))


@pytest.mark.parametrize("text", [None, PADDED], ids=["whole", "padded"])
def test_without_causality_all_keys_count_for_all(text: Tensor | None) -> None:
    q, k, v = _drawn()
    running = Running(_call(0, N, State(), text, causal=False), k)
    assert close(running.mixed("x", q, running.cut(k), running.cut(v)), _loops(q, k, v, text, False, None))
    keep = torch.ones(2, N, dtype=torch.bool) if text is None else text
    assert close(running.sums("y", running.cut(v)), (v * keep[:, None, :, None]).sum(2, keepdim=True))
    assert torch.equal(running.ones(running.cut(v)).sum((1, 2, 3)), 2 * keep.sum(1).double())


Step = Callable[[Running, Tensor, Tensor, Tensor], Tensor]


def _even(running: Running, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = running.cut(k), running.cut(v)
    return running.mixed("x", q, k, v) + running.sums("y", v).repeat_interleave(2, 1)


def _decayed(running: Running, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return running.mixed("x", q, running.cut(k), running.cut(v), decay=RATES)


def _exponential(running: Running, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax over positions in each channel, of keys that grow so that every call has a new top."""
    k, v = running.cut(k * torch.arange(k.shape[2])[:, None] / 2), running.cut(v)
    top, fade = running.highest("top", k)
    k = running.exp(k - top)
    weights = running.sums("z", k, fade).repeat_interleave(2, 1)
    q = q.softmax(-1) / torch.where(weights > 0, weights, 1.0)
    return running.mixed("x", q, k, v, fade)


def _lifted(running: Running, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Squares of products, by features that are as many as pairs of channels."""
    return running.mixed("x", q, running.cut(k), running.cut(v), lift=_pairs)


def _pairs(x: Tensor) -> Tensor:
    return (x[..., :, None] * x[..., None, :]).flatten(-2)


def _peaks(running: Running, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return running.peaks("x", running.cut(k).abs())


def _averaged(running: Running, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return running.averaged("x", running.cut(_scores(k))[..., 0].repeat_interleave(2, 1), running.cut(v))


def _scores(k: Tensor) -> Tensor:
    """Some far above what came before, some far below, and for the first places so low that no exponential is left."""
    return k[..., :1] * 300 + torch.arange(k.shape[2])[:, None] * 40 - 900


STEPS = [_even, _decayed, _exponential, _lifted, _peaks, _averaged]


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_means_under_a_softmax_of_scores_that_all_queries_share(causal: bool, chunk: int) -> None:
    q, k, v = _drawn()
    found = _averaged(Running(_call(0, N, State(), PADDED, causal), k, chunk), q, k, v)
    assert found.shape == (2, 4, N if causal else 1, v.shape[-1])
    wanted = torch.zeros_like(found)
    for i in range(found.shape[2]):
        for b in range(2):
            seen = [j for j in range(i + 1 if causal else N) if PADDED[b, j]]
            for h in range(4 if seen else 0):
                weights = _scores(k)[b, h // 2, seen, 0].softmax(0)
                wanted[b, h, i] = weights @ v[b, h // 2, seen]
    assert close(found, wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_lifted_features_and_peaks(causal: bool) -> None:
    q, k, v = _drawn()
    running = Running(_call(0, N, State(), PADDED, causal), k, chunk=4)
    found, peaks = (step(running, q, k, v) for step in (_lifted, _peaks))
    for i in range(N):
        seen = PADDED[:, : i + 1 if causal else N, None]
        for h in range(4):
            key, value = (x[:, h // 2, : seen.shape[1]] for x in (k, v))
            weights = (key * q[:, h, i, None]).sum(-1, keepdim=True).square() * seen
            assert close(found[:, h, i], (weights * value).sum(1))
            assert torch.equal(peaks[:, h // 2, i if causal else 0], (key.abs() * seen).amax(1))


@pytest.mark.parametrize("text", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("step", STEPS)
def test_call_by_call_is_at_once_and_the_state_keeps_its_size(step: Step, text: Tensor | None) -> None:
    q, k, v = _drawn()
    whole = step(Running(_call(0, N, State(), text), k), q, k, v)
    state, parts, sizes = State(), [], []
    for first, end in ((0, 7), (7, 8), (8, 14), *((i, i + 1) for i in range(14, N))):
        running = Running(_call(first, end - first, state, text), k[:, :, :end], chunk=3)
        assert running.goes_on == (first > 0)
        parts.append(step(running, q[:, :, first:end], k[:, :, :end], v[:, :, :end]))
        sizes.append(sum(x.numel() for x in state.cache.values()))
    assert close(torch.cat(parts, 2), whole)
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("step", STEPS)
def test_what_the_state_does_not_hold_is_read_from_the_cache(step: Step) -> None:
    """After a cut, and where the cache was made without it."""
    q, k, v = _drawn()
    whole = step(Running(_call(0, N, State(), PADDED), k), q, k, v)
    state = State()
    step(Running(_call(0, 12, state, PADDED), k[:, :, :12]), q[:, :, :12], k[:, :, :12], v[:, :, :12])
    for given in (state, State()):
        running = Running(_call(10, N - 10, given, PADDED), k)
        assert not running.goes_on
        assert close(step(running, q[:, :, 10:], k, v), whole[:, :, 10:])


def test_the_softmax_of_channels_is_what_exponentials_come_to() -> None:
    _, k, v = _drawn()
    q = torch.zeros(2, 4, N, 8, dtype=torch.float64)
    found = _exponential(Running(_call(0, N, State(), None), k), q, k, v)
    for i in (0, 5, N - 1):
        weights = (k * torch.arange(N)[:, None] / 2)[:, :, : i + 1].softmax(2).mean(-1)
        assert close(found[:, ::2, i], (weights[..., None] * v[:, :, : i + 1]).sum(2))


def test_far_exponents_stay_finite_with_their_gradients() -> None:
    k = torch.tensor([[[[500.0], [-500.0], [0.0]]]], requires_grad=True)
    text = torch.tensor([[False, True, True]])
    call = replace(_call(0, 3, State(), text), heads=1, kv_heads=1)
    running = Running(call, k)
    found = running.exp(k - running.highest("top", k)[0])
    assert torch.equal(found.flatten(), torch.tensor([0.0, 0.0, 1.0]))
    running = Running(replace(call, mask=Mask((Causal(), Padding(text & False)))), k)
    none = running.exp(k - running.highest("top", k)[0])
    assert not bool(none.any())
    (grad,) = torch.autograd.grad((found + none).sum(), k)
    assert bool(grad.isfinite().all())


def test_nothing_but_text_is_summed_even_if_it_is_no_number() -> None:
    q, k, v = _drawn()
    wanted = _loops(q, k, v, PADDED, True, None)
    k, v = (x.masked_fill(~PADDED[:, None, :, None], torch.nan) for x in (k, v))
    running = Running(_call(0, N, State(), PADDED), k)
    assert close(running.mixed("x", q, running.cut(k), running.cut(v)), wanted)


def test_empty_slots_after_the_last_key_count_for_nothing() -> None:
    q, k, v = _drawn()
    call = _call(6, 5, State(), None)
    call = replace(call, keys=replace(Positions.row(0, N), is_filled=torch.arange(N).view(1, 1, N) < 11))
    running = Running(call, k)
    found = running.mixed("x", q[:, :, 6:11], running.cut(k), running.cut(v))
    assert close(found, _loops(q, k, v, None, True, None)[:, :, 6:11])


def test_the_past_is_counted_from_the_first_key() -> None:
    q, k, v = _drawn()
    call = replace(_call(0, N, State(), None), queries=Positions.row(9, 4), keys=Positions.row(3, 12))
    running = Running(call, k[:, :, :12])
    found = running.mixed("x", q[:, :, :4], running.cut(k[:, :, :12]), running.cut(v[:, :, :12]))
    seen = (q[:, :, 0, None] * k[:, :, :7].repeat_interleave(2, 1)).sum(-1, keepdim=True)
    assert close(found[:, :, 0], (seen * v[:, :, :7].repeat_interleave(2, 1)).sum(2))


def test_keys_of_its_own_alone() -> None:
    """What queries of earlier calls would have to ask of, too."""
    q, k, v = _drawn()
    state = State()
    _even(Running(_call(0, 12, state, None), k[:, :, :12]), q[:, :, :12], k[:, :, :12], v[:, :, :12])
    with pytest.raises(SiteError, match="layer 0: sums over earlier queries are needed, and the cache was cut back"):
        Running(_call(10, N - 10, state, None), k, own=True)
    Running(_call(0, N, state, None), k, own=True)
    assert Running(_call(12, N - 12, state, None), k, own=True).goes_on
    running = Running(_call(10, N - 10, State(), None), k, own=True)
    found = running.mixed("x", q[:, :, 10:], running.cut(k), running.cut(v))
    pairs = (q[:, :, 10:] @ k[:, :, 10:].repeat_interleave(2, 1).mT).tril()
    assert close(found, pairs @ v[:, :, 10:].repeat_interleave(2, 1))


def test_what_is_kept_is_for_each_text_and_not_for_each_token() -> None:
    q, k, v = _drawn()
    state = State()
    _even(Running(_call(0, N, state, None), k), q, k, v)
    assert {name: tuple(x.shape) for name, x in state.cache.items()} == {"x": (2, 2, 8, 8), "y": (2, 2, 8), "end": (2,)}
    state.cache._shelf.crop(4)
    assert {name: tuple(x.shape) for name, x in state.cache.items()} == {"x": (2, 2, 8, 8), "y": (2, 2, 8), "end": (2,)}
    assert state.cache["end"].tolist() == [-1, -1]


def test_small_things() -> None:
    a, b = torch.randn(2, 4, 3, 5), torch.randn(2, 2, 5, 6)
    assert close(grouped(a, b), a @ b.repeat_interleave(2, 1))
    half, double = wide(torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64))
    assert (half.dtype, double.dtype) == (torch.float32, torch.float64)
    assert torch.equal(
        divided(torch.tensor([[2.0, 4.0, 2.0], [0.0, 0.0, 0.0]])), torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    )


def test_shapes_of_calls_are_not_mixed_up() -> None:
    """One query, one key head, values of another width."""
    bare = Bare(Shape(h=4, g=1, q=1, k=6, dv=3), dtype=torch.float64)
    running = Running(bare.call, bare.k)
    found = running.mixed("x", bare.q, running.cut(bare.k), running.cut(bare.v))
    assert close(found, bare.q @ (bare.k.mT @ bare.v))
