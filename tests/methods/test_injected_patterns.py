"""Injected patterns: which keys each head sees, token by token, and how much weight falls where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Call, Method, Sum, reads
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, SiteError
from heedful.core.sites import Site
from heedful.methods.mechanisms.routed.injected_patterns import PATTERNS, InjectedPatterns
from tests.samples import PAPER

END = 9
ROWS = [
    [0, 0, 5, 6, 9, 5, 7, 8, 9, 7, 5, 9],  # the first two are padding
    [9, 4, 4, 3, 9, 3, 3, 4, 8, 9, 9, 6],
]
IDS = torch.tensor(ROWS)
TEXT = torch.tensor([[0, 0, *[1] * 10], [1] * 12])
N = 12


class Seen(Method):
    """Which pairs have weight, in all rows."""

    paper = PAPER

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Sum:
        return Sum.of((weights > 0).double().sum(0) if len(weights) == 1 else (weights > 0).double())


def sentences(row: list[int]) -> list[int]:
    """The number of each token's sentence."""
    found, number = [], 0
    for token in row:
        found.append(number)
        number += token == END
    return found


def named(pattern: int, row: list[int], i: int, j: int) -> bool:
    """Whether a pattern names key j for query i."""
    match pattern:
        case 0:
            return row[i] == row[j] and i != j
        case 1:
            return sentences(row)[i] == sentences(row)[j]
        case 2:
            return j == i + 1
        case _:
            return j == i - 1


def table(row: list[int], first: int, pattern: int, causal: bool) -> Tensor:
    """Which keys each query of a text sees that begins at `first`, written pair by pair."""
    out = torch.zeros(N, N)
    for i in range(first, N):
        open_to = [j for j in range(first, N) if j <= i or not causal]
        out[i, [j for j in open_to if named(pattern, row, i, j)] or open_to] = 1
    return out


@pytest.mark.parametrize(("kind", "causal"), [("bert", False), ("llama", True)])
@pytest.mark.parametrize("heads", [2, 4])
def test_what_heads_see(kind: str, causal: bool, heads: int) -> None:
    model = models.tiny(kind)
    seen = Seen()
    with torch.no_grad(), attach(model, InjectedPatterns(heads, ends=(END, 99)) | seen, backend="reference") as run:
        run(IDS, attention_mask=TEXT)
    for found in (run[seen][layer].value for layer in range(2)):
        for row, first in ((0, 2), (1, 0)):
            for head in range(4):
                pattern = head if head < heads else None
                for i in range(first, N):
                    if pattern is None:
                        want = torch.tensor([float(first <= j and (j <= i or not causal)) for j in range(N)])
                    else:
                        want = table(ROWS[row], first, pattern, causal)[i]
                    assert torch.equal(found[row, head, i].float(), want)


def test_patterns_come_in_turn() -> None:
    """And a part of the heads can be left as they are."""
    model, seen = models.tiny("bert", num_attention_heads=8, hidden_size=32), Seen()
    with torch.no_grad():
        with attach(model, InjectedPatterns(7, ends=(END,)) | seen, backend="reference") as run:
            run(IDS[1:])
        every = run[seen][0].value
        for head in range(7):
            assert torch.equal(every[head].float(), table(ROWS[1], 0, head % 4, causal=False))
        assert bool((every[7] == 1).all())
        with attach(model, InjectedPatterns(8, ends=(END,)).on(heads=[1, 6]) | seen, backend="reference") as run:
            run(IDS[1:])
    some = run[seen][0].value
    assert torch.equal(some[6].float(), table(ROWS[1], 0, 2, causal=False))
    assert torch.equal(some[1].float(), table(ROWS[1], 0, 1, causal=False))
    assert bool((some[[0, 2, 3, 4, 5, 7]] == 1).all())


def test_a_sentence_goes_on_in_later_calls() -> None:
    model, seen = models.tiny("llama"), Seen()
    cache: Any = DynamicCache()
    with torch.no_grad(), attach(model, InjectedPatterns(ends=(END,)) | seen, backend="reference") as run:
        run(IDS[1:, :7], **{CACHE: cache})
        for i in range(7, N):
            run.reset()
            run(IDS[1:, i : i + 1], **{CACHE: cache})
            for head in range(4):
                want = table(ROWS[1], 0, head, causal=True)[i, : i + 1]
                assert torch.equal(run[seen][1].value[head, 0].float(), want)


class Weights(Method):
    """The weights themselves, of one text."""

    paper = PAPER

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Sum:
        return Sum.of(weights[0].double())


def test_relevance_is_the_mean_weight_on_a_pattern() -> None:
    model, spy, method = models.tiny("bert"), Weights(), InjectedPatterns(0, (END,), relevance=True)
    with torch.no_grad():
        plain = model(IDS, attention_mask=TEXT).logits
        with attach(model, method, backend="reference") as run:
            assert close_model(run(IDS, attention_mask=TEXT).logits, plain)
        maps = []
        for row, first in ((0, 2), (1, 0)):
            with attach(model, spy, backend="reference") as alone:
                alone(IDS[row : row + 1], attention_mask=TEXT[row : row + 1])
            maps.append((alone[spy], ROWS[row], first))
    found = run[method]
    assert tuple(found) == PATTERNS
    for pattern, name in enumerate(PATTERNS):
        for layer in range(2):
            for head in range(4):
                total = sum(
                    float(weights[layer].value[head, i, j])
                    for weights, row, first in maps
                    for i in range(first, N)
                    for j in range(first, N)
                    if named(pattern, row, i, j)
                )
                assert close(found[name][layer, head].float(), torch.tensor(total / 22))
    figures = method.describe(found).figures
    assert [figure.values.shape for figure in figures] == [(2, 4)] * 4  # type: ignore[attr-defined]


def test_under_patterns_relevance_is_that_of_the_patterns() -> None:
    """Every query of the second text has a token before it but one, which sees as it did."""
    method = InjectedPatterns(ends=(END,), relevance=True)
    with torch.no_grad(), attach(models.tiny("llama"), method) as run:
        run(IDS[1:])
    assert close(run[method]["token before"][:, 3].float(), torch.tensor([11 / 12] * 2))
    assert close(run[method]["own sentence"][:, 1].float(), torch.ones(2))


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"InjectedPatterns.heads = -1: must be 0 or more"):
        InjectedPatterns(-1)
    with pytest.raises(FieldError, match=r"InjectedPatterns.ends = \(-2,\): each must be 0 or more"):
        InjectedPatterns(ends=(-2,))
    run = attach(models.tiny("bert"), InjectedPatterns())
    with pytest.raises(SiteError, match="hand it ids"):
        run(inputs_embeds=torch.randn(1, 5, 32))
    run.close()
