"""A vision transformer on scikit-learn's handwritten digits, which come with it: 8 x 8 pixels on a larger field."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from heedful.adapters.wrapped import device_of
from heedful.core.errors import HeedfulError
from heedful.laboratory.course import Batch, Course, Opener, Quantity

PATCH, SIDE = 2, 6  # pixels of a patch, patches of a side
PLACES = tuple((down, right) for down in range(3) for right in range(3))  # patches from the upper left
SEEN = tuple(place for place in PLACES if sum(place) % 2 == 0)  # the corners and the middle; the others are never seen
HELD_OUT = 597  # of 1797


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images `[n 8 8]` from -1 to 1, and what they show."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as missing:
        rule = "scikit-learn is not installed, and the lab takes its digits from there: pip install 'heedful[lab]'"
        raise HeedfulError(rule) from missing
    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32) / 8 - 1, torch.tensor(found.target)


def parted(seed: int) -> tuple[Tensor, Tensor]:
    """The numbers of the digits that are trained on, and of those held out: others with each seed."""
    order = torch.randperm(len(digits()[0]), generator=Generator().manual_seed(seed))
    return order[HELD_OUT:], order[:HELD_OUT]


def placed(images: Tensor, places: Tensor) -> Tensor:
    """Images on an empty field `[n 1 12 12]`, each moved by so many patches down and to the right."""
    field = images.new_full((len(images), 1, PATCH * SIDE, PATCH * SIDE), -1.0)
    at = PATCH * places[:, :, None] + torch.arange(8)  # [n 2 8]
    field[torch.arange(len(images))[:, None, None], 0, at[:, 0, :, None], at[:, 1, None, :]] = images
    return field


@dataclass(frozen=True)
class Digits(Course):
    """Names a digit, seen in five places and tried in these and in four others."""

    name: ClassVar[str] = "digits"
    about: ClassVar[str] = "Names handwritten digits of 8 by 8 pixels on a field of 12 by 12."
    tokens: int = 691_200
    rows: int = 32
    width: int = 32
    layers: int = 4
    heads: int = 4

    @property
    def a_batch(self) -> int:
        return self.rows * SIDE * SIDE

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        return (
            Quantity("accuracy", "Of held-out digits, where digits stood in training.", "share right", True),
            Quantity("shifted", "Of the same digits, where none stood.", "share right", True),
        )

    def model(self, seed: int) -> Any:
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(seed)
        return ViTForImageClassification(
            ViTConfig(
                image_size=PATCH * SIDE, patch_size=PATCH, num_channels=1, hidden_size=self.width,
                intermediate_size=2 * self.width, num_hidden_layers=self.layers, num_attention_heads=self.heads,
                num_labels=10, initializer_range=0.1, attn_implementation="sdpa",
            )
        )  # fmt: skip

    def batch(self, seed: int, random: Generator) -> Batch:
        images, labels = digits()
        mine, _ = parted(seed)
        chosen = mine[torch.randint(len(mine), (self.rows,), generator=random)]
        places = torch.tensor(SEEN)[torch.randint(len(SEEN), (self.rows,), generator=random)]
        return {"pixel_values": placed(images[chosen], places), "labels": labels[chosen]}

    def measure(self, opened: Opener, seed: int) -> dict[str, float]:
        images, labels = digits()
        _, tried = parted(seed)
        right: dict[bool, list[Tensor]] = {True: [], False: []}
        with opened() as run:
            device = device_of(run.model)
            for place in PLACES:
                shown = placed(images[tried], torch.tensor(place).expand(len(tried), 2))
                best = run(pixel_values=shown.to(device)).logits.argmax(-1).cpu()
                right[place in SEEN].append(best == labels[tried])
        means = {seen: float(torch.stack(found).float().mean()) for seen, found in right.items()}
        return {"accuracy": means[True], "shifted": means[False]}
