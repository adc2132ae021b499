"""g_i head_i, g = [2 a_0 s softmax(x W_s), 2 a_1 k p / sum p], a = softmax(x W_a), p the k best of softmax(x W_r)."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import (
    Call,
    Layer,
    Method,
    NonNegativeFloat,
    NonNegativeInt,
    Paper,
    PositiveInt,
    Site,
    SiteError,
    at,
    penalises,
)


class MixtureOfHeads(Method):
    """Each token chooses some of the heads by a router; a few shared ones are always on."""

    paper = Paper(
        "P030",
        "MoH: Multi-Head Attention as Mixture-of-Head Attention",
        "Peng Jin, Bo Zhu, Li Yuan, Shuicheng Yan",
        2024,
        "2410.11842",
        "ICML 2025",
        differs=(
            "This is the learned router of the paper's section 3, of its ViT, its DiT and its language models trained "
            "from scratch. MoH-LLaMA3-8B, tuned from a trained model, has none: it chooses by the norms of its queries "
            "and leaves the chosen heads unweighted.",
            "As in the authors' code the chosen weights are divided by their sum and multiplied with their number, so "
            "that a gate is 1 on average; the paper's formula has the softmax alone.",
            "The load balance is the mean over text tokens of each layer's call and over all layers of the model, with "
            "the method or without, and is added to the loss outside of training too, wherever labels are given.",
            "Routers begin as torch draws linear layers; the authors' ViT draws normal numbers of deviation 0.02.",
            "A layer with fewer heads than are asked for uses those that it has.",
            "Heads that a token does not choose are computed all the same, as in the authors' code: what is saved is "
            "measured in heads used.",
        ),
    )
    shared: NonNegativeInt = 1  # heads that are always on, the first ones; the paper has 2 of 12 to 16 of 32
    routed: PositiveInt = 2  # heads that each token chooses among the others
    balance: NonNegativeFloat = 0.01  # weight of the load-balance loss, a mean over layers; the paper's default

    @classmethod
    def example(cls) -> MixtureOfHeads:
        return cls(1, 2)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        shared = min(self.shared, layer.heads)
        sizes = {"router": layer.heads - shared, "kinds": 2, "shared": shared}
        bound = layer.width**-0.5
        return {name: torch.empty(layer.width, n).uniform_(-bound, bound) for name, n in sizes.items() if n}

    def _scores(self, name: str, call: Call) -> Tensor:
        if call.hidden is None:
            raise SiteError(f"MixtureOfHeads, layer {call.layer}: the block is not handed hidden states to route by")
        weight = call.params.get(name, call.hidden.new_zeros(call.hidden.shape[-1], 0))
        return (call.hidden.to(weight.dtype) @ weight).softmax(-1)

    def _routes(self, call: Call) -> tuple[Tensor, Tensor]:
        """The router's probabilities `[b n left]`, and which heads are chosen."""
        chances = self._scores("router", call)
        order = chances.detach().argsort(dim=-1, descending=True, stable=True)[..., : self.routed]
        return chances, torch.zeros_like(chances, dtype=torch.bool).scatter(-1, order, True)

    @at(Site.HEAD_OUTPUT)
    def gate(self, heads: Tensor, call: Call) -> Tensor:
        chances, chosen = self._routes(call)
        picked = chances.masked_fill(~chosen, 0.0)
        gates = chosen.sum(-1, keepdim=True) * picked / picked.sum(-1, keepdim=True)
        if self.shared:
            kinds, always = 2 * self._scores("kinds", call), self._scores("shared", call)
            always = always.shape[-1] * always
            gates = torch.cat([kinds[..., :1] * always, kinds[..., 1:] * gates], -1)
        return heads * gates.mT[..., None].to(heads.dtype)  # [b h n 1]

    @penalises(Site.HEAD_OUTPUT, when="balance")
    def unbalance(self, heads: Tensor, call: Call) -> Tensor:
        """How unevenly heads are used: `heads * sum_i P_i f_i`, which is `routed` where all are used alike.

        Of each layer its part of the mean over layers.
        """
        chances, chosen = self._routes(call)
        text = call.is_text[:, 0, :, None].expand(len(chances), -1, 1).to(chances.dtype)
        tokens = text.sum((0, 1)).clamp(min=1)
        mean = (chances * text).sum((0, 1)) / tokens
        share = (chosen * text).sum((0, 1)) / tokens
        return self.balance * chances.shape[-1] * (mean * share).sum() / call.depth


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("Paris is the capital of", return_tensors="pt")
    with attach(model, MixtureOfHeads(2, 5)) as run:
        print(run.difference(**text), run.loss().item())
