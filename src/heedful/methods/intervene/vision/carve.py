"""c = sum over layers of A_task / (A_general + lambda): the text does not see the image's tokens of low contrast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, cast

import torch
from annotated_types import MinLen
from torch import Tensor

from heedful.core.errors import FieldError
from heedful.core.kinds.decode import NOTHING_READ, Decode, Read
from heedful.core.kinds.tokens import Prompt, Reader
from heedful.core.method import Stack
from heedful.core.paper import Paper
from heedful.core.ranges import Layers, NonNegativeInt, PositiveFloat, PositiveShare
from heedful.methods.intervene.vision._looks import _Hidden, _Looks, lowest, places_of


class CARVE(Decode):
    """Answers from the part of an image at which the question makes a model look more than a general one does.

    The prompt has spans "image" and "question"; `general` are the tokens that ask for nothing in particular.
    """

    paper = Paper(
        "P065",
        "Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning",
        "Yuyao Ge, Shenghua Liu, Yiwei Wang, Lingrui Mei, Baolong Bi, Xuanshan Zhou, Jiayu Yao, Jiafeng Guo, "
        "Xueqi Cheng",
        2025,
        "2509.06461",
        "ECCV 2026",
        differs=(
            "Tokens of the image are hidden in the language model; the authors mask pixels, keep three connected "
            "regions or more, of the highest sums, crop and enlarge them, and their code shows both pictures.",
            "Attention is the last prompt token's, as in the first versions of their code; in its last one that of "
            "every token that is written counts too, and the later ones more.",
            "The later half of the layers is listened to by default; the authors: 20 to 25 of 28 to 40.",
        ),
    )
    # tokens in the place of the question, as of "describe the image"
    general: Annotated[tuple[NonNegativeInt, ...], MinLen(1)] = (0,)
    share: PositiveShare = 0.2  # of the image's tokens that are seen, rounded up; the authors' code: 0.2
    smooth: PositiveFloat = 1e-8  # lambda; the authors' code: 1e-8
    layers: Layers | None = None  # of the language model that are listened to, from 0; None: the later half
    hidden: tuple[int, ...] | None = None  # tokens that are hidden; None: told by each prompt
    within: tuple[int, ...] = ()  # the layers in which they are, as a run numbers them

    @classmethod
    def neutral(cls) -> CARVE:
        return cls(share=1.0)

    def ready(self, prompt: Prompt, read: Reader) -> Decode:
        places = places_of(prompt)
        if self.hidden is not None or self.share == 1 or not places:
            return self
        asked = places_of(prompt, "question")
        if not asked:
            raise FieldError(self, "question", (), "must name tokens of the prompt", {"question": ((17, 22),)})
        others = tuple(place for place in range(len(prompt)) if place not in asked)
        other = prompt.only(others).inserted(asked[0], Prompt(self.general))
        task, general = (
            cast(dict[int, Tensor], read(shown, _Looks(len(shown) - 1, places_of(shown)))) for shown in (prompt, other)
        )
        if self.layers is not None and max(self.layers) >= len(task):
            rule = f"must be numbers of the language model's {len(task)} layers, from 0 up"
            raise FieldError(self, "layers", self.layers, rule, (len(task) - 1,))
        score = self.contrast(*(torch.stack(list(found.values())) for found in (task, general)))
        return replace(self, hidden=lowest(places, score, self.share), within=tuple(sorted(task)))

    def contrast(self, task: Tensor, general: Tensor) -> Tensor:
        """How much more each token is looked at for the task `[n]`, by what it is given in all layers `[layers n]`."""
        chosen = list(range(len(task) // 2, len(task))) if self.layers is None else list(self.layers)
        return (task[chosen] / (general[chosen] + self.smooth)).sum(0)

    def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
        acts = Stack((_Hidden(self.hidden).on(layers=self.within),)) if self.hidden else Stack()
        return {"prompt": (prompt, acts)}

    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        return logits["prompt"]


if __name__ == "__main__":
    from heedful import decode, models

    model = models.tiny("llava", vision_config={"image_size": 16}, image_seq_length=16)
    inputs = models.tiny_inputs(model, length=22)
    prompt = Prompt(tuple(inputs["input_ids"][0].tolist()), {"image": ((1, 17),), "question": ((17, 22),)})
    for share in (1.0, 0.25):
        method = CARVE((7, 8), share)
        print(share, decode(model, prompt, method, new_tokens=6, inputs={"pixel_values": inputs["pixel_values"][:1]}))
