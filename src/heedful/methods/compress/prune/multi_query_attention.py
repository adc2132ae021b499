"""head_i = softmax(q_i k^T / sqrt(d)) v: one k and one v for all query heads, so that a cache is h times smaller."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from heedful.core.entry import Layer
from heedful.core.kinds.weights import HeadWeights, Surgery
from heedful.core.paper import Paper


class MultiQueryAttention(Surgery):
    """Leaves one key head and one value head, which all query heads share; for models that are trained afterwards.

    form "first": the first head's. Done to an untrained model, what is trained then is the paper's.
    form "mean": the mean of all heads, as a trained model goes on best by Ainslie et al. (2305.13245).
    """

    paper = Paper(
        "P233",
        "Fast Transformer Decoding: One Write-Head is All You Need",
        "Noam Shazeer",
        2019,
        "1911.02150",
        differs=(
            "The paper has no surgery: its models are built with one key and one value head, and trained so. That is "
            "the form 'first' on an untrained model; trained ones are converted by Ainslie et al., and trained on.",
            "The feed-forward part stays as wide as it is; the paper widens it until as many parameters are there.",
            "Where query heads share key heads already, in groups, these become one.",
        ),
    )
    form: Literal["first", "mean"] = "first"  # what becomes the one key head and value head: "first" or "mean"

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        if weights.kv_heads == 1:
            return weights

        def one(x: Tensor) -> Tensor:
            return x[:1] if self.form == "first" else x.mean(0, keepdim=True)

        k_bias, v_bias = (None if x is None else one(x) for x in (weights.k_bias, weights.v_bias))
        return replace(weights, k=one(weights.k), v=one(weights.v), k_bias=k_bias, v_bias=v_bias)


if __name__ == "__main__":
    from heedful import models, operate

    model = models.tiny("mha")
    inputs = models.tiny_inputs(model)
    for form in ("first", "mean"):
        small = operate(model, MultiQueryAttention(form))
        print(form, small.num_parameters(), small(**inputs).past_key_values.layers[0].keys.shape)
