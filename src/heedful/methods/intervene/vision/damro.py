"""Against an image's outliers alone: the k patches that the encoder's class token looks at most."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.kinds.tokens import Prompt
from heedful.core.method import Stack
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from heedful.kit.picked import PickedPatches, best
from heedful.methods.intervene.vision._against import LITTLE, PROMPT, Against


class _Outliers(PickedPatches):
    """The patches that the class token, the first of all tokens, looks at most in the mean of its heads."""

    count: int = 10

    def choose(self, weights: Tensor, call: Call) -> Tensor:
        return best(torch.einsum("bhk->bk", weights[:, :, 0, self.patches(call)]), self.count)


class DAMRO(Against):
    """Contrasts what a model says with what it says when of the image it sees the encoder's outlier tokens alone."""

    paper = Paper(
        "P039",
        "DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination",
        "Xuan Gong, Tianshi Ming, Xinpeng Wang, Zhihua Wei",
        2024,
        "2410.04514",
        "EMNLP 2024",
        differs=(
            "Tokens that are no outliers are seen by nobody and keep their places; the authors take them out.",
            "Weights are the mean of the layer's heads; the authors' code has one softmax over the channels of all.",
        ),
    )
    alpha: NonNegativeFloat = 2.0  # weight of the contrast; the authors' for LLaVA: 2, for InstructBLIP: 0.5 and 1.5
    count: PositiveInt = 10  # how many outliers are left in the contrast; the authors' for LLaVA-1.5: 10
    # of the encoder, whose class token is asked: LLaVA's last but one, which hands its tokens on
    layer: NonNegativeInt = 22

    @classmethod
    def neutral(cls) -> DAMRO:
        return cls(alpha=0.0)

    def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
        if self.alpha == 0:
            return {PROMPT: (prompt, Stack())}
        return {PROMPT: (prompt, Stack()), LITTLE: (prompt, Stack((_Outliers(layer=self.layer, count=self.count),)))}


if __name__ == "__main__":
    from heedful import decode, models

    model = models.tiny("llava", vision_config={"image_size": 16}, image_seq_length=16)
    inputs = models.tiny_inputs(model, length=22)
    image = ((1, 17),)
    prompt = Prompt(tuple(inputs["input_ids"][0].tolist()), {"patches": image, "image": image})
    for alpha in (0.0, 1.0):
        method = DAMRO(alpha, count=3, layer=1)
        print(alpha, decode(model, prompt, method, new_tokens=6, inputs={"pixel_values": inputs["pixel_values"][:1]}))
