"""SpecPC against dense maps and the authors' way of choosing, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import Prompt, models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.methods.sparse.tokens.spec_pc import SpecPC, _LastQueries


def prompt(n: int = 30, seed: int = 0) -> Prompt:
    """So many tokens, some of which are marked."""
    generator = torch.Generator().manual_seed(seed)
    return Prompt(tuple(torch.randint(3, 127, (n,), generator=generator).tolist()), {"marked": ((3, 6),)})


def scores(model: Any, shown: Prompt, window: int, first: int, stop: int | None) -> Tensor:
    with torch.no_grad():
        maps = model(torch.tensor([shown.tokens]), output_attentions=True).attentions[first:stop]
    best = torch.zeros(len(shown))
    for layer in maps:
        for head in layer[0]:
            rows = head[-window:]
            for i, row in enumerate(rows):
                weight = i / (len(rows) - 1) if len(rows) > 1 else 1.0
                best = torch.maximum(best, weight * row)
    return best


def choose(score: list[float], room: int, window: int, kernel: int, near: int) -> list[int]:
    """Which tokens the authors' code keeps, where there is room for its window."""
    n = len(score)
    left = (kernel - 1) // 2
    pooled = [max((score[j] for j in range(i - left, i - left + kernel) if 0 <= j < n), default=0.0) for i in range(n)]
    best = sorted(range(n), key=lambda i: -pooled[i])[:room]
    steps = sorted(range(-((near - 1) // 2), near - 1 - (near - 1) // 2 + 1), key=abs) if near else [0]
    order = list(range(n - 1, n - window - 1, -1))  # a window that has no room keeps its end
    for i in best:
        for step in steps:
            j = max(0, min(n - 1, i + step))
            if j not in order:
                order.append(j)
    return sorted(order[:room])


@pytest.mark.parametrize(("window", "first", "stop"), [(4, 0, None), (1, 1, None), (30, 1, 2), (7, 2, 3)])
@pytest.mark.parametrize("how", [{"backend": "reference"}, {"tile_rows": 3}])
def test_what_each_token_gets(window: int, first: int, stop: int | None, how: dict[str, Any]) -> None:
    model = models.tiny("llama", num_hidden_layers=4, attn_implementation="eager")
    shown = prompt()
    reader = _LastQueries(window, 30, first, stop)
    with heedful.attach(model, reader, **how) as run, torch.no_grad():
        run(torch.tensor([shown.tokens]))
    assert close_model(run[reader], scores(model, shown, window, first, stop))


@pytest.mark.parametrize(
    ("room", "window", "kernel", "near"),
    [(12, 3, 1, 0), (12, 3, 4, 0), (12, 3, 1, 1), (15, 2, 3, 4), (15, 5, 5, 5), (4, 6, 2, 2), (29, 1, 7, 9)],
)
def test_which_tokens_stay(room: int, window: int, kernel: int, near: int) -> None:
    score = torch.rand(30, generator=torch.Generator().manual_seed(1))
    found = SpecPC(window=window, kernel=kernel, near=near).chosen(score, room, window)
    assert list(found) == choose(score.tolist(), room, window, kernel, near)
    assert len(found) == room


def test_equal_scores_are_taken_in_order() -> None:
    assert SpecPC(kernel=1, near=0).chosen(torch.ones(8), 3, 1) == (0, 1, 7)


def test_a_prompt_is_what_is_left_of_it() -> None:
    model = models.tiny("llama", num_hidden_layers=3, attn_implementation="eager")
    shown, method = prompt(), SpecPC(0.4, 4, 3, 2, first=1, stop=2)
    kept = choose(scores(model, shown, 4, 1, 2).tolist(), 12, 4, 3, 2)
    found = heedful.arrange(model, shown, method)
    assert found == shown.only(tuple(kept))
    assert len(found) == 12
    short = prompt(6)
    assert heedful.arrange(model, short, SpecPC(6, first=0)) is short
    assert heedful.arrange(model, short, SpecPC(5, window=9, first=0)) == short.only((1, 2, 3, 4, 5))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"budget": 0}, r"SpecPC\.budget"),
        ({"window": 0}, r"SpecPC\.window = 0: must be 1 or more.*64"),
        ({"kernel": 0}, r"SpecPC\.kernel = 0: must be 1 or more"),
        ({"near": -1}, r"SpecPC\.near = -1: must be 0 or more"),
        ({"first": -1}, r"SpecPC\.first = -1: must be 0 or more"),
        ({"first": 3, "stop": 3}, r"SpecPC\.stop = 3: must lie behind the first layer that is asked, 3.*4"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        SpecPC(**settings)
    SpecPC(first=3, stop=4)
