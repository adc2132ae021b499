"""Maps laid out, brought to one size and lit; the words that keys are; what is found; all without a pipeline."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from heedful.cli.pictured import pipeline
from heedful.core.errors import HeedfulError, ModelError
from heedful.core.figures import Lit
from heedful.explaining.picturing import END, START, WordMap, WordMaps, _told_apart, _words
from heedful.looking import grid, one_size
from heedful.report.lit import DARK, lit, png, sources
from tests.test_picturing import PROMPT, Words


def test_maps_of_several_sizes_are_averaged_at_the_largest() -> None:
    small, large = torch.tensor([[[0.0, 4.0]]]), torch.full((1, 1, 4), 4.0)
    assert one_size([small, large])[0, 0].tolist() == [2.0, 2.5, 3.5, 4.0]  # a place lies in its middle


@pytest.mark.parametrize(
    ("kind", "reader"), [("FluxTransformer2DModel", "tokenizer_2"), ("HiDreamImageTransformer2DModel", "tokenizer_3")]
)
def test_words_are_those_that_the_model_reads(kind: str, reader: str) -> None:
    words = _words(SimpleNamespace(transformer=type(kind, (), {})(), tokenizer=None, **{reader: Words()}), PROMPT, 5)
    assert words == PROMPT.split()


def test_words_are_cut_where_the_tokenizer_or_the_keys_end() -> None:
    asked = []

    class Asked(Words):
        def __call__(self, prompt: str, **how: Any) -> Any:
            asked.append(how)
            return super().__call__(prompt)

    for keys in (3, 7):
        _words(SimpleNamespace(tokenizer=Asked()), PROMPT, keys)
    assert asked == [{"truncation": True, "max_length": length} for length in (3, 5)]
    assert _words(SimpleNamespace(), PROMPT, 3) == ["0", "1", "2"]


def test_places_are_laid_out_in_the_proportion_of_the_picture() -> None:
    places = torch.arange(24.0)[:, None]
    assert grid(places, 6 / 4, "up.0")[0].tolist() == places.view(6, 4).tolist()
    assert grid(places, 4 / 6, "up.0")[0].tolist() == places.view(4, 6).tolist()
    assert grid(places[:12], 65 / 97, "up.0")[0].shape == (3, 4)  # rounded up from 2.7 rows
    with pytest.raises(ModelError, match=r"up\.0: its 24 places are no grid of the picture's proportion, 1 to 1"):
        grid(places, 1.0, "up.0")
    with pytest.raises(ModelError, match="12 places are no grid"):
        grid(places[:12], 1.0, "up.0")  # 3 x 4 is no square, whatever was rounded


def test_a_picture_is_lit_up_to_the_highest_place_of_a_map() -> None:
    found = lit(torch.ones(3, 2, 2), torch.tensor([[0.0, 0.1], [0.2, 0.2]]))
    half = DARK + (1 - DARK) / 2
    torch.testing.assert_close(found[0], torch.tensor([[DARK, half], [1.0, 1.0]]))


def test_what_is_found_names_the_word_that_gets_most_and_the_one_that_is_looked_at_from_the_fewest_places() -> None:
    maps = torch.full((4, 2, 4), 0.1)
    maps[1], maps[2], maps[3] = 0.5, 0.0, 0.001
    maps[2, 1, 3] = 0.4
    shares = torch.zeros(1, 4)
    found = WordMap("a b c d", ["a", "b", "c", "d"], torch.zeros(3, 2, 4), maps, shares, shares, ["x"])
    assert [finding.text for finding in found.findings()] == [
        "Of the words in “a b c d”, “b” gets most, 50%.",
        "“c” is looked at from the fewest places, most from row 2 of 2, column 4 of 4.",
    ]
    assert [finding.weight for finding in found.findings()] == [0.5, 0.4]
    assert list(found.lit.maps) == ["0. a: 10%", "1. b: 50%", "2. c: 5%", "3. d: 0.10%"]
    ((_, shown),) = WordMaps((found, found)).description()
    assert [figure.folded for figure in shown.figures] == [False] * 3 + [True] * 3
    assert [figure.key for figure in shown.figures][2:4] == ["layers_0", "lit_1"]
    assert [figure.title for figure in shown.figures][:2] == ["“a b c d”", "By step: “a b c d”"]


def test_pictures_are_as_they_are_and_then_lit_by_each_map_and_small_ones_are_made_larger() -> None:
    pixels, half = torch.ones(3, 40, 20), torch.tensor([[1.0], [0.0]])
    (plain, first), (name, second) = sources(Lit("lit", "a", "", pixels, {"0. a": half}))
    assert (plain, name) == ("the picture", "0. a")
    assert first == png(torch.ones(3, 120, 60))
    assert second == png(lit(torch.ones(3, 120, 60), half)) != first


def test_layers_are_told_apart_by_what_their_names_do_not_share_at_the_end() -> None:
    for names, told in (
        (["down.0.attn", "up.0.attn"], ["down", "up"]),
        (["attn", "up.attn"], ["attn", "up.attn"]),  # something is left of each
        (["up.attn"], ["up.attn"]),
        (["a.one", "a.two"], ["a.one", "a.two"]),
    ):
        assert _told_apart(names) == told


def test_marks_are_no_words_of_what_is_found() -> None:
    maps = torch.tensor([[[0.6, 0.0], [0.0, 0.0]], [[0.0, 0.1], [0.1, 0.0]], [[0.06, 0.06], [0.06, 0.06]]])
    shares = torch.zeros(1, 3)
    found = WordMap("a b", [START, "a", "b"], torch.zeros(3, 2, 2), maps, shares, shares, ["x"])
    assert [finding.text for finding in found.findings()] == [
        "Of the words in “a b”, “b” gets most, 6%; 89% go to what is around them.",
        "“a” is looked at from the fewest places, most from row 1 of 2, column 2 of 2.",
    ]
    nothing = WordMap("", [START, END], torch.zeros(3, 2, 2), maps[:2], shares[:, :2], shares[:, :2], ["x"])
    assert not list(nothing.findings())


def test_without_diffusers_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(HeedfulError, match=r"diffusers is not installed.*pip install 'heedful\[diffusion\]'$"):
        pipeline("painter")
