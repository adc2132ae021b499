"""Which patches a window that moves with the query lets it see, on a grid of any number of axes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from heedful.authoring import Call, FieldError, Mask, Method
from heedful.kit.chosen import Chosen


def grid_of(call: Call) -> tuple[int, ...]:
    return call.region("patches").grid or ()


def within(mask: Mask, call: Call, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Mask:
    """The mask, narrowed to the window of each query's group; tokens off the grid see all and are seen by all."""
    places = call.places
    return mask & Chosen(lambda rows: _near(places.tile(rows, slice(None)), size, stride, dilation))


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


def _near(call: Call, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Which keys each query sees, `[b|1 1 r k]`; the patches of one residue are a grid of their own."""
    query, key = call.coordinates("patches")
    near = (query[..., :, None, 0] < 0) | (key[..., None, :, 0] < 0)
    inside = ~near
    for axis, (n, w, s, d) in enumerate(zip(grid_of(call), size, stride, dilation, strict=True)):
        at, cols = query[..., :, None, axis], key[..., None, :, axis]
        rest = at % d
        many = (n - rest + d - 1) // d
        leader = (at // d // s * s + s // 2).minimum(many - 1)  # the query in the middle of its group
        start = (leader - w // 2).clamp(min=0).minimum(many - w) * d + rest  # moved in at borders
        inside = inside & (cols >= start) & (cols < start + w * d)
        if d > 1:
            inside = inside & (cols % d == rest)
    return near | inside
