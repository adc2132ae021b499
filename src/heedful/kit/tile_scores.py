"""Scores of a tile that are no products: a small net over the sum of query and key, and what a model adds to them."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from heedful.core.call import Call
from heedful.core.errors import SiteError
from heedful.core.method import Method


def operands(method: Method, call: Call) -> tuple[Tensor, Tensor]:
    """The tile's queries `[b h r d]` and keys `[b g k d]`."""
    if call.query is None or call.key is None:
        raise SiteError(f"{method!r}, layer {call.layer}: scores are those of a tile, from SCORES on")
    return call.query[:, :, call.rows], call.key[:, :, call.cols]


def additive(query: Tensor, key: Tensor, of_query: Tensor, of_key: Tensor, out: Tensor) -> Tensor:
    """out . tanh(of_query q_i + of_key k_j), `[b h r k]`: queries `[b h r d]`, keys `[b h k d]`, out `[1 n]`."""
    q, k = (linear(x.to(w.dtype), w) for x, w in ((query, of_query), (key, of_key)))
    return (q[:, :, :, None] + k[:, :, None]).tanh() @ out[0]


def biased(scores: Tensor, call: Call) -> Tensor:
    """The same with what the model adds to the tile's scores, such as a bias by distance."""
    if call.bias is None:
        return scores
    rows = slice(None) if call.bias.shape[2] == 1 else call.rows
    return scores + call.bias[:, :, rows][..., call.cols].to(scores.dtype)
