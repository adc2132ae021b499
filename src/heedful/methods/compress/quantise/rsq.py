"""Weights rounded in a turned basis for the least sum_i r_i^2 |(w' - w) x_i|^2, r_i by the attention that i gets."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveShare
from heedful.core.stats import Cat
from heedful.core.summary import Summary, sums
from heedful.kit.rounding import Rounding, above_zero, compensated, damped, inverse_root
from heedful.methods.compress.quantise._calibrated import HANDED_ON, SHOWN, Calibrated, Lesson, readings

PAPER = Paper(
    "P027",
    "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs",
    "Yi-Lin Sung, Prateek Yadav, Jialu Li, Jaehong Yoon, Mohit Bansal",
    2025,
    "2503.01820",
    differs=(
        "Simulated: weights are written back as ordinary numbers, so that nothing gets smaller or faster.",
        "The projections of attention alone; the paper rounds the feed-forward part too.",
        "Each projection's input is turned for the rounding and turned back after it, which the model does not feel; "
        "the authors turn the whole stream, and outputs with it. The Hadamard matrix is as wide as the largest power "
        "of two in the width, and repeated.",
        "The Hessian has r^2, as in the paper's formula; the authors' code has r, scaled to a mean of 1 in each text.",
        "What a token gets is read again before the output projection is rounded, when queries and keys are rounded "
        "already; the authors' code reads it once for a layer, before any of it is.",
        "The paper's other rules for a token's weight, and its longer calibration by shifted texts, are not here.",
    ),
)


class _Importance(Method):
    """least + (1 - least) (a - min a) / (max a - min a), a the attention that a token gets from all heads."""

    paper = PAPER
    least: float = 0.005

    @sums("received")
    def read(self, summary: Summary, call: Call) -> Cat:
        got = cast(Tensor, summary.received).sum(1)
        is_text = call.is_text[:, 0].expand_as(got)
        low = got.masked_fill(~is_text, torch.inf).amin(-1, keepdim=True)
        high = got.masked_fill(~is_text, -torch.inf).amax(-1, keepdim=True)
        share = (got - low) / above_zero(high - low)
        return Cat.of("x", (self.least + (1 - self.least) * share)[..., None])


class RSQ(Calibrated):
    """Rounds projections column by column, and most carefully for the tokens that much attention goes to.

    What a column loses, the columns after it make up for, as in GPTQ (2210.17323), where r is 1 for all tokens.
    """

    paper = PAPER
    # r_min, of the token with the least attention; the authors search from 0.005 to 0.1; 1: GPTQ
    least: PositiveShare = 0.005
    seed: int = 0  # of the signs that the turn draws

    def learned(self, lesson: Lesson) -> dict[str, Tensor]:
        inputs = HANDED_ON if "o" in lesson.letters else SHOWN
        total: Tensor | int = 0
        for x, r in readings(lesson.now, lesson.layer, (inputs, _Importance(self.least)), lesson.batches):
            weighted = (r * x).flatten(0, 1)
            total = total + weighted.mT @ weighted
        hessian = torch.as_tensor(total)
        turn = hadamard(len(hessian), self.seed).to(hessian)
        root = inverse_root(damped(turn.mT @ hessian @ turn))
        return {letter: self._turned(x @ turn, root) @ turn.mT for letter, x in lesson.matrices().items()}

    def _turned(self, x: Tensor, root: Tensor) -> Tensor:
        """A matrix in the turned basis, rounded; its rows' steps are those of the least sum |error|^2.4, as GPTQ's."""
        grid = Rounding.absmax(x, self.bits).searched(x, lambda e: e.norm(2.4, -1, keepdim=True))
        return compensated(x, root, grid)


def hadamard(width: int, seed: int) -> Tensor:
    """Signs, drawn, times an orthogonal matrix `[i i]` of equal magnitudes, in blocks as large as a power of two."""
    block = torch.ones(1, 1)
    while width % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    signs = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return signs[:, None] * torch.block_diag(*[block / len(block) ** 0.5] * (width // len(block)))


if __name__ == "__main__":
    from heedful import fit, models, operate

    model, tokenizer, _ = models.default()
    text = dict(tokenizer("The sun rises in the east and sets in the west, and so does the moon.", return_tensors="pt"))
    for least in (1.0, 0.005):
        rounded = operate(model, fit(RSQ(least=least, layers=(0, 1)), model, [text]))
        print(least, rounded(**text, labels=text["input_ids"]).loss.item())
