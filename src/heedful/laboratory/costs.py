"""What a mechanism costs on a course's model, as ratios to softmax measured in turn with it."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Generator, nn

from heedful.adapters.wrapped import device_of
from heedful.bench.cost import cost
from heedful.bench.results import price
from heedful.core.method import Stack
from heedful.laboratory.course import Course, Quantity
from heedful.laboratory.training import fresh, trainer_of
from heedful.tasks.task import Item

TURNS = 5
TRAIN, READ, TOKEN, CACHE = "training", "reading", "decoding", "cache"
RATIO = "× softmax"
PLAIN = "softmax"


def quantities(course: Course) -> tuple[Quantity, ...]:
    """The costs that are measured with a course."""
    if not course.timed:
        return ()
    step = Quantity(TRAIN, "Time of a training step.", RATIO, False)
    if course.prompt is None:
        return (step,)
    more = f"a text of {len(course.prompt)}"
    return (
        step,
        Quantity(READ, f"Time to read {more} with a cache.", RATIO, False),
        Quantity(TOKEN, f"Time of one more token after {more}.", RATIO, False),
        Quantity(CACHE, f"Bytes held after {more}.", RATIO, False),
    )


def measure(course: Course, what: Stack, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    """The quantities, medians over turns, and the plain numbers behind them."""
    if not course.timed:
        return {}, {}
    one, other = (_Stepping(course, stack, seed) for stack in (Stack(), what))
    pairs = []
    try:
        for turn in range(TURNS + 1):
            pair = one.step(), other.step()
            if turn:  # the first warms up
                pairs.append(pair)
    finally:
        one.run.close()
        other.run.close()
    ratios = {TRAIN: statistics.median(mine / plain for plain, mine in pairs)}
    steps = {"training step": statistics.median(mine for _, mine in pairs)}
    if course.prompt is None:
        return ratios, steps
    model = course.model(seed)
    found = [
        {turn: cost(model, stack, name, Item(course.prompt), turn, only=course.only) for turn in range(TURNS + 1)}
        for name, stack in ((PLAIN, Stack()), (repr(what), what))
    ]
    told = price(found[1], found[0])
    ratios |= {name: told.ratios[cost].median for name, cost in ((READ, "prefill"), (TOKEN, "token"), (CACHE, "cache"))}
    return ratios, steps | asdict(told)


class _Stepping:
    """A model that makes training steps, one when asked."""

    def __init__(self, course: Course, what: Stack, seed: int) -> None:
        self.run = fresh(course, what, seed)
        with trainer_of(self.run, course, seed) as trainer:
            self.optimiser = trainer.create_optimizer()
        self.run.model.train()
        self.device = device_of(self.run.model)  # where the Trainer put it
        self.batch = {k: x.to(self.device) for k, x in course.batch(seed, Generator().manual_seed(seed)).items()}
        self.longest = course.recipe.longest

    def step(self) -> float:
        began = self._now()
        self.optimiser.zero_grad()
        self.run(**self.batch).loss.backward()
        nn.utils.clip_grad_norm_(self.run.model.parameters(), self.longest)
        self.optimiser.step()
        return self._now() - began

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
