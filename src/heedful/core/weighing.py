"""Weights that are made of their scores one by one: the mechanism beside softmax that kernels know.

Where keys do not compete, a row has no sum to wait for. A method of that kind marks its function with `@weighs` and
says what a weight is of its score; tiles compute it in torch, and `native` and `triton` in their kernels, there and
back, so that no map is held. What needs more of a row than how many keys it sees is an edit of NORMALISE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from heedful.core.errors import DefinitionError, nearest
from heedful.core.sites import Edit, F, Site, marking

Form = Literal["sigmoid", "relu"]
FORMS: tuple[str, ...] = get_args(Form)  # the native kernel counts them in this order


@dataclass(frozen=True)
class Weighing:
    """A weight is `form(score + shift)`, whatever the others in its row are."""

    form: Form
    shift: float = 0.0
    mean: bool = False  # divided by the number of keys that its query sees

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            known = ", ".join(FORMS)
            raise DefinitionError(
                f"Weighing({self.form!r}): no such form; there are {known}.{nearest(self.form, FORMS)}"
            )
        if not math.isfinite(self.shift):
            raise DefinitionError(f"Weighing(shift={self.shift}): must be finite, for example -math.log(2048)")

    def of(self, scores: Tensor, keep: Tensor | None = None) -> Tensor:
        """A tile's weights; `keep` are the pairs that are computed, None for all: the engine zeroes what others get."""
        weights = getattr(torch, self.form)(scores + self.shift)
        if not self.mean:
            return weights
        # a row that sees nothing is zeroed too, and would have no number on the way back
        return weights / (scores.shape[-1] if keep is None else keep.sum(-1, keepdim=True).clamp(min=1))


def weighs(function: F) -> F:
    """Mark a function that takes the call and returns a `Weighing`, in place of an edit of NORMALISE.

    It is asked with the whole call, once or tile by tile, and answers the same each time.
    """
    return marking(Edit(Site.NORMALISE, weighs=True))(function)
