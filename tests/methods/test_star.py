"""STAR against a language model that is given the chosen patches alone, fewer of them from some layer on."""

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
from heedful.methods import STAR

from .test_carve import llava

PATCHES, TOKENS = 16, 22  # the image stands behind the first token of each prompt
ROLES = {"patches": ((1, 17),), "image": ((1, 17),)}


@pytest.fixture(scope="module")
def model() -> Any:
    return llava()


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, Tensor]:
    return models.tiny_inputs(model, length=TOKENS, batch=3)


def top(scores: dict[int, float], count: int) -> list[int]:
    return sorted(sorted(scores, key=lambda i: -scores[i])[:count])


@torch.no_grad()
def by_hand(model: Any, ids: Tensor, pixels: Tensor, first: int, late: int, second: int, asked: int = 22) -> Tensor:
    """The last token's logits of one prompt, from `first` patches, and from `second` behind layer `late`."""
    inner, language = model.model, model.model.language_model
    tower = inner.vision_tower(pixels[None], output_attentions=True, output_hidden_states=True)
    drawn = tower.attentions[1][0]
    got = {j: sum(float(head[1 + i, 1 + j]) for head in drawn for i in range(PATCHES)) for j in range(PATCHES)}
    kept = top(got, first)
    x = language.embed_tokens(ids[None]).clone()
    x[:, 1:17] = inner.multi_modal_projector(tower.hidden_states[-1][:, 1:])
    places = [0, *(1 + i for i in kept), *range(17, len(ids))]
    x = x[:, places]
    for number, layer in enumerate(language.layers):
        n = len(places)
        hidden = torch.full((n, n), -1e9).triu(1)[None, None]
        turns = language.rotary_emb(x, torch.tensor([places]))
        if number == late:
            shown = layer.input_layernorm(x)
            weights = layer.self_attn(shown, position_embeddings=turns, attention_mask=hidden)[1][0]
            rows = [row for row in range(n) if places[row] in (0, *range(17, asked))]
            given = {j: float(weights[:, rows, 1 + at].sum()) for at, j in enumerate(kept)}
        out = layer(x, attention_mask=hidden, position_embeddings=turns)
        x = out[0] if isinstance(out, tuple) else out
        if number == late:
            kept = top(given, second)
            stays = [at for at, place in enumerate(places) if not 1 <= place < 17 or place - 1 in kept]
            x, places = x[:, stays], [places[at] for at in stays]
    return model.lm_head(language.norm(x))[0, -1]


@pytest.mark.parametrize(
    ("share", "first", "late", "late_share", "second"),
    [(0.5, 8, 0, 0.25, 2), (0.3, 5, 1, 0.5, 3), (1.0, 16, 0, 0.1, 2), (0.9, 15, 1, 0.2, 3), (0.5, 8, 0, 1.0, 8)],
)
def test_later_layers_see_what_the_text_looks_at(
    model: Any, inputs: Any, share: float, first: int, late: int, late_share: float, second: int
) -> None:
    method = STAR(layer=1, share=share, late=late, late_share=late_share)
    with torch.no_grad(), heedful.attach(model, method, roles=ROLES) as run:
        found = run(**inputs).logits[:, -1]
    for row in range(3):
        ids, pixels = inputs["input_ids"][row], inputs["pixel_values"][row]
        assert close_model(found[row], by_hand(model, ids, pixels, first, late, second))


@torch.no_grad()
def test_what_is_decoded_sees_the_same_patches(model: Any, inputs: Any) -> None:
    with heedful.attach(model, STAR(layer=1, late=1), roles=ROLES) as run:
        cache = cache_of(run(**inputs, use_cache=True))
        more = torch.tensor([[7], [9], [11]])
        found = run(input_ids=more, **{CACHE: cache}).logits[:, -1]
    for row in range(3):
        ids = torch.cat([inputs["input_ids"][row], more[row]])
        assert close_model(found[row], by_hand(model, ids, inputs["pixel_values"][row], 8, 1, 2, asked=22))


@torch.no_grad()
def test_padding_asks_nothing(model: Any, inputs: Any) -> None:
    ids, pixels = inputs["input_ids"][:2], inputs["pixel_values"][:2]
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    seen = torch.ones_like(padded)
    seen[:, :3] = 0
    with heedful.attach(model, STAR(layer=1, late=0), roles=ROLES) as run:
        found = run(input_ids=padded, attention_mask=seen, pixel_values=pixels).logits[:, -1]
    for row in range(2):
        assert close_model(found[row], by_hand(model, ids[row], pixels[row], 8, 0, 2))


def test_defaults_and_wrong_fields(model: Any, inputs: Any) -> None:
    method = STAR()
    assert (method.layer, method.share, method.late, method.late_share) == (22, 0.5, 16, 0.25)
    for settings, match in (
        ({"share": 0.0}, r"STAR\.share = 0"), ({"late": -1}, r"STAR\.late = -1"),
        ({"late_share": 0.0}, r"STAR\.late_share = 0"), ({"late_share": 1.1}, r"STAR\.late_share = 1\.1"),
    ):  # fmt: skip
        with pytest.raises(FieldError, match=match):
            STAR(**settings)
    idle = pytest.warns(InactiveWarning, match="which was idle")
    with idle, torch.no_grad(), heedful.attach(model, STAR(1, 1.0, 0, 1.0), roles=ROLES) as run:
        found = run(**inputs).logits
    assert torch.equal(found, model(**inputs).logits)
