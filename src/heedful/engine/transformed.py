"""What outlives a call under torch.func, where a tensor may stand for many inputs and must not leave the transform."""

from __future__ import annotations

from torch import Tensor
from torch._C import _functorch

from heedful.core.stats import Statistic, merged


def plain(x: Tensor) -> Tensor:
    """The numbers of all inputs, without the transforms around them."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


def summed(statistic: Statistic) -> Statistic:
    """What all inputs that a statistic stands for add up to."""
    tensors = statistic.tensors()
    level = max(map(_functorch.maybe_get_level, tensors.values()), default=-1)
    if level < 0:
        return statistic
    inner, inputs = dict(tensors), dict[str, Tensor]()
    for name, x in tensors.items():
        if _functorch.maybe_get_level(x) == level:
            inner[name] = _functorch.get_unwrapped(x)
            if _functorch.is_batchedtensor(x):
                inputs[name] = inner[name].movedim(_functorch.maybe_get_bdim(x), 0)
    many = len(next(iter(inputs.values()))) if inputs else 1
    each = (statistic.having({**inner, **{name: x[i] for name, x in inputs.items()}}) for i in range(many))
    return merged(map(summed, each))
