"""Gradient checkpointing: what the way back computes again is computed under the same run, or not at all."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heedful import attach, models
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call
from heedful.core.errors import NotEntered, SiteError
from heedful.core.method import Method, Stack
from heedful.core.sites import Site, at

from .samples import PAPER, Scale, Shares, Sharpness

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS, "use_cache": False}
both = pytest.mark.parametrize("reentrant", [False, True])


def checkpointed(reentrant: bool) -> Any:
    model = models.tiny("llama").train()
    for module in model.modules():  # as gradient_checkpointing_enable() does, whose name changes
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
    model.enable_input_require_grads()
    return model


def by_hand(reentrant: bool) -> Any:
    """As whoever calls torch's function on the layers himself."""
    model = models.tiny("llama").train()
    model.enable_input_require_grads()
    for layer in model.model.layers:
        own = layer.forward
        layer.forward = lambda x, own=own, **more: checkpoint(lambda x: own(x, **more), x, use_reentrant=reentrant)
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [x.clone() for x in found]


def wanted(stack: Method | Stack = Scale(), passes: int = 1) -> list[Tensor]:  # noqa: B008 - a frozen value
    model = models.tiny("llama").train()
    with attach(model, stack) as run:
        for _ in range(passes):
            run(**BATCH).loss.backward()
    return gradients(model)


def same(found: list[Tensor], want: list[Tensor]) -> bool:
    return len(found) == len(want) and all(close_model(a, b) for a, b in zip(found, want, strict=True))


def as_a_whole(model: Any, reentrant: bool) -> Tensor:
    """The loss of a checkpoint around the whole model."""
    start = torch.zeros((), requires_grad=True)  # torch's reentrant checkpoints want an input with a gradient
    found: Tensor = checkpoint(lambda _: model(**BATCH).loss, start, use_reentrant=reentrant)
    return found


class Deeper(Method):
    """Scales by a number that grows from layer to layer of a forward."""

    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def scale(self, heads: Tensor, call: Call) -> Tensor:
        call.state.forward["by"] = by = 2.0 * call.state.forward.get("by", 1.0)
        return heads * by


@both
@pytest.mark.parametrize("make", [checkpointed, by_hand])
def test_inside_the_run_gradients_are_those_without_it_and_after_it_there_are_none(make: Any, reentrant: bool) -> None:
    model = make(reentrant)
    with attach(model, Scale()) as run:
        run(**BATCH).loss.backward()
        found = gradients(model)
        loss = run(**BATCH).loss
        with run.paused(), pytest.raises(NotEntered, match="before the run is closed or paused"):
            loss.backward(retain_graph=True)
        model.zero_grad()
        logits = run(**BATCH).logits
    assert all(close_model(a, b) for a, b in zip(found, wanted(), strict=True))
    for late in (loss, logits.sum()):
        with pytest.raises(NotEntered, match="before the run is closed or paused"):
            late.backward()
    model.zero_grad()
    model(**BATCH).loss.backward()  # and the plain model goes on


@both
def test_a_run_that_is_back_serves_what_it_served_before(reentrant: bool) -> None:
    model = checkpointed(reentrant)
    with attach(model, Scale()) as run:
        loss = run(**BATCH).loss
        with run.paused():
            pass
        run.reset()
        loss.backward()
    assert all(close_model(a, b) for a, b in zip(gradients(model), wanted(), strict=True))


@both
def test_another_run_is_not_the_one(reentrant: bool) -> None:
    model = checkpointed(reentrant)
    with attach(model, Scale()) as run:
        loss = run(**BATCH).loss
    with attach(model, Scale(3.0)), pytest.raises(NotEntered, match="before the run is closed or paused"):
        loss.backward()


@both
def test_a_forward_before_the_run_is_not_computed_again_under_it(reentrant: bool) -> None:
    model = checkpointed(reentrant)
    loss = model(**BATCH).loss
    with attach(model, Scale()) as run:
        model.eval()  # without checkpoints
        run(**BATCH)
        model.train()
        with pytest.raises(NotEntered, match="first pass was not under this run"):
            loss.backward()


