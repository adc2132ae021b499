"""The mask and the places of a call of torch's attention, in heedful's terms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heedful.adapters.arguments import from_dense
from heedful.adapters.bound import Bound
from heedful.core.mask import Causal, Dense, Mask, Padding, Rule
from heedful.core.positions import Positions
from heedful.core.regions import Span


def rules_of(mask: Tensor | None, causal: bool, rows: int, keys: int) -> tuple[Mask, Tensor | None, Tensor | None]:
    """Rules, what is added to scores, and which tokens of each row `[b k]` are text, where the mask tells just that."""
    rules: list[Rule] = [Causal()] if causal else []
    table, bias = (None, None) if mask is None else from_dense(mask, keys)
    if table is None:
        return Mask(tuple(rules)), bias, None
    text = _key_only(table, rows)
    if text is None and (text := _causal_but_padding(table, rows)) is not None:
        rules.append(Causal())
    rules.append(Dense(table) if text is None else Padding(text))
    return Mask(tuple(rules)), bias, text


def _key_only(table: Tensor, rows: int) -> Tensor | None:
    """The keys `[b k]` that every head and every query may see, where a table `[b|1, h|1, q|1, k]` says no more."""
    first = table[:, :1, :1]
    if table.shape[-2] != 1 or not torch.equal(table, first.expand_as(table)):
        return None
    return first[:, 0, 0].expand(rows, -1)


def _causal_but_padding(table: Tensor, rows: int) -> Tensor | None:
    """Which keys `[b k]` are text, where a table `[b|1, h|1, q, k]` tells just that and that later ones are hidden."""
    q, k = table.shape[-2:]
    if not 1 < q <= k or not torch.equal(table, table[:, :1].expand_as(table)):
        return None
    table = table[:, 0]
    text, earlier = table[:, -1], table.new_ones(q, k).tril(k - q)
    asks = text[:, k - q :]
    told = (table == (earlier & text[:, None])).all(-1)
    # padding is told to see nothing, or all; a token that sees some others is of another text in the same row
    return text.expand(rows, -1) if bool((told | (~asks & (table.all(-1) | ~table.any(-1)))).all()) else None


def hides_later(rules: Mask) -> bool:
    """Whether no query sees later tokens, by rule or by a table `[b|1, h|1, q, k]` of a text's last q tokens."""
    tables = (rule.table for rule in rules.rules if isinstance(rule, Dense) and rule.table.shape[-2] > 1)
    return rules.causal or any(not bool(x.triu(1 + x.shape[-1] - x.shape[-2]).any()) for x in tables)


def places(bound: Bound, q: Tensor, k: Tensor, text: Tensor | None, fixed: bool) -> tuple[Positions, Positions, bool]:
    """Where queries and keys stand, and whether the keys are another sequence's.

    More keys than queries are those of tokens before them, unless their places are `fixed`: torch's causal flag counts
    both from the first, and modules append keys of their own.
    """
    n, m = q.shape[2], k.shape[2]
    tokens, others = (_tokens(bound, x) for x in (bound.hidden, bound.other))
    if others is not None:
        # joint attention is over both sequences at once; whoever ignores the other attends to his own
        cross = not (n == m == (tokens or 0) + others) and (m == others or m != n)
    else:
        cross = m < n or (m > n and tokens is not None and tokens != n)
    start = 0 if cross or fixed else max(0, m - n)
    return (*placed(None if cross or (fixed and n != m) else text, start, n, m, q.device), cross)


def placed(
    text: Tensor | None, start: int, queries: int, keys: int, device: torch.device
) -> tuple[Positions, Positions]:
    """Places of queries from index `start` on and of keys, in texts `[b k]` that padding stands around."""
    if text is None or not _contiguous(text):
        return Positions.row(start, queries, device), Positions.row(0, keys, device)
    left = text.long().cummax(-1).values.logical_not().sum(-1)
    pad = left if bool(left.any()) else None
    is_text = text[:, None, start : start + queries]
    return Positions.row(start, queries, device, pad, is_text), Positions.row(0, keys, device, pad)


def joined(bound: Bound, parts: Any) -> tuple[int, int] | None:
    """The order in which a module joins its own sequence and the other one, if that is what it does here."""
    own, other = (_tokens(bound, x) for x in (bound.hidden, bound.other))
    if own is None or other is None or own == other or len(parts) != 2:
        return None
    a, b = (x.shape for x in parts)
    axes = [(p, q) for p, q in zip(a, b, strict=False) if p != q]
    return axes[0] if len(a) == len(b) and axes in ([(own, other)], [(other, own)]) else None


def halves(bound: Bound, tokens: int) -> dict[str, tuple[Span, ...]]:
    """Where a module that attends to both sequences at once has its own, `image`, and the other, `context`."""
    own = _tokens(bound, bound.hidden)
    if bound.joint is None or sum(bound.joint) != tokens:
        return {}
    names = ("image", "context") if bound.joint[0] == own else ("context", "image")
    return {names[0]: ((0, bound.joint[0]),), names[1]: ((bound.joint[0], tokens),)}


def _tokens(bound: Bound, x: Tensor | None) -> int | None:
    if x is None or x.ndim not in (2, 3):
        return None
    return int((bound.taking.turned(x) if x is bound.other else x).shape[-2])


def _contiguous(text: Tensor) -> bool:
    """Whether each row is one piece of text with padding around it, or nothing but padding."""
    edges = torch.nn.functional.pad(text.long(), (1, 1)).diff(dim=-1).abs().sum(-1)
    return bool((edges <= 2).all())
