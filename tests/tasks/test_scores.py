"""What a task makes of a sheet, and what guessing scores."""

from __future__ import annotations

import itertools
import random
import re
import statistics
from math import isclose

import pytest
import torch

from heedful.core.errors import FieldError
from heedful.core.kinds.tokens import Prompt
from heedful.tasks.choices import IOI, ColouredObjects, GreaterThan
from heedful.tasks.documents import DocumentQA
from heedful.tasks.facts import Capitals, Hypernyms
from heedful.tasks.loss import LossByPosition
from heedful.tasks.needle import Needle, NeedleMany
from heedful.tasks.recall import Induction, KeyValueRecall, MultiQueryRecall
from heedful.tasks.task import Item, Sheet, Task, chosen, recalled
from tests.tasks.conftest import Bytes

NONE = torch.empty(0)


def likely(*options: list[float]) -> Sheet:
    return Sheet(tuple(torch.tensor(option) for option in options), (True,), NONE)


def test_the_option_with_the_best_mean_is_chosen() -> None:
    assert chosen(likely([-1.0, -3.0], [-2.1])) == 1  # the sum would say the second
    assert chosen(likely([-2.0], [-1.0])) == 0
    assert chosen(likely([-1.0], [-1.0], [-2.0])) == 0  # a tie is no choice
    assert chosen(likely([float("nan")], [-1.0])) == 0
    assert likely([-1.0, -3.0]).means == (-2.0,)


def test_a_recalled_answer_is_right_to_the_last_token() -> None:
    assert recalled(Sheet((NONE,), (True, True), NONE)) == 1
    assert recalled(Sheet((NONE,), (True, False), NONE)) == 0


def test_graded_places_are_those_of_the_losses() -> None:
    prompt = Prompt(tuple(range(9)), {"answer": ((1, 3), (4, 6), (8, 9))})
    assert Item(prompt).graded("answer") == [range(2), range(3, 5), range(7, 8)]
    assert Item(prompt, cut=4).graded("answer") == [range(2), range(4, 5)]


def test_a_value_counts_when_all_of_it_is_right() -> None:
    task = MultiQueryRecall(pairs=3, digits=2)
    item = task.items(Bytes(), 1)[0]
    positions = item.graded("answer")
    rights = [True] * (len(item.prompt) - (item.cut or 1))
    assert task.score(item, Sheet((), tuple(rights), NONE)) == 1
    rights[positions[1][-1]] = False
    assert isclose(task.score(item, Sheet((), tuple(rights), NONE)), 2 / 3)
    rights[positions[0][-1] + 1] = False  # the key that comes next cannot be known
    assert isclose(task.score(item, Sheet((), tuple(rights), NONE)), 2 / 3)


def test_induction_counts_what_can_be_known() -> None:
    task = Induction(length=5)
    item = task.items(Bytes(), 1)[0]
    rights = [False] + [True] * 4  # of the second five, the last four repeat what came behind their like
    assert task.score(item, Sheet((), tuple(rights), NONE)) == 1
    rights[-1] = False
    assert task.score(item, Sheet((), tuple(rights), NONE)) == 0.75


def test_nats_are_those_of_what_is_right() -> None:
    """Tokens that cannot be known would drown what a method does to those that can."""
    task = Induction(length=5)
    item = task.items(Bytes(), 1)[0]
    assert task.nats(item, Sheet((), (), torch.tensor([90.0, 1.0, 2.0, 3.0, 6.0]))) == -3
    many = MultiQueryRecall(pairs=2, digits=1)
    item = many.items(Bytes(), 1)[0]
    losses = torch.full((len(item.prompt) - (item.cut or 1),), 90.0)
    losses[[place for span in item.graded("answer") for place in span]] = 2.0
    assert many.nats(item, Sheet((), (), losses)) == -2
    loss = LossByPosition(length=32)
    assert loss.nats(loss.items(Bytes(), 1)[0], Sheet((), (), torch.tensor([1.0, 2.0, 6.0]))) == -3
    choice = IOI()
    assert choice.nats(choice.items(Bytes(), 1)[0], likely([-1.0, -3.0], [-9.0], [-9.0])) == -2


def test_loss_is_the_mean() -> None:
    task = LossByPosition(length=32)
    assert task.score(task.items(Bytes(), 1)[0], Sheet((), (), torch.tensor([1.0, 2.0, 6.0]))) == 3
    assert not task.more_is_better


@pytest.mark.parametrize(
    "task", [IOI(), IOI(people=2), GreaterThan(), ColouredObjects(), DocumentQA(), DocumentQA(documents=2), Capitals(),
             Hypernyms(choices=3)], ids=repr,
)  # fmt: skip
def test_chance_of_a_choice_is_what_guessing_scores(task: Task) -> None:
    item = task.items(Bytes(), 1)[0]
    ranks = itertools.permutations(range(len(item.options)))
    scores = [task.score(item, likely(*([-float(rank)] for rank in order))) for order in ranks]
    chance = task.chance(item)
    assert chance is not None
    assert isclose(statistics.fmean(scores), chance)


@pytest.mark.parametrize(
    "task", [KeyValueRecall(), KeyValueRecall(pairs=3, digits=1), NeedleMany(length=512)], ids=repr
)
def test_chance_of_a_recall_is_what_a_random_value_of_the_prompt_scores(task: Task) -> None:
    for item in task.items(Bytes(), 5):
        text = Bytes().decode(item.prompt.tokens)
        right = Bytes().decode(item.options[0]).strip()
        values = re.findall(r"(?:code of the \w+ is|\w+:) (\d+)", text)
        chance = task.chance(item)
        assert chance is not None
        assert isclose(statistics.fmean(value == right for value in values), chance)


def test_chance_of_one_needle_is_a_code_drawn_blindly() -> None:
    task = Needle(digits=2)
    item = task.items(Bytes(), 1)[0]
    codes = ["".join(digits) for digits in itertools.product("0123456789", repeat=2)]
    right = Bytes().decode(item.options[0]).strip()
    assert isclose(statistics.fmean(code == right for code in codes), task.chance(item))


@pytest.mark.parametrize(("task", "draws"), [(MultiQueryRecall(pairs=4), 4000), (Induction(length=6), 4000)], ids=repr)
def test_chance_of_many_answers_is_what_guesses_from_the_prompt_score(task: Task, draws: int) -> None:
    draw = random.Random(0)
    item = task.items(Bytes(), 1)[0]
    first, tokens = item.cut or 1, item.prompt.tokens
    if isinstance(task, Induction):
        pool = [(token,) for token in sorted(set(tokens[1:]))]
    else:
        pool = [tokens[a:b] for a, b in item.prompt.roles["needle"]]
    total = 0.0
    for _ in range(draws):
        rights = [False] * (len(tokens) - first)
        for start, stop in item.prompt.roles["answer"]:
            width = len(pool[0])
            for a in range(start, stop, width):
                guess = draw.choice(pool)
                for i, token in enumerate(guess):
                    rights[a + i - first] = tokens[a + i] == token
        total += task.score(item, Sheet((), tuple(rights), NONE))
    chance = task.chance(item)
    assert chance is not None
    assert abs(total / draws - chance) < 0.02


def test_items_refuse_what_cannot_be_graded() -> None:
    with pytest.raises(FieldError, match="one token or more"):
        Item(Prompt((1, 2)), ((),))
    with pytest.raises(FieldError, match="inside the prompt"):
        Item(Prompt((1, 2)), cut=2)
