"""Modules that are built around a linear map: they clip or scale what it gives, or do nothing at all."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Any

from torch import Tensor, fx, nn


def linear_in(module: nn.Module) -> nn.Linear | None:
    """The linear map that a module is built around, which is all that it holds."""
    parts = [*module.children()]
    return parts[0] if len(parts) == 1 and isinstance(parts[0], nn.Linear) else None


def whatever_is_around(owner: nn.Module, names: Iterable[str]) -> nn.Linear | None:
    """The linear map under the first of these names that there is, in what is built around it."""
    children = dict(owner.named_children())
    found = next((children[name] for name in names if name in children), None)
    return found if found is None or isinstance(found, nn.Linear) else linear_in(found)


def gives_alone(module: nn.Module) -> str | None:
    """The name of the linear map in a module that gives what that map gives, and does nothing around it.

    The forward of a copy is followed as torch.fx does it, in training and at rest, so that what it counts or keeps is
    left as it was; one that cannot be followed may do anything.
    """
    if linear_in(module) is None or "forward" in vars(module):
        return None
    ((name, _),) = module.named_children()
    return name if all(_is_alone(name, module, training) for training in (False, True)) else None


def _is_alone(name: str, module: nn.Module, training: bool) -> bool:
    """Whether a forward hands what it is given to a part, and gives what that gives."""
    other = _beside(module)
    other.training = training  # not its part's, which is the module's own
    try:
        nodes = [*_Calls().trace(other).nodes]
    except Exception:  # noqa: BLE001 - a forward asks in its own way for what fx does not tell
        return False
    given, done = nodes[0], [node for node in nodes if node.op != "placeholder"]
    calls = [(node.op, node.target, node.args, node.kwargs) for node in done]
    return calls == [("call_module", name, (given,), {}), ("output", "output", (done[0],), {})]


def _beside(module: nn.Module) -> nn.Module:
    """A module with the same parts and parameters, and with buffers and whatever else it may write to of its own."""

    def own(x: Any) -> Any:
        return x.clone() if isinstance(x, Tensor) else copy(x)

    other = type(module).__new__(type(module))
    vars(other).update({name: own(x) for name, x in vars(module).items()})
    vars(other)["_buffers"] = {name: own(x) for name, x in module._buffers.items()}
    return other


class _Calls(fx.Tracer):
    """Follows a forward, and none of the modules that it calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True
