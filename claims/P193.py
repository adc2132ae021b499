"""LandmarkAttention: do landmarks find the blocks of the past that a trained model needs?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator, Tensor

from claims._lab import BYTES, LAB, numbers
from claims.ledger import Claim, run
from heedful.authoring import Call, Method, Site, at
from heedful.core.method import as_stack
from heedful.laboratory.training import opened
from heedful.methods import LandmarkAttention

EVERY, BLOCKS = 16, 1  # tokens of a block, and blocks of the past that a query may look into
TRAINED = LandmarkAttention(EVERY)


class _Others(Method):
    """The controls: the same weights over as many blocks, the newest ones or drawn, whatever their landmarks say."""

    newest: bool

    @at(Site.NORMALISE)
    def weigh(self, scores: Tensor, call: Call) -> Tensor:
        _, mark = TRAINED.placed(call.keys, call)
        if self.newest:
            rank = call.k_pos[..., None, :].expand(scores.shape).double()
        else:
            draw = Generator().manual_seed(1_000 * call.forward + 10 * call.layer + (call.rows.start or 0))
            rank = torch.rand(scores.shape, generator=draw, dtype=torch.float64)
        behind = mark[..., None, :] & (call.distance > 0)
        stay = rank.masked_fill(~behind, -1.0).argsort(dim=-1, descending=True).argsort(dim=-1) < BLOCKS
        keep = ~mark[..., None, :] | stay
        keep = keep if call.keep is None else keep & call.keep
        return TRAINED.weigh(scores, replace(call, keep=keep))


WAYS = {"softmax": None, "landmarks": TRAINED}
ASKED = {
    "highest landmarks": LandmarkAttention(EVERY, blocks=BLOCKS),
    "newest blocks": _Others(True),
    "drawn blocks": _Others(False),
    "no blocks": LandmarkAttention(EVERY, blocks=0),
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "loss", course=BYTES)
    with LAB.opened(BYTES, TRAINED, seed) as trained:
        weights = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    for name, what in ASKED.items():
        with opened(BYTES, as_stack(what), seed, weights) as asked:
            found[f"loss, {name}"] = BYTES.loss(asked, seed)
    others = min(found["loss, newest blocks"], found["loss, drawn blocks"])
    return others - found["loss, highest landmarks"], found


CLAIM = Claim(
    key="P193",
    method="LandmarkAttention",
    says="A landmark a block, trained by a grouped softmax, lets each query find the few blocks of the past that it "
    "needs, with the loss of a model that reads all of it.",
    paper_number="comparable to Transformer-XL with far fewer tokens looked at; LLaMA 7B to 32k tokens",
    setup=f"The lab's text course, {BYTES.steps} steps, every {EVERY}th byte a landmark, texts of {BYTES.length}; then "
    f"each query and head may look into {BLOCKS} block of the past: that with the highest landmark, the newest or a "
    "drawn one, with the same weights. Landmarks here are the text's own bytes and no tokens beside it, and texts are "
    "as long as in training.",
    effect="held-out loss in nats a byte, of the better of newest and drawn blocks, less that of the highest landmarks",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
