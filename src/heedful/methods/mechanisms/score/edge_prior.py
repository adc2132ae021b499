"""p(e_i = j) ~ prior(i - j) exp(s_ij): attention is the mean over a latent edge e_i, and a prior knows of edges."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, NonNegativeFloat, NonNegativeInt, Paper, adds_by_distance
from heedful.kit.running import wide


class EdgePrior(Method):
    """Adds to each score the logarithm of a prior over how far away a token looks; an even prior is softmax."""

    paper = Paper(
        "P108",
        "Attention: Marginal Probability is All You Need?",
        "Ryan Singh, Christopher L. Buckley",
        2023,
        "2304.04556",
        differs=(
            "The paper's full text was not at hand: that attention is a mean over edges, which have a prior, is told "
            "by its abstract and that of the paper that followed it.",
            "Of the priors over edges that the paper speaks of this has those by distance, learned ones and the "
            "geometric one; priors of zero and one are masks, which are rules here.",
            "Distance is counted to either side alike. The model's own scores are the logarithm of the likelihood.",
            "A learned prior is not made to add up to one, which softmax does not see.",
        ),
    )
    subjects = ("text", "encoder-decoder")
    decay: NonNegativeFloat = 0.0  # what the log prior loses with each token of distance; 0: it is even
    # distances with a learned log prior in each head, the last for all beyond; 0: the prior is fixed
    learned: NonNegativeInt = 128

    @classmethod
    def neutral(cls) -> EdgePrior:
        return cls()

    @classmethod
    def example(cls) -> EdgePrior:
        return cls(0.5, 4)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"prior": torch.zeros(layer.heads, self.learned)} if self.learned else {}

    @adds_by_distance
    def lean(self, apart: Tensor, call: Call) -> Tensor:
        """The log prior of these distances `[m]`, `[h|1 m]`."""
        far = apart.abs()
        prior = -self.decay * far.double()[None]
        if not self.learned:
            return prior
        (table,) = wide(call.params["prior"])
        return prior.to(table.dtype) + table[:, far.clamp(max=self.learned - 1)]


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    with attach(model, EdgePrior(0.02, 0)) as run:
        print(run.difference(**tokenizer("Paris is the capital of", return_tensors="pt")))
