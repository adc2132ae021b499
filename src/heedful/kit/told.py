"""What is said of each token as it is read, and asked again when it is a key: kept with the cache of the text."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import SiteError
from heedful.core.positions import spread_heads
from heedful.core.state import ByIndex

UNKNOWN = -torch.inf  # of tokens that a cache took up without the method
NO_TOKEN = -1  # the same, of what is counted from 0


def of_keys(call: Call, name: str, own: Tensor, unknown: float = UNKNOWN) -> Tensor:
    """What is said of the call's tokens `[b h|g|1 n c]` and was of those before them, by key, `[b h|g|1 k c]`."""
    first = call.queries.first or 0
    if first:
        before = call.state.cache.get(name, own[:, :, :0])[:, :, :first]
        lost = own.new_full((*own.shape[:2], first - before.shape[2], own.shape[3]), unknown)
        own = torch.cat([before, lost, own], 2)
    call.state.cache[name] = ByIndex(own, 2)
    heads = max(own.shape[1], call.keys.index.shape[1])  # what is said once for all heads is asked by each
    own = own.expand(-1, heads, -1, -1)
    where = spread_heads(call.keys.index, heads).clamp(max=own.shape[2] - 1)
    return own.gather(2, where.expand(*own.shape[:2], -1)[..., None].expand(-1, -1, -1, own.shape[3]))


def token_ids(call: Call) -> tuple[Tensor, Tensor]:
    """Which tokens a whole call's queries `[b 1 n]` and its keys `[b g|1 k]` are of, by number in the vocabulary.

    Ask for them in every call, and before SCORES: what is not asked for is not known in the calls that follow.
    """
    if call.cross:
        raise SiteError(f"layer {call.layer}: keys of another sequence are of tokens that this layer is not told")
    if call.ids is None:
        raise SiteError(
            f"layer {call.layer}: a method asks which tokens it is shown, and the model was not given input_ids of "
            "this shape; hand it ids, not inputs_embeds or images"
        )
    own = call.ids.to(call.queries.index.device)[:, None]
    found = of_keys(call, "ids", own[..., None], NO_TOKEN)[..., 0]
    if bool((found == NO_TOKEN).any()):
        raise SiteError(
            f"layer {call.layer}: a method asks which tokens it is shown, and the cache holds some that were read "
            "without it; read the text from its beginning while this stack is attached, in every phase"
        )
    return own, found
