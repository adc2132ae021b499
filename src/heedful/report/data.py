"""A profile as the plain data that the page's script reads: figures as plotly's JSON, the token view packed."""

from __future__ import annotations

import base64
import gzip
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from heedful.core.figures import (
    Curves,
    Description,
    Figure,
    Finding,
    Grid,
    HeadMap,
    Intervals,
    Listing,
    Lit,
    Role,
    Scatter,
    head_name,
    shrunk,
)
from heedful.core.kinds.weights import Measure
from heedful.report.colours import ROLES
from heedful.report.lit import sources
from heedful.report.plots import bare

SIDE = 320  # pixels of a picture's longer side at most
DECADES = 8  # received attention is packed as its logarithm, from 1e-8 to 1
KINDS: dict[type[Figure], str] = {
    HeadMap: "heads",
    Grid: "grid",
    Curves: "curves",
    Listing: "table",
    Lit: "lit",
    Intervals: "points",
    Scatter: "points",
}


class View(Protocol):
    """The token view of a profile (`heedful.diagnosis.view.TokenView`)."""

    @property
    def tokens(self) -> Sequence[str]: ...

    @property
    def heads(self) -> Sequence[tuple[int, int]]: ...

    @property
    def keys(self) -> Tensor: ...  # int32 [heads n t]

    @property
    def weights(self) -> Tensor: ...  # [heads n t]

    @property
    def received(self) -> Tensor: ...  # [heads n]

    @property
    def entropy(self) -> Tensor: ...  # [heads n]

    @property
    def norms(self) -> Tensor: ...  # [heads n]

    @property
    def layers(self) -> Sequence[int]: ...

    @property
    def opening(self) -> Tensor: ...  # [layers h s s]


class Shown(Protocol):
    """What a page needs of a profile."""

    def description(self) -> Sequence[tuple[Measure, Description]]: ...

    def findings(self) -> Sequence[Finding]: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...

    @property
    def view(self) -> Any: ...  # a View, images (`heedful.report.glances.ImageView`), one with `figures`, or None


def figure(shown: Figure, measure: str) -> dict[str, Any]:
    """One figure: what it is and how plotly draws it, less what the page writes itself."""
    kind = next((name for base, name in KINDS.items() if isinstance(shown, base)), None)
    plain: dict[str, Any] = {"key": shown.key, "title": shown.title, "what": shown.what, "from": measure, "kind": kind}
    plain["folded"] = shown.folded
    if isinstance(shown, Listing):
        return plain | {"columns": list(shown.columns), "rows": [[cell(x) for x in row] for row in shown.rows]}
    if isinstance(shown, Lit):
        return plain | {"pictures": [{"name": name, "source": source} for name, source in sources(shown)]}
    if isinstance(shown, HeadMap):
        plain |= {"unit": shown.unit, "layers": list(shown.layers)}
    plot = bare(shown)
    if isinstance(shown, Curves) and shown.bands:
        plain["shaded"] = f"Shaded: {shown.band}."
    if isinstance(shown, Curves) and plot.data and len(plot.data[-1].x) < len(shown.x):
        plain["note"] = f"{len(plot.data[-1].x)} of {len(shown.x)} points are drawn, the peaks among them."
    if isinstance(shown, Intervals | Scatter):
        plain |= _rows(shown)
    drawn = plot.to_dict()
    for outer in ("template", "title", "margin"):  # the page has its own
        drawn["layout"].pop(outer, None)
    return plain | {"plot": drawn}


def _rows(shown: Intervals | Scatter) -> dict[str, Any]:
    """The numbers behind points, as the page's table has them."""
    if isinstance(shown, Scatter):
        columns = ["method", shown.x_label, shown.y_label, "low", "high"]
        rows = [[name, *at] for name, at in shown.points.items()]
    else:
        columns = ["method", "group", shown.label, "low", "high"]
        groups = shown.groups.items()
        rows = [[n, g, *v.tolist()] for g, x in groups for n, v in zip(shown.names, x, strict=True)]
    return {"columns": columns, "rows": [[cell(x) for x in row] for row in rows]}


def cell(x: object) -> object:
    """A table's cell as JSON has it; a pair of numbers is a head."""
    if isinstance(x, Tensor) and x.numel() == 1:
        x = x.item()
    if isinstance(x, tuple) and len(x) == 2 and all(isinstance(i, int) for i in x):
        return {"head": head_name(*x)}
    if isinstance(x, float):
        return float(f"{x:.5g}") if math.isfinite(x) else None
    return x if isinstance(x, (int, str, bool)) or x is None else str(x)


def roles(told: Iterable[tuple[Measure, Description]]) -> list[dict[str, Any]]:
    def plain(role: Role) -> dict[str, Any]:
        heads = [[head_name(*head), cell(float(value))] for head, value in role.heads.items()]
        return {"name": role.name, "what": role.what, "unit": role.unit, "heads": heads}

    return [plain(role) for _, t in told for role in t.roles if role.heads]


