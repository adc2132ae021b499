"""A = softmax((W_q l_i) (W_k l_j) / sqrt d), l a token's layout, computed once; every layer gives A V."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from heedful.authoring import Call, FieldError, Layer, Method, Paper, PositiveInt, RoleName, Site, SiteError, at
from heedful.kit.feature_maps import drawn
from heedful.kit.running import wide
from heedful.kit.seen import softmax_over


class SkimAttention(Method):
    """Where a token stands on the page says what it looks at, the same in all layers; for models trained with it.

    The page is a role with a grid, whose tokens fill it row by row: an image's patches, or a document's words.
    """

    paper = Paper(
        "P093",
        "Skim-Attention: Learning to Focus via Document Layout",
        "Laura Nguyen, Thomas Scialom, Jacopo Staiano, Benjamin Piwowarski",
        2021,
        "2109.01078",
        "EMNLP 2021",
        differs=(
            "A token stands in a cell of a grid, told by its row and column; the authors have boxes, told by four "
            "edges, height and width, or, where their code is asked for less, by the middle.",
            "The authors' variant that has places look at one another first, and SkimmingMask, which hides from a "
            "trained model what layout gives little weight, are not here.",
            "Queries and keys have no bias, and are drawn as torch.nn.Linear draws its weight, tables as "
            "torch.nn.Embedding does; the authors have biases, and draw all with a deviation of 0.02.",
            "What positions the model itself adds to its words stay; the authors' text has none.",
            "Tokens outside of the page, as a class token, have a layout of their own.",
        ),
    )
    subjects = ("image",)
    size: PositiveInt = 64  # rows and columns that can be told; the authors: 1024 places
    page: RoleName = "patches"  # the role whose grid is the layout

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        if layer.number:
            return {}
        random = torch.Generator().manual_seed(0)
        tables = {name: torch.randn(self.size + 1, layer.width, generator=random) for name in ("row", "column")}
        flat = layer.heads * layer.head_dim
        maps = {name: drawn(random, flat, layer.width).unflatten(0, (layer.heads, -1)) for name in ("query", "key")}
        norm = {"gain": torch.ones(layer.width), "bias": torch.zeros(layer.width)}
        return tables | maps | norm

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        (v,) = wide(call.spread(qkv[2]))
        if call.cross or call.lowest:
            rule = "one map serves the layers in which the page sees itself, from layer 0 on; leave others out"
            raise SiteError(f"{self!r}, layer {call.layer}: {rule}")
        kept = call.state.forward
        if "map" not in kept:
            if call.layer:
                raise SiteError(f"{self!r}, layer {call.layer}: the map is made in layer 0, which is left out")
            kept["map"] = self._map(call)
        return kept["map"].to(v.dtype) @ v

    def _map(self, call: Call) -> Tensor:
        """The weights of all layers, `[b|1 h n k]`."""
        asking, giving = (self._layout(place, call) for place in call.coordinates(self.page))
        q = torch.einsum("bne,hde->bhnd", asking, call.params["query"])
        k = torch.einsum("bne,hde->bhnd", giving, call.params["key"])
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        seen = call.mask.keeps(call.tile(slice(0, q.shape[2]), slice(0, k.shape[2])).pairs)
        return softmax_over(scores, seen)

    def _layout(self, place: Tensor, call: Call) -> Tensor:
        """What stands for the places `[b|1 g|1 n 2]`, `[b|1 n e]`."""
        number = place[:, 0] + 1
        if number.shape[-1] != 2:
            rule = f"must name tokens in rows and columns, and {self.page!r} has {number.shape[-1]} axes"
            raise FieldError(self, "page", self.page, rule, "patches")
        if int(number.max()) > self.size:
            rule = f"must be at least {int(number.max())}, as many rows or columns as {self.page!r} has"
            raise FieldError(self, "size", self.size, rule, int(number.max()))
        both = call.params["row"][number[..., 0]] + call.params["column"][number[..., 1]]
        return layer_norm(both, both.shape[-1:], call.params["gain"], call.params["bias"])


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    with attach(model, SkimAttention()) as run:
        print(run.difference(**inputs))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
