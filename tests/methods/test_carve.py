"""CARVE against contrasts in loops and a prompt that holds the tokens of high contrast alone, each in its own place."""

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
from heedful.methods import CARVE
from heedful.shown import Shown
from heedful.text_models import Combined

IMAGE, GENERAL = ((1, 17),), (9, 31, 4)
PLACES = list(range(1, 17))


def llava() -> Any:
    """A tiny one of 16 patches and three layers of text."""
    return models.tiny(
        "llava", attn_implementation="eager", vision_config={"image_size": 16}, image_seq_length=len(PLACES),
        text_config={"num_hidden_layers": 3},
    )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    return llava()


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, Tensor]:
    return models.tiny_inputs(model, length=22, batch=1)


def prompt_of(ids: Tensor) -> Prompt:
    return Prompt(tuple(ids.tolist()), {"image": IMAGE, "question": ((17, 20),)})


def contrasts(task: Any, general: Any, layers: list[int], smooth: float) -> list[float]:
    """From maps `[1 h n n]` of the language model's layers, read from their last rows."""
    total = [0.0] * len(PLACES)
    for layer in layers:
        each = [
            [sum(float(head[-1, j]) for head in maps[layer][0]) / len(maps[layer][0]) for j in PLACES]
            for maps in (task, general)
        ]
        total = [x + a / (g + smooth) for x, a, g in zip(total, *each, strict=True)]
    return total


def logits_of(model: Any, tokens: Tensor, pixels: Tensor, kept: list[int]) -> Tensor:
    """The last token's, where the prompt has only these patches, each in its own place."""
    inner = model.model
    embeds = inner.language_model.embed_tokens(tokens[None])
    shown = inner.multi_modal_projector(inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:])
    embeds = torch.cat([embeds[:, :1], shown[:, [i - 1 for i in kept]], embeds[:, 17:]], 1)
    places = torch.tensor([[0, *kept, *range(17, len(tokens))]])
    return model.lm_head(inner.language_model(inputs_embeds=embeds, position_ids=places).last_hidden_state[0, -1])


@torch.no_grad()
@pytest.mark.parametrize(
    ("share", "count", "smooth", "layers", "heard"),
    [
        (0.5, 8, 1e-8, None, [1, 2]),
        (0.3, 5, 1.0, (0,), [0]),
        (0.9, 15, 0.1, (2, 0), [0, 2]),
        (0.01, 1, 50.0, None, [1, 2]),
    ],
)
def test_tokens_of_low_contrast_are_not_seen(
    model: Any, inputs: Any, share: float, count: int, smooth: float, layers: tuple[int, ...] | None, heard: list[int]
) -> None:
    ids, pixels = inputs["input_ids"][0], inputs["pixel_values"]
    other = torch.cat([ids[:17], torch.tensor(GENERAL), ids[20:]])
    task, general = (
        model(input_ids=x[None], pixel_values=pixels, output_attentions=True).attentions for x in (ids, other)
    )
    total = contrasts(task, general, heard, smooth)
    kept = sorted(sorted(PLACES, key=lambda i: -total[i - 1])[:count])
    method = CARVE(GENERAL, share, smooth, layers)
    with Combined(model, method, shown=Shown({"pixel_values": pixels})) as voice:
        found, after = voice.read(prompt_of(ids))[0], voice.go_on(7)
    assert close_model(found, logits_of(model, ids, pixels, kept))
    assert close_model(after, logits_of(model, torch.cat([ids, torch.tensor([7])]), pixels, kept))
    told = decode(model, prompt_of(ids), method, new_tokens=1, inputs={"pixel_values": pixels})
    assert told[0] == int(found.argmax())


