"""How fast each dimension of a head turns, measured on the model's own rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import RefusedModel


def periods(call: Call, width: int) -> Tensor | None:
    """How many tokens each of a head's `width` dimensions takes for a full turn, `[d]`; infinite where it does not
    turn. None where the model shows no rotary embedding or the call has fewer than two tokens of text.

    A method is told the same of all layers that turn by the same angles, which are measured once in a forward.
    """
    rows = call.is_text[0, 0].nonzero()[:, 0]
    if call.rotate is None or len(rows) < 2:
        return None
    asked = call.rotate, width, int(rows[0]), int(rows[-1]) + 1
    known, found = call.state.forward.get("periods", (None, None))
    if known != asked:
        found = _measured(*asked, len(call.queries), rows.device)
        call.state.forward["periods"] = asked, found
    return found


def _measured(
    rotate: Callable[[Tensor], Tensor], width: int, start: int, stop: int, n: int, device: torch.device
) -> Tensor | None:
    """The periods by what becomes of ones at the text's places, from `start` to `stop` of `n`."""
    try:
        turned = rotate(torch.ones(1, 1, n, width, device=device))[0, 0, start:stop]
    except (RuntimeError, RefusedModel):
        return None  # only a part of each head is turned, or in a way that nobody else can follow
    doubling = [0, *(2**i for i in range((len(turned) - 1).bit_length()))]
    turned = turned[doubling].double()  # [s d], all that is needed to tell speeds
    turning = (turned != turned[:1]).any(0).nonzero()[:, 0]
    out = torch.full((width,), float("inf"), dtype=torch.float64, device=turned.device)
    if len(turning) == 0:
        return out
    size = int(turning[-1]) // 2 * 2 + 2
    # a pair is (j, j + half) in most models and (2j, 2j + 1) in some; its length does not change as it turns
    layouts = [turned[:, :size].unflatten(-1, (2, -1)), turned[:, :size].unflatten(-1, (-1, 2)).mT]  # [n 2 pairs]
    which = min((0, 1), key=lambda i: float(layouts[i].square().sum(1).var(0).sum()))
    speed = _speed(torch.complex(layouts[which][:, 0], layouts[which][:, 1]))
    period = 2 * math.pi / speed
    out[:size] = period.repeat(2) if which == 0 else period.repeat_interleave(2)
    return out


def _speed(z: Tensor) -> Tensor:
    """Radians a row of what turns evenly, from its rows 0, 1, 2, 4 and so on, `[s pairs]` to `[pairs]`.

    The angle of each longer step is unwrapped by the last.
    """
    speed, *longer = (z[1:] / z[0]).angle()
    for i, angle in enumerate(longer, 1):
        speed = (angle + 2 * math.pi * ((speed * 2**i - angle) / (2 * math.pi)).round()) / 2**i
    return speed.abs()


def turned_back(call: Call, x: Tensor) -> Tensor:
    """Queries or fresh keys `[b h n d]` of the call as they were before the rotary embedding.

    Dimensions turn in pairs, and a turn of a pair and the same turn back add up to twice its diagonal.
    """
    if call.rotate is None:
        return x
    width = x.shape[-1]
    blank = x.new_zeros(1, 1, x.shape[2], width)
    reach = call.rotate(blank.index_fill(-1, torch.zeros(1, dtype=torch.long, device=x.device), 1.0)).abs()
    apart = max(1, int(reach.amax((0, 1, 2))[1:].argmax()) + 1)  # how far from a dimension the other of its pair stands
    one = torch.arange(width, device=x.device) // apart % 2 == 0  # one of each pair, which the other does not reach
    diagonal = call.rotate(blank + one.to(x)).where(one, call.rotate(blank + (~one).to(x)))
    ones = call.rotate(blank + 1)
    # divided by what the model scales a turn with, squared
    return (2 * diagonal * x - call.rotate(x)) / (2 * diagonal * ones - call.rotate(ones))
