"""TokenFormer: do queries, keys and values by attention to learned tokens serve as well as those of linear maps?"""

from __future__ import annotations

from claims._lab import BYTES, numbers
from claims.ledger import Claim, run
from heedful.methods import TokenFormer

MARGIN = 0.02  # of the loss with linear maps, as in other claims of a match: what we still call one
WAYS = {"linear maps": None, "TokenFormer": TokenFormer(), "a quarter of its tokens": TokenFormer(BYTES.width // 4)}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "loss", course=BYTES)
    return (1 + MARGIN) * found["loss, linear maps"] - found["loss, TokenFormer"], found


CLAIM = Claim(
    key="P043",
    method="TokenFormer",
    says="A model whose projections are attention to learned tokens does as well as a transformer with linear maps.",
    paper_number="comparable performance from 124M to 1.4B parameters (abstract, which gives no score)",
    setup=f"The lab's text course, {BYTES.steps} steps, with linear maps to queries, keys and values, with as many "
    "learned tokens as the model is wide, which are twice the weights, and with a quarter of these; loss on another "
    "held-out tenth a seed. A match is a loss at most 2 % above that of linear maps. That a trained model grows by "
    "more tokens, the paper's main point, is not measured. The first run, not changed after it was seen.",
    effect="nats a byte left below the loss with linear maps plus 2 %",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
