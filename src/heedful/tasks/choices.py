"""Prompts of circuit analysis as choices: indirect object, greater than, coloured objects."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from heedful.tasks._draft import Draft
from heedful.tasks._texts import COLOURS, NAMES, THINGS
from heedful.tasks.task import Choice, Item, Tokenizer

PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station", "market", "park")


class IOI(Choice):
    """People go somewhere, all but one of them give something: who gets it?"""

    name = "ioi"
    about = "Indirect object: tells who gets something from those who give it."
    people: Annotated[int, Interval(ge=2, le=8)] = 3  # the paper's prompts: 2

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        draw = self.draw(seed, number)
        people = draw.sample(NAMES, self.people)
        place = draw.randrange(self.people)
        gets, givers = people[place], draw.sample(people[:place] + people[place + 1 :], self.people - 1)
        draft = Draft()
        draft.add(f"Then, {_and(people)} went to the {draw.choice(PLACES)}.", "context")
        cut = draft.add(f" {_and(givers)} gave a {draw.choice(THINGS)} to", "question")
        return draft.item(tokenizer, [f" {name}" for name in (gets, *givers)], cut=cut, labels={"place": place})


def _and(words: list[str]) -> str:
    """Words in a row: a, b and c."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


class GreaterThan(Choice):
    """The year in which something ended comes after the year in which it began."""

    name = "greater_than"
    about = "Greater than: an end comes later than its beginning."

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        draw = self.draw(seed, number)
        thing = draw.choice(("war", "voyage", "strike", "famine", "reign", "siege", "trial", "expedition", "alliance"))
        century, year = draw.randint(11, 17), draw.randint(20, 79)
        later = 10 * draw.randint(year // 10 + 1, 9) + draw.randint(0, 9)
        earlier = 10 * draw.randint(0, year // 10 - 1) + draw.randint(0, 9)
        draft = Draft()
        draft.add(f"The {thing} lasted from the year {century}{year}", "context")
        cut = draft.add(f" to the year {century}", "question")
        return draft.item(tokenizer, [f"{later:02}", f"{earlier:02}"], cut=cut, labels={"year": year})


class ColouredObjects(Choice):
    """Things, each of another colour; which colour has one of them?"""

    name = "coloured_objects"
    about = "Coloured objects: binds each thing to its own colour."
    objects: Annotated[int, Interval(ge=2, le=len(COLOURS))] = 4

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        draw = self.draw(seed, number)
        things, colours = draw.sample(THINGS, self.objects), draw.sample(COLOURS, self.objects)
        asked = draw.randrange(self.objects)
        draft = Draft()
        for i, (thing, colour) in enumerate(zip(things, colours, strict=True)):
            draft.add(" " if i else "")
            draft.add(f"The {thing} is {colour}.", *["needle"] * (i == asked))
        draft.mark("context", 0)
        cut = draft.add(f" What colour is the {things[asked]}? The {things[asked]} is", "question")
        options = [f" {colour}" for colour in (colours[asked], *colours[:asked], *colours[asked + 1 :])]
        return draft.item(tokenizer, options, cut=cut, labels={"depth": asked / (self.objects - 1)})
