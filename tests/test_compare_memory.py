"""`heedful.compare` by batch, and within so many bytes of cache."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from heedful import models
from heedful.adapters.kvcache import cache_bytes
from heedful.bench import asking
from heedful.bench import compare as comparing
from heedful.bench.compare import compare
from heedful.bench.comparison import Comparison
from heedful.bench.memory import within
from heedful.bench.numbers import size, size_from
from heedful.bench.records import Answered, Cost, Refused
from heedful.bench.results import PLAIN
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.methods.intervene.language.act import ACT
from heedful.methods.sparse.cache.snap_kv import SnapKV
from heedful.methods.sparse.prefill.sink_window import SinkWindow
from heedful.text_models import text_model
from tests.test_compare import Against, Echo, Half, Turned

LENGTH, KB = 40, 1 << 10


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    return models.Loaded(models.tiny("llama"), object(), "tiny")


@pytest.mark.parametrize("what", [None, SinkWindow(1, 4), ACT(), SnapKV(0.5, window=4), Half(), Turned(), Against()])
def test_rows_of_a_batch_say_what_one_says(loaded: models.Loaded, what: Any) -> None:
    prompt = Echo(LENGTH).item(None, 0, 0).prompt
    said, held = [], []
    for rows in (1, 3):
        with text_model(loaded.model, what) as speaker:
            speaker.rows = rows
            said.append(torch.stack([speaker.read(prompt)[0], speaker.go_on(7)]))
            held.append(sum(cache_bytes(cache) for cache in speaker.caches))
    assert close_model(*said)
    assert held[1] == 3 * held[0]


def test_costs_are_measured_at_each_batch(loaded: models.Loaded, tmp_path: Path) -> None:
    options: dict[str, Any] = {"prompts": 2, "turns": 1, "out": tmp_path}
    found = compare(loaded, [SinkWindow(1, 4)], [Echo(LENGTH)], batch=(4, 1), **options)
    assert {(r.contender, r.batch) for r in found.records if isinstance(r, Cost)} == {
        (name, rows) for name in found.contenders for rows in (1, 4)
    }
    one, four = found.priced[1], found.priced[4]
    assert found.prices == four  # the first that was asked
    for a, b in zip(one, four, strict=True):
        assert (a.contender, a.ratios.get("pairs"), 4 * a.cache) == (b.contender, b.ratios.get("pairs"), b.cache)
        assert b.ratios["cache"] == a.ratios["cache"]
        assert b.write_rate == 4 / b.token
        assert b.read_rate == 4 * LENGTH / b.prefill
    figures = {figure.key: figure for figure in found.description().figures}
    assert [row[:2] for row in figures["batches"].rows] == [(n, rows) for n in found.contenders for rows in (1, 4)]
    assert figures["throughput"].lines[PLAIN].tolist() == pytest.approx([one[0].write_rate, four[0].write_rate])
    assert "on a batch of 4, all one prompt" in figures["costs"].what
    assert list(found.to_pandas()["costs"]["batch"]) == [4, 4, 1, 1]
    made = found.records
    assert compare(loaded, [SinkWindow(1, 4)], [Echo(LENGTH)], batch=(4, 1), **options).records == made
    again = compare(loaded, [SinkWindow(1, 4)], [Echo(LENGTH)], **options)
    assert again.records == made
    assert again.prices == one
    assert "batches" not in {figure.key for figure in again.description().figures}


def test_what_has_no_room_at_a_batch_is_refused_there_alone(
    loaded: models.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cost(model: Any, what: Any, name: str, prompt: Any, turn: int, batch: int, **how: Any) -> Cost:
        if batch == 8 and what is None:
            raise torch.OutOfMemoryError("no room")
        return whole(model, what, name, prompt, turn, batch, **how)

    whole = comparing.cost
    monkeypatch.setattr(comparing, "cost", cost)
    found = compare(loaded, [SinkWindow(1, 4)], [Echo(LENGTH)], prompts=2, turns=1, batch=[1, 8], cache="1GB")
    assert [p.contender for p in found.priced[1]] == found.contenders
    assert found.priced[8] == []
    assert f"{PLAIN} was refused when costs at batch 8 were measured: compare().batch = 8: the machine has" in str(
        found
    )
    assert f"too little memory to read 8 rows of {LENGTH} tokens at once; pass fewer; for example batch=4" in str(found)
    lines = next(figure for figure in found.description().figures if figure.key == "throughput").lines
    assert all(math.isnan(line[1]) for line in lines.values())


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_method_that_memory_does_not_hold_is_refused_and_the_others_are_asked(
    error: Exception, loaded: models.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(speaker: Any, item: Any) -> Any:
        if speaker.run is not None:
            raise error
        return whole(speaker, item)

    whole = asking.answer
    monkeypatch.setattr(asking, "answer", answer)
    found = compare(loaded, [SinkWindow(1, 4)], [Echo(LENGTH)], prompts=2, turns=0)
    (refused,) = [record for record in found.records if isinstance(record, Refused)]
    assert refused.contender == "SinkWindow(sinks=1, window=4)"
    assert re.search("too little memory to read [0-9]+ tokens at once; pass fewer", refused.reason)
    assert sum(isinstance(record, Answered) for record in found.records) == 2


def test_what_is_no_lack_of_memory_ends_the_comparison(loaded: models.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(asking, "answer", answer)
    with pytest.raises(RuntimeError, match="something else"):
        compare(loaded, [SinkWindow(1, 4)], [Echo(LENGTH)], prompts=2, turns=0)


def held(rows: int, share: float = 1.0) -> int:
    """Bytes of cache of the tiny model: 2 layers, 2 key heads, keys and values in 4 bytes."""
    return int(share * rows * 2 * 2 * 2 * LENGTH * models.tiny("llama").config.head_dim * 4)


def told(loaded: models.Loaded, verdicts: dict[str, tuple[float, float]], limit: int) -> Comparison:
    """A comparison of caches whose quality is made up: the lowest difference in points, and the cache's share."""
    facts: dict[str, Any] = {
        "contenders": {name: name for name in verdicts},
        "tasks": {"t": {"name": "t", "about": "", "unit": "share right", "more_is_better": True}},
        "batch": [1, 4],
        "cache": limit,
        "margin": 0.05,
    }
    records: list[Any] = []
    for name, (gap, share) in {PLAIN: (0.0, 1.0), **verdicts}.items():
        for n in range(2000):
            right = 1.0 if (n % 100) < 80 + 100 * gap else 0.0
            records.append(Answered(name, "t", 0, n, right, gap, 0.1, 0.1, True))
        records += [
            Cost(name, LENGTH, "here", turn, 1.0, 0.1, None, held(rows, share), None, (), rows)
            for rows in (1, 4)
            for turn in (0, 1, 2)
        ]
    return Comparison(facts, tuple(records))


