"""Values of another run put in by text position, against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful import fold, models
from heedful.authoring import Call, FieldError, Fitted
from heedful.core.errors import FoldError
from heedful.core.positions import Positions
from heedful.methods import Patch
from heedful.methods.explain.patch import patched

B, H, N, D = 2, 3, 6, 4
PAD = torch.tensor([0, 2])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(layer: int = 1, start: int = 0, pad: Tensor | None = None) -> Call:
    places = Positions.row(start, N, pad=pad)
    return Call(layer, 2, "layer", H, H, places, places, 1.0)


def by_loops(heads: Tensor, values: Tensor | None, positions: tuple[int, ...] | None, first: list[int]) -> Tensor:
    """`first` is the text position of each text's first token; those below 0 are padding."""
    out = heads.clone()
    for b in range(B):
        for i in range(N):
            place = first[b] + i
            if place < 0 or (positions is not None and place not in positions):
                continue
            if values is None:
                out[b, :, i] = 0.0
            elif place < values.shape[2]:
                out[b, :, i] = values[b if len(values) > 1 else 0, :, place]
    return out


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("long", [3, 5, 9])
@pytest.mark.parametrize("positions", [None, (0, 3), (2, 4, 7)])
def test_values_come_from_the_same_text_position(rows: int, long: int, positions: tuple[int, ...] | None) -> None:
    heads, values = draw(0, B, H, N, D), draw(1, rows, H, long, D)
    for start, pad in ((0, None), (0, PAD), (2, None), (3, PAD)):
        first = [start - (0 if pad is None else int(pad[b])) for b in range(B)]
        found = Patch(Fitted({"1": values}), positions).put(heads, call(start=start, pad=pad))
        assert torch.equal(found, by_loops(heads, values, positions, first))


def test_without_values_or_a_layer_in_them_there_are_zeros() -> None:
    heads = draw(0, B, H, N, D)
    for method in (Patch(), Patch(positions=(1, 4)), Patch(Fitted({"0": draw(1, B, H, N, D)}))):
        found = method.put(heads, call(pad=PAD))
        assert torch.equal(found, by_loops(heads, None, method.positions, [0, -2]))
    assert Patch(positions=()).idle(call())
    assert not Patch().idle(call())
    assert not Patch(positions=(0,)).idle(call())


@pytest.mark.parametrize("shape", [(B, H + 1, N, D), (B, H, N, D + 1), (B + 1, H, N, D), (H, N, D)])
def test_values_of_another_model_or_batch_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FieldError, match="values of a run of the same model and batch"):
        Patch(Fitted({"1": draw(1, *shape)})).put(draw(0, B, H, N, D), call())


def test_positions_count_from_0() -> None:
    assert Patch(positions=(0,)).positions == (0,)
    with pytest.raises(FieldError, match="each must be 0 or more"):
        Patch(positions=(2, -1))


def test_zeros_at_every_place_go_into_weights_and_nothing_else_does() -> None:
    model = models.tiny("llama")
    there = Fitted({"0": torch.randn(1, 4, N, 8)})
    plain = fold(model, Patch(there).on(layers=1))
    assert not plain.model.layers[1].self_attn.o_proj.weight.any()
    assert torch.equal(fold(model, Patch(positions=())).lm_head.weight, model.lm_head.weight)
    for patch in (Patch(there), Patch(positions=(1,))):
        with pytest.raises(FoldError, match="at HEAD_OUTPUT cannot go into the weights"):
            fold(model, patch.on(layers=0))


def test_tokens_that_stand_alike_in_every_head_are_patched_as_if_told_once() -> None:
    x, place = torch.randn(2, 4, 5, 3), torch.arange(5).view(1, 1, 5)
    values, told = Fitted({"0": torch.randn(1, 4, 4, 3)}), call(layer=0)
    wanted = patched(x, place, values, (1, 3, 4), told)
    assert torch.equal(patched(x, place.expand(1, 2, 5), values, (1, 3, 4), told), wanted)
    assert torch.equal(wanted[:, :, [1, 3]], values["0"][:, :, [1, 3]].expand(2, -1, -1, -1))
