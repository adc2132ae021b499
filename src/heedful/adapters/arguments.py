"""What transformers' models hand to an attention function, in heedful's terms. Unknown tensors are refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import bidirectional_mask_function

from heedful.adapters.bound import Bound, Request, passes_through
from heedful.adapters.kvcache import HeldLayer, seen, shrunk
from heedful.adapters.layers import list_of
from heedful.adapters.lazymask import LISTS, LazyMask, MaskSpec, chosen_pairs
from heedful.adapters.merging import require_no_table
from heedful.core.errors import SiteError, UnknownArgument
from heedful.core.mask import Causal, Dense, Mask
from heedful.core.method import Scoped, Stack
from heedful.core.positions import Positions
from heedful.core.sites import Site

# tensors that models pass along and that do not change the map
HARMLESS = frozenset({
    "position_ids", "cache_position", "position_embeddings", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
    "max_length_k", "cu_seqlens", "max_seqlen", "grid_thw", "image_grid_thw", "token_type_ids", "mm_token_type_ids",
    "input_ids", "labels", "encoder_hidden_states", "encoder_attention_mask", "seq_idx", "deepstack_visual_embeds",
    "visual_pos_masks", "pixel_values", "num_items_in_batch", "padding_mask",
})  # fmt: skip
PAIRS = 1 << 20  # of a caller's mask, that are looked at at once
READ = LISTS | {"s_aux", "sinks", "position_bias"}  # those that do, and are read below


@dataclass(frozen=True, eq=False)
class Given:
    """One attention call as the model asks for it."""

    queries: Positions
    keys: Positions
    mask: Mask
    bias: Tensor | None
    sink: Tensor | None
    softcap: float | None
    scale: float


def understand(
    bound: Bound, request: Request, held: HeldLayer | None, known: dict[str, Positions], told: Positions | None = None
) -> Given:
    """Positions, rules and extras of a call; `known` is where the tokens of each list of layers stand.

    `told` is what a mask of pairs tells of the keys that the caller of the model around gave.
    """
    q, k, mask, more = request.q, request.k, request.mask, request.more
    for key, value in more.items():
        if isinstance(value, Tensor) and key not in HARMLESS | READ and not passes_through(type(bound.module), key):
            raise UnknownArgument(
                f"{bound.name} ({bound.kind}) hands its attention a tensor {key!r} of shape {tuple(value.shape)}, "
                "which heedful does not know and which may change the answer; restrict the run to other parts with "
                "attach(..., only=...)"
            )
    bias = more.get("position_bias")
    if bound.merges is not None:
        require_no_table(bound, bias, None if isinstance(mask, LazyMask) else mask)
    if isinstance(bias, Tensor) and held is not None and not held.whole:
        raise UnknownArgument(
            f"{bound.name} ({bound.kind}) hands its attention a bias for keys by their number, which tells nothing of "
            "a cache with dropped entries; leave the CACHE edit out for this model"
        )
    queries, keys, rules = _places(bound, request, held, told)
    if bound.cross:
        queries = own_places(bound, known, len(q), q.shape[2], q.device)
    else:
        known[list_of(bound.name)] = queries
    if mask is None:
        flag = more.get("is_causal")
        flag = getattr(bound.module, "is_causal", True) if flag is None else flag
        if bound.native != "eager" and flag and q.shape[2] > 1 and held is None:
            # without a mask this is what transformers' own kernels do with the flag; eager attention ignores it
            queries = Positions.row(0, q.shape[2], q.device)
            keys = Positions.row(0, k.shape[2], q.device)
            rules = Mask((Causal(),))
    elif not isinstance(mask, LazyMask):
        if held is not None and not held.whole:
            raise UnknownArgument(
                f"{bound.name} ({bound.kind}) builds its own mask, which cannot be laid over a cache with dropped "
                "entries; leave the CACHE edit out for this model"
            )
        if bound.native == "eager" and not mask.is_floating_point() and not bool(mask.all()):
            mask = mask.to(q.dtype)  # that one adds it to scores, as 0 and 1, where others take it as yes and no
        table, more_bias = from_dense(mask, k.shape[2])
        rules = Mask() if table is None else Mask((Dense(table),))
        if bound.cross and table is not None:
            keys, rules = _of_the_other(table, len(q))
        if more_bias is not None:
            bias = more_bias if bias is None else bias + more_bias
    if not LISTS.isdisjoint(more) and (picked := chosen_pairs(bound.module, more, q.shape[1], k.shape[2])) is not None:
        rules = rules & Dense(picked)
    softcap = more.get("softcap")
    scale = float(request.scaling) if request.scaling is not None else q.shape[-1] ** -0.5
    return Given(queries, keys, rules, bias, _sink(more), None if not softcap else float(softcap), scale)


def _places(
    bound: Bound, request: Request, held: HeldLayer | None, told: Positions | None
) -> tuple[Positions, Positions, Mask]:
    q, mask = request.q, request.mask
    if bound.merges is not None and not bound.cross:
        left = bound.merges.places
        return left, left, mask.spec.mask if isinstance(mask, LazyMask) else Mask()
    n, m = q.shape[2], request.k.shape[2]
    if isinstance(mask, LazyMask):
        spec = mask.spec
        queries, keys = spec.queries, spec.keys
        if held is not None:
            keys = keys if held.whole else held.positions(spec.pad, spec.position)
        elif len(keys) > m and shrunk(bound.cache):
            raise UnknownArgument(
                f"{bound.name} ({bound.kind}) attends to the keys of another layer, whose cache dropped entries, so "
                "which key is which is lost; leave the CACHE edit out for this model"
            )
        if len(queries) not in (1, n) or len(keys) < m:
            raise UnknownArgument(
                f"{bound.name}: its mask is for {len(queries)} queries and {len(keys)} keys, but {n} and {m} arrived"
            )
        if len(keys) > m:
            keys = keys.take(slice(0, m))
        if len(queries) != n:
            # one row for all queries: it tells of the keys alone
            return Positions.row(0, n, q.device), keys, Mask((Dense(spec.table[..., :m]),))
        if held is None and spec.pad is None and spec.position is None:
            queries, keys = _by_text(queries, keys, request.more.get("position_ids"))
        return queries, keys, spec.mask
    whole = mask is not None and not bound.cross and (held is None or held.whole)
    if whole and (both := as_told(told, n, m, len(q))) is not None:
        return *both, Mask()
    if held is not None:
        keys = held.positions(None)
        return Positions.row(held.seen - n, n, q.device), keys, Mask()
    there = seen(bound.cache, getattr(bound.module, "layer_idx", None)) or m  # a static cache has room for more
    start = 0 if bound.cross else max(0, min(there, m) - n)
    return Positions.row(start, n, q.device), Positions.row(0, m, q.device), Mask()


def as_told(told: Positions | None, n: int, m: int, rows: int) -> tuple[Positions, Positions] | None:
    """Where `n` queries and `m` keys stand by what a mask of pairs told, if that is of as many."""
    if told is None or len(told) != m or len(told.position) not in (1, rows):
        return None
    return told.take(slice(m - n, m)), replace(told, is_filled=None)


def own_places(bound: Bound, known: Mapping[str, Positions], rows: int, n: int, device: torch.device) -> Positions:
    """Where the queries of cross attention stand: as the self attention before it in the same list of layers was told.

    Its own mask speaks of the other sequence alone.
    """
    own = known.get(list_of(bound.name))
    if own is None or len(own) != n or not {len(own.index), len(own.position)} <= {1, rows}:
        return Positions.row(0, n, device)
    return own


def _of_the_other(table: Tensor, rows: int) -> tuple[Positions, Mask]:
    """Where keys of another sequence stand by a table of pairs `[b|1 h|1 q|1 k]`: what no query sees is padding."""
    text = table.any(2).any(1)
    told = {"attention_mask": text.expand(rows, -1), "mask_function": bidirectional_mask_function, "batch_size": rows}
    spec = MaskSpec({**told, "kv_offset": 0, "kv_length": table.shape[-1], "device": table.device})
    alike = bool((table == text[:, None, None]).all())  # to every query
    return spec.keys, spec.mask if alike else Mask((Dense(table),))


def _by_text(queries: Positions, keys: Positions, position_ids: Any) -> tuple[Positions, Positions]:
    """Positions whose positions start anew in each packed text, where the model says that several are packed."""
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or len(queries) != len(keys):
        return queries, keys
    if position_ids.shape[1] != len(queries) or bool((position_ids.diff(dim=-1) == 1).all()):
        return queries, keys
    position = position_ids[:, None].to(queries.index.device)
    return tuple(Positions(p.index, position, p.first, None) for p in (queries, keys))  # type: ignore[return-value]


def places_in(mask: Any, position_ids: Any) -> Positions | None:
    """Where the keys stand that a caller's mask of pairs `[b 1 q k]` is for; None where it tells nothing of that.

    Of a whole row, a text begins where no later token sees what was before, and what sees itself alone, itself not, or
    other texts, is padding. Of a row with more keys than queries, position ids tell how much padding is on the left, if
    nobody sees it: a tree of guesses stands in fewer places than it has tokens, and a static cache has more. Without
    these it is what nobody sees, where some other row's first key is seen: what all rows hide may be behind a window.
    """
    if isinstance(mask, Mapping):  # one for each kind of layer, which tell the same
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor) or isinstance(mask, LazyMask) or mask.ndim != 4:
        return None
    n, m, device = *mask.shape[2:], mask.device
    if (table := from_dense(mask, m)[0]) is None:
        return None
    if n != m:
        unseen = pad = _ends(table.any(1))[0].amin(-1)
        if isinstance(position_ids, Tensor) and position_ids.ndim == 2:
            pad = (m - 1 - position_ids[:, -1].to(device)).clamp(min=0)
        elif bool(pad.all()):
            return None
        return Positions.row(0, m, device, pad) if bool(pad.any()) and bool((unseen >= pad).all()) else None
    table, row = table.any(1), torch.arange(m, device=device)
    ends = [_ends(rows) for rows in table.split(PAIRS // (m * len(table)) + 1, 1)]  # places are wider than flags
    first, last = (torch.cat(x, -1) for x in zip(*ends, strict=True))
    begins = first.flip(-1).cummin(-1).values.flip(-1) >= row
    start = row.where(begins, 0).cummax(-1).values
    stop = row.where(begins, m).roll(-1, -1).index_fill(-1, row[-1:], m).flip(-1).cummin(-1).values.flip(-1)
    is_text = table.diagonal(dim1=-2, dim2=-1) & (stop - start > 1) & (last < stop)
    pad = start.where(is_text, m).amin(-1)  # before the first text of each row
    if not bool((is_text & (start > pad[:, None])).any()):  # it has no other
        some = pad if bool(pad.any()) else None
        return None if bool(is_text.all()) else Positions.row(0, m, device, some, is_text[:, None])
    position = (row - start).where(is_text | (start == 0), -1)
    return Positions(row.view(1, 1, -1), position[:, None], 0, None, is_text[:, None])


def _ends(table: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last key `[b r]` that each of some rows `[b r k]` sees: k and -1 where that is none."""
    row = torch.arange(table.shape[-1], device=table.device)
    return row.where(table, len(row)).amin(-1), row.where(table, -1).amax(-1)


