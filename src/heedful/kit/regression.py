"""Logistic regression, as fits have it of what they saw of many tokens, sentences or heads, and what it then says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from heedful.core.errors import FieldError
from heedful.kit.seeds import seed_of


def logistic(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of points `[n e]` and labels `[n]`: "weight" `[e]` under an L2 penalty of one half, and "bias" `[1]`.

    They are for points less their "mean" `[e]` over their "deviation" `[e]`, which come along.
    """
    x, y = x.double(), y.double()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    z = (x - mean) / deviation
    weight, bias = x.new_zeros(x.shape[1], requires_grad=True), x.new_zeros(1, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=1000, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        out = binary_cross_entropy_with_logits(z @ weight + bias, y, reduction="sum") + weight.square().sum() / 2
        out.backward()
        return out

    with torch.enable_grad():
        search.step(loss)
    found = {"weight": weight.detach(), "bias": bias.detach(), "mean": mean, "deviation": deviation}
    return {name: each.float() for name, each in found.items()}


def log_odds(owner: Any, field: str, x: Tensor) -> Tensor:
    """What the owner's fit says of points `[... e]`, `[...]`; where there is none, a direction that its seed draws."""
    fitted = getattr(owner, field)
    if fitted is None:
        source = torch.Generator().manual_seed(seed_of(owner, field))
        return x @ torch.randn(x.shape[-1], generator=source).to(x)
    weight, mean, deviation, bias = (fitted[name].to(x) for name in ("weight", "mean", "deviation", "bias"))
    if weight.shape != x.shape[-1:]:
        rule = f"was fitted to another model: to points of {len(weight)} numbers, and these are of {x.shape[-1]}"
        raise FieldError(owner, field, fitted, rule, "a fit to this model")
    return (x - mean) / deviation @ weight + bias
