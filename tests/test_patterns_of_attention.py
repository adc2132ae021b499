"""The four patterns: what a causal model's later tokens may not change, and what acts in cross-attention alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import patterns
from benchmarks.patterns import IDLE, LEAKS, PATTERNS, REFUSED, YES
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, at


class _Flat(Method):
    """Every key that may be seen weighs the same."""

    paper = Paper("t", "A test", "nobody", 2026)

    @at(Site.SCORES)
    def flatten(self, scores: Tensor, call: Call) -> Tensor:
        return torch.zeros_like(scores)


class _Peeks(Method):
    """What a head hands over has the mean over all tokens in it."""

    paper = Paper("t", "A test", "nobody", 2026)

    @at(Site.HEAD_OUTPUT)
    def peek(self, heads: Tensor, call: Call) -> Tensor:
        return heads + heads.mean(2, keepdim=True)


class _Within(_Flat):
    """Nothing in cross-attention."""

    def idle(self, call: Call) -> bool:
        return call.cross


class _Refuses(_Flat):
    """Whatever is not causal is refused."""

    @at(Site.SCORES)
    def flatten(self, scores: Tensor, call: Call) -> Tensor:
        if not call.mask.causal:
            raise FieldError(self, "mask", None, "must be causal", "a decoder")
        return torch.zeros_like(scores)


class _Begins(Method):
    """Softmax itself at first."""

    paper = Paper("t", "A test", "nobody", 2026)

    def parameters(self, layer: object) -> dict[str, Tensor]:
        return {"by": torch.zeros(1)}

    @at(Site.SCORES)
    def shift(self, scores: Tensor, call: Call) -> Tensor:
        return scores * (1 + call.params["by"])


@pytest.mark.parametrize(
    ("method", "found"),
    [
        (_Flat(), (YES, YES, YES, YES)),
        (_Begins(), (YES, YES, YES, YES)),
        (_Peeks(), (LEAKS, YES, LEAKS, YES)),
        (_Within(), (YES, YES, IDLE, IDLE)),
        (_Refuses(), (YES, REFUSED, REFUSED, REFUSED)),
    ],
)
def test_each_pattern_is_told(method: Method, found: tuple[str, ...]) -> None:
    assert patterns.patterns(method) == dict(zip(PATTERNS, found, strict=True))


def test_the_page_counts_and_joins_the_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "A": {"room": "mechanisms/linear", "found": dict.fromkeys(PATTERNS, YES)},
        "B": {"room": "mechanisms/local", "found": dict(zip(PATTERNS, (LEAKS, YES, REFUSED, IDLE), strict=True))},
        "Trains": {"room": "mechanisms/score", "found": dict.fromkeys(PATTERNS, IDLE)},
    }
    monkeypatch.setattr(patterns, "RECORD", tmp_path / "patterns.json")
    patterns.RECORD.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(patterns, "load", lambda _: [{"machine": "m", "faster_from": {"A": 1024, "C": None}}])
    monkeypatch.setattr(patterns, "label", lambda told: told["machine"])
    told = patterns.page()
    assert "| A | linear | yes | yes | yes | yes |\n| B | local | leaks | yes | refused | no effect |" in told
    assert "Of 2, self, causal: 1, self: 2, cross, causal: 1, cross: 1; all four: 1." in told
    assert "| Trains |" not in told
    assert "(models were asked, not trained): Trains.\n" in told
    assert "| machine | A | C |\n|---|---:|---:|\n| m | 1,024 | none |" in told


def test_every_mechanism_has_its_row() -> None:
    found = json.loads(patterns.RECORD.read_text())["rows"]
    assert set(found) <= set(patterns.mechanisms())
    assert all(set(row["found"]) == set(PATTERNS) for row in found.values())
    causal = {name for name, row in found.items() if row["found"]["self, causal"] == LEAKS}
    assert not [name for name in causal if patterns.mechanisms()[name].causal], "leaks, and says that it does not"
