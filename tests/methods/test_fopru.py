"""FoPru against sums in loops, and against a language model that is given the chosen patches alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, InactiveWarning
from heedful.core.regions import Region
from heedful.methods import FoPru
from heedful.methods.sparse.prefill.fopru import significance

PATCHES, TOKENS = 16, 22  # the image stands behind the first token of each prompt
ROLES = {"patches": Region(((1, 17),), (4, 4)), "image": ((1, 17),)}


@pytest.fixture(scope="module")
def model() -> Any:
    vision = {"image_size": 16}
    return models.tiny("llava", attn_implementation="eager", vision_config=vision, image_seq_length=PATCHES)


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, Tensor]:
    return models.tiny_inputs(model, length=TOKENS, batch=3)


def significant(weights: Tensor) -> list[float]:
    """Of each patch, from a map `[h n n]` with the class token first."""
    mean = [[sum(float(head[i, j]) for head in weights) / len(weights) for j in range(1, 17)] for i in range(1, 17)]
    given = [sum(row) / PATCHES for row in mean]
    received = [sum(row[j] for row in mean) / PATCHES for j in range(PATCHES)]

    def spread(x: list[float]) -> float:
        return sum((v - sum(x) / len(x)) ** 2 for v in x)

    return received if spread(received) > spread(given) else given


def top(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


@torch.no_grad()
def answers(model: Any, ids: Tensor, pixels: Tensor, kept: list[int]) -> Tensor:
    """The last token's logits, where a prompt has only these patches, each in its own place."""
    inner = model.model
    states = inner.vision_tower(pixels[None], output_hidden_states=True).hidden_states[-1]
    embeds = inner.language_model.embed_tokens(ids[None]).clone()
    embeds[:, 1:17] = inner.multi_modal_projector(states[:, 1:])
    places = torch.tensor([0, *(1 + i for i in kept), *range(17, len(ids))])
    out = inner.language_model(inputs_embeds=embeds[:, places], position_ids=places[None])
    return model.lm_head(out.last_hidden_state[0, -1])


@torch.no_grad()
def maps(model: Any, pixels: Tensor, layer: int = 1) -> Tensor:
    return model.model.vision_tower(pixels, output_attentions=True).attentions[layer]


@pytest.mark.parametrize(("share", "count"), [(0.25, 4), (0.3, 5), (0.01, 1), (0.9, 15)])
def test_a_language_model_sees_the_most_significant(model: Any, inputs: Any, share: float, count: int) -> None:
    with torch.no_grad(), heedful.attach(model, FoPru(layer=1, share=share), roles=ROLES) as run:
        found = run(**inputs).logits[:, -1]
    drawn = maps(model, inputs["pixel_values"])
    for row in range(3):
        kept = top(significant(drawn[row]), count)
        assert close_model(found[row], answers(model, inputs["input_ids"][row], inputs["pixel_values"][row], kept))


@pytest.mark.parametrize(("share", "count"), [(0.5, 2), (0.3, 2), (0.25, 1)])
def test_rows_stay_or_go_whole(model: Any, inputs: Any, share: float, count: int) -> None:
    with torch.no_grad(), heedful.attach(model, FoPru(layer=1, share=share, by="row"), roles=ROLES) as run:
        found = run(**inputs).logits[:, -1]
    drawn = maps(model, inputs["pixel_values"])
    for row in range(3):
        scores = significant(drawn[row])
        rows = top([sum(scores[4 * i : 4 * i + 4]) for i in range(4)], count)
        kept = [4 * i + j for i in rows for j in range(4)]
        assert close_model(found[row], answers(model, inputs["input_ids"][row], inputs["pixel_values"][row], kept))


def test_rows_of_a_grid_that_is_not_square() -> None:
    model = models.tiny("vit", image_size=[8, 16], attn_implementation="eager")
    pixels = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), heedful.attach(model, FoPru(layer=0, share=0.5, by="row")) as run:
        found = run(pixel_values=pixels).logits
    assert not torch.equal(found, model(pixel_values=pixels).logits)


def test_what_varies_more_counts() -> None:
    gets = torch.tensor([[[0.9, 0.0, 0.1], [0.8, 0.1, 0.1], [0.7, 0.1, 0.2]]])
    assert close_model(significance(gets), torch.tensor([[0.8, 0.2 / 3, 0.4 / 3]]))
    gives = gets.mT
    assert close_model(significance(gives), torch.tensor([[0.8, 0.2 / 3, 0.4 / 3]]))
    assert close_model(significance(torch.cat([gets, 2 * gives]))[1], 2 * significance(gives)[0])


@torch.no_grad()
def test_what_is_decoded_sees_the_same_patches(model: Any, inputs: Any) -> None:
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with heedful.attach(model, FoPru(layer=1), roles=ROLES) as run:
        cache = cache_of(run(**inputs, use_cache=True))
        more = torch.tensor([[7], [9], [11]])
        found = run(input_ids=more, **{CACHE: cache}).logits[:, -1]
    for row in range(3):
        kept = top(significant(maps(model, pixels)[row]), 4)
        assert close_model(found[row], answers(model, torch.cat([ids[row], more[row]]), pixels[row], kept))


def test_defaults_and_wrong_fields(model: Any, inputs: Any) -> None:
    assert (FoPru().layer, FoPru().share, FoPru().by) == (22, 0.25, "token")
    for settings, match in (
        ({"share": 0.0}, r"FoPru\.share = 0"), ({"share": 1.1}, r"FoPru\.share"), ({"by": "column"}, r"FoPru\.by"),
        ({"layer": -1}, r"FoPru\.layer = -1"),
    ):  # fmt: skip
        with pytest.raises(FieldError, match=match):
            FoPru(**settings)
    for grid in (None, (2, 2, 4)):
        roles = ROLES | {"patches": Region(((1, 17),), grid)}
        rows = heedful.attach(model, FoPru(layer=1, by="row"), roles=roles)
        with pytest.raises(FieldError, match="must have a grid of rows"), torch.no_grad(), rows as run:
            run(**inputs)
    idle = pytest.warns(InactiveWarning, match="which was idle")
    with idle, torch.no_grad(), heedful.attach(model, FoPru(layer=1, share=1.0), roles=ROLES) as run:
        found = run(**inputs).logits
    assert torch.equal(found, model(**inputs).logits)


def test_of_what_varies_as_much_what_is_given_counts() -> None:
    weights = torch.tensor([[[0.1, 0.1], [0.7, 0.1]]])
    assert torch.equal(significance(weights), weights.mean(2))
