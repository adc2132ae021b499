"""softmax of (mean Q) . W [max K, min K, mean K], block by block: a gate that learned from maps which blocks matter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.core.call import Call, Phase
from heedful.core.entry import FitContext
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.mask import Mask
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveFloat, PositiveInt, PositiveShare, Share
from heedful.core.sites import Site, reads
from heedful.kit.batches import at_least_one
from heedful.kit.blocks import BlockSparse, Grid, fold, means
from heedful.kit.rotary import turned_back
from heedful.kit.seeds import seed_of

WARM_UP = 20  # steps of a fit in which the learning rate rises


@dataclass(frozen=True, eq=False)
class Pooled:
    """What a gate sees of a call, and what it is to say there."""

    query: Tensor  # [b h n d], block means, turned as their first tokens are
    key: Tensor  # [b h n 3d], highest, lowest and mean of each block
    open: Tensor  # [b|1 h|1 n n]
    rotate: Callable[[Tensor], Tensor]  # turns a number of blocks [b h n d] as their first tokens are

    @staticmethod
    def of(grid: Grid) -> Pooled:
        call, top = grid.call, None if grid.first is None else grid.first[:, 0]
        turned = call.rotate  # a fit keeps what is made here, and need not keep the whole call
        tokens = len(call.queries)
        # a cache of fixed size has room behind the text, which nobody sees
        query, key = (fold(turned_back(call, _wide(x)[:, :, :tokens]), grid.size, top) for x in (call.query, call.key))
        top = torch.zeros(1, dtype=torch.long, device=query.device) if top is None else top
        begin = (top[:, None] + grid.size * torch.arange(query.shape[2], device=top.device)).clamp(max=tokens - 1)
        block = ((torch.arange(tokens, device=top.device) - top[:, None]) // grid.size).clamp(min=0)

        def rotate(blocks: Tensor) -> Tensor:
            if turned is None:
                return blocks
            b, h, _, d = blocks.shape
            of_token, of_block = (x[:, None, :, None].expand(b, h, -1, d) for x in (block, begin))
            return turned(blocks.gather(2, of_token)).gather(2, of_block)

        is_text = grid.rows[..., None]
        empty = ~is_text.any(-2)
        high, low = (key.masked_fill(~is_text, -sign * torch.inf).mul(sign).amax(-2).mul(sign) for sign in (1, -1))
        pools = torch.cat([high.masked_fill(empty, 0), low.masked_fill(empty, 0), means(key, grid.rows)], -1)
        return Pooled(rotate(means(query, grid.rows)), call.spread(pools), grid.open[..., : key.shape[2]], rotate)

    def scores(self, weight: Tensor) -> Tensor:
        """What a gate `[h 3d d]` says of each pair of blocks, `[b h n n]`."""
        key = self.rotate(self.key @ weight)
        return self.query @ key.mT * weight.shape[-1] ** -0.5


def _wide(x: Tensor | None) -> Tensor:
    if x is None:
        raise FieldError("Grid", "call", None, "has no queries and keys before MASK", None)
    x = x.detach()
    return x if x.dtype == torch.float64 else x.float()


def highest(grid: Grid) -> Tensor:
    """The highest true weight of each pair of blocks, and each row of blocks adding up to 1, `[b h n n]`."""
    n, m = grid.open.shape[-2:]
    out = grid.query.new_zeros(*grid.query.shape[:2], n, m)
    for weights, rows in grid.weights(torch.arange(n * grid.size, device=out.device)[None]):
        block = (rows[0] // grid.size)[:, None].expand(*weights.shape[:3], weights.shape[3])
        out[..., : weights.shape[3]].scatter_reduce_(2, block, weights.amax(-1), "amax")
    return out / out.sum(-1, keepdim=True).clamp(min=torch.finfo(out.dtype).tiny)


class SeerAttention(BlockSparse):
    """Computes the blocks that a small gate in each head holds for important. Fit it first, on texts of some blocks."""

    paper = Paper(
        "P167",
        "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
        "Yizhao Gao, Zhichen Zeng, Dayou Du, Shijie Cao, Hayden Kwok-Hay So, Ting Cao, Fan Yang, Mao Yang",
        2024,
        "2410.13276",
        "NeurIPS 2025",
        differs=(
            "As the authors' code has it, with its defaults; the paper's sections could not be read.",
            "Gates begin as Xavier has it, which stands in the authors' code but switched off: theirs begin as the "
            "model's own weights do, normal with its initializer_range.",
            "A prompt is read in one call; the later pieces of one that is read in several see everything.",
            "A gate learns layer by layer from one text a step, the texts in turn; the authors take 16 texts of 65536 "
            "tokens a step, and clip the gradient of all layers together. Their rate falls once it has risen; here it "
            "falls from the first step on.",
            "The block of a query's own key is always computed.",
            "A text of which more than `most` (90 %) of the blocks would be computed stays dense, being faster so.",
        ),
    )
    one_text = True
    threshold: Share = 5e-4  # what a gate must give a block; the authors: 5e-4 to 5e-3
    share: PositiveShare | None = None  # of the pairs of blocks, each row's highest, in place of a threshold
    last: NonNegativeInt = 2  # rows of blocks at a text's end that see everything; the authors' code: 2
    gates: Fitted | None = None  # "gates.LAYER" [h 3d d]
    seed: int | None = None  # of where a fit begins, 0 unless given; without a fit: gates that learned nothing
    steps: PositiveInt = 500  # of a fit; the authors: 500
    rate: PositiveFloat = 1e-3  # AdamW's highest learning rate in a fit; the authors: 1e-3
    weight: PositiveFloat = 10.0  # of the divergence in a fit's loss; the authors: 10

    @classmethod
    def neutral(cls) -> SeerAttention:
        return cls(most=0.0)

    @classmethod
    def example(cls) -> SeerAttention:
        return cls(share=0.3, last=0, seed=0, block=4, most=1.0)

    def idle(self, call: Call) -> bool:
        return super().idle(call) or bool(call.queries.first)

    def choose(self, grid: Grid) -> Tensor:
        pooled = Pooled.of(grid)
        scores = pooled.scores(self.gate(grid.call, pooled).to(pooled.key))
        scores = scores.masked_fill(~pooled.open, torch.finfo(scores.dtype).min)
        if self.share is None:
            table = scores.softmax(-1) > self.threshold
        else:
            blocks = grid.rows.any(-1).sum(-1, keepdim=True)  # [b|1 1 1], of each text
            # so many of each row are that share of the pairs on and below the diagonal
            most = (blocks * (1 - math.sqrt(1 - self.share))).long().clamp(min=1)[..., None]
            table = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < most
        number = torch.arange(table.shape[-2], device=table.device)
        end = number >= grid.rows.any(-1).sum(-1, keepdim=True) - self.last
        return pad(table | end[..., None], (0, grid.open.shape[-1] - table.shape[-1]))

    def gate(self, call: Call, pooled: Pooled) -> Tensor:
        """The layer's gate, `[h 3d d]`."""
        shape = (call.heads, pooled.key.shape[-1], pooled.query.shape[-1])
        if self.gates is None:
            seed_of(self, "gates")
            return self._start(call.layer, shape)
        found = self.gates.get(f"gates.{call.layer}")
        if found is None or found.shape != shape or len(self.gates) != call.depth:
            rule = f"was fitted to another model; this one has {call.depth} layers, and {list(shape)} is wanted of each"
            raise FieldError(self, "gates", self.gates, rule, "heedful.fit(SeerAttention(), model, ...)")
        return found

    def _start(self, layer: int, shape: tuple[int, ...]) -> Tensor:
        draw = torch.Generator().manual_seed(4099 * (self.seed or 0) + layer)
        return torch.nn.init.xavier_uniform_(torch.empty(shape), generator=draw)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> SeerAttention:
        """Teach each layer's gate what the highest weight of each pair of blocks is, by their divergence."""
        reader = _Maps(self.block)
        with torch.no_grad(), context.attach(reader) as run:
            for inputs in at_least_one(self, batches):
                run(**inputs)
        return replace(self, gates=Fitted({f"gates.{n}": self._taught(n, seen) for n, seen in reader.seen.items()}))

    def _taught(self, layer: int, seen: list[tuple[Pooled, Tensor]]) -> Tensor:
        (first, _), *_ = seen
        start = self._start(layer, (first.key.shape[1], first.key.shape[-1], first.query.shape[-1]))
        gate = start.to(first.key.device).requires_grad_()
        optimiser = torch.optim.AdamW([gate], lr=self.rate, weight_decay=0.0)
        for step in range(self.steps):
            rise, fall = (step + 1) / WARM_UP, (1 + math.cos(math.pi * step / self.steps)) / 2
            optimiser.param_groups[0]["lr"] = self.rate * min(1.0, rise) * fall
            pooled, wanted = seen[step % len(seen)]
            self.divergence(pooled.scores(gate), wanted, pooled.open).backward()
            optimiser.step()
            optimiser.zero_grad()
        return gate.detach()

    def divergence(self, scores: Tensor, wanted: Tensor, opened: Tensor) -> Tensor:
        """The fit's loss: of all pairs of blocks, without the first quarter of the rows."""
        found = scores.masked_fill(~opened, -torch.inf).log_softmax(-1).masked_fill(~opened, 0.0)
        apart = torch.xlogy(wanted, wanted) - wanted * found
        return self.weight * apart[:, :, apart.shape[2] // 4 :].mean()


class _Maps(Method):
    """Keeps what each layer's gate sees of each text, and the map that it is to tell."""

    size: int
    seen: dict[int, list[tuple[Pooled, Tensor]]] = field(default_factory=dict, repr=False, compare=False)

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE or call.cross

    @reads(Site.MASK)
    def look(self, mask: Mask, call: Call) -> None:
        grid = Grid.of(replace(call, mask=mask), self.size)
        if grid is not None:
            self.seen.setdefault(call.layer, []).append((Pooled.of(grid), highest(grid)))


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    calm = tokenizer("The sea is calm. Rain falls on the hills. " * 60, return_tensors="pt")
    text = tokenizer("The sun rises in the east and sets in the west. " * 80, return_tensors="pt")
    with attach(model, fit(SeerAttention(5e-3, steps=100), model, [calm])) as run:
        print(run.difference(**text))
        print(run.activity())
