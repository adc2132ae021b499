"""H = -sum_j A_ij ln A_ij and sum_(i-j=d) A_ij, averaged over queries i: how widely and how far back a head looks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from heedful.core.call import Call, Phase
from heedful.core.entry import Readings
from heedful.core.figures import (
    Curves,
    Description,
    Finding,
    Head,
    HeadMap,
    Listing,
    Role,
    counted,
    head_name,
    layers_from,
    percent,
)
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.positions import spread_heads
from heedful.core.ranges import PositiveInt, ProperShare
from heedful.core.stats import Mean, Statistic
from heedful.core.summary import Summary, sums
from heedful.kit.octaves import EDGES, EXACT

PARTS = ("entropy", "peak", "first", "self", "previous", "next", "near", "far", "delimiters", "fair")
BINS = len(EDGES)


@dataclass(frozen=True, eq=False)
class Profile:
    """What each head looks at. The first token is counted by itself, so that first + self + near + far is all."""

    parts: dict[str, dict[int, Tensor]] = field(repr=False)  # name of PARTS -> layer -> [h]; nan where not measured
    distances: dict[int, Tensor] = field(repr=False)  # [2 h m]: share of each bin of distance, behind and ahead

    def map(self, part: str) -> Tensor:
        """One part for all heads, `[layers h]`."""
        return pad_sequence(list(self.parts[part].values()), True, float("nan"))

    def mean(self, part: str) -> float:
        return float(self.map(part).nanmean())

    def offsets(self, share: float) -> dict[Head, tuple[int, float]]:
        """Heads with more than that share at one distance below 16 (negative: ahead), the strongest first."""
        found = {}
        for layer, x in self.distances.items():
            exact = torch.cat([x[0, :, :EXACT], x[1, :, 1:EXACT]], -1)
            for h, (high, at) in enumerate(zip(*exact.max(-1), strict=True)):
                if high > share:
                    found[layer, h] = (int(at) if at < EXACT else EXACT - 1 - int(at), float(high))
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    def divergence(self) -> tuple[list[Head], Tensor]:
        """Jensen-Shannon divergence in nats between all heads' shares of first token and distances, `[h h]`."""
        heads = [(n, h) for n, x in self.distances.items() for h in range(x.shape[1])]
        rows = [torch.cat([self.parts["first"][n][:, None], *x], -1) for n, x in self.distances.items()]
        p = torch.cat(rows)
        p = p / p.sum(-1, keepdim=True).clamp(min=1e-9)
        entropy = torch.special.entr(p).sum(-1)
        mixed = p.new_zeros(len(p), len(p))
        for i, row in enumerate(p):  # each pair once, which is dear
            mixed[i, i:] = mixed[i:, i] = torch.special.entr((p[i:] + row) / 2).sum(-1)
        apart = (mixed - (entropy + entropy[:, None]) / 2).clamp(min=0)
        return heads, apart.fill_diagonal_(0)  # also of a head whose shares are no numbers

    def groups(self, alike: float) -> list[list[Head]]:
        """Heads within that divergence of a head in their middle, the largest group first; the middle head leads."""
        heads, apart = self.divergence()
        near, free, found = apart <= alike, torch.ones(len(heads), dtype=torch.bool), []
        while free.any():
            middle = int(((near & free).sum(1) * free).argmax())
            members = near[middle] & free
            order = torch.where(members, apart[middle], torch.inf).argsort(stable=True)[: int(members.sum())]
            found.append([heads[i] for i in order.tolist()])
            free = free & ~members
        return found

    def __str__(self) -> str:
        return ", ".join(f"{part} {self.mean(part):.3g}" for part in PARTS[:8])


