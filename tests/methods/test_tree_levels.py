"""Attention by height in a tree against sums over dense maps, and what is said of it."""

from __future__ import annotations

import math

import pytest
import torch

import heedful
from heedful import models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods.observe.tree_levels import Levels, TreeLevels
from tests.readers import ids, padded


def found(model, batches: list[dict], method: TreeLevels, **how) -> Levels:
    with heedful.attach(model, method, **how) as run, torch.no_grad():
        for batch in batches:
            run(**batch)
        return run[method]


def height(i: int, j: int, branching: int, depth: int) -> int:
    """How many steps up until both stand in one block; one more than the depth for all that is further."""
    steps = 0
    while i != j and steps <= depth:
        i, j, steps = i // branching, j // branching, steps + 1
    return steps


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("branching", "depth"), [(2, 4), (2, 2), (3, 1)])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_is_what_the_maps_add_up_to(kind: str, branching: int, depth: int, backend: str) -> None:
    model = models.tiny(kind, attn_implementation="eager")
    texts = [ids(14, 1, 2), ids(9, 2)]
    shares, even = torch.zeros(2, 4, depth + 2).double(), torch.zeros(2, 4, depth + 2).double()
    rows = 0
    for text in texts:
        with torch.no_grad():
            maps = model(input_ids=text, output_attentions=True).attentions
        for b in range(len(text)):
            for i in range(text.shape[1]):
                rows += 1
                keys = range(i + 1) if kind == "llama" else range(text.shape[1])
                for j in keys:
                    n = height(i, j, branching, depth)
                    even[:, :, n] += 1 / len(keys)
                    for layer, x in enumerate(maps):
                        shares[layer, :, n] += x[b, :, i, j]
    got = found(model, [{"input_ids": text} for text in texts], TreeLevels(branching, depth), backend=backend)
    assert got.layers == (0, 1)
    assert close(got.share.float(), (shares / rows).float())
    assert close(got.even.float(), (even / rows).float())
    wanted = sum(n * shares[..., n] for n in range(depth + 2)) / rows
    assert close(got.height.float(), wanted.float())


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(left: bool) -> None:
    model = models.tiny("llama")
    short, long = ids(11, 1), ids(17, 2)
    apart = found(model, [{"input_ids": short}, {"input_ids": long}], TreeLevels())
    together = found(model, [padded(short, long, left)], TreeLevels())
    assert close(together.share.float(), apart.share.float())
    assert close(together.even.float(), apart.even.float())


def test_writing_does_not_count() -> None:
    model = models.tiny("llama")
    with heedful.attach(model, TreeLevels()) as run, torch.no_grad():
        run(input_ids=ids(9))
        before = run[TreeLevels()].share
        run.generate(input_ids=ids(9), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert close(run[TreeLevels()].share.float(), before.float())


def test_what_is_said() -> None:
    share = torch.tensor([[[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.5, 0.5], [0.0] * 3 + [1.0]]])
    even = torch.full((2, 2, 4), 0.25)
    answer = Levels((0, 3), share, even)
    assert answer.height.tolist() == [[0.5, 0.0], [2.5, 3.0]]
    assert str(answer) == "mean height by layer: 0: 0.25 (even 1.50), 3: 2.75 (even 1.50)"
    shown = TreeLevels(2, 2).describe(answer)
    heights, curves = shown.figures
    assert heights.layers == (0, 3)
    assert heights.values is not None
    assert (heights.low, heights.high) == (0, 3)
    assert list(curves.lines) == ["height 0", "height 1", "height 2", "further"]
    assert curves.lines["further"].tolist() == [0.0, 0.75]
    assert curves.lines["height 1"].tolist() == [0.25, 0.0]
    assert shown.findings[0].text == "Heads look up to height 0.25 in the first layer and 2.75 in the last."
    uneven = Levels((0, 1), torch.tensor([[[0.5, 0.5], [math.nan, math.nan]], [[0.0, 1.0], [1.0, 0.0]]]), even[..., :2])
    assert str(uneven).startswith("mean height by layer: 0: 0.50 (even 0.25), 1: 0.50")


def test_says_what_is_wrong() -> None:
    for bad in ({"branching": 1}, {"depth": 0}, {"depth": 31}):
        with pytest.raises(FieldError, match=f"TreeLevels.{next(iter(bad))}"):
            TreeLevels(**bad)
    assert TreeLevels(2, 1).depth == 1
    assert TreeLevels(2, 30).depth == 30
