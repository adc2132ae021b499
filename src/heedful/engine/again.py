"""Gradient checkpointing: what the way back computes again is what the way there computed, under the same run.

A checkpoint of torch's keeps a function, which it calls again on the way back. Whatever of a run stands in a
checkpoint puts itself around that function: there it asks whether the run is still in the model, and gives back what
was remembered when the checkpoint was entered. So nothing hangs on when the way back comes, nor on what else is in the
graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor
from torch.utils import checkpoint

from heedful.core.errors import NotEntered
from heedful.core.values import replace
from heedful.engine.attention_call import AttentionCall
from heedful.engine.one_forward import Memory
from heedful.engine.run_state import RunState

_TORCH = vars(checkpoint)
_FIRST = ("checkpoint", "_checkpoint_impl", "forward")  # functions of torch's that call what they keep the first time
_KEEPS = ("run_function", "recompute_fn")  # what reentrant checkpoints call it, and what the others do


class Region(NamedTuple):
    """A checkpoint around what is computed now."""

    keeper: Any
    name: str  # of its attribute that holds the function
    first: bool  # computed the first time

    @property
    def blind(self) -> bool:
        """Whether what is computed the first time has no gradient, and is to get one on the way back."""
        return self.first and bool(getattr(self.keeper, "next_functions", ()))

    @property
    def kept(self) -> Any:
        return getattr(self.keeper, self.name)

    def keep(self, function: Callable[..., Any]) -> None:
        setattr(self.keeper, self.name, function)


class OfRun(Protocol):
    """What is asked of a run."""

    state: RunState

    def installed(self) -> bool: ...


class Again:
    """What a checkpoint computes again, as the run has it."""

    def __init__(self, function: Callable[..., Any], run: OfRun, memory: Memory, whole: bool) -> None:
        # the graph holds this, and the run holds penalties of the graph, where no collector finds the circle
        self._run = ref(run)
        self.function, self.memory, self.whole = function, memory, whole

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self._run()
        if run is None or not run.installed():
            raise NotEntered(
                "gradient checkpointing computes layers again on the way back, and these would be the unedited ones: "
                "call backward() before the run is closed or paused"
            )
        with run.state.computing_again(self.memory):
            return self.function(*args, **kwargs)

    def of(self, run: OfRun) -> Again | None:
        """What a run has put here: of several runs, which have models of their own, each stands around the last."""
        if self._run() is run:
            return self
        return self.function.of(run) if isinstance(self.function, Again) else None


def stand_around(run: OfRun, name: str, whole: bool) -> bool:
    """See to it that whatever is computed of this again is computed under the run.

    It is a forward of the `whole` model or a module in one. Whether it will have gradients on the way back alone.
    """
    blind = False
    for region in list(regions()):
        kept = region.kept
        mine = kept.of(run) if isinstance(kept, Again) else None
        if mine is None:
            if not region.first:
                raise _strange(name)
            mine = Again(kept, run, run.state.memory(), whole)
            region.keep(mine)
        blind = blind or (region.blind and mine.whole is whole)
    if not whole and torch._C._current_graph_task_id() != run.state.now.backward:
        raise _strange(name)  # by other means than torch's
    return blind


def recomputed(compute: Callable[[AttentionCall], Tensor], job: AttentionCall) -> Tensor:
    """What a part of a call gives; nothing in between is kept for the way back, which computes it again as it was."""
    state, layer, accumulator = job.run_state, job.call.layer, job.accumulator
    memory, shelf, known = state.memory(), state.now.shelves.get(layer), False

    def part() -> Tensor:
        nonlocal known
        if not known:
            known = True
            return compute(job)
        counted = accumulator and accumulator.fresh()
        with state.computing_again(memory):
            if shelf is not None:
                state.now.shelves[layer] = shelf
            return compute(replace(job, accumulator=counted))  # the first count stands

    found: Tensor = checkpoint.checkpoint(part, use_reentrant=False)
    return found


def _strange(name: str) -> NotEntered:
    return NotEntered(
        f"gradient checkpointing computes {name} again on the way back, and its first pass was not under this run; "
        "call backward() before you attach, or while the run is paused"
    )


def regions() -> Iterator[Region]:
    """The checkpoints around what is computed now, from the innermost."""
    frame: FrameType | None = sys._getframe(1)
    near = found = False
    while frame is not None:
        if frame.f_globals is _TORCH:
            near = True
            if (region := _region(frame)) is not None:
                found = True
                yield region
        frame = frame.f_back
    if near and not found:
        raise NotEntered(
            "heedful does not know how this release of torch does gradient checkpointing, so that on the way back it "
            "could not see to it that layers are computed under the same run; train without checkpointing"
        )


def _region(frame: FrameType) -> Region | None:
    here: Any = frame.f_locals
    inner = getattr(here.get("gen"), "gi_frame", None)
    keepers = (here.get("ctx"), here.get("frame"), inner and inner.f_locals.get("new_frame"))
    found = ((keeper, name) for keeper in keepers for name in _KEEPS if hasattr(keeper, name))
    keeper, name = next(found, (None, ""))
    return None if keeper is None else Region(keeper, name, frame.f_code.co_name in _FIRST)
