"""What tests of methods that act on an image share: calls with one among the tokens, and loops to hold them against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Mask, Method
from heedful.conformance.bare import Bare, Shape, parameters
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.regions import Region

Image = dict[tuple[int, int], Tensor]  # by row and column, the channels


def image_call(method: Method, grid: tuple[int, int], before: int, after: int, e: int) -> tuple[Call, Tensor]:
    """A call whose patches have tokens before and behind them, with moved parameters, and tokens `[2 n e]`."""
    n, draw = before + math.prod(grid) + after, torch.Generator().manual_seed(1)
    bare = Bare(Shape(q=n, k=n, e=e), dtype=torch.float64, rules=())
    given = parameters(method, bare.shape.layer, torch.float64)
    params = {name: x + torch.randn(x.shape, generator=draw).double() / 4 for name, x in given.items()}
    roles = {"patches": Region(((before, n - after),), grid), "cls": Region(((0, 1),))}
    call = replace(bare.call, roles=roles, mask=Mask(), params=params)
    return call, torch.randn(2, n, e, generator=draw, dtype=torch.float64)


def image_of(tokens: Tensor, grid: tuple[int, int], before: int) -> Image:
    return {divmod(i, grid[1]): tokens[before + i] for i in range(math.prod(grid))}


def tokens_of(image: Image, others: Tensor, before: int) -> Tensor:
    """The image's patches row by row, and around them what others there are `[n e]`."""
    patches = [image[place] for place in sorted(image)]
    return torch.stack([*others[:before], *patches, *others[before + len(patches) :]])


def convolved(image: Image, kernel: Tensor, bias: Tensor | None = None) -> Image:
    """A weight `[out in rows cols]` for each neighbour, none off the image; channel by channel where `in` is 1."""
    high, wide = kernel.shape[2] // 2, kernel.shape[3] // 2
    found = {}
    for y, x in image:
        total = torch.zeros(len(kernel), dtype=torch.float64) if bias is None else bias
        for dy in range(-high, high + 1):
            for dx in range(-wide, wide + 1):
                if (y + dy, x + dx) in image:
                    weight, seen = kernel[:, :, high + dy, wide + dx], image[y + dy, x + dx]
                    alone = weight.shape[1] == 1 < len(seen)
                    total = total + (weight[:, 0] * seen if alone else weight @ seen)
        found[y, x] = total
    return found


def mean_of(image: Image) -> Tensor:
    return torch.stack(list(image.values())).sum(0) / len(image)


def normed_by_hand(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    """A token `[e]`, normed over its channels."""
    centred = x - x.sum() / len(x)
    return centred / ((centred**2).sum() / len(x) + 1e-5) ** 0.5 * p[name] + p[f"{name}_bias"]


def attended_by_hand(
    p: dict[str, Tensor], name: str, asking: list[Tensor], seen: list[Tensor], heads: int
) -> list[Tensor]:
    """What tokens `[e]` find among others, head by head, by a weight `[3e e]` and one `[e e]` behind the heads."""
    weight, bias, e, out = p[name], p[f"{name}_bias"], len(seen[0]), []
    d = e // heads
    for x in asking:
        found = []
        for h in range(heads):
            of = [slice(part * e + h * d, part * e + (h + 1) * d) for part in range(3)]
            query = weight[of[0]] @ x + bias[of[0]]
            scores = torch.stack([query @ (weight[of[1]] @ y + bias[of[1]]) for y in seen]) / d**0.5
            weights = scores.exp() / scores.exp().sum()
            found.append(sum(w * (weight[of[2]] @ y + bias[of[2]]) for w, y in zip(weights, seen, strict=True)))
        out.append(p[f"{name}_out"] @ torch.cat(found) + p[f"{name}_out_bias"])
    return out


def agree(
    acts: Callable[[Tensor, Call], Tensor],
    by_hand: Callable[[Tensor, dict[str, Tensor]], Tensor],
    call: Call,
    x: Tensor,
) -> None:
    """Hold what comes out, the first step's loss and its gradients against loops over one image's tokens `[n e]`."""
    params = dict(call.params)
    leaves = [x, *params.values()]
    for leaf in leaves:
        leaf.requires_grad_(True)
    found = acts(x, call)
    wanted = torch.stack([by_hand(tokens, params) for tokens in x])
    assert close(found, wanted)
    losses = [(y - 1).square().mean() for y in (found, wanted)]
    assert close(losses[0], losses[1])
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def learns_of_an_image(method: Method) -> None:
    """All that a method has to learn is moved, in each layer of a small image model."""
    model = models.tiny("vit", image_size=16)
    with attach(model, method) as run:
        run(**models.tiny_inputs(model), output_hidden_states=True).hidden_states[-1].square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in run.parameters())
