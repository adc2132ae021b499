"""What a model's modules keep from one forward to the next, such as a cache of their own, and the way back to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

DEEP = 4  # how far into what a module holds things are followed
_ELSEWHERE = frozenset(vars(nn.Module())) - {"_buffers"} | {"forward", "_compiled_call_impl"}  # what a run puts there
_PLAIN = nn.Module | type | FunctionType | MethodType | ModuleType


class Kept:
    """Buffers, attributes, and what lies in lists, dicts and objects there, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: set[int] = set()
        self._undo: list[Callable[[], object]] = []
        for module in model.modules():
            before = {name: x for name, x in vars(module).items() if name not in _ELSEWHERE}
            self._undo.append(partial(_named, vars(module), before, _ELSEWHERE))
            self._note(before.values(), DEEP)

    def put_back(self) -> None:
        with torch.no_grad():
            for undo in self._undo:
                undo()

    def _note(self, given: Iterable[Any], deep: int) -> None:
        for x in given:
            ours = type(x).__module__.startswith("heedful.")  # what a run counts stays counted
            if id(x) not in self._seen and not ours and not isinstance(x, _PLAIN):
                self._seen.add(id(x))
                inside = self._held(x)
                if deep:
                    self._note(inside, deep - 1)

    def _held(self, x: Any) -> Iterable[Any]:
        """What lies in something that may change, of which the way back is known now."""
        if isinstance(x, Tensor):
            if not (x.is_meta or x.is_inference() or nn.parameter.is_lazy(x)):
                self._undo.append(partial(_copied, x, x._version, x.clone()))
            return ()
        if isinstance(x, list | deque):
            self._undo.append(partial(_listed, x, tuple(x)))
            return tuple(x)
        if isinstance(x, tuple):
            return x
        own = x if isinstance(x, dict) else getattr(x, "__dict__", None)
        if not isinstance(own, dict):
            return ()
        self._undo.append(partial(_named, own, dict(own)))
        return tuple(own.values())


def _named(own: dict[Any, Any], before: dict[Any, Any], others: frozenset[str] = frozenset()) -> None:
    for name in [name for name in own if name not in before and name not in others]:
        del own[name]
    for name, x in before.items():
        if name not in own or own[name] is not x:
            own[name] = x


def _listed(own: list[Any] | deque[Any], before: tuple[Any, ...]) -> None:
    if tuple(map(id, own)) != tuple(map(id, before)):
        own.clear()
        own.extend(before)


def _copied(x: Tensor, version: int, before: Tensor) -> None:
    if x._version != version:
        x.copy_(before)
