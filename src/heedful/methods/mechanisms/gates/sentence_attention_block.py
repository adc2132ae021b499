"""x sigmoid(W relu(V [mean of words; mean of patches])): a question's gate on the channels of what patches hand on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from heedful.authoring import Call, FieldError, Layer, Method, Paper, Phase, Site, at
from heedful.kit.feature_maps import with_bias


class SentenceAttentionBlock(Method):
    """Leaves patches the channels that a question wants of their image. For training models that read both.

    Attach it with a role that names the question's words, `{"sentence": ((65, 70),)}`.
    """

    paper = Paper(
        "P132",
        "Sentence Attention Blocks for Answer Grounding",
        "Seyedalireza Khoshsirat, Chandra Kambhamettu",
        2023,
        "2309.11593",
        "ICCV Workshops 2023",
        differs=(
            "Written from the abstract, from notes and from the authors' code of a later block, whose gate is a "
            "softmax of a net on the sentence alone: that this one is squeeze-and-excitation which is also told the "
            "sentence, with one inner layer as wide as there, is our reading.",
            "The sentence is the mean of its words where they leave the same layer, since both are in one stream; the "
            "authors' is that of an encoder of sentences, the same for all layers of a net that sees no words.",
            "What patches hand on to the next layer is gated; the authors gate what a decoder of masks is shown.",
            "Patches that are read in another call than the words are gated as if there were no words.",
            "Weights are drawn as torch.nn.Linear draws them, by a generator seeded by the layer's number.",
        ),
    )
    one_text = True
    subjects = ("image", "text")
    causal = False
    chunk_invariant = False
    reduction: int = 16  # how many times narrower than the channels the inner layer is; squeeze-and-excitation: 16
    sentence: str = "sentence"  # the role of the question's words
    patches: str = "patches"  # the role of what is gated

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise FieldError(self, "reduction", self.reduction, "must be 1 or more", 16)
        for name in ("sentence", "patches"):
            if not getattr(self, name):
                raise FieldError(self, name, getattr(self, name), "must name a role", name)

    @classmethod
    def example(cls) -> SentenceAttentionBlock:
        return cls(4, "marked")

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e = torch.Generator().manual_seed(layer.number), layer.width
        inner = max(1, e // self.reduction)
        return with_bias(random, "in", inner, 2 * e) | with_bias(random, "out", e, inner)

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE or call.cross

    @at(Site.RESIDUAL)
    def gate(self, stream: Tensor, call: Call) -> Tensor:
        p = {name: x.to(stream) for name, x in call.params.items()}
        words, patches = (call.marked_queries(role)[:, 0, :, None] for role in (self.sentence, self.patches))
        told = self.told(_mean(stream, words), _mean(stream, patches))
        inner = linear(told, p["in"], p["in_bias"]).relu()
        gate = linear(inner, p["out"], p["out_bias"]).sigmoid()[:, None]
        return torch.where(patches, stream * gate, stream)

    def told(self, sentence: Tensor, image: Tensor) -> Tensor:
        """What the gate knows of each text, `[b 2e]`."""
        return torch.cat([sentence, image], -1)


def _mean(stream: Tensor, of: Tensor) -> Tensor:
    """The mean `[b e]` of the tokens `[b|1 n 1]`; zeros where there are none."""
    counts = of.sum(1).clamp(min=1)
    return (stream * of).sum(1) / counts


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    with attach(model, SentenceAttentionBlock(4), roles={"sentence": ((0, 1),)}) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
