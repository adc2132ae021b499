"""Linear attention trained on a byte model, one training a way and seed for all claims that are run in one process."""

from __future__ import annotations

from abc import abstractmethod
from functools import cache

import torch
from torch import Tensor

from claims._tiny_lm import HeadNorm, Trained
from heedful import Method, Site
from heedful.authoring import Call, at
from heedful.core.method import Part

STEPS = 200
MARGIN = 0.02  # of softmax's loss, as in other claims of a match: what we still call one
SETUP = f"A causal 2-layer byte model trained {STEPS} steps on Python's documentation"


@cache
def loss(what: Part | None, seed: int) -> float:
    """Held-out loss in nats a byte of a model that was trained so; None: with softmax."""
    return Trained(what, seed, STEPS).loss()


def losses(seed: int, **ways: Part | None) -> dict[str, float]:
    return {f"loss, {name.replace('_', ' ')}": loss(what, seed) for name, what in ways.items()}


class Divided(Method, abstract=True):
    """Linear attention whose weights are products of features over their sum."""

    paper = HeadNorm.paper

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """What weights are products of."""

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = qkv
        s = self.features(q) @ self.features(k).mT
        s = s.tril() if call.mask.causal else s
        return s / s.sum(-1, keepdim=True).clamp(min=1e-6) @ v


class Elu(Divided):
    """Features ELU + 1, the plain linear attention."""

    def features(self, x: Tensor) -> Tensor:
        return torch.nn.functional.elu(x) + 1


class Sigmoid(Divided):
    """Features of Flow-Attention, without its flows."""

    def features(self, x: Tensor) -> Tensor:
        return x.sigmoid()
