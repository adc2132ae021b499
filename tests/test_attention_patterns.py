"""`heedful.patterns`: the model's own maps, of chosen heads too, under a stack, in a notebook and on a page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import heedful
from heedful import models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.explaining.aim import spelled_in_order
from heedful.explaining.attention_patterns import MOST, Patterns, Picture
from heedful.methods import SinkWindow, TempScale
from tests.test_diagnose_texts import characters

IDS = torch.arange(5, 25)


def eager(model: Any, **inputs: Any) -> tuple[torch.Tensor, ...]:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found: tuple[torch.Tensor, ...] = model(**inputs, output_attentions=True).attentions
    return found


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gemma2", "bert"])
def test_they_are_the_models_own(kind: str) -> None:
    model = models.tiny(kind)
    found = heedful.patterns(model, IDS)
    maps = eager(model, input_ids=IDS[None])
    assert list(found.maps) == list(range(len(maps)))
    for layer, x in enumerate(maps):
        torch.testing.assert_close(found[layer], x[0])
        torch.testing.assert_close(found[layer, 2], x[0, 2])
    torch.testing.assert_close(found.tensor, torch.cat(maps))
    assert found.tokens[0] == "5 "


def test_pixels_and_two_halves() -> None:
    vit = models.tiny("vit")
    inputs = {name: x[:1] for name, x in models.tiny_inputs(vit).items()}
    found = heedful.patterns(vit, inputs)
    assert found.tokens == []
    assert found.picture is not None
    assert (found.picture.grid, found.picture.before) == ((2, 2), ["class token"])
    assert torch.equal(found.picture.pixels, inputs["pixel_values"][0])
    assert heedful.patterns(models.tiny("llama"), IDS).picture is None
    torch.testing.assert_close(found.tensor, torch.cat(eager(vit, **inputs)))
    both = heedful.patterns(models.tiny("t5"), IDS)
    assert {x.shape[1:] for x in both.maps.values()} == {(20, 20)}
    for words in (None, characters()):
        with pytest.raises(FieldError, match="reads images takes the pixels of one"):
            heedful.patterns(vit, "a cat", tokenizer=words)


def test_no_axis_has_the_words_of_another_sequence() -> None:
    model, ids = models.tiny("t5"), torch.tensor([[5, 6]])
    same = heedful.patterns(model, {"input_ids": ids, "decoder_input_ids": ids + 2})
    assert same.names(2) == ["0", "1"]
    longer = heedful.patterns(model, {"input_ids": ids, "decoder_input_ids": torch.tensor([[7, 8, 9]])})
    assert (longer.names(2), longer.names(3)) == (["0 5", "1 6"], ["0", "1", "2"])


@pytest.mark.parametrize("kind", ["clip", "llava"])
def test_an_images_axis_has_no_words_though_it_is_as_long_as_the_text(kind: str, tmp_path: Path) -> None:
    model = models.tiny(kind)
    inputs = {name: x[:1] for name, x in models.tiny_inputs(model).items()}
    seen = heedful.patterns(model, inputs)
    (patches,) = {x.shape[-1] for x in seen.maps.values()} - {inputs["input_ids"].shape[1]}
    longer = {name: x[:1] for name, x in models.tiny_inputs(model, length=patches + 1).items()}
    alike = {name: x[:, :patches] if x.ndim == 2 else x for name, x in longer.items()}
    found = heedful.patterns(model, alike)
    with_words = {layer for layer in found.maps if found.figure(layer, 0).columns[0] != "0"}
    assert {x.shape[-1] for x in found.maps.values()} == {patches}
    assert found.text == with_words == frozenset({"clip": {0, 1}, "llava": {2, 3}}[kind])
    pytest.importorskip("jinja2")
    rows = json.loads(found.page(tmp_path / "x.html").read_text().split('id="data">')[1].split("</script>")[0])["rows"]
    assert {row["layer"] for row in rows if row["text"]} == with_words


def test_some_heads_and_their_names() -> None:
    model = models.tiny("llama")
    whole, some = heedful.patterns(model, IDS), heedful.patterns(model, IDS, heads=[(1, 3), (0, 2), (1, 0)])
    assert some.heads == {0: [2], 1: [0, 3]}
    torch.testing.assert_close(some[1, 3], whole[1, 3])
    torch.testing.assert_close(some[1], whole[1][[0, 3]])
    with pytest.raises(FieldError, match=r"layer 0 has the heads \[2\] here"):
        some[0, 1]
    with pytest.raises(FieldError, match=r"must be one of \[0, 1\]"):
        some[7]
    with pytest.raises(FieldError, match="layers differ in shape"):
        _ = some.tensor
    with pytest.raises(FieldError, match=r"patterns\(\).on\(layers=\[9\]"):
        heedful.patterns(model, IDS, heads=[(9, 0)])


@pytest.mark.parametrize("rows", [None, 3, 1])
def test_under_a_stack(rows: int | None) -> None:
    found = heedful.patterns(models.tiny("llama"), IDS, stack=SinkWindow(1, 3), tile_rows=rows)
    seen = found.tensor > 0
    place = torch.arange(20)
    near = (place[:, None] - place < 3) | (place == 0)
    assert bool((seen == (near & (place[:, None] >= place))).all())


def test_under_an_edit_in_tiles_of_more_and_more_keys() -> None:
    model = models.tiny("llama")
    whole = heedful.patterns(model, IDS, stack=TempScale(0.5), backend="reference")
    for rows in (1, 3):
        found = heedful.patterns(model, IDS, stack=TempScale(0.5), tile_rows=rows)
        torch.testing.assert_close(found.tensor, whole.tensor)


def test_texts_and_what_is_refused() -> None:
    model = models.tiny("llama")
    found = heedful.patterns(model, "a cat", tokenizer=characters())
    assert "".join(found.tokens) == "a cat"
    assert found.names(5)[2] == "2 c"
    assert found.names(3) == ["0", "1", "2"]
    with pytest.raises(FieldError, match="is needed for a text"):
        heedful.patterns(model, "a cat")
    with pytest.raises(FieldError, match="must be one text"):
        heedful.patterns(model, torch.ones(2, 5, dtype=torch.long))


@pytest.mark.parametrize("text", ["", [], ["a cat", "a dog"], None, 5, 0.5, torch.randn(1, 4), torch.ones(1, 0).long()])
def test_what_is_no_text_is_named(text: Any) -> None:
    with pytest.raises(FieldError, match=r"patterns\(\).text.*must be (one text|str, Tensor)"):
        heedful.patterns(models.tiny("llama"), text, tokenizer=characters())


@torch.no_grad()
def test_a_module_of_plain_torch_shows_its_maps(tmp_path: Path) -> None:
    layers = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(32, 4, batch_first=True), 2).eval()
    x = torch.randn(1, 6, 32)
    found = heedful.patterns(layers, x)
    first = layers.layers[0].self_attn(x, x, x, average_attn_weights=False)[1]
    assert close(found[0], first[0])
    assert repr(found) == "Patterns(2 layers, 8 heads, 6 x 6)"
    assert found.page(tmp_path / "found.html").stat().st_size > 0


def test_too_much_is_refused_before_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("llama")
    monkeypatch.setattr("heedful.explaining.attention_patterns.MOST", 2 * 4 * 4 * 19 * 19)
    with pytest.raises(FieldError, match=r"name fewer heads.*'19 tokens'"):
        heedful.patterns(model, IDS)
    with pytest.raises(FieldError, match=r"text = '20 tokens'.*'19 tokens'"):  # and not those that the first rows see
        heedful.patterns(model, IDS, stack=TempScale(0.5), tile_rows=1)
    assert heedful.patterns(model, IDS[:19])[1].shape == (4, 19, 19)
    assert heedful.patterns(model, IDS, heads=[(0, 1)])[0].shape == (1, 20, 20)
    assert MOST == 1 << 30
    vit = models.tiny("vit")
    monkeypatch.setattr("heedful.explaining.attention_patterns.MOST", 2 * 4 * 4 * 5 * 5 - 1)
    with pytest.raises(FieldError, match=r"'5 tokens'.*'4 tokens'"):  # it says only in its layers how many
        heedful.patterns(vit, {name: x[:1] for name, x in models.tiny_inputs(vit).items()})


def test_characters_of_several_tokens_stand_with_the_first(default_model: models.Loaded) -> None:
    text = "Ü 漢字 🎉 \ufffd end"
    ids = default_model.tokenizer(text, return_tensors="pt").input_ids[0]
    found = spelled_in_order(ids, default_model.tokenizer)
    assert (len(found), "".join(found)) == (len(ids), text)
    assert {"漢", "字", ""} <= {x.strip() for x in found}
    assert spelled_in_order(ids[1:2], default_model.tokenizer) == ["\ufffd"]  # what is cut stays so
    model = models.tiny("llama")
    assert heedful.patterns(model, "ab", tokenizer=characters()).tokens == ["a", "b"]


def test_the_model_is_as_it_was() -> None:
    model = models.tiny("llama").train()
    heedful.patterns(model, IDS)
    assert model.training
    assert not model.config._attn_implementation.startswith("heedful")


def test_a_notebook_and_a_page_show_them(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    tokens = ["</script>", '"', "<b>", "é"]
    found = Patterns(tokens, {0: torch.eye(4).expand(2, 4, 4)}, {0: [0, 1]})
    shown = found._repr_html_()
    assert shown.startswith("<iframe")
    assert shown.count("<") == 2  # everything inside is escaped
    text = found.page(tmp_path / "maps.html").read_text()
    assert '</script>"' not in text.split('id="data">')[1].split("</script>")[0]
    assert "query" in str(found.plot(0, 1).to_dict())
    assert repr(found) == "Patterns(1 layer, 2 heads, 4 x 4: '</script>\"<b>é')"
    seen = Picture(torch.zeros(3, 8, 12), (2, 3), ["class token"])
    assert repr(replace(found, tokens=[], picture=seen)) == "Patterns(1 layer, 2 heads, 4 x 4: 2 x 3 patches)"
    assert repr(replace(found, tokens=[])) == "Patterns(1 layer, 2 heads, 4 x 4)"


def test_every_part_of_the_model_trains_or_rests_as_before() -> None:
    model = models.tiny("llama").train()
    model.model.layers[0].eval()
    heedful.patterns(model, IDS)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
