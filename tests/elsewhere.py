"""A device that is not there: tensors say that they are on it, are computed on the CPU, and refuse to meet the CPU's.

So laws and models can be tried as on a GPU where there is none: a tensor that a method makes without saying where is
found out as it would be there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from heedful.core.ragged import padded

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
    with _Made():
        yield torch.device(NAME, 0)


if __name__ == "__main__":
    import sys

    from heedful.catalogue import entries
    from heedful.conformance import check, laws

    names, skipped = [], {x[1:] for x in sys.argv[1:] if x.startswith("-")}
    for name in sys.argv[1:]:
        names += [name] if not name.startswith("-") else []
    broken = 0
    with elsewhere() as device:
        for name in names or entries():
            report = check(entries()[name], [x for x in laws() if x not in skipped], device)
            for verdict in report.broken:
                broken += 1
                print(f"{name}: {verdict}", flush=True)
    sys.exit(broken > 0)
