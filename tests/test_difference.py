"""`profile - profile`: maps of heads less one another, and roles taken up and left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from heedful import diagnose, models
from heedful.core.errors import StatisticError
from heedful.core.figures import HeadMap
from heedful.diagnosis.profile import Profile
from heedful.methods import InductionHeads, SinkRate

IDS = torch.arange(5, 45)
MEASURES = (SinkRate(0.1), InductionHeads(period=8, repeats=2, share=0.15))


def profiles() -> tuple[Profile, Profile]:
    one, other = models.tiny("llama"), models.tiny("llama", seed=7)
    return diagnose(one, IDS, measures=MEASURES), diagnose(other, IDS, measures=MEASURES)


def test_maps_are_less_one_another() -> None:
    a, b = profiles()
    found = a - b
    assert set(found.figures()) == {key for key, figure in a.figures().items() if isinstance(figure, HeadMap)}
    for key, figure in found.figures().items():
        mine, theirs = (p.figures()[key].values for p in (a, b))  # type: ignore[attr-defined]
        torch.testing.assert_close(figure.values, (mine.double() - theirs.double()).float(), equal_nan=True)
        assert figure.high == -figure.low >= float(figure.values.abs().nan_to_num(0.0).max())


def test_roles_are_taken_up_and_left() -> None:
    a, b = profiles()
    for moved in (a - b).roles():
        mine, theirs = ({r.name: set(r.heads) for r in p.roles()}[moved.role] for p in (a, b))
        assert set(moved.gained) == mine - theirs
        assert set(moved.lost) == theirs - mine
        assert moved.kept == len(mine & theirs)
        assert f"{moved.kept} keep it" in str(moved)
    assert [m.role for m in (a - b).roles()] == [r.name for r in a.roles()]
    assert any(m.gained or m.lost for m in (a - b).roles())


def test_it_tells_the_head_that_changed_most() -> None:
    a, b = profiles()
    told = []
    for found in (a - b, b - a):
        values = found.figures()["sinks"].values  # type: ignore[attr-defined]
        layer, head = divmod(int(values.abs().argmax()), values.shape[1])
        told.append(f"{float(values[layer, head]):+.3g}")
        line = next(x for x in str(found).splitlines() if x.startswith("- Attention on the first token:"))
        assert f"most in head {layer}.{head} ({told[-1]})" in line
        assert f"{float(values.abs().mean()):.3g} on average" in line
    assert {x[0] for x in told} == {"+", "-"}  # whichever way it changed
    assert str(a - a).endswith("- nothing differs")
    assert "<li>" in found._repr_html_()


def test_what_cannot_be_compared_is_refused() -> None:
    a, _ = profiles()
    with pytest.raises(StatisticError, match="have 4 and 8 heads"):
        a - replace(a, facts={**a.facts, "heads": 8})
    with pytest.raises(StatisticError, match="share no map of heads"):
        a - replace(a, parts=(), statistics={})


def test_every_part_of_the_model_trains_or_rests_as_before() -> None:
    model = models.tiny("llama").train()
    model.model.layers[0].eval()
    diagnose(model, IDS, measures=SinkRate())
    assert [m.training for m in (model, *model.model.layers)] == [True, False, True]
