"""Methods that act in some denoising steps alone; the model stands for one that is called once a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful import attach, fold, models
from heedful.core.call import Call, DenoisingStep
from heedful.core.errors import ClashError, FieldError, FoldError
from heedful.core.method import Method, Scoped, Stack
from heedful.core.sites import Site, at
from heedful.core.spelling import built, spelled
from heedful.methods.intervene.language.head_scale import HeadScale
from heedful.methods.mechanisms.normalise.sigmoid_attention import SigmoidAttention

from .samples import PAPER, Scale

MODEL = models.tiny("vit")
INPUTS = models.tiny_inputs(MODEL)
pytestmark = pytest.mark.filterwarnings("ignore:this run changed nothing")
SEEN: list[DenoisingStep | None] = []


class Early(Method):
    """Acts in the first share of the steps, and notes where it was asked and where it acted."""

    paper = PAPER
    share: float = 0.5

    def idle(self, call: Call) -> bool:
        SEEN.append(call.denoising)
        return call.denoising is None or call.denoising.share >= self.share

    @at(Site.HIDDEN)
    def shift(self, x: Tensor, call: Call) -> Tensor:
        SEEN.append(call.denoising)
        return x

    @at(Site.HEAD_OUTPUT)
    def scale(self, heads: Tensor, call: Call) -> Tensor:
        SEEN.append(call.denoising)
        return 2 * heads


def logits(stack: Method | Scoped | Stack, steps: int = 4) -> list[Tensor]:
    with attach(MODEL, stack) as run, torch.no_grad():
        found = []
        for i in range(steps):
            with run.denoising(i, of=steps):
                found.append(run(**INPUTS).logits)
        return found


@torch.no_grad()
def test_a_call_knows_its_step_and_no_other_model_has_one() -> None:
    SEEN.clear()
    plain, acted = MODEL(**INPUTS).logits, logits(Early())
    assert [torch.equal(x, plain) for x in acted] == [False, False, True, True]
    steps = [DenoisingStep(i, 4) for i in range(4)]
    assert [s for step in steps for s in [step] * (3 if step.share < 0.5 else 1) * 2] == SEEN, "in each of two layers"
    SEEN.clear()
    with attach(MODEL, Early()) as run:
        assert torch.equal(run(**INPUTS).logits, plain)
    assert SEEN == [None, None]


@torch.no_grad()
def test_the_step_ends_with_its_context_and_outlives_a_reset() -> None:
    with attach(MODEL, Early()) as run:
        with run.denoising(0, of=2):
            with run.denoising(1, of=3):
                run.reset()
                assert run.state.denoising == DenoisingStep(1, 3)
            with pytest.raises(ValueError, match="stop"), run.denoising(1, of=2):
                raise ValueError("stop")
            assert run.state.denoising == DenoisingStep(0, 2)
        assert run.state.denoising is None


@torch.no_grad()
def test_a_part_for_some_steps_acts_in_these() -> None:
    plain, always = MODEL(**INPUTS).logits, logits(Scale(), 1)[0]
    found = logits(Scale().when(steps=range(1, 3)))
    for x, acts in zip(found, (False, True, True, False), strict=True):
        assert torch.equal(x, always if acts else plain)
    found = logits(Scale().on(layers=0).when(steps=0) | Scale(3.0).when(steps=[2]))
    assert torch.equal(found[0], logits(Scale().on(layers=0), 1)[0])
    assert torch.equal(found[1], plain)
    assert torch.equal(found[2], logits(Scale(3.0), 1)[0])
    assert torch.equal(found[3], plain)


@torch.no_grad()
def test_a_part_for_some_steps_must_be_told_which_this_is() -> None:
    with attach(MODEL, Scale().when(steps=0)) as run, pytest.raises(FieldError, match="was not told at which one"):
        run(**INPUTS)


def test_parts_that_meet_in_no_step_go_together() -> None:
    one, other = SigmoidAttention().when(steps=[0, 1]), SigmoidAttention()
    assert len(one | other.when(steps=2)) == 2
    with pytest.raises(ClashError, match="both replace NORMALISE"):
        one | other.when(steps=[1, 2])
    with pytest.raises(ClashError, match="both replace NORMALISE"):
        one | other


def test_steps_are_part_of_the_value() -> None:
    part = HeadScale().on(layers=[0]).when(steps=range(2))
    assert repr(part).endswith(".on(layers=[0]).when(steps=[0, 1])")
    assert repr(Scale().when("prefill", steps=1)) == "Scale(by=2.0).when('prefill', steps=[1])"
    assert part != HeadScale().on(layers=[0])
    assert part.on(heads=1).steps == part.when("prefill").steps == (0, 1)
    assert built(spelled(part), lambda _: HeadScale, {}) == part
    assert built(spelled(Scale().when("decode", steps=3)), lambda _: Scale, {}) == Scale().when("decode", steps=3)


@pytest.mark.parametrize(("number", "of", "field"), [(-1, 4, "number"), (4, 4, "number"), (0, 0, "of")])
def test_a_step_is_one_of_those_there_are(number: int, of: int, field: str) -> None:
    with attach(MODEL, Scale()) as run, pytest.raises(FieldError, match=f"DenoisingStep.{field}"):
        run.denoising(number, of).__enter__()
    assert DenoisingStep(3, 4).share == 0.75


def test_wrong_restrictions_are_refused() -> None:
    with pytest.raises(FieldError, match="must name a phase, unless `steps`"):
        Scale().when()
    with pytest.raises(FieldError, match="must be one or more numbers from 0 up"):
        Scale().when(steps=[-1])
    with pytest.raises(FoldError, match="every denoising step"):
        fold(models.tiny("llama"), HeadScale().when(steps=0))
