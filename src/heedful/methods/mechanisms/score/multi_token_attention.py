"""s'_ij = sum_ab w_ab s_(i-a)(j+b), masked pairs counting 0; after the softmax, heads are sums over their group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from heedful.authoring import Call, FieldError, Layer, Method, NonNegativeFloat, Paper, PositiveInt, Site, at
from heedful.core.positions import spread_heads
from heedful.kit.seen import only_seen

SIDE = 16  # columns side by side that are taken as channels
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
            "By default a kernel acts before the softmax and heads are mixed behind it; in the authors' "
            "configurations for language both act on both sides, with (6, 11) and all heads.",
            "It acts in every layer; the authors' code convolves in every fourth, for which there is .on(layers=...), "
            "and mixes heads in all.",
            "Queries of earlier calls are kept as constants: gradients do not reach them through a cache.",
            "It does not go on behind a cache that has dropped what the rows above saw, nor one that has slid.",
        ),
    )
    one_text = True
    before: Kernel | None = (6, 11)  # kernel on the scores; the authors: (6, 11), on their toy task (2, 9)
    # groups of heads mixed before the softmax; the authors' code: 1, of all heads
    groups_before: PositiveInt | None = None
    after: Kernel | None = None  # kernel on the weights; the authors' code: (6, 11)
    groups_after: PositiveInt | None = 1  # groups of heads mixed after the softmax; the authors' code: 1, of all heads
    spread: NonNegativeFloat = 0.0  # standard deviation of the kernels around the identity at the start; the authors: 0

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            kernel = getattr(self, name)
            if kernel is not None and (min(kernel) < 1 or kernel[1] % 2 == 0):
                rule = "must be 1 or more query rows and an odd number of key columns"
                raise FieldError(self, name, kernel, rule, (6, 11))

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
    x = only_seen(x, call)
    index = None
    if call.keys.first is None:  # columns beside one another need not be tokens beside one another
        index = spread_heads(call.keys.index, call.heads)[:, :, None].expand(x.shape)
        x = x.new_zeros(*x.shape[:-1], int(index.max()) + 1).scatter_add(-1, index, x)
    rows, columns = kernel.shape[1:]
    x = correlated(pad(x, (columns // 2, columns // 2, rows - 1, 0)), kernel.to(x))
    return x if index is None else x.gather(-1, index)


def correlated(x: Tensor, kernel: Tensor) -> Tensor:
    """Each head's map `x [b h r k]` under its kernel `[h a b]`, wherever that has all of its places.

    SIDE columns are taken as channels, as which they lie in memory already: each of them is told by those of its own
    and of the next places, and a convolution of channels is products of matrices.
    """
    columns = x.shape[-1] - kernel.shape[-1] + 1
    places = -(-columns // SIDE)
    near = 1 + -(-(kernel.shape[-1] - 1) // SIDE)  # places that one is told by
    x = pad(x, (0, (places + near - 1) * SIDE - x.shape[-1])).unflatten(-1, (-1, SIDE))
    offset = torch.arange(near * SIDE, device=x.device) - torch.arange(SIDE, device=x.device)[:, None]
    inside = (offset >= 0) & (offset < kernel.shape[-1])
    taps = torch.where(inside, kernel[..., offset.clamp(0, kernel.shape[-1] - 1)], 0.0)  # [h a to near*from]
    taps = taps.unflatten(-1, (near, SIDE)).permute(0, 2, 4, 1, 3).contiguous()
    found = [conv2d(one.permute(0, 3, 1, 2), tap) for one, tap in zip(x.unbind(1), taps, strict=True)]
    return torch.stack(found, 1).permute(0, 1, 3, 4, 2).flatten(3)[..., :columns]


def _mixed(x: Tensor, mix: Tensor) -> Tensor:
    """Each head as a sum over the heads of its group, `mix [groups, from, to]`."""
    groups = x.unflatten(1, (len(mix), -1)).flatten(3)  # [b groups from r*k]
    return (mix.to(x).mT @ groups).view_as(x)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, MultiTokenAttention(spread=0.1)) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
