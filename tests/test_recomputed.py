"""Blocks of a long call are computed again on the way back: the same gradients, and memory that grows with the text."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heedful import attach, catalogue, models
from heedful.conformance.bare import ROLES
from heedful.core.errors import InactiveWarning
from heedful.core.method import Method, Stack
from heedful.core.sites import MAP_SITES
from heedful.engine.backends import tiled
from heedful.methods import MultiTokenAttention
from heedful.methods.mechanisms.normalise.sigmoid_attention import SigmoidAttention

from . import kernel_calls
from .kernel_calls import CAUSAL, a_call
from .samples import Scale, Shares, Sharpness

METHODS = {
    name: kind
    for name, kind in catalogue.entries().items()
    if issubclass(kind, Method)
    and "text" in kind.subjects
    and not kind.whole_map  # which no block can serve
    and any(edit.site in MAP_SITES and not edit.reads for edit in kind.edits)
}
BATCH = {"input_ids": torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0)), "use_cache": False}


def read(model: Any, what: Any, rows: int = 8) -> tuple[Any, list[Tensor]]:
    """A run over a text in blocks of rows, and all gradients of what it answers."""
    torch.manual_seed(0)
    with warnings.catch_warnings(), attach(model, what, backend="tiled", tile_rows=rows, roles=ROLES) as run:
        warnings.simplefilter("ignore", InactiveWarning)
        out = run(**BATCH).logits
        loss = (out * torch.linspace(-1, 1, out.shape[-1])).sum()
        (loss + run.loss() if run.state.losses else loss).backward()
        grown = [p.grad for p in [*model.parameters(), *run.parameters()] if p.grad is not None]
    model.zero_grad()
    return run, grown


@pytest.mark.parametrize("name", sorted(METHODS))
def test_gradients_are_those_of_blocks_that_are_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = models.tiny("llama").train(), METHODS[name].example()
    kept, wanted = read(model, method)
    monkeypatch.setattr(tiled, "KEPT_BYTES", 0)
    again, found = read(model, method)
    assert len(found) == len(wanted) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert set(map(str, again.state.changed)) == set(map(str, kept.state.changed))


@pytest.mark.parametrize("what", [Stack((Scale(), Shares())), Sharpness()])
def test_readers_count_a_block_once_and_penalties_stand(what: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, wanted = read(models.tiny("llama"), what)
    monkeypatch.setattr(tiled, "KEPT_BYTES", 0)
    again, found = read(models.tiny("llama"), what)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert str(again.answers()) == str(kept.answers())
    assert torch.equal(again.loss(), kept.loss()) if kept.state.losses else not again.state.losses


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint_of_the_layer(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _, wanted = read(models.tiny("llama").train(), Scale())
    monkeypatch.setattr(tiled, "KEPT_BYTES", 0)
    model = models.tiny("llama").train()
    model.enable_input_require_grads()
    for layer in model.model.layers:
        own = layer.forward
        layer.forward = lambda x, own=own, **more: checkpoint(lambda x: own(x, **more), x, use_reentrant=reentrant)
    _, found = read(model, Scale())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_graph_outlives_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("llama")
    _, wanted = read(model, Scale())
    monkeypatch.setattr(tiled, "KEPT_BYTES", 0)
    with attach(model, Scale(), backend="tiled", tile_rows=8) as run:
        out = run(**BATCH).logits
    (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip((p.grad for p in model.parameters()), wanted, strict=True))


def saved(model: Any, tokens: int) -> int:
    """The bytes of attention that a forward keeps for the way back, under a mechanism that no kernel computes."""
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.ndim == 4:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with (
        attach(model, SigmoidAttention(), backend="tiled") as run,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        out = run(input_ids=torch.randint(3, 100, (1, tokens)), use_cache=False)
        assert out.logits.requires_grad
    return sum(found.values())


def test_what_is_kept_grows_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("llama", max_position_embeddings=2048)
    long, short = saved(model, 1024), saved(model, 512)
    monkeypatch.setattr(tiled, "KEPT_BYTES", 0)
    assert saved(model, 1024) < 2.1 * saved(model, 512)
    assert saved(model, 1024) < long / 8
    assert long > 3 * short  # what is kept else


@pytest.mark.parametrize("learns", ["bias", "sink", "nothing"])
def test_what_weights_depend_on_beside_queries_and_keys_may_learn(learns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "KEPT_BYTES", 0)
    again: list[object] = []
    monkeypatch.setattr(tiled, "recomputed", lambda part, job: again.append(part) or part(job))
    shape = (1, 4, 2, 40, 40, 8, 8)
    given = {"bias": torch.zeros(1, 4, 40, 40), "sink": torch.zeros(1, 4, 1, 1)}
    if learns in given:
        given[learns].requires_grad_()
    kernel_calls.run("tiled", kernel_calls.Same(), *kernel_calls.draw(shape), a_call(shape, CAUSAL), **given)
    assert bool(again) == (learns in given)


@pytest.mark.filterwarnings("ignore::heedful.core.errors.InactiveWarning")
def test_a_mechanism_that_learns_in_a_frozen_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "KEPT_BYTES", 0)
    again: list[object] = []
    monkeypatch.setattr(tiled, "recomputed", lambda part, job: again.append(part) or part(job))
    model = models.tiny("llama").requires_grad_(False)
    with attach(model, MultiTokenAttention(), backend="tiled", tile_rows=8) as run:
        run(**BATCH)
        assert again
        again.clear()
        for parameter in run.parameters():
            parameter.requires_grad_(False)
        run(**BATCH)
        assert not again
