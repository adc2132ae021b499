"""What laws try a method on: text, images, encoder-decoders, cross-attention alone, and a model of plain torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from heedful.api import attach
from heedful.conformance.bare import ROLES
from heedful.conformance.place import place, reseeded
from heedful.conformance.torch_model import TinyTorch, WrittenOut
from heedful.core.errors import FieldError, InactiveWarning
from heedful.core.method import Method
from heedful.core.regions import Span

LENGTH = 21


def tiny_model(kind: str) -> nn.Module:
    return _tiny_model(kind, place())


@cache
def _tiny_model(kind: str, device: torch.device) -> nn.Module:
    return _drawn(kind).to(device)


def _drawn(kind: str) -> nn.Module:
    from heedful.tiny import tiny

    if kind == "torch":
        return TinyTorch().eval()
    if kind == "vit":
        return tiny(kind, attn_implementation="eager", num_hidden_layers=3, image_size=16)
    layers: dict[str, Any] = {"decoder_layers": 3} if kind == "bart" else {"num_hidden_layers": 3}
    return tiny(kind, attn_implementation="eager", **layers)


def in_training(kind: str) -> nn.Module:
    """The same model as its training has it; it drops nothing there."""
    return _in_training(kind, place())


@cache
def _in_training(kind: str, device: torch.device) -> nn.Module:
    return copy.deepcopy(_tiny_model(kind, device)).train()


_KEPT: WeakKeyDictionary[nn.Module, dict[Any, Tensor]] = WeakKeyDictionary()


@torch.no_grad()
def once(model: nn.Module, read: Callable[[Any], Tensor]) -> Tensor:
    """What is read of a model as it is, and so for every method alike: it is computed once, and each gets a copy."""
    kept, key = _KEPT.setdefault(model, {}), (read, torch.get_num_threads())  # which may change bits
    if key not in kept:
        kept[key] = read(model)
    return kept[key].clone()


def text(seed: int = 0, rows: int = 2) -> Tensor:
    return torch.randint(3, 100, (rows, LENGTH), generator=torch.Generator().manual_seed(seed)).to(place())


def _images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(place())


@dataclass(frozen=True, eq=False)
class Subject:
    """Tiny models of one kind, and what they read."""

    name: str
    kinds: tuple[str, ...]
    inputs: Callable[[], dict[str, Tensor]]
    only: tuple[str, ...] | None = None  # the part of the model that is served
    roles: Mapping[str, tuple[Span, ...]] = field(default_factory=lambda: ROLES)
    eager: Callable[[], AbstractContextManager[Any]] = nullcontext  # under which attention is computed by its formula
    known: bool = True  # whether a model tells its layers before it runs

    def attach(self, model: nn.Module, what: Any, backend: str = "auto") -> Any:
        reseeded()  # parameters that a method draws
        inputs = None if self.known else self.inputs()
        return attach(model, what, backend=backend, roles=self.roles, only=self.only, inputs=inputs)

    @torch.no_grad()
    def logits(self, model: nn.Module, what: Any = None, backend: str = "auto") -> Tensor:
        """What a model answers to the subject's inputs, as it is or under a stack."""
        if what is None:
            with self.eager():
                return model(**self.inputs()).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InactiveWarning)
            with self.attach(model, what, backend) as run:
                return run(**self.inputs()).logits


TEXT = Subject("text", ("llama", "mha", "mqa", "odd_head_dim"), lambda: {"input_ids": text()})
IMAGE = Subject(
    "image", ("vit",), lambda: {"pixel_values": _images()}, roles={k: v for k, v in ROLES.items() if k != "patches"}
)
SPLIT = Subject("encoder-decoder", ("bart",), lambda: {"input_ids": text(), "decoder_input_ids": text(1)})
CROSS = Subject("cross", SPLIT.kinds, SPLIT.inputs, tuple(f"model.decoder.layers.{i}.encoder_attn" for i in range(3)))
TORCH = Subject("torch", ("torch",), lambda: {"input_ids": text()}, eager=WrittenOut, known=False)
SUBJECTS = {subject.name: subject for subject in (TEXT, IMAGE, SPLIT, CROSS, TORCH)}


def subjects_of(method: Method) -> tuple[Subject, ...]:
    """What a method is for, as it declares."""
    for name in method.subjects:
        if name not in SUBJECTS:
            known = ", ".join(SUBJECTS)
            raise FieldError(method, "subjects", name, f"must be some of {known}", ("text",))
    return tuple(SUBJECTS[name] for name in method.subjects)
