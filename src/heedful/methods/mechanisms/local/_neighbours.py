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
from heedful.methods.mechanisms.local._squares import squares

Sees = Callable[[int, Tensor, Tensor], Tensor]  # (axis, places of queries, places of keys) -> which may meet


def within(mask: Mask, call: Call, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Mask:
    """The mask, narrowed to the window of each query's group; the patches of one residue are a grid of their own."""
    grid = grid_of(call)

    def sees(axis: int, at: Tensor, cols: Tensor) -> Tensor:
        n, w, s, d = (each[axis] for each in (grid, size, stride, dilation))
        rest = at % d
        many = (n - rest + d - 1) // d
        leader = at // d // s * s + s // 2  # the query in the middle of its group, or where it would stand
        start = (leader - w // 2).clamp(min=0).minimum(many - w) * d + rest  # moved in at borders
        inside = between(cols, start, start + w * d)
        return both(inside, same(cols % d, rest)) if d > 1 else inside

    return narrowed(mask, call, sees)


def narrowed(mask: Mask, call: Call, sees: Sees) -> Mask:
    """The mask, narrowed to pairs that may meet on every axis; tokens off the grid see all and are seen by all."""
    sides = grid_of(call)
    asking, giving = call.coordinates("patches")
    query = asking % (asking.new_tensor(sides) + 1)  # off the grid: behind its ends
    key = query if giving is asking else giving % (giving.new_tensor(sides) + 1)
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

    return mask & Reached(pick, reach, gather=lambda: squares(query, key, sides, meet))


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
    """A tile's keys as lines of a grid of two axes: what goes by offsets is looked up a line at a time.

    Of tiles that lie as their tokens do lines are whole; keys that were gathered are a rectangle for each text.
    """

    def __init__(self, call: Call) -> None:
        query, key = (x[:, 0] for x in call.coordinates("patches"))
        self.query = query  # [b|1 r 2]
        row, col = key.unbind(-1)
        self._keys, self._place = key.shape[1], None  # those of a rectangle come first, those off the grid behind them
        found = _rectangle(row, col) if len(key) > 1 else None
        if found is not None:
            self.rows, self.columns = found  # those of the grid that keys stand on, [b|1 lines], [b|1 width]
            return
        rows, width = row[row >= 0].unique(), grid_of(call)[1]
        place = torch.searchsorted(rows, row.contiguous()) * width + col
        self.rows, self.columns = rows[None], torch.arange(width, device=row.device)[None]
        self._place = place.where(row >= 0, len(rows) * width)  # of each key, [b|1 k]; the last is off

    def laid(self, x: Tensor) -> Tensor:
        """What pairs on the lines have `[b|1 h r lines width]`, by key `[b|1 h r k]`; 0 for one off the grid."""
        total = self.rows.shape[1] * self.columns.shape[1]
        x = x.flatten(-2)
        off = self.query[:, None, :, :1] < 0
        if bool(off.any()):
            x = x.masked_fill(off, 0.0)
        if self._place is None:
            return pad(x, (0, self._keys - total)) if self._keys > total else x
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
        row, col = self.query.clamp(min=0).unbind(-1)
        first = self.columns[:, :1] - col  # how far right of its query a line begins, [b|1 r]
        low, n = int(first.amin()), self.columns.shape[1]
        right = torch.arange(low, int(first.amax()) + n, device=table.device).div(step, rounding_mode="floor")
        shifted = table[..., (right + wide // 2).clamp(0, wide - 1)].unfold(-1, n, 1)  # [h a firsts n]
        firsts = shifted.shape[2]
        known = shifted.reshape(h * high * firsts, n)  # a line of keys for each head, row's offset and beginning
        down = (self.rows[:, None] - row[..., None]).div(step, rounding_mode="floor")  # [b|1 r lines]
        which = (down + high // 2).clamp(0, high - 1) * firsts + (first - low)[..., None]
        heads = torch.arange(h, device=table.device)[:, None, None] * (high * firsts)
        return self.laid(embedding(which[:, None] + heads, known))  # [b|1 h r lines n]


def _rectangle(row: Tensor, col: Tensor) -> tuple[Tensor, Tensor] | None:
    """The rows and columns `[b m]` of keys `[b k]` that are a rectangle line by line, and then none; None of others."""
    many, width = int((row[0] >= 0).sum()), int((row[0] == row[0, 0]).sum())
    rows, columns = row[:, :many:width], col[:, :width]
    lines = rows.shape[1]
    fits = many == lines * width and torch.equal(row[:, :many], rows.repeat_interleave(width, 1))
    fits = fits and torch.equal(columns, columns[:, :1] + torch.arange(width, device=col.device))
    if not fits or not torch.equal(col[:, :many], columns.repeat(1, lines)) or bool((row[:, many:] >= 0).any()):
        return None
    return rows, columns


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
