"""KIVI: at the same bits, does it matter that keys are rounded channel by channel and not token by token?"""

from __future__ import annotations

from torch import Tensor

from claims._cache import losses, memory, prose
from claims.ledger import Claim, run
from heedful.kit.packing import Codes
from heedful.methods.sparse.cache.kivi import KIVI

TOKENS, REST, GROUP, RESIDUAL = 384, 128, 32, 32


class ByToken(KIVI):
    """The control: keys are rounded as values are."""

    def keys(self, rows: Tensor, group: Tensor) -> Codes:
        return Codes.by_row(rows, self.group, self.bits)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    text = prose(seed, TOKENS, REST)
    numbers = {"loss, whole": losses(text, None)}
    for bits in (2, 4, 8):
        numbers[f"loss, {bits} bits, keys by channel"] = losses(text, KIVI(bits, GROUP, RESIDUAL))
        numbers[f"loss, {bits} bits, keys by token"] = losses(text, ByToken(bits, GROUP, RESIDUAL))
        numbers[f"memory of the cache, {bits} bits"] = memory(text, KIVI(bits, GROUP, RESIDUAL))
    return numbers["loss, 2 bits, keys by token"] - numbers["loss, 2 bits, keys by channel"], numbers


CLAIM = Claim(
    key="2402.02750",
    method="KIVI",
    says="Keys should be rounded channel by channel and values token by token; then two bits are enough.",
    paper_number="almost the same quality at 2 bits with 2.6 times less peak memory, model included (abstract)",
    setup=f"SmolLM2-135M, {TOKENS} tokens of prose, the cache rounded to 2 bits in groups of {GROUP} but for the "
    f"newest {RESIDUAL}, and the loss of the next {REST} tokens, against keys that are rounded token by token as "
    "values are; 4 and 8 bits are in the details, and the cache's "
    "memory as a share of a float32 one's.",
    effect="nats of loss per token that rounding keys by channel saves at 2 bits",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
