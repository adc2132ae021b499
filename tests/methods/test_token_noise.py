"""TokenNoise: noise on marked tokens, the same however a text is cut, and what patching makes of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.explaining.activation_patching import patching
from heedful.methods.explain.token_noise import TokenNoise
from tests.samples import PAPER

SPANS = ((2, 4), (6, 7))
ROLES = {"marked": SPANS}


class Embedded(heedful.Method):
    """Keeps what enters the first layer."""

    paper = PAPER

    @heedful.authoring.reads(heedful.Site.EMBEDDING)
    def keep(self, x: Tensor, call: heedful.Call) -> Any:
        return heedful.core.stats.Cat.of("x", x)


def ids(n: int = 9) -> Tensor:
    return torch.randint(3, 127, (2, n), generator=torch.Generator().manual_seed(0))


def noise(seed: int, place: int, width: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed * 1_000_003 + place))


@torch.no_grad()
def added(method: TokenNoise, roles: Any = ROLES, pad: int = 0) -> Tensor:
    """What comes to the embeddings of two texts, padding in front of them."""
    model = models.tiny("llama")
    text = torch.cat([torch.zeros(2, pad, dtype=torch.long), ids()], 1)
    mask = torch.cat([torch.zeros(2, pad), torch.ones(2, 9)], 1)
    with heedful.attach(model, method | Embedded(), roles=roles) as run:
        run(input_ids=text, attention_mask=mask)
    (stat,) = run[Embedded()].values()
    return stat.value[0] - model.get_input_embeddings()(text)


@pytest.mark.parametrize(("size", "seed"), [(2.0, 0), (0.5, 3)])
def test_marked_tokens_get_noise_of_their_own(size: float, seed: int) -> None:
    found = added(TokenNoise(size, seed=seed))
    want = torch.zeros_like(found)
    for place in (2, 3, 6):
        want[:, place] = size * noise(seed, place, found.shape[-1])
    assert close_model(found, want)
    assert want.std() > 0.1
    assert not close_model(found, added(TokenNoise(size, seed=seed + 1)))


def test_padding_moves_no_noise() -> None:
    found = added(TokenNoise(1.0), pad=3)
    assert close_model(found[:, 3:], added(TokenNoise(1.0)))
    assert not found[:, :3].any()


def test_each_text_has_its_own_spans() -> None:
    found = added(TokenNoise(1.0), [{"marked": ((1, 2),)}, {"marked": ((1, 3),)}])
    assert (found != 0).any(-1).nonzero().tolist() == [[0, 1], [1, 1], [1, 2]]
    assert close_model(found[0, 1], found[1, 1])


@torch.no_grad()
def test_the_logits_are_those_of_such_embeddings() -> None:
    model, text = models.tiny("llama"), ids()
    x = model.get_input_embeddings()(text).clone()
    for place in (2, 3, 6):
        x[:, place] += 3 * noise(1, place, x.shape[-1])
    with heedful.attach(model, TokenNoise(3.0, seed=1), roles=ROLES) as run:
        found = run(input_ids=text).logits
        cache = cache_of(run(input_ids=text[:, :3], use_cache=True))
        later = run(input_ids=text[:, 3:], **{CACHE: cache}).logits
    assert close_model(found, model(inputs_embeds=x).logits)
    assert close_model(later, found[:, 3:])


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 50] - logits[:, -1, 60]


@pytest.mark.parametrize("estimate", [False, True])
def test_patching_brings_back_what_noise_took(estimate: bool) -> None:
    """Against patching from the run whose embeddings are noised by hand."""
    model, text = models.tiny("llama"), ids()
    method = TokenNoise(1.0)
    hidden = {"input_ids": text, "roles": ROLES}
    found = patching(model, text, hidden, metric, under=method, estimate=estimate)
    x = model.get_input_embeddings()(text).detach().clone()
    for place in (2, 3, 6):
        x[:, place] += noise(0, place, x.shape[-1])
    with torch.no_grad():
        assert found.clean == pytest.approx(float(metric(model(input_ids=text).logits).mean()), rel=1e-4)
        assert found.corrupt == pytest.approx(float(metric(model(inputs_embeds=x).logits).mean()), rel=1e-4)
    table = torch.nn.Embedding(20, x.shape[-1])  # the same words, and those that noise makes of them
    words = torch.arange(18).view(2, 9)
    other = models.tiny("llama")
    clean = other.get_input_embeddings()(text).detach()
    table.weight.data = torch.cat([clean.flatten(0, 1), x.flatten(0, 1)])
    table = table.requires_grad_(False)
    other.set_input_embeddings(table)
    want = patching(other, words, words + 18, metric, estimate=estimate)
    assert close_model(found.share, want.share)


def test_patching_takes_pictures() -> None:
    model = models.tiny("llava")
    inputs = models.tiny_inputs(model, length=24)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    found = patching(model, inputs, other, metric)
    with torch.no_grad():
        assert found.clean == pytest.approx(float(metric(model(**inputs).logits).mean()), rel=1e-4)
        assert found.corrupt == pytest.approx(float(metric(model(**other).logits).mean()), rel=1e-4)
    assert not close(found.share.nan_to_num(0.0)[:2], torch.zeros_like(found.share[:2]))


def test_no_noise_is_none() -> None:
    assert TokenNoise.neutral().size == 0
    assert TokenNoise().role == "marked"
    assert TokenNoise().size == 1
    assert TokenNoise().seed == 0


@pytest.mark.parametrize("fields", [{"size": -0.1}, {"size": math.inf}, {"role": ""}, {"seed": -1}])
def test_fields_that_say_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(FieldError, match=next(iter(fields))):
        TokenNoise(**fields)
