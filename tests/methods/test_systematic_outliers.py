"""Outliers of both kinds against brute force over the model's own maps and hidden states."""

from functools import partial

import pytest
import torch
from transformers import StaticCache

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE
from heedful.core.errors import FieldError
from heedful.methods.observe.systematic_outliers import Counts, Outliers, SystematicOutliers
from tests import readers
from tests.readers import ids, padded

METHOD = SystematicOutliers(times=3.0, share=0.12)  # a tiny random model has some tokens on either side
found = partial(readers.found, method=METHOD)


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama", num_hidden_layers=4)


def test_is_the_definition_of_the_paper() -> None:
    eager = models.tiny("llama", num_hidden_layers=4, attn_implementation="eager")
    text = torch.cat([ids(20, 1), ids(20, 2), ids(20, 3)])
    with torch.no_grad():
        out = eager(input_ids=text, output_attentions=True, output_hidden_states=True)
    outliers = found(eager, {"input_ids": text})
    assert list(outliers.layers) == [1, 2, 3]
    for n, got in outliers.layers.items():
        attention = activation = both = first = 0
        for row in range(3):
            size = out.hidden_states[n][row].abs()
            for t in range(20):
                massive = bool(size[t].max() > METHOD.times * size.mean())
                heard = bool(out.attentions[n][row, :, :, t].mean() >= METHOD.share)
                activation += massive
                attention += heard
                both += massive and heard
                first += massive and heard and t == 0
        assert got == Counts(3, activation, attention, both, first)
    assert 0 < outliers.total.both < outliers.total.attention
    assert 0 < outliers.total.activation < 180


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(model, left: bool) -> None:
    short, long = ids(11, 1), ids(17, 2)
    apart = found(model, {"input_ids": short}, {"input_ids": long})
    together = found(model, padded(short, long, left))
    assert together.layers == apart.layers
    assert apart.total.both > 0


def test_tiles_do_not_matter(model) -> None:
    inputs = {"input_ids": ids(23, 4)}
    whole = found(model, inputs, backend="reference")
    for rows in (1, 5):
        assert found(model, inputs, backend="tiled", tile_rows=rows).layers == whole.layers


def test_a_gap_between_layers_is_not_bridged(model) -> None:
    some = METHOD.on(layers=[0, 1, 3])
    assert list(found(model, {"input_ids": ids(15)}, method=some).layers) == [1]


def read(model, *pieces: torch.Tensor, mask: torch.Tensor | None = None) -> Outliers:
    cache, n = None, 0
    with heedful.attach(model, METHOD) as run, torch.no_grad():
        for piece in pieces:
            n += piece.shape[1]
            inputs = {"input_ids": piece} if mask is None else {"input_ids": piece, "attention_mask": mask[:, :n]}
            cache = run(**inputs, use_cache=True, **{CACHE: cache})[CACHE]
        return run[METHOD]


@pytest.mark.parametrize("cuts", [(8, 16), (1,), (3, 5, 7)])
@pytest.mark.parametrize("padding", [0, 9])
def test_a_text_in_pieces_is_that_text(model, cuts: tuple[int, ...], padding: int) -> None:
    """With padding on the left of one text, whose first pieces are nothing else."""
    text = torch.cat([ids(24, 1), ids(24, 2), ids(24, 3)])
    mask = torch.ones_like(text)
    mask[1, :padding] = 0
    whole = read(model, text, mask=mask if padding else None)
    assert read(model, *text.tensor_split(cuts, dim=1), mask=mask if padding else None).layers == whole.layers
    assert whole.total.both > 0


def test_a_cache_with_room_to_spare_holds_the_same_text(model) -> None:
    text, cache = ids(24, 1), StaticCache(config=model.config, max_cache_len=40)
    whole = read(model, text)
    with heedful.attach(model, METHOD) as run, torch.no_grad():
        for piece in text.split(12, dim=1):
            run(input_ids=piece, use_cache=True, **{CACHE: cache})
        assert run[METHOD].layers == whole.layers


def test_decoding_steps_and_what_follows_are_left_out(model) -> None:
    text = ids(20, 1)
    some = read(model, text[:, :12], text[:, 12:13], text[:, 13:])
    assert some.layers == read(model, text[:, :12]).layers


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_decoder_s_first_layer_is_not_matched_with_the_encoder_s_stream(kind: str) -> None:
    model = models.tiny(kind)
    told = found(model, models.tiny_inputs(model))
    assert sorted(told.layers) == [
        1,
        4,
    ]  # an encoder of two layers, and of each decoder layer the half that looks at itself


def test_tells_the_share_that_is_both() -> None:
    told = METHOD.describe(Outliers({1: Counts(2, 4, 4, 2, 1), 2: Counts(2, 0, 4, 2, 2)}))
    assert told.findings[0].text == (
        "50% of the tokens that draw much attention carry a massive activation (layers 1 to 2), 75% of them the first "
        "token."
    )
    assert told.figures[0].lines["both"].tolist() == [1.0, 1.0]
    assert not METHOD.describe(Outliers({1: Counts(2, 4, 0, 0, 0)})).findings


@pytest.mark.parametrize(("field", "bad"), [("times", 1.0), ("share", 0.0), ("share", 1.1)])
def test_says_what_is_wrong(field: str, bad: float) -> None:
    with pytest.raises(FieldError, match=field):
        SystematicOutliers(**{field: bad})


def test_a_text_of_one_token_draws_all_attention(model) -> None:
    layers = found(model, {"input_ids": ids(1)}).layers
    assert [(x.texts, x.attention) for x in layers.values()] == [(1, 1)] * len(layers)
