"""Too little memory: first smaller tiles, which count nothing twice, then an error that says what to do."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from heedful import diagnose, models
from heedful.core.errors import FieldError, HeedfulError
from heedful.diagnosis.profile import Profile
from heedful.engine.backends import tiled
from heedful.methods import AttentionProfile, SinkRate
from tests.apart import APART
from tests.test_corpus import equal

IDS = torch.randint(3, 100, (90,), generator=torch.Generator().manual_seed(0))
MEASURES = [SinkRate(), AttentionProfile()]


def found(**how: Any) -> Profile:
    return diagnose(models.tiny("llama").eval(), IDS, measures=MEASURES, backend="tiled", **how)


def short_of(monkeypatch: pytest.MonkeyPatch, rows: int) -> list[int]:
    """A machine that holds tiles of so many rows in every layer but the first; the heights that were tried."""
    plain, tried = tiled.tile, []

    def tile(job: Any, call: Any, *given: Any) -> Any:
        tried.append(len(call.queries))
        if call.layer and len(call.queries) > rows:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes")
        return plain(job, call, *given)

    monkeypatch.setattr(tiled, "tile", tile)
    return tried


@pytest.mark.parametrize("rows", [16, 4, 1])
def test_tiles_become_smaller_and_nothing_is_counted_twice(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = found(tile_rows=rows)
    tried = short_of(monkeypatch, rows)
    assert equal(found(), wanted)
    assert max(tried) == len(IDS)
    assert tried[-1] <= rows


def test_then_it_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = short_of(monkeypatch, 0)
    with pytest.raises(FieldError, match=r"diagnose\(\)\.length = 90: .*too little memory .* for example length=45"):
        found(tile_rows=8)
    assert {8, 4, 1} <= set(tried)
    assert 16 not in tried, "no taller than what was asked for"


def test_what_is_no_lack_of_memory_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        calls.append(1)
        raise RuntimeError("something else")

    calls: list[int] = []
    monkeypatch.setattr(tiled, "tile", fail)
    with pytest.raises(RuntimeError, match="something else"):
        found()
    assert calls == [1]


def _limited(backend: str, room: int, said: Any) -> None:
    torch.set_num_threads(1)
    model, ids = models.tiny("llama").eval(), IDS.repeat(34)  # maps of 37 MB a head
    model.config.max_position_embeddings = len(ids)
    diagnose(model, ids[:90], measures=MEASURES, backend=backend)  # what is loaded late is loaded now
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + room, size + room))
    try:
        said.send(str(diagnose(model, ids, measures=MEASURES, backend=backend, length=len(ids))))
    except HeedfulError as error:
        said.send(error)


@pytest.mark.parametrize(("backend", "fits"), [("reference", False), ("tiled", True)])
def test_a_process_with_little_memory(backend: str, fits: bool) -> None:
    """A real limit of the system's: tiles fit where whole maps do not, which is an error and no crash."""
    hears, says = APART.Pipe(duplex=False)
    process = APART.Process(target=_limited, args=(backend, 100 << 20, says))
    process.start()
    says.close()
    try:
        assert hears.poll(100)
        told = hears.recv()
    finally:
        process.kill()
        process.join()
    assert isinstance(told, str) == fits, told
    assert fits or "the machine has too little memory to read that many tokens at once" in str(told)
