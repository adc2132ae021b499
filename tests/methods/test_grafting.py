"""Grafting: locality of every layer in loops over the maps that a model gives out, and which layers are most local."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.core.errors import FieldError
from heedful.methods import Grafting
from heedful.methods.observe.grafting import Locality


def by_hand(maps: Tensor, band: int, pads: tuple[int, ...]) -> list[float]:
    """The share within 0, 1, ... `band` tokens, of a layer's maps `[b h n n]`."""
    out = []
    for k in range(band + 1):
        near = rows = 0.0
        for b, pad in enumerate(pads):
            for h in range(maps.shape[1]):
                for i in range(pad, maps.shape[2]):
                    rows += 1
                    near += sum(float(maps[b, h, i, j]) for j in range(maps.shape[3]) if abs(i - j) <= k)
        out.append(near / rows)
    return out


def seen(model: Any, band: int, *inputs: dict[str, Tensor]) -> Locality:
    with torch.no_grad(), attach(model, Grafting(band)) as run:
        for one in inputs:
            run(**one)
        found: Locality = run[Grafting(band)]
    return found


@pytest.mark.parametrize("band", [0, 2, 30])
@pytest.mark.parametrize("pads", [(0, 0), (0, 3)])
def test_of_texts(band: int, pads: tuple[int, int]) -> None:
    model = models.tiny("llama", num_hidden_layers=3, attn_implementation="eager")
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) >= torch.tensor(pads)[:, None]).long()
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        maps = model(**given, output_attentions=True).attentions
    found = seen(model, band, given, given)
    assert list(found.within) == [0, 1, 2]
    for layer in range(3):
        wanted = by_hand(maps[layer], band, pads)
        assert found.within[layer].tolist() == pytest.approx(wanted, abs=1e-5)
        assert found[layer] == pytest.approx(wanted[-1], abs=1e-5)


def test_of_images_to_both_sides() -> None:
    model = models.tiny("vit", image_size=16, attn_implementation="eager")
    given = models.tiny_inputs(model)
    with torch.no_grad():
        maps = model(**given, output_attentions=True).attentions
    found = seen(model, 3, given)
    for layer, one in enumerate(maps):
        assert found.within[layer].tolist() == pytest.approx(by_hand(one, 3, (0, 0)), abs=1e-5)


def test_new_tokens_do_not_count_and_other_sequences_neither() -> None:
    model = models.tiny("llama")
    given = models.tiny_inputs(model)
    with torch.no_grad(), attach(model, Grafting(2)) as run:
        run.generate(**given, max_new_tokens=4, do_sample=False)
        found = run[Grafting(2)]
    assert found.within[0].tolist() == pytest.approx(seen(model, 2, given).within[0].tolist())
    both = models.tiny("bart")
    assert len(seen(both, 2, models.tiny_inputs(both)).within) == 4  # of two layers on either side, none of cross


def test_the_most_local_layers() -> None:
    shares = {0: [0.1, 0.5], 1: [0.4, 0.9], 2: [0.3, 0.9], 3: [0.8, 0.85], 4: [0.0, 0.2]}
    found = Locality({layer: torch.tensor(x) for layer, x in shares.items()})
    assert found.most(0.2) == (1,)
    assert found.most(0.4) == (1, 2)
    assert found.most(0.79) == (1, 2, 3)
    assert found.most(0.01) == (1,)
    assert found.most(1) == (0, 1, 2, 3, 4)
    assert str(found) == "locality by layer: 0: 50%, 1: 90%, 2: 90%, 3: 85%, 4: 20%"
    for wrong in (0.0, 1.1, -0.1):
        with pytest.raises(FieldError, match="must lie above 0 and be at most 1"):
            found.most(wrong)


def test_what_it_shows() -> None:
    found = Locality({0: torch.tensor([0.1, 0.5]), 1: torch.tensor([0.4, 0.9])})
    told = Grafting(1).describe(found)
    (curves,) = told.figures
    assert curves.x == [0, 1]
    assert curves.lines["share"].tolist() == pytest.approx([0.5, 0.9])
    assert told.findings[0].text == "Layer 1 is the most local: 90% of its attention stays within 1 tokens."
    assert told.findings[0].weight == pytest.approx(0.09)


def test_settings() -> None:
    assert Grafting() == Grafting(32)
    assert Grafting(0).band == 0
    assert Grafting.example() == Grafting(2)
    with pytest.raises(FieldError, match=r"Grafting\.band = -1: must be 0 or more"):
        Grafting(-1)
