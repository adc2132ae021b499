"""DAMRO against a contrast by hand with a prompt that holds the outliers alone, each in its own place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import Prompt, decode, models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.methods import DAMRO
from heedful.methods.intervene.vision._against import LITTLE, PROMPT
from heedful.shown import Shown
from heedful.text_models import Combined

IMAGE = ((1, 17),)


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny("llava", attn_implementation="eager", vision_config={"image_size": 16}, image_seq_length=16)


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, Tensor]:
    return models.tiny_inputs(model, length=22, batch=1)


def outliers(weights: Tensor, count: int) -> list[int]:
    """The patches that the class token gives most to, of maps `[h n n]`."""
    given = [sum(float(head[0, 1 + j]) for head in weights) for j in range(16)]
    return sorted(sorted(range(16), key=lambda j: -given[j])[:count])


def logits_of(model: Any, tokens: Tensor, pixels: Tensor, kept: list[int], layer: int) -> Tensor:
    """The last token's, where behind an encoder's layer there are these patches alone."""
    inner, tower = model.model, model.model.vision_tower
    read = tower(pixels, output_hidden_states=True).hidden_states
    if layer == 0:  # the encoder's second layer sees the chosen alone as well
        x = tower.encoder.layers[1](read[1][:, [0, *(1 + j for j in kept)]], attention_mask=None)
        x = x[0] if isinstance(x, tuple) else x
        shown = inner.multi_modal_projector(x[:, 1:])
    else:
        shown = inner.multi_modal_projector(read[-1][:, [1 + j for j in kept]])
    embeds = inner.language_model.embed_tokens(tokens[None])
    embeds = torch.cat([embeds[:, :1], shown, embeds[:, 17:]], 1)
    places = torch.tensor([[0, *(1 + j for j in kept), *range(17, len(tokens))]])
    out = inner.language_model(inputs_embeds=embeds, position_ids=places)
    return model.lm_head(out.last_hidden_state[0, -1])


@torch.no_grad()
@pytest.mark.parametrize(
    ("alpha", "beta", "count", "layer"), [(1.0, 0.1, 3, 1), (2.0, 0.0, 1, 1), (0.5, 0.6, 10, 1), (1.0, 0.0, 4, 0)]
)
def test_the_outliers_alone_are_contrasted(model: Any, inputs: Any, alpha: float, beta: float, count: int, layer: int):
    ids, pixels = inputs["input_ids"][0], inputs["pixel_values"]
    maps = model.model.vision_tower(pixels, output_attentions=True).attentions
    kept = outliers(maps[layer][0], count)
    prompt = Prompt(tuple(ids.tolist()), {"patches": IMAGE, "image": IMAGE})
    with Combined(model, DAMRO(alpha, beta, count, layer), shown=Shown({"pixel_values": pixels})) as voice:
        found, after = voice.read(prompt)[0], voice.go_on(7)
    for logits, tokens in ((found, ids), (after, torch.cat([ids, torch.tensor([7])]))):
        whole = model(input_ids=tokens[None], pixel_values=pixels).logits[0, -1]
        little = logits_of(model, tokens, pixels, kept, layer)
        floor = float(whole.max()) + (math.log(beta) if beta else -math.inf)
        both = zip(whole.tolist(), little.tolist(), strict=True)
        wanted = torch.tensor([(1 + alpha) * x - alpha * y if x >= floor else -math.inf for x, y in both])
        assert torch.equal(logits.isinf(), wanted.isinf())
        assert close_model(logits[logits.isfinite()], wanted[wanted.isfinite()])
    method = DAMRO(alpha, beta, count, layer)
    assert decode(model, prompt, method, new_tokens=1, inputs={"pixel_values": pixels})[0] == int(found.argmax())


def test_no_contrast_is_one_run() -> None:
    prompt = Prompt((1, 2, 3), {"patches": ((1, 2),), "image": ((1, 2),)})
    assert list(DAMRO.neutral().variants(prompt)) == [PROMPT]
    told = DAMRO().variants(prompt)
    assert list(told) == [PROMPT, LITTLE]
    assert not told[PROMPT][1].methods
    assert told[LITTLE][0] == prompt
    logits = torch.tensor([0.0, -9.0])
    assert torch.equal(DAMRO.neutral().combine({PROMPT: logits}), logits)


def test_defaults_and_wrong_fields() -> None:
    method = DAMRO()
    assert (method.alpha, method.beta, method.count, method.layer) == (2.0, 0.1, 10, 22)
    assert (DAMRO(count=1).count, DAMRO(layer=0).layer) == (1, 0)
    for settings, match in (
        ({"count": 0}, r"DAMRO\.count = 0"), ({"layer": -1}, r"DAMRO\.layer = -1"), ({"alpha": -1.0}, r"DAMRO\.alpha"),
        ({"beta": 1.1}, r"DAMRO\.beta"),
    ):  # fmt: skip
        with pytest.raises(FieldError, match=match):
            DAMRO(**settings)
