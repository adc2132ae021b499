"""What stands in an attention module of a model that is not served through transformers' interface."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from heedful.adapters.bound import Bound
from heedful.adapters.hooked import Standing
from heedful.adapters.operations.finding import MULTI_HEAD, SDPA, kept_by
from heedful.adapters.operations.scores import Asked
from heedful.adapters.operations.torch_masks import joined
from heedful.adapters.operations.written import Trail
from heedful.core.errors import NotEntered, RefusedModel


class Answers(Protocol):
    """What answers for the modules of one model."""

    installed: bool

    @property
    def answering(self) -> bool: ...

    def same_thread(self, bound: Bound) -> None: ...

    def is_layer(self, bound: Bound, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool: ...

    def kernel(self, bound: Bound, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor: ...

    def function(self, bound: Bound, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def written(self, bound: Bound, asked: Asked | str) -> tuple[Tensor, Tensor | None] | None: ...

    def unforeseen(self, name: str, why: str, around: nn.Module | None) -> RefusedModel: ...


@dataclass(eq=False)
class _Forward(Standing):
    """Stands for a module's `forward`."""

    NAME = "forward"

    server: Answers

    @property
    def __signature__(self) -> inspect.Signature:
        kind: Any = type(self.module)
        return inspect.signature(self.before or kind.forward.__get__(self.module))


@dataclass(eq=False)
class Entrance(_Forward):
    """That of an attention module: what it calls of torch's attention comes to the run."""

    bound: Bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.server.installed or self.server.answering:
            return self.own(*args, **kwargs)  # somebody who wrapped this one while the run was there still calls it
        self.server.same_thread(self.bound)
        if not self.server.is_layer(self.bound, args, kwargs):
            return self.own(*args, **kwargs)
        if self.bound.written is None:
            with _Inside(self.server, self.bound):
                return self.own(*args, **kwargs)
        with _Writing(self.server, self.bound) as writing:
            return writing.put(self.own(*args, **kwargs))


@dataclass(eq=False)
class Watched(_Forward):
    """That of a module which may compute attention, though nothing says that it does: it is refused if it does."""

    name: str
    around: nn.Module | None  # the model that it is in, where the one that is served is in that too

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.server.installed or self.server.answering:
            return self.own(*args, **kwargs)
        with _Watching(self):
            return self.own(*args, **kwargs)


class _Watching(TorchFunctionMode):
    """Looks whether a module computes attention."""

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self.watched, self.trail = watched, Trail()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked = self.trail.asked(func, args, kwargs)
        if asked is not None or func in (SDPA, MULTI_HEAD):
            it = self.watched
            raise it.server.unforeseen(it.name, "nothing in its class says that it does", it.around)
        out = func(*args, **kwargs)
        self.trail.follow(func, args, kwargs, out)
        return out


class _Inside(TorchFunctionMode):
    """Leads torch's attention to a run. It is on inside one module alone, so that what runs again runs under it."""

    def __init__(self, server: Answers, bound: Bound) -> None:
        super().__init__()
        self.server, self.bound = server, bound

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            return self.server.kernel(self.bound, args, kwargs)
        if func is MULTI_HEAD:
            return self.server.function(self.bound, args, kwargs)
        if func is torch.cat:
            self.bound.joint = joined(self.bound, args[0] if args else kwargs.get("tensors")) or self.bound.joint
        return func(*args, **kwargs)


class _Writing(_Inside):
    """The same in a module that writes attention out: leads its product of weights and values to the run."""

    def __init__(self, server: Answers, bound: Bound) -> None:
        super().__init__(server, bound)
        self.trail, self.edited = Trail(), False
        self.pattern: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.server.answering:
            return func(*args, **kwargs)
        if (asked := self.trail.asked(func, args, kwargs)) is not None:
            found = self.server.written(self.bound, asked)
            if found is not None:
                self.edited, (heads, self.pattern) = True, found
                return heads
        out = super().__torch_function__(func, types, args, kwargs)
        self.trail.follow(func, args, kwargs, out)
        return out

    def put(self, output: Any) -> Any:
        """What the module gives, with the run's weights for its own."""
        if not self.edited:
            return output
        kept = kept_by(self.bound.module)
        gives = self.trail.gives((output, kept))
        if self.trail.besides:
            raise NotEntered(otherwise(self.bound, self.trail.besides))
        if not gives:
            return output
        if self.bound.written is False:
            raise NotEntered(
                f"{self.bound.name} ({self.bound.kind}) gives its weights, which it did not when heedful looked; give "
                "inputs that show what it does: attach(..., inputs=...)"
            )
        vars(self.bound.module).update(self.trail.put(self.pattern, kept))
        return self.trail.put(self.pattern, output)


def otherwise(bound: Bound, why: str) -> str:
    """What is said of a module that does what it did not in the look."""
    return (
        f"{bound.name} ({bound.kind}) computes attention otherwise than when heedful looked: {why}; give inputs that "
        "show what it does: attach(..., inputs=...)"
    )
