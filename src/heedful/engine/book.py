"""What a run knows: statistics, each method's memory and parameters, and what was seen to act."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.errors import DefinitionError
from heedful.core.sites import HEADLESS_SITES, MAP_SITES, Site
from heedful.core.stack import Stack, Step
from heedful.core.stats import Statistic
from heedful.core.values import replace
from heedful.engine.needs import Needs

Key = tuple[int, str, int]  # part, reading function, layer
Notes = dict[int, dict[str, Tensor]]  # by part


class Plan:
    """The steps of one layer in one phase, by site."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self.steps = steps
        self._by_site: dict[Site, tuple[Step, ...]] = {
            site: tuple(s for s in steps if s.edit.site is site) for site in {s.edit.site for s in steps}
        }
        self._tiles = {
            site: tuple(s for s in found if not (s.edit.sums and s.edit.reads)) for site, found in self._by_site.items()
        }

    def at(self, site: Site) -> tuple[Step, ...]:
        return self._by_site.get(site, ())

    def edits(self, *sites: Site) -> bool:
        """Whether some step changes one of the sites."""
        return any(not s.edit.reads for site in sites for s in self.at(site))

    def tiles(self, site: Site) -> tuple[Step, ...]:
        """The steps that act on the site's tiles, and do not just read their summary."""
        return self._tiles.get(site, ())

    @cached_property
    def summed(self) -> tuple[Step, ...]:
        """The steps that read the pattern's summary."""
        return tuple(s for s in self.at(Site.PATTERN) if s.edit.sums and s.edit.reads)

    @cached_property
    def wanted(self) -> frozenset[str]:
        """The parts of the summary that they read."""
        return frozenset(part for step in self.summed for part in step.edit.sums)

    @cached_property
    def needs(self) -> Needs:
        """What the steps need of a backend, whatever the call."""
        return Needs.of(self.steps)

    @cached_property
    def shifts(self) -> tuple[Step, ...]:
        """The steps that move weight between whole columns."""
        return tuple(s for s in self.at(Site.PATTERN) if s.edit.shifts)

    def before(self, shift: Step) -> Plan:
        """What makes the pattern that a shift is told about."""
        edits = (s for s in self.steps if s.edit.site in MAP_SITES and not s.edit.reads)
        earlier = self.at(Site.PATTERN)[: self.at(Site.PATTERN).index(shift)]
        return Plan(tuple(s for s in edits if s.edit.site is not Site.PATTERN or s in earlier))

    def acts_inside(self) -> bool:
        """Whether something acts between projection and output projection."""
        return any(s.edit.site not in HEADLESS_SITES for s in self.steps)

    @property
    def whole_map(self) -> bool:
        return any(s.method.whole_map for s in self.steps)


@dataclass
class Book:
    """The only mutable thing in a run."""

    stack: Stack
    params: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)  # (part, layer)
    statistics: dict[Key, Statistic] = field(default_factory=dict)
    entered: Counter[int] = field(default_factory=Counter)
    offered: Counter[Step] = field(default_factory=Counter)
    clean: set[Step] = field(default_factory=set)  # seen to leave their input alone, where tensors count no versions
    changed: set[Step] = field(default_factory=set)
    calls: dict[int, Call] = field(default_factory=dict)  # each layer's largest call, for counting its pairs
    backends: dict[int, str] = field(default_factory=dict)
    kept: dict[int, tuple[int, int]] = field(default_factory=dict)  # cache entries kept and seen, by layer
    notes: dict[int, Notes] = field(default_factory=dict)  # what methods keep with the cache of the call, by layer
    forward: int = -1

    def __post_init__(self) -> None:
        self._highest: dict[int, Tensor] = {}  # of all that the heads of each layer gave, without its sign
        self._memory: dict[tuple[int, int], dict[str, Any]] = defaultdict(dict)
        self._scratch: dict[int, dict[str, Any]] = defaultdict(dict)
        self._open: dict[Key, Statistic] = {}
        self._plans: dict[tuple[int, Phase], Plan] = {}
        # whose notes a cache holds
        self.writers = tuple(f"{s.number} {s.part!r}" for s in self.stack.steps() if s.edit.site is Site.CACHE)

    def plan(self, layer: int, phase: Phase) -> Plan:
        found = self._plans.get((layer, phase))
        if found is None:
            found = self._plans[layer, phase] = Plan(self.stack.steps(layer, phase))
        return found

    def new_forward(self) -> None:
        """A new pass of the whole model begins."""
        self.forward += 1
        self._scratch.clear()
        self._open.clear()

    def forget(self) -> None:
        """Forget what methods remember of the text so far."""
        self._memory.clear()

    @contextmanager
    def branch(self) -> Iterator[None]:
        """A `with` after which methods remember what they did before it."""
        before, self._memory = self._memory, copy.deepcopy(self._memory)
        try:
            yield
        finally:
            self._memory = before

    def view(self, step: Step, call: Call) -> Call:
        """The call as one method sees it."""
        n = step.number
        return replace(
            call,
            params=self.params.get((n, call.layer), {}),
            memory=self._memory[n, call.layer],
            scratch=self._scratch[n],
            notes=self.notes.get(call.layer, {}).setdefault(n, {}),
        )

    def note(self, step: Step, call: Call, found: object) -> None:
        """Take what a reader found in a tile."""
        if found is None:
            return
        if not isinstance(found, Statistic):
            raise DefinitionError(
                f"{step}: a reader returns a statistic or None, not {type(found).__name__}; wrap it, as in Sum.of(x)"
            )
        key = (step.number, step.edit.name, call.layer)
        self._open[key] = self._open[key] + found if key in self._open else found

    def close_call(self, plan: Plan, call: Call) -> None:
        """Hand what the tiles of a call added up to over to the run."""
        for step in plan.steps:
            if not step.edit.reads:
                continue
            key = (step.number, step.edit.name, call.layer)
            if key in self._open:
                whole = step.method.finish(self._open.pop(key), self.view(step, call))
                self.statistics[key] = self.statistics[key] + whole if key in self.statistics else whole

    def watch(self, step: Step, old: Any, new: Any) -> None:
        """Remember whether a step has ever changed anything; looks no further once it has."""
        self.offered[step] += 1
        if step in self.changed or new is old:
            return
        if not isinstance(new, Tensor) or new.shape != old.shape or not torch.equal(new, old):
            self.changed.add(step)

    def remember(self, call: Call) -> None:
        """Keep the places and rules of a layer's largest call; of its tensors, only what a rule itself holds on to."""
        have = self.calls.get(call.layer)
        size = len(call.queries) * len(call.keys)
        if have is None or size >= len(have.queries) * len(have.keys):
            self.calls[call.layer] = replace(call, hidden=None, turn=None, query=None, key=None, value=None)

    def look_for_nan(self, layer: int, x: Tensor) -> None:
        if not x.numel():
            return
        low, high = x.detach().aminmax()  # NaN where a single number is
        found = torch.maximum(-low, high)
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
