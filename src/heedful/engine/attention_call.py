"""One call of an attention layer, with everything the model says about it that is not a method's business."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from heedful.core.call import Call
from heedful.core.method import Step
from heedful.core.reweight import Reweight
from heedful.core.summary import SummaryAccumulator
from heedful.engine.needs import Needs
from heedful.engine.one_forward import Spare
from heedful.engine.plan import Plan
from heedful.engine.run_state import RunState


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """A call as methods see it, the plan of what they do in it, and what else the model says."""

    plan: Plan
    run_state: RunState
    call: Call
    bias: Tensor | None = None  # [b|1, h|1, q|1, k], added to scores
    sink: Tensor | None = None  # [b|1, h, q|1, 1], a logit without key or value
    dropout: float = 0.0
    keep_pattern: bool = False  # the caller wants the whole pattern back
    accumulator: SummaryAccumulator | None = None  # what the call's pattern adds up to, where some step wants to know
    needs: Needs | None = None  # what the backend was chosen by
    spare: Spare | None = None  # where tiles write their maps
    reweights: Mapping[Step, Reweight | None] = field(default_factory=dict)  # those known already
    diagonal: bool = False  # the bias is of the call's `diagonals` alone, [1, h|1, 1, q+k-1]

    def lent(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        """Where a tile's map may be written, if nobody keeps it."""
        return None if self.spare is None else self.spare(name, shape, like)
