"""Positions shifted by time, event by event and channel by channel."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Layer, SiteError
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.core.positions import Positions
from heedful.methods import TimeShiftedPositions


def _told(x: Tensor, shift: list[Any], channel: int, first: int = 0) -> Tensor:
    """An event's row for each token of a text `[n e]`."""
    rows, width = [], x.shape[1]
    for i, event in enumerate(x):
        channels = []
        for c in range(width):
            k = c % len(shift)
            rate = math.exp(-2 * k * math.log(10000.0) / (2 * len(shift)))
            angle = (first + i) * rate + shift[k] * event[channel]
            wave = torch.sin(angle) if c < len(shift) else torch.cos(angle)
            channels.append(wave + (0.0 if c == channel % width else event[c]))
        rows.append(torch.stack(channels))
    return torch.stack(rows)


@pytest.mark.parametrize("width", [6, 7])
@pytest.mark.parametrize("channel", [-1, 0, 2])
def test_an_event_is_told_its_number_and_its_time(width: int, channel: int) -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, width, generator=draw, dtype=torch.float64)
    shift = torch.randn((width + 1) // 2, generator=draw, dtype=torch.float64)
    pad = torch.tensor([0, 2])
    call = replace(Bare().call, params={"shift": shift}, queries=Positions.row(3, 5, pad=pad))
    before = x.clone()
    found = TimeShiftedPositions(channel).place(x, call)
    assert torch.equal(x, before)
    for b in range(2):
        assert close(found[b], _told(x[b], list(shift), channel, 3 - int(pad[b])))


def test_the_first_steps_loss_and_gradient() -> None:
    """Of a model that is handed embeddings, against the same that is handed them with their places."""
    model = models.tiny("gpt2")
    model.transformer.wpe.weight.detach().zero_()
    x = torch.randn(2, 5, model.config.n_embd, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(3, 13).view(2, 5)
    with attach(model, TimeShiftedPositions()) as run:
        (shift,) = run.parameters()
        loss = run(inputs_embeds=x, labels=ids, use_cache=False).loss
        (slope,) = torch.autograd.grad(loss, shift)
        mine = shift.detach().clone().requires_grad_()
    wanted = model(inputs_embeds=torch.stack([_told(row, list(mine), -1) for row in x]), labels=ids).loss
    assert close_model(loss.detach(), wanted.detach())
    (want,) = torch.autograd.grad(wanted, mine)
    assert bool(want.any())
    assert close_model(slope, want)


def test_narrow_embeddings_stay_narrow() -> None:
    call = replace(Bare().call, params={"shift": torch.ones(3, dtype=torch.bfloat16)}, queries=Positions.row(0, 2))
    found = TimeShiftedPositions().place(torch.ones(1, 2, 6, dtype=torch.bfloat16), call)
    assert found.dtype == torch.bfloat16
    assert TimeShiftedPositions().angles(torch.ones(1, 2, dtype=torch.bfloat16), call).dtype == torch.float32


def test_the_start() -> None:
    layer = Layer(0, 4, 2, 8, 6, 25)
    found = TimeShiftedPositions().parameters(layer)
    assert close(found["shift"], 2 * torch.rand(13, generator=torch.Generator().manual_seed(0)) - 1)
    assert TimeShiftedPositions().parameters(replace(layer, number=1)) == {}
    call = Bare().call
    assert not TimeShiftedPositions().idle(call)
    assert TimeShiftedPositions().idle(replace(call, layer=1))


@pytest.mark.parametrize("channel", [6, -7])
def test_a_channel_that_is_not_there(channel: int) -> None:
    call = replace(Bare().call, params={"shift": torch.ones(3)}, queries=Positions.row(0, 2))
    with pytest.raises(SiteError, match="embeddings have 6 channels, and times must stand in one of them"):
        TimeShiftedPositions(channel).place(torch.ones(1, 2, 6), call)
