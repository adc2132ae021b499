"""What a run puts into a model's modules: hooks, and what stands for a function of theirs.

Each hook is known before it is there, so that an interrupt leaves none behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from heedful.adapters.compiled import as_written

# where a module keeps a hook, under one number, the hook itself last; an interrupt may come before torch's handle does
_PLACES = (
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_hooks",
)  # fmt: skip


class Hook:
    """A hook of a run, called as it is written; copies and files of the module have one that does nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = as_written(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> Any:
        return NoHook, ()


class NoHook:
    """What is left of a hook in a copy."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(eq=False)
class Hooked:
    """Hooks, and what stands for functions, that are taken away together."""

    _all: list[tuple[nn.Module, Hook]] = field(default_factory=list)
    _standing: list[Standing] = field(default_factory=list)

    def before(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Show `function` a module, what it is called with, and what by name."""
        module.register_forward_pre_hook(self._known(module, function), with_kwargs=True)

    def after(self, module: nn.Module, function: Callable[..., Any], **how: bool) -> None:
        """Show `function` a module, what it was called with, and what it gave, as torch's hooks are shown it."""
        module.register_forward_hook(self._known(module, function), **how)

    def stand(self, standing: Standing) -> None:
        """Put it into its module."""
        self._standing.append(standing)
        standing.begin()

    def _known(self, module: nn.Module, function: Callable[..., Any]) -> Hook:
        self._all.append((module, Hook(function)))
        return self._all[-1][1]

    def remove(self) -> None:
        while self._standing:
            self._standing[-1].end()
            self._standing.pop()
        while self._all:
            module, hook = self._all[-1]
            kept = (module._forward_pre_hooks, module._forward_hooks)
            for number in [number for found in kept for number, there in found.items() if there is hook]:
                for place in _PLACES:
                    getattr(module, place).pop(number, None)
            self._all.pop()


@dataclass(eq=False)
class Standing:
    """Put into a module under the name of one of its functions; knows the way back, and what stood there."""

    NAME: ClassVar[str]

    module: nn.Module
    before: Any = field(default=None, kw_only=True)

    def begin(self) -> None:
        self.before = vars(self.module).get(self.NAME)
        vars(self.module)[self.NAME] = self

    def end(self) -> None:
        if vars(self.module).get(self.NAME) is not self:
            return  # somebody put something else there, and around this one
        if self.before is None:
            del vars(self.module)[self.NAME]
        else:
            vars(self.module)[self.NAME] = self.before

    def own(self, *args: Any, **more: Any) -> Any:
        """What the module does of itself."""
        kind: Any = type(self.module)
        return self.before(*args, **more) if self.before else getattr(kind, self.NAME)(self.module, *args, **more)

    def __reduce__(self) -> Any:
        """In copies and files of the module, what that has of itself."""
        if self.before is not None:
            return _same, (self.before,)
        return getattr, (self.module, self.NAME)  # of a module that is being made: its class's own


def _same(x: Any) -> Any:
    return x
