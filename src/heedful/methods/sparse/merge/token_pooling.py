"""K tokens that stand for all, min_C sum_i w_i min_{c in C} |x_i - c|, by K-medoids; w_i: what token i receives."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call, Merged
from heedful.core.errors import SiteError
from heedful.core.paper import Paper
from heedful.core.ranges import Layers, NonNegativeInt, PositiveShare
from heedful.core.sites import Site, at
from heedful.core.summary import Summary, sums
from heedful.kit.merging import MergesTokens, averaged, is_fixed, numbered

WEIGHT = "weight"


class TokenPooling(MergesTokens):
    """Leaves, behind some layers of an encoder, the medoids of clusters of tokens."""

    paper = Paper(
        "P131",
        "Token Pooling in Vision Transformers",
        "Dmitrii Marin, Jen-Hao Rick Chang, Anurag Ranjan, Anish Prabhu, Mohammad Rastegari, Oncel Tuzel",
        2021,
        "2110.03860",
        "WACV 2023",
        differs=(
            "The authors' text was at hand in part, and their code is not public: weights, start, distances, layers "
            "and number of steps are those of a comparison of such methods, arXiv 2308.04657, and of its code.",
            "In a step that code weighs each candidate by what it receives itself and adds up its distances to all "
            "patches; here the weighted sum is made least over the patches of the cluster. It rounds the numbers of "
            "patches down once, and not each time anew.",
            "K-medoids alone, which the authors have beside K-means; models are taken as they are and not trained on.",
            "Behind the last layer each token is there again, as the medoid of its cluster.",
        ),
    )
    layers: Layers = (2, 5, 8)  # behind which tokens are pooled, from 0; of 12, as in that comparison
    share: PositiveShare = 0.7  # of the patches that are left each time
    rounds: NonNegativeInt = 3  # in which medoids move; 3 in that comparison

    @classmethod
    def neutral(cls) -> TokenPooling:
        return cls((0,), 1.0)

    @classmethod
    def example(cls) -> TokenPooling:
        return cls((0, 1), 0.6)

    def idle(self, call: Call) -> bool:
        return self.share == 1.0 or call.layer not in self.layers

    @sums("received")
    def weigh(self, summary: Summary, call: Call) -> None:
        call.state.forward[WEIGHT] = summary.received

    @at(Site.RESIDUAL, merges=True)
    def pool(self, stream: Tensor, call: Call) -> Tensor | Merged:
        fixed = is_fixed(call).expand(len(stream), -1)
        counts = (~fixed).sum(1)
        if bool((counts != counts[0]).any()):
            raise SiteError(f"{self!r}, layer {call.layer}: rows have unlike numbers of patches: {counts.tolist()}")
        patches = (~fixed).nonzero()[:, 1].view(len(stream), -1)
        left = max(1, int(self.share * patches.shape[1]))
        x = stream.gather(1, patches[..., None].expand(-1, -1, stream.shape[-1]))
        points = x if x.dtype == torch.float64 else x.float()
        weight = call.state.forward.pop(WEIGHT).sum(1).to(points.dtype).gather(1, patches)
        into = self.into(points, weight, left)
        group = torch.arange(stream.shape[1], device=stream.device).repeat(len(stream), 1)
        group = group.scatter(1, patches, patches.gather(1, into.clamp(min=0)).where(into >= 0, -1))
        to = numbered(group)
        stands = (group == torch.arange(stream.shape[1], device=stream.device)).to(stream.dtype)
        return Merged(averaged(stream, to, stands), to)

    def into(self, x: Tensor, weight: Tensor, count: int) -> Tensor:
        """The patch that each patch `[b p e]` goes into, `[b p]`."""
        medoid, of = clustered(x, weight, count, self.rounds)
        return medoid.gather(1, of)


def clustered(x: Tensor, weight: Tensor, count: int, steps: int) -> tuple[Tensor, Tensor]:
    """Which of the points `[b p e]` are medoids `[b count]`, begun at the heaviest, and each point's medoid `[b p]`."""
    apart = torch.cdist(x, x)
    medoid = weight.topk(count, 1).indices

    def nearest() -> Tensor:
        rows: Tensor = apart.gather(2, medoid[:, None].expand(-1, x.shape[1], -1))
        return rows.scatter(1, medoid[:, None], -torch.inf).argmin(-1)  # a medoid is its own, whatever lies upon it

    for _ in range(steps):
        mine = torch.nn.functional.one_hot(nearest(), count).mT.to(x.dtype)  # [b count p]
        cost = ((mine * weight[:, None]) @ apart).masked_fill(mine == 0, torch.inf)
        medoid = cost.argmin(-1)
    return medoid, nearest()


if __name__ == "__main__":
    from heedful import attach, models

    with attach(models.vision().model, TokenPooling()) as run:
        print(run.difference(pixel_values=torch.randn(1, 3, 224, 224)))
