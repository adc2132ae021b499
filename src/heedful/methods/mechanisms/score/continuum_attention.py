"""softmax(s_ij + log w_j): tokens are samples of a function, and w_j is the weight of sample j in an integral."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import torch
from annotated_types import MinLen
from torch import Tensor

from heedful.authoring import Call, FieldError, Method, Paper, PositiveFloat, SiteError, adds


class ContinuumAttention(Method):
    """Attention as an integral over a domain: where samples stand close together, each counts for less."""

    paper = Paper(
        "P048",
        "Continuum Attention for Neural Operators",
        "Edoardo Calvello, Nikola B. Kovachki, Matthew E. Levine, Andrew M. Stuart",
        2025,
        "2406.06486",
        "JMLR 26",
        differs=(
            "This is the paper's attention over a domain by any quadrature: `of` has the trapezoidal rule, which the "
            "authors' code has on a line, and equal weights are softmax, which it has over more dimensions. Its "
            "attention between patches of a function, and its convolutions, are not part of it.",
            "One grid serves all texts of a batch: make a value for each grid, and attach it to the same model.",
        ),
    )
    # of each sample, in the order of the tokens; only their ratios count
    weights: Annotated[tuple[PositiveFloat, ...], MinLen(1)] = (1.0,)

    @classmethod
    def of(cls, places: Sequence[float]) -> ContinuumAttention:
        """By the trapezoidal rule, for samples at these places of a line, in ascending order."""
        if len(places) < 2 or any(b <= a for a, b in pairwise(places)):
            raise FieldError(
                f"{cls.__name__}.of()", "places", places, "must ascend, and be two or more", (0.0, 0.1, 0.4)
            )
        first, last = places[0], places[-1]
        ends = zip((first, *places[:-1]), (*places[1:], last), strict=True)
        return cls(tuple((b - a) / 2 for a, b in ends))

    @classmethod
    def neutral(cls) -> ContinuumAttention:
        return cls((1.0,) * 64)

    @classmethod
    def example(cls) -> ContinuumAttention:
        return cls.of([i * i for i in range(64)])

    @adds
    def weigh(self, call: Call) -> Tensor:
        if bool((call.k_pos >= len(self.weights)).any()):
            raise SiteError(
                f"{type(self).__name__}, layer {call.layer}: has weights of {len(self.weights)} samples, and there is "
                f"a token at place {int(call.k_pos.max())}; make one of this grid"
            )
        logs = torch.tensor([math.log(w) for w in self.weights], dtype=torch.float64, device=call.k_pos.device)
        return call.spread(logs[call.k_pos.clamp(min=0)][:, :, None])


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, ContinuumAttention.of([i * i for i in range(inputs["input_ids"].shape[1])])) as run:
        print(run.difference(**inputs))
