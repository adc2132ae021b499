"""What a model is given beside the tokens of a prompt, a picture or a sound, and how it writes or draws by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from heedful.core.call import NO_ROLES
from heedful.core.regions import Roles

Reads = Literal["text", "image", "sound", "scene"]
Head = Callable[[Tensor], Tensor]  # features of pictures to the logits of their classes, [b e] to [b classes]


@dataclass(frozen=True, eq=False)
class Drawing:
    """How a diffusion model makes a picture of a prompt, step by step, and what names the things in it."""

    noise: Tensor  # what it begins with, one row
    steps: int
    # of the model, what is denoised in any number of rows, and the step's number from 0: what the step leaves
    step: Callable[[Any, Tensor, int], Tensor]
    judge: Callable[[Tensor], Tensor]  # pictures to logits, `[b places things]`: at each place, of each thing
    # pictures to `[b places rows columns]`: 1 in the box of what stands at each place; None: it is told of none
    boxes: Callable[[Tensor], Tensor] | None = None
    roles: Roles = field(default_factory=lambda: NO_ROLES)  # names of the picture's places


@dataclass(frozen=True, eq=False)
class Shown:
    """What stands beside a prompt, and what the prompt's tokens are then."""

    inputs: Mapping[str, Any] = field(default_factory=dict)  # as the model is called with them, one row of each
    # the tokens are a "text", perhaps with places for pictures in it; with a "sound" those of the text that is written
    # of it; with an "image" alone they are none, and stand for what the encoder makes of it; of a "scene" they are told
    # to a model that draws it, and what follows them are the things that stand there
    reads: Reads = "text"
    places: int = 0  # that an encoder makes of a sound, beside the prompt's tokens
    head: Head | None = None  # what names classes where the model has no logits
    draws: Drawing | None = None  # how a scene is made
    # whether it is told where the last token looks in the picture that the prompt marks; of a scene, from where each
    # thing's words are looked at
    looks: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether a token that the model is given leads to the next one."""
        return self.reads in ("text", "sound")


@dataclass(frozen=True)
class Writing:
    """How a model writes on by itself, the likeliest token each time."""

    most: int  # tokens
    ends: tuple[int, ...]  # tokens that end it
    never: tuple[int, ...] = ()  # tokens that are not written
    not_first: tuple[int, ...] = ()  # nor these as the first one

    def next(self, scores: Tensor, first: bool) -> int:
        """The token that comes next by the model's scores `[v]`."""
        scores = scores.float().clone()
        scores[[*self.never, *self.not_first] if first else list(self.never)] = -float("inf")
        return int(scores.argmax())
