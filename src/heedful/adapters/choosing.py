"""Which adapter gets into a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from heedful.adapters.layers import interface_layers, leftovers, parts_of
from heedful.adapters.operations.sdpa import SdpaAdapter
from heedful.adapters.spread import is_spread
from heedful.adapters.transformers import TransformersAdapter
from heedful.adapters.wrapped import shared_by, stays_one, unwrapped
from heedful.core.errors import FieldError, HeedfulError, RefusedModel


def adapter_for(
    model: nn.Module, only: str | Iterable[str] | None = None, inputs: Any = None
) -> TransformersAdapter | SdpaAdapter:
    """transformers' own interface for a model that goes through it, torch's operations for any other."""
    shared, parts = shared_by(model), parts_of(only)
    if any(isinstance(part, PreTrainedModel) for part in model.modules()):
        inner = unwrapped(model)
        if interface_layers(inner) or not leftovers(inner):
            if inputs is not None:
                rule = "tells the layers of other models; those that go through transformers' interface are known"
                raise FieldError("attach()", "inputs", type(inputs).__name__, rule, None)
            return TransformersAdapter(inner, parts, shared)
        adapter = SdpaAdapter(inner, parts, inputs, shared_by=shared)
        if inputs is None and inner.main_input_name == "input_ids":
            _read_a_little(adapter, inner)
        return adapter
    if not shared and is_spread(model):
        raise RefusedModel(
            f"{type(model).__name__} is no model of transformers, and its weights are spread over processes, each with "
            "a part of the heads, which heedful joins for those alone; load it whole"
        )
    return SdpaAdapter(_inside(model), parts, inputs, shared_by=shared)


def _read_a_little(adapter: SdpaAdapter, model: PreTrainedModel) -> None:
    """Know the layers of a model of texts from the few tokens that transformers has for it, if it takes just these."""
    few = {name: x.to(model.device) for name, x in model.dummy_inputs.items() if isinstance(x, Tensor)}
    try:
        adapter.look(lambda: model.forward(**few))
    except HeedfulError:
        raise
    except Exception:  # noqa: BLE001 - it wants more than tokens: its first forward tells
        return


def _inside(model: nn.Module) -> nn.Module:
    """The model that torch's own wrappers are around."""
    while isinstance(model, OptimizedModule | DataParallel | DistributedDataParallel):
        stays_one(model)
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model
