"""What attention with fewer maps shares: tokens themselves, a slice of channels to each head, in a map's place."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from heedful.authoring import Call, Layer, Paper, SiteError
from heedful.core.flags import traced
from heedful.kit.feature_maps import drawn

PAPER = Paper(
    "P075",
    "You Need to Pay Better Attention: Rethinking the Mathematics of Attention Mechanism",
    "Mehran Hosseini, Peyman Hosseini",
    2024,
    "2403.01643",
    differs=(
        "For images alone: no cache holds the tokens themselves.",
        "The authors' full text was not at hand: formulas are told by the abstract and by code of another, whom the "
        "authors helped.",
        "There are no biases; weights are drawn as torch.nn.Linear draws them, by a generator seeded by the layer's "
        "number. The model's own projections stay in it, unused.",
    ),
)


def maps(layer: Layer, *names: str, **sized: int) -> dict[str, Tensor]:
    """Square linear maps of the layer's width, or of a size of their own, drawn as torch.nn.Linear draws them."""
    random = torch.Generator().manual_seed(layer.number)
    sizes = dict.fromkeys(names, layer.width) | sized
    return {name: drawn(random, n, n) for name, n in sizes.items()}


def attended(x: Tensor, call: Call, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention of tokens `[b n e]` to keys and values of as many channels, each head with its slice."""
    require_open(call, "attention with fewer maps")
    return joined(linear(x, call.params["query"]), keys, values, call.heads, call.params["out"])


def require_open(call: Call, what: str) -> None:
    """Refuse a layer whose tokens do not all see one another."""
    if call.mask.rules:
        raise SiteError(
            f"layer {call.layer}: {what} is for images, whose patches see one another, and there is a mask; restrict "
            "the method to layers without one"
        )


def joined(query: Tensor, key: Tensor, value: Tensor, heads: int, out: Tensor) -> Tensor:
    """Softmax attention of heads that have a slice `[b n h*r]` each, brought to the layer's width by `out`."""
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (query, key, value))
    # torch's kernels hold no map, there and back; rules for derivatives carried forward have its plain steps alone
    with sdpa_kernel(SDPBackend.MATH) if traced(q, k, v) else nullcontext():
        found = scaled_dot_product_attention(q, k, v)
    if "ScaledDotProduct" in type(found.grad_fn).__name__:  # a kernel's, of whose way back there is no derivative
        for x in (q, k, v):
            if x.requires_grad:
                x.register_hook(_once)
    return linear(found.transpose(1, 2).flatten(2), out)


def _once(slope: Tensor) -> None:
    """Say in words, before torch's kernel does otherwise, that a derivative of a derivative is not to be had."""
    if slope.requires_grad:
        slope.register_hook(_refuse)


def _refuse(_: Tensor) -> None:
    raise SiteError(
        "torch's kernel, which attends here, has no second derivative; run the model under "
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), which holds a map and has one"
    )
