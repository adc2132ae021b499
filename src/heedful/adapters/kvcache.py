"""A cache layer that may hold fewer entries than it has seen, as many for each head as that head keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from heedful.core.call import Kept
from heedful.core.errors import RefusedModel
from heedful.core.packed import Packed, Packing, Rows, longer
from heedful.core.positions import Positions
from heedful.core.ragged import padded, spread


class HeldLayer(DynamicLayer):
    """Keys and values `[t, d]` of all entries, head after head without gaps, and the index `[t]` that each came from.

    What a method packs stays packed (see `core.packed`), and is unpacked whenever somebody asks for it.

    Seen from outside they are `[b, g, k, d]`: heads of equal length are a view of what is held; heads that differ are
    padded on the left, so that the newest entries stand last in every head. A model is handed these without a copy
    (see `core.ragged`), and only inside a run, since its own attention would see the padding.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._clear()
        super().__init__(**kwargs)

    def _clear(self) -> None:
        self._keys = self._values = Rows(torch.empty(0, 0), ())
        self._index: Tensor | None = None  # int32; None: nothing was dropped so far
        self.heads = (0, 0)  # b, g
        self.counts: list[int] = []  # entries of each head of each text
        self.seen = 0
        self.fresh = 0
        self.chosen = 0  # tokens seen when entries were last dropped
        self.served = False  # the attention that follows the next update is a run's
        self.is_initialized = False

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> HeldLayer:
        """A layer that goes on from what a plain one holds."""
        held = cls()
        if layer.is_initialized and layer.get_seq_length():
            held.update(layer.keys, layer.values)
        return held

    # what is held, as others see it

    @property
    def whole(self) -> bool:
        """Nothing was dropped so far."""
        return self._index is None

    @property
    def even(self) -> bool:
        """Every head holds as many entries as the others."""
        return len(set(self.counts)) < 2

    @property
    def keys(self) -> Tensor:
        return padded(self.handed[0])

    @keys.setter
    def keys(self, given: Tensor | None) -> None:
        _refuse(given)

    @property
    def values(self) -> Tensor:
        return padded(self.handed[1])

    @values.setter
    def values(self, given: Tensor | None) -> None:
        _refuse(given)

    @property
    def handed(self) -> tuple[Tensor, Tensor]:
        """Keys and values as a model is handed them: without a copy, for who can do without."""
        k, v = self._keys.tensor(), self._values.tensor()
        return spread(k, self.heads, self.counts), spread(v, self.heads, self.counts)

    @property
    def nbytes(self) -> int:
        """The memory that all of it takes."""
        plain = (self._keys.plain, self._values.plain, *(() if self._index is None else (self._index,)))
        packed = (*self._keys.packed, *self._values.packed)
        return sum([x.untyped_storage().nbytes() for x in plain]) + (_bytes_of(packed) if packed else 0)

    @property
    def index(self) -> Tensor:
        """`[b, g, k]`: the number in the padded row that each entry came from."""
        return spread(self._indices().long(), self.heads, self.counts)

    @property
    def is_filled(self) -> Tensor:
        """`[b, g, k]`: False where a head holds fewer entries than the longest one."""
        held = torch.ones(sum(self.counts), dtype=torch.bool, device=self._keys.plain.device)
        return spread(held, self.heads, self.counts)

    def _indices(self) -> Tensor:
        if self._index is not None:
            return self._index
        row = torch.arange(self.seen, dtype=torch.int32, device=self._keys.plain.device)
        return row.repeat(len(self.counts))

    def holds(self, k: Tensor, v: Tensor) -> bool:
        """Whether these have the shape of what is held."""
        shape, keys, values = (*self.heads, max(self.counts, default=0)), self._keys.plain, self._values.plain
        return self.seen > 0 and k.shape == (*shape, *keys.shape[1:]) and v.shape == (*shape, *values.shape[1:])

    def require(self, k: Tensor, v: Tensor, module_name: str) -> None:
        """Refuse a call whose keys are not the ones that are held."""
        if not self.holds(k, v):
            raise RefusedModel(
                f"a CACHE edit cannot act in {module_name}: its cache layer does not hold the keys and values that it "
                "attends to, but compressed ones or none; restrict the method to other layers with .on(layers=[...])"
            )

    def positions(self, pad: Tensor | None, positions: Tensor | None = None) -> Positions:
        """Where the entries stand, given each row's left padding `[b]`, or every position `[b n]` of the row."""
        if self._index is None:
            return Positions.row(0, self.seen, self._keys.plain.device, pad)
        index = spread(self._index.long(), self.heads, self.counts)
        position = index if pad is None else index - pad[:, None, None]
        if positions is not None:
            position = positions[:, None].expand(-1, index.shape[1], -1).gather(-1, index)
        if self.even:
            return Positions(index, position, last=self.seen - 1)
        held = torch.tensor(self.counts, device=index.device).view(self.heads)
        return Positions(index, position, is_filled=self.is_filled, last=self.seen - 1, filled=held)

    # how it changes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        b, g, n, _ = key_states.shape
        if not self.served and not self.whole and (n > 1 or not self.even):
            what = f"{n} tokens at once" if self.even else "heads of unlike numbers of entries"
            raise RefusedModel(
                f"entries of this cache were dropped, and for {what} the model's own attention cannot tell which; go "
                "on inside a run, as in `with attach(model, method) as run: run(...)`, or in one of Stack() to drop "
                "no more"
            )
        self.served = False
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.heads, self.counts = (b, g), [0] * (b * g)
            none = (x[:, :, :0].flatten(0, 2) for x in (key_states, value_states))
            self._keys, self._values = (Rows(x, self.counts) for x in none)
        counts = [count + n for count in self.counts]
        self._keys, self._values = self._keys.append(key_states, counts), self._values.append(value_states, counts)
        if self._index is not None:
            index = torch.arange(self.seen, self.seen + n, dtype=torch.int32, device=key_states.device)
            self._index = longer(self._index, self.counts, index.expand(b, g, n))
        self.counts = counts
        self.seen += n
        self.fresh = n
        return self.handed

    def keep(self, *left: Kept) -> None:
        """Drop every entry that some of these do not keep, and the memory it took.

        The others may be given new keys and values, or packed ones.
        """
        kept: Tensor | None = None
        for one in left:
            if one.key is not None:
                self._keys = self._written(self._keys, one.key)
            if one.value is not None:
                self._values = self._written(self._values, one.value)
            if one.keep is not None:
                kept = one.keep if kept is None else kept & one.keep
        if kept is None:
            return
        mine = self._flat(kept)
        counts = self._counts(mine)
        if counts != self.counts:
            self.chosen = self.seen
            self._drop(mine, counts)

    def _written(self, held: Rows, new: Tensor | Packing) -> Rows:
        if isinstance(new, Packing):
            return held.put(self._flat(new.those), new.rows)
        return Rows(new[self.is_filled].to(held.plain.dtype), self.counts)

    def _flat(self, x: Tensor) -> Tensor:
        """`[b g k]` as what is held of it, head after head."""
        return (x if self.even else x[self.is_filled]).flatten()

    def _counts(self, kept: Tensor) -> list[int]:
        """How many entries of each head the flat `kept [t]` keeps."""
        return spread(kept, self.heads, self.counts).sum(-1).flatten().tolist()

    def _drop(self, kept: Tensor, counts: list[int]) -> None:
        """Drop every entry of which the flat `kept [t]` is False, so that heads have `counts` left."""
        # the second need not wait until a GPU has counted, and takes twice as long on a CPU
        mine = (kept.nonzero() if kept.is_cpu else kept.nonzero_static(size=sum(counts))).flatten()
        self._index = self._indices().index_select(0, mine)
        self._keys, self._values, self.counts = self._keys.take(mine, counts), self._values.take(mine, counts), counts

    @property
    def is_croppable(self) -> bool:
        """Whether the newest token can be taken back as if it had never been read.

        transformers asks before it crops guesses, where `crop` says better what is wrong, and on 'mps' alone before it
        decides on a token one step late.
        """
        return self.device.type != "mps" or self.whole or self.chosen < self.seen

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give a negative number, the tokens to remove")
        whole, left = self.whole, max(0, self.seen + tokens_to_remove)
        guessed = self.chosen == self.seen and self.fresh > 1  # also where no guess is taken back
        if left and not whole and (self.chosen > left or guessed):
            raise RefusedModel(
                "this cache cannot take back tokens that were there when entries were dropped, as assisted and "
                "prompt-lookup decoding do with guesses; generate one after another, or leave the CACHE edit out"
            )
        if tokens_to_remove == 0 or not self.seen:
            return
        if not left:
            self._clear()
            return
        kept = self._indices() < left
        self._drop(kept, self._counts(kept))
        self.seen = left
        if whole:
            self._index = None

    def reset(self) -> None:
        self._clear()

    def get_seq_length(self, *args: Any) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._choose(lambda rows: rows[beam_idx.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._choose(lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._choose(lambda rows: rows[indices.cpu()])

    def _choose(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Hold the texts that `pick` makes of their numbers."""
        if not self.seen:
            return
        b, g = self.heads
        rows = pick(torch.arange(b)).tolist()
        heads = [row * g + head for row in rows for head in range(g)]
        parts = torch.arange(sum(self.counts), device=self._keys.plain.device).split(self.counts)
        mine = torch.cat([parts[i] for i in heads])
        self.heads, self.counts = (len(rows), g), [self.counts[i] for i in heads]
        self._keys, self._values = self._keys.take(mine, self.counts), self._values.take(mine, self.counts)
        self._index = self._index if self._index is None else self._index.index_select(0, mine)


def _refuse(given: Tensor | None) -> None:
    """The base class declares keys and values empty; nobody else may set them."""
    if given is not None:
        raise RefusedModel("a cache with dropped entries cannot be written from outside; use its update()")


def cache_bytes(cache: Cache) -> int:
    """Bytes that a cache really holds: the storage of every tensor, each once, quantised or not.

    What methods keep with it counts too.
    """
    split = isinstance(cache, EncoderDecoderCache)
    caches = (cache.self_attention_cache, cache.cross_attention_cache) if split else (cache,)
    kept = [list(vars(one)["shelf"].tensors()) for one in caches if "shelf" in vars(one)]
    return _bytes_of([kept, *(vars(layer) for one in caches for layer in one.layers)])


def _bytes_of(thing: Any) -> int:
    stores = [x.untyped_storage() for x in tensors_in(thing)]
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


def tensors_in(thing: Any) -> Iterator[Tensor]:
    """Every plain tensor in there; quantised and packed ones are made of others."""
    if isinstance(thing, Rows):
        thing = thing.parts
    if isinstance(thing, Packed):
        thing = vars(thing)
    if isinstance(thing, Tensor) and is_traceable_wrapper_subclass(thing):
        thing = [getattr(thing, name) for name in thing.__tensor_flatten__()[0]]
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Mapping | list | tuple):
        for part in thing.values() if isinstance(thing, Mapping) else thing:
            yield from tensors_in(part)


def hold(cache: Cache, number: int, module_name: str) -> HeldLayer:
    """The cache's layer `number`, made into one that can shrink; refused where that cannot be right."""
    if cache.layer_class_to_replicate is DynamicLayer:
        while len(cache.layers) <= number:
            cache.layers.append(DynamicLayer())
    layer = cache.layers[number] if number < len(cache.layers) else None
    if isinstance(layer, HeldLayer):
        return layer
    if type(layer) is not DynamicLayer:
        raise RefusedModel(
            f"a CACHE edit cannot act in {module_name}: its cache layer is {type(layer).__name__}, and only a plain "
            "DynamicLayer can hold fewer entries; use the default dynamic cache, or restrict the method with "
            ".on(layers=[...]) to layers with full attention"
        )
    if cache.offloading:
        raise RefusedModel("a CACHE edit cannot act in an offloaded cache; use the default dynamic cache")
    cache.layers[number] = HeldLayer.adopt(layer)
    return cache.layers[number]


def shrinking(cache: Cache, number: int | None) -> HeldLayer | None:
    """The layer `number` if it is one that can shrink."""
    layers = cache.layers
    layer = layers[number] if number is not None and 0 <= number < len(layers) else None
    return layer if type(layer) is HeldLayer else None


def seen(cache: Cache | None, number: int | None) -> int:
    """How many tokens a layer of the cache has seen so far."""
    return int(own_cache(cache).get_seq_length(number)) if cache and number is not None and number >= 0 else 0


def shrunk(cache: Cache | None) -> bool:
    """Whether some layer of the cache dropped entries."""
    return any(isinstance(x, HeldLayer) and not x.whole for x in cache.layers) if cache else False


def own_cache(cache: Cache) -> Cache:
    """The cache of self attention, where there is one for cross attention too."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
