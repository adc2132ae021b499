"""c + g O attend(Q c, K [c x], V [c x]), and a feed-forward part behind it: one learned token c reads all patches x."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from heedful.authoring import Call, Layer, Method, Paper, PositiveFloat, Site, at
from heedful.kit.feature_maps import drawn
from heedful.kit.patches import patch_tokens, whole_image

EPS = 1e-6  # of norms; the authors


class LearnedAggregation(Method):
    """Patches are pooled by a learned query in place of a mean. For the last layer of a model trained with it.

    `attach(model, LearnedAggregation().on(layers=11))`: what is pooled stands in the class token's place.
    """

    paper = Paper(
        "P237",
        "Augmenting Convolutional networks with attention-based aggregation",
        "Hugo Touvron, Matthieu Cord, Alaaeldin El-Nouby, Piotr Bojanowski, Armand Joulin, Gabriel Synnaeve, "
        "Hervé Jégou",
        2021,
        "2112.13692",
        differs=(
            "Behind the layers of any vision transformer with a class token, in whose place the result stands; the "
            "authors' are convolutions, without such a token.",
            "One query; the authors also have a model with one for each class.",
            "Keys have no bias: it would add the same to every score, and a softmax does not see that.",
            "Nothing is dropped in training. Maps are drawn as torch.nn.Linear draws them, by a generator seeded by "
            "the layer's number; the authors' have a spread of 0.02, about as much where channels are many.",
        ),
    )
    subjects = ("image",)
    every_token = True
    inner: PositiveFloat = 3.0  # width of the feed-forward part, times that of tokens; the authors: 3
    scale: PositiveFloat = 1e-4  # of what is added, before training; the authors: 1e-4, in deep or wide models 1e-6

    @classmethod
    def example(cls) -> LearnedAggregation:
        return cls(scale=1.0)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e = torch.Generator().manual_seed(layer.number), layer.width
        inner = max(1, round(self.inner * e))
        found = {"token": 0.02 * torch.randn(e, generator=random)}
        for name, rows, columns in (
            ("query", e, e), ("key", e, e), ("value", e, e), ("out", e, e), ("up", inner, e), ("down", e, inner),
        ):  # fmt: skip
            found[name] = drawn(random, rows, columns)
            if name != "key":
                found[f"{name}_bias"] = torch.zeros(rows)
        for name in ("attend", "feed"):
            found |= {f"{name}_norm": torch.ones(e), f"{name}_norm_bias": torch.zeros(e)}
            found[f"{name}_scale"] = torch.full((e,), self.scale)
        return found

    def idle(self, call: Call) -> bool:
        return "cls" not in call.roles or not whole_image(call)

    @at(Site.RESIDUAL)
    def pool(self, stream: Tensor, call: Call) -> Tensor:
        p = {name: x.to(stream) for name, x in call.params.items()}

        def through(name: str, x: Tensor) -> Tensor:
            return linear(x, p[name], p[f"{name}_bias"])

        def normed(name: str, x: Tensor) -> Tensor:
            return layer_norm(x, x.shape[-1:], p[f"{name}_norm"], p[f"{name}_norm_bias"], EPS)

        token = p["token"].expand(len(stream), 1, -1)
        seen = normed("attend", torch.cat([token, stream[:, patch_tokens(self, call)]], 1))
        scores = through("query", seen[:, :1]) @ (seen @ p["key"].mT).mT / math.sqrt(seen.shape[-1])
        token = token + p["attend_scale"] * through("out", scores.softmax(-1) @ through("value", seen))
        token = token + p["feed_scale"] * through("down", gelu(through("up", normed("feed", token))))
        return stream.where(~call.marked_queries("cls")[:, 0, :, None], token)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, LearnedAggregation().on(layers=1)) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
