"""Use of layers against hooks that leave one out, and states that hooks hear."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import models
from heedful.core.errors import FieldError
from heedful.explaining import DepthUse, depth_use

LAYERS = 3


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 127, (5, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    first = {"input_ids": ids[:3], "attention_mask": mask[:3], "labels": ids[:3].masked_fill(mask[:3] == 0, -100)}
    return [first, {"input_ids": ids[3:], "labels": ids[3:]}]


def first_of(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def median(numbers: list[float]) -> float:
    """The lower one of two in the middle, as torch has it."""
    return sorted(numbers)[(len(numbers) - 1) // 2]


@torch.no_grad()
def test_variance_turn_and_what_the_loss_is_without_a_layer() -> None:
    model: Any = models.tiny("llama", num_hidden_layers=LAYERS)
    found = depth_use(model, batches())
    states: list[list[list[float]]] = [[] for _ in range(LAYERS + 1)]
    for batch in batches():
        there = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        heard: list[Tensor] = []
        hooks = [model.model.layers[0].register_forward_pre_hook(lambda _, args, heard=heard: heard.append(args[0]))]
        hooks += [
            layer.register_forward_hook(lambda _, __, out, heard=heard: heard.append(first_of(out)))
            for layer in model.model.layers
        ]
        model(**batch)
        for hook in hooks:
            hook.remove()
        for kept, x in zip(states, heard, strict=True):
            kept += x[there].tolist()
    for layer in range(LAYERS):
        spread, turns = [], []
        for x, y in zip(states[layer], states[layer + 1], strict=True):
            mean = sum(y) / len(y)
            spread.append(sum((c - mean) ** 2 for c in y) / len(y))
            dot = sum(a * b for a, b in zip(x, y, strict=True))
            turns.append(math.degrees(math.acos(dot / math.hypot(*x) / math.hypot(*y))))
        assert float(found.variance[layer]) == pytest.approx(median(spread), rel=1e-4)
        assert float(found.turn[layer]) == pytest.approx(median(turns), rel=1e-3)
    assert found.loss == pytest.approx(sum(float(model(**batch).loss) for batch in batches()) / 2)
    for layer, block in enumerate(model.model.layers):
        hook = block.register_forward_hook(lambda _, args, __: args[0])
        want = sum(float(model(**batch).loss) for batch in batches()) / 2
        hook.remove()
        assert float(found.losses[layer]) == pytest.approx(want)
        assert want != pytest.approx(found.loss)


def test_a_layer_is_useful_from_a_tenth_of_the_loss_on() -> None:
    three = torch.tensor([1.0, 4.0, 6.0])
    found = DepthUse(three, three, torch.tensor([2.3, 2.1, 1.9]), 2.0)
    assert found.rise.tolist() == pytest.approx([0.15, 0.05, -0.05])
    assert found.useful == pytest.approx(1 / 3)
    assert found.figure.values.tolist() == [pytest.approx([0.15, 0.05, -0.05])]
    assert found.figure.columns == ["0", "1", "2"]
    assert repr(found).startswith("33% of 3 layers are useful; layer 2 is the least so.\n")
    assert "6 times that behind the first." in repr(found)


def test_one_part_of_a_model_is_named() -> None:
    model = models.tiny("bart")
    ids = torch.randint(3, 60, (4, 9))
    given = [{"input_ids": ids, "labels": ids}]
    with pytest.raises(FieldError, match=r"depth_use\(\).only = None: must name one part of the model"):
        depth_use(model, given)
    for part in ("encoder", "decoder"):  # whose layers attend twice
        found = depth_use(model, given, only=f"model.{part}")
        assert len(found.turn) == len(found.losses) == 2
        for layer, block in enumerate(model.model.get_submodule(part).layers):
            hook = block.register_forward_hook(lambda _, args, __: args[0])
            with torch.no_grad():
                assert float(found.losses[layer]) == pytest.approx(float(model(**given[0]).loss))
            hook.remove()


def test_what_gives_no_loss_is_refused() -> None:
    for given in ([], [{"input_ids": torch.arange(3, 12)[None]}]):
        with pytest.raises(FieldError, match=r'depth_use\(\).batches = .: must (be 1 or more|each have "labels");'):
            depth_use(models.tiny("llama"), given)
    ids = torch.arange(3, 12)[None]
    with pytest.raises(FieldError, match="labels that count"):
        depth_use(models.tiny("llama"), [{"input_ids": ids, "labels": torch.full_like(ids, -100)}])
