"""Contextual memory reweaving: do layers that are handed what those before them were handed model language better?"""

from __future__ import annotations

from torch import Tensor

from claims._lab import Bytes, numbers
from claims.ledger import Claim, run
from heedful.authoring import Call, Site, at
from heedful.methods import ContextualMemoryReweaving

COURSE = Bytes(tokens=102_400, layers=4)


class _Gain(ContextualMemoryReweaving):
    """The control: as many learned weights, which weigh what the layer itself is handed."""

    @at(Site.HIDDEN)
    def weave(self, hidden: Tensor, call: Call) -> Tensor:
        return hidden * (1 + call.params["weight"].sum()) if call.layer else hidden


WAYS = {"softmax": None, "woven": ContextualMemoryReweaving(), "a gain": _Gain()}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "loss", course=COURSE)
    return min(found["loss, softmax"], found["loss, a gain"]) - found["loss, woven"], found


CLAIM = Claim(
    key="P000",
    method="ContextualMemoryReweaving",
    says="A model whose layers are handed the latent states of earlier layers too remembers better.",
    paper_number="better recall at all lengths (abstract, without numbers)",
    setup=f"The lab's text course with {COURSE.layers} layers, {COURSE.steps} steps, with softmax as it is, with "
    "states of earlier layers woven in by learned weights that begin at zero, and with as many weights on what a "
    "layer is handed anyway; loss on another held-out tenth a seed.",
    effect="nats a byte below the better of softmax and a gain",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
