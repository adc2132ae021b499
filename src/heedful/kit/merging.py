"""What methods that merge tokens share: numbers of those that are left, and means of those that went into one."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call, Merged
from heedful.core.method import Method

FIXED = ("cls", "register")  # what stands before patches and is none


class MergesTokens(Method, abstract=True):
    """Leaves an encoder's later layers fewer tokens; a function is marked `@at(Site.RESIDUAL, merges=True)`."""

    subjects = ("image",)
    causal = False
    chunk_invariant = False


def numbered(group: Tensor) -> Tensor:
    """The number of each token `[b n]` among those left, which stand in the order of the first of their group.

    A group is named by any number from 0 up and below n, as by that of the token into which others go; -1: dropped.
    """
    b, n = group.shape
    own = torch.arange(n, device=group.device).expand(b, -1)
    name = group.where(group >= 0, n)
    first = own.new_full((b, n + 1), n).scatter_reduce(1, name, own, "amin").gather(1, name)
    number = ((first == own) & (group >= 0)).cumsum(1) - 1
    return torch.where(group >= 0, number.gather(1, first.clamp(max=n - 1)), -1)


def summed(x: Tensor, to: Tensor) -> Tensor:
    """What the tokens that went into each one left add up to, `[b m]` of `[b n]` or `[b m e]` of `[b n e]`."""
    left = int(to.max()) + 1
    at = to.where(to >= 0, left)
    shape = (len(x), left + 1, *x.shape[2:])
    return x.new_zeros(shape).scatter_add_(1, at[(...,) + (None,) * (x.ndim - 2)].expand_as(x), x)[:, :left]


def averaged(stream: Tensor, to: Tensor, weight: Tensor) -> Tensor:
    """The means `[b m e]` of tokens `[b n e]`, each counted by its weight `[b n]`; zeros in an empty place."""
    total = summed(weight, to)[..., None]
    return summed(stream * weight[..., None], to) / total.where(total > 0, 1.0)


def kept(stream: Tensor, stays: Tensor) -> Merged:
    """Those of the tokens `[b n e]` that stay `[b n]`, in their order; the others are dropped."""
    number = stays.cumsum(1) - 1
    to = torch.where(stays, number, -1)
    at = to.where(stays, stays.shape[1])  # the others go to a place that is cut off
    places = stream.new_zeros(len(stream), stays.shape[1] + 1, stream.shape[2])
    left = places.scatter(1, at[..., None].expand_as(stream), stream)
    return Merged(left[:, : int(number.max()) + 1], to)


def is_fixed(call: Call) -> Tensor:
    """Which tokens are neither patches nor made of any, and padding, `[b|1 n]`: never merged, never dropped.

    Where nobody says which are patches, that is the first, which is most models' class token.
    """
    if "patches" in call.roles:
        fixed = ~call.marked_queries("patches")
    else:
        fixed = call.q_pos == 0
        for role in FIXED:
            if role in call.roles:
                fixed = fixed | call.marked_queries(role)
    return (fixed | ~call.is_text)[:, 0]
