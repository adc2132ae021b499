"""Models that come along, each loaded once for all claims of a process."""

from __future__ import annotations

from functools import cache

from heedful import models


@cache
def default() -> models.Loaded:
    return models.default()


@cache
def encoder() -> models.Loaded:
    return models.encoder()


@cache
def padding_left() -> models.Loaded:
    """The default model, whose tokenizer fills short texts up in front, so that all end with the last token."""
    loaded = models.default()
    loaded.tokenizer.padding_side = "left"
    return loaded
