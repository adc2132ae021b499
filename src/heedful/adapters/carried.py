"""What methods keep with a cache goes where the cache goes: into other rows, into copies, and away."""

from __future__ import annotations

from functools import cache, partial
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor
from transformers.cache_utils import Cache

from heedful.adapters.kvcache import own_cache
from heedful.core.errors import RefusedModel
from heedful.core.state import Shelf


class _Carries:
    """Beside a kind of cache: what happens to its rows and tokens happens to what methods keep with it."""

    shelf: Shelf

    def update(self: Any, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        served, self.shelf.served = self.shelf.served, None
        if layer_idx in self.shelf.instead and served != layer_idx:
            raise RefusedModel(
                f"layer {layer_idx} of this cache holds {self.shelf.instead[layer_idx]}, which the model's own "
                "attention cannot read; go on under the stack that filled it"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[misc]

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.shelf.choose(lambda x: x[beam_idx.to(x.device)])

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.shelf.choose(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self: Any, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.shelf.choose(lambda x: x[indices.to(x.device)])

    def crop(self: Any, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # type: ignore[misc]
        self.shelf.crop(int(self.get_seq_length()))

    def reset(self: Any) -> None:
        super().reset()  # type: ignore[misc]
        self.shelf.crop(0)

    def __reduce__(self) -> Any:
        return _blank, (type(self).__bases__[1],), vars(self)


@cache
def _carrying(kind: Any) -> Any:
    """The same kind of cache, with a shelf."""
    return type(kind.__name__, (_Carries, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _blank(kind: Any) -> Any:
    return object.__new__(_carrying(kind))


# shelves of caches with which nothing is kept so far: these stay what they are
_empty: WeakKeyDictionary[Cache, Shelf] = WeakKeyDictionary()


def _settle(place: ReferenceType[Cache], shelf: Shelf) -> None:
    found: Any = place()
    if found is not None:
        kind: Any = type(found)
        found.__class__, found.shelf = _carrying(kind), shelf
        del _empty[found]


def shelf_of(found: Cache | None) -> Shelf:
    """What methods keep with this cache; of both parts of an encoder and decoder's with that of self attention."""
    if found is None:
        return Shelf()
    found = own_cache(found)
    if isinstance(found, _Carries):
        return found.shelf
    if found not in _empty:
        _empty[found] = Shelf(partial(_settle, ref(found)))
    return _empty[found]
