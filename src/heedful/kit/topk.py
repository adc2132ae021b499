"""The k best entries of every text, of which padding is never one."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores: Tensor, k: int | Tensor, is_text: Tensor | None) -> Tensor:
    """True at the k best of the real entries of each row of `scores [... n]`; the earlier of equals goes first.

    `k` is a count or several, `[... 1]`; for a share see `kit.budget.rooms`. `is_text` is boolean and broadcasts to
    `scores`; None: all are real. A text shorter than k is kept whole.
    """
    best = scores.argsort(dim=-1, descending=True, stable=True)
    chosen = (torch.arange(scores.shape[-1], device=scores.device) < k).expand_as(best)
    if is_text is None:
        return torch.empty_like(chosen).scatter_(-1, best, chosen)
    text = is_text.expand_as(scores)
    # A second stable sort, and no fill with -inf: a real entry may score -inf itself and still comes before padding.
    padding_last = (~text).gather(-1, best).byte().argsort(dim=-1, stable=True)
    return torch.zeros_like(text).scatter_(-1, best.gather(-1, padding_last), chosen) & text
