"""Fits what a comparison tries, on prose that comes with heedful."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from heedful.core.entry import CatalogueEntry
from heedful.core.kinds.conversion import Progress
from heedful.core.method import Scoped, Stack, method_of
from heedful.models import Loaded
from heedful.text_models import Contender

TEXTS, LENGTH = 8, 256


def prose(tokenizer: Any) -> list[dict[str, Any]]:
    """Batches of plain text, as fits take them."""
    from heedful.tasks import find

    items = find(f"LossByPosition(length={LENGTH})").items(tokenizer, TEXTS, seed=1_000_003)  # no task's own texts
    return [{"input_ids": torch.tensor([item.prompt.tokens])} for item in items]


def fitted(loaded: Loaded, what: Contender, report: Callable[[Progress], None], only: str | None = None) -> Contender:
    """The same with every part that has a fit fitted; one that needs more than plain text says so in its error."""
    if isinstance(what, Stack):
        parts: list[Any] = [fitted(loaded, part, report, only) for part in what]
        return Stack(tuple(parts))
    entry = method_of(what)
    if type(entry).fit is CatalogueEntry.fit:
        return what
    from heedful.api import fit

    report(Progress("fits", 0, 1, f"fitting {type(entry).__name__} to {TEXTS} texts of {LENGTH} tokens"))
    new = fit(entry, loaded.model, prose(loaded.tokenizer), only=only)
    return replace(what, method=new) if isinstance(what, Scoped) else new
