"""Stacks as they are handed over, and what of one is served beside the backend."""

from __future__ import annotations

from heedful.core.method import Part, Stack, Step
from heedful.core.sites import MAP_SITES, Site

__all__ = ["Stack", "Step", "apart", "as_stack"]


def as_stack(what: Part | Stack) -> Stack:
    return what if isinstance(what, Stack) else Stack((what,))


def apart(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The readers of a pattern's first rows that are served beside the backend: all, where nothing edits the map."""
    if any(s.edit.site in MAP_SITES and not s.edit.reads for s in steps):
        return ()
    return tuple(s for s in steps if s.edit.site is Site.PATTERN and s.first is not None)
