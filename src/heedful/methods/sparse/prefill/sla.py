"""Softmax over the blocks whose means suit best, and W times linear attention over the next; the least are skipped."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Mask, Method, Paper, PositiveInt, PositiveShare, Share, Site, at
from heedful.core.mask import Blocks
from heedful.kit.running import divided
from heedful.methods.sparse.prefill._pooled import Pooled, ranks, sees_all


class SLA(Method):
    """Few blocks exactly, most by features and a learned map, which begins at zero. Wants some fine-tuning."""

    paper = Paper(
        "P023",
        "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention",
        "Jintao Zhang, Haoxu Wang, Kai Jiang, Shuo Yang, Kaiwen Zheng, Haocheng Xi, Ziteng Wang, Hongzhou Zhu, "
        "Min Zhao, Ion Stoica, Joseph E. Gonzalez, Jun Zhu, Jianfei Chen",
        2025,
        "2509.24006",
        "ICLR 2026",
        differs=(
            "Linear attention is over the blocks between, as in the paper; the authors' code has it over all blocks, "
            "and a branch of it over all but the exact ones.",
            "Features are a softmax over channels, the best of those that the paper tries; the others are not here.",
            "One block is exact at least, where a share of few blocks would be none.",
            "Where a mask hides anything, as in causal models or of padding, plain attention stays.",
            "The two parts are computed one after the other; the authors' kernel does both at once.",
        ),
    )
    subjects = ("image",)
    exact: PositiveShare = 0.05  # share of blocks that softmax sees; the paper: 5 %
    skipped: Share = 0.1  # share of blocks that are left out; the paper: 10 %
    block: PositiveInt = 64  # tokens of a block; the paper: 64
    start: float = 0.0  # of the map's diagonal before training; the authors' code: 0

    @classmethod
    def neutral(cls) -> SLA:
        return cls(1.0)

    @classmethod
    def example(cls) -> SLA:
        return cls(0.3, 0.3, 4, 0.5)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"map": self.start * torch.eye(layer.value_dim), "bias": torch.zeros(layer.value_dim)}

    def idle(self, call: Call) -> bool:
        return self.exact == 1 or not sees_all(call)

    @at(Site.MASK)
    def skip(self, mask: Mask, call: Call) -> Mask:
        exact, _ = self._kinds(Pooled(call, self.block))
        return mask & Blocks(exact, self.block)

    @at(Site.HEAD_OUTPUT)
    def add_linear(self, heads: Tensor, call: Call) -> Tensor:
        blocks = Pooled(call, self.block)
        _, between = self._kinds(blocks)
        query = blocks.query.softmax(-1)
        key = blocks.key.softmax(-1) * blocks.filled[..., None]
        value = torch.cat([blocks.value, torch.ones_like(blocks.value[..., :1])], -1)
        sums = torch.einsum("bhnm,bhmdc->bhndc", between.to(key.dtype), key.mT @ value)
        linear = blocks.apart(divided(query @ sums))
        whole, bias = (call.params[name].to(linear.dtype) for name in ("map", "bias"))
        return heads + (linear @ whole.mT + bias).to(heads.dtype)

    def _kinds(self, blocks: Pooled) -> tuple[Tensor, Tensor]:
        """Which blocks are exact, and which lie between these and those that are skipped, `[b h m m]`."""
        rank = ranks(blocks.scores)
        many = rank.shape[-1]
        exact = rank < max(1, int(self.exact * many))
        return exact, ~exact & (rank < many - int(self.skipped * many))


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    with attach(model, SLA(0.2, 0.2, block=8)) as run:
        print(run.difference(**inputs))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
