"""Bags of handwritten digits, of which one tells what the bag is: what the last layer hands the class token decides.

After M. Ilse, J. Tomczak and M. Welling, Attention-based Deep Multiple Instance Learning (arXiv 1802.04712).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from heedful.adapters.wrapped import device_of
from heedful.core.call import Call
from heedful.core.method import Method
from heedful.core.sites import Site, reads
from heedful.core.stats import Mean
from heedful.laboratory.course import Batch, Course, Opener, Quantity, told
from heedful.laboratory.images import digits, parted

PIXELS = 8  # of a digit's side, which is a patch
PLAIN = 2  # digits below this fill the bag, and one from this on is named
TRIED = 600  # bags in the end
LARGER = 2  # times the side of a bag of training


class _OnIt(Method):
    """The share of its attention that the class token gives the digit which is to be named, head by head."""

    places: tuple[int, ...]  # among the patches, of each bag

    @reads(Site.PATTERN)
    def read(self, weights: Tensor, call: Call) -> Mean | None:
        if call.rows.start:  # a tile of later rows, without the class token's
            return None
        size = weights[:, :, 0].abs()  # [b h k]; rows need not add up to one, nor be positive
        at = 1 + torch.tensor(self.places, device=size.device)[:, None, None].expand(-1, size.shape[1], 1)
        share = size.gather(2, at)[..., 0] / size.sum(-1).clamp(min=1e-9)
        return Mean.of(share.sum(0), len(weights))


@dataclass(frozen=True)
class Bags(Course):
    """Names the one digit from two to nine among zeros and ones; a mechanism acts in the last layer alone."""

    name: ClassVar[str] = "bags"
    about: ClassVar[str] = (
        "Names the one digit from 2 to 9 in a bag of zeros and ones; only the last layer is replaced."
    )
    tokens: int = 768_000
    side: int = 5  # digits of a bag's side
    rows: int = 32
    width: int = 32
    layers: int = 2
    heads: int = 4

    @property
    def a_batch(self) -> int:
        return self.rows * self.side**2

    @property
    def only(self) -> tuple[str, ...]:
        return (f"vit.layers.{self.layers - 1}",)

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        return (
            Quantity("accuracy", "Of held-out digits.", "share right", True),
            Quantity("larger", f"In bags {LARGER**2} times as large as those of training.", "share right", True),
            Quantity(
                "off", "What the best head of the class token gives to others than the digit named.", "share", False
            ),
        )

    def model(self, seed: int) -> Any:
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(seed)
        return ViTForImageClassification(
            ViTConfig(
                image_size=PIXELS * self.side, patch_size=PIXELS, num_channels=1, hidden_size=self.width,
                intermediate_size=2 * self.width, num_hidden_layers=self.layers, num_attention_heads=self.heads,
                num_labels=10 - PLAIN, initializer_range=0.1, attn_implementation="sdpa",
            )
        )  # fmt: skip

    def drawn(self, random: Generator, among: Tensor, rows: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """Bags `[b 1 side side]` of the digits that have these numbers, what is to be named, and where it stands."""
        images, labels = digits()
        plain, named = (among[labels[among] < PLAIN], among[labels[among] >= PLAIN])
        fill = plain[torch.randint(len(plain), (rows, side**2), generator=random)]
        place = torch.randint(side**2, (rows,), generator=random)
        one = named[torch.randint(len(named), (rows,), generator=random)]
        cells = images[fill.scatter(1, place[:, None], one[:, None])].unflatten(1, (side, side))
        field = (
            cells.transpose(2, 3).flatten(3).flatten(1, 2)
        )  # rows of cells, pixels down, cells across, pixels across
        return field[:, None], labels[one] - PLAIN, place

    def batch(self, seed: int, random: Generator) -> Batch:
        pixels, labels, _ = self.drawn(random, parted(seed)[0], self.rows, self.side)
        return {"pixel_values": pixels, "labels": labels}

    def measure(self, opened: Opener, seed: int) -> dict[str, float]:
        random, tried = Generator().manual_seed(10_000 + seed), parted(seed)[1]
        found = {}
        for name, side in (("accuracy", self.side), ("larger", LARGER * self.side)):
            pixels, labels, places = self.drawn(random, tried, TRIED, side)
            reader = _OnIt(tuple(places.tolist()))
            with opened(*([reader] if side == self.side else [])) as run:
                pooled = run.stack.touches(Site.RESIDUAL)  # behind the layer, whose own weights then say nothing
                device = device_of(run.model)
                more = {} if side == self.side else {"interpolate_pos_encoding": True}
                best = run(pixel_values=pixels.to(device), **more).logits.argmax(-1).cpu()
                found[name] = float((best == labels).float().mean())
                if not pooled and (by_layer := told(run, reader)):
                    found["off"] = 1 - float(torch.stack([mean.value.max() for mean in by_layer.values()]).max())
        return found