class AttentionProfile(Method):
    """How widely each head looks, and how much goes to the first token, near ones, far ones and delimiters."""

    paper = Paper(
        "P145",
        "What Does BERT Look At? An Analysis of BERT's Attention",
        "Kevin Clark, Urvashi Khandelwal, Omer Levy, Christopher D. Manning",
        2019,
        "1906.04341",
        "BlackboxNLP 2019",
        differs=(
            "Means are over all tokens; the authors take the mean of each text, then of the texts.",
            "Heads are compared by their shares of the first token and of each distance, in bins; the authors compare "
            "whole maps. Groups stand in place of their two-dimensional layout.",
            "The first token is counted by itself and left out of distances and delimiters, as models park on it.",
            "Delimiters are the spans of that role that the caller names; near and far tokens are ours.",
            "A head is broad by its highest weight, of which the paper speaks; the authors' figure takes an entropy "
            "above 3.8 nats, which goes by the length of their texts.",
            "Entropy of the weights as they are; the authors smooth them first. Their syntax probes are not here.",
        ),
    )
    local: PositiveInt = 15  # tokens to either side that are near
    offset: ProperShare = 0.5  # share at one distance that makes an offset head; the paper's "over half"
    broad: ProperShare = 0.1  # highest weight, on average, of a head that looks broadly; the paper's figure
    alike: ProperShare = 0.02  # nats of divergence up to which heads stand in one group

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE or call.cross

    @sums("received", "entropy", "peak", "first", "distance")
    def add_up(self, pattern: Summary, call: Call) -> Statistic | None:
        requested = (pattern.received, pattern.seen, pattern.entropy, pattern.peak, pattern.first, pattern.distance)
        parts = [x for x in requested if x is not None]
        if len(parts) < len(requested):
            return None
        received, seen, entropy, peak, first, distance = parts
        is_text = call.is_text.expand(len(first), 1, -1)
        entropy, peak, first = (x.where(is_text, 0.0) for x in (entropy, peak, first))
        away = torch.arange(distance.shape[-1], device=first.device) + pattern.nearest
        # the first token stands as far from a query as that query's position
        slots = (call.pairs.q[..., 0].expand_as(first) - pattern.nearest).clamp(0, len(away) - 1)
        rest = distance.scatter_add(-1, slots, -first).sum(0)  # [h m]
        far = away.abs() > self.local
        picks = torch.stack([away == 0, away == 1, away == -1, ~far & (away != 0), far], -1).to(rest.dtype)
        marked = torch.zeros_like(call.k_pos, dtype=torch.bool)
        if "delimiters" in call.roles:
            marked = call.marked("delimiters") & (call.k_pos > 0)
        marked = spread_heads(marked, received.shape[1])
        bins = torch.bucketize(away.abs(), torch.tensor(EDGES, device=away.device), right=True) - 1
        shares = rest.new_zeros(len(rest), 2 * BINS).index_add_(-1, bins + BINS * (away < 0), rest)
        plain = torch.stack([x.sum((0, 2)) for x in (entropy, peak, first)], -1)
        held = torch.stack([(x * marked).sum((0, 2)) for x in (received, seen)], -1)
        total = torch.cat([plain, rest @ picks, held, shares], -1)
        count = torch.full_like(total, float(is_text.sum()))
        roles = float("delimiters" in call.roles)
        count[:, PARTS.index("delimiters")] *= roles
        count[:, PARTS.index("fair")] = seen.sum((0, 2)) * roles
        return Mean.of(total, count)

    def answer(self, readings: Readings) -> Profile:
        found = {layer: stat.value for layer, stat in readings.items()}
        parts = {name: {n: x[:, i] for n, x in found.items()} for i, name in enumerate(PARTS)}
        # what is left of a distance when the first token is taken out may lie below zero by a rounding
        shares = {n: x[:, len(PARTS) :].clamp(min=0).unflatten(-1, (2, BINS)) for n, x in found.items()}
        return Profile(parts, {n: x.transpose(0, 1) for n, x in shares.items()})

    def describe(self, answer: Profile) -> Description:
        layers = list(answer.distances)
        shown = {
            "entropy": ("Entropy", "How widely each head looks; e to this power is about how many tokens it looks at."),
            "previous": ("Previous token", "The share of its attention that each head gives to the token before."),
            "near": ("Near tokens", f"The share that goes to the {self.local} tokens to either side, less the first."),
            "far": ("Far tokens", f"The share that goes further than {self.local} tokens, less the first token's."),
            "delimiters": ("Delimiters", "The share that goes to punctuation and special tokens, less the first."),
        }
        maps = [
            HeadMap(key, title, what, layers, answer.map(key), "nats") if key == "entropy"
            else HeadMap(key, title, what, layers, answer.map(key), low=0, high=1)
            for key, (title, what) in shown.items() if not answer.map(key).isnan().all()
        ]  # fmt: skip
        offsets = answer.offsets(self.offset)
        steady = Listing(
            "offsets", "Heads that look at one fixed distance",
            f"Heads that give more than {percent(self.offset)} of their attention to tokens at one distance.",
            ("head", "looks at", "share"),
            [(head_name(*head), _words(at), percent(share)) for head, (at, share) in offsets.items()],
        )  # fmt: skip
        alike = Listing(
            "groups", "Heads that look alike",
            "Heads that share their attention out over distances in about the same way; shares are those of the "
            "group's middle head.",
            ("heads", "such as", "first token", "near", "far"),
            [
                (len(group), ", ".join(head_name(*head) for head in group[:5]),
                 *(percent(float(answer.parts[part][group[0][0]][group[0][1]])) for part in ("first", "near", "far")))
                for group in answer.groups(self.alike)[:8] if len(group) > 1
            ],
        )  # fmt: skip
        roles: dict[int, dict[Head, float]] = {}
        for head, (at, share) in offsets.items():
            roles.setdefault(at, {})[head] = share
        steadily = f"Gives more than {percent(self.offset)} of its attention to"
        peaks = {(n, h): x for n, row in answer.parts["peak"].items() for h, x in enumerate(row.tolist())}
        broad = dict(sorted((item for item in peaks.items() if item[1] < self.broad), key=lambda item: item[1]))
        mild = f"Gives no token more than {percent(self.broad)} of its attention, on average; weakest peaks first."
        return Description(
            (*maps, _curves(answer), steady, alike),
            (
                *(Role(_role(at), f"{steadily} {_words(at)}.", heads) for at, heads in roles.items()),
                Role("broad attention", mild, broad),
            ),
            tuple(self._findings(answer, {at: len(heads) for at, heads in roles.items()}, len(broad) / len(peaks))),
        )

    def _findings(self, answer: Profile, steady: dict[int, int], broad: float) -> Iterator[Finding]:
        first, self_, near, far = (percent(answer.mean(part)) for part in ("first", "self", "near", "far"))
        text = (
            f"Of all attention {first} goes to the first token, {self_} from a token to itself, {near} to others at "
            f"most {self.local} tokens away and {far} further."
        )
        yield Finding(text, 0.7, ("SinkWindow",), "distances")
        tokens = answer.map("entropy").nanmean(1).exp().round()
        wide, narrow = (int(x) for x in (tokens.argmax(), tokens.argmin()))
        layers = list(answer.distances)
        text = (
            f"A head of layer {layers[wide]} looks at about {counted(int(tokens[wide]), 'token')} at once, "
            f"one of layer {layers[narrow]} at about {int(tokens[narrow]):,}"
        )
        if broad:
            text += f"; {percent(broad)} of heads give no token more than {percent(self.broad)}"
        ratio = float(tokens[wide] / tokens[narrow].clamp(min=1))
        yield Finding(f"{text}.", 0.1 + 0.3 * (1 - 1 / ratio), ("TempScale",), "entropy")
        if steady:
            most_first = sorted(steady.items(), key=lambda item: -item[1])
            counts = ", ".join(f"{n} to {_words(at)}" for at, n in most_first)
            share = sum(steady.values()) / answer.map("peak").isfinite().sum().item()
            text = f"In what was read some heads give more than {percent(self.offset)} to one fixed distance: {counts}."
            yield Finding(text, min(0.6, 0.3 + 3 * share), shows="previous")
        if not answer.map("delimiters").isnan().all():
            share, fair = answer.mean("delimiters"), answer.mean("fair")
            text = (
                f"Punctuation and special tokens get {percent(share)} of the attention, an even spread {percent(fair)}."
            )
            yield Finding(text, 0.05 + 0.6 * abs(share - fair) / max(share, fair, 1e-9), shows="delimiters")


