"""What docs/reliability.md tells was measured, and nothing of it went wrong."""

from __future__ import annotations

import pytest

from benchmarks import reliability


def test_nothing_of_what_was_done_went_wrong() -> None:
    found = reliability.load()
    assert {"kills", "damaged", "soak", "merges"} <= set(found)
    assert found["kills"]["wrong"] == 0
    assert found["damaged"]["anything else"] == 0
    assert found["soak"]["hooks, threads, config and weights as before"]
    for name, (title, _) in reliability.TOLD.items():
        assert (title in reliability.page()) == (name in found)


@pytest.mark.slow
def test_jobs_killed_at_random_moments_end_with_the_same_bits() -> None:
    found = reliability.kills(20)
    assert found["kills"] == 20
    assert found["wrong"] == 0
