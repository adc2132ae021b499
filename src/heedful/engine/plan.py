"""What the steps of one layer in one phase come to: all that is known of its calls before one of them comes."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property
from typing import Any

from heedful.core.call import DenoisingStep
from heedful.core.errors import FieldError
from heedful.core.method import Method, Scoped, Step
from heedful.core.sites import HEADLESS_SITES, MAP_SITES, Site
from heedful.engine.needs import Needs

_EARLY = frozenset({Site.HIDDEN, Site.BLOCK})


class Plan:
    """The steps of one layer in one phase, by site; those that are served `apart` take no part in the tiles.

    A run makes one for each layer, phase and set of idle parts, and every call looks its own up.
    """

    def __init__(self, steps: tuple[Step, ...], apart: tuple[Step, ...] = ()) -> None:
        self.steps = steps
        self.apart = apart
        self._by_site: dict[Site, tuple[Step, ...]] = {
            site: tuple(s for s in steps if s.edit.site is site) for site in {s.edit.site for s in steps}
        }
        self._tiles = {
            site: tuple(s for s in found if not (s.edit.sums and s.edit.reads) and s not in apart)
            for site, found in self._by_site.items()
        }
        self.acts = frozenset(site for site, found in self._tiles.items() if found)  # where a call's values are staged
        self.backends: dict[Hashable, Any] = {}  # those chosen so far for calls of some kind, see `Needs.kind`

    def at(self, site: Site) -> tuple[Step, ...]:
        return self._by_site.get(site, ())

    def edits(self, *sites: Site) -> bool:
        """Whether some step changes one of the sites."""
        return any(not s.edit.reads for site in sites for s in self.at(site))

    def tiles(self, site: Site) -> tuple[Step, ...]:
        """The steps that act on the site's tiles, and do not just read their summary."""
        return self._tiles.get(site, ())

    @cached_property
    def may_idle(self) -> tuple[Step, ...]:
        """The steps of methods that sometimes have nothing to do."""
        return tuple(s for s in self.steps if type(s.method).idle is not Method.idle)

    @cached_property
    def merging(self) -> tuple[Step, ...]:
        """The steps that may leave fewer tokens."""
        return tuple(s for s in self.steps if s.edit.merges)

    @cached_property
    def settled(self) -> bool:
        """Whether all of it acts in every call, and no call is refused for it."""
        return not (self.may_idle or self._stepwise or self.merging)

    @cached_property
    def _stepwise(self) -> dict[int, Scoped]:
        """The parts that act in some denoising steps alone, by number."""
        return {s.number: s.part for s in self.steps if isinstance(s.part, Scoped) and s.part.steps is not None}

    def left_out(self, at: DenoisingStep | None) -> frozenset[int]:
        """The parts that do not act in a denoising step."""
        for part in self._stepwise.values():
            if at is None:
                rule = "acts in some denoising steps, and the run was not told at which one the model is"
                raise FieldError(repr(part), "steps", list(part.steps or ()), rule, "with run.denoising(0, of=50): ...")
        return frozenset(n for n, part in self._stepwise.items() if at and at.number not in (part.steps or ()))

    @cached_property
    def summed(self) -> tuple[Step, ...]:
        """The steps that read the pattern's summary."""
        return tuple(s for s in self.at(Site.PATTERN) if s.edit.sums and s.edit.reads)

    @cached_property
    def one_text(self) -> Step | None:
        """A step that takes a row for one text, if one does: what is summed up is of texts."""
        return next((s for s in self.steps if s.method.one_text or s in self.summed), None)

    @cached_property
    def readers(self) -> tuple[Step, ...]:
        """The steps that have something to hand over when a call ends."""
        return tuple(s for s in self.steps if s.edit.reads)

    @cached_property
    def learning(self) -> tuple[Step, ...]:
        """The steps on whose parameters the weights may depend."""
        return tuple(s for s in self.steps if s.edit.site in MAP_SITES and not s.edit.weighs)

    @cached_property
    def early(self) -> frozenset[Site]:
        """Where it acts, or is asked, before a layer has made queries, keys and values."""
        return frozenset(s.edit.site for s in self.steps if s.edit.site in _EARLY or s.edit.before_rotary)

    @cached_property
    def requested(self) -> frozenset[str]:
        """The parts of the summary that they read."""
        return frozenset(part for step in self.summed for part in step.edit.sums)

    @cached_property
    def needs(self) -> Needs:
        """What the steps need of a backend, whatever the call."""
        return Needs.of(self.steps)

    @cached_property
    def reweights(self) -> tuple[Step, ...]:
        """The steps that move weight between whole columns."""
        return tuple(s for s in self.at(Site.PATTERN) if s.edit.reweights)

    @cached_property
    def above(self) -> int:
        """How many rows above a tile its edits look at."""
        methods = {s.number: s.method for s in self.steps if s.edit.site in MAP_SITES and not s.edit.adds}
        return sum(method.above() for method in methods.values())

    def before(self, reweighting: Step) -> Plan:
        """What makes the pattern that a reweighting is told about."""
        edits = (s for s in self.steps if s.edit.site in MAP_SITES and not s.edit.reads)
        earlier = self.at(Site.PATTERN)[: self.at(Site.PATTERN).index(reweighting)]
        return Plan(tuple(s for s in edits if s.edit.site is not Site.PATTERN or s in earlier))

    @cached_property
    def inside(self) -> bool:
        """Whether something acts between projection and output projection."""
        return any(s.edit.site not in HEADLESS_SITES for s in self.steps)


NO_STEPS = Plan(())
