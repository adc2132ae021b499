"""How often a head looks most at the token of a needle that an answer, which repeats the needle, gives next."""

from __future__ import annotations

import torch

from heedful.core.call import Call
from heedful.core.positions import spread_heads
from heedful.core.stats import Mean
from heedful.core.summary import Summary


def pointing(pattern: Summary, call: Call) -> Mean | None:
    """The share `[h]` of the answer's tokens for which `argmax_j A_ij` is the token that comes next after query i.

    The call has spans "needle" and "answer", and the summary each row's highest place, or there is nothing to tell.
    """
    if pattern.place is None:
        return None
    is_text, place = call.is_text, call.pairs.q[..., 0]  # [b|1 1 q]
    at = pattern.place.where(is_text, 0).long()
    found = spread_heads(call.k_pos, at.shape[1]).expand(len(at), at.shape[1], -1).gather(-1, at)
    hits, asked = torch.zeros_like(found, dtype=torch.bool), torch.zeros_like(is_text)
    needles, answers = call.bounds("needle")[:, None], call.bounds("answer")[:, None]  # [b|1 1 spans 2]
    for needle, answer in zip(needles.unbind(2), answers.unbind(2), strict=True):
        start, stop = needle.split(1, -1)
        comes = place + 1 - answer[..., :1] + start  # the needle token that comes next after each query
        asks = is_text & (comes >= start) & (comes < stop)
        hits |= asks & (found == comes)
        asked = asked | asks
    return Mean.of(hits.double().sum((0, 2)), asked.expand(len(at), 1, -1).sum())
