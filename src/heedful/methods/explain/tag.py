"""map = mean over asked tokens t of the mean of A_t over the image, in the k heads of all layers that give it most."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt, RoleName
from heedful.core.regions import Region, by_text, numbers
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Statistic


@dataclass(frozen=True, eq=False)
class Grounding:
    """Where in an image stands what some tokens speak of."""

    map: Tensor = field(repr=False)  # [b p], what each of the image's tokens is given

    @property
    def place(self) -> Tensor:
        """The image's token of the highest weight in each text, `[b]`."""
        return self.map.argmax(-1)

    def near(self, share: float = 0.5) -> Tensor:
        """Which tokens `[b p]` have this share of the highest weight or more; the authors' code: 0.5."""
        return self.map >= share * self.map.amax(-1, keepdim=True)

    def __str__(self) -> str:
        return f"the image's tokens {self.place.tolist()} of {self.map.shape[-1]}"


class TAG(Method):
    """Points at what a question or an answer speaks of, by where its tokens look in the image.

    For each token those heads count, of all layers, that give the image the most. There is an answer for each forward
    in which such tokens were read, with a map for each of its texts.
    """

    paper = Paper(
        "P113",
        "Attention-driven GUI Grounding: Leveraging Pretrained Multimodal Large Language Models without Fine-Tuning",
        "Hai-Ming Xu, Qi Chen, Lei Wang, Lingqiao Liu",
        2025,
        "2412.10840",
        "AAAI 2025",
        differs=(
            "Which tokens are listened to is the caller's to say; the authors take those of the text that is sought, "
            "or of what the model names when it is asked what to click on.",
            "All of the image's span counts; the authors' image is an overview and slices, of which the slices alone "
            "choose heads and make the map.",
            "The image's tokens are patches; the authors go on from the queries of a resampler to pixels.",
            "The place is the token of the highest weight, or all that come near it; the authors draw boxes round.",
        ),
    )
    one_text = True
    count: PositiveInt = 10  # heads of the whole model that are heard for a token; the authors' code: 10
    asked: RoleName = "question"  # the span whose tokens are listened to
    role: RoleName = "image"  # the span in which places are

    @classmethod
    def example(cls) -> TAG:
        return cls(count=2, asked="answer")

    def idle(self, call: Call) -> bool:
        return call.cross or not {self.asked, self.role} <= call.roles.keys()

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Statistic | None:
        if not call.causal:
            return None  # an encoder's patches stand at such places too
        asked, image = call.regions(self.asked), call.regions(self.role)
        row = by_text(numbers, asked, call.q_pos)[:, 0].where(call.is_text[:, 0], -1)  # [b|1 r]
        column = by_text(numbers, image, call.k_pos)[:, 0]  # [b|1 k]
        tokens, patches = (
            (x[..., None] == torch.arange(_most(spans), device=x.device)).to(weights)
            for x, spans in ((row, asked), (column, image))
        )
        maps = tokens.mT[:, None] @ weights.detach() @ patches[:, None]  # [b h t p]
        missing = tokens.sum(1)[:, None, :, None] == 0
        return Cat.of(f"{call.rows.start:09d}", maps.masked_fill(missing, torch.nan))

    def finish(self, statistic: Statistic, call: Call) -> Statistic:
        tiles = torch.stack(statistic.value)
        return Cat.of(f"{call.forward:06d}", tiles.nansum(0).masked_fill(tiles.isnan().all(0), torch.nan))

    def answer(self, readings: Readings) -> list[Grounding]:
        forwards = zip(*(stat.value for stat in readings.values()), strict=True)
        return [self._ground(torch.cat(maps, 1)) for maps in forwards if not bool(maps[0].isnan().all())]

    def _ground(self, maps: Tensor) -> Grounding:
        """From the maps `[b h t p]` of all layers' heads."""
        chosen = maps.sum(-1).topk(min(self.count, maps.shape[1]), 1).indices  # [b k t]
        found = maps.gather(1, chosen[..., None].expand(*chosen.shape, maps.shape[-1]))
        return Grounding(found.nanmean((1, 2)))  # a text may have fewer such tokens than others


def _most(regions: tuple[Region, ...]) -> int:
    """How many tokens the longest of them has."""
    return max(region.tokens for region in regions)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llava", vision_config={"image_size": 16}, image_seq_length=16)
    inputs = models.tiny_inputs(model, length=22)
    with attach(model, TAG(count=3), roles={"image": ((1, 17),), "question": ((17, 22),)}) as run:
        run(**inputs)
        print(*run[TAG(count=3)])
