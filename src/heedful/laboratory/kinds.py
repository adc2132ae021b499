"""Which courses make up a kind of lab."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from heedful.core.errors import FieldError, StatisticError
from heedful.laboratory.backcopy import BackCopy
from heedful.laboratory.bags import Bags
from heedful.laboratory.course import Course
from heedful.laboratory.images import Digits
from heedful.laboratory.language import Text
from heedful.laboratory.puzzles import Puzzles
from heedful.laboratory.regression import Regression
from heedful.laboratory.strings import Strings

KINDS: dict[str, tuple[type[Course], ...]] = {
    "lm": (Text, Puzzles, Regression), "vit": (Digits,), "seq2seq": (Strings,), "pool": (Bags,),
    "sinks": (BackCopy,),
}  # fmt: skip
DEFAULTS = {  # eight ways apart from one another
    "lm": (
        "ClippedSoftmax", "SigmoidAttention(128)", "NormalizedAttention", "RectifiedAttention", "GatedHeads", "MALA",
        "LightConv", "DynamicMaskAttention(32)",
    ),
    "vit": (
        "ClippedSoftmax", "SigmoidAttention(37)", "NormalizedAttention", "RectifiedAttention", "GatedHeads", "MALA",
        "MixtureOfHeads(2, 1)", "NeighborhoodAttention(3)",
    ),
    "seq2seq": (
        "ClippedSoftmax", "SigmoidAttention(11)", "NormalizedAttention", "RectifiedAttention", "GatedHeads", "MALA",
        "MixtureOfHeads(2, 1)", "AffineScaledAttention",
    ),
    "pool": (
        "ClippedSoftmax", "SigmoidAttention(26)", "NormalizedAttention", "RectifiedAttention", "GatedHeads",
        "MixtureOfHeads(2, 1)", "EfficientProbing(4)", "MALA",
    ),
    "sinks": (
        "ClippedSoftmax(-0.1)", "SigmoidAttention(32)", "NormalizedAttention", "RectifiedAttention", "GatedHeads",
        "GatedNorm", "SoftplusAttention", "MALA",
    ),
}  # fmt: skip


def courses(kind: str, tokens: int | None) -> tuple[Course, ...]:
    """The courses of a kind, each with so many tokens or with its own default."""
    if kind not in KINDS:
        rule = f"must be one of {', '.join(KINDS)}"
        raise FieldError("lab()", "kind", kind, rule, next(iter(KINDS)))
    made = tuple(course() for course in KINDS[kind])  # type: ignore[call-arg]  # each has defaults
    return made if tokens is None else tuple(replace(course, tokens=tokens) for course in made)


def by_name() -> dict[str, type[Course]]:
    """Every course, in the order in which tables show them."""
    return {course.name: course for courses in KINDS.values() for course in courses}


def course_of(name: str, settings: Mapping[str, Any]) -> Course:
    """A course as a record names it."""
    known = by_name()
    if name not in known:
        raise StatisticError(f"no course is named {name!r}; there are {', '.join(known)}")
    return known[name](**settings)
