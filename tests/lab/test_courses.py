"""What is trained on: texts that part, puzzles that can be solved, and a beginning that all mechanisms share."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor, nn

from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.method import Stack
from heedful.laboratory import puzzles
from heedful.laboratory.language import Text, eight_bits, text
from heedful.laboratory.puzzles import BLANK, GO, KEYS, PUZZLES, VALUES, Puzzles
from heedful.laboratory.training import fresh
from heedful.methods import GatedHeads
from tests.lab.small import Little, Riddles

ROWS = 32


def made(name: str, times: int = 1) -> tuple[list[list[int]], Tensor]:
    ids, graded = PUZZLES[name](Generator().manual_seed(times), ROWS, times)
    return ids.tolist(), graded


def test_every_seed_holds_out_another_tenth_and_trains_on_the_others() -> None:
    parts = [bytes(text(seed, held_out=True).tolist()) for seed in range(10)]
    assert len(set(parts)) == 10
    for seed in (0, 3):
        rest = bytes(text(seed, held_out=False).tolist())
        assert parts[seed][:200] not in rest
        assert all(part[:200] in rest for other, part in enumerate(parts) if other != seed)


def test_a_text_of_any_length_is_the_same_bytes() -> None:
    course = Text()
    rows = [torch.cat([x.flatten() for x in course.held_out(1, n)]) for n in (1, 2, 4, 8)]
    assert all(torch.equal(rows[0], x) for x in rows)
    assert [next(course.held_out(1, n)).shape for n in (1, 8)] == [(32, 128), (4, 1024)]
    assert 30_000 < len(rows[0]) <= len(text(1, held_out=True))


@pytest.mark.parametrize("course", [Little(), Riddles()])
def test_batches_depend_on_the_seed_alone(course: Text | Puzzles) -> None:
    first, again, other = (course.batch(0, Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], other["input_ids"])
    assert first["input_ids"].numel() == course.a_batch


def test_all_mechanisms_begin_with_the_same_weights() -> None:
    with fresh(Little(), Stack(), 3) as plain, fresh(Little(), Stack((GatedHeads(),)), 3) as gated:
        weights = dict(gated.model.named_parameters())
        assert all(torch.equal(p, weights[name]) for name, p in plain.model.named_parameters())
        assert gated.parameters()
    with fresh(Little(), Stack(), 4) as other:
        assert not torch.equal(other.model.lm_head.weight, plain.model.lm_head.weight)


@pytest.mark.parametrize("times", [1, 2])
def test_recall_asks_for_what_was_told(times: int) -> None:
    rows, graded = made("recall", times)
    for ids, marks in zip(rows, graded.tolist(), strict=True):
        split = ids.index(GO)
        told = dict(zip(ids[:split:2], ids[1:split:2], strict=True))
        asked = dict(zip(ids[split + 1 :: 2], ids[split + 2 :: 2], strict=True))
        assert asked == told
        assert len(told) == 8 * times
        assert set(told) <= set(KEYS.tolist())
        assert [i for i, mark in enumerate(marks) if mark] == list(range(split + 2, len(ids), 2))
    assert any(ids[0] != ids[ids.index(GO) + 1] for ids in rows), "keys come in another order"


@pytest.mark.parametrize("times", [1, 2])
def test_a_selective_copy_leaves_the_blanks_out(times: int) -> None:
    rows, graded = made("copy", times)
    for ids, marks in zip(rows, graded.tolist(), strict=True):
        split = ids.index(GO)
        assert split == 32 * times
        assert ids[split + 1 :] == [x for x in ids[:split] if x != BLANK]
        assert marks == [i > split for i in range(len(ids))]
        assert len(ids) - split - 1 == 8 * times


@pytest.mark.parametrize("times", [1, 2])
def test_repetition_repeats_unlike_words(times: int) -> None:
    rows, graded = made("repetition", times)
    for ids, marks in zip(rows, graded.tolist(), strict=True):
        split = ids.index(GO)
        assert ids[:split] == ids[split + 1 :]
        assert len(set(ids[:split])) == split == 16 * times
        assert marks == [i > split + 1 for i in range(len(ids))]


@pytest.mark.parametrize("times", [1, 2])
def test_the_needle_lies_once_in_the_hay(times: int) -> None:
    rows, graded = made("needle", times)
    places = set()
    for ids, marks in zip(rows, graded.tolist(), strict=True):
        split = ids.index(GO)
        assert split == 40 * times
        (place,) = [i for i, x in enumerate(ids[:split]) if x in KEYS.tolist()]
        assert ids[split + 1 :] == ids[place : place + 2]
        assert ids[place + 1] in VALUES.tolist()
        assert marks == [i == len(ids) - 1 for i in range(len(ids))]
        places.add(place)
    assert len(places) > 10


def test_a_batch_of_puzzles_grades_what_can_be_known_and_names_each() -> None:
    course = Puzzles(rows=2)
    made = course.batch(0, Generator().manual_seed(0))
    ids, labels = made["input_ids"], made["labels"]
    assert ids.shape == labels.shape == (8, 48)
    assert ids[:, 0].tolist() == [2, 2, 3, 3, 4, 4, 5, 5]
    known = labels != puzzles.UNGRADED
    assert torch.equal(labels[known], ids[known])
    assert known.sum(1).tolist() == [8, 8, 8, 8, 15, 15, 1, 1]


def test_eight_bits_round_weights_and_inputs_and_give_them_back() -> None:
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = torch.tensor([[1.27, -0.311, 0.822]])
    x = torch.tensor([[0.0, 2.55, 1.004]])
    before = layer.weight.data.clone()
    with torch.no_grad():
        exact = layer(x)
        with eight_bits(nn.Sequential(layer)):
            step = 2 * 1.27 / 255
            weights = [round((w + 1.27) / step) * step - 1.27 for w in (1.27, -0.311, 0.822)]
            wanted = sum(w * v for w, v in zip(weights, (0.0, 2.55, 1.0), strict=True))
            assert close(layer(x), torch.tensor([[wanted]]))
        assert torch.equal(layer.weight.data, before)
        assert torch.equal(layer(x), exact)
    assert abs(float(exact) - wanted) > 0.003


def test_a_map_that_is_given_no_rows_has_nothing_to_round() -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad(), eight_bits(nn.Sequential(layer)):
        assert layer(torch.empty(0, 3)).shape == (0, 2)


def test_a_budget_below_one_batch_is_refused() -> None:
    with pytest.raises(FieldError, match="enough for one batch, which has 1024"):
        Text(tokens=1000)
    with pytest.raises(FieldError, match="multiple of 4 heads"):
        Text(width=63)
