"""RecurrentMemoryAttention: do slots for past chunks, and a gate before them, help to predict a text?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from claims._lab import Bytes, numbers
from claims.ledger import Claim, run
from heedful.authoring import Call, Site, at
from heedful.methods import RecurrentMemoryAttention

COURSE = Bytes(tokens=131_072)
CHUNK, WINDOW, SLOTS = 16, 4, 4
NEVER = -1e4  # what is as good as minus infinity


class _Queue(RecurrentMemoryAttention):
    """A control: a chunk takes the place of the oldest, whatever that held."""

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        shut = {"keeps": torch.full_like(call.params["keeps"], NEVER)}
        open_ = {name: torch.zeros_like(call.params[name]) for name in ("old", "new")}
        return super().attend(qkv, replace(call, params={**call.params, **shut, **open_}))


class _Alone(RecurrentMemoryAttention):
    """Another: chunks that know of no other."""

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        mix = call.params["mix"] * torch.tensor([1.0, 1.0, 0.0]) + torch.tensor([0.0, 0.0, NEVER])
        return super().attend(qkv, replace(call, params={**call.params, "mix": mix}))


WAYS = {
    "gated slots": RecurrentMemoryAttention(CHUNK, WINDOW, SLOTS),
    "slots without a gate": _Queue(CHUNK, WINDOW, SLOTS),
    "chunks alone": _Alone(CHUNK, WINDOW, SLOTS),
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "loss", course=COURSE)
    controls = [found[f"loss, {name}"] for name in list(WAYS)[1:]]
    return min(controls) - found["loss, gated slots"], found


CLAIM = Claim(
    key="P197",
    method="RecurrentMemoryAttention",
    says="A gated memory of past chunks beside attention to the own chunk models what is near and far.",
    paper_number="none in the abstract",
    setup=f"The lab's text course, {COURSE.steps} steps, with chunks of {CHUNK} bytes, windows of {WINDOW} and {SLOTS} "
    "slots; the same whose slots are a plain queue, and the same without slots. Loss on another held-out tenth a seed.",
    effect="nats a byte below the better of slots without a gate and chunks alone",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
