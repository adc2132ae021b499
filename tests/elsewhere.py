"""A device that is not there: tensors say that they are on it, are computed on the CPU, and refuse to meet the CPU's.

So laws and models can be tried as on a GPU where there is none: a tensor that a method makes without saying where is
found out as it would be there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from heedful.adapters.lazymask import LazyMask
from heedful.catalogue import entries
from heedful.conformance import check, laws
from heedful.core.call import Call
from heedful.core.method import Method
from heedful.core.ragged import padded
from heedful.core.sites import Site, at

from .samples import PAPER

NAME = "card"
CROSSES = {"aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense", "aten::index_put_"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # by places on the CPU too


class There(Tensor):
    """What the CPU holds, on a device that is not there."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        out: There = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, 0), requires_grad=False,
        )  # fmt: skip
        out.held = held
        return out

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"There({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        out: Tensor = There(self.held.detach().clone())
        out = torch.nn.Parameter(out) if isinstance(self, torch.nn.Parameter) else out
        memo[id(self)] = out.requires_grad_(self.requires_grad)
        return out

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    if name == "aten::_to_copy" and isinstance(args[0], LazyMask):
        return LazyMask.__torch_dispatch__(func, (), args, kwargs)  # no more than a rule, which goes as a rule
    args, kwargs = tree_map(padded, (args, kwargs))
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = any(isinstance(x, There) for x in tensors)
    asked = kwargs.get("device")
    if there and name not in CROSSES:
        looked_at = tensors[:1] if name in INDEXED else tensors
        for x in looked_at:
            if not isinstance(x, There) and x.dim() > 0:
                raise RuntimeError(f"{name}: expected all tensors to be on the same device, {NAME} and {x.device}")
    goes = there if asked is None else torch.device(asked).type == NAME
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu") if goes else asked}
    if name == "aten::copy_":
        goes = isinstance(args[0], There)
    plain_args, plain_kwargs = tree_map(lambda x: x.held if isinstance(x, There) else x, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if not goes:
        return out
    out = tree_map(lambda x: There(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out


class _Card(_DummyBackendModule):
    """What torch asks of a device beside tensors."""

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.empty(0)

    def set_rng_state(self, *_: Any) -> None:
        pass


class _Made(TorchDispatchMode):
    """Has whatever is made on the device made there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def _empty(size: Any, stride: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return There(torch.empty_strided(size, stride, dtype=dtype))


def _copy(self: There, other: Tensor, non_blocking: bool = False) -> Tensor:
    self.held.copy_(other.held if isinstance(other, There) else other)
    return self


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Changes torch for good: to be entered in a process of its own."""
    _setup_privateuseone_for_python_backend(NAME, _Card())
    past_all_modes = torch.library.Library("aten", "IMPL")  # as torch.tensor goes, and an index that is a list
    past_all_modes.impl("empty_strided", _empty, "PrivateUse1")
    past_all_modes.impl("copy_", _copy, "PrivateUse1")
    torch.__future__.set_swap_module_params_on_conversion(True)  # else a parameter of another type holds the old one
    with _Made():
        yield torch.device(NAME, 0)


class Careless(Method):
    """Makes a tensor without saying where."""

    paper = PAPER

    @at(Site.SCORES)
    def shift(self, scores: Tensor, call: Call) -> Tensor:
        return scores + torch.arange(scores.shape[-1])


def main(*words: str) -> int:
    """Tries laws on methods, but for the laws that are named with a dash; 1 where one is broken."""
    skipped = {word[1:] for word in words if word.startswith("-")}
    tried = [entries()[word].example() for word in words if not word.startswith("-")]
    tried += [Careless()] if "--careless" in words else []
    reports = []
    with elsewhere() as device:
        for method in tried:
            reports.append(check(method, [x for x in laws() if x not in skipped], device))
            for verdict in reports[-1].broken:
                print(f"{method!r}: {verdict}", flush=True)
    return int(not all(report.ok for report in reports))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