def require_no_guesses(stack: Stack, read: str, rest: str = "") -> None:
    """Refuse guessed tokens where it matters that they are read several at once, as prompts are."""
    for part, method in zip(stack.parts, stack.methods, strict=True):
        phased = isinstance(part, Scoped) and part.phase is not None
        # what leaves the cache for good says so when a guess is taken back
        edits = any(not edit.reads and edit.site is not Site.CACHE for edit in method.edits)
        if phased or (edits and not method.chunk_invariant):
            does = "acts in one phase" if phased else "gives tokens other things where several are read at once"
            instead = "leave .when(...) out" if phased else f"leave {type(method).__name__} out"
            raise SiteError(
                f"{part!r} {does}, and {read}, as a prompt is; generate one token after another, or {instead}{rest}"
            )


def from_dense(mask: Tensor, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """An explicit mask as a table of pairs and what it adds to the others."""
    while mask.ndim < 4:
        mask = mask[None] if mask.ndim != 3 else mask[:, None]
    mask = mask[..., :keys]
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        return mask != 0, None
    table = mask > torch.finfo(mask.dtype).min / 2
    rest = mask.masked_fill(~table, 0.0)
    return (None if bool(table.all()) else table), (rest if rest.requires_grad or bool(rest.any()) else None)


def _sink(more: dict[str, Any]) -> Tensor | None:
    """A learned logit for each head (or row) that takes its share of the softmax and holds no value."""
    aux, sinks = more.get("s_aux"), more.get("sinks")
    if isinstance(aux, Tensor):
        return aux.reshape(1, -1, 1, 1)
    return sinks if isinstance(sinks, Tensor) else None


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a module is called with, under the names that its forward gives it."""
    if not args:
        return kwargs
    kind: Any = type(module)
    names = _order(module.forward) if "forward" in vars(module) else _orders(kind)
    return dict(zip(names, args, strict=False)) | kwargs


@cache
def _orders(kind: Any) -> tuple[str, ...]:
    return _order(kind.forward)[1:]


def _order(forward: Any) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, x in inspect.signature(forward).parameters.items() if x.kind in kinds)
