"""What tests of prompts made of documents or sentences share."""

from __future__ import annotations

import torch

from heedful import Prompt

Spans = tuple[tuple[int, int], ...]
SPANS: Spans = ((2, 5), (5, 11), (12, 14), (14, 19))


def prompt(seed: int = 0, role: str = "documents", spans: Spans = SPANS, end: tuple[int, int] = (20, 23)) -> Prompt:
    """Random tokens with these spans in them, and a question at their end."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 127, (end[1],), generator=generator)
    return Prompt(tuple(tokens.tolist()), {role: spans, "end": (end,)})


def kept_by(scores: list[float], room: int, spans: Spans) -> list[int]:
    """The numbers of the spans that stay: the best first, until one does not fit any more."""
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if kept and sum(spans[j][1] - spans[j][0] for j in [*kept, i]) > room:
            break
        kept.append(i)
    return sorted(kept)
