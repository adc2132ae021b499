"""torch.compile beside a run: whatever holds a hook is called as it is written, by compiled code too.

Compiled code does not look whether hooks have come or gone since it was made. But a module of PyTorch that was compiled
in place calls what it keeps as `_compiled_call_impl` instead of itself, compiled code does the same, and neither copies
nor files take that along; so this is where a call can be led past the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.jit._trace import is_tracing

from heedful.core.errors import RefusedModel

PLACE = "_compiled_call_impl"
_REASON = (
    "a heedful run is attached to this model, which runs as it is written until the run is closed; close it first, or "
    "compile without fullgraph=True"
)


def as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which the compiler leaves alone with all that it calls."""
    return torch.compiler.disable(function, reason=_REASON)


def require_written_down(name: str, backend: str) -> None:
    """What writes a model down holds what torch was asked for: not what kernels did, nor what else values decide."""
    ways = "Close the run first, or fold() the stack into the weights"
    if is_tracing():
        raise RefusedModel(
            f"torch.jit.trace cannot write down {name} while a run computes its attention: part of it would be "
            f"missing, without a word. {ways}"
        )
    if torch.compiler.is_exporting() and backend != "sdpa":
        raise RefusedModel(
            f"torch.export cannot write down {name} under this stack, which is computed by {backend}: values decide "
            f"there what is done, and `heedful explain` says why not by sdpa. {ways}"
        )


@dataclass(eq=False)
class WrittenCalls:
    """Has every module with hooks, and every one that was compiled, called as it is written; knows the way back."""

    _led: list[tuple[nn.Module, Any, Any]] = field(default_factory=list)

    def lead_past(self, model: nn.Module) -> None:
        compiled = {id(m._orig_mod) for m in model.modules() if isinstance(m, OptimizedModule)}
        for module in model.modules():
            if isinstance(module, OptimizedModule):
                continue  # a shell, which hands every attribute on
            before = vars(module).get(PLACE)
            if before or module._forward_hooks or module._forward_pre_hooks or id(module) in compiled:
                mine = as_written(module._call_impl)
                self._led.append((module, mine, before))  # first, so that none is lost to an interrupt
                setattr(module, PLACE, mine)

    def undo(self) -> None:
        while self._led:
            module, mine, before = self._led[-1]
            if vars(module).get(PLACE) is mine:  # else it was compiled anew since
                if before is None:
                    delattr(module, PLACE)
                else:
                    setattr(module, PLACE, before)
            self._led.pop()
