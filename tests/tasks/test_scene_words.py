"""Words of drawn scenes: from where each thing's are looked at, where it stands, and what guessing scores."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from claims._pictures import HALF, SIDE, denoiser, draw, sample
from heedful import models
from heedful.bench.answer import answer
from heedful.bench.compare import compare
from heedful.bench.records import Answered
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.core.kinds.tokens import Prompt
from heedful.methods import AttendAndExcite, SoftPAG, TempScale
from heedful.models.small_denoiser import HEADS
from heedful.tasks import Scene, find
from heedful.tasks.scenes import ROLES, TwoThingsWords
from heedful.tasks.task import Item, Sheet
from heedful.text_models import text_model

STEPS = 3
READER: Any = models.denoiser().tokenizer
ITEM = Item(Prompt((1, 2, 3, 4, 5), ROLES), ((1, 2),))


@pytest.fixture(scope="module")
def task() -> TwoThingsWords:
    return TwoThingsWords(steps=STEPS).on(denoiser(), READER)


def sheet_of(item: Item, what: Any = None) -> Sheet:
    with text_model(denoiser(), what, item.shown) as speaker:
        return answer(speaker, item)


def noise_of(item: Item) -> Tensor:
    assert item.shown.draws is not None
    return item.shown.draws.noise


class Maps:
    """What cross-attention gives each word, told by hooks of torch and added up over layers and forwards."""

    def __init__(self, model: nn.Module) -> None:
        self.total, self.forwards = torch.zeros(64, 5), 0
        self._hooks = [block.cross.register_forward_hook(self.look, with_kwargs=True) for block in model.blocks]  # type: ignore

    def look(self, module: Any, args: tuple[Tensor, ...], more: dict[str, Tensor], out: Tensor) -> None:
        q, k = module.q(args[0])[0], module.kv(more["context"])[0, :, :64]
        for head in range(HEADS):
            part = slice(16 * head, 16 * head + 16)
            self.total += (q[:, part] @ k[:, part].T / 4).softmax(-1) / HEADS
        self.forwards += 1

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def test_looks_are_what_places_give_the_words_of_each_thing(task: TwoThingsWords) -> None:
    item = task.item(READER, 0, 0)
    context = denoiser().read(torch.tensor([item.prompt.tokens]))
    maps = Maps(denoiser())
    made = sample(noise_of(item), lambda _, x, t: denoiser()(noised=x, t=t, context=context), STEPS)
    maps.remove()
    assert maps.forwards == 3 * STEPS
    sheet = sheet_of(item)
    want = maps.total / 3  # the mean over layers
    assert sheet.looks.shape == (2, 8, 8)
    assert close_model(sheet.looks[0].flatten(), want[:, 0] + want[:, 1])
    assert close_model(sheet.looks[1].flatten(), want[:, 2] + want[:, 3])
    assert torch.equal(sheet.boxes, task.boxes(made)[0])


def test_boxes_are_where_things_stand(task: TwoThingsWords) -> None:
    pictures, _, covered = draw(40, torch.Generator().manual_seed(2))
    found = task.boxes(pictures)
    assert found.shape == (40, 2, SIDE, SIDE)
    for boxes, things in zip(found, covered, strict=True):
        for box, thing in zip(boxes, things, strict=True):
            rows, columns = thing.nonzero().unbind(-1)
            want = torch.zeros(SIDE, SIDE)
            if len(rows):
                want[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = 1
            assert torch.equal(box, want)
    assert not found[:, 0, :, HALF:].any()
    assert int(found.flatten(2).sum(-1).max()) == 49


def given(looks: Tensor, boxes: Tensor) -> Sheet:
    return Sheet((), (), torch.empty(0), looks=looks, boxes=boxes)


def test_peaks_shares_and_chance_are_counted() -> None:
    task = TwoThingsWords()
    boxes = torch.zeros(2, 4, 4)
    boxes[0, 0:2, 0:2] = 1  # one of four tokens, of which each has four dots
    boxes[1, 0:4, 2:4] = 1  # two of them
    looks = torch.tensor([[[0.2, 0.3], [0.0, 0.5]], [[0.1, 0.2], [0.1, 0.6]]])
    sheet = given(looks, boxes)
    assert task.score(ITEM, sheet) == 1 / 2  # that of the second alone
    assert task.nats(ITEM, sheet) == pytest.approx((math.log(0.2) + math.log(0.8)) / 2)
    assert task.guessed(ITEM, sheet) == (1 / 4 + 2 / 4) / 2
    assert task.chance(ITEM) is None
    assert task.score(ITEM, given(looks.flip(0), boxes)) == 1 / 2
    assert task.score(ITEM, given(torch.zeros(2, 2, 2), boxes)) == 0  # what no place gives anything


def test_a_picture_may_be_wider_than_it_is_tall() -> None:
    boxes = torch.zeros(1, 4, 6)
    boxes[0, 0:2, 4:6] = 1  # the last of three tokens above
    sheet = given(torch.tensor([[[0.1, 0.2, 0.4], [0.1, 0.1, 0.1]]]), boxes)
    assert TwoThingsWords().score(ITEM, sheet) == 1
    assert TwoThingsWords().guessed(ITEM, sheet) == 1 / 6


def test_a_token_stands_for_a_box_where_half_as_much_of_it_lies_there_as_of_any_other() -> None:
    boxes = torch.zeros(1, 4, 4)
    boxes[0, 1:4, 1] = 1  # two dots of the lower left, one of the upper left
    looks = torch.tensor([[[0.5, 0.2], [0.3, 0.0]]])
    assert TwoThingsWords().score(ITEM, given(looks, boxes)) == 1
    boxes[0, 2:4, 0] = 1  # four, and one
    assert TwoThingsWords().score(ITEM, given(looks, boxes)) == 0


def test_what_was_not_drawn_does_not_count() -> None:
    task, boxes = TwoThingsWords(), torch.zeros(2, 4, 4)
    boxes[1, 2:4, 2:4] = 1
    looks = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.1, 0.1], [0.2, 0.6]]])
    assert task.score(ITEM, given(looks, boxes)) == 1
    assert task.nats(ITEM, given(looks, boxes)) == pytest.approx(math.log(0.6))
    assert task.guessed(ITEM, given(looks, boxes)) == 1 / 4
    nothing = given(looks, torch.zeros(2, 4, 4))
    assert (task.score(ITEM, nothing), task.guessed(ITEM, nothing)) == (0, 0)
    assert task.nats(ITEM, nothing) == pytest.approx(math.log(1e-6))


def test_a_look_that_is_only_tried_is_not_told(task: TwoThingsWords) -> None:
    """Of a step that is moved down a slope, the forward that makes the slope is none of those that draw."""
    moving = AttendAndExcite(grid=(8, 8), sharpness=5.0)
    for steps in (1, STEPS):
        item = replace(task, steps=steps).on(denoiser(), READER).item(READER, 1, 0)
        for what in (None, moving, SoftPAG(w=1.0)):
            whole = float(sheet_of(item, what).looks.sum())
            assert 32 * steps < whole < 64 * steps, "each place gives all words together one, a step"
    assert not close(sheet_of(item, moving).looks, sheet_of(item).looks), "what is moved is told"


def test_methods_change_what_is_seen_and_guidance_tells_of_its_first_run(task: TwoThingsWords) -> None:
    item = task.item(READER, 2, 0)
    plain = sheet_of(item)
    assert not close(sheet_of(item, TempScale(0.5)).looks, plain.looks)
    assert close_model(sheet_of(item, SoftPAG.neutral()).looks, plain.looks)
    one = replace(task, steps=1).on(denoiser(), READER).item(READER, 2, 0)
    assert close_model(sheet_of(one, SoftPAG(w=3.0)).looks, sheet_of(one).looks)  # the strong run is the model's own
    assert not close_model(sheet_of(item, SoftPAG(w=3.0)).looks, plain.looks)  # of another picture


def test_it_is_compared(tmp_path: Path) -> None:
    found = compare(models.denoiser(), ["softpag(w=1.0)", "tempscale(0.5)"], ["scene_words(steps=3)"], prompts=4)
    assert not found.refused
    answers = [record for record in found.records if isinstance(record, Answered)]
    assert len(answers) == 12
    assert all(0.1 < (record.chance or 0) < 0.4 for record in answers)
    told = str(found)
    assert "how much of what a thing's words get comes from there" in told
    guess = sum(record.chance or 0 for record in answers if record.contender == "unedited") / 4
    assert f"Guessing scores {guess:.0%}" in told


def test_a_thing_without_words_is_refused() -> None:
    class Unnamed(TwoThingsWords):
        name = "unnamed"
        about = "Has the words of one thing alone."

        def scene(self, tokenizer: Any, draw: Any) -> Scene:
            scene = super().scene(tokenizer, draw)
            return replace(scene, prompt=Prompt(scene.prompt.tokens, {"things": ((0, 2),)}))

    with pytest.raises(FieldError, match="must have the words of each of 2 things in a span"):
        Unnamed(steps=1).on(denoiser(), READER).item(READER, 0, 0)
    assert isinstance(find("scene_words"), TwoThingsWords)
    assert find("scenewords").told == ()
