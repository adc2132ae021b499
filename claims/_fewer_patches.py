"""What a vision model's last layer makes of an image of which it sees some patches alone, for several claims."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from claims._scenes import model, scenes
from heedful import attach
from heedful.authoring import Call
from heedful.kit.picked import PickedPatches, best

LAYER = 10  # of 12, counted from 0: the last but one, as in LLaVA; the last stands for who reads on
SHOWN = 10  # pictures a seed
DRAWS = 4  # of patches at random


class _Drawn(PickedPatches):
    """The control: as many patches, drawn at random."""

    share: float = 0.25
    seed: int = 0

    def choose(self, weights: Tensor, call: Call) -> Tensor:
        where, by = self.patches(call), torch.Generator().manual_seed(self.seed)
        count = where.stop - where.start
        return best(torch.rand(len(weights), count, generator=by), -int(-self.share * count // 1))


def cosines(seed: int, ways: dict[str, PickedPatches], share: float) -> dict[str, float]:
    """How near the class token comes to that of the whole image, for each way of choosing and for patches drawn."""
    pixels, _ = scenes(torch.Generator().manual_seed(seed), SHOWN)
    with torch.no_grad():
        whole = model()(pixel_values=pixels).last_hidden_state[:, 0]

    def near(method: PickedPatches) -> float:
        with attach(model(), replace(method, layer=LAYER, share=share)) as seen, torch.no_grad():
            found = seen(pixel_values=pixels).last_hidden_state[:, 0]
        return float(torch.cosine_similarity(found, whole, dim=-1).mean())

    numbers = {name: near(method) for name, method in ways.items()}
    return numbers | {"drawn": sum(near(_Drawn(seed=DRAWS * seed + i)) for i in range(DRAWS)) / DRAWS}
