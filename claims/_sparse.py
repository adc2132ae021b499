"""SmolLM2's own attention calls on a text of its length, and what it costs to compute some of their blocks alone."""

from __future__ import annotations

import statistics
from dataclasses import field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from claims._texts import apart, passages
from heedful import attach, models
from heedful.core.call import Call
from heedful.core.mask import Mask
from heedful.core.method import Method, Part
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.kit.blocks import BlockSparse, Grid, density
from heedful.kit.stripes import StripeSparse

language_model = cache(models.default)


def text(seed: int, tokens: int) -> dict[str, Any]:
    words = " ".join(passages(seed, 12, 120))
    return {"input_ids": language_model().tokenizer(words[: 8 * tokens], return_tensors="pt").input_ids[:, :tokens]}


def own_text(seed: int, tokens: int, fitting: bool = False) -> dict[str, Any]:
    """A stretch of one help text that no other seed reads."""
    (words,) = apart(seed, 1, tokens, fitting)
    return {"input_ids": language_model().tokenizer(words, return_tensors="pt").input_ids[:, :tokens]}


class Calls(Method):
    """Keeps the calls of one forward."""

    paper = Paper("none", "a probe of the claims", "none", 2026)
    seen: list[Call] = field(default_factory=list, repr=False, compare=False)

    @reads(Site.MASK)
    def keep(self, mask: Mask, call: Call) -> None:
        self.seen.append(replace(call, mask=mask))


@torch.no_grad()
def loss(inputs: dict[str, Any], what: Part | None) -> float:
    """Cross-entropy in nats a token."""
    model = language_model().model
    if what is None:
        logits = model(**inputs, use_cache=False).logits
    else:
        with attach(model, what) as run:
            logits = run(**inputs, use_cache=False).logits
    return float(cross_entropy(logits[0, :-1].float(), inputs["input_ids"][0, 1:]))


def calls(inputs: dict[str, Any]) -> tuple[list[Call], float]:
    """The calls of all layers, and the loss on the way."""
    probe = Calls()
    found = loss(inputs, probe)
    return probe.seen, found


def chosen(method: BlockSparse, call: Call) -> tuple[Grid, Tensor]:
    """The grid of a call and the blocks of each head `[1 h n m]` that a method computes."""
    grid = Grid.of(call, method.block)
    if grid is None:
        raise ValueError(f"layer {call.layer}: the mask is not made of stretches")
    table = method.choose(grid)
    table = grid.open if table is None else (table | grid.band(1)) & grid.open
    return grid, table.expand(-1, call.heads, -1, -1)


def heads(grid: Grid, table: Tensor | None) -> Tensor:
    """What the heads give if these blocks alone are computed; all of them where None."""
    call, (q, k) = grid.call, (len(grid.call.queries), len(grid.call.keys))
    kept = call.mask.keeps(call.tile(slice(0, q), slice(0, k)).pairs)
    if table is not None and kept is not None:
        blocks = table.repeat_interleave(grid.size, -2).repeat_interleave(grid.size, -1)
        kept = kept & blocks[..., :q, :k]
    return scaled_dot_product_attention(
        call.query, call.spread(call.key), call.spread(call.value), attn_mask=kept, scale=call.scale
    )


def error(found: Tensor, wanted: Tensor) -> float:
    """The relative L1 distance."""
    return float((found - wanted).abs().sum() / wanted.abs().sum())


def share(grid: Grid, table: Tensor) -> float:
    return float(density(table, grid.open).mean())


def at_random(grid: Grid, table: Tensor, seed: int) -> Tensor:
    """As many blocks in every row as the table has, the first and the own among them, the others drawn."""
    drawn = torch.rand(table.shape, generator=torch.Generator().manual_seed(seed))
    drawn = drawn.masked_fill(~grid.open, -1.0) + 2 * grid.band(1)
    drawn[..., 0] += 1.5
    place = drawn.argsort(dim=-1, descending=True).argsort(dim=-1)
    return (place < table.sum(-1, keepdim=True)) & grid.open


def sinks_and_window(grid: Grid, table: Tensor) -> Tensor:
    """For each head the first block and the narrowest window with as many blocks as the table, or more."""
    out = torch.zeros_like(table)
    for h in range(table.shape[1]):
        for width in range(table.shape[-1]):
            out[:, h] = (grid.band(1 + width * grid.size) & grid.open)[:, 0]
            out[:, h, :, 0] = True
            if int(out[:, h].sum()) >= int(table[:, h].sum()):
                break
    return out & grid.open


def over_fixed(method: BlockSparse, seed: int, tokens: int) -> tuple[float, dict[str, float]]:
    """How much less a method's heads err than with sinks and a window, as many blocks a head; the bar for all alike."""
    inputs = own_text(seed, tokens)
    found, dense_loss = calls(inputs)
    rows: list[dict[str, float]] = []
    for call in found:
        grid, table = chosen(method, call)
        dense = heads(grid, None)
        others = {"error": table, "sinks_and_window": sinks_and_window(grid, table)}
        others["random_blocks"] = at_random(grid, table, seed)
        rows.append({name: error(heads(grid, each), dense) for name, each in others.items()})
        rows[-1] |= {
            "density": share(grid, table),
            "density, sinks and window": share(grid, others["sinks_and_window"]),
        }
    numbers = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    numbers |= {"loss_dense": dense_loss, "loss": loss(inputs, method)}
    return numbers["sinks_and_window"] - numbers["error"], numbers


def pairs(method: StripeSparse, call: Call) -> Tensor:
    """Which pairs `[1 h q k]` of a call a method that chooses single keys computes."""
    every = call.tile(slice(0, len(call.queries)), slice(0, len(call.keys))).pairs
    kept = method.narrow(call.mask, call).keeps(every)
    if kept is None:
        raise ValueError(f"layer {call.layer}: the mask keeps everything")
    return kept.expand(1, call.heads, -1, -1)


def weights(call: Call) -> Tensor:
    """The true weights of a call, `[1 h q k]`."""
    every = call.tile(slice(0, len(call.queries)), slice(0, len(call.keys))).pairs
    kept = call.mask.keeps(every)
    scores = call.capped(call.query @ call.spread(call.key).mT * call.scale)
    return (scores if kept is None else scores.masked_fill(~kept, -torch.inf)).softmax(-1)
