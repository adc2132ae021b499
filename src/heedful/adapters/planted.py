"""Learned parameters in the attention modules of a model: put there by a run, taken up again, taken out."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from heedful.core.errors import FieldError, RefusedModel
from heedful.engine.learned import PREFIX, fresh, moves


@dataclass(eq=False)
class Planted:
    """The learned parameters of one run in one model."""

    model: nn.Module
    paths: dict[int, str] = field(default_factory=dict)  # the module of each layer, as far as they are known
    shared_by: str = ""  # what shares gradients with other processes, of the parameters known at the start
    _added: list[tuple[nn.Module, str]] = field(default_factory=list)

    def carried(self) -> set[tuple[int, str]]:
        """Parameters that an earlier run left in these layers, as a copy of an attached model has them."""
        return {
            (i, key)
            for i, path in self.paths.items()
            for key, _ in self.model.get_submodule(path).named_parameters(recurse=False)
            if key.startswith(PREFIX)
        }

    def parameter(self, layer: int, name: str, start: Tensor) -> nn.Parameter:
        """A learned parameter in a layer's module: the one that it carries already, or a new one beside its weights."""
        path = self.paths[layer]
        module = self.model.get_submodule(path)
        have = module._parameters.get(name)
        if have is not None:
            if have.shape != start.shape:
                rule = f"is what {path} carries of an earlier run, and must have the shape that the method asks for"
                raise FieldError("attach()", name, tuple(have.shape), rule, tuple(start.shape))
            if have.is_meta:
                raise RefusedModel(f"{name} is offloaded with {path}, and heedful reads it there; load without offload")
            if not moves(start):
                have.requires_grad_(False)  # whatever is loaded asks for them
            return have
        if self.shared_by:
            raise RefusedModel(
                f"{self.shared_by} shares the gradients of the parameters that it was made with, and {name} "
                "would not be among them; attach to the plain model first, then wrap that"
            )
        # offloaded weights are on 'meta' until they are used; those that are not are where the model computes
        beside = (p for p in chain(module.parameters(), self.model.parameters()) if not p.is_meta)
        reference: Tensor | None = next(beside, None)
        if reference is None and not any(True for _ in self.model.parameters()):
            reference = start  # a module that holds nothing else
        if reference is None:
            raise RefusedModel(
                f"all weights of {type(self.model).__name__} are offloaded, so {name} has no device to learn on; load "
                "the model without offload"
            )
        parameter = fresh(start, self._dtype, reference.device)
        self._added.append((module, name))  # first, so that none is lost to an interrupt
        module.register_parameter(name, parameter)
        return parameter

    @property
    def _dtype(self) -> torch.dtype:
        told = getattr(self.model, "dtype", None)  # of models that know it
        if isinstance(told, torch.dtype):
            return told
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def drop(self) -> None:
        for module, name in self._added:
            module._parameters.pop(name, None)
        self._added = []
