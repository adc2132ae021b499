"""Influence against the product of the model's own maps."""

from functools import partial

import pytest
import torch

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, StatisticError
from heedful.methods.observe.position_influence import Influence, PositionInfluence
from tests import readers
from tests.readers import ids, padded

METHOD = PositionInfluence(parts=4)
found = partial(readers.found, method=METHOD)


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama", num_hidden_layers=3)


def same(a: Influence, b: Influence) -> bool:
    return all(
        close_model(a.last[n].float(), b.last[n].float()) and close_model(a.mean[n].float(), b.mean[n].float())
        for n in b.last
    )


@pytest.mark.parametrize("residual", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_is_the_product_of_the_maps(kind: str, residual: float) -> None:
    eager = models.tiny(kind, num_hidden_layers=3, attn_implementation="eager")
    text = torch.cat([ids(17, 1), ids(17, 2)])
    with torch.no_grad():
        maps = [a.mean(1) for a in eager(input_ids=text, output_attentions=True).attentions]  # [b q k]
    influence = found(eager, {"input_ids": text}, method=PositionInfluence(4, residual))
    product = torch.eye(17)
    for n in range(3):
        product = ((1 - residual) * maps[n] + residual * torch.eye(17)) @ product
        wanted = torch.cat([product[..., :1], product[..., 1:].unflatten(-1, (4, 4)).sum(-1)], -1)
        assert close_model(influence.last[n].float(), wanted[:, -1].mean(0))
        assert close_model(influence.mean[n].float(), wanted.mean((0, 1)))
        assert influence.first[n] == pytest.approx(float(wanted[:, -1, 0].mean()), rel=1e-4)
    assert float(influence.total.sum()) == pytest.approx(1.0)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(model, left: bool) -> None:
    short, long = ids(11, 1), ids(17, 2)
    apart = found(model, {"input_ids": short}, {"input_ids": long})
    assert same(found(model, padded(short, long, left)), apart)


@pytest.mark.parametrize("kind", ["llama", "mistral", "bert"])
def test_tiles_do_not_matter(kind: str) -> None:
    model = models.tiny(kind)
    inputs = models.tiny_inputs(model, length=23)
    whole = found(model, inputs, backend="reference")
    for rows in (1, 5, 23):
        assert same(found(model, inputs, tile_rows=rows, backend="tiled"), whole)


def test_layers_that_do_not_follow_each_other_are_left_out(model) -> None:
    some = METHOD.on(layers=[0, 2])
    assert list(found(model, {"input_ids": ids(15)}, method=some).last) == [0]


def test_an_encoder_and_its_decoder_start_each_by_themselves() -> None:
    bart = models.tiny("bart", attn_implementation="eager")
    inputs = models.tiny_inputs(bart, length=13)
    influence = found(bart, inputs, method=PositionInfluence(4, 0.0))
    with torch.no_grad():
        out = bart(**inputs, output_attentions=True)
    assert list(influence.last) == [0, 1, 2]  # the layer after reads the encoder, so the decoder's chain ends there
    for layer, row in ((0, out.encoder_attentions[0]), (2, out.decoder_attentions[0])):
        mean = row[:, :, -1].mean((0, 1))
        wanted = torch.cat([mean[:1], mean[1:].unflatten(-1, (4, 3)).sum(-1)])
        assert close_model(influence.last[layer].float(), wanted)


def test_pieces_of_a_text_and_decoding_steps_are_left_out(model) -> None:
    whole = found(model, {"input_ids": ids(12)})
    with heedful.attach(model, METHOD) as run, torch.no_grad():
        out = run(input_ids=ids(12), use_cache=True)
        run(input_ids=ids(5), **{CACHE: out[CACHE]}, use_cache=True)
        run(input_ids=ids(1), **{CACHE: out[CACHE]}, use_cache=True)
        assert same(run[METHOD], whole)
    with heedful.attach(model, METHOD) as run, pytest.raises(StatisticError, match="read nothing yet"):
        run[METHOD]


def test_tells_halves_that_add_up(model) -> None:
    end = torch.tensor([0.5, 0.125, 0.125, 0.0, 0.25])
    answer = Influence({0: end, 1: end}, {0: end, 1: end})
    told = METHOD.describe(answer)
    assert told.findings[0].text == (
        "By rollout, which ignores value norms, 50% of what reaches the last token through all layers is the first "
        "token's; of the rest, 50% comes from the first half of the text."
    )
    assert told.figures[0].lines["up to layer 1"].tolist() == [0.25, 0.25, 0.0, 0.5]
    assert told.figures[0].x == [12.5, 37.5, 62.5, 87.5]
    assert (
        PositionInfluence(1).describe(Influence({0: end[:2]}, {0: end[:2]})).findings[0].text.endswith("first token's.")
    )


@pytest.mark.parametrize(("field", "bad"), [("parts", 0), ("residual", 1.0), ("residual", -0.1)])
def test_says_what_is_wrong(field: str, bad: float) -> None:
    with pytest.raises(FieldError, match=field):
        PositionInfluence(**{field: bad})


def test_the_total_is_that_of_the_last_layer() -> None:
    last = {0: torch.tensor([0.1, 0.9]), 3: torch.tensor([0.4, 0.6])}
    assert Influence(last, {}).total.tolist() == pytest.approx([0.4, 0.6])
