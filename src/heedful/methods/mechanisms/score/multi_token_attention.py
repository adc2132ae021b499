"""s'_ij = sum_ab w_ab s_(i-a)(j+b), masked pairs counting 0; after the softmax, heads are sums over their group."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from heedful.authoring import Call, FieldError, Layer, Method, Paper, Site, at
from heedful.core.flags import traced
from heedful.core.positions import spread_heads

STEP = 16  # columns whose products are taken side by side
Kernel = tuple[int, int]  # query rows, the last of them the query's own, and key columns, the middle one the key's own


class MultiTokenAttention(Method):
    """Scores that depend on several queries and keys at once, by learned kernels; for models trained with it.

    Kernels start as the identity, so that a trained model begins as it was.
    """

    paper = Paper(
        "P078",
        "Multi-Token Attention",
        "Olga Golovneva, Tianlu Wang, Jason Weston, Sainbayar Sukhbaatar",
        2025,
        "2504.00927",
        differs=(
            "The norm of each head's output, its factor by depth and its gate, which follow in their models, are not "
            "part of it.",
            "It acts in every layer; the authors' code convolves in every fourth, for which there is .on(layers=...).",
            "Queries of earlier calls are kept as constants: gradients do not reach them through a cache.",
            "It does not go on behind a cache that has dropped what the rows above saw, nor one that has slid.",
        ),
    )
    one_text = True
    before: Kernel | None = (6, 11)  # kernel on the scores; the authors: (6, 11), on their toy task (2, 9)
    groups_before: int | None = None  # groups of heads mixed before the softmax; the authors' code: 1, of all heads
    after: Kernel | None = None  # kernel on the weights; the authors' code: (6, 11)
    groups_after: int | None = 1  # groups of heads mixed after the softmax; the authors' code: 1, of all heads
    spread: float = 0.0  # standard deviation of the kernels around the identity at the start; the authors: 0

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            kernel = getattr(self, name)
            if kernel is not None and (min(kernel) < 1 or kernel[1] % 2 == 0):
                rule = "must be 1 or more query rows and an odd number of key columns"
                raise FieldError(self, name, kernel, rule, (6, 11))
        for name in ("groups_before", "groups_after"):
            groups = getattr(self, name)
            if groups is not None and groups < 1:
                raise FieldError(self, name, groups, "must be 1 or more groups, or None", 1)
        if not 0 <= self.spread < math.inf:
            raise FieldError(self, "spread", self.spread, "must be 0 or more", 0.1)

    @classmethod
    def neutral(cls) -> MultiTokenAttention:
        return cls()

    @classmethod
    def example(cls) -> MultiTokenAttention:
        return cls((3, 5), 1, (2, 3), 1, spread=0.5)

    def above(self) -> int:
        return sum(kernel[0] - 1 for kernel in (self.before, self.after) if kernel is not None)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        found = {}
        for name in ("before", "after"):
            if (kernel := getattr(self, name)) is not None:
                found[name] = torch.zeros(layer.heads, *kernel)
                found[name][:, -1, kernel[1] // 2] = 1.0
        for name in ("groups_before", "groups_after"):
            if (groups := getattr(self, name)) is not None:
                if layer.heads % groups:
                    rule = f"must divide the {layer.heads} heads of layer {layer.number}"
                    raise FieldError(self, name, groups, rule, 1)
                found[name] = torch.eye(layer.heads // groups).repeat(groups, 1, 1)
        return {name: x + self.spread * torch.randn(x.shape, generator=random) for name, x in found.items()}

    @at(Site.SCORES, when="before")
    def convolve_scores(self, scores: Tensor, call: Call) -> Tensor:
        return _convolved(scores, call.params["before"], call)

    @at(Site.SCORES, when="groups_before")
    def mix_scores(self, scores: Tensor, call: Call) -> Tensor:
        return _mixed(scores, call.params["groups_before"])

    @at(Site.PATTERN, when="after")
    def convolve_weights(self, weights: Tensor, call: Call) -> Tensor:
        return _convolved(weights, call.params["after"], call)

    @at(Site.PATTERN, when="groups_after")
    def mix_weights(self, weights: Tensor, call: Call) -> Tensor:
        return _mixed(weights, call.params["groups_after"])


def _convolved(x: Tensor, kernel: Tensor, call: Call) -> Tensor:
    """Each head's map under its kernel `[h a b]`: rows above and keys on both sides."""
    if call.keep is not None:
        x = x.masked_fill(~call.keep, 0.0)
    index = None
    if call.keys.first is None:  # columns beside one another need not be tokens beside one another
        index = spread_heads(call.keys.index, call.heads)[:, :, None].expand(x.shape)
        x = x.new_zeros(*x.shape[:-1], int(index.max()) + 1).scatter_add(-1, index, x)
    rows, columns = kernel.shape[1:]
    x = correlated(pad(x, (columns // 2, columns // 2, rows - 1, 0)), kernel.to(x))
    return x if index is None else x.gather(-1, index)


def correlated(x: Tensor, kernel: Tensor) -> Tensor:
    """Each head's map `x [b h r k]` under its kernel `[h a b]`, wherever that has all of its places."""
    if traced(x, kernel):
        return conv2d(x, kernel[:, None], groups=len(kernel))
    found: Tensor = _Correlated.apply(x, kernel)
    return found


class _Correlated(torch.autograd.Function):
    """The same with ways back of its own: torch's take longer than a convolution, and products of a STEP of columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel)
        return conv2d(x, kernel[:, None], groups=len(kernel))

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, kernel = ctx.saved_tensors
        of_x, of_kernel = ctx.needs_input_grad
        rows, columns = kernel.shape[1:]
        wider = pad(given, (columns - 1, columns - 1, rows - 1, rows - 1)) if of_x else given
        return (
            correlated(wider, kernel.flip(-2, -1)) if of_x else None,
            _products(x, given, rows, columns) if of_kernel else None,
        )


def _products(x: Tensor, y: Tensor, rows: int, columns: int) -> Tensor:
    """What the maps `y [b h r k]` and parts of `x` as large come to, by where that part begins, `[h rows columns]`."""
    short = -y.shape[-1] % STEP
    y = pad(y, (0, short)).unflatten(-1, (-1, STEP)).flatten(2, 3)
    pieces = pad(x, (0, short)).unfold(-1, STEP + columns - 1, STEP)
    taken = x.shape[2] - rows + 1
    found = torch.stack([(pieces[:, :, a : a + taken].flatten(2, 3).mT @ y).sum(0) for a in range(rows)], 1)
    return torch.stack([found[..., b : b + STEP, :].diagonal(dim1=-2, dim2=-1).sum(-1) for b in range(columns)], -1)


def _mixed(x: Tensor, mix: Tensor) -> Tensor:
    """Each head as a sum over the heads of its group, `mix [groups, from, to]`."""
    groups = x.unflatten(1, (len(mix), -1))
    return torch.einsum("bgfrk,gft->bgtrk", groups, mix.to(x)).flatten(1, 2)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, MultiTokenAttention(spread=0.1)) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
