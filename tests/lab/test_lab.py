"""`heedful.lab` and its verb: what they train, tell, refuse and go on from, and what records add up to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import heedful
from heedful.cli.app import app
from heedful.core.errors import FieldError, StatisticError
from heedful.core.figures import Curves, Intervals, Scatter
from heedful.core.kinds.conversion import Progress
from heedful.core.method import Stack
from heedful.laboratory import costs, kinds, records
from heedful.laboratory.lab import _chosen
from heedful.laboratory.outcome import Lab
from heedful.laboratory.records import Record
from heedful.laboratory.results import Refused
from heedful.methods import MALA, GatedHeads, SigmoidAttention, SinkRate, SinkWindow
from tests.lab.small import Fails, Halved, Little, Riddles

COURSES = (Little(), Riddles())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(kinds.KINDS, "lm", (Little, Riddles))
    monkeypatch.setattr(costs, "TURNS", 1)
    monkeypatch.chdir(tmp_path)


def record(name: str, seed: int, course: str = "text", **numbers: float) -> Record:
    settings = {"text": Little().__dict__, "puzzles": Riddles().__dict__}[course]
    return Record(
        f"{name}{seed}", course, dict(settings), name, seed, numbers, [2.0, 1.0, 1.0], [1.0, 1.0, 1.0], 10, 0, True,
        1.0, {}, {"date": "2026-01-01", "device": "here"}, "",
    )  # fmt: skip


def series(name: str, values: list[float], key: str = "loss", course: str = "text") -> list[Record]:
    return [record(name, seed, course, **{key: x}) for seed, x in enumerate(values)]


def made(*parts: list[Record], refused: tuple[Refused, ...] = ()) -> Lab:
    found = tuple(r for part in parts for r in part)
    names = dict.fromkeys(r.mechanism for r in found if r.mechanism != "softmax")
    seeds = len({r.seed for r in found})
    return Lab({"contenders": {n: n for n in names}, "seeds": seeds, "tasks": {}}, COURSES, found, refused)


def test_it_trains_each_and_goes_on_where_it_stopped(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Progress] = []
    what = [Halved(), Fails()]
    monkeypatch.setitem(kinds.KINDS, "lm", (Little,))
    found = heedful.lab(what, seeds=2, out=tmp_path / "kept", progress=told.append)
    assert found.contenders == ["softmax", "Halved", "Fails"]
    assert {(r.mechanism, r.course, r.seed) for r in found.records} == {
        (name, "text", seed) for name in ("softmax", "Halved") for seed in (0, 1)
    }
    assert [(r.mechanism, r.course) for r in found.refused] == [("Fails", "text")]
    assert (told[-1].done, told[-1].total) == (18, 18)
    notes = [now.note for now in told if now.note]
    assert notes[0].startswith("Fails was refused by text"), "before softmax is trained"
    assert sum("was refused" in note for note in notes) == 1

    again = found.records
    train, trained = records.train, []
    monkeypatch.setattr(records, "train", lambda *a: trained.append(a[1]) or train(*a))  # type: ignore[func-returns-value]
    assert "<td" in found._repr_html_()
    assert "<script" not in found._repr_html_()
    more = heedful.lab({"half": Halved(), "gates": GatedHeads()}, seeds=1, out=tmp_path / "kept")
    assert [r for r in more.records if r.mechanism == "softmax"] == [again[0]]
    assert len(trained) == 1, "the gates alone were new"
    assert more.contenders == ["softmax", "half", "gates"]


def test_what_none_can_train_is_refused_before_softmax_is_trained(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "train", lambda *_: pytest.fail("softmax was trained for nothing"))
    with pytest.raises(FieldError, match=r"\['Fails'\]: cannot be trained here \(Fails: .*must return a tensor"):
        heedful.lab([Fails()])


def test_the_verb_prints_and_writes(small: None, tmp_path: Path) -> None:
    arguments = ["lab", "--mechanisms", "sigmoidattention(16),mala|gatedheads", "--out", "kept"]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    assert "SigmoidAttention(length=16)" in told.output
    assert "MALA | GatedHeads" in told.output
    page = (tmp_path / "kept" / "page.html").read_text()
    assert "What replaces softmax, and what it costs" in page
    assert "Differences to the unedited model" not in page
    again = json.loads(CliRunner().invoke(app, [*arguments, "--json", "--no-page"]).stdout)
    assert {r["mechanism"] for r in again["results"]} == {"softmax", "SigmoidAttention(length=16)", "MALA | GatedHeads"}
    loaded = Lab.load(tmp_path / "kept")
    assert GatedHeads.paper.title in loaded.page("again.html").read_text()
    assert {(r.mechanism, r.quantity): r.mean for r in loaded.results} == {
        (r["mechanism"], r["quantity"]): r["mean"] for r in again["results"]
    }


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"kind": "pools"}, "must be one of lm"),
        ({"kind": "pools", "mechanisms": None}, "must be one of lm"),
        ({"seeds": 0}, "must be 1 or more"),
        ({"tokens": 3}, "enough for one batch"),
        ({"mechanisms": []}, "one or more beside softmax"),
        ({"mechanisms": "mala"}, r"= 'mala': must be .* for example mechanisms=\['MALA\(\)'\]$"),
        ({"mechanisms": MALA()}, r"= MALA\(chunk=64\): must be "),
        ({"mechanisms": SinkWindow() | SigmoidAttention()}, r"\| SigmoidAttention\(.*\): must be "),
        ({"mechanisms": {"softmax": Halved()}}, "is the name of softmax"),
        ({"mechanisms": ["pruneheads"]}, "must be methods or stacks"),
        ({"mechanisms": [SinkRate()]}, "only reads, so that it trains as softmax does"),
        ({"out": ""}, r"lab\(\).out = '': must be the name of a folder"),
        ({"out": __file__}, "is a file, and must be the name of a folder"),
    ],
)
def test_what_makes_no_lab_is_refused_at_once(how: dict[str, Any], says: str) -> None:
    with pytest.raises(FieldError, match=says):
        heedful.lab(**{"mechanisms": [Halved()], **how})


def test_mechanisms_are_named_by_text() -> None:
    found = _chosen(["mala", "sigmoidattention(length=5)|sinkrate", "sigmoidattention"], "lm")
    wanted = [Stack(), Stack((MALA(),)), SigmoidAttention(5) | SinkRate(), Stack((SigmoidAttention(),))]
    assert list(found.values()) == wanted  # of the last the default, not what laws try
    for kind in kinds.KINDS:
        assert len({type(stack.methods[0]) for stack in list(_chosen(None, kind).values())[1:]}) == 8


def test_differences_are_paired_by_seed() -> None:
    plain = [1.0, 5.0, 3.0]
    lab = made(series("softmax", plain), series("A", [0.9, 4.8, 2.9]), series("B", [9.0]))
    a = lab.found["A", "text", "loss"]
    assert a.mean == pytest.approx(8.6 / 3)
    assert a.gap is not None
    assert a.gap.mean == pytest.approx(-0.4 / 3)
    half = 4.30265 * 0.0577350 / 3**0.5  # Student's t for two degrees of freedom, and the spread of -0.1, -0.2, -0.1
    assert (a.gap.low, a.gap.high) == (pytest.approx(-0.4 / 3 - half, 1e-3), pytest.approx(-0.4 / 3 + half, 1e-2))
    assert not a.gap.sure, "three seeds are too few"
    assert lab.found["B", "text", "loss"].gap is None
    assert lab.found["softmax", "text", "loss"].gap is None
    shifted = made(series("softmax", plain), series("A", [0.9, 4.8, 2.9])[::-1])
    assert shifted.found["A", "text", "loss"] == a, "by seed, whatever the order"


@pytest.mark.parametrize(("key", "course", "tone"), [("loss", "text", "good"), ("recall", "puzzles", "bad")])
def test_what_eight_seeds_agree_on_is_coloured_by_its_way(key: str, course: str, tone: str) -> None:
    plain = [1.0 + seed for seed in range(8)]
    lower = [x - 0.1 - 0.01 * (seed % 3) for seed, x in enumerate(plain)]
    lab = made(series("softmax", plain, key, course), series("A", lower, key, course))
    columns = [name for name, _ in lab.matrix.columns]
    rows = dict(lab.matrix.rows)
    assert rows["A"][columns.index(key)].tone == tone
    assert rows["softmax"][columns.index(key)].tone == ""
    few = made(series("softmax", plain[:5], key, course), series("A", lower[:5], key, course))
    assert dict(few.matrix.rows)["A"][columns.index(key)].tone == ""
    wide = [x + (-1) ** seed for seed, x in enumerate(plain)]
    split = made(series("softmax", plain, key, course), series("A", wide, key, course))
    assert dict(split.matrix.rows)["A"][columns.index(key)].tone == ""


def test_it_says_who_leads_what_was_refused_and_what_changed_nothing() -> None:
    idle = [replace(r, active=False) for r in series("Idle", [1.0, 1.1])]
    lab = made(
        series("softmax", [1.0, 1.1]), series("A", [0.5, 0.6]), idle,
        series("softmax", [0.5, 0.5], "recall", "puzzles"), series("A", [0.25, 0.25], "recall", "puzzles"),
        refused=(Refused("B", "text", "for a reason"),),
    )  # fmt: skip
    said = str(lab)
    assert "Text, loss (nats), the best first: A 0.550, softmax 1.050, Idle 1.050." in said
    assert "Puzzles, recall (share right), the best first: softmax 0.500, A 0.250." in said
    assert "Changed nothing here, and are softmax: Idle." in said
    assert "B was refused by text: for a reason" in said
    assert "With 2 seeds no difference is called sure; it takes 8." in said
    assert "-0.500" in said


def test_its_figures_hold_the_numbers() -> None:
    numbers = {"loss": 2.0, "loss at 2 x": 3.0, "loss at 4 x": 4.0, "loss at 8 x": 5.0, "training": 1.5}
    better = numbers | {"loss": 1.0, "training": 3.0}
    lab = made(
        [record("softmax", s, **numbers) for s in range(2)],
        [record("A", s, **better) for s in range(2)],
    )
    by = {figure.key: figure for figure in lab.description().figures}
    lengths, worth, gaps, learning = (by[k] for k in ("lengths", "text_worth", "text_differences", "text_learning"))
    assert isinstance(lengths, Curves)
    assert isinstance(worth, Scatter)
    assert isinstance(gaps, Intervals)
    assert isinstance(learning, Curves)
    assert list(lengths.x) == [16, 32, 64, 128]
    assert lengths.lines["A"].tolist() == [1.0, 3.0, 4.0, 5.0]
    assert worth.points == {"softmax": (1.5, -2.0, -2.0, -2.0), "A": (3.0, -1.0, -1.0, -1.0)}
    assert gaps.groups["loss"].tolist() == [[-1.0, -1.0, -1.0]]
    assert learning.lines["A"].tolist() == [2.0, 1.0, 1.0]
    assert list(learning.x) == [32, 64, 96]
    assert lab.plot.lengths().data
    frame = lab.to_pandas()
    assert frame["loss"].tolist() == [2.0, 2.0, 1.0, 1.0]


def test_a_folder_of_unlike_trainings_is_no_table(small: None, tmp_path: Path) -> None:
    with pytest.raises(StatisticError, match="is no folder"):
        Lab.load(tmp_path / "nowhere")
    (tmp_path / "kept").mkdir()
    with pytest.raises(StatisticError, match="holds no training"):
        Lab.load(tmp_path / "kept")
    kept = records.Trainings(tmp_path / "kept")
    kept.record(Little(), None, 0)
    kept.record(Little(tokens=64), None, 0)
    with pytest.raises(StatisticError, match="unlike settings"):
        Lab.load(tmp_path / "kept")