def test_what_is_not_computed_again_may_come_late() -> None:
    model = models.tiny("llama").train()
    with attach(model, Scale()) as run:
        loss = run(**BATCH).loss
    loss.backward()
    assert all(close_model(a, b) for a, b in zip(gradients(model), wanted(), strict=True))


def test_a_penalty_comes_in_time_too() -> None:
    model = checkpointed(reentrant=False)
    with attach(model, Sharpness()) as run:
        run(input_ids=IDS, use_cache=False)
        late = run.loss()
    with pytest.raises(NotEntered, match="before the run is closed or paused"):
        late.backward()


@both
@pytest.mark.parametrize("stack", [Scale(), Scale() | Sharpness(), Deeper() | Shares()], ids=repr)
def test_a_checkpoint_around_the_whole_model_gives_the_gradients_without_it(stack: Any, reentrant: bool) -> None:
    model = models.tiny("llama").train()
    with attach(model, stack) as run:
        as_a_whole(run, reentrant).backward()
        assert all((s.count == IDS.numel()).all() for answer in run.answers().values() for s in answer.values())
    assert same(gradients(model), wanted(stack))


@both
def test_a_checkpoint_around_the_whole_model_comes_in_time_or_not_at_all(reentrant: bool) -> None:
    model = models.tiny("llama").train()
    with attach(model, Scale()) as run:
        loss = as_a_whole(run, reentrant)
    with pytest.raises(NotEntered, match="before the run is closed or paused"):
        loss.backward()
    with attach(model, Scale()), pytest.raises(NotEntered, match="before the run is closed or paused"):
        loss.backward()


def layers(reentrant: bool) -> tuple[Any, Any]:
    return checkpointed(reentrant), lambda model: model(**BATCH).loss


def whole(reentrant: bool) -> tuple[Any, Any]:
    return models.tiny("llama").train(), partial(as_a_whole, reentrant=reentrant)


@both
@pytest.mark.parametrize("kind", [layers, whole])
@pytest.mark.parametrize("plain_first", [True, False])
def test_plain_and_edited_passes_of_one_graph_are_not_mixed_up(kind: Any, plain_first: bool, reentrant: bool) -> None:
    model, loss_of = kind(reentrant)
    plain = loss_of(model) if plain_first else None
    with attach(model, Scale()) as run:
        edited = loss_of(run)
        if plain is None:
            with run.paused():
                plain = loss_of(model)
        with pytest.raises(NotEntered, match="first pass was not under this run"):
            (plain + edited).backward(retain_graph=True)
    with pytest.raises(NotEntered, match="before the run is closed or paused"):
        (plain + edited).backward(retain_graph=True)
    model.zero_grad()
    plain.backward()
    found = gradients(model)
    loss_of(model).backward()
    assert same(found, gradients(model))


@both
def test_each_layer_is_computed_again_with_what_its_forward_remembered(reentrant: bool) -> None:
    model = checkpointed(reentrant)
    with attach(model, Deeper()) as run:
        losses = [run(**BATCH).loss for _ in range(2)]
        run(**BATCH)
        sum(losses).backward()
    assert same(gradients(model), wanted(Deeper(), passes=2))


def test_a_penalty_without_a_gradient_is_not_handed_out() -> None:
    model = models.tiny("llama").train()
    with attach(model, Sharpness()) as run:
        as_a_whole(run, reentrant=False)
        assert run.loss().requires_grad
        as_a_whole(run, reentrant=True)
        with pytest.raises(SiteError, match="use_reentrant=False"):
            run.loss()
        with torch.no_grad():
            assert run.loss() > 0


def test_a_graph_that_nobody_went_back_through_keeps_no_run() -> None:
    model = checkpointed(reentrant=False)
    run = attach(model, Sharpness())
    run(**BATCH)
    run.close()
    gone = ref(run)
    del run
    gc.collect()
    assert gone() is None
