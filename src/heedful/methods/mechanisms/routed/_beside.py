"""Weights of a token's own beside a layer's projections: what they give is added to what those give."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, Site, SiteError, at
from heedful.kit.told import of_keys

QUERY, KEY, VALUE, HEADS = "query", "key", "value", "heads"  # what something is added to


def sizes(layer: Layer) -> dict[str, tuple[int, int]]:
    """How many numbers of a token each part is made of, and how many it gives."""
    handed = layer.heads * layer.value_dim
    return {
        QUERY: (layer.width, layer.heads * layer.head_dim),
        KEY: (layer.width, layer.kv_heads * layer.head_dim),
        VALUE: (layer.width, layer.kv_heads * layer.value_dim),
        HEADS: (handed, handed),
    }


class Beside(Method, abstract=True):
    """Adds to queries, keys and values what `beside` makes of the layer's input, and to heads what it makes of them.

    What is added to heads goes through the layer's output projection with them. Tokens that a cache took up without
    the method have the layer's own keys and values.
    """

    @abstractmethod
    def beside(self, part: str, x: Tensor, call: Call) -> Tensor:
        """What is added to a part, `[b n out]`, given what it is made of, `[b n in]`."""

    def idle(self, call: Call) -> bool:
        return call.cross

    @at(Site.QUERY)
    def ask(self, query: Tensor, call: Call) -> Tensor:
        return query + self._fresh(QUERY, call.heads, call).to(query.dtype)

    @at(Site.KEY)
    def answer_to(self, key: Tensor, call: Call) -> Tensor:
        return key + self._so_far(KEY, call).to(key.dtype)

    @at(Site.VALUE)
    def hand(self, value: Tensor, call: Call) -> Tensor:
        return value + self._so_far(VALUE, call).to(value.dtype)

    @at(Site.HEAD_OUTPUT)
    def hand_over(self, heads: Tensor, call: Call) -> Tensor:
        return heads + self._by_head(HEADS, heads.transpose(1, 2).flatten(2), heads.shape[1], call).to(heads.dtype)

    def handed(self, call: Call) -> Tensor:
        """The layer's input, `[b n e]`."""
        if call.hidden is None:
            raise SiteError(
                f"{self!r}, layer {call.layer}: weights beside its own want the layer's input, which is not known"
            )
        return call.hidden.flatten(1, -2)

    def _fresh(self, part: str, heads: int, call: Call) -> Tensor:
        """What is added for the call's own tokens, `[b h n d]`, turned as the model turns it."""
        own = self._by_head(part, self.handed(call), heads, call)
        return own if call.rotate is None or part == VALUE else call.rotate(own)

    def _by_head(self, part: str, x: Tensor, heads: int, call: Call) -> Tensor:
        return self.beside(part, x, call).unflatten(-1, (heads, -1)).transpose(1, 2)

    def _so_far(self, part: str, call: Call) -> Tensor:
        found = of_keys(call, part, self._fresh(part, call.kv_heads, call))
        return torch.where(found.isfinite(), found, 0.0)
