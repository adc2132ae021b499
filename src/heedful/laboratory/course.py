"""What every mechanism is trained on alike: a tiny model, its data in their order, a budget, and what is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Generator, Tensor

from heedful.core.errors import FieldError, StatisticError
from heedful.core.figures import Figure
from heedful.core.kinds.tokens import Prompt
from heedful.core.method import Method
from heedful.engine.run import Run

Batch = dict[str, Tensor]


class Quantity(NamedTuple):
    """Something that is measured of a trained model."""

    name: str
    about: str  # one sentence; empty where the course tells it
    unit: str
    more_is_better: bool | None = None  # None: neither is better by itself


class Opener(Protocol):
    """Opens a trained model under what it was trained with, and under those of the readers that can act there."""

    def __call__(self, *readers: Method) -> AbstractContextManager[Run]: ...


@dataclass(frozen=True)
class Recipe:
    """How weights are changed: by AdamW, whose learning rate rises at first and then falls along half a cosine."""

    rate: float = 3e-3  # the highest learning rate
    warm_up: int = 20  # steps in which it rises
    decay: float = 0.01  # of weights
    memory: float = 0.999  # of squared gradients: Adam's second beta
    longest: float = 1.0  # a gradient longer than this is cut to it


@dataclass(frozen=True)
class Course(ABC):
    """One training. Its fields, a seed, and what acts on the model settle the outcome."""

    name: ClassVar[str]
    about: ClassVar[str]  # one sentence
    recipe: ClassVar[Recipe] = Recipe()
    timed: ClassVar[bool] = True  # whether costs are measured with it
    tokens: int  # of all batches together

    def __post_init__(self) -> None:
        if self.steps < 1:
            rule = f"must be enough for one batch, which has {self.a_batch}"
            raise FieldError(self, "tokens", self.tokens, rule, 100 * self.a_batch)

    @property
    def prompt(self) -> Prompt | None:
        """What reading and decoding are timed on; None for a model that does neither."""
        return None

    @property
    def only(self) -> tuple[str, ...] | None:
        """The parts of the model that a mechanism acts in, as `attach` takes them; None for all."""
        return None

    @property
    def steps(self) -> int:
        return self.tokens // self.a_batch

    @property
    @abstractmethod
    def a_batch(self) -> int:
        """The tokens of one batch."""

    @property
    @abstractmethod
    def quantities(self) -> tuple[Quantity, ...]:
        """What `measure` finds, in the order in which tables show it, the one that counts first."""

    @abstractmethod
    def model(self, seed: int) -> Any:
        """An untrained model."""

    @abstractmethod
    def batch(self, seed: int, random: Generator) -> Batch:
        """The next training batch of that seed, drawn with its generator."""

    @abstractmethod
    def measure(self, opened: Opener, seed: int) -> dict[str, float]:
        """The quantities of a trained model; those that cannot be measured of it are left out."""

    def curves(self, numbers: Mapping[str, Mapping[str, float]]) -> tuple[Figure, ...]:
        """Figures over several quantities, from the mean numbers of each mechanism."""
        return ()


def told(run: Run, reader: Method) -> Any:
    """What a reader has to tell; None where it could not act or was never reached."""
    if reader not in run.stack.parts:
        return None
    try:
        return run[reader]
    except StatisticError:
        return None
