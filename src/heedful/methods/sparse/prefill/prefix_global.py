"""i sees j where |i - j| <= r, i < k or j < k: the first k tokens see all and are seen by all, others have a window."""

from __future__ import annotations

from heedful.core.call import Call
from heedful.core.mask import Ahead, First, FirstQueries, Mask, Window
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt
from heedful.core.sites import Site, at
from heedful.kit.budget import all_fit


class PrefixGlobal(Method):
    """What matters most is put first and is global; pairs grow with the length of the rest. For encoders.

    A causal model keeps its mask, so that the first tokens see no more than before: there it is sinks and a window.
    """

    paper = Paper(
        "P151",
        "A Suite of Generative Tasks for Multi-Level Multimodal Webpage Understanding",
        "Andrea Burns, Krishna Srinivasan, Joshua Ainslie, Geoff Brown, Bryan A. Plummer, Kate Saenko, Jianmo Ni, "
        "Mandy Guo",
        2023,
        "2305.03668",
        "EMNLP 2023",
        differs=(
            "Any model may have it, with text or images in front; the authors' is the encoder of T5, whose prefix they "
            "fill by the structure of web pages.",
            "The mask alone; the data set and its tasks are not here.",
        ),
    )
    prefix: NonNegativeInt = 512  # k, tokens that are global; the paper: 512
    radius: NonNegativeInt = 127  # r, tokens that the others see to either side; the paper: 127

    @classmethod
    def neutral(cls) -> PrefixGlobal:
        return cls(radius=1 << 30)

    @classmethod
    def example(cls) -> PrefixGlobal:
        return cls(2, 3)

    def declares(self, tokens: int) -> dict[str, float]:
        most = self.prefix + self.radius + 1
        return {"density": sum(min(i + 1, most) for i in range(tokens)) / tokens**2}

    def rests(self, tokens: int) -> str | None:
        return all_fit(self.prefix + self.radius + 1, tokens, f"prefix={tokens // 4}, radius={tokens // 4}")

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        near = Window(self.radius + 1) & Ahead(self.radius + 1)
        return mask & (near | First(self.prefix) | FirstQueries(self.prefix))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.encoder()
    text = tokenizer("The sun rises in the east and sets in the west. " * 10, return_tensors="pt")
    with attach(model, PrefixGlobal(8, 16)) as run:
        print(run.difference(**text))
        print(run.activity())
