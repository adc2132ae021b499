"""The picture of the rooms is drawn from the tree, and says where each kind of method goes."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest

from docs import rooms as picture
from docs.imports import HOME
from heedful import rooms
from heedful.catalogue import entries

ROOT = HOME.parents[1]


def words(svg: str) -> str:
    return " ".join(x.text or "" for x in ET.fromstring(svg).iter() if x.tag.endswith("text"))


def test_it_shows_every_room_with_its_sentence() -> None:
    said = words(picture.svg())
    for room, sentence in rooms.rooms().items():
        assert re.search(rf"\b{room.split('/')[-1]}\b", said)
        assert sentence.replace("`", "") in said
    for room in picture.foundations():
        assert f"{room}/" in said or f"{room}.py" in said


def test_the_numbers_are_those_of_the_catalogue() -> None:
    counted = picture._counts()
    assert sum(counted.values()) == len(entries())
    assert counted["sparse/prefill"] == sum(
        k.__module__.startswith("heedful.methods.sparse.prefill.") for k in entries().values()
    )


def test_a_new_room_is_drawn_and_a_new_family_must_be_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    said = rooms.rooms() | {"observe/planted": "A sentence that nobody else has."}
    monkeypatch.setattr(picture, "rooms", lambda: said)
    assert "A sentence that nobody else has." in words(picture.svg())
    said["planted"] = "A family."
    with pytest.raises(SystemExit, match="differ by planted"):
        picture.svg()


def test_every_room_stands_on_what_it_imports() -> None:
    on = picture.foundations()
    floors = picture.floors(on)
    height = {room: -i for i, floor in enumerate(floors) for room in floor}
    assert set(height) == set(on)
    assert all(height[below] < height[room] for room, found in on.items() for below in found)
    with pytest.raises(SystemExit, match="in a circle"):
        picture.floors({"a": {"b"}, "b": {"a"}, "c": set()})


def test_lines_are_drawn_where_no_detour_is() -> None:
    assert picture.next_below({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}


def test_it_is_read_by_day_and_by_night_and_design_shows_it() -> None:
    assert "prefers-color-scheme: dark" in picture.svg()
    assert "(docs/rooms.svg)" in (ROOT / "DESIGN.md").read_text()
