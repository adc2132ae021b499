"""The lab as claims use it: each training is made once, whichever claim asks first, and kept in `claims/.lab`.

A training is found again by its settings, its seed and the code of its mechanism, so that softmax is trained once for
all claims of the same course. Delete the folder after a change of the engine; everything can be trained anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from heedful.core.method import Part, Stack
from heedful.laboratory.course import Course, Opener
from heedful.laboratory.images import Digits
from heedful.laboratory.language import Text
from heedful.laboratory.records import Trainings
from heedful.laboratory.strings import Strings

LAB = Trainings(Path(__file__).parent / ".lab")
SHORT = Text(tokens=204_800)  # 200 steps: what most claims about mechanisms train


@dataclass(frozen=True)
class Bytes(Text):
    """The same training where nothing but the loss is asked for, which takes a third of the time."""

    name: ClassVar[str] = "bytes"
    timed: ClassVar[bool] = False

    def measure(self, opened: Opener, seed: int) -> dict[str, float]:
        with opened() as run:
            return {"loss": self.loss(run, seed)}


BYTES = Bytes(tokens=SHORT.tokens)
DIGITS = Digits(tokens=230_400)  # 200 steps of images
CROSS = Strings(tokens=403_200, where="cross")  # 400 steps, for what acts in cross-attention alone


def numbers(
    ways: Mapping[str, Part | Stack | None], seed: int, *quantities: str, course: Course = SHORT
) -> dict[str, float]:
    """Quantities of a model trained in each way, as "loss, softmax"; None is softmax."""
    found = {name: LAB.record(course, what, seed) for name, what in ways.items()}
    return {f"{quantity}, {name}": record[quantity] for quantity in quantities for name, record in found.items()}
