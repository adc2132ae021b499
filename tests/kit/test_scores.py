"""Scores that methods compute beside the model are the model's own: soft cap, bias, groups and padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.speed.decoding import Operations
from heedful import attach
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import CachedKV, Call
from heedful.core.method import Method
from heedful.core.positions import Positions
from heedful.core.sites import Site, reads
from heedful.kit.scores import last_queries, last_weights, scores_of
from heedful.tiny import tiny
from tests.samples import PAPER

IDS = torch.arange(3, 35).view(2, 16)


FOUND: list[tuple[Tensor, Tensor]] = []
ROWS = torch.tensor([[4, 15], [9, 2]])


class Look(Method):
    """Computes a few rows' scores, of rows by number and of a slice, where a text looks back at itself."""

    paper = PAPER

    @reads(Site.HEAD_OUTPUT)
    def look(self, heads: Tensor, call: Call) -> None:
        if call.query is None or call.key is None or call.cross or "encoder" in call.name:
            return
        picked = call.query.gather(2, ROWS[:, None, :, None].expand(-1, call.heads, -1, call.query.shape[-1]))
        some = scores_of(picked, call.key, call, ROWS)
        FOUND.append((some, scores_of(call.query[:, :, 4:7], call.key, call, slice(4, 7))))


@pytest.mark.parametrize("kind", ["gemma2", "t5"])
@torch.no_grad()
def test_weights_are_those_of_the_model(kind: str) -> None:
    """One caps its scores, the other adds a bias; rows are asked for by number and as a slice."""
    FOUND.clear()
    inputs: dict[str, Any] = {"decoder_input_ids": IDS} if kind == "t5" else {}
    with attach(tiny(kind), Look(), backend="reference") as run:
        out = run(IDS, **inputs, output_attentions=True)
    patterns = out.decoder_attentions if kind == "t5" else out.attentions
    # gemma's first layer sees a window alone
    pairs = list(zip(FOUND, patterns, strict=True))[0 if kind == "t5" else 1 :]
    for (some, three), pattern in pairs:
        for b in range(2):
            for i, row in enumerate(ROWS[b].tolist()):
                assert close_model(some[b, :, i, : row + 1].softmax(-1), pattern[b, :, row, : row + 1])
        for i in range(3):
            assert close_model(three[:, :, i, : 5 + i].softmax(-1), pattern[:, :, 4 + i, : 5 + i])


def test_one_bias_for_all_rows_and_one_for_each_text() -> None:
    query, key = torch.randn(2, 4, 3, 5), torch.randn(2, 2, 6, 5)
    place = Positions.row(0, 6)
    rows = torch.tensor([[5, 0, 1], [2, 2, 4]])
    for bias in (torch.randn(1, 1, 1, 6), torch.randn(2, 4, 6, 6), torch.randn(1, 4, 6, 6)):
        call = Call(0, 1, "layer", 4, 2, place, place, 0.5, softcap=3.0, bias=bias)
        found = scores_of(query, key, call, rows)
        for b in range(2):
            for h in range(4):
                for i in range(3):
                    plain = torch.tensor([float(query[b, h, i] @ key[b, h // 2, j]) for j in range(6)])
                    row = bias[b % len(bias), h % bias.shape[1], int(rows[b, i]) % bias.shape[2]]
                    assert close(found[b, h, i], 3 * torch.tanh(0.5 * plain / 3) + row)


def test_the_last_queries_of_each_text() -> None:
    """Padding on either side has none; a text shorter than was asked for has fewer."""
    text = torch.tensor([[True] * 6, [False] * 4 + [True] * 2, [True] * 3 + [False] * 3])
    position = (text.long().cumsum(-1) - 1).masked_fill(~text, -1)
    places = Positions(torch.arange(6)[None, None], position[:, None], is_filled=text[:, None])
    query = torch.arange(18.0).view(3, 1, 6, 1)
    queries, rows, where = last_queries(Call(0, 1, "layer", 1, 1, places, places, 1.0, query=query), 3)
    assert where[:, 0].tolist() == [[3, 4, 5], [-1, 0, 1], [0, 1, 2]]
    assert rows.tolist() == [[3, 4, 5], [3, 4, 5], [0, 1, 2]]
    assert queries.flatten().tolist() == [3, 4, 5, 9, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("last", [5, 6, 7])
def test_a_token_alone_sees_what_is_not_after_it_and_looks_only_where_something_may_be(last: int) -> None:
    """Every place is known to be text; that no key is after the query is known where they end together."""
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 7, 8)
    call = Call(0, 1, "bare", 4, 2, Positions.row(last, 1), Positions.row(0, 7), 0.4, query=q, batch=1)
    entries = CachedKV(k, k, Positions.row(0, 7), 1)
    with Operations() as counted:
        found, position = last_weights(entries, call, 3)
    scores = 0.4 * torch.einsum("bhrd,bhkd->bhrk", q, k.repeat_interleave(2, 1))
    assert close(found, torch.nn.functional.pad(scores[..., : last + 1].softmax(-1), (0, max(0, 6 - last))))
    assert position.tolist() == [[[last]]]
    assert (counted.done < 6) is (last >= 6)  # a product, a scale and a softmax, and shapes
