"""Linearity against least squares by normal equations, token by token, and where a step is linear by construction."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import SwinConfig, SwinModel

from heedful import models
from heedful.core.errors import FieldError, ModelError
from heedful.explaining import linearity
from heedful.explaining.linear import unmapped


def by_normal_equations(x: Tensor, y: Tensor) -> list[float]:
    """The authors' measure, with a row of ones for the mean: what is left of each token, over the spread."""
    x, y = x.double(), y.double()
    ones = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    plane = torch.linalg.solve(ones.T @ ones, ones.T @ y)
    spread = (sum(float((row - y.mean(0)).square().sum()) for row in y) / len(y)) ** 0.5
    return [float(((row @ plane) - wanted).square().sum()) ** 0.5 / spread for row, wanted in zip(ones, y, strict=True)]


def test_what_a_map_leaves_of_each_token() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=draw) + 2, torch.randn(40, 3, generator=draw)
    assert unmapped(x, y).tolist() == pytest.approx(by_normal_equations(x, y), rel=1e-6)
    assert float(unmapped(x, x @ torch.randn(5, 3, generator=draw) + 1).max()) < 1e-5
    x[:, 4] = x[:, 0]  # a channel that says nothing new
    assert unmapped(x.double(), y.double()).tolist() == pytest.approx(by_normal_equations(x[:, :4], y), rel=1e-6)


def test_layers_and_tokens_of_a_model_are_told_without_padding() -> None:
    model = models.tiny("llama", num_hidden_layers=3)
    ids = torch.randint(3, 127, (6, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :15] = 0
    batches = [{"input_ids": ids[:4], "attention_mask": mask[:4]}, {"input_ids": ids[4:]}]
    found = linearity(model, batches)
    kept: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for batch in batches:
            heard: list[Tensor] = []
            hooks = [
                layer.register_forward_hook(
                    lambda _, __, out, heard=heard: heard.append(out[0] if isinstance(out, tuple) else out)
                )
                for layer in model.model.layers
            ]
            model(**batch)
            for hook in hooks:
                hook.remove()
            there = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            for layer, states in zip(kept, heard, strict=True):
                layer.append(states[there])
    states = [torch.cat(layer) for layer in kept]
    assert found.errors.shape == (2, 6 * 40 - 15)
    for row, (x, y) in zip(found.errors, pairwise(states), strict=True):
        assert row.tolist() == pytest.approx(by_normal_equations(x, y), rel=1e-4)
    assert found.layers.tolist() == pytest.approx([1 - float(row.square().mean()) for row in found.errors])
    assert found.tokens.tolist() == pytest.approx(found.errors.mean(0).tolist())
    assert found.figure.columns == ["0 to 1", "1 to 2"]
    assert "mean over 2 steps" in repr(found)


def test_too_few_tokens_or_layers_are_refused() -> None:
    ids = torch.arange(3, 33)[None]
    with pytest.raises(FieldError, match=r"linearity\(\).batches = 30: must hold more tokens than the 32 channels"):
        linearity(models.tiny("llama"), [{"input_ids": ids}])
    with pytest.raises(FieldError, match="two layers or more"):
        linearity(models.tiny("llama", num_hidden_layers=1), [{"input_ids": ids}])
    with pytest.raises(FieldError, match=r"linearity\(\).batches = 0: must be 1 or more"):
        linearity(models.tiny("llama"), [])


@pytest.mark.parametrize("written", [20, 12])
def test_layers_that_do_not_follow_one_another_are_no_pair(written: int) -> None:
    model, ids = models.tiny("bart"), torch.randint(3, 60, (8, 20))
    batches = [{"input_ids": ids, "decoder_input_ids": ids[:, :written]}]
    with pytest.raises(FieldError, match=r"only = None: must name one part .*: model.encoder.layers or model.decoder"):
        linearity(model, batches)
    for part, tokens in (("model.encoder.layers", 20), ("model.decoder.layers", written)):
        assert linearity(model, batches, only=part).errors.shape == (1, 8 * tokens)


def test_layers_of_unlike_states_are_no_pair() -> None:
    swin = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4)
    model, batches = SwinModel(swin).eval(), [{"pixel_values": torch.randn(1, 3, 32, 32)}]
    with pytest.raises(FieldError, match=r"only = None: must name layers .* here are \(256, 8\) and \(64, 16\)"):
        linearity(model, batches)
    assert linearity(model, batches, only="encoder.layers.0").errors.shape == (1, 256)


def test_states_that_are_not_finite_are_refused() -> None:
    model = models.tiny("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"states behind layer 1 are not finite"):
        linearity(model, [{"input_ids": torch.randint(3, 127, (6, 40))}])
