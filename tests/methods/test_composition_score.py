"""Composition scores against whole matrices, pair by pair and component by component."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, StatisticError
from heedful.methods.explain.composition_score import SIDES, CompositionScore

HEADS = [(n, h) for n in range(3) for h in range(4)]


def llama() -> Any:
    torch.manual_seed(3)
    sizes = {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return models.tiny("llama", head_dim=6, **sizes)


def matrices(model: Any, layer: int, h: int) -> dict[str, Tensor]:
    """What x is multiplied with on its way to the product: `M x`, square, and the head's own W_O W_V."""
    part, d = model.model.layers[layer].self_attn, 6
    own, shared = slice(h * d, (h + 1) * d), slice(h // 2 * d, (h // 2 + 1) * d)
    q, k, v = part.q_proj.weight[own], part.k_proj.weight[shared], part.v_proj.weight[shared]
    qk, ov = (q.T @ k).double(), (part.o_proj.weight[:, own] @ v).double()
    return {"queries": qk.T, "keys": qk, "values": ov}


@torch.no_grad()
def by_hand(model: Any, side: str, reader: Any, writer: Any) -> tuple[list[float], float]:
    """The score of each component, largest singular value first, and of the whole."""
    m, ov = matrices(model, *reader)[side], matrices(model, *writer)["values"]
    u, s, vt = torch.linalg.svd(ov)
    parts = []
    for i in range(6):
        one = s[i] * torch.outer(u[:, i], vt[i])
        parts.append(float((m @ one).norm() / (m.norm() * one.norm())))
    return parts, float((m @ ov).norm() / (m.norm() * ov.norm()))


@pytest.mark.parametrize("side", SIDES)
def test_every_pair_has_the_scores_of_its_matrices(side: str) -> None:
    model = llama()
    found = heedful.fit(CompositionScore(), model, ())
    component = found.fitted[f"component.{side}"]
    for r, reader in enumerate(HEADS):
        for w, writer in enumerate(HEADS):
            if writer[0] >= reader[0]:
                assert found.between(side)[r, w] == found.between(side, whole=True)[r, w] == 0
                continue
            parts, whole = by_hand(model, side, reader, writer)
            assert close(found.between(side)[r, w], torch.tensor(max(parts)))
            assert close(found.between(side, whole=True)[r, w], torch.tensor(whole))
            assert int(component[r, w]) == parts.index(max(parts))


def test_a_channel_that_is_made_is_found() -> None:
    model = llama()
    a, b = (model.model.layers[n].self_attn for n in (0, 2))
    with torch.no_grad():
        path = torch.nn.functional.normalize(torch.randn(24), dim=0)
        b.k_proj.weight[6:].zero_()
        b.k_proj.weight[8] = path  # keys of heads 2 and 3 are read along one direction
        for p in (a.o_proj.weight, a.v_proj.weight):
            p.mul_(0.1)
        a.o_proj.weight[:, 7] = path  # and head 1 writes there
        a.v_proj.weight[1] = torch.nn.functional.normalize(torch.randn(24), dim=0)
    found = heedful.fit(CompositionScore(), model, ())
    best = found.channels(2, "keys")
    assert {c.reader for c in best} == {(2, 2), (2, 3)}
    assert all((c.writer, c.component, c.side) == ((0, 1), 0, "keys") for c in best)
    assert all(c.score == pytest.approx(1.0, abs=0.02) for c in best)
    assert str(best[0]).startswith("0.1/0 -> 2.")
    assert str(best[0]).endswith(f"keys: {best[0].score:.3f}")


def test_channels_are_the_strongest_of_all() -> None:
    model = llama()
    found = heedful.fit(CompositionScore(), model, ())
    every = [
        (max(by_hand(model, side, r, w)[0]), side, r, w)
        for side in SIDES for r in HEADS for w in HEADS if w[0] < r[0]
    ]  # fmt: skip
    want = [x[1:] for x in sorted(every, key=lambda x: -x[0])]
    got = [(c.side, c.reader, c.writer) for c in found.channels(1000)]
    assert got == want
    assert [(c.side, c.reader, c.writer) for c in found.channels(7)] == want[:7]
    into = found.channels(3, "queries", reader=(2, 1))
    assert [c.writer for c in into] == [w for side, r, w in want if (side, r) == ("queries", (2, 1))][:3]
    assert found.channels(5, reader=(0, 2)) == []


def test_what_it_shows() -> None:
    model = llama()
    found = heedful.fit(CompositionScore(shown=4), model, ())
    told = found.describe()
    assert [f.key for f in told.figures] == [*(f"composition-{side}" for side in SIDES), "channels"]
    for side, figure in zip(SIDES, told.figures, strict=False):
        assert figure.values[0].isnan().all()
        for r, (n, h) in enumerate(HEADS[4:], 4):
            assert close(figure.values[n, h], found.between(side)[r].max())
    first, *_ = rows = told.figures[3].rows
    best = found.channels(4)
    assert len(rows) == 4
    assert first[1:4:2] == (best[0].component, best[0].side)
    assert first[4] == f"{best[0].score:.3f}"
    assert f"speaks most clearly to head {first[2]}" in told.findings[0].text
    assert f"head {first[0]} " in told.findings[0].text


def test_one_layer_has_nobody_to_speak_to() -> None:
    found = heedful.fit(CompositionScore(), models.tiny("llama", num_hidden_layers=1), ())
    assert found.channels(3) == []
    assert found.describe().findings == ()


def test_it_is_a_measure_of_a_diagnosis() -> None:
    model = llama()
    profile = heedful.diagnose(model, torch.arange(5, 25), measures=[CompositionScore()])
    assert "channels" in profile.figures()


def test_says_what_is_wrong() -> None:
    with pytest.raises(FieldError, match="shown"):
        CompositionScore(shown=0)
    assert CompositionScore(shown=1).shown == 1
    with pytest.raises(StatisticError, match=r"heedful\.fit"):
        CompositionScore().describe()
    found = heedful.fit(CompositionScore(), llama(), ())
    with pytest.raises(FieldError, match="side"):
        found.between("heads")
    with pytest.raises(FieldError, match="reader"):
        found.channels(3, reader=(3, 0))
