"""Where a forward of a model begins and ends, and what all its layers are told of it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from threading import get_ident
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from heedful.adapters.arguments import by_name, places_in, require_no_guesses
from heedful.adapters.bound import Bound
from heedful.adapters.carried import end_looks, note_look, remembered_of
from heedful.adapters.grids import Grid, grid_of, regions
from heedful.adapters.hooked import Hooked, Standing
from heedful.adapters.layers import within
from heedful.adapters.merging import require_parted, without_grids
from heedful.adapters.taking import tokens_of
from heedful.core.errors import FieldError, GuessedWarning, RefusedModel
from heedful.core.method import Stack, method_of
from heedful.core.positions import Positions
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


@dataclass(eq=False)
class _Guessing(Standing):
    """Where `generate` begins to have tokens guessed, which a model then reads several at once."""

    NAME = "_get_candidate_generator"

    stack: Stack

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        require_no_guesses(self.stack, "assisted and prompt-lookup decoding have guesses read at once")
        if reading := [part for part in self.stack if all(edit.reads for edit in method_of(part).edits)]:
            told = f"{Stack(tuple(reading))!r} counts guessed tokens too, those that are taken back among them"
            warnings.warn(f"{told}; generate one after another to read those that are written", GuessedWarning, 2)
        return self.own(*args, **kwargs)


def _rows_of_many(model: nn.Module, instead: str) -> str:
    return (
        f"{type(model).__name__} is run with a paged cache (continuous batching), whose rows hold pieces of many "
        f"texts, which heedful cannot tell apart; {instead}"
    )


_CALL = nn.Module._call_impl.__code__


def _calls(model: nn.Module) -> int:
    """How many calls of a model are under way in this thread."""
    frame: FrameType | None = sys._getframe(1)
    found = 0
    while frame is not None:
        found += frame.f_code is _CALL and frame.f_locals.get("self") is model
        frame = frame.f_back
    return found


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
    _mask: Any = None  # what the last of the models under way was handed as its attention mask
    _encodes: bool = False  # the last forward was handed nothing that an encoder had made
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
            if hasattr(part, _Guessing.NAME):
                hooked.stand(_Guessing(part, self.run.stack))

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
            if self._inside and self.under_way and _calls(model) > 1:
                self._inside += 1  # which `_ends` takes away again, so that the one around may go on
                raise RefusedModel(
                    f"{type(model).__name__} is called again inside a forward of its own under this run, and what is "
                    "known of the one under way would be lost; call it before or after, or a copy of it"
                )
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
            kept = kwargs.get("logits_to_keep")  # of a prompt, one; or all
            if isinstance(kept, int) and kept > 1 and any(isinstance(x, Cache) for x in kwargs.values()):
                read = f"the last {kept} tokens here may be guesses (logits_to_keep={kept}), read at once"
                require_no_guesses(self.run.stack, read, ", or read a prompt without logits_to_keep")
            known = remembered_of(self.run.state, kwargs, type(model).__name__)
            self._encodes = known is None
            blind = stand_around(self.run, type(model).__name__, whole=True)
            self._thread = get_ident()
            if self.first is not None:
                self.first(*given)
            self._graph = torch.is_grad_enabled()
            self.run.state.new_forward(blind, known)
            self._mask = None
            requested = kwargs.get("output_attentions")
            if requested is None:
                requested = getattr(getattr(model, "config", None), "output_attentions", False)
            self.patterns = bool(requested)
        self.run.state.now.ids[self._parts[model]] = tokens_of(kwargs)
        self._look_for_places(self._parts[model], kwargs)
        self._inside += 1

    def _look_for_places(self, name: str, kwargs: dict[str, Any]) -> None:
        """Note what a caller's mask of pairs tells a model, unless the one around it was handed the same."""
        mask, told = kwargs.get("attention_mask"), self.run.state.now.told
        if mask is not self._mask:
            self._mask = mask
            places = places_in(mask, kwargs.get("position_ids"))
            if places is not None or told:  # of a decoder's mask nothing, where its encoder's tells something
                told[name] = places

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
        if self._inside and output is not None and self.run.stack:
            note_look(self.run.state, output)
        if not self._inside:
            self._thread = self._mask = None
            if output is None:
                self.run.state.fail_forward()
            elif self.run.stack:
                end_looks(self.run.state, output, bool(self._parts[model]), self._encodes)
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

    def told(self, bound: Bound) -> Positions | None:
        """What a caller's mask of pairs tells of the keys of the model around a layer."""
        return _around(bound.name, self.run.state.now.told)

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
