"""Scores of a tile that are no products: a small net over the sum of query and key, and what a model adds to them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from heedful.core.call import Call
from heedful.core.errors import SiteError
from heedful.core.flags import traced
from heedful.core.method import Method
from heedful.kit.rows import LEAST
from heedful.kit.running import wide

PIECE = 1 << 17  # pairs whose units are added up at once: two maps of so many lie in a core's own cache


def operands(method: Method, call: Call) -> tuple[Tensor, Tensor]:
    """The tile's queries `[b h r d]` and keys `[b g k d]`."""
    if call.query is None or call.key is None:
        raise SiteError(f"{method!r}, layer {call.layer}: scores are those of a tile, from SCORES on")
    return call.query[:, :, call.rows], call.key[:, :, call.cols]


def additive(query: Tensor, key: Tensor, of_query: Tensor, of_key: Tensor, out: Tensor) -> Tensor:
    """out . tanh(of_query q_i + of_key k_j), `[b h r k]`: queries `[b h r d]`, keys `[b h k d]`, out `[1 n]`."""
    q, k, v = wide(linear(query.to(of_query.dtype), of_query), linear(key.to(of_key.dtype), of_key), out[0])
    if traced(q, k, v) or not _bounded(q, k):
        return _bent(q, k) @ v
    found: Tensor = _Additive.apply(q, k, v)
    return found


def _bent(q: Tensor, k: Tensor) -> Tensor:
    """tanh(q_i + k_j) of all pairs and units at once, `[b h r k n]`."""
    return (q[:, :, :, None] + k[:, :, None]).tanh()


class _Additive(torch.autograd.Function):
    """v . tanh(q_i + k_j), by tanh(x + y) = 1 - 2 / (1 + exp 2x exp 2y): exponentials are those of rows and of keys.

    On a CPU a product and a quotient for each pair and unit take a tenth of the time of torch's tanh. Nothing of pairs
    is kept for the way back.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        found = v.sum().expand(*q.shape[:3], k.shape[2]).clone()
        for here, sums in _pieces(q, k):
            piece = found.flatten(0, 1)[here]
            for weight, below in zip(v.unbind(), sums, strict=True):
                piece.addcdiv_(weight, below, value=-2.0)
        return found

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        if torch.is_grad_enabled():  # what is derived again wants steps that torch knows
            bent = _bent(q, k)
            each = given[..., None] * v * (1 - bent.square())
            return each.sum(3), each.sum(2), (given[..., None] * bent).flatten(0, -2).sum(0)
        to_q, to_k, to_v = torch.zeros_like(q), torch.zeros_like(k), given.sum().repeat(len(v))
        for here, sums in _pieces(q, k):
            piece = given.flatten(0, 1)[here]
            of_rows, of_keys = to_q.flatten(0, 1)[here].unbind(-1), to_k.flatten(0, 1)[here[0]].unbind(-1)
            share, slope = torch.empty_like(piece), torch.empty_like(piece)
            for row, key, total, below in zip(of_rows, of_keys, to_v.unbind(), sums, strict=True):
                total -= 2 * torch.div(piece, below, out=share).sum()
                torch.addcdiv(share, share, below, value=-1.0, out=slope)  # a fourth of what tanh rises by
                row.copy_(slope.sum(-1))
                key += slope.sum(-2)
        return to_q.mul_(4 * v), to_k.mul_(4 * v), to_v


def _bounded(*given: Tensor) -> bool:
    """Whether exponentials of twice these are numbers; those of larger ones would no longer tell them apart."""
    return all(bool((2 * x.abs()).exp().isfinite().all()) for x in given)


def _pieces(q: Tensor, k: Tensor) -> Iterator[tuple[tuple[slice, slice], Iterator[Tensor]]]:
    """Heads and rows of piece after piece, and 1 + exp 2(q_i + k_j) of it `[h r k]`, unit after unit."""
    a, b = (2 * q.flatten(0, 1)).exp(), (2 * k.flatten(0, 1)).exp().mT.contiguous()
    (maps, rows), keys = a.shape[:2], b.shape[2]
    one = a.new_ones(1, 1, keys)
    many, step = max(1, PIECE // (rows * keys)), max(LEAST, PIECE // keys)  # some whole maps, or some rows of one
    for here in itertools.product(_cut(maps, many), _cut(rows, step)):
        x, y = a[here], b[here[0]]
        room = x.new_empty(*x.shape[:2], keys)
        pairs = zip(x.split(1, -1), y.split(1, -2), strict=True)
        yield here, (torch.addcmul(one, row, key, out=room) for row, key in pairs)


def _cut(total: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, total, step)]


def biased(scores: Tensor, call: Call) -> Tensor:
    """The same with what the model adds to the tile's scores, such as a bias by distance."""
    if call.bias is None:
        return scores
    rows = slice(None) if call.bias.shape[2] == 1 else call.rows
    return scores + call.bias[:, :, rows][..., call.cols].to(scores.dtype)
