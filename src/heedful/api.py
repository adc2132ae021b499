"""What a user does with a method and a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from heedful.catalogue import stack_from
from heedful.core.asked import asks
from heedful.core.entry import CatalogueEntry, FitContext, Layer
from heedful.core.errors import FieldError, InactiveWarning
from heedful.core.kinds.conversion import Conversion, Report
from heedful.core.kinds.decode import NOTHING
from heedful.core.kinds.loaded import Loaded, model_of
from heedful.core.kinds.tokens import Prompt, Reader, Tokens
from heedful.core.kinds.weights import HeadWeights, Surgery, Vocabulary
from heedful.core.method import Method, Part, Stack
from heedful.core.ranges import PositiveInt
from heedful.core.regions import Roles
from heedful.engine import select
from heedful.engine.resting import resting, undone
from heedful.engine.run import Run
from heedful.folding import rewritten

if TYPE_CHECKING:
    from heedful.adapters.adapter import ModelAdapter
    from heedful.engine.select import Explanation


@asks
def attach(
    model: nn.Module | Loaded,
    what: Part | Stack | str,
    *,
    only: str | Iterable[str] | None = None,
    backend: str = "auto",
    roles: Roles | Sequence[Roles] | None = None,
    tile_rows: PositiveInt | None = None,
    inputs: Any = None,
) -> Run:
    """Put a method or a stack into a model's attention until the run is closed.

    What acts is a value or, as on the command line, its spelling: "sinkwindow(sinks=4, window=64) | sinkrate".

    The model is one of transformers or a module around one, as it is or as `heedful.models` loads it, or any other that
    calls torch's attention, as those of timm, diffusers and open_clip do. The layers of such a model are found by
    running it once, without gradients: with `inputs` (one argument, a tuple of them, a mapping of named ones, or a
    function that calls the model), else with what its first forward under the run is given.
    A model of transformers may have layers beside its attention interface; these are looked at when they are first
    reached, or as `inputs` show them.
    `only` names the part of the model to serve by dotted prefix, `roles` names spans of token positions, in
    every text or, as a list, in each; `backend` demands one instead of letting heedful choose, `tile_rows` fixes the
    rows of a tile.
    """
    from heedful.adapters.choosing import adapter_for
    from heedful.adapters.wrapped import device_of

    model = model_of(model)
    device_of(model)  # or the reason why it computes nowhere
    stack: Any = stack_from(what, "attach()", "what") if isinstance(what, str) else what
    return Run(model, stack, adapter_for(model, only, inputs), backend, roles, tile_rows)


@asks
def attached(model: nn.Module | Loaded) -> Run | None:
    """The run that is attached to a model or to a part of it, as one whose name is lost; None where there is none."""
    from heedful.adapters.bound import server_of

    found = next((server for module in model_of(model).modules() if (server := server_of(module)) is not None), None)
    return None if found is None else cast("Run", found.run)


@asks
def explain(what: Part | Stack | str, *, softcap: bool = False, sink: bool = False) -> Explanation:
    """How a method or a stack, as a value or its spelling, would be computed in a layer where all of it acts."""
    stack: Any = stack_from(what, "explain()", "what") if isinstance(what, str) else what
    return select.explain(stack, softcap=softcap, sink=sink)


class _FitContext:
    """A model as fits see it: any can be run under a stack, and those of transformers tell sizes and weights too."""

    def __init__(self, model: nn.Module, only: str | Iterable[str] | None) -> None:
        self.model, self.only = model, only

    @cached_property
    def _adapter(self) -> ModelAdapter:
        from heedful.adapters.choosing import adapter_for

        return adapter_for(self.model, self.only)

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self._adapter.sizes()

    def weights(self, layer: int) -> HeadWeights:
        from heedful.adapters.projections import projections
        from heedful.adapters.weights import read_weights

        return read_weights(projections(self._adapter.model, self._adapter.layer_names[layer], layer))

    def scale(self, layer: int) -> Tensor | None:
        from heedful.adapters.weights import read_scale

        return read_scale(self._adapter.model, self._adapter.layer_names[layer])

    def vocabulary(self) -> Vocabulary:
        from heedful.adapters.weights import read_vocabulary

        return read_vocabulary(self.model)

    def attach(self, what: Part | Stack) -> Run:
        return attach(self.model, what, only=self.only)

    def after(self, surgery: Surgery) -> _FitContext:
        return _FitContext(operate(self.model, surgery, only=self.only), self.only)


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients of its own, for the length of a `with`; then as it was."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def undo() -> None:
        for p, required, grad in before:
            p.requires_grad_(required)
            p.grad = grad

    with undone(undo), resting(model):
        for p, _, _ in before:
            p.requires_grad_(False)
        yield


@asks
def fit(
    method: CatalogueEntry,
    model: nn.Module | Loaded,
    batches: Iterable[Mapping[str, Any]],
    *,
    only: str | Iterable[str] | None = None,
    out: str | Path | None = None,
    progress: Report | None = None,
) -> Any:
    """A new method fitted to the model on data; the model stays as it is, its gradients too.

    Of a conversion, the run of a copy that has learned it. A conversion may be long: it keeps its state in the folder
    `out`, from which the same call goes on where it stopped, and tells `progress` of each step.
    """
    model = model_of(model)
    if isinstance(method, Conversion):
        from heedful.converting import converted

        return converted(method, model, batches, only, out, progress)
    for name, given in (("out", out), ("progress", progress)):
        if given is not None:
            rule = f"is for conversions; {type(method).__name__} is fitted in one go"
            raise FieldError("fit()", name, given, rule, None)
    with still(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", InactiveWarning)  # what a fit starts from changes nothing, often on purpose
        context: FitContext = _FitContext(model, only)
        return method.fit(context, batches)


@torch.no_grad()
@asks
def operate(model: nn.Module | Loaded, *surgeries: Surgery, only: str | Iterable[str] | None = None) -> Any:
    """A copy of the model with edited weights, which needs no heedful to run; `fold` asks that it can be saved too."""
    for surgery in surgeries:
        if not isinstance(surgery, Surgery):
            rule = "must be surgery; attach() methods instead, or fold() them"
            raise FieldError("operate()", "surgeries", surgery, rule, "PruneHeads()")
    return rewritten(model_of(model), surgeries, only, "operate()")[0]


def _tensor(prompt: Prompt, model: nn.Module) -> Tensor:
    from heedful.adapters.wrapped import device_of

    return torch.tensor([prompt.tokens], device=device_of(model))


@torch.no_grad()
@asks
def arrange(model: nn.Module, prompt: Prompt, step: Tokens, *, only: str | Iterable[str] | None = None) -> Prompt:
    """The prompt as a token step would have it."""
    return step.arrange(prompt, reader(model, only))


def reader(model: nn.Module, only: str | Iterable[str] | None = None, inputs: Mapping[str, Any] = NOTHING) -> Reader:
    """What reads a prompt under a method and tells its answer; `inputs` go to the model beside the prompt's tokens."""

    def read(shown: Prompt, method: Method) -> Any:
        with attach(model, method, only=only, roles=shown.roles) as run:
            run(input_ids=_tensor(shown, model), use_cache=False, **inputs)
            return run[method]

    return read
