"""Random weights under which every part of a tiny model moves its output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

_LARGE = 1e4
_FLAT = 0.05


@contextmanager
def marked_empty() -> Iterator[None]:
    """Memory that nobody initialised reads as NaN, so that `condition` can find it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@torch.no_grad()
def condition(model: nn.Module, seed: int = 0) -> None:
    """Rescale weak or empty parameters in place: unit gain for projections, half-open gates, noise for zeros.

    A default init of std 0.02 at width 64 makes attention all but vanish from the logits, and a
    zero-initialised gate hides a whole cross attention; a comparison under such weights proves nothing.
    """
    noise = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and parameter.numel() and parameter.device.type != "meta":
                _condition(module, name, parameter, noise)
        for buffer in module.buffers(recurse=False):
            if buffer.is_floating_point() and torch.isnan(buffer).any():
                buffer.zero_()


def _condition(module: nn.Module, name: str, parameter: torch.Tensor, noise: torch.Generator) -> None:
    broken = not bool(torch.isfinite(parameter).all()) or float(parameter.abs().max()) > _LARGE
    matrix = parameter.dim() >= 2
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and name == "weight":
        goal = (parameter.shape[1:].numel()) ** -0.5
    elif matrix and isinstance(module, Conv1D):
        goal = parameter.shape[0] ** -0.5
    elif isinstance(module, nn.Embedding):
        goal = 0.5
    elif parameter.dim() == 3:
        goal = min(parameter.shape[-2:]) ** -0.5
    else:
        goal = 0.1
    fresh = torch.randn(parameter.shape, generator=noise, dtype=torch.float32).to(parameter.dtype) * goal
    if broken:
        parameter.copy_(fresh if matrix or "norm" not in type(module).__name__.lower() else fresh + 1)
        return
    spread = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
    flat = spread < 1e-6
    if flat and float(parameter.abs().max()) < _FLAT:
        gate = any(word in name.lower() for word in ("gate", "alpha", "lambda", "gamma", "scale"))
        parameter.copy_(fresh + 0.5 if gate and name != "bias" and not isinstance(module, nn.Linear) else fresh)
    elif matrix and spread < goal / 2:
        parameter.copy_(fresh if flat else parameter * (goal / spread))
