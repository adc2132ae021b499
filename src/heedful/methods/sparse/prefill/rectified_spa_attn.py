"""Heads of the kept blocks times the pooled weight they stand for, plus pooled weights times means of the others."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from heedful.authoring import Call, Mask, Method, Paper, PositiveInt, Share, ShareBelowOne, Site, at
from heedful.core.mask import Blocks
from heedful.methods.sparse.prefill._pooled import Pooled, ranks, sees_all


class RectifiedSpaAttn(Method):
    """Block-sparse attention whose rows keep the weight that full attention would leave outside; no training."""

    paper = Paper(
        "P028",
        "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation",
        "Xuewen Liu, Zhikai Li, Jing Zhang, Mengjuan Chen, Qingyi Gu",
        2025,
        "2511.19835",
        differs=(
            "Blocks are of tokens in the order in which the model has them, where the authors lay video along a curve "
            "that keeps neighbours together; nearby blocks and those of the first frame are not always kept.",
            "Every layer and every step of denoising is thinned out; the authors leave the first two layers whole, "
            "which `.on(layers=...)` does, and with some models the first steps.",
            "All tokens are pooled alike; where text stands beside video the authors keep its blocks apart and exact.",
            "Means of a last, shorter block are of the tokens that it has; the authors fill it with zeros.",
            "Where a mask hides anything, as in causal models or of padding, plain attention stays.",
        ),
    )
    subjects = ("image",)
    forbids: ClassVar[dict[str, str]] = {
        "MASK": "what is skipped is stood in for by means of whole blocks, with the keys that another method hides"
    }
    least: Share = 0.25  # share of blocks that are kept at least; the authors' code for Wan 2.1: 25 %
    mass: ShareBelowOne = 0.3  # pooled weight that kept blocks come to at least; the authors' code for Wan 2.1: 0.3
    block: PositiveInt = 128  # tokens of a block; the authors' code: 128

    @classmethod
    def neutral(cls) -> RectifiedSpaAttn:
        return cls(1.0)

    @classmethod
    def example(cls) -> RectifiedSpaAttn:
        return cls(0.2, 0.2, 4)

    def idle(self, call: Call) -> bool:
        return self.least == 1 or not sees_all(call)

    @at(Site.MASK)
    def skip(self, mask: Mask, call: Call) -> Mask:
        return mask & Blocks(self._kept(Pooled(call, self.block).scores.softmax(-1)), self.block)

    @at(Site.HEAD_OUTPUT)
    def rectify(self, heads: Tensor, call: Call) -> Tensor:
        blocks = Pooled(call, self.block)
        weights = blocks.scores.softmax(-1)
        pooled = weights.masked_fill(self._kept(weights) | ~_pays(blocks), 0.0)
        rest = 1 - pooled.sum(-1, keepdim=True)  # what kept blocks stand for
        return (blocks.rows(rest) * heads + blocks.rows(pooled @ blocks.mean(blocks.value))).to(heads.dtype)

    def _kept(self, weights: Tensor) -> Tensor:
        """The fewest best blocks that come to more than `mass`, and no fewer than `least`, `[b h m m]`."""
        within = (weights.sort(-1, descending=True).values.cumsum(-1) <= self.mass).sum(-1, keepdim=True)
        return ranks(weights) < (within + 1).clamp(min=int(self.least * weights.shape[-1]))


def _pays(blocks: Pooled) -> Tensor:
    """Where the score of the means is above what pooling queries and keys may have moved it by, `[b h m m]`."""
    query, key = blocks.mean(blocks.query), blocks.mean(blocks.key)
    query_off = blocks.mean((blocks.query - query[..., None, :]).abs())
    key_off = blocks.mean((blocks.key - key[..., None, :]).abs())
    error = (query_off @ key.mT).abs() + (query @ key_off.mT).abs()
    return (query @ key.mT).abs() > error


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    for least in (0.2, 0.5, 1.0):
        with attach(model, RectifiedSpaAttn(least, block=8)) as run:
            print(least, run.difference(**inputs))
