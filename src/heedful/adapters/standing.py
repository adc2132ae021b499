"""What stands for one of a module's own functions as long as a run is attached."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn


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
