"""Damped averages of each channel, mixed: what blocks that stand for attention know of what is near."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from heedful.authoring import Call, SiteError
from heedful.core.state import ByIndex, Until
from heedful.kit.rows import LEAST, PIECE

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
    total, n, rank = key.shape[1], query.shape[1], seen.cumsum(1)
    back = torch.arange(total, device=query.device).clamp(max=len(call.params["distance"]) - 1)
    bias = call.params["distance"][back]
    query, step, found = query / math.sqrt(query.shape[-1]), max(LEAST, PIECE // (len(key) * total)), []
    for rows, part in zip(torch.arange(total - n, total).split(step), query.split(step, 1), strict=True):
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        first = 0 if window == math.inf else int((rank[:, here.start, None] - rank > window).sum(1).min())
        cols = slice(first, here.stop)
        far = ~seen[:, None, cols] | _later(part.shape[1], here.stop - first, query.device)
        if window < math.inf:
            far = far | (rank[:, here, None] - rank[:, None, cols] > window)
        scores = torch.baddbmm(_by_distance(bias, part.shape[1], here.stop - first), part, key[:, cols].mT)
        weights = scores.masked_fill(far, torch.finfo(scores.dtype).min).softmax(-1)
        found.append((weights @ value[:, cols]).masked_fill(far.all(-1, keepdim=True), 0.0))
    return torch.cat(found, 1)


def _later(rows: int, columns: int, device: torch.device) -> Tensor:
    """Which of the columns come after each of the last rows, `[r k]`."""
    return torch.ones(rows, columns, dtype=torch.bool, device=device).triu_(columns - rows + 1)


def _by_distance(bias: Tensor, rows: int, columns: int) -> Tensor:
    """The bias of each of the last rows and each column before it, `[r k]`, from that of each distance."""
    near = torch.cat([bias[:columns].flip(0), bias[:1].expand(rows - 1)])
    return near.unfold(0, columns, 1).flip(0)
