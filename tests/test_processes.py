"""Runs and profiles in forked and in spawned processes, in a loader's workers, in threads, and one in another."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from heedful import attach, diagnose, models, patterns
from heedful.core.errors import FieldError, HeedfulError
from heedful.core.stats import Mean
from heedful.diagnosis.profile import Profile
from heedful.methods import AttentionProfile, SinkRate

from .apart import APART
from .samples import Scale

IDS = torch.randint(3, 100, (4, 12), generator=torch.Generator().manual_seed(0))
FORK, SPAWN = (multiprocessing.get_context(name) for name in ("fork", "spawn"))
both = pytest.mark.parametrize("kind", [FORK, APART], ids=["fork", "apart"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A fork that computes with more waits without end, with torch alone too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _acted(act: Callable[[], Any], said: Any) -> None:
    torch.set_num_threads(1)
    try:
        said.send(act())
    except HeedfulError as error:
        said.send(error)


def told(kind: Any, act: Callable[[], Any]) -> Any:
    """What a process of its own gives, as plain values, or heedful's own error."""
    hears, says = kind.Pipe(duplex=False)
    process = kind.Process(target=_acted, args=(act, says))
    process.start()
    says.close()
    try:
        assert hears.poll(100), "it hangs"
        return hears.recv()
    finally:
        process.kill()
        process.join()


@torch.no_grad()
def logits(model: Any) -> list[Any]:
    found: list[Any] = model(input_ids=IDS).logits.tolist()
    return found


def sinks(run: Any) -> dict[int, Any]:
    """What is read of each layer, and of how many."""
    found = {layer: x.nan_to_num(-1).tolist() for layer, x in run[SinkRate()].importance.items()}
    return found | {-1: sum(int(x.count.sum()) for x in run.state.statistics.values() if isinstance(x, Mean))}


def test_a_run_goes_on_in_a_fork_and_its_parent_hears_nothing_of_it() -> None:
    model = models.tiny("llama").eval()
    with attach(model, Scale(2.0) | SinkRate()) as run:
        wanted = logits(run)
        once = sinks(run)

        def again() -> Any:
            found = logits(run), sinks(run)
            run.close()
            return *found, logits(model)

        found, twice, plain = told(FORK, again)
        assert found == wanted
        assert twice == {**once, -1: 2 * once[-1]}
        assert sinks(run) == once
        assert logits(run) == wanted, "closed there, it is open here"
    assert plain == logits(model)


def test_a_fork_with_threads_is_refused_where_it_would_wait_without_end() -> None:
    model = models.tiny("llama").eval()

    def with_two() -> Any:
        torch.set_num_threads(2)
        return logits(run)

    with attach(model, SinkRate()) as run:
        wanted = logits(run)
        refused = told(FORK, with_two)
        assert isinstance(refused, FieldError)
        assert f"forked from process {os.getpid()}" in str(refused)
        assert "torch.set_num_threads(1) first" in str(refused)
        assert logits(run) == wanted


def test_a_spawned_process_has_the_plain_model() -> None:
    model = models.tiny("llama").eval()
    plain = logits(model)
    with attach(model, Scale(2.0)) as run:
        assert told(SPAWN, partial(logits, model)) == plain
        assert logits(run) != plain


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps, lambda run: told(SPAWN, partial(logits, run))])
def test_a_run_is_neither_copied_nor_sent(way: Callable[[Any], Any]) -> None:
    """Its copy would run the model unedited."""
    with (
        attach(models.tiny("llama").eval(), Scale(2.0)) as run,
        pytest.raises(HeedfulError, match=r"cannot be copied or sent .* attach\(model, stack\)"),
    ):
        way(run)


@both
def test_a_profile_is_read_alike_in_another_process(kind: Any, tmp_path: Path) -> None:
    diagnose(models.tiny("llama").eval(), IDS[0], measures=[SinkRate(), AttentionProfile()], out=tmp_path)
    found = Profile.load(tmp_path)
    assert told(kind, partial(_read, found)) == told(kind, partial(_loaded, tmp_path)) == _read(found)


