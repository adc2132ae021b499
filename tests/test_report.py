"""The page and the plots, on a profile made up of every kind of figure."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful.core.errors import HeedfulError, WriteError
from heedful.core.figures import Curves, Description, Figure, Finding, Grid, HeadMap, Listing, Role, head_name
from heedful.core.method import Part
from heedful.methods.observe.sink_rate import SinkRate

pytest.importorskip("plotly", reason="plotly is not installed (pip install 'heedful[page]')")
pytest.importorskip("jinja2", reason="jinja2 is not installed (pip install 'heedful[page]')")

from heedful.diagnosis.view import MOST_HEADS, MOST_KEYS, SHOWN
from heedful.report import data, page
from heedful.report.pictures import Plots, export
from heedful.report.plots import DRAW, curves, draw, head_map

BROWSER = os.environ.get("BROWSER_PATH") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
LAYERS, HEAD_OUTPUT = 30, 9
TEXT = Path(__file__).parents[1] / "src" / "heedful" / "cli" / "text.txt"


@dataclass(frozen=True)
class FakeView:
    tokens: list[str]
    heads: list[tuple[int, int]]
    keys: Tensor
    weights: Tensor
    received: Tensor
    entropy: Tensor
    norms: Tensor
    layers: list[int]
    opening: Tensor


@dataclass(frozen=True)
class FakeProfile:
    facts: dict[str, Any]
    parts: Sequence[tuple[Part, Description]]
    view: FakeView | None = None
    asked: list[int] = field(default_factory=list)

    def description(self) -> Sequence[tuple[Part, Description]]:
        self.asked.append(1)
        return self.parts

    def findings(self) -> Sequence[Finding]:
        return sorted((f for _, told in self.parts for f in told.findings), key=lambda f: -f.weight)


def text_view(n: int, heads: Sequence[tuple[int, int]], top: int) -> FakeView:
    """Heads that look at the previous token, at the first one, and at what followed the same word before."""
    pieces = re.findall(r"\n+|\s?\w{1,7}|\s?[^\w\s]|\s", TEXT.read_text())
    tokens = (pieces * (n // len(pieces) + 1))[:n]
    made = torch.Generator().manual_seed(0)
    i = torch.arange(n)
    before = torch.tensor(_earlier(tokens))
    keys = (torch.rand(len(heads), n, top, generator=made) * (i[:, None] + 1)).int()
    weights = torch.rand(len(heads), n, top, generator=made) * 0.08
    for s in range(len(heads)):
        strong = (torch.zeros(n), (i - 1).clamp(min=0), (before + 1).clamp(min=0))[s % 3]
        keys[s, :, 0] = strong.int()
        weights[s, :, 0] = 0.45 + 0.45 * torch.rand(n, generator=made)
    received = torch.zeros(len(heads), n).scatter_add_(1, keys.flatten(1).long(), weights.flatten(1)) / (n - i)
    figures = received.clamp(1e-7, 1), 4 * torch.rand(len(heads), n, generator=made), 1 + i.expand(len(heads), n) % 7
    opening = torch.eye(16).expand(LAYERS, HEAD_OUTPUT, 16, 16)
    return FakeView(tokens, list(heads), keys, weights, *figures, list(range(LAYERS)), opening)


def _earlier(tokens: Sequence[str]) -> list[int]:
    seen: dict[str, int] = {}
    found = []
    for k, token in enumerate(tokens):
        found.append(seen.get(token, -1))
        seen[token] = k
    return found


def profile(view: FakeView | None = None, layers: int = LAYERS, heads: int = HEAD_OUTPUT) -> FakeProfile:
    """Every kind of figure, with what may go wrong in one: no value, a broken tag, a negative number, a long text."""
    made = torch.Generator().manual_seed(1)
    rows, depth = list(range(layers)), torch.linspace(0, 1, layers)[:, None]
    every = [(a, h) for a in rows for h in range(heads)]

    def noise(power: float, lean: float = 0.0) -> Tensor:
        return torch.rand(layers, heads, generator=made) ** power * (1 - lean + lean * depth)

    sinks, previous = noise(0.6, 0.9), noise(6)
    previous[3, 4] = float("nan")
    maps = (
        HeadMap("sinks", "Parks on the first token", "Share of attention on the first token.", rows, sinks),
        HeadMap("previous", "Looks at the previous token", "Mean weight on the token before.", rows, previous),
        HeadMap("entropy", "Spread of attention", "Entropy of the weights of a row.", rows, 4 - 4 * sinks, "nats"),
        HeadMap("reach", "Mean distance", "How far back a head looks.", rows, noise(2) * 900, "tokens"),
        HeadMap("copying", "Copying", "Score of a head's output matrix.", rows, noise(1) * 2 - 1, "score"),
    )
    far = torch.logspace(0, 3.2, 40)
    decay = 0.4 + 2.2 * torch.rand(layers, heads, generator=made)
    profiles = {head_name(*x): far ** -decay[x] for x in every}
    along = torch.arange(1, 2049).float()
    by_layer = {f"layer {a}": (0.2 + 0.02 * a) * along**-0.9 for a in rows}
    large = {"largest": 2 + 900 * (depth[:, 0] > 0.1), "median": 0.2 + depth[:, 0]}
    curved = (
        Curves(
            "distance", "How far", "Weight by distance.", far.tolist(), profiles, "tokens back", "weight", True, True
        ),
        Curves("massive", "Largest activations", "By layer.", rows, large, "layer", "absolute value", False, True),
        Curves("received", "By position", "Mean weight.", along.tolist(), by_layer, "position", "weight", True, True),
    )
    names = [str(a) for a in rows]
    channels = [f"channel {c}" for c in (13, 97, 204)]
    high = 10 ** (3 * torch.rand(3, layers, generator=made))
    influence = torch.rand(4, layers, generator=made)
    extremes = [["The", 4, 912.25], ["\n", 9, -88.125], ["</script><!--", 2, float("nan")]]
    others = (
        Grid("influence", "Reaches the end", "By layer.", influence, list("abcd"), names, "from", "layer", "share"),
        Grid("channels", "Massive channels", "By layer.", high, channels, names, "channel", "layer", "", True),
        Listing("extremes", "Most extreme values", "Where they stand.", ["token", "layer", "value"], extremes),
        Listing(
            "alike",
            "Heads alike",
            "Groups.",
            ["group", "head", "of it"],
            [["a", (3, 4), "31%"], ["b", "1.0, 1.2", "4%"]],
        ),
    )
    parked = {x: float(sinks[x]) for x in sorted(every, key=lambda x: -float(sinks[x])) if sinks[x] > 0.8}
    roles = (
        Role("continues a repetition", "Finds what followed the same token before.", {(14, 3): 0.81, (17, 1): 0.64}),
        Role("parks on the first token", "Gives the first token most of its attention.", parked),
    )
    findings = (
        Finding("Heads 14.3 (81%) and 17.1 continue repetitions.", 0.7),
        Finding("52% of heads park on the first token from layer 12 on.", 0.9, ("SinkWindow", "ClippedSoftmax")),
        Finding("The <first> token holds 1.5 nats & more.", 0.4, ("SinkWindow", "NotThere")),
    )
    size = {"layers": layers, "heads": heads, "kv_heads": 3, "parameters": 134515008}
    run = {"texts": 1, "tokens": 2048, "backends": ["tiled"], "date": "2026-11-21T18:15:58+00:00", "device": "cpu"}
    nested = {"seconds": {"text": 4.213, "view": 0.7}, "versions": {"torch": "2.13.0"}, "settings": {"of": ["x"]}}
    facts = {"model": "some/model-<135M>", **size, **run, **nested}
    first = (SinkRate(), Description(maps + curved, roles, findings))
    return FakeProfile(facts, (first, (SinkRate(0.2).on(1), Description(others))), view)


def embedded(text: str, name: str) -> str:
    found = re.search(rf'<script type="[^"]*" id="{name}">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return found[1]


def test_a_page_needs_nothing_from_outside():
    text = page.render(profile(text_view(256, [(14, 3)], 4)))
    assert not re.search(r"""(?:src|<link[^>]*href)=["']?(?:https?:)?//""", text)
    assert "@import" not in text
    assert "url(" not in embedded_style(text)
    for name in ("page.js", "tokens.js"):
        assert not re.search(r"\bfetch\(|XMLHttpRequest|\bimport\(", page.asset(name))


