"""`F.multi_head_attention_forward` with another kernel in it: the function itself, as torch wrote it."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from heedful.adapters.operations.finding import MULTI_HEAD, MULTI_HEAD_SIGNATURE, by_name

Kernel = Callable[[dict[str, Any], bool], tuple[Tensor, Tensor | None]]


class Untouched(Exception):
    """The function does what it would have done."""


def _never(_: Any) -> bool:
    return False


def through_kernel(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The function's answer where `kernel` computes heads, and the pattern if weights are wanted.

    Asked for weights it would compute them without any kernel; so it is not asked, and they come from ours.
    """
    bound = MULTI_HEAD_SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given, kept = dict(bound.arguments), list[Any]()
    wanted = given["need_weights"]

    def attend(*tensors: Any, **more: Any) -> Tensor:
        heads, *weights = kernel(by_name(tensors, more), wanted)
        kept.extend(weights)
        return heads

    try:
        output, _ = _with(attend)(**{**given, "need_weights": False})
    except Untouched:
        return MULTI_HEAD(*args, **kwargs)
    if not wanted:
        return output, None
    (weights,) = kept
    weights = weights.mean(1) if given["average_attn_weights"] else weights
    return output, weights if given["query"].ndim == 3 else weights.squeeze(0)


def _with(attend: Callable[..., Tensor]) -> Callable[..., Any]:
    """torch's function over other names: nothing of torch itself is changed, for this thread or any other."""
    names = {**vars(F), "scaled_dot_product_attention": attend, "has_torch_function": _never}
    function: Any = MULTI_HEAD
    new = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    new.__kwdefaults__ = function.__kwdefaults__
    return new
