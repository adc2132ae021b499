"""What methods fitted to a model's queries, keys or heads share."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.stats import Sum
from heedful.kit.seeds import drawn_for, seed_of


class Moments(Method, abstract=True):
    """Reads queries or keys and keeps their sums of products, for principal directions."""

    def products(self, x: Tensor, is_text: Tensor) -> Sum:
        """The sum of `[x 1]^T [x 1]` over text tokens, `[h d+1 d+1]`, of `x [b h n d]` and `live [b|1 1 n]`."""
        one = is_text[..., None].double().expand(*x.shape[:3], 1)
        both = torch.cat([x.double() * one, one], -1)
        return Sum.of(torch.einsum("bhnd,bhne->hde", both, both))

    def answer(self, readings: Readings) -> dict[int, Tensor]:
        return {layer: statistic.value for layer, statistic in readings.items()}


def of_layer(owner: Method, field: str, shape: tuple[int, ...], call: Call) -> Tensor:
    """This layer's tensor of a fit; where there is none, a random one that the owner's seed gives."""
    fitted: Fitted | None = getattr(owner, field)
    if fitted is None:
        return torch.randn(shape, generator=drawn_for(owner, field, call.layer))
    found = fitted.get(f"{field}.{call.layer}")
    if found is None or found.shape != shape or len(fitted) != call.depth:
        raise other_model(owner, field, call, f"and {list(shape)} is wanted of each")
    return found


def among_best(owner: Method, field: str, shares: tuple[tuple[str, float], ...], call: Call) -> Tensor:
    """Which key heads of the layer, `[g]`, are in the highest share of the model's by one of the named scores."""
    fitted: Fitted | None = getattr(owner, field)
    if fitted is None:
        fitted = _drawn(seed_of(owner, field), tuple(name for name, _ in shares), call.depth, call.kv_heads)
    found = _best(fitted, shares)
    if len(found) != call.depth or found[call.layer].shape != (call.kv_heads,):
        raise other_model(owner, field, call, f"and {call.kv_heads} key heads in layer {call.layer}")
    return found[call.layer]


def other_model(owner: Method, field: str, call: Call, requested: str) -> FieldError:
    rule = f"was fitted to another model; this one has {call.depth} layers, {requested}"
    return FieldError(owner, field, getattr(owner, field), rule, f"heedful.fit({type(owner).__name__}(), model, ...)")


@cache
def _drawn(seed: int, names: tuple[str, ...], depth: int, kv_heads: int) -> Fitted:
    draw = torch.Generator().manual_seed(seed)
    return Fitted({f"{name}.{i}": torch.rand(kv_heads, generator=draw) for name in names for i in range(depth)})


@cache
def _best(fitted: Fitted, shares: tuple[tuple[str, float], ...]) -> tuple[Tensor, ...]:
    """By layer `[g]`; of equal scores those of the first layers and heads."""
    out: list[Tensor] = []
    for name, share in shares:
        rows = [fitted[f"{name}.{i}"] for i in range(len(fitted) // len(shares))]
        order = torch.cat(rows).argsort(descending=True, stable=True)
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[: round(share * len(order))]] = True
        by_layer = chosen.split([len(row) for row in rows])
        out = [a | b for a, b in zip(out, by_layer, strict=True)] if out else list(by_layer)
    return tuple(out)
