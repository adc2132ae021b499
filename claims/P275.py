"""AttenCraft: are masks of two things better where words' maps are spread along self-attention first?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from claims._pictures import PATCH, denoiser, draw
from claims.ledger import Claim, run
from heedful import attach
from heedful.methods.intervene.diffusion._map_loss import levelled
from heedful.methods.intervene.diffusion.atten_craft import _Concepts, parted

PICTURES, TIME, THRESHOLD = 48, 0.5, 0.1
ROLES = {"concepts": ((0, 2), (2, 4), (4, 5))}  # the words of either thing, and of the ground


class _Raw(_Concepts):
    """The control: squares of the maps as they are."""

    def refined(self, words: Tensor, places: Tensor) -> Tensor:
        return levelled(words.square(), (-1,))


class _Shuffled(_Concepts):
    """Spread along self-attention whose places are dealt anew."""

    def refined(self, words: Tensor, places: Tensor) -> Tensor:
        dealt = torch.randperm(places.shape[-1], generator=torch.Generator().manual_seed(0))
        return super().refined(words, places[:, dealt][:, :, dealt])


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    by = torch.Generator().manual_seed(300 + seed)
    pictures, words, covered = draw(8 * PICTURES, by)
    both = covered.flatten(2).any(-1).all(-1).nonzero().flatten()[:PICTURES]
    pictures, words = pictures[both], words[both]
    truth = F.avg_pool2d(covered[both].float(), PATCH).flatten(2) >= 0.5  # a patch that is half the thing's
    noise = torch.randn(pictures.shape, generator=by)
    given = {
        "noised": (1 - TIME) * pictures + TIME * noise,
        "t": torch.full((PICTURES,), TIME),
        "context": denoiser().read(words),
    }
    numbers: dict[str, float] = {}
    for name, reader in (("spread", _Concepts()), ("as they are", _Raw()), ("along dealt places", _Shuffled())):
        with attach(denoiser(), reader, roles=ROLES, inputs=given) as run:
            run(**given)
            (maps,) = run[reader]
        masks = parted(maps, THRESHOLD)[:, :2]
        numbers[f"overlap, {name}"] = float(((masks & truth).sum(-1) / (masks | truth).sum(-1)).mean())
        numbers[f"in a mask, {name}"] = float(masks.any(1).double().mean())
    best = max(numbers["overlap, as they are"], numbers["overlap, along dealt places"])
    return numbers["overlap, spread"] - best, numbers


CLAIM = Claim(
    key="P275",
    method="AttenCraft",
    says="Attention maps give accurate masks of several concepts in one step, where words' maps are spread along "
    "self-attention.",
    paper_number="none in the abstract, which says that the masks are accurate",
    setup="A text-to-image transformer of 0.2M parameters on 16 x 16 pictures of two things instead of Stable "
    f"Diffusion; {PICTURES} drawn pictures a seed, half picture and half noise, and three concepts: both things and "
    f"the ground. Places where a concept is ahead by {THRESHOLD}, the authors' threshold. Against the same of maps as "
    "they are, and of maps spread along self-attention whose places are dealt anew. Masks alone; training on them is "
    "not measured.",
    effect="intersection over union with the things' places, the mean of both, above the better of both controls",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
