"""The pages in a real browser: they open without an error, and what they offer works."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heedful.bench.comparison import Comparison
from heedful.bench.records import Answered, Cost, Record, Refused
from heedful.bench.results import PLAIN
from heedful.core.figures import Description, Intervals, Listing, Role, Scatter
from heedful.methods.observe.sink_rate import SinkRate
from heedful.report import page
from tests.page_scripts import COVERED, OVER
from tests.test_report import BROWSER, FakeProfile, profile, text_view

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"] + [
    f"--disable-{part}" for part in ("background-networking", "component-update", "sync")
]
UNFOLD = "document.querySelectorAll('details').forEach(fold => { fold.open = true; })"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome here (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shown = [(14, 3), (17, 1), (5, 2)]
    return page.write(profile(text_view(32768, shown, 1)), tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of twelve methods, one of them with a long name, on three tasks, one of which refuses a method."""
    draw = random.Random(0)
    long = "SnapKV(budget=0.25, window=16, kernel=7, pool='mean') | TempScale(tau=0.9)"
    names = [PLAIN, "SinkWindow(window=96)", long, *(f"PASTA(alpha=0.{i})" for i in range(1, 10)), "VAR"]
    tasks = {
        "NeedleTask()": ("needle", "share right"),
        "Recall()": ("recall", "share right"),
        "Loss()": ("loss", "nats a token"),
    }
    about = {
        k: {"name": n, "about": f"Asks for {n}.", "unit": u, "more_is_better": n != "loss"}
        for k, (n, u) in tasks.items()
    }
    facts = {"model": "some/model-<135M>", "contenders": {n: n for n in names[1:]}, "tasks": about, "dtype": "float32"}
    records: list[Record] = [Refused("VAR", "Loss()", "VAR.role = 'marked': no span in these prompts has that name")]
    for place, name in enumerate(names):
        for task in tasks if name != "VAR" else list(tasks)[:2]:
            for i in range(12):
                score = draw.random() + place / 20 if task == "Loss()" else float(draw.random() < 0.9 - place / 20)
                records.append(Answered(name, task, 0, i, score, -1 - score, None, 0.5, name != PLAIN))
        for turn in range(3):
            seconds, cache = 1 + place / 10 + draw.random() / 20, 10**7 // (1 + place)
            records.append(Cost(name, 512, "a machine", turn, seconds, seconds / 50, 10**8, cache, None, ("tiled",)))
    return Comparison(facts, tuple(records)).page(tmp_path_factory.mktemp("compared") / "page.html")