def test_what_fits_and_holds_is_named(loaded: models.Loaded) -> None:
    ways = {"half": (0.0, 0.5), "most": (0.0, 0.8), "bad": (-0.4, 0.1)}
    found = told(loaded, ways, held(4, 0.6))
    assert {name: found.verdict(name) for name in ways} == {"half": "safe", "most": "safe", "bad": "harms"}
    full, limit = size(held(4)), size(held(4, 0.6))
    assert list(within(found)) == [
        f"Within {limit} of cache, at batch 1 and 40 tokens, the unedited model ({size(held(1))}) fits.",
        f"Within {limit} of cache, at batch 4 and 40 tokens, use half ({size(held(4, 0.5))}); the unedited model "
        f"({full}) does not fit.",
    ]
    assert found.matrix.columns[-1] == (f"batch in {limit}", "largest tried whose cache fits")
    assert {name: row[-1].text for name, row in found.matrix.rows} == {PLAIN: "1", "half": "4", "most": "1", "bad": "4"}
    assert set(within(found)) < {finding.text for finding in found.description().findings}
    tight = told(loaded, ways, held(1, 0.2))
    assert list(within(tight)) == [
        f"Within {size(held(1, 0.2))} of cache, at batch 1 and 40 tokens, nothing that fits is known to hold; the "
        f"unedited model ({size(held(1))}) does not fit.",
        f"Within {size(held(1, 0.2))} of cache, at batch 4 and 40 tokens, nothing fits: bad takes least, "
        f"{size(held(4, 0.1))}.",
    ]
    assert {row[-1].text for name, row in tight.matrix.rows if name != "bad"} == {"none"}


def test_the_limit_is_the_last_calls(loaded: models.Loaded, tmp_path: Path) -> None:
    options: dict[str, Any] = {"prompts": 2, "turns": 1, "out": tmp_path}
    found = compare(loaded, [SinkWindow(1, 4)], [Echo(LENGTH)], cache="1 GB", **options)
    assert found.limit == 1 << 30
    assert "Within 1 GB of cache, at batch 1 and 40 tokens, the unedited model" in str(found)
    assert Comparison.load(tmp_path).limit == 1 << 30
    assert compare(loaded, [SinkWindow(1, 4)], [Echo(LENGTH)], **options).limit is None
    assert Comparison.load(tmp_path).limit is None


@pytest.mark.parametrize(
    ("given", "meant"), [("4GB", 4 << 30), ("1.5 gib", 3 << 29), (100, 100), ("512kb", 512 * KB), ("7_000", 7000)]
)
def test_sizes_are_read(given: str | int, meant: int) -> None:
    assert size_from(given) == meant


def test_sizes_are_written() -> None:
    assert [size(x) for x in (12, 1536, 4 << 30, 3.14 * (1 << 20))] == ["12 B", "1.5 KB", "4 GB", "3.14 MB"]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"cache": "four"}, "must be a size above 0, in B, KB"),
        ({"cache": "0GB"}, "must be a size above 0"),
        ({"cache": "4XB"}, "for example cache='4GB'"),
        ({"cache": -3}, "must be a size above 0"),
        ({"cache": "4GB", "turns": 0}, "measures no cache"),
        ({"batch": 0}, "batch = 0: must be 1 or more"),
        ({"batch": []}, "must be 1 or more"),
        ({"batch": True}, "must be int or Sequence"),
        ({"batch": (1, 2.5)}, "batch"),
    ],
)
def test_sizes_that_are_none_are_refused(loaded: models.Loaded, wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        compare(loaded, [SinkWindow(1, 4)], [Echo()], prompts=2, **wrong)
