"""The transformers model inside what others put around it, PEFT or torch's parallel modules, and where it computes."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from heedful.adapters.layers import leftovers, within
from heedful.adapters.suspects import may_attend
from heedful.core.errors import RefusedModel


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The one transformers model that a module is or holds, or the reason why it cannot be served."""
    if isinstance(model, PreTrainedModel):
        return model
    kind = type(model).__name__
    inner: dict[str, PreTrainedModel] = {}  # the outermost ones, by dotted name
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and not within(name, inner):
            inner[name] = part
    if not inner:
        raise RefusedModel(
            f"{kind} is not a transformers model (a PreTrainedModel) and holds none, the only kind whose texts "
            "and weights are known here; attach() serves others too"
        )
    names = list(inner)
    if len(names) > 1:
        raise RefusedModel(
            f"{kind} holds {len(names)} transformers models, {', '.join(names)}; attach to one of them, for example to "
            f"model.{names[0]}"
        )
    one = inner[names[0]]
    if told := [name for name in leftovers(model) if not within(name, names)]:
        raise outside(model, one, told[0])
    stays_one(model)
    return one


def inside(model: nn.Module) -> nn.Module:
    """The transformers model that a module is or holds; the module itself where it holds none."""
    return unwrapped(model) if any(isinstance(part, PreTrainedModel) for part in model.modules()) else model


def beside(model: nn.Module, inner: nn.Module) -> dict[str, nn.Module]:
    """Modules beside the transformers model that may compute attention, though nothing in their classes says so."""
    inside = {*inner.modules()}
    apart = {name: m for name, m in model.named_modules() if m not in inside and inner not in set(m.modules())}
    return {name: m for name, m in apart.items() if may_attend(type(m))}


def outside(model: nn.Module, inner: nn.Module, name: str) -> RefusedModel:
    """What is said of attention beside the transformers model in another: one of both is served at a time."""
    known = next(there for there, m in model.named_modules() if m is inner)
    parts = name.split(".")
    own = next(x for i in range(len(parts)) if not within(known, (x := ".".join(parts[: i + 1]),)))
    return RefusedModel(
        f"{type(model).__name__} computes attention outside the transformers model in it too: {name}. Attach to one of "
        f"both, model.{known} or model.{own}"
    )


def shared_by(model: nn.Module) -> str:
    """What shares the model's gradients with other processes: that of torch which was put around it, if any was."""
    if isinstance(model, DistributedDataParallel | FullyShardedDataParallel):
        return type(model).__name__
    return "fully_shard" if any(isinstance(part, FSDPModule) for part in model.modules()) else ""


def stays_one(model: nn.Module) -> None:
    """Refuse what copies the model in every forward."""
    if isinstance(model, DataParallel) and len(model.device_ids) > 1:
        raise RefusedModel(
            f"{type(model).__name__} copies the model to {len(model.device_ids)} devices in every forward, where no "
            "run is attached; attach to model.module, or wrap it for one device: DataParallel(model, device_ids=[0])"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes, and its inputs go; what accelerate offloads is brought back there when it is used."""
    weights = list(model.parameters())
    if found := next((x.device for x in weights if not x.is_meta), None):
        return found
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    told = next((at for hook in hooks if (at := getattr(hook, "execution_device", None)) is not None), None)
    if told is None and weights:
        kind = type(model).__name__
        raise RefusedModel(
            f"{kind} lies on the meta device, where weights have shapes and no numbers: load it, as with "
            f"{kind}.from_pretrained(name)"
        )
    return torch.device("cpu" if told is None else told)
