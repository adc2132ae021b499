"""A law for methods that merge tokens between layers."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from heedful.conformance.model_laws import tried_on
from heedful.conformance.subjects import Subject
from heedful.conformance.tolerances import close_model, error
from heedful.conformance.verdict import Broken, DoesNotApply, law
from heedful.core.method import Method


@law("tokens are merged in each text or image as they would be in it alone, and the order of a batch changes nothing")
def merges_alone(method: Method) -> None:
    if not any(edit.merges for edit in method.edits):
        raise DoesNotApply("merges no tokens")
    for subject, kind, model in tried_on(method):
        _alone(method, subject, kind, model)


def _alone(method: Method, subject: Subject, kind: str, model: nn.Module) -> None:
    inputs, together = subject.inputs(), subject.logits(model, method)

    def of(given: dict[str, Tensor]) -> Tensor:
        return replace(subject, inputs=lambda: given).logits(model, method)

    for row in range(len(together)):
        mine = slice(row, row + 1)
        found = of({name: x[mine] for name, x in inputs.items()})
        if not close_model(together[mine], found):
            raise Broken(f"{kind}: others in its batch move logits by {error(together[mine], found):.2g}")
    swapped = of({name: x.flip(0) for name, x in inputs.items()}).flip(0)
    if not close_model(swapped, together):
        raise Broken(f"{kind}: the order of a batch moves logits by {error(swapped, together):.2g}")