def test_what_is_told_is_not_looked_for(model: Any, inputs: Any) -> None:
    def read(*_: Any) -> Any:
        raise AssertionError("nothing need be read")

    prompt = prompt_of(inputs["input_ids"][0])
    known = CARVE(hidden=(3, 8), within=(2, 3))
    assert known.ready(prompt, read) is known
    ((name, (shown, stack)),) = known.variants(prompt).items()
    assert (name, shown) == ("prompt", prompt)
    assert stack.methods
    empty = Prompt(prompt.tokens, {"image": (), "question": ((17, 20),)})
    for quiet in (CARVE.neutral(), CARVE().ready(empty, read), CARVE(hidden=())):
        assert not quiet.variants(prompt)["prompt"][1].methods
    assert CARVE.neutral().ready(prompt, read) == CARVE.neutral()
    assert CARVE().combine({"prompt": torch.tensor([2.0])}).tolist() == [2.0]
    told = CARVE(GENERAL).ready(prompt, reader(model, inputs={"pixel_values": inputs["pixel_values"]}))
    assert isinstance(told, CARVE)
    assert told.within == (2, 3, 4)  # behind the encoder's two layers
    with pytest.raises(FieldError, match="no spans named 'question'"):
        CARVE().ready(Prompt(prompt.tokens, {"image": IMAGE}), read)
    with pytest.raises(FieldError, match=r"CARVE.question = \(\): must name tokens of the prompt"):
        CARVE().ready(Prompt(prompt.tokens, {"image": IMAGE, "question": ()}), read)
    with pytest.raises(FieldError, match="must be numbers of the language model's 3 layers"):
        CARVE(layers=(3,)).ready(prompt, reader(model, inputs={"pixel_values": inputs["pixel_values"]}))


@torch.no_grad()
@pytest.mark.parametrize("spans", [((1, 3),), ((0, 1), (3, 4), (20, 22))])
def test_a_question_before_the_image_moves_what_is_looked_at(model: Any, inputs: Any, spans: Any) -> None:
    ids, pixels = inputs["input_ids"][0], inputs["pixel_values"]
    ids = torch.cat([ids[:1], ids[17:20], ids[1:17], ids[20:]])  # the image now from 4 to 20
    prompt = Prompt(tuple(ids.tolist()), {"image": ((4, 20),), "question": spans})
    out = [i for span in spans for i in range(*span)]
    other = [int(x) for i, x in enumerate(ids) if i not in out]
    other = torch.tensor([*other[: out[0]], *GENERAL, *other[out[0] :]])
    begins = other.tolist().index(int(ids[4]))
    task, general = (
        model(input_ids=x[None], pixel_values=pixels, output_attentions=True).attentions for x in (ids, other)
    )
    moved = [x[:, :, :, start - 1 :] for maps, start in ((task, 4), (general, begins)) for x in maps]
    total = contrasts(moved[:3], moved[3:], [1, 2], 1e-8)
    kept = sorted(PLACES, key=lambda i: -total[i - 1])[:4]
    told = CARVE(GENERAL).ready(prompt, reader(model, inputs={"pixel_values": pixels}))
    assert isinstance(told, CARVE)
    assert told.hidden == tuple(i + 3 for i in PLACES if i not in kept)


def test_of_equal_contrast_the_first_stay() -> None:
    task = torch.tensor([[0.2, 0.2, 0.1], [0.1, 0.3, 0.2]])
    assert close_model(CARVE(smooth=0.1).contrast(task, task), torch.tensor([0.1 / 0.2, 0.3 / 0.4, 0.2 / 0.3]))
    both = CARVE(smooth=0.1, layers=(0, 1)).contrast(task, task)
    assert close_model(both, torch.tensor([0.2 / 0.3 + 0.1 / 0.2, 0.2 / 0.3 + 0.3 / 0.4, 0.1 / 0.2 + 0.2 / 0.3]))


def test_defaults_and_wrong_fields() -> None:
    method = CARVE()
    assert (method.general, method.share, method.smooth, method.layers, method.hidden) == ((0,), 0.2, 1e-8, None, None)
    assert CARVE(layers=(0,)).layers == (0,)
    for name, wrong in (
        ("general", ()), ("general", (-1,)), ("share", 0.0), ("share", 1.1), ("smooth", 0.0), ("smooth", math.inf),
        ("layers", ()), ("layers", (-1, 3)),
    ):  # fmt: skip
        with pytest.raises(FieldError, match=rf"CARVE\.{name} = "):
            CARVE(**{name: wrong})
