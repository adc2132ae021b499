"""Which patches a window lets a query see, wherever the window stands, on a grid of any number of axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import and_

from torch import Tensor

from heedful.authoring import Call, FieldError, Mask, Method
from heedful.kit.chosen import Chosen
from heedful.kit.patches import grid_of

Sees = Callable[[int, Tensor, Tensor], Tensor]  # (axis, places of queries, places of keys) -> which may meet


def within(mask: Mask, call: Call, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Mask:
    """The mask, narrowed to the window of each query's group; the patches of one residue are a grid of their own."""
    grid = grid_of(call)

    def sees(axis: int, at: Tensor, cols: Tensor) -> Tensor:
        n, w, s, d = (each[axis] for each in (grid, size, stride, dilation))
        rest = at % d
        many = (n - rest + d - 1) // d
        leader = (at // d // s * s + s // 2).minimum(many - 1)  # the query in the middle of its group
        start = (leader - w // 2).clamp(min=0).minimum(many - w) * d + rest  # moved in at borders
        inside = (cols >= start) & (cols < start + w * d)
        return inside & (cols % d == rest) if d > 1 else inside

    return narrowed(mask, call, sees)


def narrowed(mask: Mask, call: Call, sees: Sees) -> Mask:
    """The mask, narrowed to pairs that may meet on every axis; tokens off the grid see all and are seen by all."""
    places = call.places

    def pick(rows: slice) -> Tensor:
        query, key, outside = pairs(places.tile(rows, slice(None)))
        met = (sees(axis, query[..., axis], key[..., axis]) for axis in range(query.shape[-1]))
        return outside | reduce(and_, met)

    return mask & Chosen(pick)


def pairs(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Places of queries `[b|1 1 r 1 axes]` and keys `[b|1 1 1 k axes]`, and pairs with one off the grid."""
    query, key = call.coordinates("patches")
    query, key = query[..., :, None, :], key[..., None, :, :]
    return query, key, (query[..., 0] < 0) | (key[..., 0] < 0)


def require_room(
    method: Method, given: object, call: Call, size: Sequence[int], dilation: Sequence[int], good: object
) -> None:
    """Refuse a grid of other axes, and one that the window, `given` as the field `size`, does not fit into."""
    grid = grid_of(call)
    if len(grid) == len(size) and all(n >= w * d for n, w, d in zip(grid, size, dilation, strict=True)):
        return
    apart = " and ".join(map(str, dict.fromkeys(dilation)))
    sides = "both sides" if len(size) == 2 else f"the {len(size)} sides"
    rule = f"must fit, {apart} apart, into {sides} of the {' x '.join(map(str, grid))} patches of layer {call.layer}"
    raise FieldError(method, "size", given, rule, good)
