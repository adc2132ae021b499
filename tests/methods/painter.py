"""A denoiser of nothing but attention to words, in plain torch, and its maps by their formula."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from heedful import attach
from heedful.conformance.tolerances import close
from heedful.core.method import Method
from heedful.core.regions import Roles

PLACES, WORDS, WIDTH, HEADS = 12, 6, 8, 2
GRID = (3, 4)  # of the places


class Cross(nn.Module):
    """Attention to another sequence, as people write it."""

    num_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(context)), self.heads(self.v(context))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Painter(nn.Module):
    """Two layers of it, one after another; what is painted has half the places from layer `halves` on."""

    def __init__(self, halves: int = 9) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(Cross() for _ in range(2))
        self.halves = halves
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = x[:, ::2] if number == self.halves else x
            x = x + layer(x, context=context)
        return x


class Both(nn.Module):
    """Attention of places to one another, to words, and to one another again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.own, self.words, self.last = Cross(), Cross(), Cross()
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.own(x, x)
        x = x + self.words(x, context)
        return x + self.last(x, x)


def inputs(batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, PLACES, WIDTH, generator=draw, dtype=torch.float64),
        "context": 3 * torch.randn(batch, WORDS, WIDTH, generator=draw, dtype=torch.float64),
    }


def maps(model: Painter, x: Tensor, context: Tensor) -> list[Tensor]:
    """Each layer's map `[b n k]`, the mean of its heads, by the formula."""
    found = []
    for layer in model.layers:
        q, k, v = layer.heads(layer.q(x)), layer.heads(layer.k(context)), layer.heads(layer.v(context))
        weights = (q @ k.mT / math.sqrt(WIDTH / HEADS)).softmax(-1)
        found.append(sum(weights[:, h] for h in range(HEADS)) / HEADS)
        x = x + (weights @ v).transpose(1, 2).flatten(2)
    return found


def smoothed(image: Tensor) -> Tensor:
    """A map `[n]` on the grid under the authors' Gaussian, by loops, reflected at the borders."""
    rows, cols = GRID
    side = math.exp(-((1 / (2 * 0.5)) ** 2))
    weight = {-1: side / (1 + 2 * side), 0: 1 / (1 + 2 * side), 1: side / (1 + 2 * side)}

    def back(i: int, count: int) -> int:
        return -i if i < 0 else 2 * (count - 1) - i if i >= count else i

    out = []
    for r in range(rows):
        for c in range(cols):
            total = torch.zeros((), dtype=image.dtype)
            for dr, wr in weight.items():
                for dc, wc in weight.items():
                    total = total + wr * wc * image[back(r + dr, rows) * cols + back(c + dc, cols)]
            out.append(total)
    return torch.stack(out)


def shared(weights: Tensor, words: list[int], sharpness: float) -> dict[int, Tensor]:
    """What each word wins of the places from the others, from a text's map `[n k]`: a map `[n]` for each."""
    found = (sharpness * weights[:, words]).softmax(-1)
    return {word: found[:, i] for i, word in enumerate(words)}


def check_loss(model: Painter, method: Method, want: Tensor, roles: Roles, given: dict[str, Tensor]) -> None:
    """A run's loss is the one that is wanted, and so are its slopes by the weights that keys are made with."""
    learnt = [layer.k.weight for layer in model.layers]  # type: ignore[union-attr]
    slopes = torch.autograd.grad(want, learnt)
    with attach(model, method, roles=roles, inputs=given) as run:
        run(**given)
        assert close(run.loss(), want.detach().float())
        for mine, slope in zip(torch.autograd.grad(run.loss(), learnt), slopes, strict=True):
            assert close(mine.float(), slope.float())