@pytest.fixture
def opened(browser: Any, path: Path) -> Iterator[Any]:
    """Opens a page in a context; afterwards nothing was asked of the network and nothing failed."""
    troubles: list[str] = []
    contexts = []

    def open_page(page: Path = path, **context: Any) -> Any:
        contexts.append(
            browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **context})
        )
        tab = contexts[-1].new_page()
        tab.on("console", lambda said: troubles.append(said.text) if said.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on(
            "request",
            lambda asked: None if asked.url.startswith(("file:", "data:", "blob:")) else troubles.append(asked.url),
        )
        tab.goto(page.as_uri())
        tab.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def scroll_to(tab: Any, selector: str) -> None:
    tab.evaluate("s => document.querySelector(s).scrollIntoView({behavior: 'instant', block: 'start'})", selector)
    tab.wait_for_timeout(150)


def test_it_opens_and_draws_everything(opened):
    tab = opened()
    assert tab.title() == "some/model-<135M>: what its attention does"
    tab.evaluate(UNFOLD)
    for place in tab.locator(".plot").all():
        place.scroll_into_view_if_needed()
        place.locator(".main-svg").first.wait_for(state="attached", timeout=20_000)
    assert tab.locator(".mini .main-svg").count() >= 5
    levels = tab.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_what_is_further_down_is_drawn_without_being_scrolled_to(opened):
    tab = opened()
    seen = "[...document.querySelectorAll('[data-plot], .mini, #map, #strip')].filter(x => x.offsetParent)"
    assert tab.evaluate(f"{seen}.length") > 8
    tab.wait_for_function(f"{seen}.every(x => x.querySelector('.main-svg'))", timeout=20_000)
    assert tab.evaluate("scrollY") == 0


def test_every_control_has_a_name(opened):
    tab = opened()
    named = "x.textContent.trim() || x.getAttribute('aria-label') || x.labels?.length"
    controls = "[...document.querySelectorAll('button, select, input, [tabindex=\"0\"]')]"
    nameless = f"{controls}.filter(x => !({named})).map(x => x.outerHTML)"
    assert tab.evaluate(nameless) == []


def test_picking_a_head(opened):
    tab = opened()
    assert tab.locator("#card-title").inner_text() == "Head 14.3"  # the first with a part that the text shows
    scroll_to(tab, "#map")
    tab.locator("#map .main-svg").first.wait_for(state="attached")
    cell = """() => {
        const map = document.getElementById('map'), box = map.getBoundingClientRect(), {xaxis, yaxis} = map._fullLayout;
        return [box.left + xaxis._offset + xaxis.l2p(20), box.top + yaxis._offset + yaxis.l2p(6)];
    }"""
    x, y = tab.evaluate(cell)
    tab.mouse.move(x, y)
    tab.locator("#map .hovertext").first.wait_for()
    assert "head 20.6" in tab.locator("#map .hoverlayer").text_content()
    tab.mouse.click(x, y)
    tab.wait_for_function("document.getElementById('card-title').textContent === 'Head 20.6'")
    tab.locator("#map").focus()
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowUp")
    assert tab.locator("#card-title").inner_text() == "Head 19.5"
    tab.fill("#layer", "17")
    tab.fill("#number", "1")
    tab.keyboard.press("Tab")
    assert tab.locator("#card-title").inner_text() == "Head 17.1"
    assert "continues a repetition 64%, 2nd of 2" in tab.locator("#card-body").inner_text()
    assert tab.locator("#view-head").input_value() == "1"  # the text follows
    tab.fill("#layer", "99")
    tab.keyboard.press("Tab")
    assert tab.locator("#layer").input_value() == "17"
    tab.locator("#after").click()
    assert tab.locator("#card-title").inner_text() == "Head 17.2"
    tab.locator('.findings [data-head="14.3"]').click()
    assert tab.locator("#card-title").inner_text() == "Head 14.3"


def test_sorting_a_map_and_its_table(opened):
    tab = opened()
    scroll_to(tab, "#map")
    tab.locator("#map .main-svg").first.wait_for(state="attached")
    tab.locator('[data-map="reach"]').click()
    assert tab.locator("#map-title").inner_text() == "Mean distance"
    tab.select_option("#order", "value")
    columns = tab.evaluate(
        "(() => { const z = document.getElementById('map').data[0].z; return z[0].map((_, i) => z.map(r => r[i])); })()"
    )
    assert len(columns) == 30
    assert all(column == sorted(column, reverse=True) for column in columns)
    tab.locator('[data-table="map"]').click()
    values = tab.locator("#map-table td:nth-child(3)").all_inner_texts()
    assert len(values) == 270
    numbers = [float(v.removesuffix(" tokens")) for v in values]
    assert numbers == sorted(numbers, reverse=True)
    tab.locator("#map-table th button", has_text="Mean distance").click()
    tab.locator("#map-table th button", has_text="Mean distance").click()
    assert tab.locator("#map-table th").nth(2).get_attribute("aria-sort") == "ascending"
    first = tab.locator("#map-table tbody tr").first
    assert first.locator("td").first.inner_text() == "270"
    first.locator(".head").click()
    assert tab.locator("#card-title").inner_text() == "Head " + first.locator(".head").inner_text()


def test_listings_know_heads_and_numbers(opened):
    tab = opened()
    alike = tab.locator('[data-listing="alike"]')
    assert alike.locator(".head").all_inner_texts() == ["3.4", "1.0", "1.2"]
    alike.locator("th button", has_text="of it").click()
    assert alike.locator("td.right").all_inner_texts() == ["31%", "4%"]
    alike.locator("th button", has_text="of it").click()
    assert alike.locator("td.right").all_inner_texts() == ["4%", "31%"]
    assert tab.locator('[data-listing="extremes"] td').all_inner_texts() == [
        *("The", "4", "912"), *("↵", "9", "−88.1"), *("</script><!--", "2", "–"),
    ]  # fmt: skip


def test_reading_the_text(opened):
    tab = opened()
    scroll_to(tab, "#text")
    tokens = tab.locator("#tokens .t")
    tokens.first.wait_for()
    assert tokens.count() < 2500  # of 32768
    lamp = tab.locator("#tokens .t", has_text="lamp").first
    lamp.hover()
    assert tab.locator("#token-title").inner_text() == "lamp"
    assert tab.locator("#tokens .t.out").count() >= 1
    assert "Looked at by" in tab.locator("#token-body").inner_text()
    tab.mouse.move(5, 5)
    assert tab.locator("#token-title").inner_text() == "No token picked"
    lamp.click()
    tab.mouse.move(5, 5)
    assert tab.locator("#token-title").inner_text() == "lamp"  # a click stays
    tab.locator("#token-body button").first.click()
    assert tab.locator("#token-title").inner_text() == "The"  # the first head looks at the first token
    tab.locator("#tokens").focus()
    for key, token in (("End", 32767), ("ArrowLeft", 32766), ("Home", 0), ("ArrowRight", 1)):
        tab.keyboard.press(key)
        tab.wait_for_timeout(250)
        me = tab.locator("#tokens .t.me")
        assert int(me.get_attribute("data-i")) == token
        frame, place = tab.locator("#tokens").bounding_box(), me.bounding_box()
        assert frame["y"] <= place["y"] <= frame["y"] + frame["height"]
        assert tokens.count() < 2500
    tab.keyboard.press("Escape")
    assert tab.locator("#token-title").inner_text() == "No token picked"


def test_light_and_dark(opened):
    tab = opened(color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert tab.evaluate(ground) == "rgb(251, 251, 249)"
    tab.locator("#theme").click()
    assert tab.evaluate(ground) == "rgb(16, 17, 20)"
    scroll_to(tab, "#map")
    scale = "document.getElementById('map')._fullData[0].colorscale[0][1]"
    tab.locator("#map .main-svg").first.wait_for(state="attached")
    assert tab.evaluate(scale) == "#171835"
    tab.reload()
    tab.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)
    assert tab.evaluate(ground) == "rgb(16, 17, 20)"  # remembered
    assert opened(color_scheme="dark").evaluate(ground) == "rgb(16, 17, 20)"


def test_on_a_phone(opened):
    tab = opened(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    tab.evaluate(UNFOLD)
    for button in tab.locator("[data-table]").all():
        button.click()
    assert tab.locator(".table table").count() == 8
    for y in range(0, tab.evaluate("document.documentElement.scrollHeight"), 700):
        tab.evaluate("y => window.scrollTo({top: y, behavior: 'instant'})", y)
        tab.wait_for_timeout(60)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    scroll_to(tab, "#tokens")
    tab.locator("#tokens .t", has_text="lamp").first.tap()
    assert tab.locator("#token-title").inner_text() == "lamp"
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_comparison(opened, compared):
    tab = opened(compared)
    assert tab.locator("h1").inner_text() == "some/model-<135M>"
    for place in tab.locator(".plot").all():
        place.scroll_into_view_if_needed()
        place.locator(".main-svg").first.wait_for(state="attached", timeout=20_000)
    assert tab.get_by_text("Quality against prefill time", exact=True).is_visible()
    assert tab.locator(".plot .textpoint", has_text="unedited").count() == 2  # beside time, and beside the cache
    costs = tab.locator(".table", has=tab.locator("th", has_text="prefill, s"))
    assert costs.locator("tbody tr").count() == 13
    assert costs.locator("tbody tr").first.locator("td").first.inner_text() == "unedited"
    assert tab.locator(".table", has=tab.locator("th", has_text="log-prob")).count() == 3


def test_sorting_the_verdicts(opened, compared):
    tab = opened(compared)
    first = "#matrix tbody tr td:nth-child({})"

    def column(n: int) -> list[float]:
        told = tab.locator(first.format(n)).evaluate_all("cells => cells.map(cell => cell.dataset.value)")
        return [float(x) for x in told if x is not None]

    button = tab.locator("#matrix thead button").nth(2)
    for order, reverse in (("descending", True), ("ascending", False)):
        button.click()
        assert button.locator("..").get_attribute("aria-sort") == order
        assert column(3) == sorted(column(3), reverse=reverse)
    assert len(set(column(3))) > 1


def test_the_map_of_roles(opened):
    tab = opened()
    assert tab.locator(".cells i").count() == 30 * 9
    tab.locator('.cells i[data-head="14.3"]').click()
    assert tab.locator("#card-title").inner_text() == "Head 14.3"
    assert tab.locator(".cells i[aria-current]").count() == 1
    tab.locator('[data-role="0"]').hover()
    bright = tab.locator(".cells i:not(.dim)").evaluate_all("cells => cells.map(cell => cell.dataset.roles)")
    assert bright
    assert all("0" in roles.split() for roles in bright)


def test_a_head_of_a_model_of_one_layer_is_no_poster(browser, tmp_path):
    told = Description(roles=(Role("parks", "Parks.", {(0, 0): 0.9}),))
    made = page.write(FakeProfile({"layers": 1, "heads": 12}, ((SinkRate(), told),)), tmp_path / "page.html")
    shown = browser.new_page(viewport={"width": 1280, "height": 800})
    shown.goto(made.as_uri())
    assert shown.locator(".cells").bounding_box()["height"] < 800
    shown.close()


def test_paper_shows_every_figure(opened):
    tab = opened()
    tab.pdf(format="A4")
    assert (
        tab.evaluate("[...document.querySelectorAll('.plot, .mini')].filter(x => !x.querySelector('svg')).length") == 0
    )
    assert tab.evaluate("[...document.querySelectorAll('details')].every(x => x.open)")


def test_a_comparison_on_a_phone(opened, compared):
    tab = opened(compared, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    for place in tab.locator(".plot").all():
        place.scroll_into_view_if_needed()
        place.locator(".main-svg").first.wait_for(state="attached", timeout=20_000)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    areas = tab.evaluate("[...document.querySelectorAll('.plot')].map(p => p._fullLayout.xaxis._length)")
    assert len(areas) == 4
    assert min(areas) > 195  # long names leave half of the width to what is drawn
    names = tab.locator(".table td:first-child", has_text="unedited").all()
    assert all(name.bounding_box()["height"] < 40 for name in names)  # on one line


@pytest.mark.parametrize("width", [390, 1280])
def test_names_of_points_leave_each_other_room(opened, compared, width):
    tab = opened(compared, viewport={"width": width, "height": 844})
    for place in tab.locator(".plot").all():
        place.scroll_into_view_if_needed()
        place.locator(".main-svg").first.wait_for(state="attached", timeout=20_000)
    tab.wait_for_function(f"{OVER}.length == 2 && {OVER}.every(([, pairs]) => pairs === 0)", timeout=5_000)
    assert all("unedited" in names and len(names) >= 3 for names, _ in tab.evaluate(OVER))
    tab.set_viewport_size({"width": 600, "height": 844})
    tab.wait_for_timeout(500)
    assert [pairs for _, pairs in tab.evaluate(OVER)] == [0, 0]


def shown(browser: Any, tmp_path: Path, *figures: Any) -> Any:
    """A page of these figures on a phone."""
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    held = replace(profile(), parts=[(SinkRate(), Description(figures))])
    tab.goto(page.write(held, tmp_path / "page.html").as_uri())
    return tab


def test_a_name_without_room_above_its_point_stands_beside_it(browser: Any, tmp_path: Path) -> None:
    at = {"plain": (1.0, 1.0), "close to it": (1.06, 1.02), "alone": (1.5, 2.0), "far to the right": (2.0, 1.5)}
    points = {name: (x, y, y, y) for name, (x, y) in at.items()}
    tab = shown(browser, tmp_path, Scatter("few", "Few", "", points, "cost", "worth"))
    tab.locator(".plot .points .point").first.scroll_into_view_if_needed()
    tab.wait_for_function(f"{OVER}.length == 1")
    ((names, pairs),) = tab.evaluate(OVER)
    assert (sorted(names), pairs) == (sorted(at), 0)
    assert tab.evaluate(COVERED) == 0


def test_long_names_that_differ_at_the_end_stay_apart_on_a_phone(browser: Any, tmp_path: Path) -> None:
    names = [f"HRV(role='subjects', factor={x})" for x in (2.0, 0.5)]
    found = Intervals("few", "Few", "", names, {"task": torch.tensor([[0.0, -1, 1]] * 2)}, "points", "points")
    tab = shown(browser, tmp_path, found)
    tab.locator(".plot .ytick text").first.scroll_into_view_if_needed()
    assert {*tab.locator(".plot .ytick text").all_text_contents()} == {"HRV(role='s…r=2.0)", "HRV(role='s…r=0.5)"}


def test_an_empty_table_says_so(browser: Any, tmp_path: Path) -> None:
    empty = Listing("few", "Heads that look far", "Of which there may be none.", ("head", "share"), [])
    some = Listing("some", "Heads that look near", "Of which there are some.", ("head", "share"), [("a", 1), ("b", 2)])
    tab = shown(browser, tmp_path, empty, some)
    told = tab.evaluate("[...document.querySelectorAll('table tbody')].map(x => [...x.rows].map(r => r.innerText))")
    assert told[:2] == [["None."], ["a\t1", "b\t2"]]
