"""A plan of steps: what is known of a layer's calls before one comes."""

from __future__ import annotations

import pytest
from torch import Tensor

from heedful.core.call import Call, DenoisingStep
from heedful.core.errors import FieldError
from heedful.core.method import Method, as_stack
from heedful.core.sites import Site, adds, at, reads
from heedful.core.stats import Sum
from heedful.engine.plan import NO_STEPS, Plan
from heedful.methods import ACT, MultiTokenAttention, RectifiedAttention, SinkRate, TempScale, ToMe
from tests.samples import PAPER, Scale


class Whole(Method):
    """Takes a row for one text, and adds to scores."""

    paper = PAPER
    one_text = True

    @adds
    def add(self, call: Call) -> Tensor:
        return call.distance

    def above(self) -> int:
        return 7


class Looks(Method):
    """Reads a site of a head, and one of none."""

    paper = PAPER

    @reads(Site.HEAD_OUTPUT)
    def heads(self, x: Tensor, call: Call) -> Sum:
        return Sum.of(x)

    @reads(Site.HIDDEN)
    def stream(self, x: Tensor, call: Call) -> Sum:
        return Sum.of(x)


class Rests(Method):
    paper = PAPER

    def idle(self, call: Call) -> bool:
        return call.cross

    @at(Site.OUTPUT)
    def act(self, x: Tensor, call: Call) -> Tensor:
        return -x


def plan(*parts: object) -> Plan:
    stack = as_stack(parts[0])  # type: ignore[arg-type]
    for part in parts[1:]:
        stack = stack | part  # type: ignore[operator]
    return Plan(stack.steps())


def names(steps: tuple[object, ...]) -> list[str]:
    return [type(s.method).__name__ for s in steps]  # type: ignore[attr-defined]


def test_sites() -> None:
    found = plan(TempScale(0.5), SinkRate(), Looks())
    assert names(found.at(Site.SCORES)) == ["TempScale"]
    assert found.at(Site.VALUE) == found.tiles(Site.VALUE) == ()
    assert found.edits(Site.SCORES)
    assert found.edits(Site.HEAD_OUTPUT, Site.SCORES)
    assert not found.edits(Site.HEAD_OUTPUT, Site.HIDDEN, Site.PATTERN)
    assert found.tiles(Site.PATTERN) == ()  # what reads sums of it takes no part in tiles
    assert found.acts == {Site.SCORES, Site.HEAD_OUTPUT, Site.HIDDEN}
    assert names(found.summed) == ["SinkRate"]
    assert names(found.readers) == ["Looks", "SinkRate", "Looks"]  # in the order of their sites
    assert found.requested == frozenset(found.summed[0].edit.sums) != frozenset()
    first = found.at(Site.SCORES)
    assert Plan(found.steps, apart=first).tiles(Site.SCORES) == ()


def test_what_acts_in_every_call() -> None:
    assert plan(Scale(2.0), Looks()).settled
    assert NO_STEPS.settled
    for parts in ((Rests(),), (Scale(2.0), ToMe(2)), (Scale(2.0).when(steps=[0]),)):
        assert not plan(*parts).settled
    assert names(plan(Rests(), Scale(2.0)).may_idle) == ["Rests"]
    assert set(names(plan(Scale(2.0), ToMe(2)).merging)) == {"ToMe"}
    assert plan(Scale(2.0)).merging == ()


def test_parts_of_some_denoising_steps() -> None:
    found = plan(TempScale(0.5).when(steps=[1, 2]), Scale(3.0))
    of_first = found.steps[0].number
    assert found.left_out(DenoisingStep(0, 4)) == {of_first}
    assert found.left_out(DenoisingStep(1, 4)) == frozenset()
    with pytest.raises(FieldError, match="the run was not told at which one the model is"):
        found.left_out(None)
    assert plan(Scale(3.0)).left_out(None) == frozenset()


def test_a_row_for_one_text() -> None:
    for parts, whose in (((Whole(), SinkRate()), "Whole"), ((TempScale(0.5), SinkRate()), "SinkRate")):
        step = plan(*parts).one_text
        assert step is not None
        assert type(step.method).__name__ == whose
    assert plan(TempScale(0.5), Looks()).one_text is None


def test_what_weights_hang_on() -> None:
    found = plan(TempScale(0.5), RectifiedAttention(), Scale(2.0))
    assert names(found.learning) == ["TempScale"]
    assert plan(Scale(2.0)).learning == ()
    assert plan(MultiTokenAttention.example()).above == MultiTokenAttention.example().above() > 0
    assert plan(Whole()).above == 0  # what is added to scores is not shown them
    assert plan(Scale(2.0)).above == 0


def test_where_something_acts() -> None:
    assert plan(Looks()).early == {Site.HIDDEN}
    assert plan(TempScale(0.5)).early == frozenset()
    assert plan(Scale(2.0)).inside
    assert plan(Looks()).inside
    assert not plan(Rests()).inside
    assert not NO_STEPS.inside


def test_what_a_reweighting_is_told_about() -> None:
    second = ACT(0.3)
    found = plan(TempScale(0.5), SinkRate(), ACT(0.4), Looks(), second)
    assert names(found.reweights) == ["ACT", "ACT"]
    assert names(found.before(found.reweights[0]).steps) == ["TempScale"]
    assert names(found.before(found.reweights[1]).steps) == ["TempScale", "ACT"]
