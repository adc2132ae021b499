"""x_p + size * N(0, 1): the corruption without meaning that swapped words and pictures are to replace."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, NonNegativeInt, RoleName
from heedful.core.regions import by_text, marked
from heedful.core.sites import Site, at


class TokenNoise(Method):
    """Gaussian noise on the tokens of a span as they enter a layer, which hides from a model what they say.

    `heedful.explaining.patching` takes it as what the corrupt run is `under`. It is there to be compared: a pair of
    prompts or pictures that differ in one thing is the corruption that the paper proposes, and `patching` takes it as
    it is. In a model that reads pictures `.on(layers=...)` says before which layer: the language model's first, say.
    """

    paper = Paper(
        "P209",
        "What Do VLMs NOTICE? A Mechanistic Interpretability Pipeline for Noise-free Text-Image Corruption and "
        "Evaluation",
        "Michal Golovanevsky, William Rudman, Vedant Palit, Ritambhara Singh, Carsten Eickhoff",
        2024,
        "2406.16320",
        "NAACL 2025",
        differs=(
            "The paper's own corruptions, a word replaced or a picture replaced by one that differs in one thing, need "
            "no method: both inputs are given to patching. This is the noise that they are to replace.",
            "Noise is that of a position and a seed, the same in all texts, so that a run can be repeated; average "
            "over seeds.",
            "Which heads segment, or inhibit things or outliers, is not told.",
        ),
    )
    one_text = True
    size: NonNegativeFloat = 1.0  # standard deviation; causal tracing takes three times that of the model's embeddings
    role: RoleName = "marked"  # the span that is hidden
    seed: NonNegativeInt = 0

    @classmethod
    def neutral(cls) -> TokenNoise:
        return cls(size=0.0)

    @classmethod
    def example(cls) -> TokenNoise:
        return cls(size=10.0)

    def idle(self, call: Call) -> bool:
        return self.size == 0

    @at(Site.EMBEDDING)
    def hide(self, x: Tensor, call: Call) -> Tensor:
        position = call.q_pos[:, 0]  # [b|1 n]
        there = by_text(marked, call.regions(self.role), position)
        position, there = torch.broadcast_tensors(position, there)
        noise = torch.zeros(*there.shape, x.shape[-1], dtype=x.dtype, device=x.device)
        for place in position[there].unique().tolist():
            by = torch.Generator().manual_seed(1_000_003 * self.seed + place)  # a token's own, however a text is cut
            noise[there & (position == place)] = torch.randn(x.shape[-1], generator=by).to(x)
        return x + self.size * noise


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    inputs = tokenizer("When Mary and John went to the store, John gave a pen to", return_tensors="pt")
    for size in (0.1, 0.3, 1.0):
        with attach(model, TokenNoise(size=size), roles={"marked": ((9, 10),)}) as run:
            print(size, run.difference(**inputs))
