"""What a page opens with: the map of roles, and five findings."""

from __future__ import annotations

import torch

from heedful.core.figures import Curves, Description, Finding, Grid, HeadMap
from heedful.methods.observe.sink_rate import SinkRate
from heedful.report import data, page
from heedful.report.sparks import spark
from tests.test_report import FakeProfile, profile


def test_the_map_of_roles_shows_every_head_with_its_rarest_role_first():
    roles = [
        {"name": "parks", "heads": [["0.0", 0.9], ["0.1", 0.8], ["1.1", 0.7]]},
        {"name": "copies", "heads": [["1.1", 0.9]]},
    ]
    found = data.role_map(roles, {"layers": 3, "heads": 2})
    assert found is not None
    assert [cell["head"] for cell in found["cells"]] == ["0.0", "1.0", "2.0", "0.1", "1.1", "2.1"]
    assert [cell["roles"] for cell in found["cells"]] == ["0", "", "", "0", "1 0", ""]
    assert found["cells"][4]["title"] == "1.1: copies, parks"
    assert found["cells"][4]["fill"] == "linear-gradient(135deg, var(--role-1) 0% 50%, var(--role-0) 50% 100%)"
    assert found["cells"][1]["fill"] == "var(--rule)"
    assert not any(cell["begins"] for cell in found["cells"])
    shared = data.role_map(roles, {"layers": 1, "heads": 6, "kv_heads": 3})
    assert shared is not None
    assert [cell["begins"] for cell in shared["cells"]] == [False, False, True, False, True, False]
    assert data.role_map([], {"layers": 3, "heads": 2}) is None
    assert data.role_map(roles, {}) is None


def test_five_findings_lead_and_the_rest_is_folded():
    facts = profile().facts
    many = tuple(Finding(f"Finding {i}.", 0.9 - i / 100) for i in range(7))
    text = page.render(FakeProfile(facts, ((SinkRate(), Description((), (), many)),)))
    shown, folded = text[: text.index("<details")], text[text.index("<details") :]
    assert "Finding 4." in shown
    assert "Finding 5." not in shown
    assert "2 more" in folded
    assert "Finding 6." in folded


def test_a_finding_has_the_line_of_its_figure_beside_it():
    values = torch.tensor([[0.0, 0.5], [0.5, 0.5], [float("nan"), 1.0]])
    of_map = spark(HeadMap("x", "X", "What.", [0, 1, 2], values))
    assert of_map == {"line": "M2.0 26.0L50.0 18.0L98.0 2.0", "over": "layer", "title": "X", "key": "x", "kind": "map"}
    line = {"a": torch.tensor([1.0, 10.0, 0.0, 100.0])}
    of_curve = spark(Curves("y", "Y", "What.", [1, 2, 3, 4], line, "position", "weight", log_y=True))
    assert of_curve is not None
    assert (of_curve["line"], of_curve["over"]) == ("M2.0 26.0L34.0 14.0L98.0 2.0", "position")
    assert spark(Curves("y", "Y", "What.", [1], {"a": torch.ones(1)}, "x", "y")) is None
    long = spark(Curves("y", "Y", "What.", range(5000), {"a": torch.arange(5000)}, "x", "y"))
    assert long is not None
    assert long["line"].count("L") == 99
    assert spark(Grid("g", "G", "What.", torch.ones(2, 2), "ab", "cd", "row", "column")) is None
    told = Description((HeadMap("x", "X", "What.", [0, 1, 2], values),), (), (Finding("So.", 0.5, (), "x"),))
    text = page.render(FakeProfile(profile().facts, ((SinkRate(), told),)))
    assert 'data-map="x" class="spark" aria-label="X, by layer: show the figure"' in text
