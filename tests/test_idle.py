"""A method that is idle in a call costs nothing there: the model's own attention runs, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, catalogue
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.conformance.bare import ROLES
from heedful.core.call import CachedKV, Call, Phase
from heedful.core.errors import BackendError
from heedful.core.method import Method
from heedful.core.sites import Site, at, reads
from heedful.tiny import tiny

from .samples import PAPER, Scale

IDS = torch.arange(3, 27).view(2, 12)
MODEL = tiny("llama", num_hidden_layers=3)
SITES = [s for s in Site if s not in (Site.MASK, Site.NORMALISE, Site.MIX, Site.CACHE)]
SOMETIMES = sorted(  # what merges tokens is refused where a cache is read into, as here
    name
    for name, kind in catalogue.entries().items()
    if issubclass(kind, Method) and kind.idle is not Method.idle and not any(edit.merges for edit in kind.edits)
)
pytestmark = pytest.mark.filterwarnings("ignore:this run changed nothing")


class Half(Method):
    """Idle in the layer in the middle, and tells in which order it is called."""

    paper = PAPER

    def idle(self, call: Call) -> bool:
        TOLD.append(f"asked {call.layer}")
        return call.layer == 1

    @reads(Site.HIDDEN)
    def first(self, hidden: Tensor, call: Call) -> None:
        TOLD.append(f"hidden {call.layer}")

    @at(Site.OUTPUT)
    def last(self, out: Tensor, call: Call) -> Tensor:
        TOLD.append(f"output {call.layer}")
        return out * 1.5


TOLD: list[str] = []


def acting_at(site: Site) -> Method:
    """A method that multiplies what it finds there, and is idle in decode steps."""

    def act(self: Method, x: Tensor, call: Call) -> Tensor:
        return x * 1.5

    def idle(self: Method, call: Call) -> bool:
        return call.phase is Phase.DECODE

    body = {"act": at(site)(act), "idle": idle, "paper": PAPER, "__module__": __name__}
    kind: Any = type(f"At{site.name.title()}", (Method,), body)
    return kind()


def prompt() -> Any:
    return cache_of(MODEL(input_ids=IDS[:, :11], use_cache=True))


def step(model: Any, cache: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS[:, 11:], use_cache=True, **{CACHE: copy.deepcopy(cache)}).logits
    return found


def untouched(run: Any) -> bool:
    return all(name.startswith("the model's own") for name in run.state.backends.values())


@pytest.mark.parametrize("site", SITES, ids=[s.name for s in SITES])
@torch.no_grad()
def test_an_idle_call_is_the_models_own_bit_for_bit(site: Site) -> None:
    cache, plain = prompt(), MODEL(input_ids=IDS).logits
    with attach(MODEL, acting_at(site)) as run:
        assert not torch.equal(run(input_ids=IDS).logits, plain)
        found = step(run, cache)
        assert untouched(run)
    assert torch.equal(found, step(MODEL, cache))


@pytest.mark.parametrize("name", SOMETIMES)
@torch.no_grad()
def test_every_entry_is_asked_once_a_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = catalogue.find(name)
    asked: list[bool] = []
    idle = kind.idle

    def noted(self: Method, call: Call) -> bool:
        asked.append(idle(self, call))
        return asked[-1]

    monkeypatch.setattr(kind, "idle", noted)
    neutral = kind.neutral()
    for method in (kind.example(), *(() if neutral is None else (neutral,))):
        with attach(MODEL, method, roles=ROLES) as run:
            cache = cache_of(run(input_ids=IDS[:, :11], use_cache=True))
            asked.clear()
            found = step(run, cache)
            assert len(asked) == 3
            if all(asked):
                assert untouched(run)
                with run.paused():
                    assert torch.equal(found, step(MODEL, cache))
        if method is neutral:
            assert all(asked), "neutral settings have nothing to do"


@torch.no_grad()
def test_a_part_is_asked_before_its_first_site_and_left_out_of_all() -> None:
    TOLD.clear()
    with attach(MODEL, Half() | Scale()) as run:
        run(input_ids=IDS)
        assert run.activity().active
    each = [[f"asked {n}", f"hidden {n}", f"output {n}"] for n in range(3)]
    assert each[0] + each[1][:1] + each[2] == TOLD


@torch.no_grad()
def test_an_idle_method_rules_no_backend_out() -> None:
    cache = prompt()
    with attach(MODEL, acting_at(Site.PATTERN), backend="sdpa") as run:
        assert step(run, cache).shape[1] == 1
        assert run.state.backends == dict.fromkeys(range(3), "sdpa")
        with pytest.raises(BackendError, match="sdpa"):
            run(input_ids=IDS)


@torch.no_grad()
def test_a_run_says_that_a_method_was_idle() -> None:
    cache = prompt()
    with attach(MODEL, acting_at(Site.HEAD_OUTPUT)) as run:
        step(run, cache)
        assert run.inactive == ("AtHead_Output() at HEAD_OUTPUT, which was idle",)


class DropsThenRests(Method):
    """Drops entries of one head while the prompt is read, and has nothing to do in decode steps."""

    paper = PAPER
    chunk_invariant = False
    then: bool = True  # rest while tokens are added one by one

    def idle(self, call: Call) -> bool:
        return self.then and call.phase is Phase.DECODE

    @at(Site.CACHE)
    def forget(self, entries: CachedKV, call: Call) -> Tensor:
        keep = entries.is_filled.expand(entries.key.shape[:3]).clone()
        if call.phase is Phase.PREFILL:
            keep[:, 0, 2:5] = False
        return keep


@torch.no_grad()
def test_a_cache_that_dropped_entries_is_not_the_models_own_to_read() -> None:
    found = []
    for rests in (True, False):
        with attach(MODEL, DropsThenRests(rests)) as run:
            cache = cache_of(run(input_ids=IDS[:, :11], use_cache=True))
            found.append(step(run, cache))
            assert not untouched(run)
    assert torch.equal(*found)
