"""W x + c sum_e g_e B_e A_e x for queries, keys, values and heads, where g is the few best of softmax(x R)."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, FieldError, Layer, NonNegativeFloat, Paper, PositiveInt, Site, penalises
from heedful.kit.feature_maps import drawn
from heedful.methods.mechanisms.routed._beside import Beside, sizes


class LoRAMixer(Beside):
    """Each token has a few of several low-rank experts beside the layer's own projections, as a router tells.

    Freeze the model and train what this adds; or put in experts that were trained apart, and train the router alone.
    """

    paper = Paper(
        "P044",
        "LoRA-Mixer: Coordinate Modular LoRA Experts Through Serial Attention Routing",
        "Wenbing Li, Zikai Song, Hang Zhou, Junqing Yu, Yunyao Zhang, Wei Yang",
        2026,
        "2507.00029",
        "ICLR 2026",
        differs=(
            "Written from the abstract, which speaks of hard and soft routing to the best experts and of a loss for "
            "balance and specialisation by entropies, and from what readers quote of the paper.",
            "A token's gates are the best experts' shares, and gradients reach the router as if they were all shares; "
            "by readers' account the authors mix all experts in training, and the best ones only afterwards.",
            "The loss is less what an expert tells of a token, in nats: the mean entropy of a token's shares less the "
            "entropy of their mean. As quoted, the authors' is a balance, the sum over experts of mean share times "
            "mean gate, less the mean entropy, each with a factor; their words, and ours, have entropy made small. It "
            "is added outside of training too, wherever labels are given.",
            "Experts of the output projection map the heads before it. In state-space models, which the authors serve "
            "too, there are no queries to add to.",
        ),
    )
    experts: PositiveInt = 4
    rank: PositiveInt = 8  # of an expert
    best: PositiveInt = 2  # experts that a token has
    scale: NonNegativeFloat = 2.0  # factor on what experts add
    weight: NonNegativeFloat = 0.01  # of the loss for balance and specialisation
    spread: NonNegativeFloat = 0.0  # standard deviation of B at the start; as in LoRA: 0

    def __post_init__(self) -> None:
        if self.best > self.experts:
            raise FieldError(self, "best", self.best, f"must be no more than {self.experts} experts", self.experts)

    @classmethod
    def example(cls) -> LoRAMixer:
        return cls(4, 2, 2, spread=0.1)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        found = {"router": drawn(random, self.experts, layer.width)}
        for part, (takes, gives) in sizes(layer).items():
            found[f"{part}_down"] = drawn(random, self.experts * self.rank, takes).unflatten(0, (-1, self.rank))
            found[f"{part}_up"] = self.spread * torch.randn(self.experts, gives, self.rank, generator=random)
        return found

    def beside(self, part: str, x: Tensor, call: Call) -> Tensor:
        down, up = call.params[f"{part}_down"], call.params[f"{part}_up"]
        inner = torch.einsum("bni,eri->bner", x.to(down.dtype), down) * self._gates(call)[..., None]
        return self.scale * torch.einsum("bner,eor->bno", inner, up)

    @penalises(Site.HEAD_OUTPUT, when="weight")
    def untold(self, heads: Tensor, call: Call) -> Tensor:
        """How little experts tell of the tokens of text that have them."""
        shares = self._shares(call)[call.is_text[:, 0].expand(len(heads), -1)]  # [tokens experts]
        return self.weight * (_entropy(shares).mean() - _entropy(shares.mean(0)))

    def _shares(self, call: Call) -> Tensor:
        router = call.params["router"]
        return (self.handed(call).to(router.dtype) @ router.mT).softmax(-1)

    def _gates(self, call: Call) -> Tensor:
        """What each token has of each expert, `[b n experts]`."""
        shares = self._shares(call)
        order = shares.detach().argsort(dim=-1, descending=True, stable=True)[..., : self.best]
        chosen = shares * torch.zeros_like(shares).scatter(-1, order, 1.0)
        hard = chosen / chosen.sum(-1, keepdim=True)
        return shares + (hard - shares).detach()


def _entropy(shares: Tensor) -> Tensor:
    return torch.special.entr(shares).sum(-1)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, LoRAMixer()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()}, run.loss().item())
