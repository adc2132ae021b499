"""Agreement of explanations: Kendall's tau by counting pairs, and what cannot be compared."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from heedful import models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.explaining import agreement, attribute
from heedful.methods import AttentionFlow, AttentionRollout


def _tau(x: list[float], y: list[float]) -> float:
    """(pairs in the same order - those in the opposite one) / sqrt(pairs without a tie in x * those without in y)."""
    pairs = list(itertools.combinations(range(len(x)), 2))
    signs = [((x[i] > x[j]) - (x[i] < x[j]), (y[i] > y[j]) - (y[i] < y[j])) for i, j in pairs]
    apart = [sum(s[side] != 0 for s in signs) for side in (0, 1)]
    return sum(a * b for a, b in signs) / math.sqrt(apart[0] * apart[1]) if all(apart) else math.nan


def _drawn(seed: int, n: int, ties: bool) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 3, (n,), generator=draw).float() if ties else torch.randn(n, generator=draw)


@pytest.mark.parametrize("ties", [False, True])
def test_pairs_are_counted(ties: bool) -> None:
    names = ("a", "b", "c")
    texts = [{name: _drawn(10 * t + i, 5 + t, ties) for i, name in enumerate(names)} for t in range(3)]
    found = agreement(*texts)
    assert found.names == names
    for t, (i, one), (j, other) in itertools.product(range(3), enumerate(names), enumerate(names)):
        want = _tau(texts[t][one].tolist(), texts[t][other].tolist())
        assert found.tau[t, i, j].item() == pytest.approx(want)
    means = [sum(float(found.tau[t, 0, 2]) for t in range(3)) / 3]
    assert found.mean[0, 2].item() == pytest.approx(means[0])
    assert close(found.between("c", "b"), found.tau[:, 2, 1])


def test_the_same_the_opposite_and_what_tells_nothing() -> None:
    up = torch.tensor([0.0, 1.0, 5.0, 6.0])
    found = agreement({"up": up, "squared": up.square(), "down": -up, "flat": torch.zeros(4)}, {
        "flat": torch.tensor([1.0, 2.0]), "down": up[:2], "squared": up[:2], "up": up[:2]})  # fmt: skip
    assert found.between("up", "squared").tolist() == pytest.approx([1.0, 1.0])
    assert found.between("up", "down").tolist() == pytest.approx([-1.0, 1.0])
    assert bool(found.between("up", "flat").isnan()[0])
    assert found.mean[0, 3].item() == pytest.approx(1.0)  # of the texts that tell


def test_what_attribute_gives_is_taken_and_shown() -> None:
    model = models.tiny("llama")
    ids = torch.tensor([[5, 17, 9, 88, 40, 23, 61]])
    told = {"rollout": attribute(model, ids, AttentionRollout()), "flow": attribute(model, ids, AttentionFlow())}
    found = agreement(told)
    want = _tau(told["rollout"].scores.tolist(), told["flow"].scores.tolist())
    assert found.between("rollout", "flow").item() == pytest.approx(want)
    assert str(found).splitlines() == ["Kendall's tau, the mean over 1 text", f"flow     {want:+.2f} rollout"]
    assert found.figure.values.shape == (2, 2)
    assert found.figure.rows == ("rollout", "flow")
    assert "flow" in found._repr_html_()


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        ((), r"texts.* must hold two explanations of a text"),
        (({"a": torch.rand(3)},), r"must hold two explanations of a text"),
        (({"a": torch.rand(3), "b": torch.rand(4)},), r"scores\['a'\] = \(3,\): must be 4 finite scores"),
        (({"a": torch.rand(3), "b": torch.rand(3, 1)},), r"scores\['b'\] = \(3, 1\): must be 3 finite scores"),
        (({"a": torch.rand(1), "b": torch.rand(1)},), r"must be 2 finite scores"),
        (({"a": torch.rand(3), "b": torch.full((3,), math.nan)},), r"must be 3 finite scores"),
        (({"a": torch.rand(3), "b": torch.rand(3)}, {"a": torch.rand(3), "c": torch.rand(3)}), r"explained alike"),
    ],
)
def test_what_cannot_be_compared_is_refused(texts: tuple[dict[str, Tensor], ...], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        agreement(*texts)


def test_names_that_are_not_there_are_refused() -> None:
    found = agreement({"a": torch.rand(3), "b": torch.rand(3)})
    with pytest.raises(FieldError, match=r"name = 'c': must be one of a, b"):
        found.between("a", "c")
