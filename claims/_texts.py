"""English prose that every Python has: its own help texts."""

from __future__ import annotations

import random
import re
from pydoc_data.topics import topics


def passages(seed: int, count: int, words: int) -> list[str]:
    """Help texts of at least so many words, in an order that the seed gives."""
    joined = (" ".join(text.split()) for _, text in sorted(topics.items()))
    return random.Random(seed).sample([text for text in joined if len(text.split()) >= words], count)


def sentences(seed: int, count: int, low: int = 8, high: int = 18) -> list[str]:
    """Plain sentences of that many words, in an order that the seed gives."""
    found = {
        sentence
        for text in topics.values()
        for sentence in re.findall(r"(?<=[.] )[A-Z][a-z]+(?: [a-z,']+)+[.]", " ".join(text.split()))
        if low <= len(sentence.split()) <= high
    }
    return random.Random(seed).sample(sorted(found), count)
