"""Parts that share queries, by the native kernel: a query's rows are put together by their sums, there and back."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heedful.core.mask import Dense, Mask
from heedful.core.ragged import padded
from heedful.core.rules import Parts
from heedful.core.values import replace
from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends.native_call import Asked, attended, point, pulled
from heedful.engine.backends.parted import Fold, folded
from heedful.engine.backends.tiled import Tiled
from heedful.engine.needs import Needs
from heedful.engine.plan import NO_STEPS
from heedful.engine.run_state import RunState
from heedful.native import Library


def merged(kernel: Library, job: AttentionCall, parts: tuple[Parts, ...], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads of a call whose queries stand in several parts."""
    q, k, v = padded(q).contiguous(), padded(k).contiguous(), padded(v).contiguous()  # each fold takes lines of them
    plain = replace(job, plan=NO_STEPS, spare=None)
    return _Merged.apply(q, k, v, kernel, plain, [fold for part in parts for fold in folded(part, (q, k, v))])


class _Piece(NamedTuple):
    """Some of the parts as the kernel has computed them, and which rows of the call theirs are."""

    asked: Asked
    at: Tensor  # of heads, queries and texts together, [b h|1 r]; one behind the last for nobody's


def _pieced(kernel: Library, job: AttentionCall, fold: Fold, tensors: tuple[Tensor, ...]) -> tuple[_Piece, Tensor]:
    """The parts of a fold, each by its own sums, and what comes of them `[b h|1 r e]`."""
    q, k, v = tensors
    call, *own = fold.gathered(job.call, (q, k, v))
    call = replace(call, mask=Mask() if call.keep is None else Mask((Dense(call.keep, apart=True),)), keep=None)
    needs = Needs(call=call, tensors=(own[0], own[1], own[2]))
    asked, out = attended(kernel, replace(job, call=call, needs=needs), (own[0], own[1], own[2]), back=True)
    return _Piece(asked, fold.numbers(fold.rows, q.shape[1], q.shape[2])), out


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: Library, job: AttentionCall, folds: list[Fold]
    ) -> Tensor:
        (texts, heads, queries, _), width = q.shape, v.shape[-1]
        found = [_pieced(kernel, job, fold, (q, k, v)) for fold in folds]
        at = torch.cat([piece.at.flatten() for piece, _ in found])
        top, inverse = torch.cat([piece.asked.held["rows"].view(-1, 2) for piece, _ in found]).unbind(-1)
        out = torch.cat([x.reshape(-1, width).float() for _, x in found])
        many = texts * heads * queries + 1  # the last is for nobody
        blind = inverse == 0  # a row of a part that sees nothing
        highest = top.new_full((many,), -torch.inf).scatter_reduce(0, at, top.masked_fill(blind, -torch.inf), "amax")
        highest = highest.masked_fill(highest.isinf(), 0.0)
        share = ((top - highest[at]).exp2() / inverse).masked_fill(blind, 0.0)
        whole = top.new_zeros(many).index_add(0, at, share)
        part = (share / whole[at]).masked_fill(blind, 0.0)
        merged = out.new_zeros(many, width).index_add(0, at, out * part[:, None])
        rows = torch.stack([highest, (1 / whole).masked_fill(whole == 0, 0.0)], -1)
        held = [piece.asked.held for piece, _ in found]
        ctx.names = [tuple(name for name in each if name != "rows") for each in held]
        saved = (each[name] for each, names in zip(held, ctx.names, strict=True) for name in names)
        ctx.save_for_backward(q, k, v, merged, rows, *saved)
        ctx.kernel, ctx.folds, ctx.problems = kernel, folds, [piece.asked.problem for piece, _ in found]
        ctx.call = job.call
        ctx.fresh = partial(RunState, job.run_state.stack, job.run_state.params)
        return merged[:-1].view(texts, heads, queries, width).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, merged, rows, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants to derive once more
            job = AttentionCall(NO_STEPS, ctx.fresh(), ctx.call, needs=Needs(call=ctx.call, tensors=(q, k, v)))
            heads, asks = Tiled()(job, q, k, v)[0], ctx.needs_input_grad[:3]
            wanted = [x for x, asked in zip((q, k, v), asks, strict=True) if asked]
            found = iter(torch.autograd.grad(heads, wanted, given.to(heads.dtype), create_graph=True))
            return *(next(found) if asked else None for asked in asks), None, None, None
        due = torch.cat([given.float().reshape(-1, given.shape[-1]), given.new_zeros(1, given.shape[-1]).float()])
        made, left = [torch.zeros(x.shape, dtype=torch.float32) for x in (q, k, v)], iter(saved)
        for fold, problem, names in zip(ctx.folds, ctx.problems, ctx.names, strict=True):
            at = fold.numbers(fold.rows, q.shape[1], q.shape[2])
            _, *own = fold.gathered(ctx.call, (q, k, v))
            own_rows = rows[at.flatten()]
            for name, x in [*((name, next(left)) for name in names), ("rows", own_rows)]:
                point(problem, name, x)
            theirs, gave = (x[at.flatten()].view(*at.shape, x.shape[-1]) for x in (merged, due))
            given_back = pulled(ctx.kernel, problem, own, theirs, gave, None, False)
            for to, new, where in zip(made, given_back, (fold.rows, *(fold.cols,) * 2), strict=True):
                fold.add(to, new, where)
        return *(x.to(like.dtype) for x, like in zip(made, (q, k, v), strict=True)), None, None, None
