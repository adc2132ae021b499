"""TrimmedLlama against the first cross-attention's map, and a decoder whose later layers are shown a masked encoder."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, InactiveWarning
from heedful.core.mask import Dense
from heedful.methods import TrimmedLlama


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny("bart", decoder_layers=3, attn_implementation="eager")


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, Tensor]:
    return models.tiny_inputs(model, batch=3, length=12)


def wanted(weights: Tensor, share: float, queries: list[int]) -> list[int]:
    """The union over heads of each one's best columns, of a map `[h q k]`."""
    union: set[int] = set()
    for head in weights:
        given = [sum(float(head[i, j]) for i in queries) for j in range(head.shape[1])]
        order = sorted(range(len(given)), key=lambda j: -given[j])
        union |= set(order[: math.ceil(share * len(given))])
    return sorted(union)


class _Shown(nn.Module):
    """A cross-attention that is handed fewer of the encoder's states."""

    def __init__(self, inner: nn.Module, kept: list[int]) -> None:
        super().__init__()
        self.inner, self.kept = inner, kept

    def forward(self, hidden_states: Tensor, key_value_states: Tensor, **more: Any) -> Any:
        more = {k: v for k, v in more.items() if k not in ("attention_mask", "past_key_values", "cache")}
        return self.inner(hidden_states, key_value_states=key_value_states[:, self.kept], **more)


@torch.no_grad()
def by_hand(model: Any, ids: Tensor, decoder: Tensor, share: float, prompt: int | None = None) -> Tensor:
    """Logits of one text, `[q v]`, and the features that its prompt wants."""
    prompt = len(decoder) if prompt is None else prompt
    how = {"input_ids": ids[None], "decoder_input_ids": decoder[None], "use_cache": False}
    first = model(**how, output_attentions=True).cross_attentions[0][0]
    kept = wanted(first, share, list(range(prompt)))
    layers = model.model.decoder.layers
    whole = [layer.encoder_attn for layer in layers]
    try:
        for layer in layers[1:]:
            layer.encoder_attn = _Shown(layer.encoder_attn, kept)
        return model(**how).logits[0]
    finally:
        for layer, attention in zip(layers, whole, strict=True):
            layer.encoder_attn = attention


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.3])
@torch.no_grad()
def test_later_layers_see_what_the_heads_of_the_first_want(model: Any, inputs: Any, share: float) -> None:
    with heedful.attach(model, TrimmedLlama(share)) as run:
        found = run(**inputs).logits
    for row in range(3):
        assert close_model(
            found[row], by_hand(model, inputs["input_ids"][row], inputs["decoder_input_ids"][row], share)
        )


@torch.no_grad()
def test_what_the_prompt_wanted_holds_for_what_is_decoded(model: Any, inputs: Any) -> None:
    ids, decoder = inputs["input_ids"], inputs["decoder_input_ids"]
    with heedful.attach(model, TrimmedLlama(0.1)) as run:
        out = run(input_ids=ids, decoder_input_ids=decoder[:, :9], use_cache=True)
        found = []
        for i in range(9, 12):
            states = out.encoder_last_hidden_state
            out = run(encoder_outputs=(states,), decoder_input_ids=decoder[:, i : i + 1], **{CACHE: cache_of(out)})
            found.append(out.logits[:, 0])
    for row in range(3):
        want = by_hand(model, ids[row], decoder[row], 0.1, prompt=9)[9:]
        assert close_model(torch.stack([x[row] for x in found]), want)


@torch.no_grad()
def test_padding_is_wanted_by_nobody(model: Any, inputs: Any) -> None:
    ids, decoder = inputs["input_ids"][:1], inputs["decoder_input_ids"][:1]
    padded = torch.cat([ids, torch.zeros_like(ids[:, :5])], 1)
    mask = (torch.arange(17) < 12).long()[None]
    with heedful.attach(model, TrimmedLlama(0.06)) as run:  # one of 12, and not two of 17
        found = run(input_ids=padded, attention_mask=mask, decoder_input_ids=decoder).logits[0]
    assert close_model(found, by_hand(model, ids[0], decoder[0], 1 / 12))


def test_a_feature_that_some_token_may_not_see_is_there_all_the_same() -> None:
    table = torch.ones(1, 1, 4, 12, dtype=torch.bool)
    table[:, :, 0, 6:] = False
    bare = Bare(Shape(b=2, h=1, g=1, q=4, k=12), rules=(Dense(table),))
    call = replace(bare.call, cross=True, query=bare.q, key=bare.k)
    TrimmedLlama(0.3).trim(call.mask, call)
    assert call.state.forward["kept"].sum(-1).tolist() == [4, 4]


@torch.no_grad()
def test_padding_of_the_decoder_wants_nothing(model: Any, inputs: Any) -> None:
    ids, decoder = inputs["input_ids"][:1], inputs["decoder_input_ids"][:1]
    padded = torch.cat([decoder[:, :6], decoder[:, :6]], 1)
    mask = (torch.arange(12) < 6).long()[None]
    with heedful.attach(model, TrimmedLlama(0.1)) as run:
        found = run(input_ids=ids, decoder_input_ids=padded, decoder_attention_mask=mask).logits[0, :6]
    assert close_model(found, by_hand(model, ids[0], decoder[0, :6], 0.1))


def test_defaults_and_wrong_fields(model: Any, inputs: Any) -> None:
    assert TrimmedLlama().share == 0.25
    for share in (0.0, -1.0, 1.1):
        with pytest.raises(FieldError, match=r"TrimmedLlama\.share"):
            TrimmedLlama(share)
    idle = pytest.warns(InactiveWarning, match="which was idle")
    with idle, torch.no_grad(), heedful.attach(model, TrimmedLlama(1.0)) as run:
        found = run(**inputs).logits
    assert torch.equal(found, model(**inputs).logits)
