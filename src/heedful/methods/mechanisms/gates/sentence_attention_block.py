"""x e softmax(W relu(norm(V s))), s the mean of a question's words: its gate on the e channels that patches hand on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from heedful.authoring import Call, Layer, Method, Paper, Phase, PositiveInt, RoleName, Site, at
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
        "ICCV 2023",
        differs=(
            "The net is that of the authors' code. Its shares are multiplied by the number of channels, so that a gate "
            "that prefers none leaves patches as they are; the authors' maps go on so many times smaller.",
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
    widening: PositiveInt = 4  # how many times wider than the sentence the inner layer is; the authors: 4
    sentence: RoleName = "sentence"  # the role of the question's words
    patches: RoleName = "patches"  # the role of what is gated

    @classmethod
    def example(cls) -> SentenceAttentionBlock:
        return cls(2, "marked")

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e = torch.Generator().manual_seed(layer.number), layer.width
        inner = self.widening * e
        norm = {"norm": torch.ones(inner), "norm_bias": torch.zeros(inner)}
        return with_bias(random, "in", inner, e) | norm | with_bias(random, "out", e, inner)

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE or call.cross

    @at(Site.RESIDUAL)
    def gate(self, stream: Tensor, call: Call) -> Tensor:
        p = {name: x.to(stream) for name, x in call.params.items()}
        words, patches = (call.marked_queries(role)[:, 0, :, None] for role in (self.sentence, self.patches))
        inner = linear(_mean(stream, self.told(words, patches)), p["in"], p["in_bias"])
        inner = layer_norm(inner, inner.shape[-1:], p["norm"], p["norm_bias"]).relu()
        gate = stream.shape[-1] * linear(inner, p["out"], p["out_bias"]).softmax(-1)[:, None]
        return torch.where(patches, stream * gate, stream)

    def told(self, words: Tensor, patches: Tensor) -> Tensor:
        """The tokens, `[b|1 n 1]`, whose mean the gate is told."""
        return words


def _mean(stream: Tensor, of: Tensor) -> Tensor:
    """The mean `[b e]` of the tokens `[b|1 n 1]`; zeros where there are none."""
    counts = of.sum(1).clamp(min=1)
    return (stream * of).sum(1) / counts


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    with attach(model, SentenceAttentionBlock(), roles={"sentence": ((0, 1),)}) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
