"""Scenes that a diffusion model draws: does each thing that was asked for stand where it was asked for?"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from heedful.adapters.wrapped import device_of
from heedful.core.call import NO_ROLES
from heedful.core.errors import FieldError
from heedful.core.figures import percent
from heedful.core.kinds.tokens import Prompt
from heedful.core.ranges import PositiveInt, PositiveShare
from heedful.core.regions import Roles
from heedful.shown import Drawing, Shown
from heedful.tasks._own import unbound
from heedful.tasks._ridge import SCALES
from heedful.tasks.task import Item, Sheet, Task, Tokenizer


@dataclass(frozen=True, eq=False)
class Scene:
    """What a picture is made of, and what it has to show. Subclass it if a step has to know more."""

    prompt: Prompt  # with roles by which methods find words, such as "subjects"
    things: tuple[int, ...]  # the number of the right one among those that the judge knows, place by place
    noise: Tensor  # [1 ...], which the picture is made of
    # names of the picture's places as self-attention numbers them, for methods that act there: {"marked": ((8, 12),)}
    roles: Roles = field(default_factory=lambda: NO_ROLES, kw_only=True)


@dataclass(frozen=True)
class Judged:
    """What the judge is worth, as it turned out on real pictures."""

    right: float  # share of things that it names
    things: int  # in them that it was asked about
    places: int  # of each picture
    kinds: int  # of things that it tells apart
    scale: float  # of its scores, by which their softmax is as sure as it may be


class Scenes(Task):
    """Pictures that a diffusion model makes of prompts, and the share of things that stand where they were asked for.

    Subclass it and say what a scene is, how the model takes a step, what the judge sees, and which pictures judge the
    judge. Every method gets the same prompts and noises. A judge that names too few things of real pictures right
    is refused; the share that it names right is told beside the scores, which can be no surer.
    """

    steps: PositiveInt = 10  # that a picture is made in
    least: PositiveShare = 0.9  # share of the things in real pictures that the judge has to name right
    judged: Judged | None = field(default=None, repr=False)

    @abstractmethod
    def scene(self, tokenizer: Tokenizer, draw: random.Random) -> Scene:
        """One scene, drawn."""

    @abstractmethod
    def step(self, scene: Scene, model: Any, x: Tensor, number: int) -> Tensor:
        """What step `number`, counted from 0 at noise, leaves of `x`, each row of which is made of the scene's prompt.

        It calls the model, so that what is attached to it acts; of a decoding step that guides, such as SoftPAG, what
        the model gives back is what is guided.
        """

    @abstractmethod
    def judge(self, pictures: Tensor) -> Tensor:
        """Scores `[b places things]`: of what the model made, at each place, how likely each thing is there."""

    @abstractmethod
    def real(self, model: Any, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
        """Pictures that no model made, and what they show, `[b places]`: as many as tell what the judge is worth.

        They should be as unclean as those that the model draws.
        """

    def require(self, model: Any, tokenizer: Any) -> None:
        """Any model may draw; a subclass refuses those that it cannot take a step with."""

    def inputs(self, model: Any, tokenizer: Any) -> Callable[[], Any]:
        scene = self.scene(tokenizer, self.draw(0, 0))
        return lambda: self.step(scene, model, scene.noise.to(device_of(model)), 0)

    def on(self, model: Any, tokenizer: Any) -> Self:
        with torch.no_grad():
            pictures, things = self.real(model, tokenizer)
            scores = self.judge(pictures).double().flatten(0, -2)
        right, count = things.flatten(), things.numel()
        if len(scores) != count or not count:
            rule = f"says something of {len(scores)} places, and the real pictures have {count}"
            raise FieldError(self, "judge", tuple(scores.shape), rule, "scores [b places things]")
        share = float((scores.argmax(-1) == right).double().mean())
        if share < self.least:
            rule = f"names {percent(share)} of {count} things in real pictures right, less than least={self.least:g}"
            raise FieldError(self, "judge", type(self).__name__, rule, "a judge that sees better, or a lower least")
        # Platt's targets: no surer than so many things allow
        smooth = 1 / (count + 2)
        tried = SCALES / scores.std().clamp(min=1e-12)
        scale = min(tried, key=lambda z: float(cross_entropy(z * scores, right, label_smoothing=smooth)))
        return replace(self, judged=Judged(share, count, things.shape[-1], scores.shape[-1], float(scale)))

    @property
    def told(self) -> tuple[str, ...]:
        if self.judged is None:
            return ()
        found = self.judged
        return (
            f"its judge names {percent(found.right)} of {found.things} things in real pictures right",
            "prefill is the making of a picture, and a thing counts as a token",
        )

    @property
    def _known(self) -> Judged:
        if self.judged is None:
            raise unbound(self)
        return self.judged

    def item(self, tokenizer: Tokenizer, number: int, seed: int) -> Item:
        known, scene = self._known, self.scene(tokenizer, self.draw(seed, number))
        if not (0 < len(scene.things) <= known.places and all(0 <= thing < known.kinds for thing in scene.things)):
            rule = f"must be 1 to {known.places} numbers, from 0, of the {known.kinds} things that the judge knows"
            raise FieldError(self, "scene().things", scene.things, rule, (0,) * known.places)
        if both := sorted(scene.roles.keys() & scene.prompt.roles.keys()):
            rule = f"are names of words too, in the prompt's roles: {', '.join(both)}"
            raise FieldError(self, "scene().roles", list(scene.roles), rule, {"marked": ((8, 12),)})
        draws = Drawing(scene.noise, self.steps, partial(self.step, scene), self._seen, roles=scene.roles)
        return Item(scene.prompt, (scene.things,), shown=Shown(reads="scene", draws=draws))

    def _seen(self, pictures: Tensor) -> Tensor:
        """What the judge says, as logits."""
        return self._known.scale * self.judge(pictures).double()

    def score(self, item: Item, sheet: Sheet) -> float:
        return sum(sheet.greedy) / len(sheet.greedy)

    def chance(self, item: Item) -> float | None:
        return 1 / self._known.kinds
