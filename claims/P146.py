"""Context-aware cross-attention: are more words right that are written all at once, if what is near counts for more?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from claims._lab import CROSS, numbers
from claims.ledger import Claim, run
from heedful.authoring import Call
from heedful.laboratory.course import Batch
from heedful.laboratory.strings import START, WAYS, Strings
from heedful.methods import ContextAwareCrossAttention

WINDOW = 2


@dataclass(frozen=True)
class Parallel(Strings):
    """The lab's strings, where the decoder is told none of the words that it has written."""

    name: ClassVar[str] = "strings at once"
    timed: ClassVar[bool] = False

    def drawn(self, random: Generator, rows: int) -> Batch:
        found = super().drawn(random, rows)
        return found | {"decoder_input_ids": torch.full_like(found["decoder_input_ids"], START)}


class _Local(ContextAwareCrossAttention):
    """The window alone."""

    def gate(self, call: Call) -> Tensor:
        return super().gate(call) * 0


class _Elsewhere(ContextAwareCrossAttention):
    """The control: a window as wide around a place that is drawn, for each head and word."""

    def around(self, highest: Tensor, call: Call) -> Tensor:
        draw = torch.Generator().manual_seed(call.layer)
        drawn = torch.randint(call.k_pos.shape[-1], (1, *highest.shape[1:]), generator=draw)
        return super().around(drawn.expand_as(highest), call)


WITH = {
    "global": None,
    "context-aware": ContextAwareCrossAttention(WINDOW),
    "elsewhere": _Elsewhere(WINDOW),
    "local": _Local(WINDOW),
}
COURSE = Parallel(tokens=CROSS.tokens, where="cross")


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WITH, seed, *WAYS, "copy off", "reverse off", course=COURSE)
    right = {name: sum(found[f"{way}, {name}"] for way in WAYS) / len(WAYS) for name in WITH}
    found |= {f"right, {name}": share for name, share in right.items()}
    return right["context-aware"] - max(right["global"], right["elsewhere"]), found


CLAIM = Claim(
    key="P146",
    method="ContextAwareCrossAttention",
    says="Where all words are written at once, cross-attention that gives more to what is near the place looked at "
    "most writes more of them rightly.",
    paper_number="consistent gains over strong non-autoregressive baselines (abstract, without numbers)",
    setup=f"The lab's strings, {COURSE.steps} steps, with a decoder that is told no word: copy, reverse and sort with "
    f"global cross-attention, with a share of attention up to {WINDOW} places from the highest, with one as wide "
    "around a drawn place, and with the window alone; the share of words that are right, mean of the three.",
    effect="share of words right, less the better of global attention and windows elsewhere",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
