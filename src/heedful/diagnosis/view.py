"""The token view: where each token of a stretch of real text looks, for a few heads. Never the whole map."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from math import isqrt
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.core.call import Call, Phase
from heedful.core.entry import Readings
from heedful.core.errors import FieldError
from heedful.core.figures import Head, Role
from heedful.core.kinds.conversion import Progress
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Statistic
from heedful.diagnosis.texts import pieces

if TYPE_CHECKING:
    from heedful.diagnosis.profile import Profile
    from heedful.diagnosis.subject import Subject
    from heedful.diagnosis.texts import Windows

MOST_HEADS, MOST_KEYS = 12, 8
SHOWN = 256  # tokens of the first window that are shown
OPENING_BYTES = 500_000  # what the whole patterns of all heads may weigh, a byte a weight


@dataclass(frozen=True, eq=False)
class TokenView:
    """Chosen heads over one text."""

    tokens: list[str]  # the text in pieces, which join to the text
    heads: list[Head]
    keys: Tensor  # int32 [heads n t]: the most attended columns of each token, strongest first
    weights: Tensor  # [heads n t]: their weights; 0 where a token sees fewer keys
    received: Tensor  # [heads n]: mean weight that each token got from those that may see it
    entropy: Tensor  # [heads n]: of each token's weights, in nats
    norms: Tensor  # [heads n]: how long each token's value is
    layers: list[int]  # those of `opening`
    opening: Tensor  # float16 [layers h s s]: the pattern of the first tokens, of every head; nan where there is none

    def __post_init__(self) -> None:
        h, n = len(self.heads), len(self.tokens)
        rows = (self.received, self.entropy, self.norms)
        if self.keys.shape != self.weights.shape or any(x.shape[:2] != (h, n) for x in (self.keys, *rows)):
            shapes = tuple(tuple(x.shape) for x in (self.keys, self.weights, *rows))
            rule = f"keys, weights and what there is of each token must be those of {h} heads and {n} tokens"
            raise FieldError(self, "keys", shapes, rule, ((h, n, 8), (h, n, 8), (h, n), (h, n), (h, n)))
        if self.opening.ndim != 4 or len(self.opening) != len(self.layers):
            rule = f"must be [layers h s s] of {len(self.layers)} layers"
            raise FieldError(self, "opening", tuple(self.opening.shape), rule, (len(self.layers), 8, 32, 32))


class Looks(NamedTuple):
    """Where the tokens of a stretch look, for every head of a layer."""

    keys: Tensor  # int32 [h r t]: the columns of each token's highest weights
    weights: Tensor  # [h r t]: these, highest first
    sums: Tensor  # [2 h r]: the weight that the stretch gives to each of its columns, and how many tokens see it
    entropy: Tensor  # [h r]: of each token's weights
    opening: Tensor  # [h s s]: the whole pattern of the first tokens
    norms: Tensor  # [h r]: the lengths of the values that the stretch's columns hold


LooksByLayer = Mapping[int, Looks]


class Attended(Method):
    """The keys at which each of the first tokens looks most, in the first text that is read."""

    paper = Paper(
        "VIG2019",
        "A Multiscale Visualization of Attention in the Transformer Model",
        "Jesse Vig",
        2019,
        "1906.05714",
        "ACL 2019",
        differs=("Each token's strongest keys alone are kept; the author keeps every weight.",),
    )
    most: int = MOST_KEYS  # keys for each token
    tokens: int = SHOWN  # tokens that are looked at

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE or "seen" in call.state.run

    @reads(Site.PATTERN, first="tokens")
    def look(self, weights: Tensor, call: Call) -> Statistic:
        weights = weights[0].float()
        columns = call.keys.index[0, 0]
        high, at = weights.topk(min(self.most, len(columns)))  # [h r t]
        short = (0, self.most - high.shape[-1])
        keep = torch.ones_like(weights[:1], dtype=torch.bool) if call.keep is None else call.keep[0]
        got = weights.sum(1)
        shown = columns < self.tokens
        sums = weights.new_zeros(2, len(weights), self.tokens)
        sums[..., columns[shown]] = torch.stack([got, keep.sum(1).expand_as(got).to(got.dtype)])[..., shown]
        start, most = call.rows.start or 0, opening_size(call.depth * call.heads)
        opening = weights.new_zeros(len(weights), max(0, min(weights.shape[1], most - start)), most)
        opening[..., columns[columns < most]] = weights[:, : opening.shape[1], columns < most]
        found = {
            "keys": pad(columns[at], short).int(),
            "weights": pad(high, short),
            "sums": sums,
            # torch.special.entr takes several times longer
            "entropy": -(weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()).sum(-1),
            "opening": opening,
        }
        if start == 0 and call.value is not None:
            norms = call.value[0, :, : self.tokens].float().norm(dim=-1)
            found["norms"] = norms.repeat_interleave(call.heads // len(norms), 0)
        return Cat({f"{name}.{start:09d}": x for name, x in found.items()})

    def finish(self, statistic: Statistic, call: Call) -> Statistic:
        call.state.run["seen"] = True
        return statistic

    def answer(self, readings: Readings) -> dict[int, Looks]:
        found = {}
        for layer, cat in readings.items():
            parts = {
                name: [x.cpu() for at, x in sorted(cat.tensors().items()) if at.startswith(f"{name}.")]
                for name in Looks._fields
            }
            sums = torch.stack(parts.pop("sums")).sum(0)
            found[layer] = Looks(sums=sums, **{name: torch.cat(rows, 1) for name, rows in parts.items()})
        return found


def opening_size(heads: int) -> int:
    """How many of the first tokens have their whole patterns kept, in a model of that many heads."""
    return max(16, min(32, isqrt(OPENING_BYTES // heads)))


def notable(roles: Iterable[Role], layers: int, heads: int, most: int) -> list[Head]:
    """The heads to show: the strongest of each role in turn; spread over the layers where none plays a part."""
    turns = zip_longest(*(role.heads for role in roles))
    chosen = list(dict.fromkeys(head for turn in turns for head in turn if head is not None))
    if not chosen:
        every = [(layer, h) for layer in range(layers) for h in range(heads)]
        chosen = every[:: max(1, -(-len(every) // most))]
    return sorted(chosen[:most])


def first_tokens() -> Attended:
    """What looks at the tokens that are shown."""
    return Attended(tokens=SHOWN)


def look(subject: Subject, windows: Windows, profile: Profile, looks: LooksByLayer) -> TokenView:
    """The view of the first tokens of the first window."""
    window = windows.tokens[0]
    shown = window[:SHOWN]
    if not looks or any(int(look.keys.max()) >= len(shown) for look in looks.values()):
        # nobody read the first window now, or its tokens look at later ones: the stretch is read alone
        looks = subject.shown(first_tokens(), shown)
    named = pieces(windows.first, subject.tokenizer, window, len(shown))
    subject.report(Progress("view", len(named), len(named)))
    heads = notable(profile.roles(), profile.facts["layers"], profile.facts["heads"], MOST_HEADS)
    with torch.autocast("cpu", enabled=False):  # which knows no types as narrow as some of these
        return view_of(looks, heads, named)


def view_of(looks: Mapping[int, Looks], heads: list[Head], tokens: list[str]) -> TokenView:
    """The view of these heads."""
    n = len(tokens)
    keys, weights = (torch.stack([getattr(looks[i], name)[h] for i, h in heads]) for name in Looks._fields[:2])
    got, seen = torch.stack([looks[i].sums[:, h, :n] for i, h in heads], 1)
    entropy = torch.stack([looks[i].entropy[h] for i, h in heads])
    norms = torch.stack([pad(looks[i].norms[h, :n], (0, max(0, n - looks[i].norms.shape[1]))) for i, h in heads])
    layers, widest = sorted(looks), max(len(look.opening) for look in looks.values())
    openings = [looks[i].opening[:, :n, :n].half() for i in layers]
    opening = torch.stack([pad(x, (0, 0, 0, 0, 0, widest - len(x)), value=torch.nan) for x in openings])
    return TokenView(tokens, heads, keys, weights, got / seen.clamp(min=1), entropy, norms, layers, opening)
