"""One softmax over the keys of a query's own block and one key for each block before it, whose value is a mean."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, Paper, PositiveInt, Site, SiteError, at
from heedful.kit.feature_maps import drawn
from heedful.kit.running import text_keys, wide
from heedful.kit.seen import softmax_over
from heedful.kit.told import of_keys


class Combiner(Method):
    """Every token is seen, those of past blocks by way of their block. For models trained with it."""

    paper = Paper(
        "P202",
        "Combiner: Full Attention Transformer with Sparse Computation Cost",
        "Hongyu Ren, Hanjun Dai, Zihang Dai, Mengjiao Yang, Jure Leskovec, Dale Schuurmans, Bo Dai",
        2021,
        "2107.05768",
        "NeurIPS 2021",
        differs=(
            "Of the paper's patterns it has the fixed one, with summaries by a small net and the highest of each "
            "channel (`deepset-max` in the authors' code, whose settings for language have the highest without a net); "
            "the axial and the logarithmic ones are not part of it.",
            "Blocks are counted from where each text begins, and the last may be shorter.",
            "Queries of past tokens, which their block's mean needs, are kept with the cache; those of tokens that a "
            "cache took up without it are left out of the summary.",
            "Nets are drawn as torch.nn.Linear draws them, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("text", "image")
    every_token = True
    # tokens of a block; the square root of a text's length costs least; the authors: 128 of 2048
    block: PositiveInt = 64

    @classmethod
    def example(cls) -> Combiner:
        return cls(4)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, d = torch.Generator().manual_seed(layer.number), layer.head_dim
        return {name: drawn(random, d, d) for name in ("query", "key")}

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        if call.keys.first != 0:
            raise SiteError(f"{self!r}, layer {call.layer}: blocks need all tokens of a text; keep the cache whole")
        q, k, v = wide(*qkv)
        total, s = k.shape[2], self.block
        asked = of_keys(call, "queries", q * call.scale)  # [b h k d]
        text = text_keys(call, total)
        text = torch.ones(1, 1, total, dtype=torch.bool) if text is None else text
        # by place in the text, in blocks: what stands at index pad is place 0
        pad = (call.keys.index - call.keys.position)[..., :1]
        blocks = -(-total // s)
        where = (torch.arange(blocks * s, device=q.device) + pad).expand(len(q), 1, -1)
        inside = where < total
        where = where.clamp(max=total - 1)
        there = (text.to(q.device).expand(len(q), -1, -1).gather(2, where) & inside).view(len(q), 1, blocks, s)

        def laid(x: Tensor) -> Tensor:
            """`[b h k d]` in blocks `[b h m s d]`."""
            index = where[..., None].expand(-1, x.shape[1], -1, x.shape[3])
            return x.gather(2, index).unflatten(2, (blocks, s))

        asked, key, value = laid(asked), laid(call.spread(k)), laid(call.spread(v))
        known = there & asked.isfinite().all(-1)
        asked = asked.where(known[..., None], 0.0)
        span_key = self._pooled("key", key, there, call)  # [b h m d]
        lead = self._pooled("query", asked, known, call)[..., None, :]
        span_value = (softmax_over(lead @ key.mT, there[..., None, :]) @ value)[..., 0, :]
        first = int(call.q_pos.where(call.is_text, total).min().clamp(max=total - 1)) // s  # block of this call's first
        own = asked[:, :, first:]
        near, far = own @ key[:, :, first:].mT, own @ span_key[:, :, None].mT  # [b h m' s s], [b h m' s m]
        sees, past = there[:, :, first:, None, :], there.any(-1)[:, :, None, None, :]
        if call.mask.causal:
            sees = sees & torch.ones(s, s, dtype=torch.bool, device=q.device).tril()
            number = torch.arange(blocks, device=q.device)
            past = past & (number < number[first:, None])[:, None]
        keep = torch.cat([sees.expand(-1, -1, -1, s, -1), past.expand(-1, -1, near.shape[2], s, -1)], -1)
        close, apart = softmax_over(torch.cat([near, far], -1), keep).split([s, blocks], -1)
        out = (close @ value[:, :, first:] + apart @ span_value[:, :, None]).flatten(2, 3)
        row = (call.q_pos - first * s).clamp(min=0).expand(len(q), out.shape[1], -1)
        return out.gather(2, row[..., None].expand(-1, -1, -1, out.shape[-1])) * call.is_text[..., None]

    def _pooled(self, name: str, x: Tensor, there: Tensor, call: Call) -> Tensor:
        """The highest of each channel over a block's tokens, behind a small net, `[b h m d]`."""
        return (x @ call.params[name].to(x.dtype).mT).relu().masked_fill(~there[..., None], 0.0).amax(-2)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    with attach(model, Combiner(4)) as run:
        print(run(**models.tiny_inputs(model)).logits.std(), run.activity())
