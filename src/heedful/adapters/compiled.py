"""torch.compile beside a run: whatever holds a hook is called as it is written, by compiled code too.

Compiled code does not look whether hooks have come or gone since it was made. But a module of PyTorch that was compiled
in place calls what it keeps as `_compiled_call_impl` instead of itself, compiled code does the same, and neither copies
nor files take that along; so this is where a call can be led past the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule

PLACE = "_compiled_call_impl"
_REASON = (
    "a heedful run is attached to this model, which runs as it is written until the run is closed; close it first, or "
    "compile without fullgraph=True"
)


def as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which the compiler leaves alone with all that it calls."""
    return torch.compiler.disable(function, reason=_REASON)


def lead_past(model: nn.Module) -> Callable[[], None]:
    """Have every module with hooks, and every one that was compiled, called as it is written; gives the way back."""
    led: list[tuple[nn.Module, Any, Any]] = []
    compiled = {id(m._orig_mod) for m in model.modules() if isinstance(m, OptimizedModule)}
    for module in model.modules():
        if isinstance(module, OptimizedModule):
            continue  # a shell, which hands every attribute on
        before = vars(module).get(PLACE)
        if before or module._forward_hooks or module._forward_pre_hooks or id(module) in compiled:
            mine = as_written(module._call_impl)
            setattr(module, PLACE, mine)
            led.append((module, mine, before))

    def undo() -> None:
        for module, mine, before in led:
            if vars(module).get(PLACE) is not mine:
                continue  # compiled anew since
            if before is None:
                delattr(module, PLACE)
            else:
                setattr(module, PLACE, before)

    return undo
