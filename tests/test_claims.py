"""What claims draw: another text for every seed."""

from __future__ import annotations

import pytest

from claims._texts import passages


@pytest.mark.parametrize(("count", "words"), [(12, 120), (4, 230), (1, 100)])
def test_no_two_seeds_begin_with_the_same_text(count: int, words: int) -> None:
    """Some claims read no further than the first."""
    drawn = [passages(seed, count, words) for seed in range(8)]
    assert len({texts[0] for texts in drawn}) == 8
    assert all(len(set(texts)) == count and min(len(text.split()) for text in texts) >= words for texts in drawn)
    assert drawn[5] == passages(5, count, words)
