"""Who computes an attention map in a forward, seen from outside: softmax and kernel calls that are not heedful's."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_F = torch.nn.functional
_SOFTMAX = {_F.softmax, torch.softmax, torch.Tensor.softmax}
_KERNELS = {_F.scaled_dot_product_attention, _F.multi_head_attention_forward}
_NOT_OURS = ("/torch/", "/contextlib.py", "/heedful/adapters/")  # the last looks on, and makes no map


def attention_kinds(model: nn.Module) -> set[str]:
    """Classes of modules in the model that call themselves attention."""
    return {type(m).__name__ for m in model.modules() if "attention" in type(m).__name__.lower()}


class Witness(TorchFunctionMode):
    """Collects `file:function` of each place that makes a map of four axes, or of three, or calls a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KERNELS or (func in _SOFTMAX and isinstance(args[0], torch.Tensor) and args[0].ndim >= 3):
            place = _place()
            if place is not None:
                self.maps.add(place)
        return func(*args, **(kwargs or {}))


def _place() -> str | None:
    """The first frame outside torch; None when heedful stands on the way."""
    frame: FrameType | None = sys._getframe(2)
    found = None
    while frame is not None:
        code = frame.f_code
        if "/heedful/" in code.co_filename and "/engine/" in code.co_filename:
            return None
        if found is None and not any(part in code.co_filename for part in _NOT_OURS):
            owner = type(frame.f_locals["self"]).__name__ + "." if "self" in frame.f_locals else ""
            found = f"{code.co_filename.rsplit('/', 1)[-1]}:{owner}{code.co_name}"
        frame = frame.f_back
    return found
