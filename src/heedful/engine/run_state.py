"""What a run knows: statistics, each method's state and parameters, and what was seen to act."""

from __future__ import annotations

import copy
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from heedful.core.call import Call, DenoisingStep, Phase
from heedful.core.errors import DefinitionError, SiteError, shape_of
from heedful.core.method import Stack, Step
from heedful.core.sites import Site
from heedful.core.state import Key, Notes, Shelf, State
from heedful.core.stats import Statistic
from heedful.core.values import replace
from heedful.engine.learned import planted_name
from heedful.engine.merging import Merges, require_own_keys
from heedful.engine.needs import apart
from heedful.engine.one_forward import Forward, Found, Look, Memory
from heedful.engine.plan import Plan
from heedful.engine.transformed import plain, summed

_K = TypeVar("_K")
NONE: frozenset[int] = frozenset()


@dataclass
class RunState:
    """The only mutable thing in a run."""

    stack: Stack
    params: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)  # (part, layer)
    statistics: dict[Found, Statistic] = field(default_factory=dict)
    entered: Counter[int] = field(default_factory=Counter)
    offered: Counter[Step] = field(default_factory=Counter)
    idled: set[int] = field(default_factory=set)  # parts that had nothing to do in some call
    clean: set[Step] = field(default_factory=set)  # seen to leave their input alone, where tensors count no versions
    changed: set[Step] = field(default_factory=set)
    calls: dict[int, Call] = field(default_factory=dict)  # each layer's largest call, for counting its pairs
    backends: dict[int, str] = field(default_factory=dict)
    kept: dict[int, tuple[int, int]] = field(default_factory=dict)  # cache entries kept and seen, by layer
    cache_bytes: dict[int, tuple[int, int]] = field(default_factory=dict)  # the bytes of those, and of all as they came
    denoising: DenoisingStep | None = None  # the step that a diffusion model is at
    saves: int = 0  # how often the model was saved with the stack
    looks: list[Look] = field(default_factory=list)  # of encoders, whose outputs may be handed to a decoder later
    now: Forward = field(default_factory=Forward)  # the last forward, or what is computed of an earlier one again

    def __post_init__(self) -> None:
        self._highest: dict[int, Tensor] = {}  # of all that the heads of each layer gave, without its sign
        self._of_run: dict[tuple[int, int], dict[str, Any]] = defaultdict(dict)  # by part and layer
        parts = self.stack.parts
        self._names = tuple(f"{part!r} {parts[:n].count(part)}" for n, part in enumerate(parts))
        edits = [any(not e.reads for e in method.edits) for method in self.stack.methods]
        self._editors = tuple(itertools.compress(self._names, edits))
        self._plans: dict[tuple[int, Phase, bool, frozenset[int]], Plan] = {}

    @property
    def losses(self) -> dict[Found, Tensor]:
        """What steps penalised in this forward."""
        return self.now.losses

    def begin(self, layer: int, shelf: Shelf, module: nn.Module) -> None:
        """A call of a layer begins, with what methods keep with its cache."""
        self.now.shelves[layer] = shelf
        for number, method in enumerate(self.stack.methods if self.params else ()):
            if kept := self.params.get((number, layer)):  # whoever loads, moves or shards weights may put others there
                found = {name: getattr(module, planted_name(method, number, name)) for name in kept}
                self.params[number, layer] = found
        if layer in self.now.early:
            self.now.early.remove(layer)
        else:
            self.now.idle.pop(layer, None)

    def begin_early(self, layer: int) -> None:
        """A call of a layer is known before its attention is entered, at EMBEDDING; parts are asked there and then."""
        self.now.idle.pop(layer, None)
        self.now.early.add(layer)

    def plan(self, call: Call, *sites: Site) -> Plan:
        """The steps that act in a call: those of every part that is not idle in it.

        A part is asked once a call. With sites only those are asked that act there, and the others left for later.
        """
        whole = self._plan(call.layer, call.phase, call.training)
        if whole.settled:
            return whole
        asked = self.now.idle[call.layer]
        for step in whole.may_idle:
            if step.number not in asked and (not sites or step.edit.site in sites):
                asked[step.number] = step.method.idle(self.view(step, call))
        idle = frozenset(number for number, yes in asked.items() if yes) | whole.left_out(call.denoising)
        self.idled |= idle
        found = self._plan(call.layer, call.phase, call.training, idle)
        if call.cross and not sites and not call.ends_list:  # behind the last none are merged, as in a pooling head
            for step in found.merging:
                require_own_keys(step, call)  # before it takes the keys for its tokens
        return found

    def _plan(self, layer: int, phase: Phase, training: bool, idle: frozenset[int] = NONE) -> Plan:
        """That of a layer in a phase, in training or at rest, without idle parts."""
        found = self._plans.get((layer, phase, training, idle))
        if found is None:
            left = (s for s in self.stack.steps(layer, phase) if s.number not in idle)
            steps = tuple(s for s in left if s.edit.training in (None, training))
            found = self._plans[layer, phase, training, idle] = Plan(steps, apart(steps))
        return found

    def new_forward(self, blind: bool = False, known: Mapping[int, dict[str, Any]] | None = None) -> None:
        """A new pass of the whole model begins; it is blind where it has gradients on the way back alone.

        Methods know already what they remembered of what an encoder made before, and this pass goes on from.
        """
        counted, noted, before = dict(self.statistics), _copied(self._of_run), self.now
        self.now = Forward(before.number + 1, before.again, counted=counted, noted=noted, blind=blind)
        self.now.memory.update(known or {})

    def fail_forward(self) -> None:
        """The pass ended with an error: what it had counted and noted so far counts for nothing."""
        if not self.now.again:
            self.statistics, self._of_run = self.now.counted, self.now.noted
        self.now.open.clear()
        self.now.merges.clear()

    def memory(self) -> Memory:
        """What methods remember now, for whatever computes this again."""
        now = self.now
        own = dict(now.ids), dict(now.merges), dict(now.told)
        return Memory(now.number, _copied(now.memory), _copied(self._of_run), *own)

    @contextmanager
    def computing_again(self, memory: Memory) -> Iterator[None]:
        """A `with` in which methods remember what they did when it was computed first, and readers count nothing."""
        before = self.now, self._of_run
        kept: dict[str, Any] = {
            "memory": _copied(memory.forward),
            "ids": dict(memory.ids),
            "merges": dict(memory.merges),
            "told": dict(memory.told),
        }
        self.now = Forward(memory.number, again=True, **kept)
        self._of_run = _copied(memory.run)
        try:
            yield
        finally:
            self.now, self._of_run = before

    def forget(self) -> None:
        """Forget what methods remember of the run so far."""
        self._of_run.clear()

    @contextmanager
    def branch(self) -> Iterator[None]:
        """A `with` after which methods remember what they did before it."""
        before, self._of_run = self._of_run, copy.deepcopy(self._of_run)
        try:
            yield
        finally:
            self._of_run = before

    def view(self, step: Step, call: Call) -> Call:
        """The call as one method sees it."""
        n, shelf = step.number, self.now.shelves.setdefault(call.layer, Shelf())
        notes = Notes(shelf, Key(self._editors, self._names[n], call.name), call.batch)
        return replace(
            call,
            params=self.params.get((n, call.layer), {}),
            state=State(self.now.memory[n], self._of_run[n, call.layer], notes),
        )

    def kept_by_engine(self, call: Call) -> Notes:
        """What the engine itself keeps with the cache of a text."""
        return Notes(self.now.shelves.setdefault(call.layer, Shelf()), Key(self._editors, "", call.name), call.batch)

    def note(self, step: Step, call: Call, found: object) -> None:
        """Take what a reader found in a tile."""
        if found is None:
            return
        if step.edit.loss:
            self._penalise(step, call, found)
            return
        if self.now.again:
            return
        if not isinstance(found, Statistic):
            raise DefinitionError(
                f"{step}: a reader returns a statistic or None, not {type(found).__name__}; wrap it, as in Sum.of(x)"
            )
        key = (step.number, step.edit.name, call.layer)
        self.now.open[key] = self.now.open[key] + found if key in self.now.open else found

    def _penalise(self, step: Step, call: Call, found: object) -> None:
        if not isinstance(found, Tensor) or found.ndim or not found.is_floating_point():
            got = shape_of(found, typed=True)
            raise DefinitionError(f"{step}: a penalty is a floating-point tensor without axes, not {got}; sum it up")
        if self.now.blind_layer:
            raise blind(f"{step}, layer {call.layer}")
        key = (step.number, step.edit.name, call.layer)
        self.losses[key] = self.losses[key] + found if key in self.losses else found
        self.watch(step, torch.zeros_like(found), found)

    def close_call(self, plan: Plan, call: Call) -> None:
        """Hand what the tiles of a call added up to over to the run."""
        for step in plan.readers:
            key = (step.number, step.edit.name, call.layer)
            if key in self.now.open:
                whole = summed(step.method.finish(self.now.open.pop(key), self.view(step, call)))
                self.statistics[key] = self.statistics[key] + whole if key in self.statistics else whole

    def watch(self, step: Step, old: Any, new: Any) -> None:
        """Remember whether a step has ever changed anything; looks no further once it has."""
        self.offered[step] += 1
        if step in self.changed or new is old:
            return
        if not isinstance(new, Tensor) or new.shape != old.shape or _differ(new, old):
            self.changed.add(step)

    def remember(self, call: Call) -> None:
        """Keep the places and rules of a layer's largest call; of its tensors, only what a rule itself holds on to."""
        have, n, m = self.calls.get(call.layer), call.queries.index.shape[-1], call.keys.index.shape[-1]
        if have is None or n * m >= have.queries.index.shape[-1] * have.keys.index.shape[-1]:
            self.calls[call.layer] = call.places

    def merge(self, step: Step, call: Call, merges: Merges) -> None:
        """Keep what has become of the tokens of a list of layers, for those behind this one."""
        self.offered[step] += 1
        self.changed.add(step)
        self.now.merges[call.lowest] = merges

    def look_for_nan(self, layer: int, x: Tensor) -> None:
        if not x.numel():
            return
        x = plain(x.detach())
        # NaN where a single number is; of many numbers both at once would take longer
        found = x.abs().amax() if x.shape[-2] == 1 else torch.maximum(-x.amin(), x.amax())
        have = self._highest.get(layer)
        self._highest[layer] = found if have is None else torch.maximum(have, found)

    @property
    def nan(self) -> bool:
        """Whether some head gave what is no number."""
        return any(bool(x.isnan()) for x in self._highest.values())

    @property
    def endless(self) -> int | None:
        """The first layer in which some head gave infinity or what is no number."""
        return min((n for n, x in self._highest.items() if not bool(x.isfinite())), default=None)


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether they do; assumed under torch.func, where many inputs may stand in one tensor."""
    return is_functorch_wrapped_tensor(a) or not torch.equal(a, b)


def _copied(kept: Mapping[_K, dict[str, Any]]) -> defaultdict[_K, dict[str, Any]]:
    return defaultdict(dict, {key: dict(x) for key, x in kept.items()})


def blind(what: str) -> SiteError:
    """The error of a penalty that nobody could learn from."""
    return SiteError(
        f"{what}: the penalty has no gradient, since gradient checkpointing with use_reentrant=True computes it "
        "without one; use use_reentrant=False"
    )
