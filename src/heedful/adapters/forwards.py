"""Where a forward of a model begins and ends, and what all its layers are told of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from threading import get_ident
from typing import Any, NamedTuple, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn

from heedful.adapters.arguments import by_name, require_no_guesses
from heedful.adapters.bound import Bound
from heedful.adapters.grids import Grid, grid_of, regions
from heedful.adapters.hooked import Hooked, Standing
from heedful.adapters.kvcache import tensors_in
from heedful.adapters.layers import within
from heedful.adapters.merging import require_parted, without_grids
from heedful.adapters.taking import tokens_of
from heedful.core.errors import FieldError, RefusedModel
from heedful.core.regions import Marks
from heedful.engine.again import stand_around
from heedful.engine.run import Run

_T = TypeVar("_T")


def _around(name: str, known: Mapping[str, _T]) -> _T | None:
    """What is known of the innermost of these models that a layer lies in."""
    found = _innermost(name, tuple(known))
    return None if found is None else known[found]


@lru_cache(1 << 14)
def _innermost(name: str, models: tuple[str, ...]) -> str | None:
    return max((x for x in models if within(name, (x,) if x else None)), key=len, default=None)


class _Batching(Standing):
    """Where generation in continuous batches begins: transformers would say no more than that it knows no `heedful`."""

    NAME = "init_continuous_batching"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RefusedModel(_rows_of_many(self.module, "close the run first, or use generate() or plain forwards"))


def _rows_of_many(model: nn.Module, instead: str) -> str:
    return (
        f"{type(model).__name__} is run with a paged cache (continuous batching), whose rows hold pieces of many "
        f"texts, which heedful cannot tell apart; {instead}"
    )


# what models of transformers call that which an encoder made before: of images, and of a text or a sound
ENCODED = ("mm_encoder_outputs", "encoder_outputs")


class _Look(NamedTuple):
    """A forward of one of the models in the model alone."""

    made: list[ref[Tensor]]
    memory: dict[int, dict[str, Any]]  # what methods remember of it, by part


@dataclass(eq=False)
class Forwards:
    """The forwards of one run in one model."""

    run: Run
    first: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None  # what the first one is shown before it
    patterns: bool = False  # the caller of this forward wants the patterns back
    _inside: int = 0
    _graph: bool = False  # gradients may be asked of the forward under way
    _thread: int | None = None  # the one that a forward is under way in
    _process: int | None = None  # the one that the last forward was in
    _of_part: bool = False  # the last forward was of one of the models in the model alone
    _looks: list[_Look] = field(default_factory=list)  # those of such models since the last of the whole
    _parts: dict[nn.Module, str] = field(default_factory=dict)  # the models in the model, by name
    _images: dict[str, tuple[nn.Module, Grid]] = field(default_factory=dict)  # those that read images, and their grids

    def of(self, parts: Mapping[str, nn.Module], hooked: Hooked) -> None:
        """Know where those of the whole, which is named '', and of models in it begin and end."""
        for name, part in parts.items():
            self._parts[part] = name
            hooked.before(part, self._begins)
            hooked.after(part, self._ends, with_kwargs=True, always_call=True)
            if hasattr(part, _Batching.NAME):
                hooked.stand(_Batching(part))

    @property
    def under_way(self) -> bool:
        """Whether a forward is under way in this thread."""
        return self._thread == get_ident()

    @property
    def asks_gradients(self) -> bool:
        """Whether gradients may be asked of what is computed now."""
        return self._graph or torch.is_grad_enabled() or self._thread != get_ident()

    @property
    def elsewhere(self) -> bool:
        """Whether a forward is under way in another thread."""
        return self._thread not in (None, get_ident())

    def _begins(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given, kwargs = (args, kwargs), by_name(model, args, kwargs)
        if (grid := grid_of(model, kwargs)) is not None:
            self._images[self._parts[model]] = (model, grid)
        for thing in kwargs.values():
            if type(thing).__name__.startswith("Paged"):
                raise RefusedModel(_rows_of_many(model, "use generate() or plain forwards"))
        if self._parts.get(model) == "":
            self._inside = 0  # the whole model stands in no other: an interrupt left the last count standing
        elif not self._inside and self.run.state.now.again:
            return  # a part that gradient checkpointing computes again
        if self._inside == 0:
            if self.elsewhere:
                rule = (
                    f"a forward of this run is under way in thread {self._thread}; run one after the other, or give "
                    "each thread a model and a run of its own"
                )
                raise FieldError("Run", "thread", get_ident(), rule, self._thread)
            self._require_threads()
            require_no_guesses(self.run.stack, kwargs)
            known = self._remembered(model, kwargs)
            blind = stand_around(self.run, type(model).__name__, whole=True)
            self._thread = get_ident()
            if self.first is not None:
                self.first(*given)
            self._graph = torch.is_grad_enabled()
            self.run.state.new_forward(blind, known)
            requested = kwargs.get("output_attentions")
            if requested is None:
                requested = getattr(getattr(model, "config", None), "output_attentions", False)
            self.patterns = bool(requested)
        self.run.state.now.ids[self._parts[model]] = tokens_of(kwargs)
        self._inside += 1

    def _remembered(self, model: nn.Module, kwargs: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """What methods remembered of what encoders made before this forward, which goes on from there.

        So `generate` does it: it has the encoder read a text or look at an image, and then calls the whole model.
        """
        before, self._of_part = self._of_part, bool(self._parts[model])
        given, found = [*tensors_in([kwargs.get(name) for name in ENCODED])], dict[int, dict[str, Any]]()
        if not (before if self._of_part else given):
            self._looks.clear()
        if self._of_part or not given:
            return {}
        same = {id(x) for x in given}
        these = [look for look in self._looks if any(id(x()) in same for x in look.made)]
        if not these and before:  # a row for each beam, or a copy, which is known in the steps that follow
            these = self._looks
            for look in these:
                look.made.extend(map(ref, given))
        for look in these:
            for number, noted in look.memory.items():
                if noted.keys() & found.get(number, {}).keys():
                    raise RefusedModel(
                        f"{type(model).__name__} is handed what an encoder made, which looked more than once, and of "
                        f"each time {self.run.stack.methods[number]!r} remembers something; it cannot be told which "
                        "is meant: hand over what one look gave, as it came, or give the call the images themselves"
                    )
                found[number] = {**found.get(number, {}), **noted}
        return found

    def _require_threads(self) -> None:
        """A fork has none of the threads that its parent computed with, and would wait for them without end."""
        if self._process not in (None, os.getpid()) and (threads := torch.get_num_threads()) > 1:
            rule = (
                f"this process was forked from process {self._process}, in which the run had computed already, and "
                "torch would wait for threads that are there alone; call torch.set_num_threads(1) first, or start the "
                "process by spawn and attach there"
            )
            raise FieldError("Run", "threads", threads, rule, 1)
        self._process = os.getpid()

    def _ends(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.under_way:
            return None  # a forward that was refused, while another thread's is under way
        self._inside = max(0, self._inside - 1)
        if not self._inside:
            self._thread = None
            if output is None:
                self.run.state.fail_forward()
            elif self._of_part and any((memory := self.run.state.now.memory).values()):
                self._looks.append(_Look([ref(x) for x in tensors_in(output)], memory))
        if not self._inside and output is not None:
            require_parted(self.run)
        if self._inside or not self.run.state.losses or by_name(model, args, kwargs).get("labels") is None:
            return None
        if isinstance(output, tuple):
            loss = output[0] if output else None
            if not isinstance(loss, Tensor) or loss.ndim:
                return None  # a model without a head is handed labels, and gives no loss
            return (loss + self.run.loss(), *output[1:])
        if not isinstance(output, dict) or output.get("loss") is None:
            return None
        output["loss"] = output["loss"] + self.run.loss()
        return output

    def roles(self, bound: Bound, tokens: int) -> Marks:
        """The run's roles, and what the tokens are of the image that a layer attends over."""
        image = _around(bound.name, self._images) if self._images else None
        roles, merges = self.run.roles, bound.merges
        if image is not None and "patches" not in roles:
            roles = {**regions(*image, tokens if merges is None else merges.to.shape[1]), **roles}
        return roles if merges is None else without_grids(roles)

    def ids(self, bound: Bound, rows: int, tokens: int) -> Tensor | None:
        """The tokens `[b n]` that a layer's queries are of, if the model around it was given just these."""
        found = _around(bound.name, self.run.state.now.ids)
        return found if found is not None and found.shape == (rows, tokens) else None
