"""Text that is always there: the prose of Python's own help topics, and plain words."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache
from pydoc_data.topics import topics

from heedful.tasks._draft import length
from heedful.tasks.task import Tokenizer

NAMES = (
    "Mary", "John", "Tom", "James", "Dan", "Sarah", "Martin", "Amy", "Alice", "Robert", "Peter", "Anna", "David",
    "Laura", "Paul", "Emma", "Mark", "Julia", "Simon", "Kate", "George", "Helen", "Frank", "Jane", "Henry", "Lucy",
    "Jack", "Rose",
)  # fmt: skip
THINGS = (
    "pen", "cup", "book", "key", "ring", "ball", "hat", "box", "bag", "spoon", "plate", "knife", "lamp", "clock",
    "brush", "coin", "bottle", "candle", "pencil", "glove", "scarf", "mirror", "basket", "drum",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "orange", "purple", "pink", "brown")
WORDS = (
    "river", "mountain", "garden", "window", "winter", "summer", "music", "doctor", "teacher", "bridge", "forest",
    "island", "market", "kitchen", "school", "church", "castle", "village", "engine", "letter", "paper", "silver",
    "gold", "stone", "horse", "tiger", "rabbit", "monkey", "spider", "eagle", "dragon", "lion", "bear", "wolf",
    "snake", "bird", "apple", "lemon", "bread", "butter", "sugar", "coffee", "water", "fire", "cloud", "storm",
    "rain", "snow", "wind", "ocean", "desert", "valley", "tower", "palace", "temple", "prison", "theater", "station",
    "hotel", "farm", "king", "queen", "soldier", "sailor", "painter", "poet", "judge", "priest", "baby", "uncle",
    "table", "chair", "door", "wall", "roof", "floor", "carpet", "curtain", "blanket", "pillow", "shirt", "jacket",
    "shoe", "belt", "button", "pocket", "piano", "guitar", "violin", "trumpet", "dance", "song", "story", "poem",
    "picture", "camera", "mouse", "sheep", "goat", "duck",
)  # fmt: skip


@cache
def paragraphs() -> tuple[str, ...]:
    """Paragraphs of prose, without tables and programs."""
    found = (" ".join(part.split()) for _, text in sorted(topics.items()) for part in re.split(r"\n\s*\n", text))
    return tuple(dict.fromkeys(part for part in found if re.fullmatch(r"[A-Z][A-Za-z ,.;:'\"()-]{80,}[.]", part)))


def sentences(draw: random.Random) -> Iterator[str]:
    """Sentences without end, paragraph by paragraph in an order that is drawn."""
    while True:
        for paragraph in draw.sample(paragraphs(), len(paragraphs())):
            yield from re.split(r"(?<=[.]) (?=[A-Z])", paragraph)


def filler(draw: random.Random, tokenizer: Tokenizer, tokens: int) -> list[str]:
    """Sentences that take about so many tokens together, and not more."""
    source, used = sentences(draw), 0
    found: list[str] = []
    while True:
        sentence = next(source)
        used += length(tokenizer, " " + sentence)
        if used > tokens:
            return found
        found.append(sentence)


@cache
def articles() -> tuple[str, ...]:
    """The help topics, each on one line."""
    return tuple(" ".join(text.split()) for _, text in sorted(topics.items()))
