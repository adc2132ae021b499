"""The ground of claims about vision-language models: what is asked, what was learned, and that it looks."""

from __future__ import annotations

import torch

from claims._pictures import ID
from claims._sight import (
    ASKED,
    BATCH,
    PATCHES,
    PICTURE,
    SEED,
    STEPS,
    asked,
    guessed,
    guesses,
    lesson,
    log_probability,
    model,
    odd,
    record,
    right,
    share_right,
    told,
)  # fmt: skip
from heedful.methods import AttentionKnockout


def test_questions_are_about_things_that_are_there() -> None:
    item = asked(0, 50, 0.0)
    assert item.things.shape == (50, PATCHES)
    assert item.things.any(1).all()
    assert (item.answers != ID["nothing"]).all()
    for row, question in enumerate(item.questions.tolist()):
        assert item.answers[row] == item.words[row, question]
        columns = item.things[row].view(8, 8).any(0).nonzero().flatten()
        assert (columns < 4).all() if ASKED[question].startswith("left") else (columns >= 4).all()
    assert ((item.inputs["input_ids"] == PICTURE).sum(1) == PATCHES).all()
    light = item.inputs["pixel_values"].flatten(2)
    assert (light.std(-1) > 0).any(1).all()


def test_no_two_seeds_ask_the_same() -> None:
    drawn = [asked(seed, 4, 0.5).inputs["pixel_values"] for seed in (-1, 0, 1, 2)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_lessons_have_things_whose_shape_goes_with_their_colour() -> None:
    pixels, words = lesson(torch.Generator().manual_seed(0))
    assert len(pixels) == len(words) == BATCH
    by = torch.Generator().manual_seed(0)
    shown = torch.cat([lesson(by)[1] for _ in range(20)])
    share = 1 - float(odd(shown).sum()) / float((shown[:, [0, 2]] != ID["nothing"]).sum())
    assert 0.5 < share < 0.7, "by chance 0.25"
    inputs, shapes, usual = guessed(0, 30, 0.0)
    assert (shapes != usual).all()
    assert torch.equal(inputs["input_ids"][:, -2] - ID["red"], usual - ID["square"])


def test_only_shapes_are_guessed_and_counted_in_a_hundred() -> None:
    logits = torch.full((4, PICTURE + 1), -1.0)
    logits[:, ID["red"]] = 9.0  # no shape
    for row, said in enumerate((0, 0, 2, 3)):
        logits[row, ID["square"] + said] = 1.0
    right_ones, usual = ID["square"] + torch.tensor([0, 1, 1, 3]), ID["square"] + torch.tensor([1, 0, 0, 0])
    assert guesses({"a": logits}, right_ones, usual) == {"right, a": 50.0, "the usual, a": 25.0}


def test_the_shipped_model_sees() -> None:
    recorded = record()
    assert (recorded["steps"], recorded["seed"]) == (str(STEPS), str(SEED)), "another training's file: train it again"
    for noise in (0.0, 0.5):  # 60 pictures miss the record by 0.15 in one test of a thousand at most
        assert abs(right(noise, seed=0, count=60) - float(recorded[f"right, noise {noise:g}"])) < 0.2
    item = asked(0, 60, 0.0)
    blind = told(item.inputs, AttentionKnockout())
    assert share_right(blind, item.answers) < 0.4
    assert log_probability(blind, item.answers) < log_probability(told(item.inputs), item.answers) - 1
    assert not model().training
