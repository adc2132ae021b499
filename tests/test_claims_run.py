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
from tests.apart import said

QUICK = 2.0  # seconds for a whole draw, by the claim's record: those are tried in every run of the suite
GROUP = 8  # claims that share a process and a model


def keys(quick: bool) -> list[str]:
    """Those whose records say that a draw is quick, or is not."""
    return [found.key for found in records() if (found.seconds / len(found.effects) < QUICK) == quick]


def tried(chosen: list[str]) -> None:
    torch.set_num_threads(1)
    found = claims()
    try_out({key: found[key] for key in chosen})


def test_quick_claims_still_run() -> None:
    found = said(tried, keys(quick=True))
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("begin", range(0, len(keys(quick=False)), GROUP))
def test_claims_still_run(begin: int) -> None:
    found = said(tried, keys(quick=False)[begin : begin + GROUP])
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_claim_is_tried_somewhere() -> None:
    assert sorted([*keys(quick=True), *keys(quick=False)]) == sorted(claims())


def gone(seed: int) -> tuple[float, dict[str, float]]:
    return torch.moved_elsewhere(seed), {}  # type: ignore[attr-defined]


def ended(seed: int) -> tuple[float, dict[str, float]]:
    os._exit(3)


def fine(seed: int) -> tuple[float, dict[str, float]]:
    return 1.0, {"gain": 1.0, "rooms": float(os.environ[_small.models.DEFAULT_VARIABLE] != "")}


def planted() -> None:
    made = {act.__name__: claim(act) for act in (gone, ended, fine)}
    for key, _, fault in _small.tried(made):
        print(key, fault.splitlines()[:1])
    try_out(made)


def claim(measure: object) -> Claim:
    return Claim(getattr(measure, "__name__", "P1"), "M", "it works.", "none", "a model", "gain", measure)  # type: ignore[arg-type]


def test_a_claim_that_no_longer_runs_is_told_and_those_behind_it_are_tried() -> None:
    found = said(planted)
    told = found.stdout.splitlines()
    assert "has no attribute 'moved_elsewhere'" in told[0]
    assert told[1] == "ended ['its process ended with 3']"
    assert told[2] == "fine []"
    assert "fine: runs, " in found.stdout
    assert found.returncode == 1
    assert "2 of 3 claims no longer run" in found.stderr


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
