"""One query of each head after a cache, as a Triton kernel: keys in a row, of uneven heads, or chosen one by one.

A program has the heads that see the same keys, as many as fit a tile, and a span of these. Scores can be written down
on the way: of one query they are no more than a summary, and weights come of them without a second reading of the keys.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from heedful.gpu.kernels import _added, _capped, _product, _read, _weighed, _whose, _wide


class Seen(NamedTuple):
    """The keys that each unit of heads sees: columns from the first of `ends [b u 2]` to before the second, or so many
    of its `places [b u c]`. Column 0 of a head lies at line `base [b g]`, which may be one of another head's.
    """

    ends: Tensor
    units: int
    places: Tensor | None
    width: int
    base: Tensor | None


class Made(NamedTuple):
    """Where `attend_step` writes: `out [splits b h e]`, and of a softmax `lse [splits b h]` and `scores [b h m]`.

    Where weights are each made of their own score, these stand in the place of the scores, and spans add up.
    """

    out: Tensor
    lse: Tensor
    scores: Tensor | None


@triton.jit
def attend_step(
    q_lines, k_lines, v_lines, size, seen, bias, sink, made, span,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Heads of one query and the log-sum-exp of its scores, from a span of the keys; with MEAN a weight that is made of
    its own score is divided by the number of keys that are seen.
    """
    together = size.heads // seen.units
    tiles = tl.cdiv(together, BM)  # of heads that see the same keys
    tile, which = _whose(tiles)
    split, texts = tl.program_id(1), tl.num_programs(0) // (tiles * seen.units)
    batch, unit = _wide(which // seen.units), which % seen.units
    member = tile * BM + tl.arange(0, BM)
    inside = member < together
    head = unit * together + member
    shared = unit * together // size.group
    q = _read(q_lines, batch, head, 0 * member, inside, size.d, BD)

    mine = batch * seen.units + unit
    begin, end = tl.load(seen.ends + 2 * mine), tl.load(seen.ends + 2 * mine + 1)
    base = 0
    if seen.base is not None:
        base = tl.load(seen.base + batch * (size.heads // size.group) + shared)
    alone = tl.full([BM], 1.0, tl.float32)  # the share of a weight that is made of its own score
    if MEAN:
        alone = alone / tl.maximum(end - begin, 1).to(tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)  # the highest score so far
    total = tl.zeros([BM], tl.float32)  # of exponentials of scores less the highest one
    out = tl.zeros([BM, BE], tl.float32)
    for at in range(begin + split * span, tl.minimum(end, begin + (split + 1) * span), BN):
        number = at + tl.arange(0, BN)
        there = number < tl.minimum(end, begin + (split + 1) * span)
        col = number
        if seen.places is not None:
            col = tl.load(seen.places + mine * seen.width + number, mask=there, other=0)
        line, same = base + col, shared + 0 * col
        k = _read(k_lines, batch, same, line, there, size.d, BD)
        scores = _capped(_product(q, tl.trans(k), size) * size.scale, size)
        pairs = inside[:, None] & there[None, :]
        if bias is not None:
            scores += _added(bias, batch, head, 0 * member, col[None, :], pairs)
        scores = tl.where(there[None, :], scores, float("-inf"))
        kept = ((batch * size.heads + head) * size.m)[:, None] + col[None, :]
        v = _read(v_lines, batch, same, line, there, size.e, BE)
        if size.sigmoid is not None or size.relu is not None:
            part = _weighed(scores, tl.full([BM], 1.0, tl.float32), size)
            if made.scores is not None:
                tl.store(made.scores + kept, part * alone[:, None], mask=pairs)
            out += _product(part.to(v.dtype), v, size)
        else:
            if made.scores is not None:
                tl.store(made.scores + kept, scores, mask=pairs)
            higher = tl.maximum(top, tl.max(scores, 1))
            level = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.where(top == float("-inf"), 0.0, tl.exp(top - level))
            part = tl.exp(scores - level[:, None])
            total = shrink * total + tl.sum(part, 1)
            top = higher
            out = out * shrink[:, None] + _product(part.to(v.dtype), v, size)

    sees = begin + split * span < end  # told by the mask alone: a row of minus infinities is no number, and not blind
    level = tl.where(top == float("-inf"), 0.0, top)
    total = tl.where(sees & (top == float("-inf")), float("nan"), total)
    if sink is not None:  # a logit without key or value, counted with the first span
        logit = tl.load(sink + head, mask=inside & (split == 0), other=float("-inf"))
        higher = tl.maximum(level, logit)
        fall = tl.exp(level - higher)
        total, out = total * fall + tl.exp(logit - higher), out * fall[:, None]
        level = higher
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    share = tl.where(sees, 1.0 / total, 0.0)
    line = (split * texts + batch) * size.heads + head
    if size.sigmoid is not None or size.relu is not None:
        share = alone
    else:
        tl.store(made.lse + line, tl.where(empty, float("-inf"), level + tl.log(total)), mask=inside)
    wide = tl.arange(0, BE)
    there = inside[:, None] & (wide < size.e)[None, :]
    tl.store(made.out + line[:, None] * size.e + wide[None, :], out * share[:, None], mask=there)