def embedded_style(text: str) -> str:
    return text[text.index("<style>") : text.index("</style>")]


def test_a_page_stays_light():
    text = page.render(profile(text_view(SHOWN, [(a, 3) for a in range(2, 2 + MOST_HEADS)], MOST_KEYS)))
    assert len(text.encode()) < 6e6
    assert "of 2048 points are drawn" in text  # of the curves over positions
    assert len(embedded(text, "data").encode()) + len(embedded(text, "numbers")) < 2e6


def test_text_cannot_break_out_of_its_place():
    view = text_view(64, [(14, 3)], 2)
    view.tokens[5:8] = ["</script>", "<!--<script>", "\u2028'\""]
    text = page.render(profile(view))
    read = json.loads(embedded(text, "data"))
    assert read["view"]["tokens"] == view.tokens
    listing = next(f for f in read["figures"] if f["key"] == "extremes")
    assert listing["rows"][2] == ["</script><!--", 2, None]
    assert text.count("</script") == text.count("<script") == 5
    assert "some/model-&lt;135M&gt;" in text
    assert "<135M>" not in text.replace(embedded(text, "data"), "")


@pytest.mark.parametrize(
    ("heads", "keys", "told"), [(1, 1, ""), (4, 4, ""), (4, 1, "multi-query"), (4, 2, "grouped-query")]
)
def test_the_kind_of_attention_is_named_where_heads_share_keys(heads: int, keys: int, told: str) -> None:
    ((_, found),) = page._facts({"layers": 2, "heads": heads, "kv_heads": keys})
    assert found.partition(", ")[2].partition(":")[0] == told


