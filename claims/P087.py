"""Mega: does a gated head that looks at moving averages predict better than attention, and is it the averages?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from claims._lab import BYTES, numbers
from claims.ledger import Claim, run
from heedful.authoring import Call, Site, at
from heedful.methods import Mega

SHARED, AVERAGES = 32, 8


class _Still(Mega):
    """The control: the same gated head, and what its averages tell is nothing."""

    @at(Site.BLOCK)
    def attend(self, hidden: Tensor, call: Call) -> Tensor:
        silent = {**call.params, "shrink": torch.zeros_like(call.params["shrink"])}
        return super().attend(hidden, replace(call, params=silent))


WAYS = {"softmax": None, "Mega": Mega(SHARED, AVERAGES), "without averages": _Still(SHARED, AVERAGES)}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "loss", course=BYTES)
    return min(found["loss, softmax"], found["loss, without averages"]) - found["loss, Mega"], found


CLAIM = Claim(
    key="P087",
    method="Mega",
    says="A single gated head that looks at damped moving averages models language better than softmax attention.",
    paper_number="improvements over variants of transformers on language modelling among others (abstract)",
    setup=f"The lab's text course, {BYTES.steps} steps, with softmax, with Mega of {AVERAGES} averages a channel and "
    f"{SHARED} channels for queries and keys, and with the same whose averages tell nothing; loss on another held-out "
    "tenth a seed. Mega's block has more weights than the attention it stands in for.",
    effect="nats a byte below the better of softmax and Mega without averages",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
