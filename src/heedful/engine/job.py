"""One call of an attention layer, with everything the model says about it that is not a method's business."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from heedful.core.call import Call
from heedful.core.shift import Shift
from heedful.core.stack import Step
from heedful.core.summary import Tally
from heedful.engine.book import Book, Plan
from heedful.engine.needs import Needs


@dataclass(frozen=True, eq=False)
class Job:
    """One call and everything the model says about it that is not a method's business."""

    plan: Plan
    book: Book
    call: Call
    bias: Tensor | None = None  # [b|1, h|1, q|1, k], added to scores
    sink: Tensor | None = None  # [b|1, h, q|1, 1], a logit without key or value
    dropout: float = 0.0
    keep_pattern: bool = False  # the caller wants the whole pattern back
    tally: Tally | None = None  # what the call's pattern adds up to, where some step wants to know
    needs: Needs | None = None  # what the backend was chosen by
    shifts: Mapping[Step, Shift | None] = field(default_factory=dict)  # those known already
