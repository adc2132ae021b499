"""What a comparison dares to say: verdicts that hold for many pairs at once, advice, and nothing about idle methods."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from heedful.bench.advice import front, share
from heedful.bench.comparison import Comparison
from heedful.bench.describing import settings
from heedful.bench.records import Answered, Cost
from heedful.bench.results import PLAIN, SHARE, Ratio
from heedful.core.figures import Intervals, Listing, Scatter

PROMPTS = 60


def comparison(
    scores: dict[str, Callable[[int, int], float]],
    tasks: int = 1,
    idle: tuple[str, ...] = (),
    prompts: int = PROMPTS,
    caches: dict[str, int] | None = None,
) -> Comparison:
    """Scores by contender, task and prompt; those that are idle changed nothing, and are a little faster by chance."""
    about = {"name": "t", "about": "A.", "unit": SHARE, "more_is_better": True}
    facts = {"contenders": {n: n for n in scores}, "tasks": {f"t{i}": about | {"name": f"t{i}"} for i in range(tasks)}}
    everyone: dict[str, Callable[[int, int], float]] = {PLAIN: same, **scores}
    records: list[Answered | Cost] = [
        Answered(name, f"t{t}", 0, n, score(t, n), score(t, n) - 1, 0.1, 0.1, name != PLAIN and name not in idle)
        for name, score in everyone.items()
        for t in range(tasks)
        for n in range(prompts)
    ]
    for i, name in enumerate(everyone):
        cache = (caches or {}).get(name, 100 - i)
        records += [Cost(name, 40, "m", turn, 1 - 0.1 * i, 1.0, 0, cache, None) for turn in (1, 2)]
    return Comparison(facts, tuple(records))


def same(_: int, n: int) -> float:
    return float(n % 2)


def wrong(_: int, n: int) -> float:
    return 0.0


def right(_: int, n: int) -> float:
    return 1.0


def test_what_changed_nothing_is_named_and_drawn_nowhere_as_cheaper() -> None:
    found = comparison({"idle": same, "worse": wrong}, idle=("idle",))
    assert found.inactive == ["idle"]
    assert found.compared == 1
    told = found.description()
    assert "idle changed nothing: longer prompts, or a stronger setting, may show what it does." in [
        f.text for f in told.findings
    ]
    assert "1 without effect" in told.findings[0].text
    clouds = [f for f in told.figures if isinstance(f, Scatter)]
    assert clouds
    assert all("idle" not in f.points for f in clouds)
    (costs,) = (f for f in told.figures if isinstance(f, Listing) and f.key == "costs")
    assert [row[0] for row in costs.rows] == [PLAIN, "worse"]
    assert "Left out, since they changed nothing: idle." in costs.what


def test_who_was_not_asked_before_the_end_is_named_and_not_counted() -> None:
    asked = comparison({"worse": wrong, "late": same, "later": same})
    records = tuple(x for x in asked.records if not isinstance(x, Answered) or x.contender not in ("late", "later"))
    told = [f.text for f in Comparison(asked.facts, records).description().findings]
    assert told[0].startswith("Of 1 method, none helped")
    assert told[1] == "Not asked before the end: late, later."
    assert not any(text.startswith("Not asked") for text in (f.text for f in asked.description().findings))


def test_verdicts_of_chance_are_corrected_for_their_number() -> None:
    draw = random.Random(0)
    noise = {(m, t, n): float(draw.random() < 0.5) for m in range(8) for t in range(8) for n in range(PROMPTS)}
    methods = {f"m{m}": lambda t, n, m=m: noise[m, t, n] for m in range(8)}
    found = comparison(methods, tasks=8)
    assert found.compared == 64
    assert set(found.verdicts.values()) == {""}
    assert "none helped, none safe within 5 points, none harmful, 8 undecided" in found.description().findings[0].text
    assert len(found.open) == 64


def test_a_large_difference_is_told_and_few_prompts_are_not() -> None:
    found = comparison({"bad": wrong, "good": right})
    assert found.verdicts == {("t0", "bad"): "worse", ("t0", "good"): "better"}
    few = comparison({"bad": wrong, "good": right}, prompts=29)
    assert set(few.verdicts.values()) == {""}
    many = comparison({f"m{i}": wrong for i in range(40)}, tasks=40, prompts=30)
    assert set(many.verdicts.values()) == {""}


def test_intervals_stay_within_what_is_possible() -> None:
    found = comparison({"bad": lambda t, n: 0.0 if n else 1.0}, prompts=2)
    gap = found.results[1].gap
    assert gap is not None
    assert -1 <= gap.low <= gap.high <= 1
    (figure,) = (f for f in found.description().figures if isinstance(f, Intervals))
    assert float(figure.groups["t0"].abs().max()) <= 100


def test_the_matrix_has_one_verdict_for_each_method() -> None:
    found = comparison(
        {
            "bad": wrong,
            "good": lambda t, n: same(t, n) if t else 1.0,
            "mixed": lambda t, n: float(t == 0),
            "idle": same,
            "alike": same,
            "loose": lambda t, n: 0.0 if n in (1, 3, 5, 7, 9) else same(t, n),
        },
        tasks=2,
        idle=("idle",),
        prompts=200,
    )
    rows = dict(found.matrix.rows)
    assert list(rows) == found.contenders
    assert [cells[0].text for cells in rows.values()] == ["", "harms", "helps", "harms", "inactive", "safe", "unclear"]
    assert [name for name, _ in found.matrix.columns] == ["verdict", "t0", "t1", "prefill", "token", "cache"]
    assert [cell.tone for cell in rows["mixed"]] == ["bad", "good", "bad", "good", "", ""]
    assert [cell.text for cell in rows["mixed"][1:3]] == ["+50", "-50"]
    low, high = (int(x) for x in rows["mixed"][1].detail.removesuffix(", n = 200").split(" to "))
    assert low < 50 < high
    assert [cell.text for cell in rows["idle"]] == ["inactive", "as unedited", "as unedited", "", "", ""]
    assert rows[PLAIN][1].text == "50%"
    assert rows[PLAIN][1].detail == "200 prompts"
    assert all(len(cells) == len(found.matrix.columns) for cells in rows.values())
    assert {name for _, name in found.open} == {"loose"}  # the harm of "mixed" and "bad" is known
    told = str(found)
    assert "harms: surely worse on some task" in told
    assert "The margin is 5 points." in told
    assert "refused: " not in told


def test_less_loss_is_better_in_the_matrix_too() -> None:
    def above(more: float, wide: float) -> Callable[[int, int], float]:
        return lambda t, n: same(t, n) + more + wide * (n % 3 - 1)

    found = comparison({"low": above(-1, 0.1), "high": above(2, 0.1), "near": above(0.02, 0.02), "far": above(0.04, 1)})
    about = {**found.facts["tasks"]["t0"], "unit": "nats a token", "more_is_better": False}
    less = Comparison({**found.facts, "tasks": {"t0": about}}, found.records)
    assert [cells[0].text for _, cells in less.matrix.rows] == ["", "helps", "harms", "safe", "unclear"]
    assert "The margin is 0.05 nats." in str(less)
    wide = Comparison({**less.facts, "margin": 0.5}, less.records)
    assert dict(wide.matrix.rows)["far"][0].text == "safe"


def test_few_prompts_have_no_interval_and_it_is_said_so() -> None:
    found = comparison({"near": lambda t, n: same(t, n) + 0.02}, prompts=4)
    about = {**found.facts["tasks"]["t0"], "unit": "nats a token", "more_is_better": False}
    less = Comparison({**found.facts, "tasks": {"t0": about}}, found.records)
    assert dict(less.matrix.rows)["near"][1].detail == "no interval yet, n = 4"


def test_a_task_that_the_model_guesses_shows_no_loss() -> None:
    found = comparison({"bad": lambda t, n: float(n == 0)}, tasks=1, prompts=60)
    guessed = Comparison(
        found.facts, tuple(
            Answered(r.contender, r.task, 0, r.number, float(r.number < 8), -1, 0.1, 0.1, r.active)
            for r in found.records if isinstance(r, Answered)
        ),
    )  # fmt: skip
    assert guessed.blind == ["t0"]
    assert guessed.verdicts == {}
    assert guessed.open == []
    assert dict(guessed.matrix.rows)["bad"][0].text == "unclear"
    assert "t0 tells nothing: the unedited model gets 13%, no more than guessing" in str(guessed)


def test_the_front_is_named_from_what_is_decided() -> None:
    scores = {"half": same, "third": same, "fifth": wrong, "tenth": wrong}
    caches = {PLAIN: 100, "half": 51, "third": 33, "fifth": 20, "tenth": 10}
    found = comparison(scores, prompts=200, caches=caches)
    assert front(found, "cache") == ["third"]
    told = [f.text for f in found.description().findings]
    assert "At a third of the cache use third; below a third nothing holds." in told
    assert dict(found.matrix.rows)["third"][-1].detail == "on the front"
    assert dict(found.matrix.rows)["half"][-1].detail == ""
    (cloud,) = (f for f in found.description().figures if isinstance(f, Scatter) and f.key == "pareto_cache")
    assert cloud.frontier == ["third"]
    assert cloud.joined == []
    helps = comparison({**scores, "half": right}, prompts=200, caches=caches)
    assert front(helps, "cache") == ["third", "half"]
    told = [f.text for f in helps.description().findings]
    assert "At half of the cache use half; at a third of the cache use third; below a third nothing holds." in told


def test_what_is_not_decided_is_on_no_front_and_named() -> None:
    caches = {PLAIN: 100, "half": 50, "tenth": 10}
    found = comparison({"half": same, "tenth": same}, prompts=40, caches=caches)
    assert front(found, "cache") == []
    told = [f.text for f in found.description().findings]
    assert "Nothing that saves cache is known to hold yet: undecided are half, tenth." in told
    lost = comparison({"half": wrong, "tenth": wrong}, caches=caches)
    assert "Nothing that saves cache holds." in [f.text for f in lost.description().findings]


def test_what_costs_as_good_as_the_same_is_not_below() -> None:
    found = comparison({"third": same, "near": wrong}, prompts=200, caches={PLAIN: 100, "third": 33, "near": 32})
    assert "At a third of the cache use third." in [f.text for f in found.description().findings]


@pytest.mark.parametrize(("x", "said"), [(0.51, "half"), (0.26, "a quarter"), (0.4, "40%"), (0.05, "5%")])
def test_shares_are_said_as_people_say_them(x: float, said: str) -> None:
    assert share(x) == said


def test_times_have_their_ends_and_save_only_where_each_turn_does() -> None:
    found = comparison({"m": same}, prompts=200)
    times = {1: 0.5, 2: 0.9, 3: 0.6}
    costs = [Cost("m", 40, "m", turn, 2 * x, x, 0, 100, None) for turn, x in times.items()]
    plain = [Cost(PLAIN, 40, "m", turn, 2.0, 1.0, 0, 100, None) for turn in times]
    answers = [r for r in found.records if isinstance(r, Answered)]
    told = Comparison(found.facts, (*answers, *plain, *costs))
    (_, price) = told.prices
    assert price.ratios == {"prefill": Ratio(0.6, 0.5, 0.9), "token": Ratio(0.6, 0.5, 0.9), "cache": Ratio(1, 1, 1)}
    assert price.held == 0.75
    cells = dict(told.matrix.rows)["m"]
    assert (cells[2].text, cells[2].detail, cells[2].tone) == ("0.60", "0.50 to 0.90, on the front", "good")
    assert "the median of 3 timing repeats beside the baseline, with the lowest and the highest" in told.words["matrix"]
    slow = [Cost("m", 40, "m", 4, 2.2, 1.1, 0, 100, None), Cost(PLAIN, 40, "m", 4, 2.0, 1.0, 0, 100, None)]
    once = dict(Comparison(found.facts, (*told.records, *slow)).matrix.rows)["m"]
    assert (once[2].detail, once[2].tone) == ("0.50 to 1.10", "")


def test_settings_of_one_method_are_joined_in_the_order_of_their_cost() -> None:
    points = {"A(b=2)": (0.5, 1.0), "A": (0.7, 1.0), "B": (0.1, 1.0), "A(b=1)": (0.2, 0.0), "A | B": (0.3, 0.0)}
    assert settings(points) == [["A(b=1)", "A(b=2)", "A"]]
