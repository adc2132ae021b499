"""The patches of an image: the grid that they lie on, and which tokens they are, row by row."""

from __future__ import annotations

import math

from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError, SiteError
from heedful.core.method import Method


def whole_image(call: Call) -> bool:
    """Whether all tokens see all tokens, among them patches in rows and columns."""
    grid = getattr(call.roles.get("patches"), "grid", None)
    one_read = not call.cross and len(call.queries) == len(call.keys)
    return one_read and not call.mask.causal and grid is not None and len(grid) == 2


def grid_of(call: Call) -> tuple[int, ...]:
    """How many patches lie along each axis."""
    return call.region("patches").grid or ()


def sides(call: Call) -> tuple[int, int]:
    """How many rows and columns of patches there are."""
    rows, cols = grid_of(call)
    return rows, cols


def patch_tokens(method: Method, call: Call) -> Tensor:
    """Which tokens the patches are, row by row `[patches]`; where some are missing, or there twice, that is refused."""
    return _row_by_row(method, call, call.coordinates("patches")[0], "tokens")


def patch_keys(method: Method, call: Call) -> Tensor:
    """The same of keys, which in cross-attention are another image's."""
    return _row_by_row(method, call, call.coordinates("patches")[1], "keys")


def _row_by_row(method: Method, call: Call, places: Tensor, name: str) -> Tensor:
    rows, cols = sides(call)
    at = places[0, 0]  # [n 2]
    tokens = (at[:, 0] >= 0).nonzero()[:, 0]
    if (found := len(tokens)) != rows * cols:
        rule = "all of them are needed" if found < rows * cols else "each is needed once, as in a row that is one text"
        told = f"{found} of the {rows} x {cols} patches are among the {name}"
        raise SiteError(f"{method!r}, layer {call.layer}: {told}, and {rule}")
    return tokens[(at[tokens, 0] * cols + at[tokens, 1]).argsort()]


def require_divides(method: Method, name: str, call: Call) -> None:
    """Refuse a field that does not divide both sides of the grid."""
    rows, cols = sides(call)
    given = getattr(method, name)
    if rows % given or cols % given:
        rule = f"must divide both sides of the {rows} x {cols} patches of layer {call.layer}"
        raise FieldError(method, name, given, rule, math.gcd(rows, cols))
