"""Which adapter gets into a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from heedful.adapters.layers import parts_of
from heedful.adapters.sdpa import SdpaAdapter
from heedful.adapters.spread import is_spread
from heedful.adapters.transformers import TransformersAdapter, adapt
from heedful.adapters.wrapped import shared_by, stays_one
from heedful.core.errors import FieldError, RefusedModel


def adapter_for(
    model: nn.Module, only: str | Iterable[str] | None = None, inputs: Any = None
) -> TransformersAdapter | SdpaAdapter:
    """transformers' own interface for a model of transformers, torch's attention for any other."""
    if any(isinstance(part, PreTrainedModel) for part in model.modules()):
        if inputs is not None:
            rule = "tells the layers of models from elsewhere; those of transformers are known as they are"
            raise FieldError("attach()", "inputs", type(inputs).__name__, rule, None)
        return adapt(model, only)
    shared = shared_by(model)
    if not shared and is_spread(model):
        raise RefusedModel(
            f"{type(model).__name__} is no model of transformers, and its weights are spread over processes, each with "
            "a part of the heads, which heedful joins for those alone; load it whole"
        )
    return SdpaAdapter(_inside(model), parts_of(only), inputs, shared_by=shared)


def _inside(model: nn.Module) -> nn.Module:
    """The model that torch's own wrappers are around."""
    while isinstance(model, OptimizedModule | DataParallel | DistributedDataParallel):
        stays_one(model)
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model
