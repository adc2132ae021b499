"""What each formula was read against: the record names papers and methods that are there, and the page counts them."""

from __future__ import annotations

import json
import re

from benchmarks import fidelity
from benchmarks.speed.timing import RECORDS
from heedful.catalogue import entries
from heedful.functions import functions

LESS = re.compile(r"at hand|abstract|summar|not be (read|had)|to be had")
ROWS = json.loads((RECORDS / "fidelity.json").read_text(encoding="utf-8"))["rows"]


def test_each_row_tells_what_was_read_and_whose_it_is() -> None:
    assert {row["whose"] for row in ROWS} == set(fidelity.WHOSE)
    assert all(row["read"] and row["name"] for row in ROWS)
    assert [row for row in ROWS if row["run"] and row["whose"] != "theirs"] == []
    assert len({(row["paper"], row["name"]) for row in ROWS}) == len(ROWS)


def test_most_methods_papers_are_there() -> None:
    keys = {row["paper"] for row in ROWS}
    known = {paper.key for kind in entries().values() for paper in kind.paper.every}
    assert len(keys & known) >= 0.85 * len(known)


def test_what_was_not_at_hand_is_told_where_it_was_not() -> None:
    """A row that rests on less than the authors' text or code has a method that says so among what is unlike them."""
    of = [(name, paper) for name, one in {**entries(), **functions()}.items() if one.paper for paper in one.paper.every]
    told = {
        row["name"]: [paper for _, paper in of if paper.key == row["paper"]] for row in ROWS if row["whose"] == "none"
    }
    told |= {name: [paper for it, paper in of if it == name] for name in told if name in entries()}
    assert all(told.values())
    silent = [name for name, papers in told.items() for paper in papers if not LESS.search(" ".join(paper.differs))]
    assert silent == []


def test_the_page_counts_its_rows() -> None:
    page = fidelity.page()
    assert f"Of {len(ROWS)} rows {sum(row['whose'] == 'theirs' for row in ROWS)} rest on the authors' code" in page
    assert f"Beside {sum(row['run'] for row in ROWS)} the authors' own functions" in page
    assert page.count("\n| ") == len(ROWS) + 1
