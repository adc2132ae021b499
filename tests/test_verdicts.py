"""What a comparison dares to say: verdicts that hold for many pairs at once, and nothing about what changed nothing."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from heedful.bench.comparison import Comparison
from heedful.bench.records import Answered, Cost
from heedful.bench.results import PLAIN, SHARE, Gap, luck
from heedful.core.figures import Intervals, Listing, Scatter

PROMPTS = 20


def comparison(
    scores: dict[str, Callable[[int, int], float]], tasks: int = 1, idle: tuple[str, ...] = (), prompts: int = PROMPTS
) -> Comparison:
    """Scores by contender, task and prompt; those that are idle changed nothing, and are a little faster by chance."""
    about = {"name": "t", "about": "A.", "unit": SHARE, "more_is_better": True}
    facts = {"contenders": {n: n for n in scores}, "tasks": {f"t{i}": about | {"name": f"t{i}"} for i in range(tasks)}}
    everyone: dict[str, Callable[[int, int], float]] = {PLAIN: lambda t, n: float(n % 2), **scores}
    records: list[Answered | Cost] = [
        Answered(name, f"t{t}", 0, n, score(t, n), score(t, n) - 1, 0.5, 0.1, name != PLAIN and name not in idle)
        for name, score in everyone.items()
        for t in range(tasks)
        for n in range(prompts)
    ]
    for i, name in enumerate(everyone):
        records += [Cost(name, 40, "m", turn, 1 - 0.1 * i, 1.0, 0, 100 - i, None) for turn in (1, 2)]
    return Comparison(facts, tuple(records))


def same(_: int, n: int) -> float:
    return float(n % 2)


def test_what_changed_nothing_is_named_and_drawn_nowhere_as_cheaper() -> None:
    found = comparison({"idle": same, "worse": lambda t, n: 0.0}, idle=("idle",))
    assert found.inactive == ["idle"]
    told = found.description()
    assert "idle changed nothing: it is the unedited model." in [f.text for f in told.findings]
    assert "1 changed nothing" in told.findings[0].text
    clouds = [f for f in told.figures if isinstance(f, Scatter)]
    assert clouds
    assert all("idle" not in f.points for f in clouds)
    (costs,) = (f for f in told.figures if isinstance(f, Listing) and f.key == "costs")
    assert [row[0] for row in costs.rows] == [PLAIN, "worse"]
    assert "Left out, since they changed nothing: idle." in costs.what


def test_verdicts_of_chance_are_corrected_for_their_number() -> None:
    draw = random.Random(0)
    noise = {(m, t, n): float(draw.random() < 0.5) for m in range(8) for t in range(8) for n in range(PROMPTS)}
    methods = {f"m{m}": lambda t, n, m=m: noise[m, t, n] for m in range(8)}
    found = comparison(methods, tasks=8)
    assert sum(r.gap.sure for r in found.results if r.gap is not None) > 1  # by chance
    assert set(found.verdicts.values()) == {""}
    assert "none beat the unedited model on some task, none fall behind it" in found.description().findings[0].text


def test_a_large_difference_is_told_and_eight_prompts_of_many_pairs_are_not() -> None:
    found = comparison({"bad": lambda t, n: 0.0, "good": lambda t, n: 1.0}, prompts=30)
    assert found.verdicts == {("t0", "bad"): "worse", ("t0", "good"): "better"}
    few = comparison({f"m{i}": lambda t, n: 0.0 for i in range(10)}, prompts=8)
    assert set(few.verdicts.values()) == {""}


def test_intervals_stay_within_what_is_possible() -> None:
    found = comparison({"bad": lambda t, n: 0.0 if n else 1.0}, prompts=2)
    gap = found.results[1].gap
    assert gap is not None
    assert -1 <= gap.low <= gap.high <= 1
    (figure,) = (f for f in found.description().figures if isinstance(f, Intervals))
    assert float(figure.groups["t0"].abs().max()) <= 100
    assert Gap.of([-1.0, 1.0]).low < -1  # a unit without ends


def test_the_matrix_has_one_verdict_for_each_method() -> None:
    found = comparison(
        {
            "bad": lambda t, n: 0.0,
            "good": lambda t, n: 1.0,
            "mixed": lambda t, n: float(t == 0),
            "idle": same,
            "alike": same,
            "loose": lambda t, n: 0.0 if n == 1 else same(t, n),
        },
        tasks=2,
        idle=("idle",),
        prompts=30,
    )
    rows = dict(found.matrix.rows)
    assert list(rows) == found.contenders
    assert [cells[0].text for cells in rows.values()] == ["", "harms", "helps", "harms", "inactive", "safe", "unclear"]
    assert [name for name, _ in found.matrix.columns] == ["verdict", "t0", "t1", "prefill", "token", "cache"]
    assert [cell.tone for cell in rows["mixed"]] == ["bad", "good", "bad", "good", "", ""]
    assert [cell.text for cell in rows["mixed"][1:3]] == ["+50", "-50"]
    low, high = (int(x) for x in rows["mixed"][1].detail.split(" to "))
    assert low < 50 < high
    assert [cell.text for cell in rows["idle"]] == ["inactive", "as unedited", "as unedited", "", "", ""]
    assert rows[PLAIN][1].text == "50%"
    assert rows[PLAIN][1].detail == "30 prompts"
    assert all(len(cells) == len(found.matrix.columns) for cells in rows.values())
    told = str(found)
    assert "harms: worse on some task, surely." in told
    assert "refused: " not in told


def test_less_loss_is_better_in_the_matrix_too() -> None:
    found = comparison({"low": lambda t, n: -1.0, "high": lambda t, n: 2.0, "near": lambda t, n: same(t, n) + 0.04})
    about = {**found.facts["tasks"]["t0"], "unit": "nats a token", "more_is_better": False}
    less = Comparison({**found.facts, "tasks": {"t0": about}}, found.records)
    assert [cells[0].text for _, cells in less.matrix.rows] == ["", "helps", "harms", "harms"]
    some = Comparison(less.facts, tuple(r for r in less.records if not isinstance(r, Answered) or r.number < 6))
    assert dict(some.matrix.rows)["near"][0].text == "safe"  # too few to be sure that it is worse, and 0.04 is little


@pytest.mark.parametrize(("differences", "chance"), [([1.0] * 9, 2 / 2**9), ([0.0] * 9, 1.0), ([1.0, -1.0], 1.0)])
def test_luck_is_that_of_all_signs(differences: list[float], chance: float) -> None:
    assert luck(differences) == pytest.approx(chance, abs=0.002)
