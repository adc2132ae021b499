"""Queries of earlier calls on the same text, for edits that look at the rows above their own."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.errors import SiteError
from heedful.core.mask import Causal, First, Mask, Padding, Window
from heedful.core.positions import Positions
from heedful.core.rules import Both, Either, Rule
from heedful.core.values import replace
from heedful.engine.attention_call import AttentionCall


def with_earlier(job: AttentionCall, q: Tensor) -> tuple[AttentionCall, Tensor]:
    """The call with the rows above its own that its edits look at, from what was kept with the cache; keeps its own."""
    above, call = job.plan.above, job.call
    if call.cross:
        return job, q
    kept = job.run_state.kept_by_engine(call)
    before = kept.get("queries")
    after = kept.get("after")  # [b], the index that follows the last of them
    stop = int(call.queries.index.max()) + 1
    kept["after"] = torch.full((len(q),), stop, device=q.device)
    kept["queries"] = (q if before is None else torch.cat([before.to(q), q], 2))[:, :, -above:].detach()
    first = call.queries.first
    if not first:
        return job, q
    if before is None or after is None:
        raise SiteError(
            f"layer {call.layer}: an edit looks at rows above its own, and the tokens in the cache were not read under "
            "it; read the text from its beginning while this stack is attached, in every phase"
        )
    if not bool((after == first).all()):
        raise SiteError(
            f"layer {call.layer}: an edit looks at rows above its own, and the cache was cut back since these were "
            "read, or grew without it; generate without a draft model, or read the text in one call"
        )
    if call.keys.first != 0:  # a row above may have seen, beside a key that is still held, one that is not
        raise SiteError(
            f"layer {call.layer}: an edit looks at rows above its own, and its cache no longer holds what these saw; "
            "keep the cache whole, or read the text in one call"
        )
    before = before[:, :, -first:]
    if (job.bias is not None and job.bias.shape[-2] != 1) or not all(_by_position(rule) for rule in call.mask.rules):
        raise SiteError(
            f"layer {call.layer}: an edit looks at rows of an earlier call, for which the model's bias or a table of "
            "pairs is no longer known; read the text in one call"
        )
    rows = before.shape[2]
    longer = replace(call, queries=_continued(call.queries, rows), earlier=rows, mask=Mask(call.mask.rules))
    return replace(job, call=longer), torch.cat([before.to(q), q], 2)


def _by_position(rule: Rule) -> bool:
    """Whether a rule speaks of places and not of rows."""
    if isinstance(rule, Either | Both):
        return _by_position(rule.one) and _by_position(rule.other)
    return isinstance(rule, Causal | Window | First | Padding)


def _continued(queries: Positions, rows: int) -> Positions:
    """The same queries with the `rows` places before them."""
    back = torch.arange(-rows, 0, device=queries.index.device)
    index, position = (torch.cat([x[..., :1] + back, x], -1) for x in (queries.index, queries.position))
    is_filled = queries.is_filled
    if is_filled is not None:
        is_filled = torch.cat([position[..., :rows].expand(*is_filled.shape[:-1], rows) >= 0, is_filled], -1)
    first = None if queries.first is None else queries.first - rows
    return Positions(index, position, first, queries.pads, is_filled)
