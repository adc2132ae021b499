"""In training some heads give nothing: in each forward others, drawn or those with the largest |dL/dgate|."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from heedful.authoring import Call, Method, Paper, Share, Site, at

Gates = dict[int, Tensor]  # one leaf `[h]` a layer, all of one forward


class HeadMask(Method):
    """Keeps a model from leaning on a few heads: the others must learn too. Outside training it does nothing."""

    paper = Paper(
        "P163",
        "Alleviating the Inequality of Attention Heads for Neural Machine Translation",
        "Zewei Sun, Shujian Huang, Xinyu Dai, Jiajun Chen",
        2022,
        "2009.09672",
        "COLING 2022",
        differs=(
            "Only the paper's abstract and introduction could be read; that 18 heads of a model's are masked is told "
            "by the names of its results, and that importance is the size of the gate's gradient is Michel et al.'s.",
            "Importance is that of the forward before, whose backward pass gives it for nothing; the first forward "
            "masks none by it. A masked head's is that of its shut gate.",
            "Heads are drawn by a generator seeded by `seed` and the number of the run's forward, and a layer's own "
            "number where it stands alone.",
            "A backward pass whose checkpoints are reentrant tells no importance, so nothing is masked by it there.",
        ),
    )
    share: Share = 0.125  # of all heads of the served layers together; the paper: 18 of 144
    by: Literal["random", "importance"] = "random"  # which are masked: "random", or those of most "importance"
    seed: int = 0  # of what is drawn

    @classmethod
    def neutral(cls) -> HeadMask:
        return cls(0.0)

    @classmethod
    def example(cls) -> HeadMask:
        return cls(0.5)

    def idle(self, call: Call) -> bool:
        return not call.training or self.share == 0

    @at(Site.HEAD_OUTPUT)
    def mask(self, heads: Tensor, call: Call) -> Tensor:
        gate = self._by_importance(call) if self.by == "importance" else self._drawn(call)
        return heads * gate.to(heads)[:, None, None]

    def _drawn(self, call: Call) -> Tensor:
        """Which heads of the layer stay, `[h]`: all layers draw the same for all, and each takes its own."""
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + call.forward)
        return self._open(torch.rand(call.depth * call.heads, generator=draw)).view(call.depth, -1)[call.layer]

    def _open(self, rank: Tensor) -> Tensor:
        """All but the share of the heads that rank highest, as numbers."""
        shut = rank.argsort(descending=True, stable=True)[: round(self.share * len(rank))]
        return torch.ones_like(rank).index_fill(0, shut, 0.0)

    def _by_importance(self, call: Call) -> Tensor:
        """The same by the gradients of the last forward's gates; leaves gates whose gradients this forward's will be.

        What a checkpoint computes again finds the last forward's as it did first, and leaves none: gradients reach
        those that it left then.
        """
        last: Gates = call.state.run.get("gates", {})
        gates: Gates = call.state.forward.setdefault("gates", {})
        call.state.run["gates"] = gates
        gate = torch.ones(call.heads)
        known = {layer: x.grad.abs() for layer, x in sorted(last.items()) if x.grad is not None}
        if call.layer in known:
            stay = self._open(torch.cat(list(known.values()))).split([len(x) for x in known.values()])
            gate = stay[list(known).index(call.layer)].clone()
        gates.setdefault(call.layer, gate.requires_grad_())
        return gate


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama").train()
    inputs = models.tiny_inputs(model)
    with attach(model, HeadMask(0.25, "importance")) as run:
        for _ in range(3):
            loss = run(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            print(loss.item())
