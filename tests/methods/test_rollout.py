"""Rollout against dense matrix products, in tiles, with padding, for some sources, and where it must refuse."""

import pytest
import torch

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods.explain.rollout import AttentionRollout
from tests.readers import ids, padded


def traced(model, inputs, method=None, **how) -> torch.Tensor:
    method = method or AttentionRollout()
    with heedful.attach(model, method, **how) as run, torch.no_grad():
        run(**inputs)
    (out,) = run[method]
    return out


def dense(model, inputs, heads=slice(None)) -> torch.Tensor:
    """The paper's own form."""
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    out = torch.eye(maps[0].shape[-1], dtype=torch.float64)
    for layer in maps:
        out = (0.5 * layer[:, heads].double().mean(1) + 0.5 * torch.eye(layer.shape[-1])) @ out
    return out


@pytest.mark.parametrize("kind", ["bert", "llama", "mistral", "gpt2"])
@pytest.mark.parametrize("rows", [None, 1, 5])
def test_is_the_formula_of_the_paper(kind: str, rows: int | None) -> None:
    model = models.tiny(kind, num_hidden_layers=3, attn_implementation="eager")
    inputs = models.tiny_inputs(model, length=17)
    found = traced(model, inputs, tile_rows=rows, backend="tiled" if rows else "reference")
    wanted = dense(model, inputs)
    assert found.shape == (2, 17, 17)
    assert close(found, wanted.float())
    assert close(found.sum(-1), torch.ones(2, 17))
    assert not close(found, dense(model, inputs, heads=[0]).float())


def test_one_layer_is_the_mixed_map() -> None:
    model = models.tiny("bert", num_hidden_layers=1, attn_implementation="eager")
    inputs = models.tiny_inputs(model)
    with torch.no_grad():
        (weights,) = model(**inputs, output_attentions=True).attentions
    assert close(traced(model, inputs), 0.5 * weights.mean(1) + 0.5 * torch.eye(12))


def test_sources_are_columns_and_cost_no_more_than_they_are() -> None:
    model = models.tiny("llama", num_hidden_layers=3)
    inputs = models.tiny_inputs(model, length=20)
    whole = traced(model, inputs)
    for rows in (None, 3):
        some = traced(model, inputs, AttentionRollout((0, 7, 25)), tile_rows=rows)
        assert some.shape == (2, 20, 3)
        assert close(some[..., :2], whole[..., [0, 7]])
        assert not some[..., 2].any()  # no text reaches position 25


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("left", [True, False])
def test_padding_has_no_part_in_it(kind: str, left: bool) -> None:
    model = models.tiny(kind, num_hidden_layers=3)
    short, long = ids(11, 1), ids(16, 2)
    batch = padded(short, long, left)
    if kind == "bert" and left:  # its positions are learned and count the padding
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    found = traced(model, batch, tile_rows=4)
    rows = slice(5, 16) if left else slice(0, 11)
    assert close_model(found[:1, rows, :11], traced(model, {"input_ids": short}))
    assert close_model(found[1:], traced(model, {"input_ids": long}))
    assert not found[0, :, 11:].any()
    assert not found[0, :5].any() if left else not found[0, 11:].any()


def test_rows_that_do_not_sum_to_one_are_normalised() -> None:
    model = models.tiny("gpt_oss")  # learned sink logits take a share of every row
    found = traced(model, models.tiny_inputs(model))
    assert close(found.sum(-1), torch.ones(2, 12))


def test_some_heads_and_the_upper_layers() -> None:
    model = models.tiny("bert", num_hidden_layers=3, attn_implementation="eager")
    inputs = models.tiny_inputs(model)
    assert close(traced(model, inputs, AttentionRollout().on(heads=[0, 2])), dense(model, inputs, [0, 2]).float())
    with torch.no_grad():
        last = model(**inputs, output_attentions=True).attentions[-1].mean(1)
    assert close(2 * traced(model, inputs, AttentionRollout().on(layers=2)) - torch.eye(12), last)


def test_one_answer_for_each_forward() -> None:
    model = models.tiny("llama")
    with heedful.attach(model, AttentionRollout()) as run, torch.no_grad():
        for n in (4, 9, 6):
            run(input_ids=ids(n))
    assert [x.shape[1] for x in run[AttentionRollout()]] == [4, 9, 6]


def test_a_part_of_a_model_can_be_traced() -> None:
    model = models.tiny("t5")
    inputs = models.tiny_inputs(model, length=7)
    assert close(traced(model, inputs, only="encoder").sum(-1), torch.ones(2, 7))
    model = models.tiny("llava")
    text = traced(model, models.tiny_inputs(model), AttentionRollout((0, 1)), only="model.language_model")
    assert text.shape == (2, 12, 2)


def test_decoding_steps_are_left_out() -> None:
    model = models.tiny("llama")
    with heedful.attach(model, AttentionRollout()) as run:
        run.generate(input_ids=ids(9), max_new_tokens=3, do_sample=False)
    (found,) = run[AttentionRollout()]
    assert close(found, traced(model, {"input_ids": ids(9)}))


def test_keeps_no_graph() -> None:
    model = models.tiny("llama")
    with heedful.attach(model, AttentionRollout()) as run:
        run(input_ids=ids(5)).logits.sum().backward()
    assert not run[AttentionRollout()][0].requires_grad


def refused(model, match: str, method=None, **inputs) -> None:
    run = heedful.attach(model, method or AttentionRollout())
    with run, torch.no_grad(), pytest.raises(FieldError, match=match):
        run(**inputs)


def test_says_what_is_wrong() -> None:
    for bad in ((), (1, 1), (-1,)):
        with pytest.raises(FieldError, match="one or more unlike positions"):
            AttentionRollout(bad)
    llama = models.tiny("llama", num_hidden_layers=4)
    with torch.no_grad():
        cache = llama(input_ids=ids(5), use_cache=True)[CACHE]
    refused(llama, "comes in pieces", input_ids=ids(3), **{CACHE: cache})
    refused(llama, "must follow layer 0 without a gap", AttentionRollout().on(layers=[0, 2, 3]), input_ids=ids(5))
    for kind in ("t5", "bart"):
        model = models.tiny(kind)
        inputs = models.tiny_inputs(model, length=7)
        refused(model, "begins another list of layers than layer 1 is of", **inputs)
    llava = models.tiny("llava")
    refused(llava, "only=", **models.tiny_inputs(llava))
