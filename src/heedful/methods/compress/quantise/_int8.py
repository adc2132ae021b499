"""The paper of which the room has both halves: weights in 8 bits, and what they are multiplied with."""

from __future__ import annotations

from heedful.core.paper import Paper

PAPER = Paper(
    "P322",
    "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
    "Tim Dettmers, Mike Lewis, Younes Belkada, Luke Zettlemoyer",
    2022,
    "2208.07339",
    "NeurIPS 2022",
)
