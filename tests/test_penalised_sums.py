"""Penalties on what a pattern adds up to: the loss and its gradient of a map, without the map."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, explain
from heedful.authoring import Call, Method, Site, Sum, Summary, penalises, reads, sums
from heedful.conformance.tolerances import close_model
from heedful.core.errors import BackendError, DefinitionError
from heedful.engine.backends import tiled
from heedful.tiny import tiny, tiny_inputs

from .kernel_calls import CAUSAL, Court, a_call, draw, run
from .samples import PAPER

EACH = ("received", "entropy", "peak", "first", "distance")


def _by_sums(part: str) -> Method:
    class Told(Method):
        paper = PAPER

        @sums(part, penalises=True)
        def look(self, pattern: Summary, call: Call) -> Tensor:
            found: Tensor = getattr(pattern, part)
            return (found * call.is_text).square().sum() if found.shape[-1] == len(call.queries) else found.sum()

    return Told()


class ByMap(Method):
    """The same of the whole pattern."""

    paper = PAPER
    whole_map = True
    part: str

    @penalises(Site.PATTERN)
    def look(self, p: Tensor, call: Call) -> Tensor:
        n = p.shape[-1]
        found = {
            "received": lambda: p.sum(-2),
            "entropy": lambda: torch.special.entr(p.clamp(min=1e-30)).sum(-1),
            "peak": lambda: p.amax(-1),
            "first": lambda: p[..., 0],
            "distance": lambda: torch.stack([p.diagonal(-i, -2, -1).sum(-1) for i in range(n)], -1),
        }[self.part]()
        return found.square().sum()


def _learned(method: Method, backend: str = "auto", **more: Any) -> tuple[Tensor, list[Tensor], set[str]]:
    model = tiny("llama")
    with attach(model, method, backend=backend) as seen:
        seen(**tiny_inputs(model), **more)
        loss = seen.loss()
        served = set(seen.state.backends.values())
    return loss, [*torch.autograd.grad(loss, [p for n, p in model.named_parameters() if "q_proj" in n])], served


class Unguarded(Method):
    """Entropy as a formula has it, whose slope at a weight of zero is none."""

    paper = PAPER

    @penalises(Site.PATTERN)
    def look(self, p: Tensor, call: Call) -> Tensor:
        return torch.special.entr(p).sum(-1).square().sum()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_hidden_pairs_learn_nothing_and_spoil_nothing(backend: str) -> None:
    want, slopes, _ = _learned(ByMap("entropy"), "reference")
    found, mine, _ = _learned(Unguarded(), backend)
    assert close_model(found, want)
    assert all(close_model(a, b) for a, b in zip(mine, slopes, strict=True))


@pytest.mark.parametrize("part", EACH)
@pytest.mark.parametrize("backend", ["reference", "tiled", "recomputed"])
def test_loss_and_gradient_are_those_of_the_map(part: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed: where tiles are computed again on the way back, since their maps would be too much to keep."""
    if backend == "recomputed":
        monkeypatch.setattr(tiled, "KEPT_BYTES", 0)
        monkeypatch.setattr(tiled, "LEAST", 4)
        monkeypatch.setattr(tiled, "MOST", 4)
    want, slopes, _ = _learned(ByMap(part), "reference")
    found, mine, served = _learned(_by_sums(part), "reference" if backend == "reference" else "tiled")
    assert close_model(found, want)
    assert all(close_model(a, b) for a, b in zip(mine, slopes, strict=True))
    assert all(bool(x.any()) for x in mine)
    assert served == {"reference" if backend == "reference" else "tiled"}


def test_what_keys_receive_is_learned_on_the_kernel() -> None:
    want, slopes, _ = _learned(Court(), "reference")
    found, mine, served = _learned(Court())
    assert served == {"native"}
    assert close_model(found, want)
    assert all(close_model(a, b) for a, b in zip(mine, slopes, strict=True))


@pytest.mark.parametrize("part", EACH[1:])
def test_other_parts_are_learned_in_tiles_and_explained(part: str) -> None:
    """Without gradients they stay on the kernel."""
    method = _by_sums(part)
    assert _learned(method)[2] == {"tiled"}
    shape = (1, 4, 2, 20, 20, 8, 8)
    q, k, v = draw(shape)
    run("native", method, q, k, v, a_call(shape, CAUSAL))
    with pytest.raises(BackendError, match=rf"gradients are wanted of {part}, and .* those of received alone"):
        run("native", method, q.requires_grad_(), k, v, a_call(shape, CAUSAL))
    assert "native" in str(explain(Court()))


class _Reader(Method):
    paper = PAPER

    @sums("received")
    def look(self, pattern: Summary, call: Call) -> Sum:
        assert pattern.received is not None
        assert not pattern.received.requires_grad
        return Sum.of(pattern.received)

    @reads(Site.HEAD_OUTPUT)
    def touch(self, heads: Tensor, call: Call) -> None:
        assert heads.requires_grad


@pytest.mark.parametrize("backend", ["reference", "tiled", "native"])
def test_readers_beside_such_a_penalty_hold_no_graph(backend: str) -> None:
    model = tiny("llama")
    with attach(model, _Reader() | Court(), backend=backend) as seen:
        seen(**tiny_inputs(model))
        assert math.isfinite(seen.loss().item())
        assert all(not x.value.requires_grad for x in seen[_Reader()].values())


def test_heads_of_a_layer_alone() -> None:
    model = tiny("llama")
    losses = []
    for method in (ByMap("received"), _by_sums("received")):
        with attach(model, method.on(heads=[1], layers=[0]), backend="tiled" if losses else "reference") as seen:
            seen(**tiny_inputs(model))
            losses.append(seen.loss())
    assert close_model(*losses)


def test_a_column_s_number_has_no_gradient() -> None:
    with pytest.raises(DefinitionError, match=r'penalises=True\): a column.s number has no gradient; "peak" has one'):
        sums("place", penalises=True)
