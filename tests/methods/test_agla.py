"""AGLA against a sum by hand with a prompt that holds the relevant tokens alone, each in its own place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import Prompt, decode, models
from heedful.api import reader
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.methods import AGLA
from heedful.methods.intervene.vision._against import LITTLE, PROMPT
from heedful.shown import Shown
from heedful.text_models import Combined

from .test_carve import IMAGE, PLACES, llava, logits_of


@pytest.fixture(scope="module")
def model() -> Any:
    return llava()


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, Tensor]:
    return models.tiny_inputs(model, length=22, batch=1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("alpha", "beta", "share", "count"),
    [(2.0, 0.5, 0.5, 8), (0.5, 0.0, 0.3, 5), (1.0, 0.9, 0.01, 1), (3.0, 0.0, 0.9, 15)],
)
def test_the_relevant_part_is_added(
    model: Any, inputs: Any, alpha: float, beta: float, share: float, count: int
) -> None:
    ids, pixels = inputs["input_ids"][0], inputs["pixel_values"]
    maps = model(input_ids=ids[None], pixel_values=pixels, output_attentions=True).attentions
    given = {i: sum(float(head[-1, i]) for layer in maps for head in layer[0]) for i in PLACES}
    kept = sorted(sorted(PLACES, key=lambda i: -given[i])[:count])
    prompt = Prompt(tuple(ids.tolist()), {"image": IMAGE})
    method = AGLA(alpha, beta, share)
    with Combined(model, method, shown=Shown({"pixel_values": pixels})) as voice:
        found, after = voice.read(prompt)[0], voice.go_on(7)
    for logits, tokens in ((found, ids), (after, torch.cat([ids, torch.tensor([7])]))):
        whole = model(input_ids=tokens[None], pixel_values=pixels).logits[0, -1]
        local = logits_of(model, tokens, pixels, kept)
        floor = float(whole.max()) + (math.log(beta) if beta else -math.inf)
        both = zip(whole.tolist(), local.tolist(), strict=True)
        wanted = torch.tensor([x + alpha * y if x >= floor else -math.inf for x, y in both])
        assert torch.equal(logits.isinf(), wanted.isinf())
        assert close_model(logits[logits.isfinite()], wanted[wanted.isfinite()])
    told = decode(model, prompt, method, new_tokens=1, inputs={"pixel_values": pixels})
    assert told[0] == int(found.argmax())


def test_what_is_told_is_not_looked_for(model: Any, inputs: Any) -> None:
    def read(*_: Any) -> Any:
        raise AssertionError("nothing need be read")

    prompt = Prompt(tuple(inputs["input_ids"][0].tolist()), {"image": IMAGE})
    known = AGLA(hidden=(3, 8), within=(2, 3))
    assert known.ready(prompt, read) is known
    assert list(known.variants(prompt)) == [PROMPT, LITTLE]
    assert AGLA.neutral().ready(prompt, read) == AGLA.neutral()
    empty = Prompt(prompt.tokens, {"image": ()})
    for quiet in (AGLA.neutral(), AGLA(hidden=()), AGLA().ready(empty, read), AGLA(alpha=0.0, hidden=(3,))):
        assert list(quiet.variants(prompt)) == [PROMPT]
    logits = torch.tensor([0.0, -9.0])
    assert torch.equal(AGLA().combine({PROMPT: logits}), logits)
    assert AGLA().combine({PROMPT: logits.half(), LITTLE: logits.half()}).dtype is torch.float32
    told = AGLA().ready(prompt, reader(model, inputs={"pixel_values": inputs["pixel_values"]}))
    assert isinstance(told, AGLA)
    assert told.within == (2, 3, 4)  # behind the encoder's two layers
    assert told.hidden is not None
    assert len(told.hidden) == 8
    with pytest.raises(FieldError, match="no spans named 'image'"):
        AGLA().ready(Prompt(prompt.tokens), read)


def test_defaults_and_wrong_fields() -> None:
    method = AGLA()
    assert (method.alpha, method.beta, method.share, method.hidden) == (2.0, 0.5, 0.5, None)
    for name, wrong in (("alpha", -1.0), ("beta", 1.1), ("share", 0.0), ("share", 1.1)):
        with pytest.raises(FieldError, match=rf"AGLA\.{name} = "):
            AGLA(**{name: wrong})
