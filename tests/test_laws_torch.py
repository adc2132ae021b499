"""Methods of text keep the laws in a model of plain torch too, where nobody has said what a layer is."""

from __future__ import annotations

import pytest

from heedful import check
from heedful.catalogue import entries
from heedful.core.method import Method
from heedful.core.sites import Site

LAWS = ("neutral_is_native", "example_acts", "leaves_no_trace")
ROTARY = {"PositionalHeads"}  # reads how queries were rotated, which torch's attention is not told


def of_text() -> list[type[Method]]:
    """All that act without a cache, which a model of plain torch keeps to itself."""
    methods = [kind for kind in entries().values() if issubclass(kind, Method) and "text" in kind.subjects]
    return [kind for kind in methods if all(edit.site is not Site.CACHE for edit in kind.example().edits)]


@pytest.mark.parametrize("kind", of_text(), ids=lambda kind: kind.__name__)
def test_methods_of_text_keep_the_laws_in_plain_torch(kind: type[Method], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind, "subjects", ("torch",))
    report = check(kind, only=LAWS)
    assert report.ok == (kind.__name__ not in ROTARY), str(report)
    if kind.__name__ in ROTARY:
        assert "reads nothing" in report["example_acts"].reason
