"""Words of scenes that are drawn: is each looked at from where its thing came to stand?"""

from __future__ import annotations

import math
import statistics
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from heedful.core.errors import FieldError
from heedful.looking import THINGS
from heedful.tasks._looked import LEAST, log_share, peaks, stand_for
from heedful.tasks._scenes import Scenes
from heedful.tasks.task import Item, Sheet, Tokenizer


class SceneWords(Scenes):
    """The same pictures, and the share of things whose words are looked at most from the box in which they stand.

    What each place of a picture gives the words of a thing is a map, the mean over heads, layers and steps. Where it
    is highest has to be in the box of what the model drew there; how much of it falls into the box is its
    log-probability, and the box's share of the picture is what guessing scores. What was not drawn does not count.
    Prompts have a role "things", a span for each place in the order of `Scene.things`.
    """

    @abstractmethod
    def boxes(self, pictures: Tensor) -> Tensor:
        """Of what the model made, `[b places rows columns]`: 1 in the box of what stands at each place, 0 elsewhere."""

    @property
    def told(self) -> tuple[str, ...]:
        share = "its log-probability is that of the box: how much of what a thing's words get comes from there"
        return (*super().told, share) if super().told else ()

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        item = super().item(tokenizer, number, seed)
        named = item.prompt.roles.get(THINGS, ())
        if len(named) != len(item.options[0]):
            rule = f"must have the words of each of {len(item.options[0])} things in a span"
            raise FieldError(self, f"scene().prompt.roles[{THINGS!r}]", named, rule, ((0, 2), (2, 4)))
        draws = item.shown.draws and replace(item.shown.draws, boxes=self.boxes)
        return replace(item, shown=replace(item.shown, draws=draws, looks=True))

    def score(self, item: Item, sheet: Sheet) -> float:
        return _mean(sheet, peaks, 0.0)

    def nats(self, item: Item, sheet: Sheet) -> float:
        return _mean(sheet, log_share, math.log(LEAST))

    def chance(self, item: Item) -> None:
        """It depends on what was drawn, and how large."""

    def guessed(self, item: Item, sheet: Sheet) -> float:
        return _mean(sheet, lambda _, inside: float(inside.double().mean()), 0.0)


def _mean(sheet: Sheet, of: Callable[[Tensor, Tensor], float], none: float) -> float:
    """The mean over things that were drawn, and `none` where there are none."""
    rows, columns = sheet.looks.shape[1:]
    parts = adaptive_avg_pool2d(sheet.boxes[None].double(), (rows, columns))[0].flatten(1)
    pairs = [(look, stand_for(part)) for look, part in zip(sheet.looks.flatten(1), parts, strict=True)]
    return statistics.fmean([of(look, inside) for look, inside in pairs if inside.any()] or [none])
