"""One contender is asked items of one task, in this process or in another."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from heedful.api import still
from heedful.bench.answer import answer
from heedful.bench.records import Answered, Refused
from heedful.core.errors import FieldError, HeedfulError, SiteError, first_line
from heedful.core.kinds.decode import Decode
from heedful.core.kinds.tokens import Tokens
from heedful.core.method import Method, Stack, method_of
from heedful.core.regions import Roles
from heedful.drawing import require_denoises
from heedful.engine.memory import enough_memory
from heedful.tasks.task import Item, Task
from heedful.text_models import Contender, TextModel, text_model


@dataclass(frozen=True, eq=False)
class Asked:
    """Who is asked what."""

    name: str
    what: Contender | None  # None: the model as it is
    task: Task
    seed: int
    items: Mapping[int, Item]  # by their place in the task's series, one or more


@dataclass(frozen=True, eq=False)
class Asker:
    """Puts questions to one model until a time is over."""

    model: Any
    how: Mapping[str, Any]
    end: float  # by the clock, which other machines have too

    def __call__(self, asked: Asked) -> Generator[Answered | Refused, None, None]:
        """Each answer as it is given, and the reason where one cannot be."""
        try:
            first = next(iter(asked.items.values()))
            require_fit(asked.what, first)
            # a new one: what it did before is past
            with still(self.model), text_model(self.model, asked.what, first.shown, **self.how) as speaker:
                for n, item in asked.items.items():
                    if time.time() > self.end:
                        return
                    with (
                        enough_memory("compare()", "tasks", asked.task, f"{item.size} tokens", "shorter prompts"),
                        going_on(self.model, asked.what, item),
                    ):
                        found = _answered(speaker, asked, item, n)
                    yield found
        except HeedfulError as reason:
            yield Refused(asked.name, repr(asked.task), str(reason))


@contextmanager
def going_on(model: Any, what: Contender | None, item: Item) -> Iterator[None]:
    """A model's own error under a method becomes a reason, where a picture or sound stands by a prompt or comes of it.

    Such a model counts what its encoder makes of one, or where it draws, and a method may leave it fewer.
    """
    try:
        yield
    except HeedfulError:
        raise
    except (ValueError, RuntimeError) as error:
        if what is None or not (item.shown.inputs or item.shown.draws):
            raise
        raise SiteError(f"{type(model).__name__} cannot go on under it: {first_line(error)}") from error


# by what is read: what a method must not be for alone, and how both are called
UNSUITED = {
    "text": ({"image"}, "images", "text"),
    "sound": ({"image"}, "images", "sounds"),
    "image": ({"cross", "encoder-decoder"}, "models of two halves", "images"),
    "scene": ({"encoder-decoder"}, "models of two halves", "scenes to draw"),
}


def require_fit(what: Contender | None, item: Item) -> None:
    """Refuse a method for other inputs, and one that looks for spans of a name that the prompt does not mark."""
    shown = item.shown
    alone, theirs, ours = UNSUITED[shown.reads]
    if shown.reads == "text" and shown.inputs:  # an encoder reads the pictures in it
        alone = set()
    for part in what if isinstance(what, Stack) else [what]:
        method = method_of(part)
        if isinstance(method, Method) and set(method.subjects) <= alone:
            rule = f"it is for {theirs}, and these prompts are {ours}"
            raise FieldError(method, "subjects", method.subjects, rule, None)
        if isinstance(method, Tokens) and shown.reads != "text":
            rule = f"rearranges the tokens of a text, and these prompts are {ours}"
            raise FieldError(method, "prompt", ours, rule, "a method")
        if isinstance(method, Decode) and shown.draws is not None:
            require_denoises(method)
        role, known = getattr(method, "role", None), _marked(method, item)
        if isinstance(role, str) and role not in known:
            marked = f"they mark {', '.join(map(repr, known))}" if known else "they mark none; try the needle"
            rule = f"no span in these prompts has that name; {marked}"
            if isinstance(method, Decode) and shown.draws is not None:
                marked = ", ".join(map(repr, known)) or f"none, as Scene(..., roles={{{role!r}: ((8, 12),)}}) would"
                rule = f"names places of the picture, and these scenes mark {marked}"
                raise FieldError(method, "role", role, rule, next(iter(known), role))
            raise FieldError(method, "role", role, rule, next(iter(known), "needle"))


def _marked(method: Any, item: Item) -> Roles:
    """The spans in which a method may look for those that it names."""
    draws = item.shown.draws
    if draws is None:
        return item.prompt.roles
    return draws.roles if isinstance(method, Decode) else {**item.prompt.roles, **draws.roles}


def _answered(speaker: TextModel, asked: Asked, item: Item, n: int) -> Answered:
    """The answer to one item."""
    began, task = time.perf_counter(), asked.task
    sheet = answer(speaker, item)
    score, nats, seconds = task.score(item, sheet), task.nats(item, sheet), time.perf_counter() - began
    if not (math.isfinite(score) and math.isfinite(nats)):
        raise SiteError(
            f"prompt {n}: the log-probability of what is right is {nats}, which can be compared with nothing"
        )
    return Answered(
        asked.name, repr(task), asked.seed, n, score, nats, task.guessed(item, sheet), seconds, speaker.active,
        dict(item.labels), speaker.reason,
    )  # fmt: skip
