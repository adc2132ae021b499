"""The kernels as operators of torch's: its compiler and its exports take them as they are, and autograd knows them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.gpu import launch
from heedful.gpu.launch import Answer, Problem, Pulled, Step

_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor ranges, float scale, float? softcap, Tensor? bias, Tensor? sink, "
    "Tensor? table, SymInt block, Tensor? is_text, Tensor? carry, Tensor? first_at, bool entropy, bool place, "
    "bool received, SymInt offset, SymInt reach, str form, float shift, bool mean"
)  # the fields of a Problem
_STEP = (
    "Tensor q, Tensor k, Tensor v, Tensor ends, float scale, SymInt keys, SymInt longest, float? softcap, "
    "Tensor? bias, Tensor? sink, Tensor? places, Tensor? base, bool weights, str form, float shift, bool mean"
)  # those of a Step
BIAS, SINK = 6, 7  # of a Problem's fields
OUT, LSE, RECEIVED = 0, 1, 7  # of an Answer's
ONCE = "the kernel for GPUs has no second derivatives, and create_graph=True asks for them"


def attend(p: Problem) -> Answer:
    """`launch.attend` as an operator: gradients of heads and of what keys received go back to all that it was given.

    That is queries, keys, values, bias and sink.
    """
    return _answer(p, _attend(*p.parts))


def step(p: Step) -> tuple[Tensor, Tensor | None]:
    """`launch.step` as an operator, which has no way back."""
    heads, weights = _step(*p.parts)
    return heads, weights if p.weights else None


def _asked(p: Problem) -> tuple[bool, ...]:
    """Which parts of an answer are asked for."""
    first, carried = p.first_at is not None, p.carry is not None
    return True, True, p.entropy, p.place, p.place, first, carried, p.received, p.reach > 0


def _answer(p: Problem, found: tuple[Tensor, ...]) -> Answer:
    told = [x if there else None for x, there in zip(found, _asked(p), strict=True)]
    return Answer(*(x if x is None or i in (OUT, RECEIVED) else x.detach() for i, x in enumerate(told)))  # type: ignore[arg-type]


def _listed(p: Problem, answer: Answer) -> tuple[Tensor, ...]:
    """An operator gives tensors alone: an empty one stands for what was not asked for."""
    parts = vars(answer).values()
    return tuple(p.q.new_empty(0) if x is None else x for x in parts)


@torch.library.custom_op("heedful::attend", mutates_args=(), schema=f"({_CALL}) -> ({', '.join(['Tensor'] * 9)})")
def _attend(*given: Any) -> tuple[Tensor, ...]:
    p = Problem(*given)
    return _listed(p, launch.attend(p))


@_attend.register_fake
def _(*given: Any) -> tuple[Tensor, ...]:
    p = Problem(*given)
    (b, h, n, _), m, e = p.q.shape, p.k.shape[2], p.v.shape[3]
    c = 0 if p.carry is None else p.carry.shape[2]

    def empty(*shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return p.q.new_empty(shape, dtype=dtype)

    row = (b, h, n)
    found = (
        empty(b, n, h, e).transpose(1, 2), empty(*row), empty(*row), empty(*row), empty(*row, dtype=torch.int32),
        empty(*row), empty(b, n, c), empty(b, h, m), empty(b, h, p.reach),
    )  # fmt: skip
    return tuple(x if there else p.q.new_empty(0) for x, there in zip(found, _asked(p), strict=True))


@torch.library.custom_op(
    "heedful::pull", mutates_args=(),
    schema=f"(Tensor out, Tensor lse, Tensor heads, Tensor? columns, bool to_bias, bool to_sink, {_CALL}) -> "
           f"({', '.join(['Tensor'] * 5)})",
)  # fmt: skip
def _pull(
    out: Tensor, lse: Tensor, heads: Tensor, columns: Tensor | None, to_bias: bool, to_sink: bool, *parts: Any
) -> tuple[Tensor, ...]:
    p = Problem(*parts)
    made = launch.pull(p, Pulled(out, lse, heads, columns), to_bias, to_sink)
    return tuple(p.q.new_empty(0) if x is None else x for x in made)


@_pull.register_fake
def _(
    out: Tensor, lse: Tensor, heads: Tensor, columns: Tensor | None, to_bias: bool, to_sink: bool, *parts: Any
) -> tuple[Tensor, ...]:
    p = Problem(*parts)
    wanted = (True, p.q), (True, p.k), (True, p.v), (to_bias, p.bias), (to_sink, p.sink)
    shapes = (x.shape if there and x is not None else (0,) for there, x in wanted)
    return tuple(p.q.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.save_for_backward(output[OUT], output[LSE], *(inputs[i] for i in ctx.places))
    ctx.set_materialize_grads(False)  # what received sums are not given costs no pass


def _way_back(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError(ONCE)
    out, lse, *tensors = ctx.saved_tensors
    parts = list(ctx.rest)
    for i, x in zip(ctx.places, tensors, strict=True):
        parts[i] = x
    p = Problem(*parts)
    heads, columns = given[OUT], given[RECEIVED] if p.received else None
    if heads is None and columns is None:
        return (None,) * len(parts)
    heads = torch.zeros_like(out) if heads is None else heads
    p = replace(p, entropy=False, place=False, received=False, carry=None, first_at=None, reach=0)
    wanted = ctx.needs_input_grad
    made = _pull(out, lse, heads, columns, wanted[BIAS], wanted[SINK], *p.parts)
    back: list[Tensor | None] = [None] * len(parts)
    for i, new in zip((0, 1, 2, BIAS, SINK), made, strict=True):
        if wanted[i]:
            back[i] = new.to(parts[i].dtype)
    return tuple(back)


_attend.register_autograd(_way_back, setup_context=_remember)


@torch.library.custom_op("heedful::step", mutates_args=(), schema=f"({_STEP}) -> (Tensor, Tensor)")
def _step(*given: Any) -> tuple[Tensor, Tensor]:
    p = Step(*given)
    heads, weights = launch.step(p)
    return heads, p.q.new_empty(0) if weights is None else weights


@_step.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor]:
    p = Step(*given)
    b, h = p.q.shape[:2]
    weights = p.q.new_empty((b, h, p.keys) if p.weights else (0,), dtype=torch.float32 if p.weights else p.q.dtype)
    return p.q.new_empty((b, h, 1, p.v.shape[-1]), dtype=torch.float32), weights
