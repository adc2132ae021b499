"""q_i = q * (1 + e_i), or q + e_i, and so for k and v: one projection for all heads, and an embedding for each head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, NonNegativeFloat, Paper, Site, SiteError, at

WAYS = ("product", "sum")


class MHE(Method):
    """Heads share the projections of the first and are told apart by learned embeddings; for models trained with it."""

    paper = Paper(
        "P187",
        "Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient Multi-head Attention",
        "Huiyin Xue, Nikolaos Aletras",
        2023,
        "2310.07911",
        "Findings of EMNLP 2023",
        differs=(
            "The paper's full text was not at hand: that heads come of one projection by an embedding that is added "
            "(MHE-ADD) or multiplied with (MHE-MUL), of which there are 3 n d numbers, is told by its abstract and "
            "others' summaries. That a product is with one plus the embedding, and how embeddings are drawn at first, "
            "could not be checked.",
            "The projections of the first head stand for the shared ones; those of the others stay in the model, "
            "unused, and a cache goes on holding them.",
            "Embeddings act behind a rotary embedding, where there is one; the authors' models have none.",
            "With fewer key heads than query heads there are as many embeddings of keys and values as key heads.",
        ),
    )
    subjects = ("text", "image")
    # "product" is the paper's MHE-MUL, "sum" its MHE-ADD, whose keys a softmax cannot tell apart
    by: Literal["product", "sum"] = "product"
    spread: NonNegativeFloat = 0.02  # standard deviation of embeddings at the start; as BERT's

    @classmethod
    def example(cls) -> MHE:
        return cls(spread=0.5)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        sizes = {
            "query": (layer.heads, layer.head_dim),
            "key": (layer.kv_heads, layer.head_dim),
            "value": (layer.kv_heads, layer.value_dim),
        }
        return {name: self.spread * torch.randn(size, generator=random) for name, size in sizes.items()}

    @at(Site.QUERY)
    def ask(self, query: Tensor, call: Call) -> Tensor:
        return self._of_the_first(query, call.params["query"])

    @at(Site.KEY)
    def offer(self, key: Tensor, call: Call) -> Tensor:
        return self._of_the_first(_alike(key, call), call.params["key"])

    @at(Site.VALUE)
    def tell(self, value: Tensor, call: Call) -> Tensor:
        return self._of_the_first(_alike(value, call), call.params["value"])

    def _of_the_first(self, x: Tensor, embedding: Tensor) -> Tensor:
        first, own = x[:, :1], embedding[:, None].to(x.dtype)
        return first * (1 + own) if self.by == "product" else first + own


def _alike(x: Tensor, call: Call) -> Tensor:
    """Keys or values, if all heads hold those of the same tokens."""
    if call.keys.index.shape[1] > 1:
        raise SiteError(
            f"MHE, layer {call.layer}: heads share one key a token and hold unlike tokens; keep the cache whole"
        )
    return x


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, MHE()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
