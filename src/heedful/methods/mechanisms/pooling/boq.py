"""x_i = encode_i(x_(i-1)), o_i = attend(q_i + attend(q_i, q_i), x_i), W [o_1 .. o_L]: bags of learned queries pool."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, Paper, PositiveInt, Site, at
from heedful.kit.feature_maps import with_bias
from heedful.kit.patches import patch_tokens, whole_image
from heedful.methods.mechanisms.pooling._attending import Weights, attended, attending, norm, normed, through


class BoQ(Method):
    """Patches pooled by bags of learned queries, into a descriptor that tells places apart. For the last layer alone.

    `attach(model, BoQ().on(layers=11))`: what is pooled stands in the class token's place, for models trained with it.
    """

    paper = Paper(
        "P263",
        "BoQ: A Place is Worth a Bag of Learnable Queries",
        "Amar Ali-bey, Brahim Chaib-draa, Philippe Giguère",
        2024,
        "2405.07364",
        "CVPR 2024",
        differs=(
            "One row of the last map, so that the descriptor is as wide as a token and stands in the class token's "
            "place, before the model's last norm; the authors have 32 rows or so, and divide by the length at the end.",
            "As wide as the model: their convolution to fewer channels is left out.",
            "There are as many heads as the model has; the authors have one for every 64 channels, which is the same "
            "in most models.",
            "Queries are normal and other weights drawn as torch.nn.Linear draws them, by a generator seeded by the "
            "layer's number.",
        ),
    )
    subjects = ("image",)
    every_token = True
    queries: PositiveInt = 64  # in each bag; the paper: 64
    blocks: PositiveInt = 2  # L, each with a bag; the paper: 2

    @classmethod
    def example(cls) -> BoQ:
        return cls(3, 1)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e = torch.Generator().manual_seed(layer.number), layer.width
        found = norm("norm", e)
        for i in range(self.blocks):
            found[f"queries_{i}"] = torch.randn(self.queries, e, generator=random)
            for name in ("patches", "among", "across"):  # attention of patches, of queries, of these to those
                found |= attending(random, f"{name}_{i}", e)
            found |= with_bias(random, f"up_{i}", 4 * e, e) | with_bias(random, f"down_{i}", e, 4 * e)
            for name in ("seen", "fed", "asked", "found"):
                found |= norm(f"{name}_{i}", e)
        return found | with_bias(random, "rows", 1, self.blocks * self.queries)

    def idle(self, call: Call) -> bool:
        return "cls" not in call.roles or not whole_image(call)

    @at(Site.RESIDUAL)
    def pool(self, stream: Tensor, call: Call) -> Tensor:
        p = {name: x.to(stream) for name, x in call.params.items()}
        x, found = normed(p, "norm", stream[:, patch_tokens(self, call)]), []
        for i in range(self.blocks):
            x = normed(p, f"seen_{i}", x + attended(p, f"patches_{i}", x, x, call.heads))
            x = normed(p, f"fed_{i}", x + through(p, f"down_{i}", through(p, f"up_{i}", x).relu()))
            found.append(self._asked(p, i, x, call.heads))
        pooled = through(p, "rows", torch.cat(found, 1).mT).mT  # [b 1 e]
        return stream.where(~call.marked_queries("cls")[:, 0, :, None], pooled)

    def _asked(self, p: Weights, i: int, x: Tensor, heads: int) -> Tensor:
        """What a bag's queries find among patches `[b n e]`, `[b queries e]`."""
        bag = p[f"queries_{i}"].expand(len(x), -1, -1)
        bag = normed(p, f"asked_{i}", bag + attended(p, f"among_{i}", bag, bag, heads))
        return normed(p, f"found_{i}", attended(p, f"across_{i}", bag, x, heads))


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, BoQ(3).on(layers=1)) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
