"""Heads that stand in several processes, as transformers' tensor parallel plans lay them: joined for a run's work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from heedful.adapters.arguments import READ
from heedful.adapters.bound import Request
from heedful.adapters.projections import head_width
from heedful.core.errors import RefusedModel
from heedful.core.sites import Site
from heedful.engine.run import Run


@dataclass(frozen=True, eq=False)
class Spread:
    """The heads of one layer, of which each process has as many, one process's after the other's."""

    name: str
    mesh: DeviceMesh
    heads: int  # of the whole layer

    def serves(self, request: Request, run: Run) -> Spread | None:
        """This, where a call has a part of the heads; weights can be spread, and be whole where they are used."""
        have, said = request.q.shape[1], f"{self.name}: its {self.heads} heads are spread over processes, and "
        if have == self.heads:
            return None
        if have * self.mesh.size() != self.heads:
            raise RefusedModel(f"{said}{have} of them in this one of {self.mesh.size()} is no even share")
        if run.stack.touches(Site.CACHE):
            raise RefusedModel(f"{said}what CACHE steps would keep is not; load the model whole")
        if torch.is_grad_enabled() and any(run.state.params.values()):
            raise RefusedModel(f"{said}what methods learn is not; learn with the model whole, or use torch.no_grad()")
        if torch.is_grad_enabled() and any(step.edit.loss for step in run.stack.steps()):
            raise RefusedModel(
                f"{said}the gradient of what methods penalise would count once for each; learn with the model whole, "
                "or use torch.no_grad()"
            )
        return self

    def joined(self, request: Request) -> Request:
        """The call with all heads, the same in every process."""
        mask: Any = request.mask
        given = [name for name in READ if isinstance(request.more.get(name), Tensor)]
        if type(mask) is Tensor and mask.ndim == 4 and mask.shape[1] > 1:
            given.append("attention_mask")
        if given:
            raise RefusedModel(
                f"{self.name} hands its attention a tensor {given[0]!r} that tells heads apart, and has only those of "
                "this process; load the model whole"
            )
        q, k, v = map(self._joined, (request.q, request.k, request.v))
        return replace(request, q=q, k=k, v=v)

    def _joined(self, x: Tensor) -> Tensor:
        spread = DTensor.from_local(x, self.mesh, [Shard(1)], run_check=False)
        return spread.full_tensor(grad_placements=[Partial()])  # each process knows the gradient of its own heads

    def own(self, heads: Tensor) -> Tensor:
        """Those of this process, `[b h ...]`."""
        return heads.chunk(self.mesh.size(), 1)[self.mesh.get_local_rank()]


def is_spread(model: nn.Module) -> bool:
    """Whether processes have parts of the model's weights each."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def spread_of(model: nn.Module, name: str) -> Spread | None:
    """How the heads of a layer are spread; None where its weights are whole."""
    layer = model.get_submodule(name)
    meshes = [p.device_mesh for p in layer.parameters() if isinstance(p, DTensor) and any(map(_cut, p.placements))]
    if not meshes:
        return None
    heads, _ = head_width(layer, getattr(layer, "config", None) or getattr(model, "config", None))
    mesh = meshes[0]
    if mesh.ndim > 1 and "tp" in (mesh.mesh_dim_names or ()):
        mesh = mesh["tp"]
    if heads is None or mesh.ndim > 1:
        raise RefusedModel(
            f"{name} ({type(layer).__name__}) has weights spread over {mesh.size()} processes, and does not tell how "
            "its heads are; load the model whole, or with a mesh of one axis, or one that is named 'tp'"
        )
    return Spread(name, mesh, heads)


def whole(x: Tensor) -> Tensor:
    """A weight as it is in all processes together; every one of them has to ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def weights_of(model: nn.Module) -> Iterator[Tensor]:
    """Each parameter once, whole, in the order of `parameters()`; what accelerate offloads is here while it is read."""
    for module, own in parameters_of(model):
        with here(module):
            yield from (whole(module.get_parameter(name).detach()) for name in own)


def parameters_of(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """Each module with its own parameters, each of them once: what is tied is, though no longer one where offloaded."""
    seen: dict[int, nn.Parameter] = {}
    tied = getattr(model, "all_tied_weights_keys", {})
    for path, module in model.named_modules():
        own = {
            name: p
            for name, p in module.named_parameters(path, recurse=False)
            if id(p) not in seen and not (p.is_meta and name in tied)
        }
        seen |= {id(p): p for p in own.values()}
        yield module, {name.removeprefix(f"{path}."): p for name, p in own.items()}


def here(module: nn.Module) -> AbstractContextManager[object]:
    """A `with` in which the module's own weights are at hand, where accelerate offloads them."""
    if not any(p.is_meta for p in module.parameters(recurse=False)):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _cut(placement: Any) -> bool:
    return isinstance(placement, Shard)
