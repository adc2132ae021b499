"""The law of half precision."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from heedful.conformance.bare import Bare, Shape, parameters, serving
from heedful.conformance.model_laws import tried_on
from heedful.conformance.subjects import Subject
from heedful.conformance.tolerances import IN_HALF, close, close_on_average, error
from heedful.conformance.verdict import Broken, law
from heedful.core.method import Method
from heedful.core.sites import HEADLESS_SITES
from heedful.core.stats import Statistic
from heedful.core.values import replace

HALF = torch.float16  # it overflows soonest; bfloat16 has coarser steps, and a choice falls to the other side of one
WHOLE = torch.float32
LARGE = 1000.0  # what the stream of a trained model reaches


@law("in half precision it does and tells what it does in single with the same numbers, but for roundings")
def half_precision(method: Method) -> None:
    if any(edit.site not in HEADLESS_SITES for edit in method.edits):
        _one_call(method)
    for subject, kind, model in tried_on(method, first=True):
        narrow = copy.deepcopy(model).to(HALF)
        answer = _given(subject, HALF).logits(narrow, method)
        if answer.dtype is not HALF or not bool(answer.isfinite().all()):
            raise Broken(f"{kind}: a model in {HALF} answers in {answer.dtype}, or in numbers that are not finite")
        if all(edit.reads for edit in method.edits):
            _reading(method, subject, kind, narrow)


def _one_call(method: Method) -> None:
    backend = serving(method)[-1]
    found, wanted = (_bare(dtype).run(method, backend, params=_learned(method, dtype))[0] for dtype in (HALF, WHOLE))
    if found.dtype is not HALF:
        raise Broken(f"heads in {HALF} are answered in {found.dtype}")
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


@torch.no_grad()
def _reading(method: Method, subject: Subject, kind: str, narrow: Any) -> None:
    """What is told of a model whose stream is large."""
    if isinstance(table := _embedding(narrow), Tensor):
        table *= LARGE / table.abs().max()
    found = _told(method, _given(subject, HALF), narrow)
    wanted = _told(method, _given(subject, WHOLE), copy.deepcopy(narrow).float())
    for name, statistic in wanted.items():
        for part, x in statistic.tensors().items():
            y = found[name].tensors()[part]
            if x.is_floating_point() and not close_on_average(y, x):
                raise Broken(f"{kind}: of a model in {HALF} it tells other {part} than of its numbers in single")


def _embedding(model: nn.Module) -> Tensor | None:
    return next((m.weight for m in model.modules() if isinstance(m, nn.Embedding)), None)


def _told(method: Method, subject: Subject, model: nn.Module) -> Mapping[str, Statistic]:
    with subject.attach(model, method) as run:
        run(**subject.inputs())
    return {f"{name}, layer {n}": stat for (_, name, n), stat in run.state.statistics.items()}
