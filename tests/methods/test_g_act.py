"""G-ACT: centres of what pairs change, a probe learned step by step, and a direction for each token."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.authoring import Fitted
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods.intervene.language.g_act import GACT, centred


def fitted(layers: int = 2, width: int = 32, clusters: int = 3) -> Fitted:
    draw = torch.Generator().manual_seed(3)
    shapes = {"d": (clusters, width), "w": (clusters, width), "b": (clusters,)}
    return Fitted({f"{n}.{i}": torch.randn(s, generator=draw) for i in range(layers) for n, s in shapes.items()})


def test_each_token_is_moved_along_the_direction_its_probe_names() -> None:
    model, found = models.tiny("llama"), fitted()
    inputs = models.tiny_inputs(model)
    chosen: set[int] = set()

    def hook(i: int):
        def move(module: torch.nn.Module, args: object, out: Tensor) -> Tensor:
            moved = out.clone()
            for b in range(out.shape[0]):
                for n in range(out.shape[1]):
                    logits = [
                        float(w @ out[b, n]) + float(c) for w, c in zip(found[f"w.{i}"], found[f"b.{i}"], strict=True)
                    ]
                    best = logits.index(max(logits))
                    chosen.add(best)
                    moved[b, n] = out[b, n] - 1.5 * found[f"d.{i}"][best]
            return moved

        return move

    handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(model.model.layers)]
    with torch.no_grad():
        wanted = model(**inputs).logits
    for handle in handles:
        handle.remove()
    with torch.no_grad(), attach(model, GACT(-1.5, 3, found=found)) as run:
        assert close_model(run(**inputs).logits, wanted)
    assert len(chosen) > 1


def test_centres_are_means_of_what_is_nearest_to_them() -> None:
    draw = torch.Generator().manual_seed(0)
    places = torch.tensor([[0.0, 0.0, 5.0], [6.0, 0.0, 0.0], [0.0, -7.0, 0.0]]).double()
    member = torch.tensor([0, 1, 2, 1, 0, 0, 2, 1, 1])
    x = places[member] + 0.1 * torch.randn(9, 3, generator=draw).double()
    centres, found = centred(x, 3)
    for a in range(9):
        for b in range(9):
            assert (found[a] == found[b]) == (member[a] == member[b])
    for c in range(3):
        assert close(centres[c].float(), x[found == c].mean(0).float())
    one, all_ = centred(x, 1)
    assert close(one[0].float(), x.mean(0).float())
    assert all_.tolist() == [0] * 9


def test_centres_move_until_nothing_changes() -> None:
    # begun with 4 (nearest the mean of 4.6) and 10: 0, 2, 4 and 7 go to the first, 10 to the second; then 7 moves
    x = torch.tensor([[0.0], [2.0], [4.0], [7.1], [10.0]]).double()
    centres, member = centred(x, 2)
    assert member.tolist() == [0, 0, 0, 1, 1]
    assert centres[:, 0].tolist() == pytest.approx([2.0, 8.55])
    same, _ = centred(torch.ones(3, 2).double(), 2)
    assert bool(same.isfinite().all())


def test_centres_begin_with_the_row_nearest_to_the_mean_in_a_straight_line() -> None:
    # of the mean (4.6, 6.2): (2, 3) is at 4.1, (5, 11) at 4.8; along the axes 5.8 and 5.2
    x = torch.tensor([[1.0, 2.0], [9.0, 4.0], [2.0, 3.0], [5.0, 11.0], [6.0, 11.0]]).double()
    centres, member = centred(x, 2)
    assert member.tolist() == [0, 0, 0, 1, 1]
    assert centres.tolist() == [[4.0, 3.0], [5.5, 11.0]]


def probe_by_hand(states: list[list[float]], member: list[int], clusters: int, steps: int, rate: float):
    """Gradient descent on the cross-entropy of states at mean 0 and mean length 1, as maps of the states themselves."""
    n, e = len(states), len(states[0])
    mean = [sum(s[c] for s in states) / n for c in range(e)]
    size = sum(math.sqrt(sum((s[c] - mean[c]) ** 2 for c in range(e))) for s in states) / n
    x = [[(s[c] - mean[c]) / size for c in range(e)] for s in states]
    weight, bias = [[0.0] * e for _ in range(clusters)], [0.0] * clusters
    for _ in range(steps):
        dw, db = [[0.0] * e for _ in range(clusters)], [0.0] * clusters
        for row, own in zip(x, member, strict=True):
            powers = [
                math.exp(sum(w * v for w, v in zip(weight[k], row, strict=True)) + bias[k]) for k in range(clusters)
            ]
            for k in range(clusters):
                off = (powers[k] / sum(powers) - (k == own)) / n
                db[k] += off
                dw[k] = [g + off * v for g, v in zip(dw[k], row, strict=True)]
        weight = [[w - rate * g for w, g in zip(*rows, strict=True)] for rows in zip(weight, dw, strict=True)]
        bias = [b - rate * g for b, g in zip(bias, db, strict=True)]
    weight = [[w / size for w in row] for row in weight]
    return weight, [b - sum(w * m for w, m in zip(row, mean, strict=True)) for b, row in zip(bias, weight, strict=True)]


@pytest.mark.parametrize("steps", [1, 7])
def test_a_fit_finds_centres_of_pairs_and_learns_the_probe(steps: int) -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, batch=8, length=7)["input_ids"]
    positive = torch.tensor([True, False, True, True, False, False, True, False])
    seen: list[Tensor] = []
    handles = [x.register_forward_hook(lambda _, args, out: seen.append(out.double())) for x in model.model.layers]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    found = fit(GACT(steps=steps, rate=0.7), model, [{"input_ids": ids, "positive": positive}]).found
    for i, stream in enumerate(seen):
        ends = stream[:, -1]
        centres, member = centred(ends[positive] - ends[~positive], 2)
        assert len(set(member.tolist())) == 2
        weight, bias = probe_by_hand(ends[~positive].tolist(), member.tolist(), 2, steps, 0.7)
        assert close(found[f"d.{i}"], centres.float())
        assert close(found[f"w.{i}"], torch.tensor(weight))
        assert close(found[f"b.{i}"], torch.tensor(bias))


def test_a_probe_learns_which_texts_want_which_direction() -> None:
    draw = torch.Generator().manual_seed(1)
    states = torch.randn(40, 8, generator=draw).double()
    member = (states[:, 3] > 0).long()
    weight, bias = GACT()._probe(states + 4, member)
    said = ((states + 4) @ weight.mT + bias).argmax(-1)
    assert float((said == member).double().mean()) > 0.95


def test_errors() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    for bad in ({"strength": float("inf")}, {"clusters": 0}, {"steps": 0}, {"rate": 0.0}):
        with pytest.raises(FieldError, match=f"{next(iter(bad))}"):
            GACT(**bad)
    assert GACT(clusters=1, steps=1).clusters == 1
    with pytest.raises(FieldError, match="to texts with and without the trait"), attach(model, GACT()) as run:
        run(**inputs)
    for wrong in (fitted(1), fitted(2, 16), Fitted({"d.0": torch.randn(2, 32), "w.0": torch.randn(2, 32)})):
        with pytest.raises(FieldError, match="fit to this model"), attach(model, GACT(found=wrong)) as run:
            run(**inputs)
    ids = inputs["input_ids"][:2]
    pair = [{"input_ids": ids, "positive": torch.tensor([True, False])}]
    with pytest.raises(FieldError, match="at most the 1 pairs"):
        fit(GACT(), model, pair)
    uneven = [{"input_ids": inputs["input_ids"][[0, 1, 0]], "positive": torch.tensor([True, False, True])}]
    with pytest.raises(FieldError, match="for each one with it"):
        fit(GACT(clusters=1), model, uneven)
    assert fit(GACT(clusters=1), model, pair).found is not None
    assert GACT(0.0).idle(None)  # type: ignore[arg-type]
    assert not replace(GACT(0.0), strength=1.0).idle(None)  # type: ignore[arg-type]
