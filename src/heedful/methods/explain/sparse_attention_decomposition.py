"""q.k = sum_m s_m (x_i.u_m)(v_m.x_j), with U S V' = W_Q' W_K: how few of these slices carry the scores that fire."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError
from heedful.core.figures import Description, HeadMap
from heedful.core.fitted import Fitted
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveShare
from heedful.core.sites import Site, reads
from heedful.core.stats import Mean, Statistic
from heedful.kit.seeds import drawn_for
from heedful.methods.explain._layer_by_layer import LayerByLayer


class SparseAttentionDecomposition(LayerByLayer):
    """For each head, the mean number of orthogonal slices, largest first, that reach the score of a pair that fires.

    It needs the projections: `heedful.fit(SparseAttentionDecomposition(), model, ())`. With a `seed` alone slices lie
    along random axes of the head instead, the control. One singular value decomposition for each pair that fires.
    """

    paper = Paper(
        "P173",
        "Sparse Attention Decomposition Applied to Circuit Tracing",
        "Gabriel Franco, Mark Crovella",
        2024,
        "2410.00340",
        differs=(
            "With rotary embedding, which the paper's GPT-2 has not, what lies between two tokens is W_Q' R W_K with "
            "the rotation R of their distance, and that is decomposed, pair by pair.",
            "Where a model normalises queries and keys, the product is still the score but no longer linear in x.",
            "How far the slices point at earlier heads (the paper's trace) is not here.",
            "A norm's scale and shift stay in x. The authors' code folds them into the projections, whose product then "
            "has other slices of the same score.",
            "Every layer is looked at; the authors leave out the first, which nothing could be traced from.",
        ),
    )
    fires: PositiveShare = 0.5  # weight from which on a pair counts; the authors' code: 0.5
    share: PositiveShare = 1.0  # of the score that the slices have to reach; the authors' code: 1.0 for tracing
    factors: Fitted | None = None  # q.<layer> [h d d] and k.<layer> [g d d]: projections seen in their own row space
    seed: int | None = None  # without a fit: random axes

    @classmethod
    def example(cls) -> SparseAttentionDecomposition:
        return cls(fires=0.2, seed=0)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]] = ()) -> SparseAttentionDecomposition:
        found = {}
        for layer in context.layers:
            weights = context.weights(layer.number)
            for side, matrix, bias in (("q", weights.q, weights.q_bias), ("k", weights.k, weights.k_bias)):
                whole = matrix if bias is None else torch.cat([matrix, bias[..., None]], -1)  # a bias goes with x = 1
                found[f"{side}.{layer.number}"] = torch.linalg.qr(whole.detach().double().mT).R.mT
        return replace(self, factors=Fitted(found))

    @reads(Site.PATTERN)
    def count(self, pattern: Tensor, call: Call) -> Statistic | None:
        self.require_whole(call)
        if call.query is None or call.key is None or pattern.shape[1] != call.query.shape[1]:
            rule = f"{call.name}: its pairs are taken from all heads of the call"
            raise FieldError(self, "heads", pattern.shape[1], rule, ".on(layers=...) without heads")
        fired = (pattern.detach() >= self.fires) & call.is_text[..., None] & (call.pairs.k != 0)
        text, head, row, column = fired.nonzero().unbind(1)
        rows = torch.arange(call.query.shape[2], device=row.device)[call.rows][row]
        columns = torch.arange(call.key.shape[2], device=row.device)[call.cols][column]
        group = head // (call.heads // call.kv_heads)
        q, k = call.query[text, head, rows].double(), call.key[text, group, columns].double()  # [p d]
        positive = ((q * k).sum(-1) > 0).nonzero()[:, 0]  # a weight may be high because all others are worse
        q, k, head, group, text, rows, columns = (x[positive] for x in (q, k, head, group, text, rows, columns))
        terms = self._terms(q, k, (text, head, group, rows, columns), call)
        reached = terms.sort(-1, descending=True).values.cumsum(-1) >= self.share * (q * k).sum(-1, keepdim=True)
        reached[:, -1] = True  # all of them are the score, but for rounding
        needed = reached.int().argmax(-1) + 1
        each = torch.zeros(2, call.heads, dtype=torch.float64, device=row.device)
        each[0].index_add_(0, head, needed.double())
        each[1].index_add_(0, head, torch.ones_like(needed, dtype=torch.float64))
        return Mean.of(each[0], each[1])

    def _terms(self, q: Tensor, k: Tensor, positions: tuple[Tensor, ...], call: Call) -> Tensor:
        """What each slice adds to the product of each pair `q, k [p d]`."""
        text, head, group, rows, columns = positions
        d = q.shape[1]
        if self.factors is None:
            draw = drawn_for(self, "factors", call.layer)
            axes = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64)).Q.to(q.device)
            return (q @ axes) * (k @ axes)
        mine, theirs = (self.factors.get(f"{side}.{call.layer}") for side in "qk")
        if mine is None or theirs is None or mine.shape != (call.heads, d, d):
            good = "heedful.fit(SparseAttentionDecomposition(), model, ())"
            raise FieldError(self, "factors", self.factors, "were fitted to another model", good)
        turns = self._turns(call, d)
        left, right = mine.to(q.device)[head], theirs.to(q.device)[group]
        if turns is not None:
            text = text if len(turns) > 1 else torch.zeros_like(text)
            left, right = turns[text, rows] @ left, turns[text, columns] @ right
        u, s, v = torch.linalg.svd(left.mT @ right)
        x_i, x_j = torch.linalg.solve(left, q), torch.linalg.solve(right, k)  # coordinates in W's row space
        return s * (x_i[:, None] @ u)[:, 0] * (v @ x_j[..., None])[..., 0]

    def _turns(self, call: Call, d: int) -> Tensor | None:
        """How each token is turned, `[b|1 n d d]`; None where a model has no rotary embedding."""
        if call.rotate is None:
            return None
        basis = torch.eye(d, device=call.queries.index.device)[None, :, None].expand(1, d, len(call.query[0, 0]), d)  # type: ignore[index]
        return call.rotate(basis).permute(0, 2, 3, 1).double()

    def answer(self, readings: Readings) -> Tensor:
        """The mean number of slices by layer and head, `[l h]`; nan where nothing fired."""
        return torch.stack(readings.values_by_layer)

    def describe(self, answer: Tensor) -> Description:
        what = "How many slices of a head's query-key product carry the score of a pair that fires; few means sparse."
        return Description((HeadMap("slices", "Slices a score", what, range(len(answer)), answer, ""),))


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    text = tokenizer("When Mary and John went to the store, John gave a drink to", return_tensors="pt")
    for method in (fit(SparseAttentionDecomposition(), model, ()), SparseAttentionDecomposition(seed=0)):
        with attach(model, method) as run:
            run(**text)
        print(f"{float(run[method].nanmean()):.1f} of 64 slices a pair")
