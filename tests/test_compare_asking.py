"""How long `heedful.compare` asks: until the verdicts are known, the prompts are used up, or the time is over."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from heedful import attach, models
from heedful.bench import compare as comparing
from heedful.bench.compare import compare, further
from heedful.bench.comparison import Comparison
from heedful.bench.records import Answered
from heedful.bench.results import PLAIN
from heedful.core.call import Call
from heedful.core.errors import FieldError, SiteError, UnknownFieldError
from heedful.core.kinds.conversion import Progress
from heedful.core.kinds.tokens import Prompt
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, at
from heedful.methods.intervene.language.temp_scale import TempScale
from heedful.tasks.task import Item, Sheet, Task
from tests.test_compare import Echo, Loss, Needy

PAPER = Paper("test", "A test", "Nobody", 2026)


class Wiped(Method):
    """Attention that gives nothing."""

    paper = PAPER

    @at(Site.PATTERN)
    def wipe(self, pattern: Tensor, call: Call) -> Tensor:
        return pattern * 0


class First(Task):
    """The loss on tokens that are drawn."""

    name = "first"
    about = "Loss."
    unit = "nats a token"
    more_is_better = False

    def item(self, tokenizer: Any, number: int, seed: int) -> Item:
        return Item(Prompt(tuple(self.draw(seed, number).choices(range(3, 127), k=16))), labels={"number": number})

    def score(self, item: Item, sheet: Sheet) -> float:
        return float(sheet.losses.mean())


class Few(First):
    name = "few"

    def available(self, tokenizer: Any) -> int:
        return 34


class Never(Needy):
    paper = PAPER

    @at(Site.PATTERN)
    def look(self, pattern: Tensor, call: Call) -> Tensor:
        raise SiteError("never")


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    return models.Loaded(models.tiny("llama"), object(), "tiny")


def asked(found: Comparison) -> Counter[str]:
    return Counter(r.contender for r in found.records if isinstance(r, Answered))


SLIGHT = TempScale(0.999)  # safe within any margin
WIDE = TempScale(0.02)


def test_who_is_decided_is_asked_no_more(loaded) -> None:
    notes: list[str] = []
    found = compare(
        loaded, {"slight": SLIGHT, "wide": WIDE}, [First()], prompts=60, turns=0, margin=0.01,
        progress=lambda p: notes.append(p.note),
    )  # fmt: skip
    assert asked(found) == {PLAIN: 60, "slight": 30, "wide": 60}
    assert found.verdicts[repr(First()), "slight"] == "safe"
    told = [note for note in notes if note]
    assert told[0] == "after 30 prompts a task, undecided: wide"
    assert told[-1] == "after 60 prompts a task, every verdict is known, or nothing is left to ask"
    sure = compare(loaded, {"slight": SLIGHT}, [First()], turns=0)
    assert asked(sure) == {PLAIN: 30, "slight": 30}


def test_asking_goes_on_to_what_a_larger_call_allows(loaded, tmp_path: Path) -> None:
    options: dict[str, Any] = {"turns": 0, "out": tmp_path, "margin": 0.01}
    compare(loaded, {"wide": WIDE}, [First()], prompts=35, **options)
    found = compare(loaded, {"wide": WIDE}, [First()], prompts=50, **options)
    assert asked(found) == {PLAIN: 50, "wide": 50}
    whole = compare(loaded, {"wide": WIDE}, [First()], prompts=50, turns=0, margin=0.01)
    assert [r.gap for r in whole.results] == [r.gap for r in found.results]
    assert compare(loaded, {"wide": WIDE}, [First()], prompts=50, turns=0, out=tmp_path, margin=0.9).margin == 0.9


def test_the_time_ends_it_and_the_same_call_goes_on(loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("heedful.bench.asking.time.time", lambda: now[0])

    def tick(step: Progress) -> None:
        now[0] += 1.0
        notes.append(step.note)

    notes: list[str] = []
    options: dict[str, Any] = {"turns": 0, "out": tmp_path, "margin": 0.01, "progress": tick}
    found = compare(loaded, {"wide": WIDE}, [First()], prompts=60, minutes=0.5, **options)
    assert sum(asked(found).values()) == 31
    assert "the 0.5 minutes are over" in notes
    found = compare(loaded, {"wide": WIDE}, [First()], prompts=60, minutes=1.5, **options)
    assert 31 < sum(asked(found).values()) < 120
    found = compare(loaded, {"wide": WIDE}, [First()], prompts=60, minutes=9, **options)
    assert asked(found) == {PLAIN: 60, "wide": 60}


def test_an_interrupt_between_two_answers_leaves_the_model_itself(loaded) -> None:
    def stop(step: Progress) -> None:
        if step.done == 33:  # under way with the second contender
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as held:
        compare(loaded, {"wide": WIDE}, [First()], turns=0, progress=stop)
    assert held.tb, "what was under way is still referred to"
    attach(loaded.model, WIDE).close()


def test_a_task_of_few_items_ends_with_them(loaded) -> None:
    found = compare(loaded, {"wide": WIDE}, [Few(), First()], turns=0, prompts=60, margin=0.01)
    both = Counter((r.task, r.contender) for r in found.records if isinstance(r, Answered))
    assert both[repr(Few()), "wide"] == 34
    assert both[repr(First()), "wide"] == 60


def test_what_changes_nothing_is_asked_thirty_times(loaded) -> None:
    found = compare(loaded, {"same": TempScale(1.0), "wide": WIDE}, [First()], turns=0, prompts=40, margin=0.01)
    assert asked(found)["same"] == 30
    assert found.compared == 1


def test_harm_on_one_task_ends_the_others_too(loaded) -> None:
    class Moved(First):
        name = "moved"

        def score(self, item: Item, sheet: Sheet) -> float:
            plain = seen.setdefault(item.labels["number"], sheet.losses)  # the unedited model is asked first
            return float((plain - sheet.losses).abs().mean())

    seen: dict[Any, Tensor] = {}
    found = compare(loaded, {"wiped": Wiped(), "wide": WIDE}, [First(), Moved()], turns=0, prompts=60, margin=1e-4)
    words = {(found.tasks[task]["name"], name): word for (task, name), word in found.verdicts.items()}
    assert words == {("moved", n): "worse" for n in ("wiped", "wide")} | {("first", n): "" for n in ("wiped", "wide")}
    assert asked(found) == {PLAIN: 60, "wiped": 60, "wide": 60}  # thirty of each


def test_looks_grow_farther_apart() -> None:
    looks = [0]
    while looks[-1] < 290:
        looks.append(further(looks[-1]))
    assert looks == [0, 10, 20, 30, 40, 50, 60, 80, 100, 130, 170, 220, 290]


@pytest.mark.parametrize(("name", "value"), [("prompts", 1), ("minutes", 0), ("minutes", float("nan")), ("margin", 0)])
def test_bad_limits_are_named(loaded, name: str, value: float) -> None:
    with pytest.raises(FieldError, match=name):
        compare(loaded, [WIDE], [First()], **{name: value})


def test_what_every_task_refuses_costs_nothing_and_is_told_once(
    loaded: models.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    whole = comparing.cost
    monkeypatch.setattr(comparing, "cost", lambda *args, **how: measured.append(args[2]) or whole(*args, **how))
    found = compare(loaded, [Never(), Needy()], [Echo(), Echo(24), Loss()], prompts=2, turns=1)
    assert measured == [PLAIN, "Needy"] * 2
    assert [p.contender for p in found.prices] == [PLAIN, "Needy"]
    told = [finding.text for finding in found.description().findings if "Never" in finding.text]
    assert told == ["Never was refused on Echo(length=20), on Echo(length=24) and on loss: never"]


def test_a_misspelt_argument_is_refused_before_anything_is_asked(loaded: models.Loaded) -> None:
    with pytest.raises(UnknownFieldError, match=r"compare\(\)\.prompt = 2: .*Did you mean prompts\? .*, backend, "):
        compare(loaded, [TempScale(0.5)], [Echo()], prompt=2, progress=lambda now: pytest.fail(str(now)))


def test_where_every_method_is_refused_nobody_is_asked_on(loaded: models.Loaded) -> None:
    told: list[str] = []
    found = compare(loaded, [Never()], [Echo()], prompts=40, turns=1, progress=lambda now: told.append(now.note))
    assert "every method was refused, on every task" in told
    assert {x.number for x in found.records if isinstance(x, Answered)} == set(range(further(0)))
