"""Expert i is h / (h - 1) times all heads but head i; mixed by g = softmax(MLP(x)), head j is h (1 - g_j) / (h - 1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, one_hot

from heedful.authoring import Call, Layer, Method, Paper, PositiveInt, Site, SiteError, at
from heedful.kit.feature_maps import with_bias


class MixtureOfAttentiveExperts(Method):
    """Each token chooses, softly, which head to do without. For models trained with it.

    In most forwards of training each token draws one expert, by its gate, which then stands still; in the others the
    mixture is trained, and the gate with it. Outside training there is the mixture. A layer of one head stays as it is.
    """

    paper = Paper(
        "P179",
        "A Mixture of h-1 Heads is Better than h Heads",
        "Hao Peng, Roy Schwartz, Dianqi Li, Noah A. Smith",
        2020,
        "2005.06537",
        "ACL 2020",
        differs=(
            "Only the abstract, the introduction and notes of readers could be read: the gate here is a net of one "
            "layer of tanh on the token that asks, and its width and how often it is trained are guesses.",
            "In forwards that train the gate the rest of the model learns too, from the mixture, since no method keeps "
            "an optimiser from it; the authors hold it. In all others the gate gets no gradient, as theirs.",
            "Experts are drawn token by token by a generator seeded by `seed`, the forward's number and the layer's.",
            "Weights are drawn as torch.nn.Linear draws them, by a generator seeded by the layer's number.",
        ),
    )
    units: PositiveInt = 64  # of the gate's hidden layer
    every: PositiveInt = 5  # in training one forward of so many trains the gate; 1: all of them, and nothing is drawn
    seed: int = 0  # of what is drawn

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        if layer.heads < 2:
            return {}
        random = torch.Generator().manual_seed(layer.number)
        return with_bias(random, "in", self.units, layer.width) | with_bias(random, "out", layer.heads, self.units)

    def idle(self, call: Call) -> bool:
        return call.heads < 2

    def gate(self, call: Call) -> Tensor:
        """How much each expert is worth to each token, `[b n h]`; the shares add up to one."""
        if call.hidden is None:
            raise SiteError(f"{self!r}, layer {call.layer}: the block is not handed hidden states to choose experts by")
        p = call.params
        x = linear(call.hidden.flatten(1, -2).to(p["in"].dtype), p["in"], p["in_bias"]).tanh()
        return linear(x, p["out"], p["out_bias"]).softmax(-1)

    @at(Site.HEAD_OUTPUT)
    def mix(self, heads: Tensor, call: Call) -> Tensor:
        gate, count = self.gate(call), heads.shape[1]
        if call.training and call.forward % self.every:
            gate = self._drawn(gate, call)
        shares = count / (count - 1) * (1 - gate)
        return heads * shares.mT[..., None].to(heads.dtype)  # [b h n 1]

    def _drawn(self, gate: Tensor, call: Call) -> Tensor:
        """One expert a token, with its share as its chance: 1 for that one and 0 for all others, without gradient."""
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + 1009 * call.forward + call.layer)
        chance = torch.rand((*gate.shape[:-1], 1), generator=draw).to(gate)
        expert = (gate.cumsum(-1)[..., :-1] <= chance).sum(-1)
        return one_hot(expert, gate.shape[-1]).to(gate)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama").train()
    inputs = models.tiny_inputs(model)
    with attach(model, MixtureOfAttentiveExperts(every=2)) as run:
        for _ in range(4):
            loss = run(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            print(loss.item())
