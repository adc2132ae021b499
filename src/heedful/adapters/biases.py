"""Biases that edits need: where a config can have them, and where a layer's last map adds to the stream."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heedful.adapters.layers import block_of
from heedful.adapters.projections import transposed
from heedful.core.errors import RefusedModel
from heedful.engine.resting import resting


def give_bias(model: Any, linear: nn.Module) -> nn.Parameter:
    """The bias of one of a model's maps. Where there is none, a switch of the config gives it, and zeros to others."""
    if (bias := getattr(linear, "bias", None)) is not None:
        return bias
    name = next(name for name, module in model.named_modules() if module is linear)
    have = shapes(model)
    for switch, value in list(vars(model.config).items()):
        if value is not False or not switch.endswith("bias"):
            continue
        config = copy.deepcopy(model.config)
        setattr(config, switch, True)
        with torch.device("meta"):
            wanted = shapes(type(model)(config))
        added = wanted.keys() - have.keys()
        if f"{name}.bias" in added and have.items() <= wanted.items() and all(x.endswith(".bias") for x in added):
            setattr(model.config, switch, True)
            for x in added:
                module = model.get_submodule(x.removesuffix(".bias"))
                zeros = module.weight.new_zeros(wanted[x])
                module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)
            return linear.bias  # type: ignore[return-value]
    raise RefusedModel(
        f"{name}, a {type(linear).__name__}, has no bias, which the edit needs, and its config has no switch for one"
    )


def shift_stream(model: Any, name: str, layers: Sequence[str], added: Tensor) -> None:
    """Add a constant `[e]` to the stream as it leaves the layer that an attention module stands in."""
    block = block_of(model, name)
    if block is None or [block_of(model, x) for x in layers].count(block) > 1:
        raise RefusedModel(f"{name} is not the one attention of an item in a list of layers")
    bias = give_bias(model, _last_map(model, block, len(added)))
    with torch.no_grad():
        bias.add_(added.to(bias))


def _last_map(model: Any, block: str, width: int) -> nn.Module:
    """The map of a layer whose output is added to the stream as it is, and seen by nothing else in the layer.

    Told by gradients: those of what the layer gives are, bit for bit, those of what the map gives.
    """
    if model.main_input_name != "input_ids":
        raise RefusedModel(f"the stream is followed through models that read tokens, not {model.main_input_name}")
    layer = model.get_submodule(block)
    added: list[tuple[nn.Module, Tensor]] = []
    given: list[Tensor] = []

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nothing = torch.zeros_like(output, requires_grad=True)
        added.append((module, nothing))
        return output + nothing

    def keep(_: nn.Module, args: Any, output: Any) -> None:
        given.append(output[0] if isinstance(output, tuple) else output)

    maps = [x for x in layer.modules() if isinstance(x, nn.Linear) or transposed(x)]
    handles = [*(x.register_forward_hook(add) for x in maps), layer.register_forward_hook(keep)]
    try:
        with resting(model), torch.enable_grad():
            model(input_ids=torch.arange(1, 6, device=model.device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    (stream,) = given
    asked = torch.rand(stream.shape, dtype=stream.dtype, device=stream.device)
    grads = torch.autograd.grad(stream, [x for _, x in added], asked, allow_unused=True)
    for (module, _), grad in reversed(list(zip(added, grads, strict=True))):
        if grad is not None and grad.shape[-1] == width and torch.equal(grad.view(asked.shape), asked):
            return module
    raise RefusedModel(f"nothing in {block} gives its output to the stream as it is; a norm or a factor stands between")


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Every tensor of a model's files by its name."""
    return {name: x.shape for name, x in model.state_dict().items()}
