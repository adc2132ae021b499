"""The masks of `torch.nn.MultiheadAttention` as rules: True hides, numbers are added to scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.adapters.arguments import from_dense
from heedful.core.errors import FieldError
from heedful.core.mask import Causal, Dense, Mask, Padding, Rule


@dataclass(frozen=True)
class Sizes:
    """Of one call: rows, heads, queries, keys, and how many of the keys stand before the first query."""

    rows: int
    heads: int
    queries: int
    keys: int
    past: int


@dataclass(frozen=True, eq=False)
class Told:
    """What the masks of a call say."""

    mask: Mask
    bias: Tensor | None  # added to scores
    text: Tensor | None  # [b k], False for padding; None where all is text


def told(pairs: Tensor | None, padding: Tensor | None, causal: bool, hint: bool, sizes: Sizes) -> Told:
    """Rules, biases and text of `attn_mask`, `key_padding_mask` and a module's causality.

    A mask that says no more than causality is that rule, so that mechanisms without a map can serve it.
    """
    table, added = None, None
    if pairs is not None:
        table, added = from_dense(_by_head(_kept("attn_mask", pairs), sizes), sizes.keys)
    if table is not None and _is_causal(table, sizes):
        causal, table = True, None
    elif table is not None and bool(table.all()):
        table = None
    alone = sizes.queries == 1 and table is None  # one query that sees all: causality hides nothing from it
    if hint and pairs is not None and not (causal or alone):
        rule = "says that attn_mask is the causal mask, which it is not; leave is_causal out"
        raise FieldError("Attention()", "is_causal", hint, rule, False)
    causal = causal or hint
    if causal and sizes.queries + sizes.past != sizes.keys:
        rule = f"which of {sizes.keys} keys stand before which of {sizes.queries} queries is not known"
        raise FieldError("Attention()", "causal", causal, f"{rule}; give a cache or an attn_mask", False)
    rules: list[Rule] = [Causal()] if causal else []
    rules += [] if table is None else [Dense(table)]
    if padding is None:
        return Told(Mask(tuple(rules)), added, None)
    wanted = (sizes.rows, sizes.keys)
    padding = padding[None] if padding.ndim == 1 else padding
    if tuple(padding.shape) != wanted:
        rule = f"has a row for each text and a column for each key, those in the cache too: {wanted}"
        raise FieldError("Attention()", "key_padding_mask", tuple(padding.shape), rule, wanted)
    keys, more = from_dense(_kept("key_padding_mask", padding)[:, None, None], sizes.keys)
    text = None if keys is None or bool(keys.all()) else keys[:, 0, 0]
    rules += [] if text is None else [Padding(text)]
    return Told(Mask(tuple(rules)), added if more is None else more if added is None else added + more, text)


def _kept(name: str, mask: Tensor) -> Tensor:
    """What torch's kernels take: True keeps."""
    if mask.dtype == torch.bool:
        return ~mask
    if not mask.is_floating_point():
        rule = "must be bool, where True hides, or floating-point numbers that are added to the scores"
        raise FieldError("Attention()", name, str(mask.dtype), rule, "mask.bool()")
    return mask


def _by_head(mask: Tensor, sizes: Sizes) -> Tensor:
    """`[n k]`, or torch's `[b * h, n, k]`, as `[1|b, 1|h, n, k]`."""
    pairs, stacked = (sizes.queries, sizes.keys), sizes.rows * sizes.heads
    if tuple(mask.shape) == pairs:
        return mask[None, None]
    if tuple(mask.shape) == (stacked, *pairs):
        return mask.unflatten(0, (sizes.rows, sizes.heads))
    rule = f"must be of {pairs} or {(stacked, *pairs)}, queries and keys, those in the cache too"
    raise FieldError("Attention()", "attn_mask", tuple(mask.shape), rule, pairs)


def _is_causal(table: Tensor, sizes: Sizes) -> bool:
    """Whether every query sees its own key and all before it, and nothing else."""
    if sizes.queries + sizes.past != sizes.keys or sizes.queries < 2:
        return False
    rows = torch.ones(table.shape[-2:], dtype=torch.bool, device=table.device).tril(sizes.past)
    return torch.equal(table, rows.expand_as(table))
