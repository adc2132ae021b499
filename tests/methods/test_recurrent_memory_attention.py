"""RecurrentMemoryAttention against its three attentions and its queue, token by token."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import FieldError, Layer
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import SiteError
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.methods import RecurrentMemoryAttention
from tests.by_hand import in_pieces

CHUNK, WINDOW, SLOTS = 4, 2, 3
METHOD = RecurrentMemoryAttention(CHUNK, WINDOW, SLOTS)
SHAPE = Shape(q=23, k=23, dv=6)  # five chunks and a part: slots are overwritten twice
TEXT = torch.ones(2, 23, dtype=torch.bool)
TEXT[0, :5] = False


def _params(grad: bool = False) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = {"mix": (3,), "old": (2, 14), "new": (2, 14), "keeps": (2,)}
    found = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: x.requires_grad_(grad) for name, x in found.items()}


def _looks(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    raised = [torch.exp((q * key).sum() / math.sqrt(8)) for key in keys]
    return sum(x * value for x, value in zip(raised, values, strict=True)) / sum(raised)  # type: ignore[return-value]


def _by_hand(q: Tensor, k: Tensor, v: Tensor, p: dict[str, Tensor], g: int) -> Tensor:
    """One head of one text `[n d]`."""
    queue = [(torch.zeros(8).double(), torch.zeros(6).double())] * SLOTS  # the oldest first
    shares = p["mix"].exp() / p["mix"].exp().sum()
    rows = []
    for i in range(len(q)):
        if i and i % CHUNK == 0:
            chunk = k[i - CHUNK : i].sum(0) / CHUNK, v[i - CHUNK : i].sum(0) / CHUNK
            told = sum(
                (torch.cat(pair) * weight[g]).sum() for pair, weight in ((queue[0], p["old"]), (chunk, p["new"]))
            )
            gate = 1 / (1 + torch.exp(-told - p["keeps"][g]))
            mixed = [gate * old + (1 - gate) * new for old, new in zip(queue[0], chunk, strict=True)]
            queue = [*queue[1:], (mixed[0], mixed[1])]
        own, near = ([j for j in range(i + 1) if j // size == i // size] for size in (CHUNK, WINDOW))
        parts = [_looks(q[i], [k[j] for j in seen], [v[j] for j in seen]) for seen in (own, near)]
        parts.append(_looks(q[i], [key for key, _ in queue], [value for _, value in queue]))
        rows.append(sum(share * part for share, part in zip(shares, parts, strict=True)))
    return torch.stack(rows)  # type: ignore[arg-type]


def _wanted(bare: Bare, p: dict[str, Tensor], start: tuple[int, int] = (0, 0)) -> list[list[Tensor]]:
    return [
        [_by_hand(bare.q[b, h, at:], bare.k[b, h // 2, at:], bare.v[b, h // 2, at:], p, h // 2) for h in range(4)]
        for b, at in enumerate(start)
    ]


@pytest.mark.parametrize("padded", [False, True])
def test_heads_and_the_first_steps_gradient(padded: bool) -> None:
    bare, p = Bare(SHAPE, dtype=torch.float64, text=TEXT if padded else None), _params(grad=True)
    leaves = [*p.values(), bare.q.requires_grad_(), bare.k.requires_grad_(), bare.v.requires_grad_()]
    found, start = bare.run(METHOD, "reference", params=p)[0], (5, 0) if padded else (0, 0)
    wanted = _wanted(bare, p, start)
    for b, at in enumerate(start):
        for h in range(4):
            assert close(found[b, h, at:], wanted[b][h])
    loss = sum(found[b, :, at:].pow(2).sum() for b, at in enumerate(start))
    want = sum(head.pow(2).sum() for heads in wanted for head in heads)
    for one, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True):  # type: ignore[arg-type]
        assert bool(other.any())
        assert close(one, other, 512)


@pytest.mark.parametrize("padded", [False, True])
def test_a_state_of_fixed_size_goes_on_and_is_made_anew_of_the_cache(padded: bool) -> None:
    text, pad = (TEXT, torch.tensor([5, 0])) if padded else (None, None)
    bare, p = Bare(SHAPE, dtype=torch.float64, text=text), _params()
    whole, _ = bare.run(METHOD, "reference", params=p)
    state, found, alone = State(), [], []
    for first, stop in ((0, 7), (7, 8), (8, 9), (9, 19), (19, 20), (20, 23)):
        queries = bare.call.queries.take(slice(first, stop))
        keys = Positions.row(0, stop, pad=pad)
        call = replace(bare.call, params=p, queries=replace(queries, first=first), keys=keys, state=state)
        given = (bare.q[:, :, first:stop], bare.k[:, :, :stop], bare.v[:, :, :stop])
        found.append(METHOD.attend(given, call))
        alone.append(METHOD.attend(given, replace(call, state=State())))
        assert state.cache["slots"].shape == (2, 2, SLOTS, 14)
    real = TEXT[:, None, :, None] if padded else 1
    assert close(torch.cat(found, 2) * real, whole * real)
    assert close(torch.cat(alone, 2) * real, whole * real)


def test_what_left_its_chunk_is_not_read_again() -> None:
    bare, p, state = Bare(SHAPE, dtype=torch.float64), _params(), State()
    whole, _ = bare.run(METHOD, "reference", params=p)
    k = bare.k.clone()
    for first, stop in ((0, 12), (12, 18), (18, 23)):
        queries, keys = Positions.row(first, stop - first), Positions.row(0, stop)
        call = replace(bare.call, params=p, queries=queries, keys=keys, state=state)
        found = METHOD.attend((bare.q[:, :, first:stop], k[:, :, :stop], bare.v[:, :, :stop]), call)
        assert close(found, whole[:, :, first:stop])
        k[:, :, : stop // CHUNK * CHUNK] = 1.0


def test_in_a_model_step_by_step_and_after_a_crop() -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=16)["input_ids"]
    with attach(model, METHOD) as run, torch.no_grad():
        whole = run(input_ids=ids).logits
        parts, cache = in_pieces(run, ids, (9, 1, 6))
        assert close_model(parts, whole)
        cache.crop(-5)
        again = run(input_ids=ids[:, 11:], use_cache=True, **{CACHE: cache}).logits
        assert close_model(again, whole[:, 11:])


def test_only_causal_calls() -> None:
    with pytest.raises(SiteError, match="layer 0: a memory of past chunks needs a causal call"):
        Bare(rules=()).run(METHOD, "reference", params=_params())


def test_the_start() -> None:
    found = RecurrentMemoryAttention().parameters(Layer(0, 4, 2, 8, 6, 32))
    shapes = {"mix": (3,), "old": (2, 14), "new": (2, 14), "keeps": (2,)}
    assert {name: tuple(x.shape) for name, x in found.items()} == shapes
    assert not any(bool(x.any()) for x in found.values())


def test_errors() -> None:
    assert RecurrentMemoryAttention() == RecurrentMemoryAttention(512, 64, 32)
    assert RecurrentMemoryAttention.example() == RecurrentMemoryAttention(4, 2, 2)
    assert RecurrentMemoryAttention(1, 1, 1).slots == 1
    for name in ("chunk", "window", "slots"):
        with pytest.raises(FieldError, match=rf"{name} = 0: must be 1 or more"):
            RecurrentMemoryAttention(**{name: 0})
    with pytest.raises(FieldError, match=r"window = 3: must divide the chunk's 4 tokens; .*4"):
        RecurrentMemoryAttention(4, 3)
