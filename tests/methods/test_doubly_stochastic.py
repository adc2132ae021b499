"""The doubly stochastic penalty, place by place of each source."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import FieldError, Summary
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.methods import DoublyStochastic

ONLY = tuple(f"model.decoder.layers.{i}.encoder_attn" for i in range(2))
IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, 6:] = 0
TARGET = IDS[:, 2:7].contiguous()


def _penalty(maps: tuple[Tensor, ...], weight: float, written: tuple[int, int] = (5, 5)) -> Tensor:
    """From the maps `[b h t k]` of all layers, of texts of which so many words are written."""
    total = torch.zeros(())
    for layer in maps:
        for text, (length, words) in enumerate(zip((9, 6), written, strict=True)):
            heads = layer[text].shape[0]
            for place in range(length):
                received = sum(layer[text, h, t, place] / heads for h in range(heads) for t in range(words))
                total = total + (1 - received) ** 2
    return weight * total / 2


def _inputs() -> dict[str, Tensor]:
    return {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": TARGET}


def test_the_loss_and_its_gradient() -> None:
    model: Any = models.tiny("bart", attn_implementation="eager").eval()
    out = model(**_inputs(), output_attentions=True, labels=TARGET)
    want = _penalty(out.cross_attentions, 0.3)
    part = model.model.decoder.layers[0].encoder_attn.q_proj.weight
    (slope,) = torch.autograd.grad(out.loss + want, part)
    with attach(model, DoublyStochastic(0.3), only=ONLY) as run:
        found = run(**_inputs(), labels=TARGET).loss
        assert close_model(run.loss(), want)
        assert close_model(found, out.loss + want)
        assert close_model(torch.autograd.grad(found, part)[0], slope)


def test_rows_of_padding_do_not_look() -> None:
    model: Any = models.tiny("bart", attn_implementation="eager").eval()
    given = _inputs() | {"decoder_attention_mask": (torch.arange(5) < torch.tensor([[5], [3]])).long()}
    with torch.no_grad(), attach(model, DoublyStochastic(0.3), only=ONLY) as run:
        run(**given)
        assert close_model(run.loss(), _penalty(model(**given, output_attentions=True).cross_attentions, 0.3, (5, 3)))


@pytest.mark.filterwarnings("ignore:this run changed nothing")  # where the penalty is 0 to the last bit
def test_nothing_is_asked_of_self_attention_or_of_one_row_that_is_even() -> None:
    model: Any = models.tiny("bart").eval()
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.encoder_attn.q_proj.weight.zero_()
            layer.encoder_attn.q_proj.bias.zero_()
    with attach(model, DoublyStochastic()) as run, torch.no_grad():
        run(input_ids=IDS[:, :5], decoder_input_ids=TARGET)
        assert run.loss().item() < 1e-6  # five even rows over five places


def test_errors() -> None:
    for weight in (-0.1, float("inf")):
        with pytest.raises(FieldError, match=r"DoublyStochastic.weight = .*: must be 0 or more"):
            DoublyStochastic(weight)


def test_a_place_that_any_row_of_any_head_may_see_counts() -> None:
    call = Bare(Shape(b=1, h=2, g=2, q=2, k=3), rules=()).call
    told = Summary(
        received=torch.tensor([[[1.25, 0.75, 0.0], [2.0, 0.0, 0.0]]]), seen=torch.tensor([[[2, 1, 0], [2, 0, 0]]])
    )
    wanted = torch.tensor(sum((1 - x) ** 2 for x in ((1.25 + 2) / 2, 0.75 / 2)))
    assert close(DoublyStochastic().uneven(told, call), wanted)
