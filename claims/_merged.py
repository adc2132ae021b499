"""What a vision model says of an image with fewer tokens in later layers, and in how much of the processor's time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor

from claims._scenes import model, scenes
from heedful import attach
from heedful.authoring import Method
from heedful.core.errors import InactiveWarning

SHOWN = 10  # pictures a seed
TURNS = 3  # in which each way is timed, one after another


@torch.no_grad()
def merged(seed: int, ways: Mapping[str, Method]) -> dict[str, float]:
    """How near the class token and the patches come to those of the model as it is, and the share of its time."""
    pixels, _ = scenes(torch.Generator().manual_seed(seed), SHOWN)
    whole = model()(pixel_values=pixels).last_hidden_state
    times: dict[str, list[float]] = {"": [], **{name: [] for name in ways}}
    numbers: dict[str, float] = {}
    for turn in range(TURNS):
        began = time.process_time()
        model()(pixel_values=pixels)
        times[""].append(time.process_time() - began)
        for name, method in ways.items():
            with warnings.catch_warnings(), attach(model(), method) as run:
                warnings.simplefilter("ignore", InactiveWarning)  # a control may leave a step out
                began = time.process_time()
                found: Tensor = run(pixel_values=pixels).last_hidden_state
                times[name].append(time.process_time() - began)
            if not turn:
                near = torch.cosine_similarity(found, whole, dim=-1)
                numbers[name], numbers[f"patches, {name}"] = float(near[:, 0].mean()), float(near[:, 1:].mean())
    plain = median(times.pop(""))
    return numbers | {f"time, {name}": median(each) / plain for name, each in times.items()}
