"""Attention as sums over the keys that a query sees: chunk after chunk, and of earlier calls a state of fixed size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.core.call import Call
from heedful.core.errors import SiteError
from heedful.core.mask import Padding
from heedful.core.positions import spread_heads
from heedful.core.state import Until

CHUNK = 64  # query rows a step
Lift = Callable[[Tensor], Tensor]
END = "end"  # so many tokens the state holds


class Running:
    """Sums over the keys up to each query where the call is causal, over all keys elsewhere.

    A causal call goes on from what the calls before it added up, which `call.state.cache` holds, if they ended where
    this one begins. Else it adds up what keys the cache holds; where sums are over queries too, which no cache holds,
    it adds up its `own` tokens alone, and refuses a cache that was cut back, and a decoder's cross-attention, where all
    its queries would be in each one's sums. What is summed is `[b g columns c]`, made
    of what `cut` leaves of keys and values, zero where `hide` says so; every sum has a name of its own.
    """

    def __init__(self, call: Call, key: Tensor, chunk: int = CHUNK, own: bool = False) -> None:
        if own and call.cross and call.in_order:
            raise SiteError(
                f"layer {call.layer}: sums over queries are needed, and in a decoder's cross-attention they would tell "
                "each token of later ones; restrict the method with .on(layers=...)"
            )
        n, total, first = len(call.queries), key.shape[2], call.queries.first
        self.causal, self.chunk, self._kept = call.mask.causal, chunk, call.state.cache
        past = past_keys(call, n, total) if self.causal else 0
        end = self._kept.get(END) if self.causal and first else None
        self.goes_on = end is not None and bool(end.eq(first or 0).all())
        if own and end is not None and not self.goes_on:
            raise SiteError(
                f"layer {call.layer}: sums over earlier queries are needed, and the cache was cut back since; generate "
                "without a draft model, or read the text again from its start"
            )
        start = past if self.goes_on or own else 0
        self._columns = slice(start, past + n if self.causal else total)
        self._past = past - start  # columns before the first query
        self._text = text_keys(call, total, self._columns)
        self._end = torch.full((key.shape[0],), -1 if first is None else first + n, device=key.device)

    def cut(self, x: Tensor) -> Tensor:
        """Of something of all keys `[b g k c]` the columns that this call adds up."""
        return self.hide(x[:, :, self._columns])

    def hide(self, x: Tensor, value: float = 0.0) -> Tensor:
        """Something of the columns `[b g columns c]`, with a value where there is no text."""
        return x if self._text is None else x.masked_fill(~spread_heads(self._text, x.shape[1])[..., None], value)

    def ones(self, x: Tensor) -> Tensor:
        """A 1 for each column of text, `[b g columns 1]`."""
        return self.hide(torch.ones_like(x[..., :1]))

    def sums(self, name: str, x: Tensor, fade: Tensor | None = None) -> Tensor:
        """What `[b g columns c]` comes to over the keys of each query, `[b g n c]`; `[b g 1 c]` if all see the same."""
        if not self.causal:
            return x.sum(2, keepdim=True)
        before = self._before(name, fade)
        before = x[:, :, : self._past].sum(2) if before is None else before
        out = before[:, :, None] + x[:, :, self._past :].cumsum(2)
        self._keep(name, out[:, :, -1])
        return out

    def mixed(
        self,
        name: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        fade: Tensor | None = None,
        decay: Tensor | None = None,
        lift: Lift | None = None,
    ) -> Tensor:
        """The sum of (q k) v over the keys of each query, `[b h n c]`, of q `[b h n m]` and columns `[b g columns .]`.

        Under a `decay [h]` a key counts exp(-decay) less with each token of text after it, in calls that are causal.
        Features too wide for all tokens at once are what `lift` makes of a chunk of q or k.
        """
        if decay is not None and self.causal:
            return self._decayed(name, q, k, v, decay)
        if not self.causal:
            product = self._products(k, v, lift)
            if lift is None:
                return grouped(q, product)
            return torch.cat([grouped(lift(rows), product) for rows in q.split(self.chunk, 2)], 2)
        before = self._before(name, None if fade is None else fade[..., None])
        product = self._products(k[:, :, : self._past], v[:, :, : self._past], lift) if before is None else before
        k, v, out = k[:, :, self._past :], v[:, :, self._past :], []
        for start in range(0, q.shape[2], self.chunk):
            here = slice(start, start + self.chunk)
            rows, near, beside = q[:, :, here], k[:, :, here], v[:, :, here]
            if lift is not None:
                rows, near = lift(rows), lift(near)
            out.append(grouped(rows, product) + grouped(grouped(rows, near.mT).tril(), beside))
            product = product + near.mT @ beside
        self._keep(name, product)
        return torch.cat(out, 2)

    def highest(self, name: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The highest of `[b g columns c]` so far, `[b g 1 c]`, and the `fade` of sums that are made less it."""
        top = self.hide(x, torch.finfo(x.dtype).min).detach().amax(2)
        before = self._before(name, None)
        fade = None
        if before is not None:
            top = torch.maximum(top, before)
            fade = (before - top).exp()
        if self.causal:
            self._keep(name, top)
        return top[:, :, None], fade

    def exp(self, x: Tensor) -> Tensor:
        """exp of `[b g columns c]`, zero where there is no text."""
        return self.hide(x, torch.finfo(x.dtype).min).exp()

    def peaks(self, name: str, x: Tensor) -> Tensor:
        """The highest of `[b g columns c]`, none below 0, over the keys of each query; as with sums."""
        if not self.causal:
            return x.amax(2, keepdim=True)
        before = self._before(name, None)
        before = pad(x[:, :, : self._past], (0, 0, 1, 0)).amax(2) if before is None else before
        out = torch.maximum(before[:, :, None], x[:, :, self._past :].cummax(2).values)
        self._keep(name, out[:, :, -1])
        return out

    def averaged(self, name: str, scores: Tensor, v: Tensor) -> Tensor:
        """Means of `v [b g columns c]` under the softmax of `scores [b h columns]`, the same for all queries.

        A score counts from the highest that a query sees, so that none is too low beside one yet to come.
        """
        lowest = torch.finfo(scores.dtype).min
        scores, v = self.hide(scores[..., None], lowest)[..., 0], torch.cat([v, self.ones(v)], -1)
        past = self._past if self.causal else scores.shape[2]
        top, total = self._before(f"{name}, top", None), self._before(f"{name}, total", None)
        if top is None or total is None:
            old = scores[:, :, :past]
            top = pad(old, (0, 1), value=lowest).detach().amax(-1, keepdim=True)  # [b h 1]
            total = grouped((old - top).exp()[:, :, None], v[:, :, :past])  # [b h 1 c]
        if not self.causal:
            return divided(total)
        out = []
        pieces = zip(scores[:, :, past:].split(self.chunk, 2), v[:, :, past:].split(self.chunk, 2), strict=True)
        for near, beside in pieces:
            peaks = torch.maximum(top, near.detach().cummax(-1).values)[..., None]  # [b h rows 1]
            weights = (near[:, :, None] - peaks).clamp(max=0).exp().tril()
            out.append(grouped(weights, beside) + (top[..., None] - peaks).exp() * total)
            top, total = peaks[:, :, -1], out[-1][:, :, -1:]
        self._keep(f"{name}, top", top)
        self._keep(f"{name}, total", total)
        return divided(torch.cat(out, 2))

    def _products(self, k: Tensor, v: Tensor, lift: Lift | None) -> Tensor:
        """The sum of k v over all columns, `[b g m c]`."""
        if lift is None:
            return k.mT @ v
        product = lift(k[:, :, :0]).mT @ v[:, :, :0]
        for near, beside in zip(k.split(self.chunk, 2), v.split(self.chunk, 2), strict=True):
            product = product + lift(near).mT @ beside
        return product

    def _before(self, name: str, fade: Tensor | None) -> Tensor | None:
        """What earlier calls added up."""
        if not self.goes_on:
            return None
        return self._kept[name] if fade is None else self._kept[name] * fade

    def _keep(self, name: str, x: Tensor) -> None:
        self._kept[name], self._kept[END] = x, Until(self._end)

    def _decayed(self, name: str, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        """The same, one product a query head, each dated by the tokens of text so far."""
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        rate = decay.to(q)[:, None, None]  # [h 1 1]
        text = torch.ones_like(k[:1, :1, :, 0]) if self._text is None else self._text.to(q.dtype)
        clock = spread_heads(text, q.shape[1]).cumsum(-1)  # [b|1, h|1, columns]
        clock = pad(clock, (1, 0))[..., self._past :, None]  # its first is that of what lies before the first query
        product, out = self._before(name, None), []
        if product is None:
            old = slice(0, self._past)
            date = spread_heads(text, q.shape[1])[..., old].flip(-1).cumsum(-1).flip(-1)[..., None] - 1
            product = (k[:, :, old] * (-rate * date.clamp(min=0)).exp()).mT @ v[:, :, old]
        k, v = k[:, :, self._past :], v[:, :, self._past :]
        for start in range(0, q.shape[2], self.chunk):
            here = slice(start, start + self.chunk)
            then, date = clock[:, :, start : start + 1], clock[:, :, start + 1 : start + 1 + self.chunk]
            rows, near, beside = q[:, :, here], k[:, :, here], v[:, :, here]
            apart = (date - date.mT).clamp(min=0)
            pairs = (rows @ near.mT * (-rate * apart).exp()).tril()
            out.append((rows * (-rate * (date - then)).exp()) @ product + pairs @ beside)
            now = date[:, :, -1:]
            product = product * (-rate * (now - then)).exp() + (near * (-rate * (now - date)).exp()).mT @ beside
        self._keep(name, product)
        return torch.cat(out, 2)


def grouped(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` where `a [b h . .]` may have several heads for each of `b [b g . .]`; b is never expanded."""
    g = b.shape[1]
    return (a.reshape(a.shape[0], g, a.shape[1] // g * a.shape[2], a.shape[3]) @ b).view(*a.shape[:3], b.shape[3])


def wide(*given: Tensor) -> tuple[Tensor, ...]:
    """At least float32, which sums over a text want."""
    return tuple(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in given)


def divided(x: Tensor) -> Tensor:
    """All columns over the last, a sum of weights; zeros where that is none."""
    top, bottom = x[..., :-1], x[..., -1:]
    return top / torch.where(bottom > 0, bottom, 1.0)


def text_keys(call: Call, total: int, columns: slice = slice(None)) -> Tensor | None:
    """Which keys are text and not padding or an empty cache slot, `[b|1, g|1, columns]`; None: all."""
    row = replace(call, heads=call.kv_heads).tile(slice(0, 1), slice(0, total))
    found = row.keys.is_filled
    end = total if call.cross else past_keys(call, len(call.queries), total) + len(call.queries)
    if end < total:  # a static cache has room after the last token
        written = (torch.arange(total, device=call.keys.index.device) < end).view(1, 1, total)
        found = written if found is None else found & written
    for rule in call.mask.rules:
        if isinstance(rule, Padding):
            kept = rule.keeps(row.pairs)[..., 0, :]
            found = kept if found is None else found & kept
    return None if found is None else found[..., columns]


def past_keys(call: Call, n: int, total: int) -> int:
    """How many key columns stand before the first query; a cache may hold empty columns after the last one."""
    if call.queries.first is None or call.keys.first is None:
        return total - n
    return call.queries.first - call.keys.first
