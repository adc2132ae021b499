"""What methods keep with a cache goes where the cache goes: into other rows, into copies, and away.

So does what they remember of what an encoder made: to whatever is handed that, in the same rows. It is known by being
the same tensor, and a copy, or rows picked of it, by holding the same bits: `generate` repeats rows for beams, and
callers keep, cut and copy what encoders gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache

from heedful.adapters.kvcache import own_cache, tensors_in
from heedful.core.errors import RefusedModel
from heedful.core.fitted import WHOLE
from heedful.core.state import Shelf
from heedful.engine.one_forward import Look
from heedful.engine.run_state import RunState


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


# what models of transformers call that which an encoder made before: of images, and of a text or a sound
ENCODED = ("mm_encoder_outputs", "encoder_outputs", "encoder_hidden_states")
Known = dict[int, dict[str, Any]]  # what methods remember, by part


def note_look(state: RunState, output: Any) -> None:
    """Keep what methods remember, behind a model inside the one that is called, which gave `output`."""
    state.now.looks.append(Look([ref(x) for x in tensors_in(output)], _memory(state)))


def end_looks(state: RunState, output: Any, alone: bool, encodes: bool) -> None:
    """Keep what may be handed on: what an encoder gave that was called by itself, or the encoder inside the whole.

    Of the others, those stay of which somebody has something. The last stays in any case: somebody may have a copy, and
    what is of no look is refused where there was one.
    """
    if not (state.looks or any(state.now.memory.values())):
        state.now.looks.clear()
        return
    made = [*tensors_in(output)]
    if not alone:
        handed = output.get("encoder_last_hidden_state") if isinstance(output, Mapping) else made
        # the first: what is around the encoder gives that too, behind the decoder
        inner = [look for look in state.now.looks if encodes and _same([look], tensors_in(handed))][:1]
        state.looks += [_marked(look) for look in inner if look.memory]
    elif encodes and made and (memory := _memory(state)):
        state.looks.append(_marked(Look([ref(x) for x in made], memory)))
    state.looks[:] = [look for look in state.looks if look.held or look is state.looks[-1]]
    state.now.looks.clear()


def _marked(look: Look) -> Look:
    """With a number for each of its rows: by the time it is handed on there may be nothing but a copy."""
    first = look.made[0]()
    return look if first is None else look._replace(marks=_marks(first))


def _memory(state: RunState) -> Known:
    return {number: tree_map_only(Tensor, _as_it_is, noted) for number, noted in state.now.memory.items() if noted}


def remembered_of(state: RunState, told: Mapping[str, Any], kind: str) -> Known | None:
    """What methods remembered of the encoders' outputs that a model is handed; None where it is handed none."""
    given = [*tensors_in(tuple(told[name] for name in ENCODED if name in told))]
    if not given:
        return None
    found: Known = {}
    if not state.looks:
        return found
    looks = _same(state.looks, given) or _copies(state.looks, given)
    if not looks:
        raise RefusedModel(
            f"{kind} is handed what an encoder made, and it is nothing that the encoder gave under this run, in whole "
            "rows of one call, while of what it gave methods remember something; hand over what it gave, as it came "
            "or with rows picked and repeated (copies are known while you hold what it gave, and of the last call)"
        )
    for look in looks:
        pick = _repeated(look, told.get(ENCODED[0]), kind)
        for number, noted in look.memory.items():
            if noted.keys() & found.get(number, {}).keys():
                raise RefusedModel(
                    f"{kind} is handed what an encoder made, which looked more than once, and of each time "
                    f"{state.stack.methods[number]!r} remembers something; it cannot be told which is meant: hand "
                    "over what one look gave, or give the call the images themselves"
                )
            found[number] = {**found.get(number, {}), **tree_map_only(Tensor, pick, noted)}
    return found


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _repeated(look: Look, outputs: Any, kind: str) -> Callable[[Tensor], Tensor]:
    """Rows as often as images are handed on in what is made of them: `generate` repeats each text's for its beams."""
    own = (made for made in (outputs.values() if outputs else ()) if _same([look], tensors_in(made)))
    pooled = getattr(next(own, None), "pooler_output", None)
    images, first = () if pooled is None else tuple(pooled), look.made[0]()
    texts = len(images) if first is None else len(first)
    if len(images) <= texts:  # as where an image is looked at in pieces
        return _as_it_is
    times, rest = divmod(len(images), texts)
    if rest or not all(torch.equal(x, images[i - i % times]) for i, x in enumerate(images)):
        raise RefusedModel(
            f"{kind} is handed {len(images)} images of the {texts} that an encoder looked at, and it cannot be told "
            "which is which; give each text one image, and the images themselves to a call without beams"
        )
    return partial(_picked, torch.arange(texts).repeat_interleave(times), texts)


def _same(looks: list[Look], given: Iterable[Tensor]) -> list[Look]:
    """The looks at which some of these very tensors were made: of each tensor the last, which went through most."""
    found = (next((look for look in reversed(looks) if any(y() is x for y in look.made)), None) for x in given)
    return [*{id(look): look for look in found if look is not None}.values()]


def _copies(looks: list[Look], given: Iterable[Tensor]) -> list[Look]:
    """The last look whose rows, picked and repeated, are those of the first of these tensors that has any."""
    for x in given:
        if (marks := _marks(x)) is None:
            continue
        for look in reversed(looks):
            first = look.made[0]()
            own = look.marks if look.marks is not None or first is None else _marks(first)
            if own is None:
                continue
            alike = marks[:, None].to(own.device) == own
            if bool(alike.any(1).all()):
                pick = partial(_picked, alike.long().argmax(1), len(own))
                memory = {number: tree_map_only(Tensor, pick, noted) for number, noted in look.memory.items()}
                looks.insert(0, Look([ref(x)], memory))  # so that it is known in the steps that follow
                return looks[:1]
    return []


def _picked(rows: Tensor, texts: int, x: Tensor) -> Tensor:
    """These rows of a tensor that has one for each text."""
    return x[rows.to(x.device)] if x.ndim and len(x) == texts else x


def _marks(x: Tensor) -> Tensor | None:
    """A number `[b]` for the bits of each row, whatever rows stand beside it; None of what has no rows or bits."""
    kind = WHOLE.get(x.itemsize)
    if type(x) is not Tensor or is_functorch_wrapped_tensor(x) or x.ndim < 2 or not x.numel() or kind is None:
        return None
    bits = x.detach().contiguous().view(kind).flatten(1).long()
    places = torch.arange(1, 2 * bits.shape[1], 2, device=x.device)
    return (bits * places).sum(1)  # of whole numbers, so that no order of adding them up tells