def _read(profile: Profile) -> Any:
    return str(profile), {key: [x.tolist() for x in s.tensors().values()] for key, s in profile.statistics.items()}


def _loaded(folder: Path) -> Any:
    return _read(Profile.load(folder))


class Rows(torch.utils.data.Dataset[torch.Tensor]):
    """Rows of tokens, made where a profile is read; `seen` is what it must say."""

    def __init__(self, folder: Path, seen: str) -> None:
        self.folder, self.seen = folder, seen

    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, at: int) -> torch.Tensor:
        if str(Profile.load(self.folder)) != self.seen:
            raise ValueError("the profile says something else here")
        return IDS[at]


@both
def test_the_workers_of_a_loader_feed_a_run(kind: Any, tmp_path: Path) -> None:
    model = models.tiny("llama").eval()
    rows = Rows(tmp_path, str(diagnose(model, IDS[0], measures=[SinkRate()], out=tmp_path)))
    with attach(model, SinkRate()) as run, torch.no_grad():
        for batch in IDS.split(2):
            run(input_ids=batch)
        wanted = sinks(run)
    with attach(model, SinkRate()) as run, torch.no_grad():
        for batch in DataLoader(rows, batch_size=2, num_workers=2, multiprocessing_context=kind):
            run(input_ids=batch)
        assert sinks(run) == wanted


class Edited(Rows):
    """Rows as an attached model sees them."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def __getitem__(self, at: int) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = self.run(input_ids=IDS[at : at + 1]).logits[0]
        return found


def test_a_loader_whose_rows_need_a_run_forks_or_is_refused() -> None:
    with attach(models.tiny("llama").eval(), Scale(2.0)) as run:
        wanted = torch.tensor([Edited(run)[at].tolist() for at in range(len(IDS))])
        forked = DataLoader(Edited(run), batch_size=4, num_workers=1, multiprocessing_context="fork")
        assert torch.equal(next(iter(forked)), wanted)
        spawned = DataLoader(Edited(run), batch_size=4, num_workers=1, multiprocessing_context="spawn")
        with pytest.raises(HeedfulError, match="cannot be copied or sent"):
            next(iter(spawned))


def test_two_runs_on_two_models_at_once_are_what_each_is_alone() -> None:
    kinds, rounds = {"llama": Scale(2.0) | SinkRate(), "gpt2": SinkRate() | AttentionProfile()}, 20

    def work(kind: str, meet: threading.Barrier | None = None) -> None:
        with attach(loaded[kind], kinds[kind]) as run:
            for _ in range(rounds):
                if meet is not None:
                    meet.wait(60)
                heard.setdefault(kind, []).append((logits(run), sinks(run)))

    loaded = {kind: models.tiny(kind).eval() for kind in kinds}
    heard: dict[str, list[Any]] = {}
    for kind in kinds:
        work(kind)
    alone, heard = heard, {}
    meet = threading.Barrier(len(kinds))
    threads = [threading.Thread(target=work, args=(kind, meet)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == alone


def test_a_run_in_a_run_is_refused_whatever_begins_it() -> None:
    model = models.tiny("llama").eval()
    with attach(model, Scale(2.0)) as run:
        before = logits(run)
        inner: list[Callable[[], Any]] = [
            lambda: attach(model, SinkRate()),
            lambda: attach(model.model, SinkRate()),
            lambda: diagnose(model, IDS[0], measures=[SinkRate()]),
            lambda: patterns(model, IDS[0]),
        ]
        for begin in inner:
            with pytest.raises(FieldError, match="a run is attached already; close it"):
                begin()
        assert logits(run) == before
    with attach(model.model, Scale(2.0)), pytest.raises(FieldError, match="a run is attached already"):
        attach(model, SinkRate())
