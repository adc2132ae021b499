"""The page of sinks: what is measured of a way, and that every claim that it tells of is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import sinks
from claims.ledger import RESULTS
from heedful import models
from heedful.core.method import Stack
from heedful.methods import SinkWindow


def test_what_is_measured_of_a_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = models.tiny("llama", attn_implementation="eager")
    monkeypatch.setattr(models, "default", lambda: models.Loaded(model, None, "tiny"))
    texts = [torch.randint(3, 127, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 14)]
    found = sinks.measure(Stack(), texts)
    losses, parks = [], []
    for ids in texts:
        with torch.no_grad():
            out = model(ids, labels=ids, output_attentions=True)
        losses.append(float(out.loss))
        # the first token's share, the mean over all rows, above 0.3
        parks.append(torch.stack([(a[0, :, :, 0].mean(1) > 0.3).float().mean() for a in out.attentions]).mean())
    assert found["loss"] == pytest.approx(sum(losses) / 2)
    assert found["sinks"] == pytest.approx(float(sum(parks)) / 2)
    assert found["largest"] is not None
    assert found["largest"] > 1
    assert sinks.measure(SinkWindow(0, 2), texts)["loss"] != pytest.approx(found["loss"])


def test_the_page_has_every_way_and_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "as it is": {"kind": "", "sinks": 0.5, "largest": 1234.0, "loss": 3.0},
        "other": {"kind": "turned down", "sinks": None, "largest": None, "loss": 3.25},
    }
    about = {"model": "M", "texts": 2, "tokens": 9, "hardware": "one core", "versions": {"torch": "2"}}
    monkeypatch.setattr(sinks, "RECORD", tmp_path / "sinks.json")
    sinks.RECORD.write_text(json.dumps({**about, "rows": rows}))
    told = sinks.page()
    assert "| as it is |  | 50% | 1,234 | 3.000 |  |" in told
    assert "| other | turned down | - | - | 3.250 | +0.250 |" in told
    for keys in sinks.CLAIMS.values():
        for key in keys:
            assert json.loads((RESULTS / f"{key}.json").read_text())["says"] in told
