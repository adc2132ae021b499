"""Sums over the shards of a corpus, of which some have nothing to read."""

from __future__ import annotations

import torch

from heedful.core.stats import Sum
from heedful.diagnosis.shards import Piece, Sums
from heedful.diagnosis.store import ADDED


def test_parts_are_dealt_among_the_shards_that_gave_something() -> None:
    """So that an empty shard takes no part of the few that are kept apart."""
    sums = Sums()
    for gives in (True, False, True, False, False, True):
        facts = {**dict.fromkeys(ADDED, 1), "skipped": [], "backends": ["native"]}
        sums = sums.plus(Piece(facts, {"0.look.0": Sum(torch.ones(1, dtype=torch.float64))} if gives else {}))
    assert (sums.facts["shards"], sums.facts["unread"]) == (6, 3)
    assert sorted(sums.apart) == [0, 1, 2]
