"""Damped averages of each channel, mixed: what blocks that stand for attention know of what is near."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from heedful.authoring import Call, SiteError
from heedful.core.state import ByIndex, Until

CHUNK = 64  # tokens whose averages are taken at once


def parameters_of(width: int, averages: int, random: Generator) -> dict[str, Tensor]:
    """What so many averages a channel learn."""

    def drawn(*shape: int, spread: float) -> Tensor:
        return spread * torch.randn(shape, generator=random)

    signs = torch.ones(averages).index_fill(0, torch.arange(1, averages, 2), -1.0)
    return {
        "damping": drawn(width, averages, spread=0.2),
        "decay": drawn(width, averages, spread=0.2),
        "expand": signs + drawn(width, averages, spread=0.02),
        "shrink": drawn(width, averages, spread=1.0),
        "skip": drawn(width, spread=1.0),
    }


def goes_on(call: Call, texts: int, n: int) -> None:
    """See to it that the state is that of the tokens before, and say of how many it will be."""
    first = call.queries.first or 0
    end = call.state.cache.get("end")
    if first and (end is None or bool(end.ne(first).any())):
        raise SiteError(
            f"layer {call.layer}: averages go on from token {first}, and those kept are not of the tokens before; was "
            "the cache cut back or made without it? Read the text again from its start"
        )
    call.state.cache["end"] = Until(torch.full((texts,), first + n, device=call.queries.index.device))


def averaged(x: Tensor, call: Call) -> Tensor:
    """The damped averages of each channel up to each token, mixed, `[b n e]`; their state is `[b e averages]`."""
    p = call.params
    weight, keep = p["damping"].sigmoid(), 1 - p["damping"].sigmoid() * p["decay"].sigmoid()  # [e a]
    into, out = weight * p["expand"], p["shrink"] / math.sqrt(p["shrink"].shape[1])
    size = min(CHUNK, x.shape[1])
    powers = (torch.arange(size + 1, device=x.device) * keep.log()[..., None]).exp()  # [e a size + 1]
    kernel = ((into * out)[..., None] * powers[..., :-1]).sum(1)  # [e size]: by distance
    ago = torch.arange(size, device=x.device)[:, None] - torch.arange(size, device=x.device)
    band = kernel[:, ago.clamp(min=0)].tril()  # [e size size]
    state = call.state.cache.get("averages")
    state = x.new_zeros(len(x), *keep.shape) if state is None else state
    found = []
    for piece in x.split(size, 1):
        m = piece.shape[1]
        near = torch.einsum("eij,bje->bie", band[:, :m, :m], piece)
        far = torch.einsum("bea,ea,eai->bie", state, out, powers[..., 1 : m + 1])
        found.append(near + far)
        fresh = torch.einsum("bje,ea,eaj->bea", piece, into, powers[..., :m].flip(-1))
        state = state * powers[..., m] + fresh
    call.state.cache["averages"] = state
    return torch.cat(found, 1)


def looks(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, call: Call, window: float = math.inf) -> Tensor:
    """What one head makes of the values so far `[b n c]`, by a bias of distance.

    Keys count that are `seen` `[b n]`, and of these as many as `window` back from each query, besides itself.
    """
    for name, own in (("key", key), ("value", value), ("seen", seen)):
        before = call.state.cache.get(name)
        call.state.cache[name] = ByIndex(own if before is None else torch.cat([before, own], 1), 1)
    key, value, seen = (call.state.cache[name] for name in ("key", "value", "seen"))
    distance, total, n = call.params["distance"], key.shape[1], query.shape[1]
    place, rank = torch.arange(total, device=query.device), seen.cumsum(1)
    back = place[total - n :, None] - place  # [n k]
    scores = query @ key.mT / math.sqrt(query.shape[-1]) + distance[back.clamp(0, len(distance) - 1)]
    far = rank[:, total - n :, None] - rank[:, None] > window
    hidden = (back < 0) | far | ~seen[:, None]
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).masked_fill(hidden, 0.0) @ value
