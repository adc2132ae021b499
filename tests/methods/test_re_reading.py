"""ReReading against prompts written out: tokens, roles of each copy, and what it refuses."""

import pytest

import heedful
from heedful import Prompt, models
from heedful.core.errors import FieldError
from heedful.methods import ReReading

ROLES = {
    "question": ((2, 6),),
    "names": ((2, 4), (5, 6)),
    "before": ((0, 2),),
    "after": ((6, 8),),
    "context": ((0, 8),),
    "across": ((1, 4),),
}
TOKENS = (10, 11, 20, 21, 22, 23, 30, 31)


def arranged(step: ReReading, roles: dict = ROLES) -> Prompt:
    def read(*_: object) -> None:
        raise AssertionError("no model is asked")

    return step.arrange(Prompt(TOKENS, roles), read)


def test_the_question_stands_twice_with_the_lead_between() -> None:
    found = arranged(ReReading((7, 8, 9)))
    assert found.tokens == (10, 11, 20, 21, 22, 23, 7, 8, 9, 20, 21, 22, 23, 30, 31)
    assert found.roles == {
        "question": ((2, 6), (9, 13)),
        "names": ((2, 4), (5, 6), (9, 11), (12, 13)),
        "before": ((0, 2),),
        "after": ((13, 15),),
        "context": ((0, 15),),
        "across": ((1, 4),),
    }
    assert [found.tokens[a:b] for a, b in found.roles["names"]] == [(20, 21), (23,), (20, 21), (23,)]


def test_copies_are_as_many_as_asked_for_and_a_lead_is_not_needed() -> None:
    assert arranged(ReReading()).tokens == (10, 11, 20, 21, 22, 23, 20, 21, 22, 23, 30, 31)
    for times in (1, 2, 3, 5):
        found = arranged(ReReading((7,), times))
        assert found.tokens == (10, 11, 20, 21, 22, 23, *(times - 1) * (7, 20, 21, 22, 23), 30, 31)
        assert found.roles["question"] == tuple((2 + 5 * i, 6 + 5 * i) for i in range(times))
        assert len(found.roles["names"]) == 2 * times


def test_what_it_adds_is_told_beforehand() -> None:
    shown = Prompt(TOKENS, ROLES)
    assert ReReading((7, 8)).adds(shown) == (7, 8, 20, 21, 22, 23)
    assert ReReading((7,), 3).adds(shown) == 2 * (7, 20, 21, 22, 23)
    assert ReReading.neutral().adds(shown) == ()
    assert len(heedful.arrange(models.tiny("llama"), shown, ReReading((7, 8)))) == 8 + 6


def test_neutral_changes_nothing_and_example_does() -> None:
    assert arranged(ReReading.neutral()) == Prompt(TOKENS, ROLES)
    assert arranged(ReReading.example()).tokens == (10, 11, 20, 21, 22, 23, 5, 7, 20, 21, 22, 23, 30, 31)
    assert ReReading() == ReReading((), 2, "question")


def test_the_role_has_a_name_of_choice() -> None:
    found = arranged(ReReading((0,), role="after"))
    assert found.tokens == (*TOKENS, 0, 30, 31)
    assert found.roles["after"] == ((6, 8), (9, 11))
    assert found.roles["context"] == ((0, 8),)  # what is put at its end does not belong to it


def test_says_what_is_wrong() -> None:
    with pytest.raises(FieldError, match="each must be 0 or more"):
        ReReading((3, -1))
    with pytest.raises(FieldError, match="times = 0: must be 1 or more"):
        ReReading(times=0)
    with pytest.raises(FieldError, match="must name a role"):
        ReReading(role="")
    with pytest.raises(FieldError, match="no spans named 'ask'"):
        arranged(ReReading(role="ask"))
    with pytest.raises(FieldError, match="must name one span"):
        arranged(ReReading(role="names"))
    with pytest.raises(FieldError, match="must name one span"):
        ReReading(role="none").adds(Prompt(TOKENS, {"none": ()}))
