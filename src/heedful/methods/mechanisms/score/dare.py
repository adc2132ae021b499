"""Scores a_i a_j / sqrt(w), with a token's a looked up in a small table of attention's own, and v as it was."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

from heedful.authoring import Call, FieldError, Layer, Method, NonNegativeFloat, Paper, PositiveInt, Site, at
from heedful.core.positions import Positions
from heedful.kit.told import at_places, token_ids


class DARE(Method):
    """What a token counts for is learned apart from what it hands over. For models of items, in the first layer."""

    paper = Paper(
        "P049",
        "Long-Sequence Recommendation Models Need Decoupled Embeddings",
        "Ningya Feng, Junwei Pan, Jialong Wu, Baixu Chen, Ximei Wang, Qian Li, Xian Hu, Jie Jiang, Mingsheng Long",
        2025,
        "2410.02604",
        "ICLR 2025",
        differs=(
            "The authors' scores have a second part for how long ago something was, and items have categories with "
            "embeddings too; here a token is its number, and places are not told.",
            "The values are the layer's own, of the model's one table; the authors multiply what comes of them with "
            "the target. There is no search for the best scores before the softmax.",
            "A table for each key head; the authors have one head.",
        ),
    )
    vocabulary: PositiveInt = 32_000  # tokens that there are
    width: PositiveInt = 8  # numbers a token and head; no more than a head is wide
    spread: NonNegativeFloat = 1.0  # standard deviation of the table at the start; torch's own: 1

    @classmethod
    def example(cls) -> DARE:
        return cls(256, 4)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        if self.width > layer.head_dim:
            raise FieldError(self, "width", self.width, "must be no more than a head is wide", layer.head_dim)
        random = torch.Generator().manual_seed(layer.number)
        return {"table": self.spread * torch.randn(layer.kv_heads, self.vocabulary, self.width, generator=random)}

    def idle(self, call: Call) -> bool:
        return call.cross

    @at(Site.QUERY)
    def ask(self, query: Tensor, call: Call) -> Tensor:
        even = 1 / (call.scale * math.sqrt(self.width))  # scores are scaled by the width of the table
        return even * call.spread(self._looked_up(query, call, call.queries))

    @at(Site.KEY)
    def offer(self, key: Tensor, call: Call) -> Tensor:
        return self._looked_up(key, call, call.keys)

    def _looked_up(self, like: Tensor, call: Call, places: Positions) -> Tensor:
        """The table's rows of these tokens `[b g n d]`, with zeros behind them."""
        ids = token_ids(call)
        if int(ids.max()) >= self.vocabulary:
            raise FieldError(self, "vocabulary", self.vocabulary, "must be more than any token", int(ids.max()) + 1)
        tables = call.params["table"]
        by_head = at_places(ids, places).expand(-1, len(tables), -1).unbind(1)
        rows = torch.stack([embedding(ids, table) for ids, table in zip(by_head, tables, strict=True)], 1)
        return pad(rows, (0, like.shape[-1] - self.width)).to(like.dtype)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, DARE(model.config.vocab_size).on(layers=0)) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()}, run.activity())
