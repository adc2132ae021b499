"""q = V^T gelu(sqrt(n) s / |s|), s = K x, and so k and v: projections are attention to n learned keys and values."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu, normalize

from heedful.authoring import Call, Layer, Method, Paper, PositiveFloat, PositiveInt, Site, SiteError, at
from heedful.kit.told import UNKNOWN, of_keys


class TokenFormer(Method):
    """Queries, keys and values by attention to learned tokens in place of linear maps. For models trained with it."""

    paper = Paper(
        "P043",
        "TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters",
        "Haiyang Wang, Yue Fan, Muhammad Ferjad Naeem, Yongqin Xian, Jan Eric Lenssen, Liwei Wang, Federico Tombari, "
        "Bernt Schiele",
        2024,
        "2410.23168",
        "ICLR 2025",
        differs=(
            "Of queries, keys and values alone: the output projection and the feed-forward part stay linear maps, "
            "which the authors look up as well.",
            "All is drawn with one deviation, by a generator seeded by the layer's number; the authors draw values "
            "with a smaller one in deeper models.",
            "The model's own projections of queries, keys and values stay in it, unused; what was looked up is kept "
            "beside the cache that holds their keys and values, which stay those of tokens that were read without it.",
        ),
    )
    subjects = ("text", "image")
    tokens: PositiveInt | None = None  # n, learned keys and values of a map; None: the model's width, as in the paper
    spread: PositiveFloat = 0.02  # standard deviation of keys and values at the start; the authors' code: 0.02 for keys

    @classmethod
    def example(cls) -> TokenFormer:
        return cls(12, 0.5)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        count = layer.width if self.tokens is None else self.tokens
        widths = {
            "query": layer.heads * layer.head_dim,
            "key": layer.kv_heads * layer.head_dim,
            "value": layer.kv_heads * layer.value_dim,
        }
        found = {}
        for part, width in widths.items():
            found[f"{part}_keys"] = self.spread * torch.randn(count, layer.width, generator=random)
            found[f"{part}_values"] = self.spread * torch.randn(count, width, generator=random)
        return found

    def idle(self, call: Call) -> bool:
        return call.cross

    @at(Site.QUERY)
    def ask(self, query: Tensor, call: Call) -> Tensor:
        return _turned(_looked_up("query", query, call), call)

    @at(Site.KEY)
    def offer(self, key: Tensor, call: Call) -> Tensor:
        return _of_all("key", _turned(_looked_up("key", key, call), call), key, call)

    @at(Site.VALUE)
    def tell(self, value: Tensor, call: Call) -> Tensor:
        return _of_all("value", _looked_up("value", value, call), value, call)


def _looked_up(part: str, like: Tensor, call: Call) -> Tensor:
    """What the call's tokens are mapped to, in as many heads, `[b h|g n d]`."""
    if call.hidden is None or call.hidden.shape[:-1].numel() != len(like) * len(call.queries):
        raise SiteError(f"TokenFormer, layer {call.layer}: the layer's input [b n e] is not known, and it maps that")
    keys, values = call.params[f"{part}_keys"], call.params[f"{part}_values"]
    scores = call.hidden.reshape(len(like), len(call.queries), -1).to(keys.dtype) @ keys.mT
    found = gelu(math.sqrt(len(keys)) * normalize(scores, dim=-1)) @ values
    return found.unflatten(-1, (like.shape[1], -1)).transpose(1, 2).to(like.dtype)


def _turned(x: Tensor, call: Call) -> Tensor:
    return x if call.rotate is None else call.rotate(x)


def _of_all(name: str, own: Tensor, cached: Tensor, call: Call) -> Tensor:
    """The same of all tokens that are seen, `[b g k d]`."""
    found = of_keys(call, name, own)
    return found.where(found != UNKNOWN, cached)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, TokenFormer()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
