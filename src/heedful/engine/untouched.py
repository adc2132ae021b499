"""Whether a step left what it was handed as it was."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from heedful.core.errors import SiteError
from heedful.core.method import Step
from heedful.engine.attention_call import AttentionCall

OURS = "view was created inside a custom Function"  # what torch says of a change in place of what we hand over


class Untouched:
    """A `with` that sees to it that a step leaves what it is handed as it was.

    Inference tensors count no versions: they are compared with copies until the step was seen to be clean.
    """

    def __init__(self, step: Step, job: AttentionCall, *given: Any) -> None:
        self.step, self.job = step, job
        self.counted: list[tuple[Tensor, int]] = []
        self.copied: list[tuple[Tensor, Tensor]] = []
        for x in given:
            if not isinstance(x, Tensor):
                continue
            if not x.is_inference():
                self.counted.append((x, x._version))
            elif step not in job.run_state.clean:
                self.copied.append((x, x.clone()))

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if isinstance(error, RuntimeError) and OURS in str(error):  # torch saw it first, as it does with gradients
            raise self._changed from error
        if kind is not None:
            return
        for x, version in self.counted:
            if x._version != version:
                raise self._changed
        for x, copy in self.copied:
            if not _alike(x, copy):
                raise self._changed
        if self.copied:
            self.job.run_state.clean.add(self.step)

    @property
    def _changed(self) -> SiteError:
        return self.step.fault(self.job.call, "changed its input in place; return a new tensor instead")


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal, where no number equals itself."""
    return bool(((a == b) | ((a != a) & (b != b))).all())
