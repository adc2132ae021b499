"""One contender is asked items of one task, in this process or in another."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from heedful.api import still
from heedful.bench.answer import answer
from heedful.bench.records import Answered, Refused
from heedful.core.errors import FieldError, HeedfulError, SiteError
from heedful.core.kinds import Prompt
from heedful.core.method import Method, Stack, method_of
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
            require_fit(asked.what, next(iter(asked.items.values())).prompt)
            # a new one: what it did before is past
            with still(self.model), text_model(self.model, asked.what, **self.how) as speaker:
                for n, item in asked.items.items():
                    if time.time() > self.end:
                        return
                    with enough_memory("compare()", "tasks", asked.task, f"{item.size} tokens", "shorter prompts"):
                        found = _answered(speaker, asked, item, n)
                    yield found
        except HeedfulError as reason:
            yield Refused(asked.name, repr(asked.task), str(reason))


def require_fit(what: Contender | None, prompt: Prompt) -> None:
    """Refuse a method for images, and one that looks for spans of a name that the prompt does not mark."""
    for part in what if isinstance(what, Stack) else [what]:
        method = method_of(part)
        if isinstance(method, Method) and set(method.subjects) == {"image"}:
            raise FieldError(method, "subjects", method.subjects, "it is for images, and these prompts are text", None)
        role = getattr(method, "role", None)
        if isinstance(role, str) and role not in prompt.roles:
            marked = (
                f"they mark {', '.join(map(repr, prompt.roles))}" if prompt.roles else "they mark none; try the needle"
            )
            rule = f"no span in these prompts has that name; {marked}"
            raise FieldError(method, "role", role, rule, next(iter(prompt.roles), "needle"))


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
        asked.name, repr(task), asked.seed, n, score, nats, task.chance(item), seconds, speaker.active,
        dict(item.labels), speaker.reason,
    )  # fmt: skip
