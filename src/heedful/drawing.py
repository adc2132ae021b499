"""A diffusion model draws a scene, step by step, under whatever is attached to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from heedful.adapters.hooked import Hooked
from heedful.api import attach
from heedful.core.errors import FieldError, SiteError, shape_of
from heedful.core.kinds.decode import Decode
from heedful.core.kinds.tokens import Prompt
from heedful.core.method import Method, Part, Stack, method_of
from heedful.core.regions import Roles
from heedful.engine.run import Run
from heedful.shown import Drawing

GUIDES = "SoftPAG(w=3.0)"  # a decoding step that combines what is predicted


@runtime_checkable
class Guide(Protocol):
    """A method that moves what is denoised before a step is taken, down the slope of a loss."""

    def moved(self, x: Tensor, loss: Tensor, number: int, of: int) -> Tensor: ...


def guide_of(what: Part | Stack) -> Guide | None:
    """The method among them that moves what is denoised, if one does."""
    methods = [method_of(part) for part in (what if isinstance(what, Stack) else [what])]
    found = [method for method in methods if isinstance(method, Guide)]
    if len(found) > 1:
        rule = "both move what is denoised, down the slope of one loss: leave one of them"
        raise FieldError("compare()", "methods", what, rule, found[0])
    return found[0] if found else None


def require_denoises(step: Decode) -> None:
    """Refuse one that combines next-token logits alone."""
    if not step.denoises:
        raise FieldError("compare()", "methods", step, "combines next-token logits, and a scene has none", GUIDES)


class Guided:
    """A diffusion model whose every prediction is what a decoding step makes of those of several runs.

    Whoever takes a step calls the model as ever, and as often as ever: what comes back is combined, row by row. Where a
    step guides by words too, by predictions with them and without, each of the two is combined before.
    """

    def __init__(self, model: nn.Module, step: Decode, beside: Stack, **how: Any) -> None:
        require_denoises(step)
        self.model, self.step, self.beside, self.how = model, step, beside, how
        self.runs: dict[str, Run | None] = {}  # of each variant; None: the model as it is
        self._stacks: dict[str, Stack] = {}
        self._asked = self._within = False

    @property
    def first(self) -> Run | None:
        """The run of the first variant, in which is what stands beside."""
        return next(iter(self.runs.values()), None)

    @property
    def active(self) -> bool:
        """Whether any of the runs has changed anything so far."""
        return any(run is not None and run.state.changed for run in self.runs.values())

    def begin(self, prompt: Prompt, roles: Roles) -> None:
        """Be ready for a picture of the prompt, and remember none before."""
        variants = self.step.ready(prompt, self._unread).variants(prompt)
        if not variants or any(shown != prompt for shown, _ in variants.values()):
            rule = "must be runs of the prompt that is drawn, which the model is told by whoever takes a step"
            raise FieldError(self.step, "variants", list(variants), rule, {"strong": (prompt, Stack())})
        stacks = {name: stack for name, (_, stack) in variants.items()}
        first = next(iter(stacks))
        stacks[first] = Stack((*stacks[first], *self.beside))
        if stacks != self._stacks:
            self.close()
            for name, stack in stacks.items():
                run = self.runs[name] = attach(self.model, stack, **self.how) if len(stack) else None
                if run is not None:
                    run.pause()
            self._stacks = stacks
        for run in filter(None, self.runs.values()):
            begin(run, prompt, roles)

    def _unread(self, prompt: Prompt, method: Method) -> Any:
        rule = "reads the prompt before it acts, and a diffusion model reads none by itself"
        raise FieldError("compare()", "methods", self.step, rule, GUIDES)

    @contextmanager
    def denoising(self, number: int, of: int) -> Iterator[None]:
        """A `with` in which the model is at step `number` of so many, and what it predicts is combined."""
        hooks, self._asked = Hooked(), False
        with ExitStack() as stack:
            for run in filter(None, self.runs.values()):
                stack.enter_context(run.denoising(number, of))
            stack.callback(hooks.remove)
            hooks.after(self.model, self._combined, with_kwargs=True)
            yield
        if not self._asked:
            kind = type(self.model).__name__
            raise SiteError(f"{self.step!r}: {kind} itself was not called in step {number}, so nothing was combined")

    def _combined(self, model: nn.Module, args: tuple[Any, ...], more: Mapping[str, Any], given: Any) -> Any:
        """What stands for what the model gives."""
        if self._within:  # one of the runs themselves
            return None
        self._asked, found, read = True, {}, {}
        for name, run in self.runs.items():
            found[name] = _predicted(model, given if run is None else self._under(run, args, more))
            told = {} if run is None else run.answers()
            read[name] = {part: answer for part, answer in told.items() if part not in self.beside.parts}
        leaves, form = tree_flatten(given)
        plain = _predicted(model, given)
        mixed = self.step.combine(found, read)
        if not isinstance(mixed, Tensor) or mixed.shape != plain.shape:
            want = tuple(plain.shape)
            raise SiteError(f"{self.step!r}: combine must return what is predicted, {want}, got {shape_of(mixed)}")
        return tree_unflatten([mixed.to(plain.dtype) if leaf is plain else leaf for leaf in leaves], form)

    def _under(self, run: Run, args: tuple[Any, ...], more: Mapping[str, Any]) -> Any:
        kept = run.state.statistics
        for key in [key for key in kept if run.stack.parts[key[0]] not in self.beside.parts]:
            del kept[key]  # readers tell of this forward, and of none before it; what stands beside, of the picture
        run.resume()
        self._within = True
        try:
            return self.model(*args, **more)
        finally:
            self._within = False
            run.pause()

    def close(self) -> None:
        """Leave the model as it was."""
        for run in filter(None, self.runs.values()):
            run.close()
        self.runs, self._stacks = {}, {}


def _predicted(model: nn.Module, given: Any) -> Tensor:
    """The one tensor that a model gives, alone or within what it gives."""
    found = [leaf for leaf in tree_flatten(given)[0] if isinstance(leaf, Tensor)]
    if len(found) != 1:
        raise SiteError(f"{type(model).__name__} gives {len(found)} tensors, and a single prediction can be combined")
    return found[0]


def begin(run: Run | Guided | None, prompt: Prompt, roles: Roles) -> None:
    """Be ready for a picture of the prompt, and remember none before."""
    if isinstance(run, Guided):
        run.begin(prompt, roles)
    elif run is not None:
        run.forget()
        run.state.statistics.clear()
        run.roles = roles


@torch.no_grad()
def drawn(model: Any, run: Run | Guided | None, guide: Guide | None, draws: Drawing, x: Tensor) -> Tensor:
    """The pictures that come of noise `x`, each row one; the run is told of every step."""
    for number in range(draws.steps):
        with nullcontext() if run is None else run.denoising(number, of=draws.steps):
            if isinstance(run, Run) and guide is not None:
                x = _moved(model, run, guide, draws, x, number)
            x = draws.step(model, x, number)
    return x


def _moved(model: Any, run: Run, guide: Guide, draws: Drawing, x: Tensor, number: int) -> Tensor:
    seen = dict(run.state.statistics)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        draws.step(model, x, number)
        x = guide.moved(x, run.loss(), number, draws.steps) if run.state.losses else x.detach()
    run.state.statistics.clear()
    run.state.statistics.update(seen)  # a reader is told of the step that is taken, and not of the one that is tried
    return x
