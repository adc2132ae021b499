"""Digits on their field, strings with their answers, and where a mechanism acts in an encoder-decoder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from heedful import attach
from heedful.authoring import Call, Method, Site, at
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, HeedfulError
from heedful.core.method import Stack
from heedful.laboratory import costs, images
from heedful.laboratory.images import PLACES, SEEN, Digits, digits, parted, placed
from heedful.laboratory.records import Trainings
from heedful.laboratory.strings import Strings, _OnItsWord
from heedful.laboratory.training import fresh
from tests.lab.small import Halved


@dataclass(frozen=True)
class Letters(Strings):
    tokens: int = 126
    rows: int = 1
    width: int = 16
    heads: int = 2


def test_digits_stand_in_their_place_on_an_empty_field() -> None:
    shown, _ = digits()
    field = placed(shown[:9], torch.tensor(PLACES))
    for image, x, (down, right) in zip(shown, field[:, 0], PLACES, strict=False):
        assert torch.equal(x[2 * down : 2 * down + 8, 2 * right : 2 * right + 8], image)
        assert float((x + 1).sum()) == float((image + 1).sum()), "all else is empty"
    assert len(set(PLACES)) == 9
    assert len(SEEN) == 5


def test_held_out_digits_and_places_are_never_trained_on() -> None:
    course = Digits(rows=256)
    mine, tried = parted(1)
    assert sorted([*mine.tolist(), *tried.tolist()]) == list(range(1797))
    assert set(tried.tolist()) != set(parted(2)[1].tolist())
    batch = course.batch(1, Generator().manual_seed(1))
    shown, labels = digits()
    known = {bytes(placed(shown[i : i + 1], torch.tensor([place])).numpy().tobytes()): int(labels[i])
             for i in mine.tolist() for place in SEEN}  # fmt: skip
    for x, label in zip(batch["pixel_values"], batch["labels"].tolist(), strict=True):
        assert known[x.numpy().tobytes()] == label


def test_digits_are_measured_where_they_stood_and_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "TURNS", 1)
    course = Digits(tokens=4 * 1152, layers=1, width=16)
    kept = Trainings(tmp_path)
    made = kept.record(course, Halved(), 0)
    shown, labels = digits()
    _, tried = parted(0)
    with kept.opened(course, Halved(), 0) as run:
        right = {
            place: float((run(pixel_values=placed(shown[tried], torch.tensor([place] * len(tried)))).logits.argmax(-1)
                          == labels[tried]).float().mean())
            for place in PLACES
        }  # fmt: skip
    assert made["accuracy"] == pytest.approx(sum(right[p] for p in SEEN) / 5)
    assert made["shifted"] == pytest.approx(sum(x for p, x in right.items() if p not in SEEN) / 4)
    assert {"training"} == set(made.numbers) - {"accuracy", "shifted"}


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    images.digits.cache_clear()
    with pytest.raises(HeedfulError, match=r"pip install 'heedful\[lab\]'"):
        Digits().batch(0, Generator())


def test_strings_come_with_their_answers() -> None:
    made = Strings(rows=4).batch(0, Generator().manual_seed(0))
    answers = {1: list, 2: lambda x: x[::-1], 3: sorted}
    rows = zip(*(made[k].tolist() for k in ("input_ids", "decoder_input_ids", "labels")), strict=True)
    for source, before, label in rows:
        assert label == answers[source[0]](source[1:])
        assert before == [0, *label[:-1]], "the decoder has seen what came before, and no more"
    assert [row[0] for row in made["input_ids"].tolist()] == [1] * 4 + [2] * 4 + [3] * 4
    assert made["input_ids"].numel() + made["labels"].numel() == Strings(rows=4).a_batch


@pytest.mark.parametrize("backwards", [False, True])
def test_attention_on_a_word_is_what_the_map_says(backwards: bool) -> None:
    course = Letters()
    tried = course.drawn(Generator().manual_seed(0), 3)
    inputs = {k: x for k, x in tried.items() if k != "labels"}
    model = course.model(0).eval()
    model.set_attn_implementation("eager")
    for name, p in model.named_parameters():
        if "encoder_attn" in name:
            p.data.mul_(20)  # maps that are far from even
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).cross_attentions
        with attach(model, reader := _OnItsWord(10, backwards)) as run:
            run(**inputs)
    cross = [i for i, name in enumerate(run.layer_names) if "encoder_attn" in name]
    for layer, weights in zip(cross, maps, strict=True):
        words = range(10)
        wanted = torch.stack([weights[:, :, n, 10 - n if backwards else n + 1] for n in words]).mean((0, 1))
        assert close(run[reader][layer].value, wanted)


def test_attention_on_a_word_is_a_share_whatever_rows_add_up_to() -> None:
    class _Larger(Method):
        @at(Site.PATTERN)
        def grow(self, weights: Tensor, call: Call) -> Tensor:
            return weights * (1 + call.q_pos[..., None])

    course = Letters(where="cross")
    inputs = {k: x for k, x in course.drawn(Generator().manual_seed(0), 3).items() if k != "labels"}
    found = []
    for what in (Stack((reader := _OnItsWord(10, False),)), _Larger().on(layers=0) | reader):
        with fresh(course, what, 0) as run, torch.no_grad():
            run(**inputs)
            found.append(run[reader][0].value.float())
    assert float(found[0].min()) > 0.05
    assert close(found[0], found[1])


@pytest.mark.parametrize(("where", "parts"), [("", 6), ("cross", 2), ("decoder", 2), ("encoder", 2)])
def test_a_mechanism_acts_where_the_course_says(where: str, parts: int) -> None:
    with fresh(Letters(where=where), Stack((Halved(),)), 0) as run:
        assert len(run.layer_names) == parts
        assert where != "cross" or all("encoder_attn" in name for name in run.layer_names)
        run(**Letters().batch(0, Generator().manual_seed(0)))


def test_strings_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "TURNS", 1)
    course = Letters(where="cross")
    made = Trainings(tmp_path).record(course, Halved(), 0)
    assert {"copy", "reverse", "sort", "copy off", "reverse off", "training"} == set(made.numbers)
    for name in ("copy off", "reverse off"):  # hardly trained, it looks everywhere alike
        assert made[name] == pytest.approx(10 / 11, abs=0.05)
    with pytest.raises(FieldError, match=r'"cross", "encoder", "decoder" or "" for all'):
        Strings(where="nowhere")
