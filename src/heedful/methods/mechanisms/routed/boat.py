"""Patches halved again and again by how much nearer they are to one of two centres; each sees those of its part."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from heedful.authoring import Call, FieldError, Mask, Method, NonNegativeInt, Paper, PositiveInt, Site, SiteError, at
from heedful.core.flags import whole
from heedful.core.positions import taken
from heedful.core.rules import Arranged
from heedful.kit.patches import patch_tokens, sides, whole_image
from heedful.kit.running import wide

ROUNDS = 2  # in which centres move; the published code
SHARP = 100  # factor on cosines before their softmax; the published code


class BOAT(Method):
    """Parts of equal size by what patches are like, wherever they stand. For models trained with it, beside windows.

    Windows are `GeneralizedNeighborhoodAttention((w, w), (w, w))`, in other layers or in other heads.
    """

    paper = Paper(
        "P130",
        "BOAT: Bilateral Local Attention Vision Transformer",
        "Tan Yu, Gangming Zhao, Ping Li, Yizhou Yu",
        2022,
        "2201.13027",
        "BMVC 2022",
        differs=(
            "It is the attention among patches that are alike, without the windows that the authors have before it in "
            "the same block, and without their convolution of values.",
            "Tokens outside the grid of patches, as a class token, see everything and are seen by all; the authors' "
            "models have none.",
            "The steps are those of the code published with trained models (github.com/mahaoyuHKU/pytorch-boat, which "
            "calls itself unofficial): by queries, head by head, and keys and values of two halves overlap alone.",
            "In causal models, and where the patches are no grid or not all are read at once, plain attention stays.",
        ),
    )
    subjects = ("image",)
    # how often all patches are halved; the published code: until 49 are left, of 14 x 14 twice
    halvings: PositiveInt = 2
    # patches of the other half that are seen too, those nearest to the cut; the published code: 20
    overlap: NonNegativeInt = 20

    @classmethod
    def example(cls) -> BOAT:
        return cls(2, 1)

    def idle(self, call: Call) -> bool:
        return not whole_image(call)

    @at(Site.MASK)
    @torch.no_grad()
    def narrow(self, mask: Mask, call: Call) -> Mask:
        if call.query is None:
            raise SiteError(f"{self!r}, layer {call.layer}: patches are sorted by queries, and it is handed none")
        tokens = patch_tokens(self, call)
        if len(tokens) % 2**self.halvings:
            rows, cols = sides(call)
            rule = f"must halve the {rows} x {cols} patches of layer {call.layer} without a rest"
            raise FieldError(self, "halvings", self.halvings, rule, 1)
        (query,) = wide(call.query[:, :, tokens])
        size = len(tokens) // 2**self.halvings
        place = self.order(query).argsort(-1)  # [b h patches]
        start = place // (2 * size) * (2 * size)  # of the two halves of the last halving, which are cut in the middle
        ahead, cut, stop = place >= start + size, start + size, start + 2 * size
        first = torch.where(ahead, (cut - self.overlap).maximum(start), start)
        stop = torch.where(ahead, stop, (cut + self.overlap).minimum(stop))
        # tokens outside the grid come first, see everything and are seen by all
        n, outside = len(call.keys), len(call.keys) - len(tokens)
        before = torch.zeros_like(place), torch.full_like(place, outside)
        own = torch.stack([*before, outside + first, outside + stop], -1).unflatten(-1, (2, 2))
        ranges = own.new_tensor([[0, n], [0, 0]]).expand(*place.shape[:2], n, 2, 2).index_copy(2, tokens, own)
        others = torch.ones(n, dtype=torch.bool, device=place.device).index_fill(0, tokens, False)
        places = (others.cumsum(0) - 1).expand(*place.shape[:2], n).index_copy(2, tokens, outside + place)
        return mask & Arranged(ranges.to(whole(n)), places.to(whole(n)))

    def order(self, query: Tensor) -> Tensor:
        """The patches `[b h n d]` in the order in which parts stand side by side, `[b h n]`."""
        b, h, n, _ = query.shape
        order = torch.arange(n, device=query.device).expand(b, h, n)
        for halving in range(self.halvings):
            parts = order.unflatten(-1, (2**halving, -1))  # [b h parts p]
            placed = taken(query, order).unflatten(2, parts.shape[2:])
            x = normalize(placed, dim=-1)
            centres = normalize(placed.unflatten(3, (2, -1)).mean(-2), dim=-1)  # of the halves as they stand
            for _ in range(ROUNDS):
                centres = normalize((SHARP * x @ centres.mT).softmax(-1).mT @ placed, dim=-1)
            first, second = (x @ centres.mT + 1).unbind(-1)
            order = parts.gather(-1, (first / second).argsort(-1)).flatten(2)
        return order


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    with attach(model, BOAT(2, 4)) as run:
        print(run.difference(**inputs))
