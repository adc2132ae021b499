"""LOCATEdit: a map made even by a system of equations that loops write down, over layers, forwards and a threshold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods.intervene.diffusion.locat_edit import LOCATEdit

from .painter import Painter, inputs

LAYERS = tuple(f"model.decoder.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "encoder_attn"))
ROLES = {"marked": ((1, 2), (3, 5))}
N = 6


def _even(words: Tensor, places: Tensor, evenness: float, steepness: float, middle: float) -> Tensor:
    """By loops, of one picture's map `[n]` and self-attention `[n n]`: what makes the sum of both terms least."""
    n = len(words)
    matrix, right = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, 1, dtype=torch.float64)
    for i in range(n):
        say = 1 / (1 + math.exp(-steepness * (float(words[i]) - middle)))
        matrix[i, i] += say**2
        right[i] = say**2 * float(words[i])
        for j in range(n):
            edge = (float(places[i, j]) + float(places[j, i])) / 2
            matrix[i, i] += evenness * edge
            matrix[i, j] -= evenness * edge
    return (matrix.inverse() @ right)[:, 0]


def _given(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (2, N), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


@pytest.mark.parametrize("layers", [None, (0, 1), (0, 3), (1, 2, 3)])
@pytest.mark.parametrize("settings", [(0.78, 2.61, 0.4858), (3.0, 9.0, 0.1), (0.0, 2.61, 0.4858)])
def test_a_map_is_made_even_along_the_mean_of_self_attention(
    layers: tuple[int, ...] | None, settings: tuple[float, float, float]
) -> None:
    model = models.tiny("bart", attn_implementation="eager").eval()
    evenness, steepness, middle = settings
    method = LOCATEdit(evenness=evenness, steepness=steepness, middle=middle)
    part = method if layers is None else method.on(layers=layers)
    with torch.no_grad(), attach(model, part, roles=ROLES, only=LAYERS) as run:
        seen = [run(**_given(seed), output_attentions=True) for seed in range(2)]
        found = run[part]
    assert len(found) == 2
    for maps, out in zip(found, seen, strict=True):
        chosen = layers or (0, 1, 2, 3)
        own = [out.decoder_attentions[i // 2].mean(1) for i in chosen if i % 2 == 0]
        cross = [out.cross_attentions[i // 2].mean(1) for i in chosen if i % 2 == 1]
        for b in range(2):
            words = sum(x[b, :, 1] + x[b, :, 3] + x[b, :, 4] for x in cross) / len(cross)
            places = sum(x[b] for x in own) / len(own)
            assert close_model(maps[b], _even(words, places, *settings).float())
            if evenness == 0:
                assert close_model(maps[b], words)
            else:
                assert not close_model(maps[b], words)


def test_the_settings_are_the_authors() -> None:
    method = LOCATEdit()
    assert (method.evenness, method.steepness, method.middle, method.threshold) == (0.78, 2.61, 0.4858, 0.3)


def test_pieces_that_hang_together_become_even() -> None:
    """With a strong graph of two pieces, each has one value: the mean of what its places say."""
    words = torch.tensor([[0.9, 0.5, 0.1, 0.0, 0.3]], dtype=torch.float64)
    places = torch.zeros(1, 5, 5, dtype=torch.float64)
    places[0, :3, :3], places[0, 3:, 3:] = 1 / 3, 1 / 2
    found = LOCATEdit(evenness=1e7, steepness=0.0).refined(words, places)
    want = torch.tensor([[0.5, 0.5, 0.5, 0.15, 0.15]])
    assert close(found.float(), want)


def test_a_mask_is_of_the_sum_of_maps_between_its_lowest_and_its_highest() -> None:
    maps = [torch.tensor([[0.0, 1.0, 4.0, 2.0], [5.0, 6.0, 5.0, 9.0]]), torch.tensor([[1.0, 1.0, 7.0, 2.0], [0.0] * 4])]
    # sums from 1 to 11 and from 5 to 9: above 4 and above 6.2
    assert LOCATEdit().mask(maps).tolist() == [[False, False, True, False], [False, False, False, True]]
    assert LOCATEdit(threshold=0.25).mask(maps).tolist() == [[False, False, True, True], [False, False, False, True]]
    assert LOCATEdit(threshold=0.0).mask(maps).tolist() == [[False, True, True, True], [False, True, False, True]]
    assert not LOCATEdit(threshold=1.0).mask(maps).any()


def test_each_text_has_words_of_its_own() -> None:
    model = models.tiny("bart", attn_implementation="eager").eval()
    roles = [{"marked": ((0, 2),)}, {"marked": ((4, 5),)}]
    with torch.no_grad(), attach(model, LOCATEdit(evenness=0.0), roles=roles, only=LAYERS) as run:
        out = run(**_given(), output_attentions=True)
        (maps,) = run[LOCATEdit(evenness=0.0)]
    cross = sum(x.mean(1) for x in out.cross_attentions) / 2
    assert close(maps, torch.stack([cross[0, :, 0] + cross[0, :, 1], cross[1, :, 4]]))


def test_layers_of_unlike_places_do_not_mix() -> None:
    given = inputs()
    with (
        attach(Painter(halves=1), LOCATEdit(), roles=ROLES, inputs=given) as run,
        pytest.raises(FieldError, match="layer 1 has 6 places, and layers before it 12"),
    ):
        run(**given)
    with pytest.raises(FieldError, match="cross-attention has 4 places, and self-attention 5"):
        LOCATEdit().both(torch.zeros(1, 4), torch.zeros(1, 5, 5))


def test_errors() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"role": ""}, "LOCATEdit.role = '': must name a role"),
        ({"evenness": -1.0}, "LOCATEdit.evenness = -1.0: must be 0 or more"),
        ({"steepness": float("inf")}, "LOCATEdit.steepness = inf: must be 0 or more"),
        ({"middle": 1.1}, "LOCATEdit.middle = 1.1: must lie from 0 to 1"),
        ({"threshold": -0.1}, "LOCATEdit.threshold = -0.1: must lie from 0 to 1"),
    )
    for settings, match in cases:
        with pytest.raises(FieldError, match=match):
            LOCATEdit(**settings)
