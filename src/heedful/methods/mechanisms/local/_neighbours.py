"""Which patches a window lets a query see, wherever the window stands, on a grid of any number of axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

from heedful.authoring import Call, FieldError, Mask, Method
from heedful.core.flags import between, both, same, some, whole
from heedful.kit.chosen import Reached
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
        inside = between(cols, start, start + w * d)
        return both(inside, same(cols % d, rest)) if d > 1 else inside

    return narrowed(mask, call, sees)


def narrowed(mask: Mask, call: Call, sees: Sees) -> Mask:
    """The mask, narrowed to pairs that may meet on every axis; tokens off the grid see all and are seen by all."""
    sides = grid_of(call)
    query, key = (x % (x.new_tensor(sides) + 1) for x in call.coordinates("patches"))  # off the grid: behind its ends
    meet = []  # of each axis `[n+1 n+1]`, which places may meet
    for axis, n in enumerate(sides):
        at = torch.arange(n, dtype=whole(4 * n), device=key.device)
        meet.append(pad(sees(axis, at[:, None], at), (0, 1, 0, 1), value=True))

    def reach(rows: slice) -> Tensor:
        asking = query[:, :, rows].flatten(0, 2)
        met = (some(table[asking[:, axis]], 0)[key[..., axis]] for axis, table in enumerate(meet))
        return reduce(both, met).flatten(0, 1).any(0)

    def pick(rows: slice, cols: slice | Tensor) -> Tensor:
        return reduce(both, (_met(table, query[:, :, rows, i], key[:, :, cols, i]) for i, table in enumerate(meet)))

    return mask & Reached(pick, reach)


def _met(table: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Entries of a table `[n n]` for queries `[b|1 g|1 r]` and keys `[b|1 g|1 k]`, `[b|1 g|1 r k]`.

    Rows are copied whole: of each place that is asked for there is one with all keys.
    """
    low = int(query.amin())
    texts, heads = torch.broadcast_shapes(query.shape[:2], key.shape[:2])
    rows = table[low : int(query.amax()) + 1][:, key].movedim(0, 2)  # [b|1 g|1 places k]
    if texts == heads == 1:
        return rows[0, 0][query[0, 0] - low][None, None]
    text, head = (torch.arange(n, device=key.device) for n in (texts, heads))
    rows = rows.expand(texts, heads, *rows.shape[2:])
    return rows[text[:, None, None], head[:, None], query.expand(texts, heads, -1) - low]


class Lines:
    """A tile's keys as whole lines of a grid of two axes: what goes by offsets is looked up a line at a time."""

    def __init__(self, call: Call) -> None:
        query, key = (x[:, 0] for x in call.coordinates("patches"))
        self.query = query  # [b|1 r 2]
        self.width = grid_of(call)[1]
        row, col = key.unbind(-1)
        self.rows = row[row >= 0].unique()  # those of the grid that keys stand on, [lines]
        place = torch.searchsorted(self.rows, row.contiguous()) * self.width + col
        self._place = place.where(row >= 0, len(self.rows) * self.width)  # of each key, [b|1 k]; the last is off

    def laid(self, x: Tensor) -> Tensor:
        """What pairs on the lines have `[b|1 h r lines width]`, by key `[b|1 h r k]`; 0 for one off the grid."""
        x, total = x.flatten(-2), len(self.rows) * self.width
        off = self.query[:, None, :, :1] < 0
        if bool(off.any()):
            x = x.masked_fill(off, 0.0)
        behind = self._place.shape[1] - total  # so many keys stand beside those of whole lines
        before = int((self._place[0, : max(behind, 0)] == total).long().cumprod(0).sum())
        inside = torch.arange(-before, total + behind - before, device=x.device)
        if torch.equal(self._place, inside.where((inside >= 0) & (inside < total), total).expand_as(self._place)):
            return pad(x, (before, behind - before)) if behind else x
        x = pad(x, (0, 1))
        if len(self._place) == 1:
            return x[..., self._place[0]]
        place = self._place[:, None, None].expand(-1, *x.shape[1:3], -1)
        return x.expand(len(place), -1, -1, -1).gather(-1, place)

    def by_offset(self, table: Tensor, step: int = 1) -> Tensor:
        """The entries of a table `[h a c]` as many steps from its middle as keys are from queries, `[b|1 h r k]`.

        What is farther than the table reaches has its entries at the border.
        """
        h, high, wide = table.shape
        n = self.width
        right = torch.arange(1 - n, n, device=table.device).div(step, rounding_mode="floor")
        shifted = table[..., (right + wide // 2).clamp(0, wide - 1)].unfold(-1, n, 1)  # [h a n n], last column first
        known = shifted.reshape(h * high * n, n)  # a line of keys for each head, row's offset and column
        row, col = self.query.clamp(min=0).unbind(-1)
        down = (self.rows - row[..., None]).div(step, rounding_mode="floor")  # [b|1 r lines]
        which = (down + high // 2).clamp(0, high - 1) * n + (n - 1 - col[..., None])
        heads = torch.arange(h, device=table.device)[:, None, None] * (high * n)
        return self.laid(embedding(which[:, None] + heads, known))  # [b|1 h r lines n]


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
