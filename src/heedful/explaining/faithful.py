"""Deletion and insertion: whether a model's answer follows the tokens that an explanation calls important."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from heedful.api import attach, still
from heedful.core.asked import asks, require_fields
from heedful.core.call import Call
from heedful.core.errors import FieldError, InactiveWarning
from heedful.core.figures import Curves, Figure, printed
from heedful.core.fitted import Fitted
from heedful.core.mask import Dense, Mask
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt
from heedful.core.sites import Site, at
from heedful.explaining.aim import Aim, Text, aim_of, ids_of
from heedful.explaining.attribution import Attribution

if TYPE_CHECKING:
    from heedful.report.pictures import Plots

PAPER = Paper(
    "1806.07421",
    "RISE: Randomized Input Sampling for Explanation of Black-box Models",
    "Vitali Petsiuk, Abir Das, Kate Saenko",
    2018,
    "1806.07421",
    "BMVC 2018",
    differs=(
        "tokens of a text are removed; the authors' code sets pixels to zero, and puts them back on a blurred image",
        "the log-probability less that of the whole text, against random orders: theirs is the class's probability",
        "the first token, the last and the one predicted at stay",
    ),
)
TOKENS = 512  # in one forward: logits of a whole vocabulary are large


@dataclass(frozen=True)
class Removal:
    """How tokens are taken from a text.

    Without a `token` nobody may attend to a removed one any more: nothing else moves, and the text holds no token that
    was not there. Some tokens stay whatever their score: by default the first, where attention sinks lie and encoders
    have [CLS], without which a model breaks down whichever explanation asked for it, and the last.
    """

    keep: tuple[int, ...] = (0, -1)  # positions that are never removed; the one that is predicted at comes on top
    token: int | None = None  # put in place of removed tokens; None: they are hidden

    def __post_init__(self) -> None:
        require_fields(self)

    @asks
    def kept(self, n: int, position: int | None) -> Tensor:
        """Which of n tokens stay, `[n]`."""
        if n < 1 or not (position is None or -n <= position < n):
            raise FieldError(
                "Removal.kept()", "n, position", (n, position), "must be a text's length, and in it", (9, -1)
            )
        out = torch.zeros(n, dtype=torch.bool)
        out[[i % n for i in (*self.keep, *(() if position is None else (position,))) if -n <= i < n]] = True
        return out


class _Hide(Method):
    """Nobody attends to the tokens that are not in `kept`."""

    kept: Fitted | None = None  # kept [b n]

    @at(Site.MASK)
    def hide(self, mask: Mask, call: Call) -> Mask:
        return mask if self.kept is None else mask & Dense(self.kept["kept"][:, None, None])


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """What a model makes of a text without, and with nothing but, its most important tokens."""

    unit: str  # "nats": the log-probability less that of the whole text; "cosine": with the whole text's mean state
    target: int | None  # the token or class that is meant
    shares: tuple[float, ...]  # of the removable tokens that are removed, or inserted
    deletion: Mapping[str, Tensor]  # by explanation, [shares]
    insertion: Mapping[str, Tensor]
    random_deletion: Tensor  # [seeds shares]
    random_insertion: Tensor

    @asks
    def area(self, curve: Tensor) -> Tensor:
        """The mean height of a curve `[... shares]`, by trapezia."""
        if not curve.ndim or curve.shape[-1] != len(self.shares):
            rule = f"must be a curve over the {len(self.shares)} shares, [... {len(self.shares)}]"
            raise FieldError("Faithfulness.area()", "curve", tuple(curve.shape), rule, "faithfulness.random_deletion")
        return torch.trapezoid(curve, torch.tensor(self.shares, dtype=curve.dtype), dim=-1)

    @property
    def gains(self) -> dict[str, tuple[float, float]]:
        """By explanation, how far it beats random order on deletion (falls faster) and on insertion (rises faster)."""
        falls, rises = self.area(self.random_deletion).mean(), self.area(self.random_insertion).mean()
        return {
            name: (float(falls - self.area(curve)), float(self.area(self.insertion[name]) - rises))
            for name, curve in self.deletion.items()
        }

    @property
    def figures(self) -> tuple[Figure, ...]:
        """The two sets of curves, random order being its mean over seeds."""
        return tuple(
            Curves(
                key, title, what, self.shares, {**lines, "random order": random.mean(0)}, f"share of tokens {done}",
                self.unit,
            )
            for key, title, what, lines, random, done in (
                ("deletion", "Deletion", "The sooner a line falls, the better the order.", self.deletion,
                 self.random_deletion, "removed"),
                ("insertion", "Insertion", "The sooner a line rises, the better the order.", self.insertion,
                 self.random_insertion, "put back"),
            )
        )  # fmt: skip

    @property
    def plot(self) -> Plots:
        """`found.plot.deletion()` and `found.plot.insertion()`, as plotly figures."""
        from heedful.report.pictures import Plots

        return Plots(self.figures)

    def _repr_html_(self) -> str:
        return printed(self)

    def __str__(self) -> str:
        rows = [f"{'':16}{'deletion':>10}{'insertion':>11}   mean height in {self.unit}, and gain over random order"]
        for name, (fall, rise) in self.gains.items():
            down, up = float(self.area(self.deletion[name])), float(self.area(self.insertion[name]))
            rows.append(f"{name:16}{down:10.3f}{up:11.3f}   {fall:+.3f}  {rise:+.3f}")
        falls, rises = self.area(self.random_deletion), self.area(self.random_insertion)
        rows.append(f"{'random order':16}{float(falls.mean()):10.3f}{float(rises.mean()):11.3f}   {len(falls)} seeds")
        return "\n".join(rows)


@asks
def faithfulness(
    model: nn.Module,
    prompt: Text,
    scores: Tensor | Attribution | Mapping[str, Tensor | Attribution],
    *,
    target: int | None = None,
    position: int | None = None,
    removal: Removal | None = None,
    steps: PositiveInt = 10,
    seeds: PositiveInt = 8,
) -> Faithfulness:
    """Remove, and put back, tokens from the highest score `[n]` down, and watch what the model says of `target`.

    Several explanations of one text, by name, share the random orders that they are measured against, which are the
    same for a seed. `target` and `position` are as in `attribute`.
    """
    ids, removal = ids_of(prompt, model), removal or Removal()
    n = ids.shape[1]
    named = scores if isinstance(scores, Mapping) else {"scores": scores}
    given = {name: x.scores if isinstance(x, Attribution) else x for name, x in named.items()}
    if not given:
        raise FieldError("faithfulness()", "scores", given, "names no explanation", {"mine": "torch.rand(n)"})
    for name, each in given.items():
        if each.shape != (n,) or not bool(each.isfinite().all()):
            rule = f"must be {n} finite scores, one a token"
            raise FieldError("faithfulness()", f"scores[{name!r}]", tuple(each.shape), rule, torch.rand(n))
    with still(model):
        aim = aim_of(model, ids, target, position)
        always = removal.kept(n, aim.position)
        free = (~always).nonzero()[:, 0]
        if not len(free):
            raise FieldError("Removal", "keep", removal.keep, f"leaves none of the {n} tokens to remove", (0,))
        counts = [round(len(free) * i / steps) for i in range(steps + 1)]
        orders = [free[each.cpu()[free].argsort(descending=True, stable=True)] for each in given.values()]
        draws = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        orders += [free[torch.randperm(len(free), generator=draw)] for draw in draws]
        # a random order backwards is a random order: what its deletion leaves is what another's insertion has
        rising = orders[: len(given)] + [order.flip(0) for order in orders[len(given) :]]
        kept = torch.stack(
            [_without(order, c, n) for order in orders for c in counts]
            + [always | ~_without(order, c, n) for order in rising for c in counts]
        )
        values = _values(model, ids, aim, removal.token, kept).view(2, len(orders), len(counts))
    if aim.kind != "states":
        values = values - values[0, 0, 0]  # nothing removed: the whole text
    falls, rises = (dict(zip(given, side, strict=False)) for side in values)
    return Faithfulness(
        aim.unit, aim.target, tuple(c / len(free) for c in counts), falls, rises, *values[:, len(given) :]
    )


def _without(order: Tensor, count: int, n: int) -> Tensor:
    """All tokens but the first ones of an order, `[n]`."""
    out = torch.ones(n, dtype=torch.bool)
    out[order[:count]] = False
    return out


@torch.no_grad()
def _values(model: nn.Module, ids: Tensor, aim: Aim, token: int | None, kept: Tensor) -> Tensor:
    """What the model says where only the tokens `kept [m n]` are left, `[m]`; nothing is computed twice."""
    unlike, which = kept.to(ids.device).unique(dim=0, return_inverse=True)
    found = []
    for part in unlike.split(max(1, TOKENS // ids.shape[1])):
        texts: Any = ids.expand(len(part), -1)
        if token is not None:
            found.append(aim.score(model(input_ids=texts.where(part, token)), part))
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InactiveWarning)  # the whole text may stand alone in a part
            with attach(model, _Hide(Fitted({"kept": part}))) as run:
                found.append(aim.score(run(input_ids=texts), part))
    return torch.cat(found)[which].double().cpu()
