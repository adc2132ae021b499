"""Each weight is sigmoid(score - log n) by itself; rows are not normalised."""

from __future__ import annotations

import math

from heedful.core.call import Call
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt
from heedful.core.weighing import Weighing, weighs


class SigmoidAttention(Method):
    """Sigmoid instead of softmax: keys do not compete, and a head may look at nothing. For models trained with it."""

    paper = Paper(
        "P313",
        "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
        "Jason Ramapuram, Federico Danieli, Eeshan Dhekane, Floris Weers, Dan Busbridge, Pierre Ablin, "
        "Tatiana Likhomanenko, Jagrit Digani, Zijin Gu, Amitis Shidani, Russ Webb",
        2024,
        "2409.04431",
        "ICLR 2025",
        differs=(
            "Only the weights are replaced: the authors' normalised queries and keys, LayerScale and hybrid norm are "
            "the model's business.",
            "A position bias that the model adds to its scores stays; the authors drop -log n where they use ALiBi.",
        ),
    )
    length: PositiveInt = 2048  # tokens of a training sequence, n in the bias -log n; the authors' text model: 2048

    @classmethod
    def example(cls) -> SigmoidAttention:
        return cls(length=32)

    @weighs
    def squash(self, call: Call) -> Weighing:
        # one constant for every row, even for the first rows of a causal map, which see few keys
        return Weighing("sigmoid", -math.log(self.length))


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    with attach(model, SigmoidAttention(12)) as run:
        print(run(**models.tiny_inputs(model)).logits.std(), run.activity())
