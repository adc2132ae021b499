"""Linear attention with weights (1 + 1/z) s - z/n: s = phi(q).phi(k) scale / n, z their sum; rows sum to one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.mask import Padding
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, at


def features(x: Tensor) -> Tensor:
    """ELU + 1, without losing what lies far below zero to rounding."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def text_keys(call: Call, total: int) -> Tensor:
    """Which keys are text and not padding or an empty cache slot, `[b|1, g|1, k]`."""
    row = replace(call, heads=call.kv_heads).tile(slice(0, 1), slice(0, total))
    found = torch.ones_like(row.keys.index, dtype=torch.bool) if row.keys.is_filled is None else row.keys.is_filled
    for rule in call.mask.rules:
        if isinstance(rule, Padding):
            found = found & rule.keeps(row.pairs)[..., 0, :]
    return found


class MALA(Method):
    """Magnitude-aware linear attention: longer queries look more sharply. For models trained with it."""

    paper = Paper(
        "P017",
        "Rectifying Magnitude Neglect in Linear Attention",
        "Qihang Fan, Huaibo Huang, Yuang Ai, Ran He",
        2025,
        "2507.00698",
        "ICCV 2025",
        differs=(
            "The similarity holds the authors' code's factor scale / n, which their formula lacks; it matters, because "
            "the weights depend on the similarity's size.",
            "Causal models sum over the keys so far, n being their number; the authors' model sees all tokens.",
            "Queries and keys come with the model's rotary embedding in them; the authors rotate after the features, "
            "and leave the rotation out of z, so that their rows do not quite sum to one. Here weights depend on "
            "places, not on distances alone: texts padded on the left need position_ids, as `generate` gives them.",
            "The authors' depthwise convolution of the values and gate of the output are not part of it.",
        ),
    )
    chunk: int = 64  # query rows a step; speed and memory only

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise FieldError(self, "chunk", self.chunk, "must be 1 or more rows", 64)

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in qkv)
        b, h, n, d = q.shape
        g, total = k.shape[1], k.shape[2]
        text = text_keys(call, total)[..., None].to(q.dtype)
        q = features(q).reshape(b, g, h // g, n, d) * call.scale
        # a 1 beside each value sums phi(k) as well, and masked keys weigh nothing in any sum
        values = torch.cat([v, torch.ones_like(v[..., :1])], -1) * text
        phi = features(k) * text
        past = total if not call.mask.causal else _past(call, n, total)
        product = phi[:, :, :past].mT @ values[:, :, :past]  # [b g d dv+1]
        plain = values[:, :, :past].sum(2)  # [b g dv+1]
        out = []
        for start in range(0, n, self.chunk):
            rows = q[:, :, :, start : start + self.chunk]
            mixed, mean = rows @ product[:, :, None], plain[:, :, None, None]
            if call.mask.causal:
                here = slice(past + start, past + start + rows.shape[3])
                near, beside = phi[:, :, here], values[:, :, here]
                mixed = mixed + (rows @ near[:, :, None].mT).tril() @ beside[:, :, None]
                mean = mean + beside.cumsum(2)[:, :, None]
                product, plain = product + near.mT @ beside, plain + beside.sum(2)
            out.append(_rectified(mixed, mean))
        return torch.cat(out, 3).reshape(b, h, n, v.shape[-1])


def _past(call: Call, n: int, total: int) -> int:
    """How many key columns stand before the first query; a cache may hold empty columns after the last one."""
    if call.queries.first is None or call.keys.first is None:
        return total - n
    return call.queries.first - call.keys.first


def _rectified(mixed: Tensor, mean: Tensor) -> Tensor:
    """(1 + 1/z) sum s v - z mean v, from sums over keys whose last column holds what ones in place of v give."""
    (top, s), (v, n) = (torch.split(x, [x.shape[-1] - 1, 1], -1) for x in (mixed, mean))
    s, n = torch.where(s > 0, s, 1.0), torch.where(n > 0, n, 1.0)  # rows without a key have zeros everywhere else
    return top / s + (top - s * v / n) / n


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    with attach(model, MALA()) as run:
        print(run(**models.tiny_inputs(model)).logits.std(), run.activity())
