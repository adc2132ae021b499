"""Scripts in every field of what a page shows, in a real browser: none is run, and none becomes a part of the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from heedful.bench.comparison import Comparison
from heedful.bench.records import Answered, Cost, Refused
from heedful.bench.results import PLAIN
from heedful.core.figures import Description, Figure, Finding, Intervals, Role, Scatter
from heedful.core.method import Method
from heedful.explaining.attention_patterns import Patterns
from heedful.report import page
from tests.test_page_browser import UNFOLD, browser, opened, path, pytestmark
from tests.test_page_images import shown
from tests.test_report import FakeProfile, profile, text_view

__all__ = ["browser", "opened", "path", "pytestmark"]

RUN = "window.owned=(window.owned||0)+1"
HOSTILE = (
    f"""</script><script>{RUN}</script><img src=x onerror="{RUN}"><svg onload='{RUN}'></svg>"""
    f"""<a href="javascript:{RUN}">x</a><iframe srcdoc="<script>parent.{RUN}</script>"></iframe>"""
    f"""" onmouseover="{RUN}" x='' onfocus='{RUN}' autofocus `${{{RUN}}}` <!--<script>"""
)
FOUND = """[...document.querySelectorAll('*')].filter(one =>
    one.tagName === 'IFRAME' || (one.getAttribute('src') || '') === 'x' ||
    (one.getAttribute('href') || '').startsWith('javascript:') ||
    [...one.attributes].some(a => a.value.includes('owned') && a.name.startsWith('on'))
).map(one => one.outerHTML.slice(0, 200))"""

POKE = """() => {
    for (const one of document.querySelectorAll('button, select, input, td, th, .t, .head, summary, canvas, .drag'))
        for (const name of ['mouseover', 'mousemove', 'focus', 'click', 'keydown'])
            one.dispatchEvent(new Event(name, { bubbles: true }));
}"""


def poisoned(thing: Any) -> Any:
    """The same with a script in every text; methods alone, which are code, stay what they are."""
    if isinstance(thing, str):
        return thing + HOSTILE
    if isinstance(thing, Method):
        return thing
    if isinstance(thing, Mapping):
        return {poisoned(key): poisoned(x) for key, x in thing.items()}
    if dataclasses.is_dataclass(thing):
        fields = (f.name for f in dataclasses.fields(thing) if f.init)
        return dataclasses.replace(thing, **{name: poisoned(getattr(thing, name)) for name in fields})  # type: ignore[type-var]
    if isinstance(thing, list | tuple):
        return type(thing)(map(poisoned, thing))
    return thing


def whole(told: FakeProfile) -> FakeProfile:
    """Every text of a profile but the names of facts, which are ours."""
    facts = {key: poisoned(x) for key, x in told.facts.items() if key != "reads"} | {
        key: x for key, x in told.facts.items() if key == "reads"
    }
    parts = tuple((part, poisoned(description)) for part, description in told.parts)
    return dataclasses.replace(told, facts=facts | {HOSTILE: HOSTILE}, parts=parts, view=poisoned(told.view))


def of_a_profile(folder: Path) -> Path:
    return page.write(whole(profile(text_view(40, [(14, 3), (17, 1)], 3))), folder / "profile.html")


def of_images(folder: Path) -> Path:
    return page.write(whole(shown()), folder / "images.html")


def of_other_figures(folder: Path) -> Path:
    """The kinds that a profile has not."""
    figures: tuple[Figure, ...] = (
        Intervals("all", "All", "What.", ["a", "b"], {"one": torch.rand(2, 3), "two": torch.rand(2, 3)}, "l", "u", "z"),
        Scatter("cost", "Cost", "What.", {"a": (1.0, 0.5, 0.4, 0.6), "b": (2.0, 0.7, 0.6, 0.8)}, "x", "y"),
    )
    told = Description(figures, (Role("r", "R.", {(0, 0): 0.5}),), (Finding("F.", 1.0, ("SinkWindow", "b"), "all"),))
    first = profile()
    return page.write(whole(dataclasses.replace(first, parts=((first.parts[0][0], told),))), folder / "others.html")


def of_a_comparison(folder: Path) -> Path:
    names, tasks = [PLAIN, "SinkWindow(window=96)" + HOSTILE, HOSTILE], ["Recall()" + HOSTILE, HOSTILE]
    words = {"name": "recall" + HOSTILE, "about": HOSTILE, "unit": "share right" + HOSTILE, "more_is_better": True}
    ours = {"contenders": {n: n for n in names[1:]}, "tasks": dict.fromkeys(tasks, words)}
    facts = {"model": HOSTILE, "dtype": HOSTILE, HOSTILE: HOSTILE} | ours
    records: list[Any] = [Refused(HOSTILE, tasks[1], HOSTILE)]
    for name in names:
        for task in tasks[: 1 if name == HOSTILE else 2]:
            records += [Answered(name, task, 0, i, float(i % 2), -1.0, None, 0.5, name != PLAIN) for i in range(12)]
        records += [Cost(name, 512, HOSTILE, i, 1.0, 0.1, 10**8, 10**6, None, (HOSTILE,)) for i in range(3)]
    return Comparison(facts, tuple(records)).page(folder / "comparison.html")


def of_patterns(folder: Path) -> Path:
    tokens = ["a" + HOSTILE, HOSTILE, "b"]
    return Patterns(tokens, {0: torch.rand(2, 3, 3).softmax(-1)}, {0: [0, 1]}).page(folder / "patterns.html")


PAGES = [of_a_profile, of_images, of_other_figures, of_a_comparison, of_patterns]


def everything(tab: Any) -> None:
    """Unfold, scroll to, point at and press whatever there is, and follow no link that leads away."""
    tab.evaluate(UNFOLD)
    for place in tab.locator(".plot").all():
        place.scroll_into_view_if_needed()
        tab.wait_for_timeout(100)
    tab.evaluate(POKE)
    tab.wait_for_timeout(300)


@pytest.mark.parametrize("made", PAGES)
def test_no_script_in_a_field_is_run(made: Callable[[Path], Path], browser: Any, tmp_path: Path) -> None:
    tab = browser.new_page()
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    file = made(tmp_path)
    tab.goto(file.as_uri())
    tab.wait_for_load_state("load")
    tab.wait_for_timeout(500)
    everything(tab)
    assert "owned" in tab.content(), "the texts are there"
    assert tab.evaluate("window.owned") is None
    assert tab.evaluate(FOUND) == []
    assert [url for url in asked if not url.startswith((file.as_uri(), "data:", "blob:"))] == []
    tab.close()


@pytest.mark.parametrize("at", ["<p>{}</p>", '<p title="{}"></p>', "<script>const told = '{}';</script>"])
def test_a_page_that_escapes_nothing_is_owned(at: str, browser: Any, tmp_path: Path) -> None:
    (tmp_path / "x.html").write_text(at.replace("{}", HOSTILE))
    tab = browser.new_page()
    tab.goto((tmp_path / "x.html").as_uri())
    tab.wait_for_timeout(300)
    assert tab.evaluate("window.owned")
    assert tab.evaluate(FOUND)
    tab.close()
