"""An image's fine tokens are seen where the layer before looked at coarse ones: (m - min) / (max - min) > 1/4."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import (
    Call,
    FieldError,
    Mask,
    Method,
    NonNegativeInt,
    Paper,
    Region,
    RoleName,
    ShareBelowOne,
    Site,
    at,
    reads,
)
from heedful.kit.chosen import Chosen


class FlexAttention(Method):
    """Of an image at high resolution words see the few places that they look at anyway. For models trained with it.

    Roles name both images among the tokens, `{"low": Region(spans, grid), "high": Region(spans, grid)}`; without grids
    each is a row. Whatever comes behind them chooses, token by token and layer by layer; nothing else sees the fine
    tokens, and of them each sees itself alone. Where an encoder comes before the words, `.on(layers=...)` names theirs.
    """

    paper = Paper(
        "P222",
        "FlexAttention for Efficient High-Resolution Vision-Language Models",
        "Junyan Li, Delin Chen, Tianle Cai, Peihao Chen, Yining Hong, Zhenfang Chen, Yikang Shen, Chuang Gan",
        2024,
        "2407.20228",
        "ECCV 2024",
        differs=(
            "Fine tokens stand in the text and go through the model's layers; the authors keep them beside it, as the "
            "encoder leaves them, and give each layer further projections for their keys and values.",
            "The authors mark whole ninths of the image along each side that hold a place above the threshold, and "
            "leave out the margins of images that are no squares; here places are taken as they are.",
            "All tokens behind the images choose; the authors' do where they answer, and while a model learns they are "
            "let see fine tokens little by little.",
            "What fine tokens are given makes what coarse ones get less; the authors choose by weights without them.",
            "Fine tokens that nobody sees are computed all the same: what leaving them out saves is not saved here.",
        ),
    )
    whole_map = True
    # the layer of its list whose map is the first to choose, for the next layer; the authors: 8
    first: NonNegativeInt = 8
    # between the lowest and the highest weight of a coarse place; the authors: 64 / 255
    threshold: ShareBelowOne = 64 / 255
    low: RoleName = "low"  # the coarse image's tokens
    high: RoleName = "high"  # the fine image's

    @classmethod
    def example(cls) -> FlexAttention:
        return cls(0, 0.4, "marked", "answer")

    def idle(self, call: Call) -> bool:
        return call.cross

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        number, chosen = call.numbers(self.high)[:, 0], call.state.forward.get(_key(call))  # [b|1 k] and [b q fine]
        fine, asking, giving = number[:, None] >= 0, call.q_pos[:, 0, :, None], call.k_pos[:, 0, None]

        def pick(rows: slice) -> Tensor:
            seen = ~fine | (asking[:, rows] == giving)
            if chosen is not None:
                mine = chosen[:, rows]
                at_keys = number.clamp(min=0)[:, None].expand(len(mine), mine.shape[1], -1)
                seen = seen | (fine & mine.gather(-1, at_keys))
            return seen[:, None]

        return mask & Chosen(pick)

    @reads(Site.PATTERN)
    def choose(self, weights: Tensor, call: Call) -> None:
        """Leave for the next layer which fine tokens each query sees."""
        if call.layer - call.lowest < self.first:
            return
        coarse, fine = call.region(self.low), call.region(self.high)
        places = torch.arange(coarse.tokens, device=weights.device)
        laid = (call.numbers(self.low)[:, 0, :, None] == places).to(weights.dtype)  # [b|1 k coarse]
        found = self.picked(weights.detach().mean(1) @ laid)
        behind = call.q_pos[:, 0] >= max(stop for region in (coarse, fine) for _, stop in region)
        call.state.forward[_key(call)] = found[..., _coarse_of(coarse, fine).to(places.device)] & behind[..., None]

    def picked(self, looks: Tensor) -> Tensor:
        """Which coarse places `[b q n]` are looked at, by what they get."""
        low, high = looks.amin(-1, keepdim=True), looks.amax(-1, keepdim=True)
        return looks - low > self.threshold * (high - low)


def _key(call: Call) -> str:
    """Where layers of one list leave their choice for each other."""
    return f"chosen, {call.lowest}"


def _coarse_of(coarse: Region, fine: Region) -> Tensor:
    """Which coarse place each fine one lies in, `[fine]`."""
    rough, sharp = (region.grid or (region.tokens,) for region in (coarse, fine))
    if len(rough) != len(sharp):
        raise FieldError("attach()", "roles", (rough, sharp), "both images must have grids alike", ((4, 4), (8, 8)))
    place = torch.unravel_index(torch.arange(fine.tokens), sharp)
    number = torch.zeros(fine.tokens, dtype=torch.long)
    for at_axis, few, many in zip(place, rough, sharp, strict=True):
        number = number * few + at_axis * few // many
    return number


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    ids = torch.randint(3, 100, (1, 26))
    roles = {"low": Region(((0, 4),), (2, 2)), "high": Region(((4, 20),), (4, 4))}
    with torch.no_grad(), attach(model, FlexAttention(0), roles=roles) as run:
        print(run.difference(input_ids=ids))
