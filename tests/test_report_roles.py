"""What a page opens with: the map of roles, and five findings."""

from __future__ import annotations

from heedful.core.figures import Description, Finding
from heedful.methods.observe.sink_rate import SinkRate
from heedful.report import data, page
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
