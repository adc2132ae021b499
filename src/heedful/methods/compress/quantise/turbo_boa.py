"""Weights rounded for the least tr(E H E' K), E the error, H of a projection's inputs, K of what its outputs meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from heedful.core.call import Call
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveInt, Share
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Sum
from heedful.kit.rounding import Rounding, compensated, damped, inverse_root
from heedful.methods.compress.quantise._calibrated import HANDED_ON, SHOWN, Calibrated, Lesson, readings

PAPER = Paper(
    "P311",
    "TurboBoA: Faster and Exact Attention-aware Quantization without Backpropagation",
    "Junhan Kim, Yeo Jeong Park, Seungwoo Son, Chungman Lee, Ho-young Kim, Joonyoung Kim, Yongkweon Jeon",
    2026,
    "2602.04929",
    "ICLR 2026",
    differs=(
        "Simulated: weights are written back as ordinary numbers, so that nothing gets smaller or faster.",
        "The projections of attention alone; the paper rounds the feed-forward part too.",
        "A grid's zero stays while its step is searched; the authors try the code below and above it at every step, "
        "and steps down to a hundredth, where a fifth is the least here.",
        "Inputs that calibration never reached count by themselves; the authors set their weights to zero.",
        "Norms between projection and rotary embedding, where a model has them, are passed over.",
        "Columns and rows are taken in their order; the authors' code can sort them.",
    ),
)


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be rounded: `x [m r i]`, m heads or 1, and what its error costs."""

    x: Tensor
    inputs: Tensor  # [1|m i i], H: products of the inputs
    lack: Tensor  # [1|m i i], D: products of what the inputs lack, since layers before were rounded, and what they are
    outputs: Tensor | None = None  # [m r r], K; None: outputs meet nothing together


class TurboBoA(Calibrated):
    """Rounds queries by the keys they meet, keys by the queries, values by how they are mixed, output by the heads.

    Some rows at a time on a grid of their own, each making up for what those before it lost and for what its inputs
    lack; then steps are refined one after the other. `rows=1` and `lack=0` without refining is BoA (2406.13474).
    """

    paper = PAPER
    turns = ("qkvo",)
    bits: Annotated[int, Interval(ge=2, le=8)] = 2  # of a weight
    rows: PositiveInt = 16  # N, outputs of a head that are rounded together
    lack: Share = 0.25  # alpha, how much of what inputs lack is made up for
    refinements: NonNegativeInt = 1  # passes over all steps in the end; 0: none

    def learned(self, lesson: Lesson) -> dict[str, Tensor]:
        size, found = lesson.layer, {}
        readers = {"q": SHOWN, "k": SHOWN, "v": _MIXED, "o": HANDED_ON}
        wanted = list(dict.fromkeys(readers[letter] for letter in lesson.letters))
        moments = dict(zip(wanted, inputs_of(lesson, wanted), strict=True))
        outputs = _outputs(lesson)
        for letter, x in lesson.matrices().items():
            inputs, lack = moments[readers[letter]]
            heads = {"q": size.heads, "k": size.kv_heads, "v": size.kv_heads, "o": 1}[letter]
            problem = Problem(x.unflatten(0, (heads, -1)), damped(inputs), self.lack * lack, outputs.get(letter))
            found[letter] = self.solved(problem).flatten(0, 1)
        return found

    def solved(self, p: Problem) -> Tensor:
        """The rounded matrices `[m r i]`."""
        root = inverse_root(p.inputs)
        drift = (p.lack @ root.mT).triu(1) @ root
        made_up = p.lack @ root.mT @ root
        width = p.x.shape[1]
        count = width if p.outputs is None else self.rows
        above = torch.eye(width).to(p.x)[None] if p.outputs is None else inverse_root(p.outputs)
        rest, out, steps = p.x.clone(), torch.empty_like(p.x), torch.empty_like(p.x[..., :1])
        for start in range(0, width, count):
            mine, later = slice(start, start + count), slice(start + count, None)
            now = rest[:, mine].clone()
            grid = Rounding.minmax(now, self.bits).searched(now, lambda e: ((e @ p.inputs) * e).sum(-1, keepdim=True))
            out[:, mine], steps[:, mine] = compensated(now, root, grid, drift), grid.step
            lost = now - out[:, mine] + now @ made_up
            rest[:, later] -= above[:, mine, later].mT @ torch.linalg.solve(above[:, mine, mine].mT, lost)
        return self._refined(p, (out / steps).round(), steps)

    def _refined(self, p: Problem, codes: Tensor, steps: Tensor) -> Tensor:
        """Each step in turn is what makes the loss least, given codes and the other steps."""
        outputs = torch.eye(p.x.shape[1]).to(p.x).expand(len(p.x), -1, -1) if p.outputs is None else p.outputs
        along = codes @ p.inputs
        size = (along * codes).sum(-1)
        missing = ((outputs @ (p.x @ p.lack)) * codes).sum(-1)
        for _ in range(self.refinements):
            for r in range(p.x.shape[1]):
                error = (outputs[:, r, None] @ (p.x - steps * codes))[:, 0]
                gain = (along[:, r] * error).sum(-1) + missing[:, r]
                whole = outputs[:, r, r] * size[:, r]
                steps[:, r, 0] += torch.where(whole > 0, gain / whole, 0.0)
        return steps * codes


