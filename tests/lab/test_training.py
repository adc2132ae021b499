"""A training: the steps by hand, its record, what is found again, and what is trained anew."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Generator, Tensor

from heedful.authoring import Call, Mean, Method, Site, reads
from heedful.conformance.tolerances import close_model
from heedful.core import code
from heedful.core.errors import StatisticError
from heedful.core.method import Stack, as_stack
from heedful.laboratory import costs, records, training
from heedful.laboratory.course import Course, Recipe
from heedful.laboratory.records import Trainings, key
from heedful.laboratory.training import MissingTrainer, fresh, train
from heedful.methods import GatedHeads, MixtureOfHeads, RectifiedAttention
from tests.lab.small import FEW, Fails, Halved, Little, Riddles

COURSE = Little(tokens=6 * 32)


@dataclass(frozen=True)
class Brisk(Little):
    """Little by another recipe in everything."""

    recipe: ClassVar[Recipe] = Recipe(rate=2e-2, warm_up=2, decay=0.2, memory=0.9, longest=0.5)


USUAL = {"highest": 3e-3, "rise": 3, "decayed": 0.01, "memory": 0.999, "longest": 1.0}  # half of six steps, for 20
OTHERS = {  # of six steps as well
    Brisk(tokens=6 * 32): {"highest": 2e-2, "rise": 2, "decayed": 0.2, "memory": 0.9, "longest": 0.5},
    FEW: {"highest": 2e-2, "rise": 3, "decayed": 0.0, "memory": 0.99, "longest": math.inf},
}


def by_hand(
    course: Course, what: Stack, seed: int, *, highest: float, rise: int, decayed: float, memory: float, longest: float
) -> tuple[Any, list[float], list[float]]:
    """Six steps of AdamW, written out: a rise, half a cosine, gradients cut to a length."""
    run, random = fresh(course, what, seed), Generator().manual_seed(seed)
    model, losses, norms = run.model, [], []
    model.train()
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for step in range(6):
        rate = highest * (step / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / (6 - rise))))
        model.zero_grad()
        loss = model(**course.batch(seed, random)).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())))
        with torch.no_grad():
            for name, p in model.named_parameters():
                g, (m, v) = p.grad * min(1.0, longest / (norms[-1] + 1e-6)), state[name]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(memory).add_((1 - memory) * g * g)
                decay = decayed if p.ndim > 1 else 0.0  # norms' weights are left alone
                p.mul_(1 - rate * decay)
                p -= rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - memory ** (step + 1))).sqrt() + 1e-8)
    run.close()
    return model, losses, norms


@pytest.mark.parametrize("what", [None, Halved(), MixtureOfHeads(1, 1)])  # the last with a penalty in its loss
def test_the_steps_are_those_that_we_say(what: Method | None) -> None:
    assert_same(COURSE, as_stack(what), USUAL)


@pytest.mark.parametrize("course", OTHERS, ids=lambda course: course.name)
def test_a_course_may_have_a_recipe_of_its_own(course: Course) -> None:
    assert_same(course, Stack(), OTHERS[course])


def assert_same(course: Course, what: Stack, recipe: dict[str, Any]) -> None:
    found = train(course, what, 1)
    model, losses, norms = by_hand(course, what, 1, **recipe)
    assert close_model(torch.tensor(found.losses), torch.tensor(losses))
    assert close_model(torch.tensor(found.norms), torch.tensor(norms))
    weights = dict(model.named_parameters())
    assert set(weights) <= set(found.weights)
    assert all(close_model(found.weights[name], p) for name, p in weights.items())


def test_a_record_has_what_was_found_and_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Trainings(tmp_path)
    told: list[int] = []
    made = kept.record(COURSE, RectifiedAttention(), 0, told.append)
    assert told == [1, 2, 3, 4, 5, 6]
    assert len(made.losses) == len(made.norms) == 6
    assert made.active
    assert made.learned == 32  # a gate and a norm of 16 each
    plain = kept.record(COURSE, None, 0)
    assert made.parameters - plain.parameters == made.learned
    assert {q.name for q in COURSE.quantities} <= set(made.numbers)
    monkeypatch.setattr(records, "train", lambda *_: pytest.fail("it was trained already"))
    assert kept.record(COURSE, RectifiedAttention(), 0) == made
    assert Trainings(tmp_path).all() == sorted([made, plain], key=lambda r: r.mechanism)
    with pytest.raises(StatisticError, match="RectifiedAttention has no 'accuracy' in the course 'text'; it has loss"):
        made["accuracy"]


def test_an_opened_model_is_the_trained_one(tmp_path: Path) -> None:
    class _Length(Method):
        @reads(Site.HEAD_OUTPUT)
        def read(self, heads: Tensor, call: Call) -> Mean:
            return Mean.of(heads.norm(dim=-1).sum(), heads.shape[:3].numel())

    kept = Trainings(tmp_path)
    made = kept.record(COURSE, GatedHeads(), 2)
    with kept.opened(COURSE, GatedHeads(), 2, reader := _Length()) as run:
        assert not run.model.training
        assert COURSE.loss(run, 2) == made["loss"]
        assert run[reader]
    before = GatedHeads() | Halved()
    with kept.opened(COURSE, before, 2) as run:
        assert COURSE.loss(run, 2) == kept.record(COURSE, before, 2)["loss"] != made["loss"]


def test_what_is_another_training_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(course: Any = COURSE, what: Any = None, seed: int = 0) -> str:
        return key(course, as_stack(what), seed)

    names = [
        of(), of(seed=1), of(Little()), of(Riddles()), of(what=Halved()), of(what=Halved(0.25)),
        of(what=Halved().on(heads=0)), of(what=Halved() | GatedHeads()),
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert of(what=Stack()) == of(what=None) == names[0]
    read = code.file_of
    monkeypatch.setattr(code, "file_of", lambda name: read(name) + "#" * (name == "tests.lab.small"))
    assert of(what=Halved()) != names[4]
    monkeypatch.setattr(code, "file_of", lambda name: read(name) + "#" * (name == training.__name__))
    assert of(what=RectifiedAttention()) != names[0]


def test_a_training_that_is_cut_short_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Trainings(tmp_path)

    def killed(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records, "replace_text", killed)
        with pytest.raises(KeyboardInterrupt):
            kept.record(COURSE, None, 0)
    assert not kept.has(COURSE, None, 0)
    assert kept.all() == []
    kept.record(COURSE, None, 0)
    assert kept.has(COURSE, None, 0)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    kept = Trainings(tmp_path)
    kept.record(COURSE, None, 0)
    (path,) = tmp_path.glob("*.json")
    path.write_text(json.dumps({"key": "x"}))
    with pytest.raises(StatisticError, match="is no record of a training"):
        kept.record(COURSE, None, 0)


def test_a_model_that_was_refused_is_given_back(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="Fails"):
        Trainings(tmp_path).record(COURSE, Fails(), 0)
    assert not list(tmp_path.iterdir())


def test_readers_that_cannot_act_are_left_out(tmp_path: Path) -> None:
    from heedful.methods import MALA

    numbers = Trainings(tmp_path).record(COURSE, MALA(), 0).numbers  # has no map
    assert "sinks" not in numbers
    assert {"loss", "largest", "kurtosis"} <= set(numbers)


def test_without_accelerate_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingTrainer, match=r"pip install 'heedful\[lab\]'"):
        train(COURSE, Stack(), 0)


def _decays(optimiser: torch.optim.Optimizer) -> list[tuple[float, int]]:
    return [(group["weight_decay"], len(group["params"])) for group in optimiser.param_groups]


def test_costs_are_those_of_the_optimiser_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    made: list[torch.optim.Optimizer] = []
    whole = Trainer.create_optimizer
    monkeypatch.setattr(Trainer, "create_optimizer", lambda *args: made.append(whole(*args)) or made[-1])
    course = Brisk(tokens=6 * 32)
    train(course, Stack(), 0)
    stepping = costs._Stepping(course, Stack(), 0)
    stepping.run.close()
    one, other = ([made[0].defaults, *_decays(made[0])], [stepping.optimiser.defaults, *_decays(stepping.optimiser)])
    assert one == other
    assert type(made[0]) is type(stepping.optimiser)
    assert other[0]["betas"] == (0.9, 0.9)
    assert other[1:] == [(0.2, 8), (0.0, 3)]  # norms' weights are left alone


def test_costs_are_ratios_to_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1
        return clock[0]

    class _Slow(Method):
        @reads(Site.QUERY)
        def wait(self, q: Tensor, call: Call) -> Mean:
            clock[0] += 0.5
            return Mean.of(q.sum(), 1)

    monkeypatch.setattr("time.perf_counter", tick)
    ratios, plain = costs.measure(COURSE, Stack((_Slow(),)), 0)
    assert ratios == {"training": 1.5, "reading": 1.5, "decoding": 1.5, "cache": 1.0}
    assert plain["tokens"] == 4 * COURSE.length
    assert costs.measure(Riddles(), Stack(), 0) == ({}, {})