def sharing(facts: Mapping[str, Any]) -> int:
    """How many query heads share a key head."""
    return (facts.get("heads") or 1) // (facts.get("kv_heads") or facts.get("heads") or 1) or 1


def role_map(roles: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Layers by heads, each head with the roles it plays, the rarest first; None where there is nothing to show."""
    layers, heads = facts.get("layers"), facts.get("heads")
    if not roles or not layers or not heads:
        return None
    played: dict[str, list[int]] = {}
    for n in sorted(range(len(roles)), key=lambda n: len(roles[n]["heads"])):
        for head, _ in roles[n]["heads"]:
            played.setdefault(head, []).append(n)

    def cell_of(head: str) -> dict[str, Any]:
        mine = played.get(head, [])
        what = ", ".join(roles[n]["name"] for n in mine) or "no role"
        shown = mine[:3]
        share = 100 / max(1, len(shown))
        ends = [f"{i * share:.0f}% {(i + 1) * share:.0f}%" for i in range(len(shown))]
        stops = [f"var(--role-{n % len(ROLES)}) {end}" for n, end in zip(shown, ends, strict=True)]
        fill = f"linear-gradient(135deg, {', '.join(stops)})" if mine else "var(--rule)"
        return {"head": head, "title": f"{head}: {what}", "roles": " ".join(map(str, mine)), "fill": fill}

    group = sharing(facts)
    cells = [
        cell_of(head_name(layer, head)) | {"begins": head > 0 and group > 1 and head % group == 0}
        for head in range(heads)
        for layer in range(layers)
    ]
    return {"layers": layers, "heads": heads, "group": group, "cells": cells, "colours": ROLES}


def packed(view: View) -> tuple[dict[str, Any], str]:
    """The token view: what the script must know first, and the numbers as compressed bytes in base64.

    Keys are distances back (2 bytes, or 4 in texts too long for that), weights 255ths, received attention a 16-bit
    logarithm, entropies and lengths of values 65535ths of their largest; in whole patterns a byte is a 255th of a
    weight's root, so that what is small shows.
    """
    keys = view.keys.to("cpu", torch.int64)
    n = len(view.tokens)
    back = torch.arange(n)[:, None] - keys
    weights = (view.weights.detach().to("cpu", torch.float32).nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    weights[(keys < 0) | (keys >= n)] = 0
    back = torch.where(weights > 0, back, 0)  # what weighs nothing is not kept, and compresses
    wide = bool(back.abs().max() > 32767) if back.numel() else False
    received = view.received.detach().to("cpu", torch.float32).nan_to_num().clamp(10.0**-DECADES, 1)
    logs = ((received.log10() / DECADES + 1) * 65535).round().to(torch.int32)
    (entropy, widest), (norms, longest) = map(_of_largest, (view.entropy, view.norms))
    numbers = (
        back.to(torch.int32 if wide else torch.int16).numpy().tobytes(),
        logs.numpy().astype("<u2").tobytes(),
        entropy,
        norms,
        weights.numpy().tobytes(),
        rooted(view.opening).numpy().tobytes(),
    )
    about = {
        "tokens": list(view.tokens),
        "heads": [head_name(*head) for head in view.heads],
        "top": keys.shape[-1],
        "wide": wide,
        "decades": DECADES,
        "widest": widest,
        "longest": longest,
        "layers": list(view.layers),
        "opening": view.opening.shape[-1],
        "across": view.opening.shape[1],
    }
    return about, zipped(b"".join(numbers))


def _of_largest(x: Tensor) -> tuple[bytes, float]:
    """Numbers from 0 up as 65535ths of the largest of them, and that."""
    x = x.detach().to("cpu", torch.float32).nan_to_num().clamp(min=0)
    largest = max(float(x.max()), 1e-30) if x.numel() else 1.0
    return (x / largest * 65535).round().to(torch.int32).numpy().astype("<u2").tobytes(), largest


def rooted(weights: Tensor) -> Tensor:
    """Weights from 0 to 1 as bytes: 255ths of their roots."""
    return (weights.detach().float().cpu().nan_to_num().clamp(0, 1).sqrt() * 255).round().to(torch.uint8)


def colours(pixels: Tensor) -> Tensor:
    """An image as bytes `[rows cols 3]`, its darkest number black and its brightest white; grey unless it has three."""
    shown = pixels if len(pixels) == 3 else pixels.mean(0).expand(3, -1, -1)
    shown = shrunk(shown[None], SIDE)[0]
    low, high = shown.aminmax()
    return ((shown - low) / (high - low).clamp(min=1e-6) * 255).round().byte().permute(1, 2, 0)


def zipped(raw: bytes) -> str:
    return base64.b64encode(gzip.compress(raw, 9, mtime=0)).decode()
