"""Some heads tell how tokens relate: sum_j a_ij (W_r r_ij + W_s s_j), r_ij products of two tokens, s_j a symbol."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from heedful.authoring import Call, Layer, Method, Paper, PositiveInt, Site, SiteError, at
from heedful.core.flags import both, lowered, zeroed
from heedful.kit.running import wide
from heedful.kit.told import of_keys

ROWS = 256  # queries whose weights are held at once


class DualAttention(Method):
    """Sensory heads, which are the model's own, and relational ones. For models trained with it."""

    paper = Paper(
        "P073",
        "Disentangling and Integrating Relational and Sensory Information in Transformer Architectures",
        "Awni Altabaa, John Lafferty",
        2025,
        "2405.16727",
        "ICML 2025",
        differs=(
            "The relational heads are the layer's last, look by the model's own queries and keys, and hand over to its "
            "own output projection, which mixes both kinds; the authors have one for each.",
            "Symbols are told by symbolic attention of one head, from a library of each layer's own; the authors' "
            "layers share one unless told otherwise. Their symbols by position, and activations of relations other "
            "than none, are not part of it.",
            "Relations of a head are added up before they are products: sum_j a_ij <q_i, k_j> = <q_i, sum_j a_ij k_j>.",
            "Tokens that a cache took up without it are not seen, by any head.",
            "Weights are drawn by a generator seeded by the layer's number, from the authors' distributions.",
        ),
    )
    subjects = ("text", "image")
    heads: PositiveInt = 2  # relational ones of a layer; of fewer heads all are
    relations: PositiveInt = 2  # products that tell of two tokens; the authors: as many as relational heads
    symbols: PositiveInt = 16  # of the library

    @classmethod
    def example(cls) -> DualAttention:
        return cls(2, 3, 5)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e, n, d = torch.Generator().manual_seed(layer.number), layer.width, self.relations, layer.value_dim
        heads = min(self.heads, layer.heads)
        channels = n * max(1, layer.head_dim * heads // n)

        def even(*shape: int, fan: int = e) -> Tensor:
            return (torch.rand(shape, generator=random) * 2 - 1) / math.sqrt(fan)

        return {
            "asked": even(e, e), "asked_bias": even(e),
            "templates": torch.randn(self.symbols, e, generator=random),
            "library": torch.randn(self.symbols, e, generator=random),
            "symbol": even(heads * d, e), "from": even(channels, e), "to": even(channels, e),
            "relation": even(heads, d, n, fan=d * n),
        }  # fmt: skip

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        if call.hidden is None:
            raise SiteError(f"{self!r}, layer {call.layer}: relations are of the layer's input, and none is handed")
        if call.keys.index.shape[1] > 1:
            raise SiteError(f"{self!r}, layer {call.layer}: heads hold unlike tokens; keep the cache whole")
        q, k, v = wide(*qkv)
        p = {name: w.to(q.dtype) for name, w in call.params.items()}
        x = call.hidden.flatten(1, -2).to(q.dtype)
        count, n = p["relation"].shape[0], self.relations
        asked = linear(x, p["asked"], p["asked_bias"]) @ p["templates"].mT / math.sqrt(x.shape[-1])
        symbols = linear(asked.softmax(-1) @ p["library"], p["symbol"])
        told = of_keys(call, "tokens", torch.cat([linear(x, p["to"]), symbols], -1)[:, None])[:, 0]  # [b k .]
        known = told.isfinite().all(-1)[:, None, None]  # [b 1 1 k]
        told = told.where(told.isfinite(), 0.0)
        to, symbols = told.split([len(p["to"]), len(p["symbol"])], -1)
        symbols = symbols.unflatten(-1, (count, -1)).transpose(1, 2)  # [b c k d]
        asking = linear(x, p["from"]).unflatten(-1, (n, -1))  # [b q n .]
        asking = asking / math.sqrt(asking.shape[-1])
        k, v, out = call.spread(k), call.spread(v)[:, : call.heads - count], []
        for start in range(0, q.shape[2], ROWS):
            rows = slice(start, min(start + ROWS, q.shape[2]))
            ranges = call.mask.columns(call.queries.take(rows), call.keys, rows)
            cols = slice(0, ranges[-1][1] if ranges else 1)
            keep = call.mask.keeps(call.tile(rows, cols).pairs)
            keep = known[..., cols] if keep is None else both(keep, known[..., cols])
            scores = q[:, :, rows] * call.scale @ k[:, :, cols].mT
            weights = zeroed(lowered(scores, keep, into=True).softmax(-1), keep)
            sensory, relational = weights.split([call.heads - count, count], 1)
            products = (relational @ to[:, None, cols]).unflatten(-1, (n, -1)) * asking[:, None, rows]  # [b c r n .]
            related = products.sum(-1) @ p["relation"].mT + relational @ symbols[:, :, cols]
            out.append(torch.cat([sensory @ v[:, :, cols], related], 1))
        return torch.cat(out, 2)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    with attach(model, DualAttention()) as run:
        print(run(**models.tiny_inputs(model)).logits.std(), run.activity())
