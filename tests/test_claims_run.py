"""Every claim still runs, at its smallest; and what no longer runs, or gives what no record could hold, is told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from claims import _small, ledger
from claims._page import records
from claims.ledger import Claim, claims, try_out
from heedful import models
from tests.apart import said

QUICK = 2.0  # seconds for a whole draw, by the claim's record: those are tried in every run of the suite
GROUP = 8  # claims that share a process and a model
SPEED = {found.key: found.seconds / len(found.effects) for found in records()}
FAST, LONG = ([key for key, each in SPEED.items() if (each < QUICK) == quick] for quick in (True, False))


def gone(seed: int) -> tuple[float, dict[str, float]]:
    return torch.moved_elsewhere(seed), {}  # type: ignore[attr-defined]


def ended(seed: int) -> tuple[float, dict[str, float]]:
    os._exit(3)


def learned(seed: int) -> tuple[float, dict[str, float]]:
    """Wants what only SmolLM2 knows."""
    if os.environ.get(models.DEFAULT_VARIABLE):
        raise ValueError("knows nothing")
    return 1.0, {}


PLANTED = {act.__name__: Claim(act.__name__, "M", "", "", "", "", act) for act in (gone, ended, learned)}


def tried(keys: list[str]) -> None:
    try_out({key: claim for key, claim in (PLANTED | claims()).items() if key in keys})


def test_quick_claims_still_run_and_what_no_longer_does_is_told() -> None:
    found = said(tried, [*PLANTED, *FAST])
    told = dict(line.split(": ", 1) for line in found.stdout.splitlines() if ": " in line and line[0] != " ")
    assert told["gone"] == "AttributeError(\"module 'torch' has no attribute 'moved_elsewhere'\")"
    assert told["ended"].startswith("its process ended with 3, ")
    assert [key for key in ("learned", *FAST) if not told[key].startswith("runs, ")] == [], found.stdout
    assert found.returncode == 1
    assert f"2 of {len(PLANTED) + len(FAST)} claims no longer run" in found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("begin", range(0, len(LONG), GROUP))
def test_claims_still_run(begin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.apart.SECONDS", 900)
    found = said(tried, LONG[begin : begin + GROUP])
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_draw_must_be_finite_and_have_the_numbers_of_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "RESULTS", tmp_path)
    told = Claim("P1", "M", "it works.", "none", "a model", "gain", lambda seed: (1.0, {"gain": 1.0, "loss": 2.0}))
    _small.measured(told)
    (tmp_path / "P1.json").write_text(json.dumps({"details": [{"gain": 5.0, "loss": 0.0}]}))
    _small.measured(told)
    (tmp_path / "P1.json").write_text(json.dumps({"details": [{"gain": 5.0, "cost": 0.0}]}))
    with pytest.raises(ValueError, match=r"P1: its record must have the same numbers.*\['cost', 'loss'\]"):
        _small.measured(told)
    for wrong in ((float("nan"), {}), (1.0, {"loss": float("inf")})):
        with pytest.raises(ValueError, match=r"P1: (effect|loss) must be finite"):
            _small.measured(Claim("P1", "M", "", "", "", "", lambda seed, wrong=wrong: wrong))
    assert [path.name for path in tmp_path.iterdir()] == ["P1.json"], "no record is written"
