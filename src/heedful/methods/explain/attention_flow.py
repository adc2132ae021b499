"""F_ij = the maximum flow from i in the last layer to input j, where layer l carries 0.5 W_l + 0.5 I; rows sum to 1."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.errors import FieldError
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Statistic
from heedful.methods.explain._layer_by_layer import LayerByLayer

NOTHING = 1e-12  # excess and capacities are at most a few; what is below this came from rounding
ROOM = 1 << 20  # numbers in the networks that are solved side by side: what a cache can hold


class AttentionFlow(LayerByLayer):
    """How much could flow from each position after the last layer to each input token, `[b n n]` for every forward.

    Rows stand as the tokens were fed, those of padding and those not asked for being zero; columns are text positions.
    It is for short texts: every pair of a row and a column is a network through all layers. On one core a row of 32
    tokens takes a quarter of a second through 6 layers, and one of 64 tokens half a minute through 30.
    """

    paper = Paper(
        "P098",
        "Quantifying Attention Flow in Transformers",
        "Samira Abnar, Willem Zuidema",
        2020,
        "2005.00928",
        "ACL 2020",
        differs=(
            "Maximum flows are found by pushing and relabelling in all networks at once, where the authors call "
            "Edmonds and Karp's algorithm for each pair; both are exact.",
            "The flows of a row are divided by their sum, as the authors' code does and their text does not say.",
            "Decoding steps are left out: flow needs all rows at once, and a step has one.",
            "It runs in causal models too, which the paper does not study.",
        ),
    )
    one_text = True
    rows: tuple[int, ...] | None = None  # text positions to start from, -1 being the last; None: all

    @classmethod
    def example(cls) -> AttentionFlow:
        return cls(rows=(-1,))

    def __post_init__(self) -> None:
        if self.rows is not None and (not self.rows or len(set(self.rows)) < len(self.rows)):
            raise FieldError(self, "rows", self.rows, "must be one or more unlike positions", (-1,))

    @reads(Site.PATTERN)
    def collect(self, weights: Tensor, call: Call) -> Statistic | None:
        self.require_whole(call)
        mean = weights.detach().double().mean(1)  # [b r k]
        if (below := self.below(call)) is not None:
            self.of_tile(below, mean, call)
            call.state.forward.setdefault("maps", {})[call.below] = below
        n = len(call.keys) if call.key is None else call.key.shape[2]
        whole = call.by_key(mean, n)
        own = call.queries.index[:, 0, :, None] == torch.arange(n, device=mean.device)
        mixed = (whole + own) / (whole.sum(-1, keepdim=True) + 1)
        self.keep(mixed, call)
        return Cat.of(f"{call.rows.start:09d}", mixed) if call.last_layer else None

    def finish(self, statistic: Statistic, call: Call) -> Statistic:
        below = call.state.forward.get("maps", {}).values()
        maps = torch.stack([*below, torch.cat(statistic.value, 1)], 1)  # [b l n n]
        if maps.shape[2] != maps.shape[3]:
            rule = f"{call.name} sees keys that are not this forward's tokens; use the usual cache, or none"
            raise FieldError(self, "layers", call.layer, rule, "model(input_ids, use_cache=False)")
        out = maps.new_zeros(len(maps), *maps.shape[2:])
        is_text = call.is_text[:, 0].expand(len(maps), -1)
        for text, layers, into in zip(is_text, maps, out, strict=True):
            if not len(at := text.nonzero()[:, 0]):  # all of it is padding
                continue
            into[at, : len(at)] = self._flows(layers[:, at][:, :, at])
        return Cat.of(f"{call.forward:06d}", out)

    def _flows(self, layers: Tensor) -> Tensor:
        """Of one text without padding: `[l n n]` to `[n n]`, each row divided by its sum."""
        n = layers.shape[-1]
        requested = range(n) if self.rows is None else sorted({r % n for r in self.rows if -n <= r < n})
        starts = torch.tensor([r for r in requested for _ in range(n)], device=layers.device)
        ends = torch.arange(n, device=layers.device).repeat(len(requested))
        step = max(1, ROOM // layers.numel())
        found = [maximum_flow(layers, a, b) for a, b in zip(starts.split(step), ends.split(step), strict=True)]
        flows = torch.cat(found).view(-1, n)
        out = flows.new_zeros(n, n)
        out[list(requested)] = flows / flows.sum(-1, keepdim=True)
        return out

    def answer(self, readings: Readings) -> list[Tensor]:
        """One `[b n n]` for each forward, in their order."""
        return [x for stat in readings.values() for x in stat.value]


def maximum_flow(layers: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """The maximum flow `[p]` from each of `starts` above the last layer to its one of `ends` below the first.

    `layers [l n n]` holds the capacities from each layer's upper nodes to its lower ones. Excess is pushed along
    shortest ways to the end; it stays where there is no way left.
    """
    depth, n, _ = layers.shape
    pairs = torch.arange(len(starts), device=layers.device)
    down = layers[:, None].repeat(1, len(pairs), 1, 1)  # what may still go down, [l p upper lower]
    back = torch.zeros_like(down).mT  # what may be taken back, [l p lower upper]
    excess = layers.new_zeros(depth + 1, len(pairs), n)
    excess[depth, pairs, starts] = layers[-1, starts].sum(-1)
    while True:
        away = _distances(down, back, ends)
        active = (excess > NOTHING) & away.isfinite()
        active[0, pairs, ends] = False
        if not bool(active.any()):
            return excess[0, pairs, ends]
        for i in reversed(range(depth)):
            _push(down[i], back[i].mT, excess[i + 1], excess[i], away[i + 1], away[i])
        for i in range(depth):
            _push(back[i], down[i].mT, excess[i], excess[i + 1], away[i], away[i + 1])


def _distances(down: Tensor, back: Tensor, ends: Tensor) -> Tensor:
    """How many edges each node is away from its network's end, `[l+1 p n]`; infinite where there is no way."""
    depth, pairs, n, _ = down.shape
    away = down.new_full((depth + 1, pairs, n), float("inf"))
    away[0, torch.arange(pairs, device=down.device), ends] = 0
    while True:
        before = away.clone()
        for i in range(depth):
            away[i + 1] = torch.minimum(away[i + 1], _nearest(down[i], away[i]))
        for i in reversed(range(depth)):
            away[i] = torch.minimum(away[i], _nearest(back[i], away[i + 1]))
        if torch.equal(away, before):
            return away


def _nearest(room: Tensor, away: Tensor) -> Tensor:
    return torch.where(room > NOTHING, away[:, None], float("inf")).amin(-1) + 1


def _push(room: Tensor, reverse: Tensor, have: Tensor, get: Tensor, here: Tensor, there: Tensor) -> None:
    """Move excess from nodes to those one step nearer to the end, in place; `room` and `reverse` are `[p from to]`."""
    nearer = (room > NOTHING) & (here[..., None] == there[:, None] + 1)
    open_to = room * nearer
    moved = (have[..., None] - (open_to.cumsum(-1) - open_to)).clamp(min=0).minimum(open_to)
    have -= moved.sum(-1)
    get += moved.sum(-2)
    room -= moved
    reverse += moved


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.encoder()
    text = tokenizer("The keys to the cabinet are on the table", return_tensors="pt")
    with attach(model, AttentionFlow(rows=(0,))) as run:
        run(**text)
        shares = run[AttentionFlow(rows=(0,))][0][0, 0]
    for token, share in zip(tokenizer.convert_ids_to_tokens(text.input_ids[0]), shares, strict=True):
        print(f"{share:6.1%}  {token}")
