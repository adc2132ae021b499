"""What modules of heedful's own share: a run that is open from the start, and one forward of it for each call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from threading import RLock
from typing import Any, TypeVar

from torch import nn

from heedful.core.entry import Layer
from heedful.core.method import Stack
from heedful.engine.again import stand_around
from heedful.engine.run import Run
from heedful.nn.serving import ModuleAdapter

Answer = TypeVar("Answer")


class Served(nn.Module, ABC):
    """A module under a method; whoever derives from it says its size, and opens the run once that is known."""

    run: Run
    method: Stack
    layer: int
    depth: int

    @abstractmethod
    def size(self) -> Layer:
        """What a method learns parameters by."""

    def _open(self) -> None:
        self.run = Run(self, self.method, ModuleAdapter(self, self.size(), self.depth))
        self._lock = RLock()  # a run knows one forward at a time, and threads may share a module

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files have a run of their own, with the learned parameters in the module."""
        return {name: x for name, x in vars(self).items() if name not in ("run", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._open()

    def _one_forward(self, compute: Callable[[], Answer]) -> Answer:
        """One call of the module, which is all that its run knows of a forward."""
        with self._lock:
            state = self.run.state
            state.new_forward(stand_around(self.run, type(self).__name__, whole=True))
            try:
                return compute()
            except BaseException:
                state.fail_forward()
                raise
