"""A_i <- alpha A_i in the half of a layer's heads that changes most, |A_i(with) - A_i(without the marked span)|."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, RoleName
from heedful.core.sites import Site, at
from heedful.kit.scores import scores_of


class VHR(Method):
    """Scales up the heads that a marked span matters to, chosen anew in each layer and text at the prompt's end.

    The authors act in the second and the last 14 of 32 layers: name yours with `.on(layers=...)`.
    """

    paper = Paper(
        "P054",
        "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
        "Jinghan He, Kuan Zhu, Haiyun Guo, Junfeng Fang, Zhenglin Hua, Yuheng Jia, Ming Tang, Tat-Seng Chua, "
        "Jinqiao Wang",
        2024,
        "2412.13949",
        "ACL 2025",
        differs=(
            "Any marked span stands for the image.",
            "Without the span means that this layer's keys leave it out; other tokens have read it in earlier layers, "
            "while the paper writes of an input without the image.",
            "The divergence is taken on plain softmax attention of the layer's own queries, keys and values, without "
            "sink logits that the model may have learned and without other methods' edits of the map.",
            "The formulas are the paper's as another's account has them; neither its text nor the authors' code was at "
            "hand. Spreads divide by the number of heads.",
        ),
    )
    one_text = True
    causal = False  # the last token of the prompt decides for all of them
    chunk_invariant = False  # a prompt read in pieces has heads chosen at the end of each piece
    role: RoleName = "marked"  # the spans that stand for the image
    alpha: NonNegativeFloat = 2.0  # factor on the chosen heads' outputs; the paper: 2

    @classmethod
    def neutral(cls) -> VHR:
        return cls(alpha=1.0)

    def idle(self, call: Call) -> bool:
        return self.alpha == 1 or call.cross

    @at(Site.HEAD_OUTPUT)
    def reinforce(self, heads: Tensor, call: Call) -> Tensor:
        chosen = call.state.cache.get("chosen") if call.phase is Phase.DECODE else None
        if chosen is None:
            chosen = call.state.cache["chosen"] = self.choose(call)
        return torch.where(chosen[..., None, None], self.alpha * heads, heads)

    def choose(self, call: Call) -> Tensor:
        """The heads above their layer's median divergence, surges without the span left out, `[b h]`."""
        with_span, without = self.last_heads(call)
        divergence, surge = (with_span - without).norm(dim=-1), without.square().sum(-1)
        divergence = divergence.masked_fill(_high(divergence) & _high(surge), 0.0)
        return divergence > divergence.median(-1, keepdim=True).values

    @torch.no_grad()
    def last_heads(self, call: Call) -> tuple[Tensor, Tensor]:
        """What each head makes of a text's last token, with and without the marked keys, both `[b h d]`."""
        if call.query is None or call.key is None or call.value is None:
            raise FieldError("Call", "query", None, "must be there at HEAD_OUTPUT", "a call of the engine's")
        b, h, _, d = call.query.shape
        row = call.last[..., None, None].expand(b, 1, 1, 1)
        score = scores_of(call.query.gather(2, row.expand(b, h, 1, d)), call.key, call, call.last)
        keep = torch.ones_like(score, dtype=torch.bool)
        for i in row.unique().tolist():  # texts end in one row, but for padding on the right
            seen = call.mask.keeps(call.tile(slice(i, i + 1), slice(0, len(call.keys))).pairs)
            if seen is not None:
                keep = torch.where(row == i, seen, keep)
        marked = call.spread(call.marked(self.role))[:, :, None]
        both = torch.stack([keep, keep & ~marked])
        hidden = score.masked_fill(~both, torch.finfo(score.dtype).min)
        weights = hidden.softmax(-1).masked_fill(~both, 0.0)  # a row that may see nothing gets nothing
        found = weights.view(2, b, call.kv_heads, -1, score.shape[-1]).to(call.value.dtype) @ call.value
        one, other = found.view(2, b, h, -1)
        return one, other


def _high(x: Tensor) -> Tensor:
    """Which heads of `[b h]` lie a standard deviation above their layer's mean."""
    return x > x.mean(-1, keepdim=True) + x.std(-1, correction=0, keepdim=True)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = "The code of the apple is red. The code of the stone is blue. So the code of the"
    inputs = tokenizer(text, return_tensors="pt")
    for roles in ({"marked": ((0, 8),)}, {"marked": ((8, 16),)}):
        with torch.no_grad(), attach(model, VHR().on(layers=range(16, 30)), roles=roles) as run:
            top = run(**inputs).logits[0, -1].softmax(-1).topk(3)
        print(roles, [(tokenizer.decode(i), round(float(p), 3)) for p, i in zip(*top, strict=True)])