class _Mixed(Method):
    """Each head's mixture of what values are made of, the pattern times the layer's input, `[b h n e]`."""

    paper = PAPER

    @reads(Site.PATTERN)
    def read(self, pattern: Tensor, call: Call) -> Cat:
        shown = torch.as_tensor(call.hidden)[:, None, call.cols]
        return Cat.of(f"{call.rows.start or 0:09d}", (pattern * call.is_text[..., None]) @ shown.to(pattern))


class _Keys(Method):
    """K for queries `[g d d]`: the keys' products, each turned back to where a query stands, the mean over these."""

    paper = PAPER

    @reads(Site.KEY)
    def read(self, key: Tensor, call: Call) -> Sum:
        return Sum.of(_turned_back(key * call.is_text[..., None], call))


class _Queries(Method):
    """K for keys `[h d d]`, like that of the keys."""

    paper = PAPER

    @reads(Site.QUERY)
    def read(self, query: Tensor, call: Call) -> Sum:
        return Sum.of(_turned_back(query * call.is_text[..., None], call))


_MIXED = _Mixed()


def _turned_back(x: Tensor, call: Call) -> Tensor:
    """mean_n R_n' (sum x x') R_n over the places n of the text, R_n the turn of the rotary embedding there."""
    x = x.double()
    products = torch.einsum("bgnd,bgne->gde", x, x)
    if call.rotate is None:
        return products
    width, tokens = x.shape[-1], x.shape[2]
    unit = torch.eye(width, device=x.device)[None, :, None].expand(1, -1, tokens, -1)
    turned = call.rotate(unit).double()  # [b|1 j n d], what becomes of each axis
    weight = call.is_text[:, 0].double().expand(len(turned), -1)
    weight = weight / weight.sum()
    return torch.einsum("bn,bjnd,gde,blne->gjl", weight, turned, products, turned)


def _outputs(lesson: Lesson) -> dict[str, Tensor]:
    """K for each head of the queries, and of the keys."""
    size = lesson.layer
    readers = {letter: reader for letter, reader in (("q", _Keys()), ("k", _Queries())) if letter in lesson.letters}
    total: list[Tensor | float] = [0.0] * len(readers)
    for found in readings(lesson.now, size, list(readers.values()), lesson.batches) if readers else ():
        total = [old + x for old, x in zip(total, found, strict=True)]
    shared = size.heads // size.kv_heads
    products = {letter: torch.as_tensor(x) for letter, x in zip(readers, total, strict=True)}
    if "q" in products:
        products["q"] = products["q"].repeat_interleave(shared, 0)
    if "k" in products:
        products["k"] = products["k"].unflatten(0, (-1, shared)).mean(1)
    return {letter: damped(x) for letter, x in products.items()}


def inputs_of(lesson: Lesson, readers: Sequence[Method]) -> list[tuple[Tensor, Tensor]]:
    """H and D: inputs as they are times themselves, and what they lack of those of the whole model times them."""
    both = (readings(of, lesson.layer, readers, lesson.batches) for of in (lesson.own, lesson.now))
    total: list[Tensor | float] = [0.0] * (2 * len(readers))
    for whole, now in zip(*both, strict=True):
        found = []
        for a, b in zip(whole, now, strict=True):
            a, b = (x if x.ndim == 4 else x[:, None] for x in (a, b))
            found += [torch.einsum("bhni,bhnj->hij", x, b) for x in (b, a - b)]
        total = [old + x for old, x in zip(total, found, strict=True)]
    # heads that share their values have these rounded for all of them
    products = [_shared(torch.as_tensor(x), lesson.layer.kv_heads) for x in total]
    return list(zip(products[::2], products[1::2], strict=True))


def _shared(x: Tensor, groups: int) -> Tensor:
    return x if len(x) == 1 else x.unflatten(0, (groups, -1)).mean(1)


if __name__ == "__main__":
    from heedful import fit, models, operate

    model, tokenizer, _ = models.default()
    text = dict(tokenizer("The sun rises in the east and sets in the west, and so does the moon.", return_tensors="pt"))
    rounded = operate(model, fit(TurboBoA(3, layers=(0, 1)), model, [text]))
    print(rounded(**text, labels=text["input_ids"]).loss.item())
