"""A run: one model under one stack. It holds what is remembered, and it leaves the model exactly as it was."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self

import torch
from torch import Tensor, nn

from heedful.core.asked import asks
from heedful.core.call import DenoisingStep
from heedful.core.entry import Layer, Readings
from heedful.core.errors import FieldError, HeedfulError, InactiveWarning, StatisticError
from heedful.core.figures import printed
from heedful.core.method import Method, Part, Stack, Step, as_stack
from heedful.core.regions import PerText, Region, Roles, marks
from heedful.core.stats import Statistic, load, save
from heedful.engine.activity import Activity, Difference, density_of, first_output
from heedful.engine.learned import learned
from heedful.engine.resting import undone
from heedful.engine.run_state import RunState, blind
from heedful.engine.scopes import require_there, require_tokens
from heedful.engine.select import Explanation, backend_named, explain


class Parameters(Protocol):
    """Learned parameters in a model's layers."""

    def carried(self) -> set[tuple[int, str]]: ...  # by layer and name, what an earlier run left

    def parameter(self, layer: int, name: str, start: Tensor) -> nn.Parameter: ...


class Adapter(Protocol):
    """How a run gets into a model's attention and out again."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def layer_names(self) -> tuple[str, ...]: ...

    @property
    def planted(self) -> Parameters: ...

    @property
    def installed(self) -> bool: ...

    @property
    def ready(self) -> bool: ...  # whether the layers are known; else the first forward tells, and `settle` is called

    def sizes(self, layers: Collection[int] | None = None) -> tuple[Layer, ...]: ...  # of these, or of all

    def heads(self, layer: int) -> int | None: ...  # None where only a call tells

    def install(self, run: Run) -> None: ...

    def remove(self) -> None: ...  # until it is installed again; may be called again after an interrupt

    def leave(self) -> None: ...  # for good, with the learned parameters; may be called again too

    def adopted(self, stack: Stack) -> int: ...  # how many parts, the first ones, the model was saved with


class Run:
    """Made by `attach`. A context manager, and callable like the model."""

    def __init__(
        self,
        model: nn.Module,
        what: Part | Stack,
        adapter: Adapter,
        backend: str = "auto",
        roles: Roles | Sequence[Roles] | None = None,
        tile_rows: int | None = None,
    ) -> None:
        self.model = model
        self.stack = as_stack(what)
        self.backend = backend_named(backend)
        self.roles = roles
        self.tile_rows = tile_rows
        self.state = RunState(self.stack)
        self.closed = False
        self._adapter = adapter
        self._check_layers()
        try:
            adopted = adapter.adopted(self.stack)
            adapter.install(self)
            self._add_parameters(adopted)
        except BaseException:
            self.close()
            raise

    def settle(self) -> None:
        """The layers are known now, if they were not before."""
        self._check_layers()

    @property
    def roles(self) -> dict[str, Region | PerText]:
        """Named spans of token positions. Set them to a mapping, or to a list with a mapping for each text."""
        return self._roles

    @roles.setter
    def roles(self, roles: Roles | Sequence[Roles] | None) -> None:
        self._roles = marks(roles)

    def _check_layers(self) -> None:
        if self._adapter.ready:
            require_there(self.stack, len(self.layer_names), self._adapter.heads)

    @torch.inference_mode(False)  # what is made inside could not be learned outside
    def _add_parameters(self, adopted: int) -> None:
        if not any(type(m).parameters is not Method.parameters for m in self.stack.methods):
            return
        requested = learned(self.stack, self._adapter)
        names = {(x.layer, x.full) for x in requested}
        carried = self._adapter.planted.carried()
        if lost := {(x.layer, x.full) for x in requested if x.part < adopted} - carried:
            raise FieldError(
                "attach()", "what", self.stack,
                f"the model was saved with it, and {len(lost)} parameters that it had learned are not in the model: "
                "transformers alone leaves them out; heedful.load(folder) gives both. To learn them anew: "
                "del model.config.heedful", "the run that heedful.load(folder) gives",
            )  # fmt: skip
        if carried and carried != names:
            layer, name = min(carried ^ names)
            have = "carries" if (layer, name) in carried else "lacks"
            raise FieldError(
                "attach()", "what", self.stack,
                f"the model carries {len(carried)} learned parameters of an earlier run, and this stack has others: "
                f"{self.layer_names[layer]} {have} {name}; attach the stack that learned them, or delete them",
                "the same stack and `only`",
            )  # fmt: skip
        for x in requested:
            found = self.state.params.setdefault((x.part, x.layer), {})
            found[x.name] = self._adapter.planted.parameter(x.layer, x.full, x.start)

    def __repr__(self) -> str:
        name, state = type(self.model).__name__, "closed" if self.closed else "attached"
        return f"Run({self.stack!r} on {name}, {state})"

    def __reduce__(self) -> NoReturn:
        """The hooks stay in this process and this model, so a copy would run the model unedited."""
        raise HeedfulError(
            f"a run cannot be copied or sent to another process: {self!r}. Copy or send the model, which is the plain "
            "one there, and run.stack; then attach(model, stack)"
        )

    def _repr_html_(self) -> str:
        return printed(f"{self!r}\n{self.activity()}" if self.state.entered else repr(self))

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The served layers' dotted names; a layer's number is its place here."""
        return self._adapter.layer_names

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with undone(self.close):
            pass
        if kind is None and self.state.entered:
            for step in self.inactive:
                warnings.warn(f"this run changed nothing with {step}", InactiveWarning, stacklevel=2)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, under the stack."""
        self._require_open(*args)
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`, under the stack."""
        self._require_open(*args)
        able = self.model if hasattr(self.model, "generate") else self._adapter.model  # a wrapper may have none
        return able.generate(*args, **kwargs)  # type: ignore[operator]

    def _require_open(self, *given: Any) -> None:
        if self.closed:
            raise FieldError("Run", "closed", True, "this run has ended; attach again", False)
        require_tokens(self.model, given)

    def close(self) -> None:
        """Leave the model as it was. What the run found stays readable."""
        if not self.closed:
            self._adapter.leave()
            self.closed = True  # last: an interrupted close can be called again

    def __getitem__(self, part: Part | int) -> Any:
        """What a reading method of the stack has to tell; one that stands in it twice is named by its place."""
        parts = list(self.stack.parts)
        asked = part if isinstance(part, Part | int) else None
        places = [n for n, mine in enumerate(parts) if asked in (mine, n)]
        if not places:
            rule, good = f"must be a part of the stack {self.stack!r}, or its place there", parts[0] if parts else None
            raise FieldError("Run", "[...]", part, rule, good)
        if len(places) > 1:
            rule = f"stands in the stack at the places {places}, and need not read the same at both; name one of these"
            raise FieldError("Run", "[...]", part, rule, places[0])
        number = places[0]
        method = self.stack.methods[number]
        names = [edit.name for edit in method.edits if edit.reads]
        if not names:
            raise FieldError("Run", "[...]", part, "reads nothing, so there is nothing to tell", "a reading method")
        # of two readers one may only look, and leave to the other what it saw
        noted = {name for n, name, _ in self.state.statistics if n == number}
        chosen = next((name for name in names if name in noted), names[0])
        found = {layer: s for (n, name, layer), s in self.state.statistics.items() if n == number and name == chosen}
        if not found:
            rests = "has read nothing of what ran: it rests there, or no layer is of the kind it is for"
            first = "has read nothing yet: run the model first, for example run(**inputs)"
            raise StatisticError(f"{part!r} {rests if self.state.entered or self.state.idled else first}")
        return method.answer(Readings(found))

    def answers(self) -> dict[Part, Any]:
        """What every reading method has to tell."""
        out = {}
        for number, part in enumerate(self.stack.parts):
            if any(key[0] == number for key in self.state.statistics):
                out[part] = self[part]
        return out

    @property
    def inactive(self) -> tuple[str, ...]:
        """Steps that changed nothing, and penalties of nothing."""
        run_state = self.state
        steps = [s for s in self.stack.steps() if s.edit.loss or not s.edit.reads]
        acted = {s.number for s in run_state.changed}
        # a step that was never reached, such as CACHE without a cache, counts only where its whole method did nothing
        idle = [s for s in steps if s not in run_state.changed and (run_state.offered[s] or s.number not in acted)]
        return tuple(f"{step}{self._why(step)}" for step in idle)

    def _why(self, step: Step) -> str:
        if self.state.offered[step]:
            reason = self.reason(step.method) or ("its penalty is 0" if step.edit.loss else None)
            return "" if reason is None else f": {reason}"
        return ", which was idle" if step.number in self.state.idled else ", which was never reached"

    def reason(self, method: Method) -> str | None:
        """Why a method left the longest text so far as it was, where it knows."""
        return method.rests(max((len(call.keys) for call in self.state.calls.values()), default=0))

    @property
    def active(self) -> bool:
        """Whether every part that edits has changed something, and every part that penalises found something to."""
        return bool(self.state.entered) and not self.inactive

    def activity(self) -> Activity:
        """Whether the stack is active: layers entered, steps that changed something, pairs, cache, NaN."""
        run_state, inactive = self.state, self.inactive
        density = {n: density_of(call) for n, call in sorted(run_state.calls.items())}
        entered = tuple(sorted(run_state.entered))
        return Activity(
            len(self.layer_names),
            entered,
            inactive,
            density,
            dict(run_state.kept),
            dict(run_state.cache_bytes),
            dict(run_state.backends),
            run_state.nan,
        )

    def loss(self) -> Tensor:
        """The stack's penalties in all layers of the last forward; with labels the model's own loss has them."""
        if not any(step.edit.loss for step in self.stack.steps()):
            rule = "penalises nothing, so there is no loss; mark a function with @penalises(Site.X)"
            raise FieldError("Run", "stack", self.stack, rule, "a stack with a penalty")
        if not self.state.losses:
            rests = "penalised nothing in the last forward: it rests there, or no layer is of the kind it is for"
            first = "has penalised nothing yet: run the model first, as in run(**inputs)"
            raise StatisticError(f"{self.stack!r} {rests if self.state.entered else first}")
        if self.state.now.blind and torch.is_grad_enabled():
            raise blind(f"{self.stack!r}")
        return torch.stack([x.float() for x in self.state.losses.values()]).sum()

    def installed(self) -> bool:
        """Whether the stack is in the model: neither closed nor paused."""
        return self._adapter.installed

    def explain(self) -> Explanation:
        """Which backend serves this stack, every reason against the others, and the layers that it is for."""
        names = self.layer_names if self._adapter.ready else ()
        return replace(explain(self.stack), layers=names)

    def pause(self) -> None:
        """Take the stack out of the model until `resume`; memory, statistics and parameters stay."""
        self._require_open()
        self._adapter.remove()

    def resume(self) -> None:
        """Put the stack back, if it is not there."""
        self._require_open()
        if not self.installed():
            self._adapter.install(self)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The model as it was, for the length of a `with`; one inside another changes nothing."""
        was = self.installed()
        self.pause()
        try:
            yield
        finally:
            if was and not self.closed:
                self.resume()

    def reset(self) -> None:
        """Forget statistics and what methods remember of the run; learned parameters stay."""
        self.state = RunState(self.stack, params=self.state.params, denoising=self.state.denoising)

    def forget(self) -> None:
        """Forget what methods remember of the run. Statistics stay, and so does what they keep with a cache."""
        self.state.forget()

    @contextmanager
    def denoising(self, number: int, of: int) -> Iterator[None]:
        """A `with` in which a diffusion model is at step `number` of so many, counted from 0 at pure noise."""
        before, self.state.denoising = self.state.denoising, DenoisingStep(number, of)
        try:
            yield
        finally:
            self.state.denoising = before

    def branch(self) -> AbstractContextManager[None]:
        """A `with` after which methods remember what they did before it, as where several continuations are tried."""
        return self.state.branch()

    @torch.no_grad()
    def difference(self, *args: Any, **kwargs: Any) -> Difference:
        """Largest change of the model's first output against the unedited model, over its largest magnitude.

        Both go on from a cache that is given or that the model keeps, and leave it as it was.
        """
        self._require_open(*args)
        if not self.installed():
            raise FieldError("Run", "paused", True, "there is no stack in the model to compare; resume() first", False)
        edited = first_output(self.model, args, kwargs)
        with self.paused():
            plain = first_output(self.model, args, kwargs)
        return Difference((edited - plain).abs().max() / plain.abs().max().clamp(min=1e-30))

    @asks
    def save(self, path: str | Path) -> Path:
        """Write all statistics to one file, which other runs of the same stack can `merge`."""
        found = {f"{n}.{name}.{layer}": s for (n, name, layer), s in self.state.statistics.items()}
        return save(path, found, of=repr(self.stack))

    @asks
    def merge(self, path: str | Path) -> None:
        """Add the statistics that another run of the same stack saved."""
        found: dict[tuple[int, str, int], Statistic] = {}
        for key, stat in load(path, of=repr(self.stack)).items():
            number, name, layer = key.split(".")
            if int(number) >= len(self.stack) or name not in {e.name for e in self.stack.methods[int(number)].edits}:
                raise StatisticError(
                    f"{path} comes from another stack: this one has no reader {name!r} as part {number}"
                )
            found[int(number), name, int(layer)] = stat
        for place, stat in found.items():
            have = self.state.statistics.get(place)
            self.state.statistics[place] = stat if have is None else have + stat

    def parameters(self) -> list[nn.Parameter]:
        """Every learned parameter that the stack brought."""
        return [p for found in self.state.params.values() for p in found.values() if isinstance(p, nn.Parameter)]

    def state_dict(self) -> dict[str, Tensor]:
        """The learned parameters, by part, layer and name."""
        return {
            f"{part}.{layer}.{name}": p.detach().clone()
            for (part, layer), found in self.state.params.items()
            for name, p in found.items()
        }

    @asks
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put learned parameters back; names and shapes must be exactly those of this stack."""
        mine = {f"{n}.{layer}.{name}": p for (n, layer), f in self.state.params.items() for name, p in f.items()}
        if set(mine) != set(state):
            odd = sorted(set(mine) ^ set(state))[0]
            raise FieldError("Run", "state", odd, "names must be exactly those of this stack", sorted(mine)[:1])
        for name, p in mine.items():
            if state[name].shape != p.shape:
                raise FieldError(
                    "Run", name, tuple(state[name].shape), "has another shape in this model", tuple(p.shape)
                )
        with torch.no_grad():
            for name, p in mine.items():
                p.copy_(state[name])
