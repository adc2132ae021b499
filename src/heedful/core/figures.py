"""What a reading method has to show: values that tables, plots and the page draw without knowing the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

import torch
from torch import Tensor

Head = tuple[int, int]  # layer, head


@dataclass(frozen=True, eq=False)
class Figure:
    """Something to draw. `what` is one plain sentence that says how to read it."""

    key: str  # unique in a profile, such as "sinks"
    title: str
    what: str
    folded: bool = field(default=False, kw_only=True)  # for the few who look for it: a page shows it on demand


@dataclass(frozen=True, eq=False)
class HeadMap(Figure):
    """One number for each layer and head; nan where there is none."""

    layers: Sequence[int]
    values: Tensor  # [layers h]
    unit: str = "share"  # "share" (0 to 1), "nats", "tokens", "score" or ""
    low: float | None = None  # ends of the colour scale; None: the values' own
    high: float | None = None


@dataclass(frozen=True, eq=False)
class Grid(Figure):
    """A matrix with named axes that is not layer by head."""

    values: Tensor  # [rows columns]
    rows: Sequence[str]
    columns: Sequence[str]
    row_label: str
    column_label: str
    unit: str = ""
    log: bool = False
    text: Sequence[Sequence[str]] | None = None  # what is written into the cells


@dataclass(frozen=True, eq=False)
class Curves(Figure):
    """Lines over one axis; those of single heads are named by `head_name`."""

    x: Sequence[float]
    lines: Mapping[str, Tensor]  # name -> [len(x)]
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False
    bands: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # line -> its lower and upper edge
    band: str = ""  # what lies between these edges, such as "the middle half of the heads"


@dataclass(frozen=True, eq=False)
class Listing(Figure):
    """A table of the few most telling rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True, eq=False)
class Lit(Figure):
    """A picture, once as it is and once for each name, lit where a map is high."""

    pixels: Tensor  # [3 rows columns], from 0 to 1
    maps: Mapping[str, Tensor]  # name -> [rows columns], of any size


@dataclass(frozen=True, eq=False)
class Intervals(Figure):
    """A number with its interval for each name, in one or more groups that stand side by side."""

    names: Sequence[str]
    groups: Mapping[str, Tensor]  # group -> [names 3]: middle, low, high; nan where there is none
    label: str
    unit: str = ""
    zero: str = ""  # what zero means, for a line there; empty for no line


def frontier(points: Mapping[str, tuple[float, ...]]) -> list[str]:
    """The points (cost, worth) of which none is both cheaper and better, by cost."""
    out: list[str] = []
    for name, (_, y, *_) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if not out or y > points[out[-1]][1]:
            out.append(name)
    return out


@dataclass(frozen=True, eq=False)
class Scatter(Figure):
    """Things by cost and quality: the further up and to the left the better."""

    points: Mapping[str, tuple[float, float, float, float]]  # name -> x, y, and the ends of y's interval
    x_label: str
    y_label: str
    among: Sequence[str] | None = None  # who may stand on the front; None: everybody
    joined: Sequence[Sequence[str]] = ()  # names that a line joins, such as settings of one method

    @property
    def frontier(self) -> list[str]:
        """Of those that may stand there, the points of which none is both cheaper and better, by cost."""
        return frontier({name: at for name, at in self.points.items() if self.among is None or name in self.among})


class Cell(NamedTuple):
    """One cell of a matrix: what it says, what stands below in small, what it is sorted by, and how it is coloured."""

    text: str
    detail: str = ""
    value: float | None = None
    tone: str = ""  # "good", "bad", "quiet" or nothing


@dataclass(frozen=True)
class Matrix:
    """A table of cells whose rows are compared with each other."""

    columns: tuple[tuple[str, str], ...]  # name, and what is below it in small
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class Role:
    """A part that some heads play, with how strongly each does."""

    name: str  # such as "induction head" or "previous-token head"
    what: str
    heads: Mapping[Head, float]  # strongest first
    unit: str = "share"


@dataclass(frozen=True)
class Finding:
    """One sentence for the summary, in plain words."""

    text: str
    weight: float  # 0 to 1: how much a reader would want to know it, which grows with how strong it is; orders them
    methods: tuple[str, ...] = ()  # class names in the catalogue that act on this
    shows: str = ""  # the key of the figure that it is read off


@dataclass(frozen=True)
class Description:
    """Everything that one method's answer has to show."""

    figures: tuple[Figure, ...] = ()
    roles: tuple[Role, ...] = ()
    findings: tuple[Finding, ...] = field(default=())


def head_name(layer: int, head: int) -> str:
    """A head as people write it: `14.3`."""
    return f"{layer}.{head}"


def counted(number: int, thing: str) -> str:
    """So many of a thing: `1 layer`, `2 layers`."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def a_few(told: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return "; ".join([*told[:3], *([f"and {len(told) - 3} more"] if len(told) > 3 else [])])


def layers_from(first: int, last: int) -> str:
    """A stretch of layers: `layer 3`, `layers 3 to 5`."""
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def percent(share: float) -> str:
    """A share in words that a reader can check: no false precision, no rounding to nothing."""
    if 0 < share < 0.01:
        return f"{share:.2%}"
    return f"{share:.0%}"


def rounded(x: float) -> str:
    """A magnitude in three digits or more, as people write it: `0.00123`, `4.56`, `12,345`, `3.4e+38`."""
    return f"{x:,.0f}" if 100 <= abs(x) < 1e6 else f"{x:.3g}"


def shrunk(images: Tensor, side: int) -> Tensor:
    """Images `[b c rows cols]` of so many pixels at most on the longer side, each the mean of what it stands for."""
    size = [max(1, round(n * min(1.0, side / max(images.shape[2:])))) for n in images.shape[2:]]
    return torch.nn.functional.interpolate(images, size, mode="area")


def printed(value: object) -> str:
    """What a notebook shows of a value: its text as it is printed."""
    return f'<pre style="line-height:1.35; overflow-x:auto">{escape(str(value))}</pre>'
