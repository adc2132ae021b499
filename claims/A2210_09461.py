"""Token merging: does a vision model lose less by merging the most alike tokens than by dropping as many?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._merged import SHOWN, merged
from claims.ledger import Claim, run
from heedful.authoring import Call, Merged, Site, adds, at
from heedful.kit.merging import numbered
from heedful.methods import ToMe

COUNT = 16  # tokens a layer: of 257, 81 are left to the last of 12


class _Drawn(ToMe):
    """The control: as many, merged at random."""

    seed: int = 0

    def alike(self, keys: Tensor) -> Tensor:
        b, n = len(keys), keys.shape[2]
        return torch.rand(b, (n + 1) // 2, n // 2, generator=torch.Generator().manual_seed(self.seed))


class _Dropped(_Drawn):
    """As many, drawn at random and dropped."""

    @at(Site.RESIDUAL, merges=True)
    def merge(self, stream: Tensor, call: Call) -> Tensor | Merged:
        n = stream.shape[1]
        by = torch.Generator().manual_seed(100 * self.seed + call.layer)
        gone = 1 + torch.rand(len(stream), n - 1, generator=by).argsort(1)[:, : self.count]
        if call.last_layer:
            return stream
        to = numbered(torch.arange(n).repeat(len(stream), 1).scatter(1, gone, -1))
        left = (to >= 0).nonzero()[:, 1].view(len(stream), -1, 1)
        return Merged(stream.gather(1, left.expand(-1, -1, stream.shape[2])), to)


class _Unweighted(ToMe):
    """Merged as ToMe has it, but each counts as one in attention."""

    @adds
    def weigh(self, call: Call) -> Tensor | None:
        ToMe.weigh(self, call)
        return None


def measure(seed: int) -> tuple[float, dict[str, float]]:
    ways = {
        "ToMe": ToMe(COUNT),
        "merged at random": _Drawn(COUNT, seed),
        "dropped at random": _Dropped(COUNT, seed),
        "of no size": _Unweighted(COUNT),
    }
    found = merged(seed, ways)
    return found["ToMe"] - max(found["merged at random"], found["dropped at random"]), found


CLAIM = Claim(
    key="2210.09461",
    method="ToMe",
    says="A vision model says nearly the same of an image, and faster, if it merges the most alike tokens untrained.",
    paper_number="twice the throughput of ViT-L and ViT-H off the shelf with 0.2 to 0.3 % less accuracy (abstract)",
    setup=f"DINOv2-S/14 without training, {SHOWN} picture a seed, {COUNT} of 257 tokens fewer with each layer. How "
    "near the class token is to the unedited model's, against as many tokens merged, and as many dropped, at random; "
    "the better counts. Details: ToMe whose merged tokens count as one in attention; patches; and the processor's "
    "time, as a share of the unedited model's.",
    effect="cosine with the class token of the unedited model, above the better of two at random",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
