"""Gradient checkpointing: what the way back computes again is computed under the same run, or not at all."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heedful import attach, models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import NotEntered

from .samples import Scale, Sharpness

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


def wanted() -> list[Tensor]:
    model = models.tiny("llama").train()
    with attach(model, Scale()) as run:
        run(**BATCH).loss.backward()
    return gradients(model)


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
