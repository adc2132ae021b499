"""Words that follow from the one before or are the one before that: the texts' rule, what is read, what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Generator, Tensor

from heedful import attach
from heedful.authoring import Call, Mean, Method, Site, at, reads
from heedful.core.errors import FieldError
from heedful.core.method import Stack
from heedful.laboratory.backcopy import TRIED, BackCopy, _Resting, table
from heedful.laboratory.language import eight_bits
from heedful.laboratory.records import Trainings
from heedful.methods import MALA
from tests.lab.small import FEW, PAPER, Halved


def by_hand(course: BackCopy, seed: int, random: Generator, rows: int) -> tuple[list[list[int]], list[list[bool]]]:
    """The texts word by word, and which of their words were copied."""
    likely = table(course.words, seed).tolist()
    chance = torch.rand(course.length, rows, generator=random, dtype=torch.float64).tolist()
    texts, copied = [], []
    for row in range(rows):
        text, copies = [0, 1 + int(chance[1][row] * course.words)], [False, False]
        for place in range(2, course.length):
            last, before = text[-1], text[-2]
            copies.append(last in range(1, course.triggers + 1) and before != 0)
            if copies[-1]:
                text.append(before)
                continue
            word, left = 1, chance[place][row] - likely[last - 1][0]
            while left > 0:
                left -= likely[last - 1][word]
                word += 1
            text.append(word)
        texts.append(text)
        copied.append(copies)
    return texts, copied


@pytest.mark.parametrize("seed", [0, 3])
def test_texts_are_those_written_word_by_word(seed: int) -> None:
    course = BackCopy(words=12)
    ids = course.drawn(seed, Generator().manual_seed(seed), 40)
    texts, copied = by_hand(course, seed, Generator().manual_seed(seed), 40)
    assert ids.tolist() == texts
    assert course.copies(ids).tolist() == copied
    shares = torch.tensor(copied).float().mean().item()
    assert 0.03 < shares < 0.6, "both happen"


def test_each_seed_has_a_table_of_its_own_and_draws_it_beside_all_others() -> None:
    before = torch.random.get_rng_state()
    one, other = table(9, 0), table(9, 1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(one, other)
    assert one.sum(1).tolist() == pytest.approx([1.0] * 9)
    often = one.sum(0).tolist()
    assert often == sorted(often, reverse=True), "triggers are the commonest"
    assert float(table(64, 0).max(1).values.mean()) > 0.2, "few words are likely behind one"


def test_a_batch_asks_for_every_word_and_measuring_reads_texts_of_no_training() -> None:
    batch = FEW.batch(1, Generator().manual_seed(1))
    assert batch["input_ids"].shape == (2, 16)
    assert batch["labels"] is batch["input_ids"]
    assert batch["input_ids"].numel() == FEW.a_batch
    model = FEW.model(0)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


class _Signed(Method):
    """Weights of both signs, which add up to anything."""

    paper = PAPER

    @at(Site.NORMALISE)
    def weigh(self, scores: Tensor, call: Call) -> Tensor:
        return scores.where(scores > -1e4, 0.0)


class _Kept(Method):
    """Keeps the weights of its last call."""

    paper = PAPER
    seen: ClassVar[list[Tensor]] = []

    @reads(Site.PATTERN)
    def read(self, weights: Tensor, call: Call) -> Mean:
        self.seen[:] = [weights]
        return Mean.of(weights.sum(), 1)


@pytest.mark.parametrize("what", [_Kept(), _Signed() | _Kept()])
def test_what_rests_is_the_share_of_the_first_token_where_nothing_is_copied(what: Method | Stack) -> None:
    model = FEW.model(0).eval()
    ids = FEW.drawn(0, Generator().manual_seed(0), 5)
    reader = _Resting(FEW.triggers)
    with torch.no_grad(), attach(model, what | reader) as run:
        run(input_ids=ids)
        found = float(run[reader][0].value)
    weights = _Kept.seen[0].abs().tolist()
    shares = [
        weights[row][head][place][0] / sum(weights[row][head][place])
        for row in range(5)
        for head in range(2)
        for place in range(16)
        if ids[row, place] > FEW.triggers
    ]
    assert found == pytest.approx(sum(shares) / len(shares), rel=1e-5)


def test_a_training_is_measured_on_texts_of_its_own(tmp_path: Path) -> None:
    kept = Trainings(tmp_path)
    made = kept.record(FEW, Halved(), 1)
    assert set(made.numbers) == {q.name for q in FEW.quantities}
    texts, copied = by_hand(FEW, 1, Generator().manual_seed(10_001), TRIED)
    ids = torch.tensor(texts)
    with kept.opened(FEW, Halved(), 1) as run:
        likely = run(input_ids=ids).logits.log_softmax(-1)
        with eight_bits(run.model):
            rounded = run(input_ids=ids).logits.log_softmax(-1)
    places = [(row, place) for row in range(TRIED) for place in range(1, FEW.length)]

    def loss(of: Tensor) -> float:
        return -sum(float(of[row, place - 1, texts[row][place]]) for row, place in places) / len(places)

    assert made["loss"] == pytest.approx(loss(likely), rel=1e-5)
    assert made["8-bit"] == pytest.approx(loss(rounded) - loss(likely), abs=1e-5)
    right = [int(likely[row, place - 1].argmax()) == texts[row][place] for row, place in places if copied[row][place]]
    assert made["copied"] == pytest.approx(sum(right) / len(right))
    numbers = kept.record(FEW, MALA(), 1).numbers  # has no map
    assert not {"resting", "sinks"} & set(numbers)


def test_settings_that_make_no_texts_are_refused() -> None:
    with pytest.raises(FieldError, match="triggers = 12: must be 1 or more, and below 12 words"):
        BackCopy(words=12, triggers=12)
    with pytest.raises(FieldError, match="enough for one batch"):
        BackCopy(tokens=7)
