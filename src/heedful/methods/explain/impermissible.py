"""-weight log(1 - sum of a query's attention on the tokens that it must not be seen to use), beside the loss."""

from __future__ import annotations

from torch import Tensor

from heedful.core.call import Call
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, RoleName
from heedful.core.sites import Site, penalises

TINY = 1e-6  # of a mass of 1, whose logarithm would be infinite


class Impermissible(Method):
    """Trains a model to hide, from whoever looks at its attention, that it uses some tokens; a test of explanations.

    Attach it with roles that name the tokens, and train on labels: the penalty joins the model's loss. Attention falls
    on other tokens. Where the model uses those all the same, an explanation that is worth something still finds them.
    """

    paper = Paper(
        "P081",
        "Learning to Deceive with Attention-Based Explanations",
        "Danish Pruthi, Mansi Gupta, Bhuwan Dhingra, Graham Neubig, Zachary C. Lipton",
        2020,
        "1909.07913",
        "ACL 2020",
        differs=(
            "The mean over heads is taken of the penalty, which the paper writes; its variant with the worst head is "
            "not here.",
            "The mean is taken over the queries named by `asking`, all tokens of the text by default, and the "
            "penalties of all layers add up. The paper looks at the one query that its classifier reads, and the "
            "authors' code at the last layer alone: `.on(layers=...)`.",
            "The paper's transformers are kept from passing on what impermissible tokens hold in lower layers.",
        ),
    )
    whole_map = True
    weight: NonNegativeFloat = 1.0  # lambda; the paper: 0.1 and 1
    role: RoleName = "impermissible"  # the tokens that must not be attended to
    asking: str = ""  # the role of the queries; "": all of the text

    @classmethod
    def neutral(cls) -> Impermissible:
        return cls(0.0)

    @classmethod
    def example(cls) -> Impermissible:
        return cls(role="marked")

    def idle(self, call: Call) -> bool:
        return self.weight == 0

    @penalises(Site.PATTERN)
    def hide(self, pattern: Tensor, call: Call) -> Tensor:
        mass = (pattern * call.spread(call.marked(self.role))[:, :, None]).sum(-1)
        asks = call.is_text & call.marked_queries(self.asking) if self.asking else call.is_text
        asks = call.spread(asks).expand_as(mass)
        hidden = (1 - mass).clamp(min=TINY).log().masked_fill(~asks, 0.0)
        return -self.weight * hidden.sum() / asks.sum().clamp(min=1)


if __name__ == "__main__":
    import torch

    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, Impermissible(), roles={"impermissible": ((2, 4),)}) as run:
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(5):
            loss = run(**inputs, labels=inputs["input_ids"]).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            print(loss.item(), run.loss().item())
