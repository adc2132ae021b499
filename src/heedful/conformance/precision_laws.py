"""The law of half precision."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from heedful.conformance.bare import Bare, Shape, parameters, serving
from heedful.conformance.model_laws import tried_on
from heedful.conformance.subjects import Subject
from heedful.conformance.tolerances import IN_HALF, close, close_on_average, error
from heedful.conformance.verdict import Broken, law
from heedful.core.errors import InactiveWarning
from heedful.core.method import Method
from heedful.core.sites import HEADLESS_SITES
from heedful.core.stats import Statistic
from heedful.core.values import replace

HALF = torch.float16  # it overflows soonest; bfloat16 has coarser steps, and a choice falls to the other side of one
WHOLE = torch.float32
LARGE = 1000.0  # what the stream of a trained model reaches


@law("in half precision it does and tells what it does in single with the same numbers, but for roundings")
@torch.no_grad()
def half_precision(method: Method) -> None:
    if any(edit.site not in HEADLESS_SITES for edit in method.edits):
        _one_call(method)
    for subject, kind, model in tried_on(method, first=True):
        narrow = copy.deepcopy(model).to(HALF)
        _one_model(method, subject, kind, narrow)
        if (table := _embedding(narrow)) is not None:
            table *= LARGE / table.abs().max()
            _one_model(method, subject, f"{kind} whose stream is large", narrow)


def _one_call(method: Method) -> None:
    backend = serving(method)[-1]
    found, wanted = (_bare(dtype).run(method, backend, params=_learned(method, dtype))[0] for dtype in (HALF, WHOLE))
    if not close(found, wanted.to(HALF), IN_HALF):
        raise Broken(f"from one call's numbers in {HALF} it makes others, by {error(found.float(), wanted):.2g}")


def _learned(method: Method, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(HALF).to(dtype) for name, x in parameters(method, Shape().layer, WHOLE).items()}


def _bare(dtype: torch.dtype) -> Bare:
    """The same numbers, which half precision has, in one type or the other."""
    bare = Bare(depth=2)
    bare.q, bare.k, bare.v, bare.hidden = (x.to(HALF).to(dtype) for x in (bare.q, bare.k, bare.v, bare.hidden))
    bare.call = replace(bare.call, hidden=bare.hidden)
    return bare


def _given(subject: Subject, dtype: torch.dtype) -> Subject:
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in subject.inputs().items()}
    return replace(subject, inputs=lambda: given)


def _one_model(method: Method, subject: Subject, kind: str, narrow: nn.Module) -> None:
    (found, told), (wanted, tells) = (
        _answer(method, _given(subject, dtype), copy.deepcopy(narrow).to(dtype)) for dtype in (HALF, WHOLE)
    )
    if not close_on_average(found, wanted):
        raise Broken(f"{kind}: a model in {HALF} answers otherwise than its numbers do in single")
    for name, statistic in tells.items():
        for part, x in statistic.tensors().items():
            if x.is_floating_point() and not close_on_average(told[name].tensors()[part], x):
                raise Broken(f"{kind}: of a model in {HALF} it tells other {part} than of its numbers in single")


def _embedding(model: nn.Module) -> Tensor | None:
    """What tokens are before the first layer; an image has no such table."""
    return next((m.weight for m in model.modules() if isinstance(m, nn.Embedding)), None)


def _answer(method: Method, subject: Subject, model: nn.Module) -> tuple[Tensor, Mapping[str, Statistic]]:
    """What a model answers under a method, and what that read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InactiveWarning)
        with subject.attach(model, method) as run:
            logits = run(**subject.inputs()).logits
    return logits, {f"{name}, layer {n}": stat for (_, name, n), stat in run.state.statistics.items()}
