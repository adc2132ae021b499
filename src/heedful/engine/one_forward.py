"""What a run knows of one forward of the whole model, and gone with it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from heedful.core.positions import Positions
from heedful.core.state import Shelf
from heedful.core.stats import Statistic
from heedful.engine.merging import Merges

Found = tuple[int, str, int]  # part, reading function, layer


class Spare:
    """Memory that tile after tile writes its map into, where nobody keeps what a tile is.

    Fresh memory for each takes the system longer to hand out than the softmax takes.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        key, size = (name, like.device, like.dtype), prod(shape)
        held = self._held.get(key)
        if held is None or len(held) < size:
            with torch.inference_mode(False):  # what is made inside could not be written to outside
                held = self._held[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return held[:size].view(shape)


class Look(NamedTuple):
    """A pass of a model in the model, such as its encoder: what it gave, and what methods remembered of it."""

    made: list[ref[Tensor]]
    memory: dict[int, dict[str, Any]]  # by part
    marks: Tensor | None = None  # [b], a number for each row of the first that it made, see `adapters.carried`

    @property
    def held(self) -> bool:
        """Whether somebody still has some of what it gave."""
        return any(x() is not None for x in self.made)


@dataclass(eq=False)
class Forward:
    """One forward, or what a checkpoint computes of it again on the way back."""

    number: int = -1
    again: bool = False  # what readers find is known already
    backward: int = field(default_factory=torch._C._current_graph_task_id)  # the pass back it is computed in; -1: none
    memory: dict[int, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))  # of methods, by part
    losses: dict[Found, Tensor] = field(default_factory=dict)  # what steps penalised
    ids: dict[str, Tensor | None] = field(default_factory=dict)  # tokens given to the models in it, by name
    queries: dict[str, Positions] = field(default_factory=dict)  # where the tokens of each list of layers stand
    told: dict[str, Positions | None] = field(default_factory=dict)  # what a mask of pairs tells a model of its keys
    causal: set[str] = field(default_factory=set)  # lists of layers in which no token sees later ones
    merges: dict[int, Merges] = field(default_factory=dict)  # of lists of layers, by the number of their first
    looks: list[Look] = field(default_factory=list)  # of models inside the one that is called
    shelves: dict[int, Shelf] = field(default_factory=dict)  # what methods keep with the cache of the call, by layer
    open: dict[Found, Statistic] = field(default_factory=dict)  # what the tiles of calls under way add up to
    counted: dict[Found, Statistic] = field(default_factory=dict)  # the statistics as they were before
    noted: dict[tuple[int, int], dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))  # likewise
    early: set[int] = field(default_factory=set)  # layers whose parts were asked at EMBEDDING
    idle: dict[int, dict[int, bool]] = field(default_factory=lambda: defaultdict(dict))  # by layer and part
    spare: Spare = field(default_factory=Spare)
    blind: bool = False  # it stands in a checkpoint whole, and has gradients on the way back alone
    blind_layer: bool = False  # the layer under way does


class Memory(NamedTuple):
    """What methods remembered when a checkpoint was entered."""

    number: int
    forward: dict[int, dict[str, Any]]
    run: dict[tuple[int, int], dict[str, Any]]
    ids: dict[str, Tensor | None]
    merges: dict[int, Merges]
    told: dict[str, Positions | None]