def test_the_summary_is_sorted_and_leads_on():
    text = page.render(profile())
    at = [
        text.index(x)
        for x in ("52% of heads park", "continue repetitions", "The &lt;first&gt; token holds 1.5 nats &amp;")
    ]
    assert at == sorted(at)
    assert '<a class="chip" href="#method-ClippedSoftmax">' in text
    assert 'id="method-ClippedSoftmax"' in text
    assert "heedful show ClippedSoftmax" in text
    assert "Not in this catalogue" in text  # NotThere
    assert 'data-head="14.3">14.3</button> (81%) and <button' in text
    assert 'class="head" data-head="1.5"' not in text
    assert "When Attention Sink Emerges" in text


def test_the_run_has_no_empty_rows_and_numbers_are_written_in_one_way():
    told = {"skipped": [], "how": "", "backends": ["native"], "parameters": 134515008, "nothing": None, "left_out": 0}
    told |= {"given": {}, "deep": {"one": {}}}
    assert page.more(told) == [("backends", "native"), ("parameters", "134,515,008"), ("left out", "0")]


def test_what_stands_in_backticks_is_code():
    code = page.environment().from_string("{{ text | code }}")
    assert code.render(text="`fit(it)` <b> `x`") == "<code>fit(it)</code> &lt;b&gt; <code>x</code>"


def test_a_page_of_nothing():
    text = page.render(FakeProfile({"model": "tiny"}, ()))
    assert "No measure found anything" in text
    assert 'id="heads"' not in text
    assert 'id="tokens"' not in text


def figures() -> dict[str, Figure]:
    return {f.key: f for _, told in profile().description() for f in told.figures}


@pytest.mark.parametrize("key", sorted(figures()))
def test_every_figure_draws(key):
    figure = figures()[key]
    drawn = draw(figure)
    assert drawn.layout.title.text == figure.title
    assert len(drawn.data) > 0
    json.loads(drawn.to_json())


def test_a_kind_without_a_plot_says_so():
    with pytest.raises(HeedfulError, match="no plot for a Figure: there are plots for HeadMap, Grid"):
        draw(Figure("x", "x", "x"))
    assert set(DRAW) == set(data.KINDS)


def test_head_map_puts_each_head_in_its_cell():
    nan = float("nan")
    figure = HeadMap("x", "X", "What.", [0, 2], torch.tensor([[0.1, 0.9, 0.5], [0.3, nan, 0.7]]))
    heat = head_map(figure).data[0]
    assert list(heat.x) == ["0", "2"]
    assert heat.z[1][0] == pytest.approx(0.9)
    assert (heat.zmin, heat.zmax) == (0, pytest.approx(0.9))
    ordered = head_map(figure, sort=True).data[0]
    assert ordered.customdata.T.tolist() == [[1, 2, 0], [2, 0, 1]]  # what has no value comes last
    assert ordered.z[:, 0].tolist() == pytest.approx([0.9, 0.5, 0.1])
    assert ordered.y0 == 1


