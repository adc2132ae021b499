"""(W + D) x for tokens of an image, W x for all others; causal among texts, and both ways within an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from heedful.authoring import Call, Causal, Layer, Mask, NonNegativeFloat, Paper, RoleName, Rule, Site, at
from heedful.core.positions import Pairs
from heedful.core.regions import Region, by_text, span_of
from heedful.methods.mechanisms.routed._beside import Beside, sizes


@dataclass(frozen=True)
class _SameImage(Rule):
    """Pairs of tokens of one image."""

    images: tuple[Region, ...]  # a span for each

    def keeps(self, pairs: Pairs) -> Tensor:
        q, k = (by_text(span_of, self.images, place) for place in (pairs.q, pairs.k))
        return (q == k) & (q >= 0)


class LlamaFusion(Beside):
    """Tokens of images have projections of their own, beside a text model's that stay as they are.

    A run names the images, `roles={"image": spans}`, a span for each. Freeze the model and train what this adds.
    """

    paper = Paper(
        "P329",
        "LlamaFusion: Adapting Pretrained Language Models for Multimodal Generation",
        "Weijia Shi, Xiaochuang Han, Chunting Zhou, Weixin Liang, Xi Victoria Lin, Luke Zettlemoyer, Lili Yu",
        2024,
        "2412.15188",
        differs=(
            "The attention part: image tokens' own norms and feed-forward parts, and how images become tokens and are "
            "denoised, are left out.",
            "What images add to the text's weights is learned, from zero, which is the authors' start from a copy of "
            "them; for the output projection it is a map of the heads before it.",
            "A bias is the text's, and where a model norms queries and keys, what is added comes after the norm.",
        ),
    )
    one_text = True
    causal = False  # an image is seen both ways
    chunk_invariant = False  # by what of it is there
    role: RoleName = "image"  # names the tokens of images
    spread: NonNegativeFloat = 0.0  # standard deviation of what images add to the weights, at the start; the authors: 0

    @classmethod
    def example(cls) -> LlamaFusion:
        return cls(spread=0.1)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        shapes = {part: (gives, takes) for part, (takes, gives) in sizes(layer).items()}
        return {part: self.spread * torch.randn(shape, generator=random) for part, shape in shapes.items()}

    def idle(self, call: Call) -> bool:
        return super().idle(call) or self.role not in call.roles

    @at(Site.MASK)
    def open(self, mask: Mask, call: Call) -> Mask:
        if not mask.causal:
            return mask
        rest = (rule for rule in mask.rules if not isinstance(rule, Causal))
        return Mask((*rest, Causal() | _SameImage(call.regions(self.role))))

    def beside(self, part: str, x: Tensor, call: Call) -> Tensor:
        return linear(x.to(call.params[part].dtype), call.params[part]) * call.marked_queries(self.role)[:, 0, :, None]


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, LlamaFusion(), roles={"image": ((2, 6),)}) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()}, run.activity())
