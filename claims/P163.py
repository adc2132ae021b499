"""HeadMask: does a model that is trained with heads masked lean less on the head that matters most to it?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._lab import BYTES, LAB, numbers
from claims.ledger import Claim, run
from heedful.authoring import Call, Method, Site, at
from heedful.methods import HeadMask


class _Channels(Method):
    """The control: as many numbers of what heads give are masked in a forward, in no head together."""

    share: float = 0.125

    def idle(self, call: Call) -> bool:
        return not call.training

    @at(Site.HEAD_OUTPUT)
    def mask(self, heads: Tensor, call: Call) -> Tensor:
        draw = torch.Generator().manual_seed(100 * call.forward + call.layer)
        stay = torch.rand(heads.shape[1], heads.shape[3], generator=draw) >= self.share
        return heads * stay.to(heads)[:, None]


class _Without(Method):
    """One head gives nothing."""

    layer: int
    head: int

    @at(Site.HEAD_OUTPUT)
    def remove(self, heads: Tensor, call: Call) -> Tensor:
        if call.layer != self.layer:
            return heads
        return heads * (torch.arange(call.heads) != self.head).to(heads)[:, None, None]


WAYS = {
    "softmax": None,
    "channels": _Channels(),
    "HeadMask": HeadMask(),
    "HeadMask by importance": HeadMask(by="importance"),
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "loss", course=BYTES)
    for name, what in WAYS.items():
        losses = []
        for layer in range(BYTES.layers):
            for head in range(BYTES.heads):
                with LAB.opened(BYTES, what, seed, _Without(layer, head)) as opened:
                    losses.append(BYTES.loss(opened, seed))
        found[f"loss without the head that matters most, {name}"] = max(losses)
        found[f"mean loss without a head, {name}"] = sum(losses) / len(losses)
    without = "loss without the head that matters most, "
    return min(found[without + "softmax"], found[without + "channels"]) - found[without + "HeadMask"], found


CLAIM = Claim(
    key="P163",
    method="HeadMask",
    says="Masking heads in training lets all heads learn, so that the model depends less on single ones, and "
    "translates better.",
    paper_number="BLEU of 17.6, 26.9 and 33.0 on three language pairs; by how much that is better could not be read",
    setup=f"The lab's text course, {BYTES.steps} steps, 2 layers of 4 heads: as it is, with one drawn head of eight "
    "masked in each step, with the most important one masked, and with an eighth of the channels of all heads masked; "
    "held-out loss while each head in turn gives nothing. The loss as a whole counts, so that a model that is only "
    "worse everywhere does not pass for even.",
    effect="nats a byte that the model without its most important head is better than the better of softmax and "
    "masked channels without theirs",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
