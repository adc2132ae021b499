"""What the tests of light and dynamic convolutions share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from heedful.authoring import Call, Causal, Mask, Method
from heedful.core.positions import Positions
from heedful.core.state import State


def gated(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The first half of a linear map times the logistic function of the second."""
    y = x @ p["in"].T + p["in_bias"]
    half = y.shape[-1] // 2
    return y[..., :half] / (1 + (-y[..., half:]).exp())


def trained(run: Any, number: int) -> dict[str, Tensor]:
    """A layer's parameters, moved away from where they start."""
    state = run.state_dict()
    draw = torch.Generator().manual_seed(7)
    run.load_state_dict({k: v + 0.3 * torch.randn(v.shape, generator=draw) for k, v in state.items()})
    return {k.split(".")[2]: v for k, v in run.state_dict().items() if k.split(".")[1] == str(number)}


def block_of(model: nn.Module, run: Any, number: int, **inputs: Any) -> tuple[Tensor, Tensor]:
    """What a layer's attention block is handed and what it gives."""
    seen: list[Any] = []
    name = next(n for n in run.layer_names if f".{number}." in n)
    block = model.get_submodule(name)
    out = block.o_proj if hasattr(block, "o_proj") else model.get_submodule(name.rpartition(".")[0]).output.dense
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs.get("hidden_states", args[0] if args else None)),
            with_kwargs=True,
        ),
        out.register_forward_hook(lambda _, args, output: seen.append(output)),
    ]
    run(**inputs)
    for handle in handles:
        handle.remove()
    return seen[0], seen[1]


def embedded(method: Method, x: Tensor, params: dict[str, Tensor]) -> Tensor:
    """The block alone, on one causal call without padding."""
    positions = Positions.row(0, x.shape[1])
    call = Call(0, 1, "alone", 4, 4, positions, positions, 1.0, mask=Mask((Causal(),)), params=params, state=State())
    return method.convolve(x, call)  # type: ignore[attr-defined]
