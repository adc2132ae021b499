"""A tiny vision transformer, trained in seconds on handwritten digits under any stack.

Each of scikit-learn's 8 x 8 digits stands in one of nine places of a 12 x 12 field, two pixels apart, which is the side
of a patch. Patches do not see the class token, which only reads, as the last mean of models that have no such token.
"""

from __future__ import annotations

import copy
import math
from functools import cache
from itertools import product
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from heedful import Site, attach
from heedful.authoring import Call, Mask, Method, Paper, Where, at
from heedful.core.method import Part, Stack
from heedful.methods.mechanisms.local._neighbours import narrowed

SIDE = 6  # patches
PATCH = 2  # pixels
PIXELS = SIDE * PATCH
PLACES = tuple(product(range(3), repeat=2))  # patches down and right
LAYERS = 4
BATCH = 32
RATE = 3e-3
HELD_OUT = 597  # of 1797


class Reads(Method):
    """Only the class token itself sees the class token."""

    paper = Paper("claims", "A control of heedful's own", "heedful", 2026, venue="heedful")

    @at(Site.MASK)
    def hide(self, mask: Mask, call: Call) -> Mask:
        return mask & Where(lambda q, k: (k > 0) | (q == 0))


class Windows(Method):
    """As in Swin: patches see those of their window, and windows begin `shift` patches in."""

    paper = Reads.paper
    size: int
    shift: int = 0

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        def sees(_: int, query: Tensor, key: Tensor) -> Tensor:
            back = self.size - self.shift
            return (query + back) // self.size == (key + back) // self.size

        return narrowed(mask, call, sees)


@cache
def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32) / 8 - 1, torch.tensor(found.target)


def placed(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Images `[n 8 8]` on the field `[n 1 12 12]`, each moved by so many patches."""
    out = images.new_full((len(images), 1, PIXELS, PIXELS), -1.0)
    for y, x in PLACES:
        here = (down == y) & (right == x)
        out[here, 0, PATCH * y : PATCH * y + 8, PATCH * x : PATCH * x + 8] = images[here]
    return out


def accuracy(what: Part | Stack, seed: int, steps: int) -> float:
    """Train under a stack, in which the class token is hidden; the share of held-out digits named rightly."""
    return accuracy_of(Reads() | what, seed, steps)


def accuracy_of(what: Part | Stack, seed: int, steps: int) -> float:
    """Train under a stack; the share of held-out digits named rightly, in all places."""
    return taught(what, seed, steps)[1]


def taught(
    what: Part | Stack, seed: int, steps: int, begun: nn.Module | None = None, few: int | None = None
) -> tuple[nn.Module, float]:
    """A fresh model trained under a stack, or a copy of one that is `begun` already, and its accuracy.

    Trained on so few of the digits, or on all that are not held out.
    """
    random = torch.Generator().manual_seed(seed)
    images, labels = digits()
    order = torch.randperm(len(images), generator=random)
    tried, kept = order[:HELD_OUT], order[HELD_OUT:][:few]
    torch.manual_seed(seed)
    model = fresh() if begun is None else copy.deepcopy(begun)
    run = attach(model, what)
    _train(model, run, images[kept], labels[kept], random, steps)
    with torch.no_grad():
        right = [
            run(pixel_values=placed(images[tried], *(torch.full((HELD_OUT,), x) for x in place))).logits.argmax(-1)
            == labels[tried]
            for place in PLACES
        ]
    run.close()
    return model, float(torch.stack(right).float().mean())


def fresh() -> nn.Module:
    """The model, untrained."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=PIXELS, patch_size=PATCH, num_channels=1, hidden_size=32, intermediate_size=64,
            num_hidden_layers=LAYERS, num_attention_heads=4, num_labels=10, initializer_range=0.1,
            attn_implementation="sdpa",
        )
    )  # fmt: skip


def _train(model: nn.Module, run: Any, images: Tensor, labels: Tensor, random: torch.Generator, steps: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.randint(len(images), (BATCH,), generator=random)
        place = torch.randint(3, (2, BATCH), generator=random)
        optimiser.zero_grad()
        run(pixel_values=placed(images[chosen], *place), labels=labels[chosen]).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    model.eval()
