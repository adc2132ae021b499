"""English prose that every Python has: its own help texts."""

from __future__ import annotations

import random
import re
from pydoc_data.topics import topics


def passages(seed: int, count: int, words: int) -> list[str]:
    """Help texts of at least so many words, in an order that the seed gives; no lower seed begins with the same."""
    joined = (" ".join(text.split()) for _, text in sorted(topics.items()))
    texts = [text for text in joined if len(text.split()) >= words]
    drawn: list[str] = []
    begun: set[str] = set()
    for each in range(seed + 1):
        drawn = random.Random(each).sample(texts, count)
        if drawn[0] in begun:  # as of seeds 3 and 4, whose generators begin alike
            drawn = random.Random(each).sample([text for text in texts if text not in begun], count)
        begun.add(drawn[0])
    return drawn


def sentences(seed: int, count: int, low: int = 8, high: int = 18) -> list[str]:
    """Plain sentences of that many words, in an order that the seed gives."""
    found = {
        sentence
        for text in topics.values()
        for sentence in re.findall(r"(?<=[.] )[A-Z][a-z]+(?: [a-z,']+)+[.]", " ".join(text.split()))
        if low <= len(sentence.split()) <= high
    }
    return random.Random(seed).sample(sorted(found), count)
