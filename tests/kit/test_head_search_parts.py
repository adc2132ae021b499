"""Scores without padding, of the shortest texts, and heads that a search chose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from heedful import fit, models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close_model
from heedful.core.entry import FitContext
from heedful.core.errors import FieldError
from heedful.core.method import Method, Stack
from heedful.core.sites import Site, at
from heedful.kit.head_search import at_end, gains, heads_here, scores
from heedful.methods import LoFiT
from tests.samples import PAPER


class Looks(Method):
    """Keeps what the scores are."""

    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def silence(self, heads: torch.Tensor, call: Any) -> torch.Tensor:
        return torch.zeros_like(heads)

    def fit(self, context: FitContext, batches: Any) -> Any:
        found = list(batches)
        return scores(context, Stack(), found), gains(context, self, [(0, 1), (1, 3)], found)


def test_texts_without_padding_and_the_shortest_ones() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, batch=3, length=6)["input_ids"]
    target = torch.tensor([4, 8, 9])
    mask = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]])
    batches = [{"input_ids": ids}, {"input_ids": ids, "target": target}, {"input_ids": ids, "attention_mask": mask}]
    found, gained = fit(Looks(), model, batches)
    with torch.no_grad():
        plain = model(input_ids=ids).logits.log_softmax(-1)
        short = model(input_ids=ids[:1], attention_mask=mask[:1]).logits.log_softmax(-1)
    own = [sum(plain[b, i - 1, ids[b, i]] for i in range(1, 6)) / 5 for b in range(3)]
    ends = [plain[b, -1, target[b]] for b in range(3)]
    last = [short[0, 4, ids[0, 5]], torch.zeros(()), own[2]]
    assert close_model(found, torch.stack([torch.as_tensor(x) for x in (*own, *ends, *last)]))
    assert set(gained) == {(0, 1), (1, 3)}
    assert all(abs(x) > 0 for x in gained.values())


def test_the_end_of_a_text_is_its_last_token() -> None:
    logits = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert torch.equal(at_end(logits, {"attention_mask": mask}), torch.stack([logits[0, 2], logits[1, 3]]))
    assert torch.equal(at_end(logits, {}), logits[:, -1])


def test_heads_of_a_layer() -> None:
    call = replace(Bare().call, layer=1, depth=2)
    assert heads_here(Looks(), [(0, 0), (1, 3), (1, 1), (0, 2)], call) == [3, 1]
    assert heads_here(Looks(), [], call) == []
    assert heads_here(Looks(), [(0, 3)], call) == []
    for heads in ([(1, 4)], [(2, 0)]):
        with pytest.raises(FieldError, match="fitted to another model; here are 2 layers, and 4 heads in layer 1"):
            heads_here(Looks(), heads, call)
    assert LoFiT(heads=[[0, 0], (3, 1)]).heads == ((0, 0), (3, 1))  # type: ignore[arg-type]
    for wrong in ([(0,)], [(-1, 0)], [(0, 1, 2)]):
        with pytest.raises(FieldError, match=r"LoFiT\.heads = .*must be "):
            LoFiT(heads=wrong)  # type: ignore[arg-type]
