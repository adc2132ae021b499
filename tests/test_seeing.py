"""The ground of claims about pictures before a language model: what is shown, what controls do, and that it sees."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from claims import P016_dropped, P016_sight, P034_sight, P040_drawn, P064_sight
from claims._pictures import COLOURS, draw
from claims._seeing import BEFORE, BEHIND, LANGUAGE, NAMES, PICTURE, in_picture, joined, name_ids, shown, told
from claims._sight import PATCHES
from claims.P016_dropped import _Dropped
from claims.P016_sight import _Drawn
from claims.P034_sight import _ByClass
from claims.P064_sight import _Drawn as _OtherTokens
from claims.P064_sight import caption
from heedful.core.call import Call
from heedful.core.positions import Positions
from heedful.methods import PAINT, VAR, SoftPAG

N, SPAN = 9, (1, 6)


def _call(**settings: Any) -> Call:
    keep = torch.ones(N, N, dtype=torch.bool).tril()[None, None]
    positions = Positions.row(0, N)
    call = Call(2, 4, "layer", 2, 2, positions, positions, 1.0, roles={"image": (SPAN,)}, keep=keep, **settings)
    return replace(call, rows=slice(0, N), cols=slice(0, N))


def test_sinks_are_dropped_for_text_behind_the_image_and_as_many_others_for_the_control() -> None:
    torch.manual_seed(0)
    pattern = torch.rand(1, 2, N, N).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    sinks = torch.zeros(1, N, dtype=torch.bool)
    sinks[0, [0, 2, 3]] = True
    for drawn in (False, True):
        call = _call()
        call.state.forward["sinks"] = 1, sinks
        found = _Dropped("image", drawn=drawn).redistribute(pattern, call)
        gone = (found == 0) & (pattern > 0)
        assert not gone[:, :, : SPAN[1]].any()
        places = set(gone[0, 0, SPAN[1] :].any(0).nonzero().flatten().tolist())
        assert len(places) == 2
        assert places == {2, 3} if not drawn else places < {1, 4, 5}
        assert torch.allclose(found.sum(-1), torch.ones(1, 2, N))
    call.state.forward["sinks"] = 0, sinks
    assert _Dropped("image").redistribute(pattern, call) is pattern
    call = replace(_call(), roles={"image": ((0, 6),)})
    call.state.forward["sinks"] = 1, sinks
    assert (_Dropped("image").redistribute(pattern, call)[..., 0] > 0).all(), "the very first stays"


def test_controls_take_as_many_tokens() -> None:
    torch.manual_seed(0)
    stream = torch.ones(3, 40, 8)
    stream[:, :6, 2] = 50.0
    drawn, wanted = _Drawn(tau=2.5).massive(stream), VAR(tau=2.5).massive(stream)
    assert torch.equal(drawn.sum(1), wanted.sum(1))
    assert not torch.equal(drawn, wanted)
    given, seen = torch.rand(2, 30), torch.zeros(2, 30, dtype=torch.bool)
    seen[:, 4:24] = True
    plain, other = (kind(share=0.4).gains(given, given, seen) for kind in (PAINT, _OtherTokens))
    assert torch.equal(plain.sort(-1).values, other.sort(-1).values)
    assert not torch.equal(plain, other)
    assert not other[~seen].any()


def test_patches_stay_that_the_class_token_gives_most_to() -> None:
    weights = torch.zeros(1, 2, 5, 5)
    weights[0, 0, 0], weights[0, 1, 0] = torch.tensor([0.2, 0.3, 0.1, 0.0, 0.4]), torch.tensor([0.5, 0.0, 0.4, 0.1, 0])
    call = replace(_call(), roles={"patches": ((1, 5),)})
    kept = _ByClass(0, 0.5).choose(weights, call)
    assert kept.tolist() == [[False, True, False, True]]  # 0.3, 0.5, 0.1 and 0.4


def test_colours_in_the_picture_are_counted() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]]).log()
    there = torch.tensor([[True, True, False, False], [True, False, True, False]])
    found = in_picture(logits, there)
    assert found["log-probability"] == pytest.approx((torch.tensor([0.75, 0.4]).log().mean()).item())
    assert found["first"] == 50


def test_the_judge_counts_pictures_that_show_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, words, covered = draw(60, torch.Generator().manual_seed(0))
    both = covered.flatten(2).any(-1).all(-1)
    item = P040_drawn.Drawn(words[both], torch.empty(0))
    for shown_there, wanted in ((pictures[both], 100), (pictures[both].flip(-1), None)):
        monkeypatch.setattr(P040_drawn.Drawn, "pictures", lambda self, method, made=shown_there: made)
        sure, right = item.judged(SoftPAG())
        assert right == wanted or (wanted is None and right < 30)
        assert (sure > -0.1) == (wanted is not None)


@torch.no_grad()
def test_guidance_draws_by_its_heads_and_by_none_as_the_plain_model() -> None:
    by = torch.Generator().manual_seed(0)
    item = P040_drawn.Drawn(*P040_drawn.prompts(3, by))
    plain = item.pictures(SoftPAG())
    assert torch.equal(plain, item.pictures(SoftPAG(heads=((2, 1),), u=0.0, w=3.0)))
    guided = item.pictures(SoftPAG(heads=((2, 1),), u=1.0, w=3.0))
    assert not torch.equal(plain, guided)
    assert not torch.equal(guided, item.pictures(SoftPAG(heads=((2, 1), (4, 0)), u=1.0, w=3.0)))


WAYS = {None: "none", VAR: "method", PAINT: "method", _Drawn: "drawn", _OtherTokens: "drawn", _Dropped: "method"}


def _way(what: Any) -> str:
    """What a claim does to the model: nothing, its method, or the control."""
    method = getattr(what, "method", None)
    return "drawn" if getattr(method, "drawn", False) else WAYS[method and type(method)]


@pytest.mark.parametrize(("none", "drawn"), [(0.5, 0.25), (0.25, 0.5)])
def test_effects_on_what_is_told_are_above_the_better_control(
    none: float, drawn: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sure = {"none": none, "method": 0.75, "drawn": drawn}
    there = torch.tensor([[True, False, False, False]])

    def answered(model: Any, item: Any, what: Any = None) -> Tensor:
        return torch.tensor([[x := sure[_way(what)], 1 - x, 0.0, 0.0]]).log()

    def named(model: Any, item: Any, what: Any = None) -> Tensor:
        missed = round(8 * (1 - sure[_way(what)]))
        return torch.tensor([1] * missed + [0] * (8 - missed)).view(2, 4).T

    item = SimpleNamespace(there=there)
    for claim in (P016_sight, P016_dropped, P064_sight):
        for name, stub in (("joined", lambda seed: None), ("fitted", lambda seed: VAR("image", dims=(0,))),
                           ("shown", lambda *_: item), ("sunk", lambda *_: {}), ("told", answered),
                           ("caption", named)):  # fmt: skip
            monkeypatch.setattr(claim, name, stub, raising=False)
    best = max(none, drawn)
    assert P016_sight.measure(0)[0] == pytest.approx(math.log(0.75 / best))
    assert P016_dropped.measure(0)[0] == pytest.approx(math.log(0.75 / drawn))
    item.there = there.expand(4, -1)
    effect, found = P064_sight.measure(0)
    assert effect == pytest.approx(75 - 100 * best)
    assert found["captions with any, PAINT"] == found["first not there, PAINT"] == 50


@pytest.mark.parametrize(("less", "wanted"), [(2.0, math.log(4)), (0.5, math.log(4)), (16.0, -math.log(2))])
def test_dominance_is_nearer_to_balance_from_either_side(
    less: float, wanted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(index: float) -> Any:
        return SimpleNamespace(overall=lambda role: (0.1, 0.2, index), mdi=lambda role: torch.full((30,), index))

    monkeypatch.setattr(P034_sight, "shares", lambda seed, *kept: read(less if kept else 8.0))
    monkeypatch.setattr(P034_sight, "trained_from_nothing", lambda seed: read(1.0))
    assert P034_sight.measure(0)[0] == pytest.approx(wanted)


@pytest.mark.parametrize("best", ["plain", "layer", "others"])
def test_hunted_heads_are_held_against_the_best_control_where_they_were_not_searched(
    best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hunted = ((0, 1), (2, 0), (4, 1))
    worth = {"plain": 40.0, "layer": 40.0, "others": 40.0, best: 50.0}

    def judged(item: P040_drawn.Drawn, method: SoftPAG) -> tuple[float, float]:
        heads = set(method.heads)
        if heads <= set(hunted) and heads:
            return float(len(heads)), 90.0 if item.words == "searched" else 70.0
        layer = {at for at, _ in heads}
        kind = "plain" if not heads else "layer" if len(layer) == 1 and len(heads) == P040_drawn.HEADS else "others"
        assert kind != "others" or heads.isdisjoint(hunted) or item.words == "searched"
        return -1.0 - 10 * (layer != {2}), worth[kind] - 20 * (kind == "layer" and layer != {2})

    drawn = iter((("searched", None), ("unseen", None)))
    monkeypatch.setattr(P040_drawn, "prompts", lambda count, by: next(drawn))
    monkeypatch.setattr(P040_drawn.Drawn, "judged", judged)
    effect, found = P040_drawn.measure(0)
    assert effect == 20
    assert found["right, hunted heads"] == 70
    assert found["right where searched, hunted heads"] == 90


@pytest.mark.slow
def test_the_language_model_sees() -> None:
    model, item = joined(40), shown(40, 8, BEFORE, BEHIND)
    assert (item.inputs["input_ids"] == PICTURE).sum(1).tolist() == [PATCHES] * 8
    assert item.there.sum(1).tolist() == [2] * 8
    assert len(name_ids()) == len(NAMES)
    assert item.roles["text"][1][0] == item.roles["image"][0][1]
    logits: Tensor = told(model, item)
    centred = logits - logits.mean(0)
    assert float(item.there.gather(1, centred.argmax(-1, keepdim=True)).double().mean()) > 0.8
    named = caption(model, item)
    assert torch.equal(named[:, 0], logits.argmax(-1))
    assert (named[:, 0] != named[:, 1]).all()
    assert len(model.model.language_model.layers) == len(LANGUAGE)
    assert len(COLOURS) == logits.shape[1]
