"""How a run gets into one attention module: it is there from the start, and the module asks it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from heedful.adapters.planted import Planted
from heedful.core.entry import Layer
from heedful.core.errors import FieldError
from heedful.core.method import Stack
from heedful.core.sites import Site
from heedful.engine.run import Run


@dataclass(eq=False)
class ModuleAdapter:
    """The adapter of a module that is made of heedful's attention: there is nothing to find and nothing to hook."""

    model: nn.Module
    size: Layer
    depth: int  # how many layers there are, of which this is one
    installed: bool = field(default=False, init=False)
    ready: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self.planted = Planted(self.model, {self.size.number: ""})

    @property
    def layer_names(self) -> tuple[str, ...]:
        return tuple(f"{type(self.model).__name__}.{i}" for i in range(self.depth))

    def sizes(self, layers: Collection[int] | None = None) -> tuple[Layer, ...]:
        return (self.size,) if layers is None or self.size.number in layers else ()

    def heads(self, layer: int) -> int:
        return self.size.heads

    def install(self, run: Run) -> None:
        if run.stack.touches(Site.EMBEDDING, Site.RESIDUAL):
            rule = "acts in the stream around attention, where a module has no say; attach(model, method) acts there"
            raise FieldError("Attention", "method", run.stack, rule, None)
        self.installed = True

    def remove(self) -> None:
        self.installed = False

    def leave(self) -> None:
        self.remove()
        self.planted.drop()

    def adopted(self, stack: Stack) -> int:
        return 0
