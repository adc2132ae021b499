"""BestOrder against dense maps: the peak of each order, which order is taken, and what it refuses."""

from __future__ import annotations

import random

import pytest
import torch

import heedful
from heedful import Prompt, models
from heedful.core.errors import FieldError
from heedful.methods import BestOrder
from tests.methods.documents import prompt


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama", num_hidden_layers=3, attn_implementation="eager")


def peak(model, shown: Prompt) -> float:
    """What the most attended document gets of the last row, added up over layers as the authors do."""
    with torch.no_grad():
        maps = model(torch.tensor([shown.tokens]), output_attentions=True).attentions
    totals = []
    for a, b in shown.roles["documents"]:
        total = 0.0
        for layer in maps:
            total += sum(float(head[-1, a:b].sum()) for head in layer[0]) / layer.shape[1]
        totals.append(total)
    return max(totals)


def tried(start: Prompt, orders: int, seed: int) -> list[Prompt]:
    draw = random.Random(seed)
    return [start] + [start.reordered("documents", tuple(draw.sample(range(4), 4))) for _ in range(orders - 1)]


@pytest.mark.parametrize(("orders", "seed"), [(2, 0), (5, 0), (5, 1), (9, 3)])
def test_takes_the_order_with_the_highest_peak(model, orders: int, seed: int) -> None:
    for number in range(3):
        start = prompt(number)
        shown = tried(start, orders, seed)
        peaks = [peak(model, each) for each in shown]
        found = heedful.arrange(model, start, BestOrder(orders=orders, seed=seed))
        assert found == shown[peaks.index(max(peaks))]
        assert found.roles["end"] == ((20, 23),)


def test_reads_each_order_once_and_keeps_the_first_of_equals() -> None:
    reads: list[Prompt] = []

    def read(shown: Prompt, method: object) -> torch.Tensor:
        reads.append(shown)
        assert (method.role, method.last) == ("documents", 22)  # type: ignore[attr-defined]
        return torch.tensor([0.1, 0.4, 0.2, 0.3])

    assert BestOrder(orders=6).arrange(prompt(), read) == prompt()
    assert reads == tried(prompt(), 6, 0)
    assert len(tried(prompt(), 6, 0)) == 6


def test_the_highest_document_counts_and_not_the_sum() -> None:
    shown = tried(prompt(), 3, 0)
    given = {0: [0.3, 0.3, 0.3, 0.0], 1: [0.0, 0.5, 0.0, 0.0], 2: [0.4, 0.4, 0.4, 0.4]}

    def read(each: Prompt, method: object) -> torch.Tensor:
        return torch.tensor(given[shown.index(each)])

    assert BestOrder(orders=3).arrange(prompt(), read) == shown[1]


def test_neutral_changes_nothing_and_defaults_are_the_authors(model) -> None:
    assert heedful.arrange(model, prompt(), BestOrder.neutral()) == prompt()
    assert (BestOrder().orders, BestOrder().role, BestOrder().seed) == (20, "documents", 0)
    one = Prompt((5, 6, 7, 8), {"documents": ((1, 3),)})
    assert heedful.arrange(model, one, BestOrder(orders=3)) == one


def test_the_role_has_a_name_of_choice(model) -> None:
    found = heedful.arrange(model, prompt(role="tables"), BestOrder("tables", 5))
    assert found.tokens == heedful.arrange(model, prompt(), BestOrder(orders=5)).tokens


def test_says_what_is_wrong(model) -> None:
    with pytest.raises(FieldError, match="orders = 0: must be 1 or more"):
        BestOrder(orders=0)
    with pytest.raises(FieldError, match="must name a role"):
        BestOrder(role="")
    for orders in (1, 3):
        with pytest.raises(FieldError, match="no spans named 'tables'"):
            heedful.arrange(model, prompt(), BestOrder("tables", orders))
