"""The pages by keyboard, by finger and on a small screen; what the card and the text show."""

from __future__ import annotations

import pytest
import torch

from heedful.explaining.attention_patterns import Patterns, Picture
from heedful.report import page
from tests.test_page_browser import browser, compared, opened, path, pytestmark, scroll_to
from tests.test_report import profile, text_view

__all__ = ["browser", "compared", "opened", "path", "pytestmark"]


def test_few_stops_for_the_tab_key_and_arrows_between(opened):
    tab = opened()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Enter")
    seen = set()
    for _ in range(120):
        tab.keyboard.press("Tab")
        seen.add(tab.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)"))
    assert len(seen) < 90  # back at the top of the page before that
    tab.locator(".sheet .thumb").first.focus()
    for key, place in (
        ("ArrowRight", 1),
        ("ArrowDown", 2),
        ("ArrowLeft", 1),
        ("End", 4),
        ("ArrowRight", 4),
        ("Home", 0),
    ):
        tab.keyboard.press(key)
        assert tab.locator(".sheet .thumb").nth(place).evaluate("x => x === document.activeElement")
    alike = tab.locator('[data-listing="alike"]')
    alike.locator("th button").first.click()
    assert alike.locator('button[tabindex="0"]').count() == 1  # rows that were sorted are no new stops


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_too_small_to_hit(opened, compared, path, width):
    for shown in (path, compared):
        tab = opened(shown, viewport={"width": width, "height": 900})
        small = """[...document.querySelectorAll('button, select, input, summary, a[href]')].filter(x => x.offsetParent
            && getComputedStyle(x).display !== 'inline' && x.getBoundingClientRect().width > 0)
            .map(x => [x.outerHTML.slice(0, 80), x.getBoundingClientRect()])
            .filter(([, box]) => Math.min(box.width, box.height) < 23.99).map(([x]) => x)"""
        assert tab.evaluate(small) == []


@pytest.mark.parametrize("screen", [{"width": x, "touch": y} for x in (390, 700, 1280) for y in (False, True)])
def test_the_cells_of_the_map_of_roles_are_large_enough_to_hit(opened, screen):
    touch = screen["touch"]
    tab = opened(viewport={"width": screen["width"], "height": 900}, has_touch=touch, is_mobile=touch)
    sizes = """[...document.querySelectorAll('.cells i')].map(x => x.getBoundingClientRect())
        .flatMap(x => [x.width, x.height])"""
    assert min(tab.evaluate(sizes)) > 23.99
    assert tab.evaluate("document.documentElement.scrollWidth") == screen["width"]
    assert tab.locator(".cells i").first.bounding_box()["x"] >= 0


def test_the_map_of_roles_goes_by_arrow_keys(opened):
    tab = opened()
    tab.locator(".cells").focus()
    layer, head = map(int, tab.locator("#card-title").inner_text().split()[1].split("."))
    for key in ("ArrowUp", "ArrowLeft", "ArrowLeft"):
        tab.keyboard.press(key)
    assert tab.locator("#card-title").inner_text() == f"Head {layer - 2}.{head - 1}"
    assert tab.locator(".cells i[aria-current]").get_attribute("data-head") == f"{layer - 2}.{head - 1}"
    for _ in range(40):  # there is nothing further up
        tab.keyboard.press("ArrowUp")
    assert tab.locator("#card-title").inner_text() == f"Head {layer - 2}.0"


@pytest.mark.parametrize("width", [1280, 800, 390])
def test_the_boxes_of_a_short_text_are_no_taller_than_what_is_in_them(opened, tmp_path, width):
    tab = opened(
        page.write(profile(text_view(40, [(14, 3)], 8)), tmp_path / "x.html"), viewport={"width": width, "height": 900}
    )
    tab.locator("#tokens .t").first.wait_for()
    tall = {name: tab.locator(name).bounding_box()["height"] for name in ("#tokens", "#token")}
    assert max(tall.values()) < 300, tall


def test_the_page_of_a_pictures_patterns_offers_no_text(browser, tmp_path):
    for tokens, shown in ((["a", ""], True), ([], False)):  # the second is of a character that the first shows
        maps = Patterns(tokens, {0: torch.eye(2).expand(2, 2, 2)}, {0: [0, 1]})
        tab = browser.new_page()
        tab.goto(maps.page(tmp_path / f"{len(tokens)}.html").as_uri())
        tab.wait_for_selector("#maps button[aria-pressed=true]")
        assert tab.locator("#tools").is_visible() is shown
        assert tab.locator("#text").inner_text() == "a·" * shown
        assert ("token" in tab.locator("h1 + p").inner_text()) is shown
        tab.close()


