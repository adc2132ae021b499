"""All names of timm and open_clip, and how a model of each is made and called: whole, or with fewer blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.beside_torch import library

from . import library_cases as cases
from .libraries_given import NARROW

PICTURES = 2  # several, since one does not tell how several share an axis with the heads
TEXT = 77  # tokens, as most of open_clip read
LARGE, SMALLER = 300, 224  # a picture of more pixels a side is measured smaller where the model takes that
WIDE: dict[str, Any] = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=64)
MT5: dict[str, Any] = dict(num_layers=2, d_model=32, num_heads=4, d_kv=8, d_ff=64)
M2M: dict[str, Any] = dict(encoder_layers=2, decoder_layers=2, d_model=32, encoder_attention_heads=4)
TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta-base": ("RobertaConfig", {**WIDE, "hidden_size": 768}), "xlm-roberta-base": ("XLMRobertaConfig", WIDE),
    "xlm-roberta-large": ("XLMRobertaConfig", WIDE), "google/mt5-base": ("MT5Config", MT5),
    "google/mt5-xl": ("MT5Config", MT5), "facebook/nllb-200-distilled-600M": ("M2M100Config", M2M),
    "facebook/nllb-200-distilled-1.3B": ("M2M100Config", M2M),
}  # fmt: skip
Maker = Callable[..., cases.Case]


SOURCES = ("timm", "diffusers", "open_clip")


@cache
def makers(source: str) -> Mapping[str, Maker]:
    """Of each name of a library, what makes the model on the device that is torch's default then."""
    if source == "diffusers":
        from .libraries_diffusers import makers as of_diffusers  # which takes a while

        return of_diffusers()
    if source == "timm":
        return {name: _maker(_of_timm, name) for name in library("timm").list_models()}
    return {name: _maker(_of_open_clip, name) for name in _open_clip().list_models()}


def _maker(make: Maker, name: str) -> Maker:
    return lambda **how: make(name, **how)


def smaller(source: str, name: str) -> Iterator[dict[str, Any]]:
    """Ways to make a model for less: that known for it, those that its class may understand, and last as it is."""
    if name in NARROW:
        yield NARROW[name]
    if source == "timm":
        side = library("timm").get_pretrained_cfg(name, allow_unregistered=False).input_size[-1]
        if side > LARGE:
            yield {"depth": 2, "img_size": SMALLER}
        yield {"depth": 2}
    if source == "diffusers":
        yield {"num_attention_heads": 4}
    yield {}


def _of_timm(name: str, side: int | None = None, **how: Any) -> cases.Case:
    """`side` is that of pictures, for a model that need not know it."""
    model, side = library("timm").create_model(name, **how).eval(), side or how.get("img_size")
    size = tuple(model.default_cfg["input_size"])
    x = _drawn(PICTURES, *(size if side is None else (size[0], side, side)))
    return cases.Case(model, lambda: model(x), 0)


@cache
def _open_clip() -> Any:
    library("timm")  # whose towers it has
    found = library("open_clip")
    logging.getLogger().addFilter(lambda record: "No pretrained weights" not in record.getMessage())
    return found


def _of_open_clip(name: str, **how: Any) -> cases.Case:
    with _towers_of_transformers():
        model = _open_clip().create_model(name, device=torch.get_default_device(), pretrained_hf=False, **how).eval()
    size = model.visual.image_size
    x = _drawn(PICTURES, 3, *(size if isinstance(size, tuple) else (size, size)))
    words = _words(PICTURES, min(model.context_length or TEXT, TEXT))  # towers of transformers say none, or too much
    return cases.Case(model, lambda: model(x, words), 0)


@contextmanager
def _towers_of_transformers() -> Iterator[None]:
    """Text towers that open_clip takes from transformers, small: their own sizes are known on the hub alone."""
    kept = transformers.AutoConfig.from_pretrained

    def config(name: str, **_: Any) -> Any:
        kind, sizes = TOWERS[name]
        return getattr(transformers, kind)(**sizes)

    transformers.AutoConfig.from_pretrained = config
    try:
        yield
    finally:
        transformers.AutoConfig.from_pretrained = kept


def _drawn(*shape: int) -> Tensor:
    x = torch.empty(shape)
    return x if x.is_meta else cases.draw(*shape)


def _words(*shape: int) -> Tensor:
    x = torch.empty(shape, dtype=torch.long)
    return x if x.is_meta else torch.randint(3, 1000, shape, generator=torch.Generator().manual_seed(1))
