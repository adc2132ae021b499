"""What is said of each token as it is read, and asked again when it is a key: kept with the cache of the text."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import SiteError
from heedful.core.positions import Positions, spread_heads
from heedful.core.state import ByIndex

UNKNOWN = -torch.inf  # of tokens that a cache took up without the method
NO_TOKEN = -1  # the same, of what is counted from 0


def of_keys(call: Call, name: str, own: Tensor) -> Tensor:
    """What is said of the call's tokens `[b h|g n c]` and was of those before them, by key, `[b h|g k c]`.

    It is UNKNOWN of tokens that were read without the method.
    """
    if call.cross:
        raise SiteError(
            f"layer {call.layer}: a method asks what was said of its keys as they were read, and these are of another "
            "sequence, which this layer does not read; restrict the method with .on(layers=...)"
        )
    found = _so_far(call, name, own, UNKNOWN)
    where = spread_heads(call.keys.index, own.shape[1]).clamp(max=found.shape[2] - 1)
    return found.gather(2, where.expand(*found.shape[:2], -1)[..., None].expand(-1, -1, -1, own.shape[3]))


def of_text(call: Call, name: str, own: Tensor) -> Tensor:
    """The same by index, up to the call's last token, `[b h n c]`."""
    return _so_far(call, name, own, UNKNOWN)


def _so_far(call: Call, name: str, own: Tensor, unknown: float) -> Tensor:
    """What is said of the text's tokens up to this call's last, by index, `[b h n c]`; keeps it with the cache."""
    first = (call.queries.first or 0) + len(call.queries) - own.shape[2]
    if first:
        before = call.state.cache.get(name, own[:, :, :0])[:, :, :first]
        lost = own.new_full((*own.shape[:2], first - before.shape[2], own.shape[3]), unknown)
        own = torch.cat([before, lost, own], 2)
    call.state.cache[name] = ByIndex(own, 2)
    return own


def token_ids(call: Call) -> Tensor:
    """Which tokens a text is made of up to the call's last, by index, `[b n]`: their numbers in the vocabulary.

    Ask in every call, and before SCORES: what is not asked for is not known in the calls that follow. `at_places` has
    them by query or key.
    """
    if call.cross:
        raise SiteError(
            f"layer {call.layer}: a method asks which tokens it is shown, and keys of another sequence are of tokens "
            "that this layer is not told; restrict the method with .on(layers=...)"
        )
    if call.ids is None:
        raise SiteError(
            f"layer {call.layer}: a method asks which tokens it is shown, and the model was not given input_ids of "
            "this shape; hand it ids, not inputs_embeds or images"
        )
    found = _so_far(call, "ids", call.ids.to(call.queries.index.device)[:, None, :, None], NO_TOKEN)[:, 0, :, 0]
    if bool((found == NO_TOKEN).any()):
        raise SiteError(
            f"layer {call.layer}: a method asks which tokens it is shown, and the cache holds some that were read "
            "without it; read the text from its beginning while this stack is attached, in every phase"
        )
    return found


def at_places(x: Tensor, places: Positions) -> Tensor:
    """Something of the tokens by index `[b n]`, by query or key, `[b g|1 k]`; of an empty place the last one's."""
    where = places.index.clamp(max=x.shape[1] - 1).expand(len(x), -1, -1)
    return x[:, None].expand(-1, where.shape[1], -1).gather(2, where)
