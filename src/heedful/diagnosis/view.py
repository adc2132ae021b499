"""The token view: where each token of a stretch of real text looks, for a few heads. Never the whole map."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.figures import Head, Role
from heedful.core.method import Method, Readings, Scoped, method_of
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stack import Stack
from heedful.core.stats import Cat, Statistic
from heedful.methods.observe.sink_rate import SinkRate

PAGE_BYTES = 1_200_000  # what a view may weigh once it is encoded
TOKEN_BYTES = 8  # a token's text, quoted
SLOT_BYTES = 4  # distance in two bytes and weight in one, in base64
MOST_HEADS, MOST_KEYS = 12, 8
SHOWN = 256  # tokens of the first window that are shown: they are read once more, after the heads are known


@dataclass(frozen=True, eq=False)
class TokenView:
    """Chosen heads over one text."""

    tokens: list[str]  # the text in pieces, which join to the text
    heads: list[Head]
    keys: Tensor  # int32 [heads n t]: the most attended columns of each token, strongest first
    weights: Tensor  # [heads n t]: their weights; 0 where a token sees fewer keys
    received: Tensor  # [heads n]: mean weight that each token got from those that may see it

    def __post_init__(self) -> None:
        h, n = len(self.heads), len(self.tokens)
        if self.keys.shape != self.weights.shape or self.keys.shape[:2] != (h, n) or self.received.shape != (h, n):
            shapes = tuple(tuple(x.shape) for x in (self.keys, self.weights, self.received))
            rule = f"keys, weights and received must be those of {h} heads and {n} tokens"
            raise FieldError(self, "keys", shapes, rule, ((h, n, 8), (h, n, 8), (h, n)))


class Attended(Method):
    """The keys at which each token looks most. Its statistic is of one text and does not merge with another's."""

    paper = Paper(
        "VIG2019",
        "A Multiscale Visualization of Attention in the Transformer Model",
        "Jesse Vig",
        2019,
        "1906.05714",
        "ACL 2019",
        differs=("Each token's strongest keys alone are kept; the author keeps every weight.",),
    )
    most: int = 8  # keys for each token

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Statistic:
        high, at = weights[0].topk(min(self.most, weights.shape[-1]))  # [h r t]
        at = at + (call.cols.start or 0) if isinstance(call.cols, slice) else call.cols[at]
        short = (0, self.most - high.shape[-1])
        row = f"{call.rows.start or 0:09d}"
        pad = torch.nn.functional.pad
        return Cat({f"{row}.keys": pad(at, short).int(), f"{row}.weights": pad(high, short).float()})

    def answer(self, readings: Readings) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and weights `[h n t]` by layer."""
        found = {}
        for layer, cat in readings.items():
            pieces = cat.tensors()
            keys, weights = (
                torch.cat([x for name, x in sorted(pieces.items()) if name.endswith(end)], 1)
                for end in (".keys", ".weights")
            )
            found[layer] = keys, weights
        return found


def room(tokens: int) -> tuple[int, int]:
    """How many heads, and keys for each token, a view of that many tokens has room for."""
    slots = (PAGE_BYTES // tokens - TOKEN_BYTES) // SLOT_BYTES
    heads = min(MOST_HEADS, max(slots // 4, min(3, slots // 2), 1))
    return heads, min(MOST_KEYS, max(1, slots // heads))


def notable(roles: Iterable[Role], layers: int, heads: int, most: int) -> list[Head]:
    """The heads to show: the strongest of each role in turn; spread over the layers where none plays a part."""
    turns = zip_longest(*(role.heads for role in roles))
    chosen = list(dict.fromkeys(head for turn in turns for head in turn if head is not None))
    if not chosen:
        every = [(layer, h) for layer in range(layers) for h in range(heads)]
        chosen = every[:: max(1, -(-len(every) // most))]
    return sorted(chosen[:most])


def viewing(heads: list[Head], keys: int) -> Stack:
    """The methods that read a view of these heads."""
    parts: list[Scoped] = []
    for layer in sorted({layer for layer, _ in heads}):
        chosen = [h for at, h in heads if at == layer]
        parts += [Attended(keys).on(layer, chosen), SinkRate().on(layer, chosen)]
    return Stack(tuple(parts))


def view_of(run: Any, heads: list[Head], tokens: list[str]) -> TokenView:
    """What a run of `viewing` over one text found."""
    keys, weights, received = [], [], []
    for part in run.stack:
        if isinstance(method_of(part), Attended):
            for at, high in run[part].values():
                keys.append(at)
                weights.append(high)
        elif isinstance(method_of(part), SinkRate):
            received += list(run[part].importance.values())
    one = [torch.cat(x).cpu() for x in (keys, weights, received)]
    return TokenView(tokens, heads, one[0], one[1], one[2].float())
