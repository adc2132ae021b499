"""An attention of its own for what pools tokens: torch.nn.MultiheadAttention's weights, and norms, by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from heedful.kit.feature_maps import with_bias

Weights = dict[str, Tensor]


def attending(random: torch.Generator, name: str, e: int) -> Weights:
    """One weight for queries, keys and values, and one for what the heads find."""
    return with_bias(random, name, 3 * e, e) | with_bias(random, f"{name}_out", e, e)


def norm(name: str, e: int) -> Weights:
    return {name: torch.ones(e), f"{name}_bias": torch.zeros(e)}


def through(p: Weights, name: str, x: Tensor) -> Tensor:
    return linear(x, p[name], p[f"{name}_bias"])


def normed(p: Weights, name: str, x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], p[name], p[f"{name}_bias"])


def attended(p: Weights, name: str, asking: Tensor, seen: Tensor, heads: int) -> Tensor:
    """What tokens `[b q e]` find among others `[b n e]`."""
    maps = zip(p[name].chunk(3), p[f"{name}_bias"].chunk(3), (asking, seen, seen), strict=True)
    q, k, v = (linear(x, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2) for weight, bias, x in maps)
    mixed = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
    return through(p, f"{name}_out", mixed.transpose(1, 2).flatten(2))