def _words(offset: int) -> str:
    """What a head looks at that looks so far back, or ahead below zero."""
    if abs(offset) < 2:
        return {0: "the token itself", 1: "the previous token", -1: "the next token"}[offset]
    return f"the token {abs(offset)} {'back' if offset > 0 else 'ahead'}"


def _role(offset: int) -> str:
    """What a head is called that looks there."""
    if abs(offset) < 2:
        return {0: "current-token head", 1: "previous-token head", -1: "next-token head"}[offset]
    return f"head at {_words(offset).removeprefix('the token ')}"


def _curves(answer: Profile) -> Curves:
    """Attention per token by distance, on both sides together, in the lower, middle and upper third of the layers."""
    edges = torch.tensor(EDGES[1:], dtype=torch.float64)
    heads = pad_sequence([x.sum(0)[:, 1:] for x in answer.distances.values()], True, float("nan"))  # [layers h m]
    reached = int(heads.nansum((0, 1)).nonzero().max()) + 1 if heads.nansum() else 1
    per_token = (heads / edges.diff(append=2 * edges[-1:]))[..., :reached]
    names = list(answer.distances)
    lines, bands = {}, {}
    for part in torch.arange(len(names)).tensor_split(min(3, len(names))):
        name, mine = layers_from(names[part[0]], names[part[-1]]), per_token[part]
        lines[name] = mine.nanmean(1).mean(0)
        low, high = mine.flatten(0, 1).nanquantile(torch.tensor([0.25, 0.75], dtype=mine.dtype), 0)
        bands[name] = low, high
    what = (
        "The share of its attention that a token gives to one other at each distance, averaged over heads; the first "
        "token is left out."
    )
    x = edges[:reached].tolist()
    label = "share of attention"
    return Curves(
        "distances", "Attention by distance", what, x, lines, "tokens away", label, log_x=True, log_y=True,
        bands=bands, band="the middle half of the heads",
    )  # fmt: skip


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 5, return_tensors="pt")
    with attach(model, AttentionProfile()) as run:
        run(**text)
        print(run[AttentionProfile()])
