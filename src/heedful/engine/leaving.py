"""A forward that nobody asked for leaves a model, and what it is called with, as they were."""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from heedful.engine.resting import resting, undone

_ATOMIC = (str, bytes, int, float, complex, type(None), type)
# torch's own: parts, parameters, hooks, whether they train; and where a run or a compiler stands in a module
_OF_MODULES = frozenset(vars(nn.Module())) - {"_buffers"} | {"forward", "_compiled_call_impl"}
_OF_OTHERS = sys.stdlib_module_names | {"torch", "heedful"}  # libraries whose things are no caller's cache
_CACHES = "heedful.adapters.kvcache"  # but for what a run makes of one


@contextmanager
def as_it_was(model: nn.Module, given: Any = None) -> Iterator[None]:
    """At rest, and with the tensors, the lists, the attributes and the random numbers that were there before."""
    before = Before(model, given)
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda), resting(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the forward that follows says it again
        with undone(before.back):
            yield


class Before:
    """What can be written to, in a model's modules and in what it is given, and what stood there."""

    def __init__(self, model: nn.Module, given: Any = None) -> None:
        self._known = set(map(id, (*model.parameters(), *model.modules())))  # and what is walked: all of it lives
        self._undo: list[Callable[[], Any]] = []
        for module in model.modules():
            self._attributes(module, _OF_MODULES)
        self._walk(given)

    def back(self) -> None:
        with torch.no_grad():
            for undo in self._undo:
                undo()

    def _walk(self, x: Any) -> None:
        if isinstance(x, _ATOMIC) or id(x) in self._known:
            return
        self._known.add(id(x))
        if isinstance(x, Tensor):
            if not (x.is_meta or is_lazy(x)):
                self._undo.append(_tensor(x))
            return
        if isinstance(x, torch.Generator):
            self._undo.append(partial(x.set_state, x.get_state()))
            return
        held: tuple[Any, ...] = ()
        if isinstance(x, dict):
            self._undo.append(_dict(x))
            held = tuple(x.values())
        elif isinstance(x, list | deque | set):
            self._undo.append(_filled(x))
            held = tuple(x)
        elif isinstance(x, tuple):
            held = x
        for one in held:
            self._walk(one)
        home = type(x).__module__
        if (home.partition(".")[0] not in _OF_OTHERS or home == _CACHES) and not isinstance(x, nn.Module):
            self._attributes(x, frozenset())

    def _attributes(self, x: Any, but: frozenset[str]) -> None:
        """What stands in an object under names of its own."""
        there = getattr(x, "__dict__", None)
        if isinstance(there, dict):
            mine = {name: one for name, one in there.items() if name not in but}
            self._undo.append(_names(x, mine, but))
            for one in mine.values():
                self._walk(one)


def _tensor(x: Tensor) -> Callable[[], None]:
    kept, version = x.detach().clone(), None if x.is_inference() else x._version

    def undo() -> None:
        if version is None and not torch.equal(x, kept):
            with torch.inference_mode():
                x.copy_(kept)
        elif version is not None and x._version != version:
            x.copy_(kept)

    return undo


def _dict(x: dict[Any, Any]) -> Callable[[], None]:
    kept = dict(x)

    def undo() -> None:
        if not _alike(x, kept):
            x.clear()
            x.update(kept)

    return undo


def _filled(x: Any) -> Callable[[], None]:
    kept = list(x)

    def undo() -> None:
        if list(map(id, x)) != list(map(id, kept)):
            x.clear()
            (x.update if isinstance(x, set) else x.extend)(kept)

    return undo


def _names(x: Any, kept: dict[str, Any], but: frozenset[str]) -> Callable[[], None]:
    kind, there = type(x), vars(x)

    def undo() -> None:
        now = {name: one for name, one in there.items() if name not in but}
        if type(x) is not kind or _alike(now, kept):
            return  # a part that became another once it knew its sizes stays what it is
        for name in now.keys() - kept.keys():
            del there[name]
        there.update(kept)

    return undo


def _alike(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)
