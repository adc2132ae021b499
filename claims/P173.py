"""SparseAttentionDecomposition: do fewer singular vectors than random axes carry the scores that fire?"""

from __future__ import annotations

from dataclasses import field
from functools import cache

import torch
from torch import Tensor

from claims._texts import sentences
from claims.ledger import Claim, run
from heedful import attach, fit, models
from heedful.core.call import Call
from heedful.methods.explain.sparse_attention_decomposition import SparseAttentionDecomposition

SENTENCES = 4  # a seed
WITHIN = 0.1  # of the score


class _Staying(SparseAttentionDecomposition):
    """Keeps, by layer and head, how many slices of each pair it takes until their sum stays near the score."""

    paper = SparseAttentionDecomposition.paper
    found: dict[tuple[int, int], list[int]] = field(default_factory=dict, repr=False, compare=False)

    def _terms(self, q: Tensor, k: Tensor, positions: tuple[Tensor, ...], call: Call) -> Tensor:
        terms = super()._terms(q, k, positions, call)
        for head, many in zip(positions[1].tolist(), staying(terms).tolist(), strict=True):
            self.found.setdefault((call.layer, head), []).append(many)
        return terms


def staying(terms: Tensor) -> Tensor:
    """The least number of terms, the largest in magnitude first, from which on the sum `[p d]` stays near the whole."""
    ordered = terms.gather(-1, terms.abs().argsort(-1, descending=True)).cumsum(-1)
    far = (ordered - ordered[:, -1:]).abs() > WITHIN * ordered[:, -1:].abs()
    last = torch.where(far, torch.arange(1, terms.shape[-1] + 1), 0).amax(-1)
    return last + 1


@cache
def fitted() -> tuple[models.Loaded, SparseAttentionDecomposition]:
    loaded = models.default()
    return loaded, fit(SparseAttentionDecomposition(), loaded.model, ())


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    (model, tokenizer, _), method = fitted()
    numbers = {}
    ways = {"singular vectors": _Staying(factors=method.factors), "random axes": _Staying(seed=seed)}
    for name, each in ways.items():
        with attach(model, each) as attached:
            for text in sentences(seed, SENTENCES):
                attached(**tokenizer(text, return_tensors="pt"), logits_to_keep=1)
        heads = [sum(many) / len(many) for many in each.found.values()]
        numbers[f"slices a pair, {name}"] = sum(heads) / len(heads)
        numbers["heads in which a pair fired"] = float(len(heads))
    few, many = numbers["slices a pair, singular vectors"], numbers["slices a pair, random axes"]
    return 1 - few / many, numbers


CLAIM = Claim(
    key="P173",
    method="SparseAttentionDecomposition",
    says="The scores of heads that fire are sparse in the singular vectors of the head's query-key product.",
    paper_number="none in the abstract",
    setup=f"SmolLM2-135M, {SENTENCES} sentences of Python's help texts a seed; pairs with a weight of 0.5 or more, the "
    "text's first token left out; the least number of the head's 64 slices, largest first, from which on their sum "
    f"stays within {WITHIN:.0%} of the score, mean over heads, against slices along random axes of the same head. The "
    "paper has GPT-2 small on indirect objects. (A first count, of signed slices until their sum first reaches the "
    "score, rewarded axes along which slices cancel and was not seen, -0.23 over 3 seeds; an audit named this one, and "
    "its direction, before it was measured.)",
    effect="share of slices that singular vectors save over random axes",
    measure=measure,
    seeds=8,
    strong=0.1,
)


if __name__ == "__main__":
    run(CLAIM)
