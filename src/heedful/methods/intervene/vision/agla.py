"""x + alpha y of tokens that x finds plausible: x of the whole image, y where only what the prompt looks at is seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from heedful.core.kinds.decode import NOTHING_READ, Decode, Read
from heedful.core.kinds.tokens import Prompt, Reader
from heedful.core.method import Stack
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, PositiveShare, Share
from heedful.methods.intervene.vision._against import LITTLE, PROMPT, Against
from heedful.methods.intervene.vision._looks import _Hidden, _Looks, lowest, places_of


class AGLA(Against):
    """Adds what a model says of the image's relevant part to what it says of the whole."""

    paper = Paper(
        "P121",
        "AGLA: Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local "
        "Attention",
        "Wenbin An, Feng Tian, Sicong Leng, Jiahao Nie, Haonan Lin, QianYing Wang, Ping Chen, Xiaoqin Zhang, "
        "Shijian Lu",
        2024,
        "2406.12718",
        "CVPR 2025",
        differs=(
            "What is relevant is told by where the prompt's last token looks, in the mean of heads and layers; the "
            "authors ask a second model that matches images with texts, by its attention times gradients.",
            "The rest is hidden in the language model; the authors blacken pixels, the more the better prompt and "
            "image match.",
        ),
    )
    alpha: NonNegativeFloat = 2.0  # weight of the relevant part; the authors' runs: 2
    beta: Share = 0.5  # tokens are cut off that are less likely than this share of the likeliest; the authors': 0.5
    share: PositiveShare = 0.5  # of the image's tokens that are relevant, rounded up
    hidden: tuple[int, ...] | None = None  # tokens that are not; None: told by each prompt
    within: tuple[int, ...] = ()  # the layers in which they are hidden, as a run numbers them

    @classmethod
    def neutral(cls) -> AGLA:
        return cls(alpha=0.0, beta=0.0)

    def ready(self, prompt: Prompt, read: Reader) -> Decode:
        places = places_of(prompt)
        if self.hidden is not None or self.alpha == 0 or not places:
            return self
        found = cast(dict[int, Tensor], read(prompt, _Looks(len(prompt) - 1, places)))
        score = torch.einsum("ln->n", torch.stack(list(found.values())))
        return replace(self, hidden=lowest(places, score, self.share), within=tuple(sorted(found)))

    def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
        if self.alpha == 0 or not self.hidden:
            return {PROMPT: (prompt, Stack())}
        local = Stack((_Hidden(self.hidden).on(layers=self.within),))
        return {PROMPT: (prompt, Stack()), LITTLE: (prompt, local)}

    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        whole = logits[PROMPT].float()
        if LITTLE not in logits:
            return whole
        return self.plausible(whole + self.alpha * logits[LITTLE].float(), whole)


if __name__ == "__main__":
    from heedful import decode, models

    model = models.tiny("llava", vision_config={"image_size": 16}, image_seq_length=16)
    inputs = models.tiny_inputs(model, length=22)
    prompt = Prompt(tuple(inputs["input_ids"][0].tolist()), {"image": ((1, 17),)})
    for alpha in (0.0, 2.0):
        method = AGLA(alpha, share=0.25)
        print(alpha, decode(model, prompt, method, new_tokens=6, inputs={"pixel_values": inputs["pixel_values"][:1]}))
