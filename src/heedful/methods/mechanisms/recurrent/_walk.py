"""Where heads that go through a source looked last: kept with the cache of the text that is written."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import SiteError
from heedful.core.method import Method
from heedful.core.state import Until


def looked_last(method: Method, call: Call, start: Tensor) -> Tensor:
    """Where heads looked last, like `start [b ...]`, which is where they stand before a text begins."""
    first, end = call.queries.first or 0, call.state.cache.get("end")
    if end is None and not first:
        return start
    # a model's cross-attention may count its queries from 0 in every call
    if end is None or bool((end < 0).any()) or (first and not bool(end.eq(first).all())):
        raise SiteError(
            f"{method!r}, layer {call.layer}: goes on within a text, and does not know where the token before "
            "looked; was the cache cut back or made without it? Write the text again from its start"
        )
    return call.state.cache["place"].to(start.dtype)


def remember(call: Call, place: Tensor) -> None:
    """Keep where the call's last token looked, `[b ...]`."""
    call.state.cache["place"] = place.detach()
    so_far = call.state.cache.get("end", torch.zeros(len(place), dtype=torch.long, device=place.device))
    call.state.cache["end"] = Until(so_far + len(call.queries))


def seen(call: Call, shape: tuple[int, int, int], total: int, device: torch.device) -> Tensor:
    """Which of `total` keys each query of each head may see, `[b h q k]`."""
    keep = call.mask.keeps(call.pairs)
    keep = torch.ones((), dtype=torch.bool, device=device) if keep is None else keep
    return keep.expand(*shape, total)
