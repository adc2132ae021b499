"""What a call needs of a backend."""

from __future__ import annotations

from dataclasses import dataclass

from heedful.core.sites import MAP_SITES, Site
from heedful.core.stack import Step


@dataclass(frozen=True)
class Needs:
    """The facts on which a backend may have to pass."""

    map_steps: tuple[str, ...] = ()  # steps that read or edit SCORES, NORMALISE or PATTERN
    mask_steps: tuple[str, ...] = ()  # steps that narrow MASK
    whole_map: tuple[str, ...] = ()  # map steps that must see all rows at once
    softcap: bool = False
    sink: bool = False
    pattern: bool = False  # the caller wants the pattern back

    @classmethod
    def of(cls, steps: tuple[Step, ...], softcap: bool = False, sink: bool = False, pattern: bool = False) -> Needs:
        inside = [s for s in steps if s.edit.site in MAP_SITES]
        return cls(
            tuple(str(s) for s in inside),
            tuple(str(s) for s in steps if s.edit.site is Site.MASK and not s.edit.reads),
            tuple(str(s) for s in steps if s.method.whole_map and s.edit.site in MAP_SITES | {Site.HEADS}),
            softcap,
            sink,
            pattern,
        )
