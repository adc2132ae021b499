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


def apart(seed: int, count: int, words: int, fitting: bool = False) -> list[str]:
    """Pieces of so many words of the help texts, none of which another seed has; fits read other topics."""
    pieces = [
        " ".join(text.split()[i : i + words])
        for number, (_, text) in enumerate(sorted(topics.items()))
        for i in range(0, len(text.split()) - words + 1, words)
        if number % 2 == fitting
    ]
    return _own(pieces, seed, count)


def sentences(seed: int, count: int, low: int = 8, high: int = 18) -> list[str]:
    """Plain sentences of that many words, none of which another seed has."""
    found = {
        sentence
        for text in topics.values()
        for sentence in re.findall(r"(?<=[.] )[A-Z][a-z]+(?: [a-z,']+)+[.]", " ".join(text.split()))
        if low <= len(sentence.split()) <= high
    }
    return _own(sorted(found), seed, count)


def _own(every: list[str], seed: int, count: int) -> list[str]:
    """A seed's share: the same order for all, cut into as many as each takes."""
    found = random.Random(0).sample(every, len(every))[seed * count : (seed + 1) * count]
    if len(found) < count:
        raise ValueError(f"seed {seed}: {len(every)} texts are not enough for {count} of its own")
    return found
