"""What notebooks show of what verbs return: whole without a script, and nothing in a text breaks out."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
import torch

import heedful
from heedful import models
from heedful.core.figures import Cell, Grid, HeadMap, Matrix
from heedful.explaining import attribute, direct_logits, faithfulness, logit_lens, patching
from heedful.methods import AttentionRollout, SinkRate, SinkWindow, TempScale
from heedful.report.cells import heat, matrix

IDS = torch.arange(5, 13)


class Outline(HTMLParser):
    """Which elements are open, and what is in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag not in ("br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def elements(text: str) -> list[str]:
    outline = Outline(text)
    assert outline.open == []
    assert "script" not in outline.seen
    return outline.seen


def values() -> dict[str, Any]:
    model = models.tiny("llama")
    metric = lambda logits: logits[:, -1, 50] - logits[:, -1, 60]  # noqa: E731
    clean, corrupt = IDS[None], torch.cat([IDS[:3], IDS[:1], IDS[4:]])[None]
    with torch.no_grad(), heedful.attach(model, SinkWindow(1, 2) | SinkRate()) as run:
        before = run._repr_html_()
        run(input_ids=clean)
        shown = run._repr_html_()
        activity = run.activity()
    assert "attached" in before
    assert "layers entered" not in before
    assert "2 of 2 layers entered" in shown
    assert repr(run).endswith("on LlamaForCausalLM, closed)")
    assert repr(activity) == str(activity)
    return {
        "activity": activity,
        "run": run,
        "explain": heedful.explain(TempScale()),
        "attribution": attribute(model, IDS, AttentionRollout()),
        "lens": logit_lens(model, IDS),
        "direct": direct_logits(model, IDS, 3),
        "patching": patching(model, clean, corrupt, metric),
        "faithfulness": faithfulness(model, IDS, torch.rand(8), steps=2, seeds=2),
        "patterns": heedful.patterns(model, IDS),
        "laws": heedful.check(TempScale, only=("is_documented",)),
        "profile": heedful.diagnose(model, IDS, measures=SinkRate()),
    }


def test_everything_that_a_verb_returns_shows_itself() -> None:
    pytest.importorskip("jinja2")
    for name, value in values().items():
        seen = elements(value._repr_html_())
        assert seen, name
        if name in (cells := {"attribution": 8, "lens": 16, "direct": 8, "patching": 8}):
            assert seen.count("td") == cells[name]


def test_a_map_says_its_numbers_and_is_white_at_zero() -> None:
    share = torch.tensor([[0.5, -0.25, 0.0], [float("nan"), 0.1, 0.2]])
    shown = heat(HeadMap("x", "A <title>", "What & how.", [3, 4], share))
    assert elements(shown).count("td") == 6
    assert "A &lt;title&gt;" in shown
    for cell in ("head 3.0: 50%", "head 3.1: -25%", "head 4.0: none", "head 4.2: 20%"):
        assert f'title="{cell}"' in shown
    assert 'background:#f5f5f3;color:#1d1f26" title="head 3.2: 0%"' in shown
    assert 'background:#014263;color:#ffffff" title="head 3.0: 50%"' in shown  # the largest, whatever its sign
    plain = heat(
        Grid("x", "", "", share.abs(), ["</td>", "b"], ["1", "2", "3"], "row", "place", text=[["<i>"] * 3] * 2)
    )
    assert elements(plain).count("i") == 0
    assert 'background:#171835;color:#ffffff" title="row &lt;/td&gt;, place 1: 0.5"' in plain


def test_a_matrix_of_methods() -> None:
    shown = matrix(Matrix((("needle", "points"),), (("A<b>", (Cell("+1", "0 to 2", 1.0, "good"),)),)))
    assert elements(shown) == ["table", "tr", "th", "th", "br", "small", "tr", "th", "td", "br", "small"]
    assert "A&lt;b&gt;" in shown
    assert "background:#d3ebe7" in shown
