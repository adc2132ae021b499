"""Mixed precision: autocast rests while a run computes, and what it left narrow is computed in at least float32.

Methods say themselves how precise they are. Under autocast their products would come out narrower than they ask for,
and narrower than what they are put beside.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.values import replace


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


_available = cache(torch.amp.is_autocast_available)


def mixed(x: object) -> bool:
    """Whether autocast is on where a tensor lies."""
    return isinstance(x, Tensor) and _available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def unmixed(x: Tensor) -> AbstractContextManager[object]:
    """A `with` in which autocast rests."""
    return torch.autocast(x.device.type, enabled=False)


def widened(call: Call) -> Call:
    """The call with all its tensors in at least float32."""
    given = {name: getattr(call, name) for name in ("hidden", "query", "key", "value", "bias")}
    return replace(call, **{name: wide(x) for name, x in given.items() if x is not None})
