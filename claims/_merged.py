"""What a vision model says of an image with fewer tokens in later layers, and in how much of the processor's time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from claims._scenes import model, scenes
from heedful import attach
from heedful.authoring import Method
from heedful.core.errors import InactiveWarning

SHOWN = 1  # picture a seed


@torch.no_grad()
def merged(seed: int, ways: Mapping[str, Method]) -> dict[str, float]:
    """How near the class token and the patches come to those of the model as it is, and the share of its time."""
    pixels, _ = scenes(torch.Generator().manual_seed(seed), SHOWN)
    whole = model()(pixel_values=pixels).last_hidden_state
    began = time.process_time()
    model()(pixel_values=pixels)
    plain = time.process_time() - began
    numbers: dict[str, float] = {}
    for name, method in ways.items():
        with warnings.catch_warnings(), attach(model(), method) as run:
            warnings.simplefilter("ignore", InactiveWarning)  # a control may leave a step out
            began = time.process_time()
            found: Tensor = run(pixel_values=pixels).last_hidden_state
            numbers[f"time, {name}"] = (time.process_time() - began) / plain
        near = torch.cosine_similarity(found, whole, dim=-1)
        numbers[name], numbers[f"patches, {name}"] = float(near[:, 0].mean()), float(near[:, 1:].mean())
    return numbers
