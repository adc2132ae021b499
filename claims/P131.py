"""Token pooling: are medoids of clusters a better choice of tokens than those that draw the most attention?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._merged import SHOWN, merged
from claims.ledger import Claim, run
from heedful.methods import TokenPooling

SHARE = 0.5  # behind the third, sixth and ninth layer: of 256 patches 128, 64 and 32


class _Dropped(TokenPooling):
    """The control: patches are kept or dropped by what they receive."""

    def order(self, weight: Tensor) -> Tensor:
        return weight

    def into(self, x: Tensor, weight: Tensor, count: int) -> Tensor:
        best = self.order(weight).argsort(dim=1, descending=True, stable=True)[:, :count]
        return torch.full_like(weight, -1, dtype=torch.long).scatter(1, best, best)


class _Even(_Dropped):
    """Patches at even steps."""

    def into(self, x: Tensor, weight: Tensor, count: int) -> Tensor:
        kept = torch.linspace(0, x.shape[1] - 1, count).round().long().expand(len(x), -1)
        return torch.full_like(weight, -1, dtype=torch.long).scatter(1, kept, kept)


class _Random(_Dropped):
    """Patches drawn at random."""

    seed: int = 0

    def order(self, weight: Tensor) -> Tensor:
        return torch.rand(weight.shape, generator=torch.Generator().manual_seed(self.seed))


def measure(seed: int) -> tuple[float, dict[str, float]]:
    ways = {
        "medoids": TokenPooling(share=SHARE),
        "most received": _Dropped(share=SHARE),
        "even steps": _Even(share=SHARE),
        "drawn": _Random(share=SHARE, seed=seed),
    }
    found = merged(seed, ways)
    return found["medoids"] - found["most received"], found


CLAIM = Claim(
    key="P131",
    method="TokenPooling",
    says="Tokens chosen to stand for the others lose less than those that receive the most attention.",
    paper_number="DeiT's accuracy on ImageNet with 42 % fewer operations; better than pruning by scores (abstract)",
    setup=f"DINOv2-S/14 without training, {SHOWN} picture a seed; half of the patches are left behind the third, "
    "the sixth and the ninth layer each. How near the class token is to the unedited model's, against keeping as many "
    "that receive the most. Details: as many at even steps, or drawn; patches; and the processor's time, as a share of "
    "the unedited model's.",
    effect="cosine with the class token of the unedited model, above that with patches that receive the most",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
