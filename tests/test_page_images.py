"""The page of images in a real browser: what is lit, what can be pointed at, on large and small screens."""

from __future__ import annotations

import pytest
import torch

from heedful.core.figures import Description, HeadMap, Role
from heedful.diagnosis.glances import ImageView
from heedful.methods.observe.sink_rate import SinkRate
from heedful.report import page
from tests.test_page_browser import browser, opened, path, pytestmark
from tests.test_report import FakeProfile

__all__ = ["browser", "opened", "path", "pytestmark"]

DARK = 0.1
SHARES = """([id, at]) => {
    const large = document.querySelector('#glance-large canvas'), copy = document.createElement('canvas');
    const canvas = id === 'large' ? large : document.querySelectorAll('#glances td canvas')[at];
    Object.assign(copy, { width: canvas.width, height: canvas.height });
    const brush = copy.getContext('2d', { willReadFrequently: true }), w = canvas.width / 3, h = canvas.height / 2;
    brush.drawImage(canvas, 0, 0);
    const light = (x, y) => brush.getImageData((x + 0.5) * w, (y + 0.5) * h, 1, 1).data[0] / 255;
    return [0, 1].flatMap(y => [0, 1, 2].map(x => light(x, y)));
}"""  # of white images: how light the middle of each place is


def view() -> ImageView:
    """Two white images of 2 x 3 patches with a class token; in the first head of each layer it looks at patch 2."""
    white = torch.ones(2, 3, 40, 60)
    white[:, :, 0, 0] = -1
    looks = torch.full((2, 2, 2, 2, 7), 1 / 7)
    looks[0, :, :, 0] = torch.tensor([0.0, 0.0, 0.8, 0.2, 0, 0, 0])
    maps = torch.zeros(1, 2, 7, 7)
    maps[0, 0] = looks[0, 0, 0, 0]
    maps[0, 0, 1] = torch.tensor([0.5, 0, 0, 0, 0, 0, 0.5])
    maps[0, 1] = torch.eye(7)
    names, heads = ["photos/a<b.png", "photos/c.png"], [(0, 0), (1, 1)]
    return ImageView(names, ["class token"], [2, 3], heads, [0, 1], *(x.half() for x in (white, looks, maps)))


def shown() -> FakeProfile:
    told = Description(
        (HeadMap("sinks", "Sinks", "What the first token gets.", [0, 1], torch.tensor([[0.1, 0.2], [0.3, 0.4]])),),
        (Role("looks far", "Looks far.", {(0, 0): 0.5, (1, 1): 0.4}),),
    )
    facts = {"model": "us/vit", "layers": 2, "heads": 2, "texts": 2, "windows": 2, "tokens": 14, "reads": "image"}
    return FakeProfile(facts, ((SinkRate(), told),), view())  # type: ignore[arg-type]


@pytest.fixture
def tab(opened, tmp_path):
    return opened(page.write(shown(), tmp_path / "x.html"), viewport={"width": 1280, "height": 900})


def test_a_patch_is_light_where_it_is_looked_at(tab):
    half = 1 - (1 - DARK) * 0.5  # a quarter of the highest, by its root
    lit = [DARK, 1, half, DARK, DARK, DARK]
    assert tab.locator("#glances td canvas").count() == 4
    assert tab.locator("#glances th[title='photos/a<b.png'], #glances th[title='a<b.png']").count() == 1
    tab.locator("#glances td button").first.click()
    assert tab.evaluate(SHARES, ["large", 0]) == pytest.approx(lit, abs=0.03)
    assert tab.locator("#glance-title").inner_text() == "Head 0.0: class token"
    assert "80%" in tab.locator("#glance-body").inner_text()
    tab.locator("#glance-whose").select_option("mean")
    assert tab.evaluate(SHARES, ["sheet", 0]) == pytest.approx([1] * 6, abs=0.03)
    assert "all tokens" in tab.locator("#glance-title").inner_text()


def test_every_patch_can_be_pointed_at(tab):
    tab.locator("#glances td button").first.click()
    large = tab.locator("#glance-large canvas")
    box = large.bounding_box()
    large.click(position={"x": box["width"] / 6, "y": box["height"] / 4})
    assert tab.locator("#glance-title").inner_text() == "Head 0.0: row 0, column 0"
    told = tab.locator("#glance-body").inner_text()
    assert "class token" in told
    assert told.count("50%") == 4  # to the class token and to the last patch, each as a kind and by itself
    assert tab.evaluate(SHARES, ["large", 0])[5] > 0.97
    tab.locator("#glance-way").select_option("in")
    assert "Gives to it" in tab.locator("#glance-body").inner_text()
    tab.locator("#glance-way").select_option("out")
    large.press("ArrowRight")
    assert tab.locator("#glance-title").inner_text() == "Head 0.0: row 0, column 1"
    large.press("Escape")
    assert tab.locator("#glance-title").inner_text() == "Head 0.0: class token"
    tab.locator("#glance-image").select_option("1")  # whose whole maps are not kept
    assert "of the first image" in tab.locator("#glance-body").inner_text()


def test_a_head_is_the_same_everywhere(tab):
    tab.locator("#glances td button").nth(1).click()
    assert tab.locator("#card-title").inner_text() == "Head 1.1"
    assert tab.locator("#card canvas.glance").count() == 1
    tab.locator("#after").click()
    assert tab.locator("#glance-title").inner_text().startswith(tab.locator("#card-title").inner_text())


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out_or_is_too_small(opened, tmp_path, width):
    tab = opened(page.write(shown(), tmp_path / "x.html"), viewport={"width": width, "height": 900})
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    small = """[...document.querySelectorAll('#images button, #images select')].map(x => x.getBoundingClientRect())
        .filter(box => box.width && Math.min(box.width, box.height) < 23.99).length"""
    assert tab.evaluate(small) == 0
