"""AttentionKnockout against scores that are masked pair by pair in the layers it is on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.methods import AttentionKnockout

CROSS = tuple(f"model.decoder.layers.{i}.encoder_attn" for i in range(2))
ROLES = {"image": ((2, 5), (6, 8)), "question": ((8, 10),)}
IMAGE, QUESTION = (2, 3, 4, 6, 7), (8, 9)


def ids(n: int = 14) -> Tensor:
    return torch.randint(3, 127, (2, n), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def by_hand(model: Any, text: Tensor, layers: tuple[int, ...], blocked: Any) -> Tensor:
    """Logits of a Llama whose named layers do not compute the blocked pairs."""
    inner, n = model.model, text.shape[1]
    x, places = inner.embed_tokens(text), torch.arange(n)[None]
    turns = inner.rotary_emb(x, places)
    for number, layer in enumerate(inner.layers):
        table = torch.zeros(1, 1, n, n)
        for i in range(n):
            for j in range(n):
                if j > i or (number in layers and i != j and blocked(i, j)):
                    table[0, 0, i, j] = -1e9
        out = layer(x, attention_mask=table, position_embeddings=turns)
        x = out[0] if isinstance(out, tuple) else out
    return model.lm_head(inner.norm(x))


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny("llama", num_hidden_layers=3, attn_implementation="eager")


@pytest.mark.parametrize("layers", [(0, 1, 2), (1,), (0, 2)])
@pytest.mark.parametrize("by", ["", "question", "image"])
@torch.no_grad()
def test_pairs_of_the_spans_are_not_computed(model: Any, layers: tuple[int, ...], by: str) -> None:
    rows = {"": [i for i in range(14) if i not in IMAGE], "question": QUESTION, "image": IMAGE}[by]
    with heedful.attach(model, AttentionKnockout(by=by).on(layers=layers), roles=ROLES) as run:
        found = run(input_ids=ids()).logits
    assert close_model(found, by_hand(model, ids(), layers, lambda i, j: i in rows and j in IMAGE))
    assert not close_model(found, model(input_ids=ids()).logits)


@torch.no_grad()
def test_written_tokens_alone(model: Any) -> None:
    text = ids()
    with heedful.attach(model, AttentionKnockout().when("decode"), roles=ROLES) as run:
        cache = cache_of(run(input_ids=text[:, :-1], use_cache=True))
        found = run(input_ids=text[:, -1:], **{CACHE: cache}).logits
    wanted = by_hand(model, text, (0, 1, 2), lambda i, j: i == 13 and j in IMAGE)
    assert close_model(found[:, -1], wanted[:, -1])


@torch.no_grad()
def test_spans_are_counted_in_the_text(model: Any) -> None:
    text = ids(9)
    padded, seen = torch.cat([torch.zeros(2, 4, dtype=torch.long), text], 1), torch.ones(2, 13, dtype=torch.long)
    seen[:, :4] = 0
    roles = {"image": ((2, 5),)}
    with heedful.attach(model, AttentionKnockout(), roles=roles) as run:
        found = run(input_ids=padded, attention_mask=seen).logits[:, 4:]
    assert close_model(found, by_hand(model, text, (0, 1, 2), lambda i, j: j in (2, 3, 4) and i > 4))


def test_a_span_must_be_named(model: Any) -> None:
    assert (AttentionKnockout().hidden, AttentionKnockout().by) == ("image", "")
    with pytest.raises(FieldError, match=r"AttentionKnockout\.hidden = "):
        AttentionKnockout("")
    run = heedful.attach(model, AttentionKnockout(by="answer"), roles=ROLES)
    with pytest.raises(FieldError, match="no spans named 'answer'"), torch.no_grad(), run as served:
        served(input_ids=ids())


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_in_cross_attention_a_number_says_nothing_of_the_other_sequence(backend: str) -> None:
    model: Any = models.tiny("bart", attn_implementation="eager").eval()
    asked, text = torch.ones(2, 14, dtype=torch.long), ids().clamp(max=59)
    encoded = model.get_encoder()(input_ids=text, attention_mask=asked)
    asked[:, IMAGE] = 0
    given = {"input_ids": text, "decoder_input_ids": text.flip(1)}
    plain = model(**given).logits
    for method in (AttentionKnockout(), AttentionKnockout("image", "question")):
        with heedful.attach(model, method, roles=ROLES, only=CROSS, backend=backend) as run:
            found = run(**given).logits
        if not method.by:
            assert close_model(
                found, model(encoder_outputs=encoded, attention_mask=asked, decoder_input_ids=text.flip(1)).logits
            )
        else:  # what stands before the question looks as it did
            assert close_model(found[:, : QUESTION[0]], plain[:, : QUESTION[0]])
            assert not close_model(found[:, QUESTION[0]], plain[:, QUESTION[0]])
