"""The k best entries of every text, of which padding is never one."""

from __future__ import annotations

from torch import Tensor


def top_k(scores: Tensor, k: int | float | Tensor, is_text: Tensor) -> Tensor:
    """True at the k best of the real entries of each row of `scores [b ... n]`; the earlier of equals goes first.

    `k` is a count (int), a share of the text's own length (float, rounded, at least one) or one count per text `[b]`.
    `is_text` is boolean and broadcasts to `scores`. A text shorter than k is kept whole.
    """
    text = is_text.expand_as(scores)
    counts: int | Tensor
    if isinstance(k, Tensor):
        counts = k.view(-1, *[1] * (scores.ndim - 1))
    elif isinstance(k, float):
        counts = (k * text.sum(-1, keepdim=True).double()).round().clamp(min=1)
    else:
        counts = k
    best = scores.argsort(dim=-1, descending=True, stable=True)
    # A second stable sort, and no fill with -inf: a real entry may score -inf itself and still comes before padding.
    padding_last = (~text).gather(-1, best).byte().argsort(dim=-1, stable=True)
    rank = best.gather(-1, padding_last).argsort(dim=-1)
    return (rank < counts) & text
