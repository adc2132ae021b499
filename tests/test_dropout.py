"""Dropout of attention weights: what serves it, that it is the usual one, and that the way back drops the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful.conformance.tolerances import close
from heedful.core.summary import Summary
from heedful.engine.attend import attend
from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends import tiled
from heedful.engine.needs import Needs
from heedful.engine.run_state import RunState
from heedful.engine.select import select

from .kernel_calls import CAUSAL, Everything, Same, Stack, a_call, draw

SHAPE = (512, 4, 2, 6, 6, 8, 6)
P = 0.3


def dropped(backend: str, q: Tensor, k: Tensor, v: Tensor, told: list[Summary] | None = None, p: float = P) -> Tensor:
    call = a_call((len(q), *SHAPE[1:3], q.shape[2], *SHAPE[4:]), CAUSAL)
    state = RunState(Stack((Same() if told is None else Everything(told),)))
    state.new_forward()
    job = AttentionCall(state.plan(call), state, call, dropout=p)
    return attend(job, q, k, v, lambda needs: select(backend, needs))[0]


def test_it_is_tiles_that_serve_it_where_the_map_is_read() -> None:
    assert select("auto", Needs(dropout=True, sum_steps=("a reader",))).name == "tiled"
    assert select("auto", Needs(dropout=True)).name == "sdpa"


@pytest.mark.parametrize("backend", ["reference", "tiled", "sdpa"])
def test_a_weight_is_dropped_or_made_up_for(backend: str) -> None:
    """With a value of its own for each key the heads are the weights: of each it is 0, or its share of those kept."""
    q, k, _ = (x[:1].expand(SHAPE[0], -1, -1, -1) for x in draw(SHAPE))
    v = torch.eye(6).expand(SHAPE[0], 2, 6, 6)
    weights = dropped("reference", q[:1], k[:1], v[:1], p=0.0)
    found = dropped(backend, q, k, v)
    gone = found == 0
    assert close(found.masked_fill(gone, 0.0), (weights / (1 - P)).expand_as(found).masked_fill(gone, 0.0))
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    assert bool(gone[..., ~seen].all())
    share, count = gone[..., seen].double().mean(), gone[..., seen].numel()
    assert abs(float(share) - P) < 5 * (P * (1 - P) / count) ** 0.5
    assert gone[..., seen].flatten(1).unique(dim=0).shape[0] > 500, "each text draws its own"


@pytest.mark.parametrize("backend", ["reference", "tiled", "sdpa"])
def test_the_seed_says_what_is_dropped(backend: str) -> None:
    tensors = tuple(x[:4] for x in draw(SHAPE))
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(dropped(backend, *tensors))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_readers_are_told_of_what_was_not_dropped_yet() -> None:
    told: list[Summary] = []
    for p in (P, 0.0):
        dropped("tiled", *(x[:4] for x in draw(SHAPE)), told=told, p=p)
    assert torch.equal(told[0].received, told[1].received)  # type: ignore[arg-type]


def test_what_is_computed_again_drops_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several blocks each, on the way back, in the other order."""
    monkeypatch.setattr(tiled, "TILE_BYTES", 1)
    shape = (2, 4, 2, 70, 70, 8, 6)
    made = []
    for kept in (1 << 30, 0):
        monkeypatch.setattr(tiled, "KEPT_BYTES", kept)
        leaves = [x.requires_grad_() for x in draw(shape)]
        torch.manual_seed(0)
        call = a_call(shape, CAUSAL)
        state = RunState(Stack((Same(),)))
        state.new_forward()
        job = AttentionCall(state.plan(call), state, call, dropout=P)
        out = attend(job, *leaves, lambda needs: select("tiled", needs))[0]
        made.append((out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)))
    assert all(close(a, b) for a, b in zip(*made, strict=True))
