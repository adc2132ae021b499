"""Claims about what removes sinks ask first whether softmax has them, and count nothing that the loss has paid for."""

from __future__ import annotations

from typing import Any

import pytest

from claims import P304, P025_sigmoid, P304_gated, P304_sinks, P314_outliers, _sinks
from claims.ledger import Claim
from heedful.methods import ClippedSoftmax

MEASURED = (P025_sigmoid.CLAIM, P304.CLAIM, P304_gated.CLAIM, P304_sinks.CLAIM, P314_outliers.CLAIM)
RESTING = {"P025_sigmoid", "P304_sinks"}
LOOKED_AT = {"P304": "kurtosis", "P304_gated": "kurtosis", "P314_outliers": "largest"}
LOOKED_AT |= dict.fromkeys(RESTING, "resting")


class Told:
    """A lab in which softmax shows so much of everything, and every mechanism a fourth of it."""

    def __init__(self, plain: dict[str, float], dear: float = 1.0) -> None:
        self.plain, self.dear = plain, dear
        self.asked: list[int] = []  # of mechanisms: the seeds

    def record(self, course: Any, what: Any, seed: int) -> dict[str, float]:
        if what is None:
            return dict.fromkeys(_sinks.TOLD, 1.0) | self.plain
        self.asked.append(seed)
        return {name: x / 4 for name, x in self.plain.items()} | {"copied": 1.0, "8-bit": 0.0, "loss": 2 * self.dear}


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Any:
    def of(dear: float = 1.0, **plain: float) -> None:
        _sinks.shown.cache_clear()
        made = Told({"loss": 2.0, "sinks": 1.0, "resting": 0.8, "kurtosis": 20.0, "largest": 40.0} | plain, dear)
        monkeypatch.setattr(_sinks, "LAB", made)
        monkeypatch.setattr("claims._lab.LAB", made)

    yield of
    _sinks.shown.cache_clear()


@pytest.mark.parametrize("claim", MEASURED, ids=lambda claim: claim.key)
def test_a_question_that_other_claims_raised_is_asked_on_other_seeds(claim: Claim, lab: Any) -> None:
    lab()
    claim.measure(3)
    assert _sinks.LAB.asked == [3 + _sinks.SEEDS * (claim.key == "P304_sinks")]


@pytest.mark.parametrize("claim", MEASURED, ids=lambda claim: claim.key)
def test_what_is_removed_counts_where_softmax_has_it_and_the_loss_is_no_worse(claim: Claim, lab: Any) -> None:
    lab()
    effect, found = claim.measure(0)
    assert effect == pytest.approx(0.6 if claim.key in RESTING else 1.386294)  # 0.8 - 0.2, and log 4
    assert {f"{name}, softmax" for name in _sinks.TOLD} <= set(found)
    assert len(found) == 2 * len(_sinks.TOLD)
    lab(dear=1.019)
    assert claim.measure(0)[0] == effect
    lab(dear=1.021)
    assert claim.measure(0)[0] == 0
    for fault in asked(claim):
        lab(**{fault: 0.99 * _sinks.FAULTS[fault]})
        with pytest.raises(ValueError, match="nothing to remove"):
            claim.measure(0)
    lab(**{fault: 0.99 * _sinks.FAULTS[fault] for fault in set(_sinks.FAULTS) - asked(claim)})
    assert claim.measure(0)[0] > 0


def asked(claim: Claim) -> set[str]:
    """The faults that softmax must show, by what the claim says."""
    return {fault for fault, words in _sinks.NAMES.items() if words in claim.setup}


def test_what_grew_counts_whatever_the_loss() -> None:
    found = {"loss, softmax": 1.0, "loss, ClippedSoftmax": 2.0}
    assert _sinks.at_no_worse_loss(-0.5, ClippedSoftmax(), found) == -0.5
    assert _sinks.at_no_worse_loss(0.5, ClippedSoftmax(), found) == 0


def test_setups_say_what_is_asked_of_softmax() -> None:
    for claim in MEASURED:
        assert LOOKED_AT[claim.key] in asked(claim)
        assert "resting" in asked(claim)
        assert claim.seeds == _sinks.SEEDS
