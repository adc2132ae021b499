"""Positions and distances in widening bins: each below 16 by itself, then two an octave, up to a million tokens."""

from __future__ import annotations

EXACT = 16
EDGES = (*range(EXACT), *(round(2 ** (i / 2)) for i in range(8, 41)))
