"""What a model is called with, what is explained of what it says, and which places are the strongest."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from heedful import models
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.explaining.aim import Aim, _causal, aim_of, batch_of, fed, fed_each, pairs, read_by, strongest

IDS = torch.tensor([[5, 17, 9, 88, 40, 23, 61]])


@pytest.mark.parametrize("token", [-1, 128])
def test_tokens_that_a_model_does_not_know_are_named(token: int) -> None:
    model = models.tiny("llama")
    with pytest.raises(FieldError, match=f"holds the token {token}, and the model knows those from 0 to 127"):
        fed("x()", model, [5, token, 9], None)
    assert fed("x()", model, [0, 127], None)["input_ids"].tolist() == [[0, 127]]


@pytest.mark.parametrize("text", [torch.ones(1, 4).bool(), torch.ones(1, 1, 4).long(), torch.tensor(5)])
def test_what_is_no_row_of_tokens_is_no_text(text: Any) -> None:
    with pytest.raises(FieldError, match="must be one text"):
        fed("x()", models.tiny("llama"), text, None)


def test_a_list_of_texts_and_numbers_is_no_list_of_texts_and_is_told_whole() -> None:
    mixed = [[5, 17], 9]
    with pytest.raises(FieldError) as error:
        fed_each("x()", models.tiny("llama"), mixed, None)
    assert repr(mixed) in str(error.value)


@pytest.mark.parametrize("heads", [[(-1, 0)], [3], "last"])
def test_heads_are_pairs_of_layer_and_head(heads: Any) -> None:
    with pytest.raises(FieldError, match=r"must be pairs of layer and head.*\[\(3, 1\)\]"):
        pairs("x()", heads)
    assert pairs("x()", [(3, 1), (0, 2), (3, 0), (3, 1)]) == {0: [2], 3: [0, 1]}


def test_an_image_is_one_of_a_batch() -> None:
    model, pixels = models.tiny("vit"), torch.rand(3, 8, 8)
    for given in (pixels, pixels[None]):
        assert torch.equal(fed("x()", model, given, None)["pixel_values"], pixels[None])


def test_a_decoder_reads_what_the_encoder_does_unless_it_is_told() -> None:
    model, other = models.tiny("t5"), torch.tensor([[7, 8]])
    assert torch.equal(fed("x()", model, IDS, None)["decoder_input_ids"], IDS)
    both = fed("x()", model, {"input_ids": IDS, "decoder_input_ids": other}, None)
    assert torch.equal(both["decoder_input_ids"], other)


def test_both_halves_of_a_model_are_told_which_tokens_are_padding() -> None:
    text, halves = IDS[0], ("input_ids", "decoder_input_ids")
    alike = batch_of(models.tiny("t5"), [text, text.flip(0)])
    wanted = [*IDS.tolist(), *IDS.flip(1).tolist()]
    assert {name: x.tolist() for name, x in alike.items()} == dict.fromkeys(halves, wanted)
    unlike = batch_of(models.tiny("t5"), [text, text[:5]])
    for name in ("attention_mask", "decoder_attention_mask"):
        assert unlike[name].tolist() == [[1] * 7, [1] * 5 + [0] * 2]


@pytest.mark.parametrize(
    ("kind", "what"), [("llama", "text"), ("clip", "text"), ("vit", "image"), ("whisper", "sound")]
)
def test_what_a_model_reads(kind: str, what: str) -> None:
    assert read_by(models.tiny(kind)) == what


@pytest.mark.parametrize(("kind", "causal"), [("llama", True), ("bert", False), ("bart", True)])
def test_whether_the_last_token_alone_has_seen_all(kind: str, causal: bool) -> None:
    assert _causal(models.tiny(kind)) == causal


def test_attention_that_does_not_say_whether_it_is_causal_is_not() -> None:
    model = models.tiny("bert")
    for module in model.modules():
        for name in ("is_causal", "is_decoder"):
            module.__dict__.pop(name, None)
    assert not _causal(model)


def test_gradients_are_of_a_logit_or_of_the_length_along_the_mean_state() -> None:
    model = models.tiny("bert")
    with torch.no_grad():
        out, inside = model(input_ids=IDS), model.bert(input_ids=IDS)
    assert close(aim_of(model, IDS, 77, -3).raw(out)[0], out.logits[0, 4, 77])
    aim, mean = aim_of(model.bert, IDS, None, None), inside.last_hidden_state[0].mean(0)
    assert close_model(aim.raw(inside)[0], mean.square().sum().sqrt())
    assert [aim.unit, Aim("class", 3, 0).unit] == ["cosine", "nats"]


def test_the_strongest_are_told_whatever_their_sign_and_none_that_is_not_there() -> None:
    values = torch.tensor([[0.5, -2.0, 0.5], [math.nan, 1.0, 0.0]])
    assert strongest(values, 3) == ((0, 1), (1, 1), (0, 0))
    assert strongest(values, 9) == ((0, 1), (1, 1), (0, 0), (0, 2), (1, 2))
