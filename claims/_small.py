"""Each claim at its smallest, to see that it still runs: what comes out says nothing about the paper.

A claim is measured once and read for years, and what it calls goes on changing. Here seed 0 alone is asked for, with
trainings of a step or two, few texts and pictures, and in SmolLM2's place a model of its layers, heads and words that
is narrow and has learnt nothing. Each claim is measured in a process of its own, and leaves nothing behind.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from claims import _loaded, ledger
from claims.ledger import Claim
from heedful import models
from heedful.core.method import Part, Stack, as_stack
from heedful.engine.run import Run
from heedful.laboratory import costs
from heedful.laboratory.course import Course
from heedful.laboratory.records import Record, Trainings
from heedful.laboratory.training import fresh, opened

STEPS, FEW = 2, 4
AT_MOST = {  # by the names that claims give to how often or with how many, and to what a training must reach
    **dict.fromkeys(("BATCHES", "EPOCHS", "FIT_STEPS", "LESSONS", "REPEATS", "ROUNDS", "SEEDS", "STEPS"), STEPS),
    **dict.fromkeys(("DRAWS", "HELD_OUT", "ITEMS", "LEARN", "PICTURES", "PROMPTS"), FEW),
    **dict.fromkeys(("QUESTIONS", "SEARCHED", "SENTENCES", "SHOWN", "TEXTS", "TIMES", "TRAINED"), FEW),
    **dict.fromkeys(("TRIED", "TURNS", "UNSEEN"), FEW),
    "KNOWS": 0.0,
}
LEAST = {  # by file and name, where fewer leave nothing to be measured
    ("P282", "STEPS"): 400,  # what is silenced must have learnt to answer
    ("P289", "EPOCHS"): 10,  # of features that are not yet sparse more fire at a token than there are axes
}
MUCH = 100.0  # more of anything than any claim wants to see before it goes on


class Tried(NamedTuple):
    """One claim that was tried."""

    key: str
    seconds: float
    fault: str  # what went wrong and where; empty if nothing did


class _Few(Trainings):
    """Trainings that take one gradient and no step, all of which have the same numbers."""

    def record(self, course: Course, what: Part | Stack | None, seed: int, *_: Any) -> Record:
        with self.opened(course, what, seed) as run:
            run(**course.batch(seed, torch.Generator().manual_seed(seed)))
            count = sum(p.numel() for p in run.model.parameters())
        numbers = dict.fromkeys((x.name for x in (*course.quantities, *costs.quantities(course))), MUCH)
        return Record("", course.name, {}, "", seed, numbers, [MUCH], [MUCH], count, 0, True, 0.0, {}, {}, "")

    @contextmanager
    def opened(self, course: Course, what: Part | Stack | None, seed: int, *readers: Any) -> Iterator[Run]:
        stack = as_stack(what)
        with fresh(course, stack, seed) as run:
            run(**course.batch(seed, torch.Generator().manual_seed(seed)))["loss"].backward()
            weights = {name: p.detach() for name, p in run.model.named_parameters()}
        with opened(course, stack, seed, weights, *readers) as run:
            yield run


def narrow(folder: Path) -> None:
    """Write a language model that has SmolLM2's layers, heads and words, and knows none of them."""
    from transformers import AutoModelForCausalLM

    whole = models.default()
    config = whole.model.config
    config.head_dim = 8
    config.hidden_size = config.num_attention_heads * config.head_dim
    config.intermediate_size = 2 * config.hidden_size
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    whole.tokenizer.save_pretrained(folder)


def shrink(folder: Path | None) -> None:
    """Make all that claims share small, in this process and for good; the folder, if any, holds the language model."""
    if folder:
        os.environ[models.DEFAULT_VARIABLE] = str(folder)
        _loaded.default.cache_clear()
    for name in ("record", "opened"):
        setattr(Trainings, name, getattr(_Few, name))
    for module in [module for name, module in sys.modules.items() if name.startswith("claims.")]:
        for name in AT_MOST.keys() & vars(module).keys():
            if isinstance(value := getattr(module, name), int | float):
                least = LEAST.get((module.__name__.removeprefix("claims."), name), 0)
                setattr(module, name, min(value, max(AT_MOST[name], least)))


def measured(claim: Claim) -> None:
    """Measure one draw, and refuse what no record could hold."""
    torch.manual_seed(0)
    effect, numbers = claim.measure(0)
    if wrong := [name for name, value in {"effect": effect, **numbers}.items() if not math.isfinite(value)]:
        raise ValueError(f"{claim.key}: {', '.join(wrong)} must be finite")
    record = ledger.RESULTS / f"{claim.key}.json"
    if record.exists():
        known = json.loads(record.read_text())["details"][0].keys()
        if unlike := known ^ numbers.keys():
            raise ValueError(f"{claim.key}: its record must have the same numbers, and only one has {sorted(unlike)}")


def tried(claims: Mapping[str, Claim]) -> Iterator[Tried]:
    """Each of the claims, as it comes out; one that wants what a language model has learnt gets SmolLM2 itself."""
    torch.set_num_threads(1)  # what has used several may not be forked
    with TemporaryDirectory() as folder:
        narrow(Path(folder))
        for claim in claims.values():
            began = time.perf_counter()
            fault = _apart(claim, Path(folder)) and _apart(claim, None)
            yield Tried(claim.key, time.perf_counter() - began, fault)


def _apart(claim: Claim, folder: Path | None) -> str:
    """What goes wrong with a claim in a process of its own."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=_told, args=(there, claim, folder))
    process.start()
    there.close()
    try:
        fault: str = here.recv()
    except EOFError:
        process.join()
        fault = f"its process ended with {process.exitcode}"
    process.join()
    return fault


def _told(to: Connection, claim: Claim, folder: Path | None) -> None:
    fault = ""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so small, much changes nothing
        try:
            shrink(folder)
            measured(claim)
        except ZeroDivisionError:
            pass  # so small, two ways may come out alike, and no share of their difference is there to be told
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told, and the next claim is tried
            fault = f"{error!r}\n{''.join(traceback.format_tb(error.__traceback__))}"
    to.send(fault)