def test_a_picture_is_light_where_the_chosen_patch_looks(browser, tmp_path):
    weights = torch.zeros(1, 7, 7)
    weights[0, 0] = torch.tensor([0.0, 0, 0, 0.75, 0, 0, 0.25])  # of the token before the patches
    weights[0, 1, 4] = weights[0, 2, 5] = 1.0
    pixels = torch.linspace(-1, 1, 24).view(1, 4, 6).repeat(3, 1, 1)
    picture = Picture(pixels, (2, 3), ["class token"])
    maps = Patterns([], {0: weights, 1: torch.eye(4)[None]}, {0: [0], 1: [0]}, picture=picture)
    tab = browser.new_page()
    tab.goto(maps.page(tmp_path / "x.html").as_uri())
    tab.wait_for_selector("#maps button[aria-pressed=true]")
    picture = tab.locator("#picture")
    shares = """() => {
        const c = document.getElementById('picture'), at = c.getContext('2d'), w = c.width / 6, h = c.height / 4;
        const here = (x, y) => at.getImageData((x + 0.5) * w, (y + 0.5) * h, 1, 1).data[0];
        const own = (x, y) => (6 * y + x) * 255 / 23;
        return [1, 3].flatMap(y => [1, 3, 5].map(x => here(x, y) / own(x, y)));
    }"""  # of each patch's own light, by its last pixel, which its outline leaves alone
    dark = 0.15

    def seen(*wanted):
        assert tab.evaluate(shares) == pytest.approx(wanted, abs=0.02)

    half = 1 - 0.85 * (1 - 3**-0.5)  # a quarter beside three of them, by their roots
    seen(dark, dark, 1, dark, dark, half)
    assert "where the class token gives its attention" in picture.get_attribute("aria-label")
    box = picture.bounding_box()
    picture.hover(position={"x": box["width"] / 6, "y": box["height"] / 4})
    assert "the patch in row 0, column 0" in picture.get_attribute("aria-label")
    seen(dark, dark, dark, 1, dark, dark)
    picture.focus()
    for key, place in (("ArrowRight", (0, 1)), ("ArrowUp", (0, 1)), ("ArrowDown", (1, 1)), ("ArrowLeft", (1, 0))):
        tab.keyboard.press(key)
        assert "row {}, column {}".format(*place) in picture.get_attribute("aria-label")
    tab.locator("[value=in]").check()
    seen(1, dark, dark, dark, dark, dark)
    assert tab.locator("#text span").inner_text().strip() == "class token"
    assert tab.locator("#maps").bounding_box()["x"] == picture.bounding_box()["x"]
    assert picture.bounding_box()["y"] < tab.locator("#says").bounding_box()["y"]  # beside the large map, not below it
    tab.locator("#text span").click()
    assert "where the class token is looked at from" in picture.get_attribute("aria-label")
    tab.locator("#maps button").last.click()  # a map of something else
    assert not picture.is_visible()
    tab.close()


def test_the_card_shows_the_heads_pattern(opened):
    tab = opened()
    scroll_to(tab, "#card")
    canvas = tab.locator("#card canvas.pattern")
    pixels = """c => { const x = c.getContext('2d').getImageData(0, 0, 16, 16).data;
        return [[3, 3], [9, 9], [3, 5]].map(([k, q]) => [...x.slice(4 * (16 * q + k), 4 * (16 * q + k) + 3)]); }"""
    itself, other, off = canvas.evaluate(pixels)
    assert itself == other != off  # each token looks at itself
    box = canvas.bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 2.5 / 16, box["y"] + box["height"] * 2.5 / 16)
    assert "(2) gives 100% to" in tab.locator("#card-body").inner_text()
    tab.locator("#theme").click()
    assert tab.locator("#card canvas.pattern").evaluate(pixels)[2] != off


def test_what_shades_the_text(opened):
    tab = opened()
    scroll_to(tab, "#text")
    tab.locator("#tokens .t").first.wait_for()
    tab.select_option("#view-head", "1")
    shades = "spans => spans.map(x => x.style.getPropertyValue('--r'))"
    found = {}
    for way, words in {"attention": "fair share", "value": "length of its value", "entropy": "how widely"}.items():
        tab.select_option("#shade", way)
        found[way] = tab.locator("#tokens .t").evaluate_all(shades)
        assert words in tab.locator("#shade-what").inner_text()
    assert len({tuple(x) for x in found.values()}) == 3
    tab.locator("#tokens .t", has_text="lamp").first.click()
    assert "entropy" in tab.locator("#token-body").inner_text()


def test_methods_are_broken_between_words_alone(opened, compared):
    tab = opened(compared, viewport={"width": 390, "height": 844})
    names = tab.locator("#matrix tbody th")
    assert names.evaluate_all("cells => cells.every(x => x.scrollWidth <= x.clientWidth + 1)")
    assert names.nth(1).evaluate("x => getComputedStyle(x).overflowWrap") == "normal"
    assert names.nth(1).inner_html() == "Sink<wbr>Window(<wbr>window=96)"
