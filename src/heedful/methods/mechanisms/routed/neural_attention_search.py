"""softmax(s) over pairs with M_ij = G_j + S_j [i - j <= w] + L_j prod(1 - G_n, j < n < i), types G, L and S learned."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heedful.authoring import (
    CachedKV,
    Call,
    Layer,
    Mask,
    Method,
    NonNegativeFloat,
    Paper,
    PositiveInt,
    Site,
    SiteError,
)
from heedful.core.flags import at_least, both, either, numbers, same, traced
from heedful.core.positions import spread_heads
from heedful.core.sites import at, penalises, reads
from heedful.kit.budget import newest
from heedful.kit.chosen import Chosen
from heedful.kit.told import UNKNOWN, of_text

KEPT, LOCAL, PASSING = range(3)  # the authors' global, local and sliding window tokens
TYPES = "types"  # what is said of a token with the cache


class NeuralAttentionSearch(Method):
    """NAtS: a token is kept for good, until the next that is, or for a window, in each key head as its input says.

    For models trained with it: while they train types are drawn, and every pair of tokens has a gradient. At rest the
    likeliest type counts, and the cache drops what nobody will see again.
    """

    paper = Paper(
        "P077",
        "Neural Attention Search",
        "Difan Deng, Marius Lindauer",
        2025,
        "2502.13251",
        "NeurIPS 2025",
        differs=(
            "Of the paper's text the abstract and a summary could be read; formulas are those of the authors' code.",
            "The mask's gradient is the authors', softmax(s) over all keys times what a heads' gradient tells of each; "
            "that of the types is the product rule's, where their kernel gives a global token only what a local one "
            "would not have had, adds up one that is not there near the diagonal alone, and counts all tokens as "
            "local there.",
            "Types are drawn by a generator seeded by `seed`, the number of the run's forward and of the layer.",
            "The last token of a training text is not made global, which nobody could see.",
            "At rest the authors' code for training from scratch adds 0.1 to what tells for global, and that for "
            "fine-tuning does not, as here. Tokens that a cache took up without it are global.",
            "Where softmax has a learned sink, its share in training is what it has over all keys.",
        ),
    )
    window: PositiveInt = 16  # tokens after it that see one that is kept for a window; the authors: 16, fine-tuning 256
    sparsity: NonNegativeFloat = 5e-7  # of a token's loss by the share of the text that sees it; the authors: 0 to 5e-7
    seed: int = 0  # of the types drawn in training

    @classmethod
    def example(cls) -> NeuralAttentionSearch:
        return cls(window=2)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        weight = torch.rand(layer.kv_heads, 3, layer.width, generator=random) * 2 - 1
        return {"type": weight / math.sqrt(layer.width)}

    def idle(self, call: Call) -> bool:
        return call.cross

    @reads(Site.QUERY)
    def tell(self, query: Tensor, call: Call) -> None:
        """The types of the call's tokens go beside those of the tokens before them."""
        of_text(call, TYPES, self._types(call))

    @at(Site.MASK, training=False)
    def hide(self, mask: Mask, call: Call) -> Mask:
        types, places, total = _known(call.state.cache[TYPES].detach()), call.places, len(call.keys)
        return mask & Chosen(lambda rows: call.spread(self._seen(types, places.tile(rows, slice(0, total))).kept))

    @penalises(Site.MASK, when="sparsity")
    def shorten(self, mask: Mask, call: Call) -> Tensor:
        """How long tokens are seen, as shares of their text, for those kept for good and the local ones."""
        types, place, index = call.state.cache[TYPES][:, :, -len(call.queries) :], call.q_pos, call.queries.index
        length, lasting = _lengths(call), types * types.detach()
        beyond = int(index.max()) + len(call.queries)  # farther than any text's end
        next_kept = index.where(lasting[..., KEPT] > 0, beyond).flip(-1).cummin(-1).values.flip(-1)
        until = (next_kept - index).minimum(length - 1 - place)
        seen = lasting[..., KEPT] * (length - place) + lasting[..., LOCAL] * until
        return self.sparsity * (seen / length.clamp(min=1)).sum() * (call.heads // call.kv_heads)

    @at(Site.PATTERN, training=True)
    def share_out(self, pattern: Tensor, call: Call) -> Tensor:
        types = _known(call.state.cache[TYPES])
        seen = self._seen(types.detach(), call)
        total, weights = pattern.sum(-1, keepdim=True), pattern * call.spread(numbers(seen.kept, pattern))
        if types.requires_grad or traced(types):
            part = weights.detach().sum(-1, keepdim=True) / total.detach().where(total > 0, 1.0)
            # what is seen hardly at all would otherwise have a gradient without bound
            weights = _taught(weights, pattern * part, types, seen)
        left = weights.sum(-1, keepdim=True)
        return weights * (total / left.where(left > torch.finfo(left.dtype).tiny, 1.0))

    @at(Site.CACHE)
    def drop(self, entries: CachedKV, call: Call) -> Tensor:
        types = _known(call.state.cache[TYPES])
        so_far = types[..., KEPT].cumsum(-1)
        latest = so_far == so_far[..., -1:]
        stays = torch.stack([types[..., KEPT] > 0, (types[..., LOCAL] > 0) & latest, types[..., PASSING] > 0], -1)
        index = entries.positions.index.expand(*stays.shape[:2], -1)
        kept, local, passing = (stays[..., i].gather(-1, index) for i in (KEPT, LOCAL, PASSING))
        return entries.is_text & (kept | local | passing & newest(entries, call, self.window))

    def _types(self, call: Call) -> Tensor:
        """G, L and S of the call's tokens `[b g n 3]`: one is 1, and their gradient that of a softmax."""
        if call.hidden is None:
            raise SiteError(f"NeuralAttentionSearch, layer {call.layer}: the block is not handed hidden states to type")
        weight = call.params["type"]
        told = call.hidden.detach().flatten(1, -2).to(weight.dtype) @ weight.flatten(0, 1).mT
        told = told.to(torch.promote_types(told.dtype, torch.float32)).unflatten(-1, weight.shape[:2]).transpose(1, 2)
        if call.training:
            draw = torch.Generator().manual_seed(1_000_003 * self.seed + call.depth * call.forward + call.layer)
            told = told - torch.empty(told.shape, dtype=torch.float64).exponential_(generator=draw).log().to(told)
        soft = told.softmax(-1)
        types = _all(soft, soft.argmax(-1, keepdim=True)) + (soft - soft.detach())
        types = types.where((call.q_pos != 0)[..., None], _all(soft, KEPT))
        return types.where(call.is_text[..., None], _all(soft, PASSING))

    def _seen(self, types: Tensor, call: Call) -> _Seen:
        """M of a tile, from the text's types by index `[b g n 3]`."""
        rows, cols = (
            x.index.clamp(max=types.shape[2] - 1).expand(*types.shape[:2], -1) for x in (call.queries, call.keys)
        )
        so_far = types[..., KEPT].int().cumsum(-1, dtype=torch.int32)
        before = (so_far - types[..., KEPT].int()).gather(2, rows)[..., None]
        until = so_far.gather(2, cols)[:, :, None]
        later = at_least(rows.int()[..., None] - 1, cols.int()[:, :, None])
        none, one = both(same(before, until), later), both(same(before - 1, until), later)
        place = call.q_pos[..., None] - self.window
        near = at_least(call.k_pos[..., None, :].int(), place.int()).expand_as(later)
        kept, local, passing = (types[..., i].gather(2, cols)[:, :, None] > 0 for i in (KEPT, LOCAL, PASSING))
        alive = either(none, ~later)
        seen = either(either(kept, both(local, alive)), both(passing, near))
        return _Seen(rows, cols, seen, alive, near, none, one)


class _Seen(NamedTuple):
    """What a tile's queries see, and what its gradient goes by, `[b g r k]`."""

    rows: Tensor  # of the text, `[b g r]`
    cols: Tensor  # `[b g k]`
    kept: Tensor  # M, all in all
    alive: Tensor  # no token between is kept for good, nor is there one at all beside the diagonal
    near: Tensor  # within the window
    none: Tensor  # tokens between, of which none is kept for good
    one: Tensor  # or just one


def _taught(weights: Tensor, slope: Tensor, types: Tensor, seen: _Seen) -> Tensor:
    """Weights as they are, by whose gradient times `slope` types are told."""
    kept = types[..., KEPT]
    # the product's gradient is that of every token between while none is kept for good, then of the one that is
    own = torch.stack([kept, kept * kept.detach()], -1)
    so_far = own.cumsum(-2)
    rows, cols = (x[..., None].expand(-1, -1, -1, 2) for x in (seen.rows, seen.cols))
    here = types.gather(2, seen.cols[..., None].expand(-1, -1, -1, 3))
    before, until, flags = (so_far - own).gather(2, rows), so_far.gather(2, cols), seen[3:]
    if traced(weights, slope, types):
        told = _told(here, before, until, *flags)
        return weights + slope * spread_heads(told - told.detach(), slope.shape[1]).to(slope.dtype)
    found: Tensor = _Taught.apply(weights, slope, here, before, until, *flags)
    return found


def _told(types: Tensor, before: Tensor, until: Tensor, *flags: Tensor) -> Tensor:
    """M = G_j + L_j alive + S_j near `[b g r k]`, or what has its derivatives: what is kept between ends what lives."""
    kept, local, passing = types[:, :, None].unbind(-1)
    fall = before[:, :, :, None] - until[:, :, None]
    alive, near, none, one = (numbers(x, types) for x in flags)
    return kept + local * alive + passing * near - local.detach() * (fall[..., 0] * none + fall[..., 1] * one)


class _Taught(torch.autograd.Function):
    """The way back from weights to what `_told` is made of, which holds no more maps than its flags."""

    @staticmethod
    def forward(weights: Tensor, *_: Tensor) -> Tensor:
        return weights.view_as(weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, slope, types, _, _, *flags = inputs
        ctx.save_for_backward(slope, types, *flags)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        slope, types, alive, near, none, one = ctx.saved_tensors
        told = (given * slope).unflatten(1, (types.shape[1], -1)).sum(2)  # heads share their keys' types
        of_alive, of_near, of_none, of_one = (told * numbers(x, told) for x in (alive, near, none, one))
        to_types = torch.stack([x.sum(-2) for x in (told, of_alive, of_near)], -1)
        local = types[..., LOCAL].detach().to(told.dtype)
        to_before = torch.cat([x @ local[..., None] for x in (of_none, of_one)], -1)
        to_until = torch.stack([x.sum(-2) * local for x in (of_none, of_one)], -1)
        return (
            given,
            None,
            to_types.to(types.dtype),
            (-to_before).to(types.dtype),
            to_until.to(types.dtype),
            *[None] * 4,
        )


def _all(like: Tensor, kind: int | Tensor) -> Tensor:
    """All of one type, or each of its own `[... 1]`."""
    return torch.zeros_like(like).scatter(-1, torch.as_tensor(kind).to(like.device).expand(*like.shape[:-1], 1), 1.0)


def _lengths(call: Call) -> Tensor:
    """How many tokens the text of each query has so far `[b|1 g|1 n]`; a row may hold several."""
    place = call.q_pos
    last = torch.where(call.is_text, place, -1)
    text = (place.diff(dim=-1, prepend=place[..., :1]) < 0).cumsum(-1).expand(last.shape)
    return torch.full_like(last, -1).scatter_reduce(-1, text, last, "amax").gather(-1, text) + 1


def _known(types: Tensor) -> Tensor:
    """With those that nobody typed kept for good."""
    return types.where(types != UNKNOWN, _all(types, KEPT))


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama").train()
    inputs = models.tiny_inputs(model)
    with attach(model, NeuralAttentionSearch(4)) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
        model.eval()
        run.generate(**inputs, max_new_tokens=8)
        print(run.activity())
