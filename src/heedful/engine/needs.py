"""What a call needs of a backend."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.flags import traced
from heedful.core.method import Step
from heedful.core.sites import MAP_SITES, Site

TRANSFORMED = "torch.func or forward derivatives are in use"


def tilewise(step: Step) -> bool:
    """Whether a step edits the map in a way that kernels know too, and any tile of it can be made by itself."""
    return step.edit.adds or (step.edit.weighs and step.heads is None)


def apart(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The readers of a pattern's first rows that are served beside the backend: all, where no tile must be kept."""
    if any(s.edit.site in MAP_SITES and not s.edit.reads and not tilewise(s) for s in steps):
        return ()
    return tuple(s for s in steps if s.edit.site is Site.PATTERN and s.first is not None)


@dataclass(frozen=True)
class Needs:
    """The facts on which a backend may have to pass."""

    map_steps: tuple[str, ...] = ()  # steps that edit SCORES, NORMALISE or PATTERN otherwise, or read their tiles
    reweights: tuple[str, ...] = ()  # steps that move weight between whole columns of the pattern
    adds: tuple[str, ...] = ()  # steps that add to scores what does not depend on them
    weighed: tuple[str, ...] = ()  # the step that makes each weight of its score alone
    sum_steps: tuple[str, ...] = ()  # steps that read the pattern's summary
    sums: frozenset[str] = frozenset()  # the parts of it that they read
    learned_sums: frozenset[str] = frozenset()  # those of them that a penalty is made of
    mask_steps: tuple[str, ...] = ()  # steps that narrow MASK
    whole_map: tuple[str, ...] = ()  # map steps that must see all rows at once
    softcap: bool = False
    sink: bool = False
    sink_learns: bool = False
    sinks_by_row: bool = False  # of each text or query, not of each head alone
    bias: bool = False
    bias_learns: bool = False
    dropout: bool = False
    pattern: bool = False  # the caller wants the pattern back
    call: Call | None = None  # after every MASK step; None where only a stack is known
    tensors: tuple[Tensor, ...] = ()  # queries, keys and values, where there are any
    learned: tuple[Tensor, ...] = ()  # what else the weights depend on: sink logits, parameters of edits

    @classmethod
    def of(
        cls, steps: tuple[Step, ...], softcap: bool = False, sink: bool = False, pattern: bool = False, **more: Any
    ) -> Needs:
        """What the steps and the model want, and whatever else is known of the call."""
        beside = apart(steps)
        inside = [s for s in steps if s.edit.site in MAP_SITES and s not in beside]
        return cls(
            map_steps=tuple(
                str(s) for s in inside if not (s.edit.reweights or tilewise(s) or (s.edit.sums and s.edit.reads))
            ),
            adds=tuple(str(s) for s in inside if s.edit.adds),
            weighed=tuple(str(s) for s in inside if s.edit.weighs),
            reweights=tuple(str(s) for s in inside if s.edit.reweights),
            sum_steps=tuple(str(s) for s in inside if s.edit.sums and s.edit.reads),
            sums=frozenset(part for s in inside for part in s.edit.sums),
            learned_sums=frozenset(part for s in inside if s.edit.loss for part in s.edit.sums),
            mask_steps=tuple(str(s) for s in steps if s.edit.site is Site.MASK and not s.edit.reads),
            whole_map=tuple(
                str(s) for s in steps if s.method.whole_map and s.edit.site in MAP_SITES | {Site.HEAD_OUTPUT}
            ),
            softcap=softcap,
            sink=sink,
            pattern=pattern,
            **more,
        )

    @property
    def kind(self) -> Hashable:
        """All that the backends' answers hang on, beside the steps, in a call of one query for each head.

        None where there are more, or blocks or gradients: there they look at where keys lie, and at parameters.
        """
        call = self.call
        if call is None or not call.queries.single or call.mask.blocks or self.gradients or self.transformed:
            return None
        kinds = tuple([(type(x), x.dtype, x.device, x.shape[-1]) for x in self.tensors])
        return (
            kinds, call.keys.pads is None, self.softcap, self.sink, self.sink_learns, self.sinks_by_row, self.bias,
            self.bias_learns, self.dropout, self.pattern,
        )  # fmt: skip

    @cached_property
    def gradients(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.tensors + self.learned)

    @cached_property
    def transformed(self) -> bool:
        """Whether torch derives forwards here, or runs over many inputs at once, which its own functions alone know."""
        return traced(*self.tensors, *self.learned)

    @property
    def sees_all(self) -> bool:
        """Whether the call is one query for each head, known to see every key that its head has."""
        if self.call is None or not self.call.queries.single:
            return False
        q, k = self.call.queries, self.call.keys
        return (k.is_filled is None or k.filled is not None) and self.call.mask.idle(q, k)

    @cached_property
    def key_ranges(self) -> Tensor | None:
        """The ranges of keys that each query sees, see `core.key_ranges`; None where a row has too many."""
        if self.call is None:
            return None
        return self.call.mask.key_ranges(self.call.queries, self.call.keys, self.call.heads)
