"""Sharper attention for embeddings: softmax(scores / tau) in every layer, with tau below 1."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Layer
from heedful.core.kinds.weights import HeadWeights
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveFloat
from heedful.core.sites import Site, at


class TempScale(Method):
    """Divides all scores by one temperature: attention averages less, and embeddings of long texts stay apart."""

    paper = Paper(
        "P086",
        "Length-Induced Embedding Collapse in Transformer-based Models",
        "Yuqi Zhou, Sunhao Dai, Zhanshuo Cao, Xiao Zhang, Jun Xu",
        2024,
        "2410.24200",
        "ACL 2025",
        differs=(
            "The paper searches tau for each model and task and the authors' code starts at 1; here it starts at 0.9, "
            "from the middle of their range.",
            "Sink logits that a model has learned are no scores of keys and are not divided.",
        ),
    )
    tau: PositiveFloat = 0.9  # no unit; the paper searches 0.8 to 0.95 or so, 1 changes nothing

    @classmethod
    def neutral(cls) -> TempScale:
        return cls(tau=1.0)

    @classmethod
    def example(cls) -> TempScale:
        return cls(tau=0.5)

    def idle(self, call: Call) -> bool:
        return self.tau == 1

    @at(Site.SCORES)
    def sharpen(self, scores: Tensor, call: Call) -> Tensor:
        return scores / self.tau

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        if self.tau == 1:
            return weights
        bias = None if weights.q_bias is None else weights.q_bias / self.tau
        return replace(weights, q=weights.q / self.tau, q_bias=bias)


if __name__ == "__main__":
    import torch

    from heedful import attach, models

    model, tokenizer, _ = models.encoder()
    topics = ("The river rises in the hills and", "The bank raises its rates, and", "A cake rises in the oven, and")
    texts = [tokenizer(topic + " so the day goes on as before" * 30, return_tensors="pt") for topic in topics]
    for tau in (1.0, 0.9, 0.8):
        with torch.no_grad(), attach(model, TempScale(tau)) as run:
            found = torch.cat([run(**text).last_hidden_state.mean(1) for text in texts])
        near = torch.nn.functional.cosine_similarity(found, found.roll(1, 0))
        print(f"tau {tau}: cosines {near.tolist()}")
