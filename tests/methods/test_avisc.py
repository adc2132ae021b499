"""AvisC against the authors' steps in loops, on a model of text and on one of images, token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import Prompt, decode, models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.methods import AvisC
from heedful.methods.intervene.vision._against import LITTLE, PROMPT
from heedful.shown import Shown
from heedful.text_models import Combined

SPANS = ((1, 5), (7, 15))
PLACES = [i for a, b in SPANS for i in range(a, b)]
TOKENS = (5, 9, 31, 9, 7, 8, 40, 31, 12, 3, 77, 50, 4, 19, 28, 61, 90, 33)


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny("llama", num_hidden_layers=4, attn_implementation="eager")


def blind(rows: list[list[float]], gamma: float, deviations: float) -> list[int]:
    """Numbers of the tokens of highest weight, of what each layer gives to each."""
    whole = sum(map(sum, rows))
    order = sorted(range(len(rows)), key=lambda i: -sum(rows[i]))
    chosen, share = [], 0.0
    for i in order:
        chosen.append(i)
        share += sum(rows[i]) / whole
        if share >= gamma:
            break
    n = len(rows[0])
    mean = [sum(rows[i][j] for i in chosen) / len(chosen) for j in range(n)]
    middle = sum(mean) / n
    spread = math.sqrt(sum((x - middle) ** 2 for x in mean) / (n - 1))
    return [j for j in range(n) if mean[j] >= middle + deviations * spread]


def rows_of(maps: Any, places: list[int], last: int) -> list[list[float]]:
    return [[sum(float(head[last, j]) for head in layer[0]) / layer.shape[1] for j in places] for layer in maps]


def mixed(whole: Tensor, little: Tensor, alpha: float, beta: float) -> Tensor:
    floor = max(whole.tolist()) + (math.log(beta) if beta else -math.inf)
    both = zip(whole.tolist(), little.tolist(), strict=True)
    return torch.tensor([(1 + alpha) * x - alpha * y if x >= floor else -math.inf for x, y in both])


@torch.no_grad()
@pytest.mark.parametrize(
    ("alpha", "beta", "gamma", "deviations"),
    [(1.0, 0.1, 0.5, 1.0), (2.5, 0.0, 0.2, 0.3), (0.5, 0.6, 0.9, -0.5), (1.0, 0.02, 1.0, 9.0)],
)
def test_the_authors_steps(model: Any, alpha: float, beta: float, gamma: float, deviations: float) -> None:
    maps = model(torch.tensor([TOKENS]), output_attentions=True).attentions
    stares = blind(rows_of(maps, PLACES, len(TOKENS) - 1), gamma, deviations)
    gone = [place for j, place in enumerate(PLACES) if j not in stares]
    assert len(gone) == 12 if deviations == 9.0 else 0 < len(gone) < 12
    tokens = list(TOKENS)
    method = AvisC(alpha, beta, gamma, deviations)
    with Combined(model, method) as voice:
        found = voice.read(Prompt(TOKENS, {"image": SPANS}))[0]
        for more in (17, 31, None):
            embeds = model.model.embed_tokens(torch.tensor([tokens])).clone()
            embeds[:, gone] = 0
            whole = model(torch.tensor([tokens])).logits[0, -1]
            wanted = mixed(whole, model(inputs_embeds=embeds).logits[0, -1], alpha, beta)
            assert torch.equal(found.isinf(), wanted.isinf())
            assert close_model(found[found.isfinite()], wanted[wanted.isfinite()])
            if more is not None:
                found = voice.go_on(more)
                tokens.append(more)


def test_layers_count_until_they_have_their_share() -> None:
    given = torch.tensor([[0.1, 0.1, 0.3], [0.2, 0.0, 0.0], [0.0, 0.3, 0.0]])  # shares 0.5, 0.2 and 0.3
    for gamma, wanted in ((0.4, [2]), (0.49, [2]), (0.75, [1, 2]), (0.95, [1])):
        assert AvisC(gamma=gamma, deviations=0.0).blind(given).nonzero().flatten().tolist() == wanted, gamma
        assert blind(given.tolist(), gamma, 0.0) == wanted
    assert AvisC(deviations=0.0).blind(torch.full((2, 4), 0.25)).all()  # a token at the bound is blind


@torch.no_grad()
def test_an_image_is_read_beside_the_prompt() -> None:
    model: Any = models.tiny(
        "llava", attn_implementation="eager", vision_config={"image_size": 16}, image_seq_length=16
    )
    inputs = models.tiny_inputs(model, length=22, batch=1)
    ids, pixels = inputs["input_ids"][0], inputs["pixel_values"]
    method = AvisC(gamma=0.4, deviations=0.2)
    prompt = Prompt(tuple(ids.tolist()), {"image": ((1, 17),)})
    with Combined(model, method, shown=Shown({"pixel_values": pixels})) as voice:
        found = voice.read(prompt)[0]
        after = voice.go_on(7)
    out = model(**inputs, output_attentions=True)
    stares = blind(rows_of(out.attentions, list(range(1, 17)), 21), 0.4, 0.2)
    gone = [1 + j for j in range(16) if j not in stares]
    assert 0 < len(gone) < 16
    inner = model.model
    states = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    for logits, tokens in ((found, ids), (after, torch.cat([ids, torch.tensor([7])]))):
        embeds = inner.language_model.embed_tokens(tokens[None]).clone()
        embeds[:, 1:17] = inner.multi_modal_projector(states[:, 1:])
        whole = model.lm_head(inner.language_model(inputs_embeds=embeds).last_hidden_state[0, -1])
        embeds[:, gone] = 0
        little = model.lm_head(inner.language_model(inputs_embeds=embeds).last_hidden_state[0, -1])
        wanted = mixed(whole, little, 1.0, 0.1)
        assert torch.equal(logits.isinf(), wanted.isinf())
        assert close_model(logits[logits.isfinite()], wanted[wanted.isfinite()])
    told = decode(model, prompt, method, new_tokens=2, inputs={"pixel_values": pixels})
    assert told[0] == int(found.argmax())


def test_what_is_told_is_not_looked_for(model: Any) -> None:
    def read(*_: Any) -> Any:
        raise AssertionError("nothing need be read")

    prompt = Prompt(TOKENS, {"image": SPANS})
    known = AvisC(emptied=(3, 8))
    assert known.ready(prompt, read) is known
    assert list(known.variants(prompt)) == [PROMPT, LITTLE]
    assert AvisC.neutral().ready(prompt, read) == AvisC.neutral()
    empty = Prompt(TOKENS, {"image": ()})
    for quiet in (AvisC.neutral(), AvisC(emptied=()), AvisC().ready(empty, read)):
        assert list(quiet.variants(prompt)) == [PROMPT]
    logits = torch.tensor([0.0, -9.0])
    assert torch.equal(AvisC().combine({PROMPT: logits}), logits)
    kept = AvisC(beta=1.0).combine({PROMPT: logits, LITTLE: torch.tensor([0.5, 7.0])})
    assert kept.tolist() == [-0.5, -math.inf]  # what is as likely as the bound stays
    assert AvisC().combine({PROMPT: logits.half(), LITTLE: logits.half()}).dtype is torch.float32
    with pytest.raises(FieldError, match="no spans named 'image'"):
        decode(model, Prompt(TOKENS), AvisC())


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": -0.1}, {"alpha": math.inf}, {"beta": -0.1}, {"beta": 1.1}, {"gamma": 0.0}, {"gamma": 1.1},
        {"role": ""},
    ],
)  # fmt: skip
def test_wrong_fields_are_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(FieldError, match=rf"AvisC\.{name} = "):
        AvisC(**settings)


def test_defaults() -> None:
    method = AvisC()
    assert (method.alpha, method.beta, method.gamma, method.deviations, method.role) == (1.0, 0.1, 0.5, 1.0, "image")


def test_the_only_token_of_an_image_is_not_emptied() -> None:
    assert AvisC().blind(torch.tensor([[0.3], [0.2]])).tolist() == [True]


def test_of_many_layers_that_look_alike_much_the_first_are_taken() -> None:
    given = torch.ones(30, 8)
    given[:10, 1] = given[10:, 5] = 9.0
    assert AvisC(gamma=0.3, deviations=1.0).blind(given).nonzero()[:, 0].tolist() == [1]
