"""Pictures are erased on the device that the model is on, here one that is pretended."""

from __future__ import annotations

import copy

import torch

from benchmarks.quality.erasing import Erased
from heedful import models
from heedful.conformance.tolerances import close
from tests import apart
from tests.elsewhere import elsewhere


def test_a_picture_is_erased_where_the_model_is() -> None:
    told = apart.said(_erased_elsewhere)
    assert told.returncode == 0, told.stderr[-3000:]


@torch.no_grad()
def _erased_elsewhere() -> None:
    task, small = Erased(steps=2), models.denoiser()
    scene = task.scene(small.tokenizer, task.draw(0, 0))
    with elsewhere() as device:
        model, x = copy.deepcopy(small.model).to(device), scene.noise.to(device)
        assert close(task.step(scene, model, x, 0).cpu(), task.step(scene, small.model, scene.noise, 0))
        pictures, kinds = task.real(model, small.tokenizer)
        assert pictures.device == kinds.device == x.device
        assert torch.equal(kinds.cpu(), task.real(small.model, small.tokenizer)[1])