def test_a_map_of_nothing_still_draws():
    assert head_map(HeadMap("x", "X", "What.", [0], torch.full((1, 2), float("nan")))).data[0].zmin is None


def test_a_log_grid_shows_true_numbers():
    figure = Grid("x", "X", "What.", torch.tensor([[100.0, 0.0]]), ["a"], ["b", "c"], "row", "column", log=True)
    heat = draw(figure).data[0]
    assert heat.z[0][0] == pytest.approx(2)
    assert math.isnan(heat.z[0][1])
    assert heat.customdata[0].tolist() == [100, 0]


@pytest.mark.parametrize("log", [False, True])
def test_thinned_lines_keep_ends_and_peaks(log):
    y = torch.zeros(2, 32768)
    y[0, 777], y[1, 20_001], y[0, 40], y[0, 2] = 5.0, -3.0, 2.0, 1.0
    figure = Curves("x", "X", "W.", range(1, 32769), {"a": y[0], "b": y[1]}, "x", "y", log_x=log)
    first, second = draw(figure).data
    assert len(first.x) <= 602
    assert {1.0, 778.0, 32768.0} <= set(first.x.tolist())
    assert 20_002.0 in second.x.tolist()
    assert (3.0 in first.x.tolist()) == log  # on a straight axis a higher peak stands in its stretch


def test_lines_of_heads_make_a_cloud_from_which_one_stands_out():
    lines = {"0.0": torch.tensor([1.0, 2.0]), "3.1": torch.tensor([4.0, 5.0]), "3.2": torch.tensor([0.0, 9.0])}
    figure = Curves("x", "X", "What.", [1, 10], lines, "x", "y")
    cloud, middle, picked = curves(figure, picked=["3.1"]).data
    at = cloud.meta["heads"].index("3.1") * (cloud.meta["points"] + 1)
    assert cloud.y[at : at + 2].tolist() == [4, 5]
    assert math.isnan(cloud.y[at + 2])
    assert middle.y.tolist() == [1, 5]
    assert (picked.name, picked.y.tolist()) == ("head 3.1", [4, 5])
    with pytest.raises(HeedfulError, match=r"x has no line '3.3'.*Did you mean 3.1, 3.2"):
        curves(figure, picked=["3.3"])


def test_a_curve_of_one_point_shows_a_mark():
    assert draw(Curves("x", "X", "What.", [1], {"a": torch.ones(1)}, "x", "y")).data[0].mode == "markers"


def test_plots_by_name():
    plots = Plots(figures().values())
    assert {"sinks", "distance", "extremes"} <= set(dir(plots))
    assert plots.sinks(sort=True).layout.title.text == "Parks on the first token"
    with pytest.raises(AttributeError, match=r"no figure named 'sink' here. Did you mean sinks?"):
        plots.sink  # noqa: B018
    with pytest.raises(AttributeError, match="There are sinks, previous"):
        plots.zzz  # noqa: B018


def test_a_picture_that_cannot_be_made_names_the_way_out(tmp_path, monkeypatch):
    drawn = Plots(figures().values()).sinks()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Chrome was not found.\nlong story")

    monkeypatch.setattr(type(drawn), "write_image", fail)
    with pytest.raises(
        HeedfulError, match=r"sinks.png was not written: Chrome was not found. A picture needs .*kaleido"
    ):
        export(drawn, tmp_path / "sinks.png")


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome here (apt-get install chromium)")
def test_a_picture(tmp_path):
    pytest.importorskip("kaleido", reason="kaleido is not installed (pip install 'heedful[page]')")
    path = export(Plots(figures().values()).sinks(), tmp_path / "sinks.png", width=300, height=200, scale=1)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(path.read_bytes()[i : i + 4], "big") for i in (16, 20)] == [300, 200]


def test_without_the_packages_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r"plotly is not installed.*pip install 'heedful\[page\]'"):
        Plots(figures().values()).sinks()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(HeedfulError, match="jinja2 is not installed"):
        page.render(profile())


def test_the_report_loads_plotly_only_when_it_draws():
    code = "import sys, heedful.report.page; sys.exit(bool({'plotly', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = page.write(FakeProfile({"model": "tiny"}, ()), tmp_path / "deep" / "page.html")
    assert path.read_text().startswith("<!doctype html>")
    before = path.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(WriteError, match="No space"):
        page.write(profile(), path)
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    assert path.read_text() == before
