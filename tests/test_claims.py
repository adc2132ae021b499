"""What claims draw, another text for every seed, and what the ledger's page says of what came out."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from claims import _page, ledger
from claims._page import ABOUT, change, counts, interval, needed, page, records, sureness, surest, table, undoing
from claims._texts import apart, passages, sentences
from claims.ledger import HOLDS, REVERSED, UNSEEN, WEAKER, WORDS, Claim, Record, claims, verdict, words


@pytest.mark.parametrize(("count", "words"), [(12, 120), (4, 230), (1, 100)])
def test_no_two_seeds_begin_with_the_same_text(count: int, words: int) -> None:
    """Some claims read no further than the first."""
    drawn = [passages(seed, count, words) for seed in range(8)]
    assert len({texts[0] for texts in drawn}) == 8
    assert all(len(set(texts)) == count and min(len(text.split()) for text in texts) >= words for texts in drawn)
    assert drawn[5] == passages(5, count, words)


def test_no_two_seeds_share_a_piece_or_a_sentence() -> None:
    for drawn in ([apart(seed, 4, 300) for seed in range(8)], [sentences(seed, 20) for seed in range(8)]):
        every = [text for texts in drawn for text in texts]
        assert len(set(every)) == len(every)
    assert {len(text.split()) for text in apart(3, 4, 300)} == {300}
    with pytest.raises(ValueError, match="not enough"):
        sentences(10, 20)


def record(key: str, effects: list[float], strong: float = 0.0) -> Record:
    return Record(
        key, "M", "it works.", "none", "a model", "gain", effects, sum(effects) / len(effects), 0.0, strong,
        verdict(effects, strong), [], 0.0, "", {}, "",
    )  # fmt: skip


FAR, MIDDLE, NEAR = [-5.0, -5.0, -5.0, -5.0, -5.1], [-5.0, -5.0, -5.0, -5.0, -6.0], [-9.0, -9.0, -9.0, -5.0, -2.0]


def test_the_surest_are_the_reversed_furthest_from_zero_in_half_widths() -> None:
    # mean -5.02, spread 0.0447, 2.78 sqrt(1/5) of it: 0.0556; (5.02 - 0.0556) / 0.0556
    assert 89 < sureness(record("far", FAR)) < 90
    found = [
        record(key, effects)
        for key, effects in {
            "near": NEAR, "good": [5.0, 5.0, 5.0, 5.0, 5.1], "far": FAR, "middle": MIDDLE,
            "wide": [-9.0, 9.0, -8.0, 1.0, 2.0],
            "nearest": [-9.0, -9.0, -1.0, -5.0, -2.0],
        }.items()
    ]  # fmt: skip
    assert [r.key for r in surest(found)] == ["far", "middle", "near"]
    assert counts(found) == "6 claims measured: 1 holds, 1 not seen at this scale, 4 reversed at this scale."


@pytest.mark.parametrize(
    ("effects", "strong"), [(FAR, 0.0), (NEAR, 0.0), ([5.0, 4.0, 6.0], 4.5), ([2.0, 3.0, 4.0], 5.0)]
)
def test_one_more_draw_past_what_is_told_undoes_a_verdict_and_one_before_it_does_not(
    effects: list[float], strong: float
) -> None:
    edge, said = undoing(effects, strong), verdict(effects, strong)
    by = 0.01 if said == REVERSED else -0.01
    assert said != UNSEEN
    assert verdict([*effects, edge - by], strong) == said
    assert verdict([*effects, edge + by], strong) != said


def test_the_draws_that_would_decide_are_those_after_which_the_interval_leaves_zero() -> None:
    effects = [1.0, -0.5, 1.5, 0.5, -0.25]  # mean 0.45, spread 0.837
    assert needed(effects) == 16  # t(15) = 2.13: 2.13 * 0.837 / sqrt(16) = 0.446; at 15 draws 0.463
    assert needed([1.0, -1.0, 1.0, -1.0, 0.01]) is None


def test_a_verdict_says_its_interval_its_draws_and_what_would_change_it() -> None:
    held, weak = record("P1", [1.0, 1.1, 0.9, 1.0, 1.2]), record("P2", [1.0, 1.1, 0.9, 1.0, 1.2], 2.0)
    unseen, few = record("P3", [1.0, -0.5, 1.5, 0.5, -0.25]), record("P4", [-1.0, -1.1, -0.9])
    assert [r.verdict for r in (held, weak, unseen, few)] == [HOLDS, WEAKER, UNSEEN, REVERSED]
    assert interval(held) == "+1.04 [+0.898, +1.18]"
    assert change(held) == f"one more draw below {undoing(held.effects, 0.0):+.3g}"
    assert change(weak).endswith("; a mean of 2 or more")
    assert change(unseen) == "16 draws like these"
    assert "above" in change(few)
    assert change(few).endswith("too few to sign: the ledger asks for 5 draws")
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table([held, weak, unseen]).splitlines()]
    assert {len(row) for row in rows} == {10}
    assert rows[2][-4:] == ["+1.04 [+0.898, +1.18]", "5", "**holds**", change(held)]


def test_the_page_opens_with_the_counts_and_the_three_surest_reversals() -> None:
    found = records()
    opening, _, rest = page().partition("Each row below")
    lines = [line for line in opening.splitlines() if line]
    assert lines[1] == counts(found)
    assert "95 % interval lies furthest from zero" in lines[2]
    assert [line.split(")")[0].split("(")[1] for line in lines[3:]] == [r.key for r in surest(found)]
    assert len(lines) == 6
    assert all(f"| {r.key} |" in rest for r in found)
    assert ABOUT.partition("Each row below")[2].strip().splitlines()[0] in rest


def test_a_record_without_its_bar_says_how_it_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "P1.json").write_text('{"key": "P1"}')
    monkeypatch.setattr(_page, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match=r"P1.json: strong, .* --judge"):
        records()


def test_a_record_says_what_its_claim_says() -> None:
    """A constant that changed after the run shows here: what it changed has to be measured again."""
    made = claims()
    assert {found.key for found in records()} <= made.keys()
    for found in records():
        assert {name: getattr(found, name) for name in WORDS} == words(made[found.key]), found.key
        assert len(found.effects) == made[found.key].seeds, found.key


def test_every_verdict_is_that_of_its_effects() -> None:
    for found in records():
        assert found.verdict == verdict(found.effects, found.strong), found.key


def test_a_claim_that_was_stopped_goes_on_with_the_next_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "RESULTS", tmp_path)
    monkeypatch.setattr(ledger, "KEPT", tmp_path / "kept")
    asked: list[int] = []

    def measure(seed: int) -> tuple[float, dict[str, float]]:
        asked.append(seed)
        if asked == [0, 1, 2]:
            raise KeyboardInterrupt
        return seed + 1.0, {"seed": seed}

    claim = Claim("P1", "M", "it works.", "none", "a model", "gain", measure)
    with pytest.raises(KeyboardInterrupt):
        ledger.run(claim)
    (file,) = ledger.KEPT.iterdir()
    assert not list(tmp_path.glob("*.json"))
    file.write_text(file.read_text() + "\n[2, 9.")  # the machine went down while a line was written
    assert ledger.run(claim).effects == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert asked == [0, 1, 2, 2, 3, 4]
    assert json.loads((tmp_path / "P1.json").read_text())["details"] == [{"seed": n} for n in range(5)]
    assert not list(ledger.KEPT.iterdir())
    kept = ledger._kept_at(claim)
    kept.write_text("".join(f"\n[{seed}, 1.0, {{}}, 60.0]" for seed in range(5)))
    record = ledger.run(claim)
    assert asked[6:] == []
    assert record.seconds == 300.0, "what a seed took is kept with it"


def test_again_measures_what_is_named_and_a_record_stays_until_the_next_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "RESULTS", tmp_path)
    monkeypatch.setattr(ledger, "KEPT", tmp_path / "kept")
    broken = [True]

    def measure(seed: int) -> tuple[float, dict[str, float]]:
        if seed == 3 and broken:
            raise ValueError("broken")
        return seed + 1.0, {}

    found = {key: Claim(key, "M", "it works.", "none", "a model", "gain", measure) for key in ("P1", "P2")}
    monkeypatch.setattr(ledger, "claims", lambda: found)
    monkeypatch.setattr("sys.argv", ["ledger", "--again", "P1"])
    for key in found:
        (tmp_path / f"{key}.json").write_text("old")
    with pytest.raises(ValueError, match="broken"):
        ledger.main()
    assert [(tmp_path / f"{key}.json").read_text() for key in found] == ["old", "old"]
    broken.clear()
    ledger.main()
    assert json.loads((tmp_path / "P1.json").read_text())["effects"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert (tmp_path / "P2.json").read_text() == "old"


def test_seeds_are_kept_for_the_same_code_and_versions_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = {
        "P1": "from claims import P2\n", "P2": "def later():\n    import claims._texts, torch\n", "P3": "",
        "_texts": "from benchmarks.speed import timing\n", "_other": "",
    }  # fmt: skip
    files = {name: tmp_path / "claims" / f"{name}.py" for name in code}
    files["timing"] = tmp_path / "benchmarks" / "speed" / "timing.py"
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code.get(file.stem, ""))
    monkeypatch.setattr(ledger, "__file__", str(tmp_path / "claims" / "ledger.py"))
    monkeypatch.setattr("inspect.getfile", lambda _: str(files["P1"]))
    claim = Claim("P1", "M", "it works.", "none", "a model", "gain", lambda seed: (1.0, {}))
    kept = ledger._kept_at(claim)
    for name, file in files.items():
        file.write_text(code.get(name, "") + "# changed")
        assert (ledger._kept_at(claim) == kept) == (name in ("P3", "_other")), name
        file.write_text(code.get(name, ""))
    assert ledger._kept_at(claim) == kept
    for package in ("torch", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(ledger, "version", lambda name, other=package: "other" if name == other else version(name))
            assert ledger._kept_at(claim) != kept
    home = tmp_path / "heedful"
    home.mkdir()
    monkeypatch.setattr("heedful.__file__", str(home / "__init__.py"))
    for name in ("engine.py", "kernel.cpp", "kernel.h", "notes.txt"):
        kept = ledger._kept_at(claim)
        (home / name).write_text("new")
        assert (ledger._kept_at(claim) == kept) == (name == "notes.txt"), name
