"""Each second token goes into the other it is most like, max_j cos(k_i, k_j); one of size s attends as s: + log s."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call, Merged
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt
from heedful.core.sites import Site, adds, at
from heedful.kit.merging import MergesTokens, averaged, is_fixed, numbered

KEYS = "keys"


class ToMe(MergesTokens):
    """Merges in each layer of an encoder the tokens whose keys are most alike, so that later layers have fewer."""

    paper = Paper(
        "2210.09461",
        "Token Merging: Your ViT But Faster",
        "Daniel Bolya, Cheng-Yang Fu, Xiaoliang Dai, Peizhao Zhang, Christoph Feichtenhofer, Judy Hoffman",
        2022,
        "2210.09461",
        "ICLR 2023",
        differs=(
            "Tokens are merged behind a layer's feed-forward part; the authors merge before it, so that it has fewer.",
            "Tokens keep the order of the first that each is made of; the authors put odd ones behind even ones "
            "that are left, so that later layers pair others.",
            "None are merged behind the last layer, after which nothing is saved.",
            "Behind the last layer each token is there again, as the one that it went into.",
        ),
    )
    count: NonNegativeInt = 8  # tokens that a layer loses, half of them at most; the authors' r, 8 to 16 of 197

    @classmethod
    def neutral(cls) -> ToMe:
        return cls(0)

    @classmethod
    def example(cls) -> ToMe:
        return cls(3)

    def idle(self, call: Call) -> bool:
        return self.count == 0

    @adds
    def weigh(self, call: Call) -> Tensor | None:
        call.state.forward[KEYS] = call.key
        return None if call.sizes is None else call.sizes.clamp(min=1).double().log()[:, None, None, call.cols]

    @at(Site.RESIDUAL, merges=True)
    def merge(self, stream: Tensor, call: Call) -> Tensor | Merged:
        keys, n = call.state.forward.pop(KEYS), stream.shape[1]
        if n < 2 or call.ends_list:
            return stream
        fixed = is_fixed(call).expand(len(stream), -1)
        alike = self.alike(keys).masked_fill(fixed[:, ::2, None] | fixed[:, None, 1::2], -torch.inf)
        best, other = alike.max(-1)
        order = best.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        most = (~fixed).sum(-1, keepdim=True) // 2
        moves = (order < most.clamp(max=self.count)) & (best > -torch.inf)
        if not bool(moves.any()):
            return stream
        group = torch.arange(n, device=stream.device).repeat(len(stream), 1)
        group[:, ::2] = torch.where(moves, 2 * other + 1, group[:, ::2])
        to = numbered(group)
        sizes = torch.ones_like(stream[..., 0]) if call.sizes is None else call.sizes.to(stream.dtype)
        return Merged(averaged(stream, to, sizes), to)

    def alike(self, keys: Tensor) -> Tensor:
        """How near each even token is to each odd one, `[b n/2 n/2]`."""
        mean = torch.nn.functional.normalize(keys.mean(1), dim=-1)
        return mean[:, ::2] @ mean[:, 1::2].mT


if __name__ == "__main__":
    from heedful import attach, models

    with attach(models.vision().model, ToMe(16)) as run:
        print(run.difference(pixel_values=torch.randn(1, 3, 224, 224)))
