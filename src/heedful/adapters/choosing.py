"""How a run gets into a model, which may be wrapped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from heedful.adapters.adapter import ModelAdapter
from heedful.adapters.layers import parts_of
from heedful.adapters.spread import is_spread
from heedful.adapters.wrapped import shared_by, stays_one, unwrapped
from heedful.core.errors import HeedfulError, RefusedModel


def adapter_for(model: nn.Module, only: str | Iterable[str] | None = None, inputs: Any = None) -> ModelAdapter:
    """What gets a run into a model, or into the one of transformers that is inside it."""
    shared, parts = shared_by(model), parts_of(only)
    if any(isinstance(part, PreTrainedModel) for part in model.modules()):
        inner = unwrapped(model)
        adapter = ModelAdapter(inner, parts, inputs, shared, around=model)
        if not adapter.ready and inner.main_input_name == "input_ids":
            _read_a_little(adapter, inner)
        return adapter
    if not shared and is_spread(model):
        raise RefusedModel(
            f"{type(model).__name__} is no model of transformers, and its weights are spread over processes, each with "
            "a part of the heads, which heedful joins for those alone; load it whole"
        )
    return ModelAdapter(_inside(model), parts, inputs, shared)


def _read_a_little(adapter: ModelAdapter, model: PreTrainedModel) -> None:
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
