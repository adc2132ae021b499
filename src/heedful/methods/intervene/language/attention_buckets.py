"""logits = sum_j w_j logits_j over runs with RoPE bases B_j, w = softmax_j(largest logit of run j)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.kinds.decode import NOTHING_READ, Decode, Read
from heedful.core.kinds.tokens import Prompt
from heedful.core.method import Method, Stack
from heedful.core.paper import Paper
from heedful.core.sites import Site, at

_PAPER = Paper(
    "P122",
    "Fortify the Shortest Stave in Attention: Enhancing Context Awareness of Large Language Models for Effective Tool "
    "Use",
    "Yuhan Chen, Ang Lv, Ting-En Lin, Changyu Chen, Yuchuan Wu, Fei Huang, Yongbin Li, Rui Yan",
    2023,
    "2312.04455",
    "ACL 2024",
    differs=(
        "Logits are mixed and a run's confidence is its largest logit, as in the authors' code; the paper speaks of "
        "output distributions.",
        "Queries and keys are turned on from the model's own base to the new one, which equals a model built with the "
        "new base where rotary embedding is plain: halves of a head paired, no scaling rule.",
        "The search for bases whose peaks fill each other's troughs is not here; the bases are a field.",
    ),
)


class _Rebase(Method):
    """Queries and keys as another rotary base would have turned them."""

    base: float
    new: float
    rotary: int | None = None

    @at(Site.QUERY)
    def turn_queries(self, q: Tensor, call: Call) -> Tensor:
        return self._turn(q, call.q_pos)

    @at(Site.KEY)
    def turn_keys(self, k: Tensor, call: Call) -> Tensor:
        return self._turn(k, call.k_pos)

    def _turn(self, x: Tensor, position: Tensor) -> Tensor:
        width = self.rotary or x.shape[-1]
        if width % 2 or width > x.shape[-1]:
            raise FieldError(self, "rotary", width, f"must be even and at most {x.shape[-1]}, the head's width", 2)
        # float64, since positions times a difference of frequencies must keep their fraction at long range
        steps = torch.arange(0, width, 2, device=x.device, dtype=torch.float64) / width
        angle = position[..., None] * (self.new**-steps - self.base**-steps)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        one, two, rest = x.split([width // 2, width // 2, x.shape[-1] - width], -1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], -1)


class AttentionBuckets(Decode):
    """Decodes from several runs of one prompt, each with a rotary base of its own, the surer runs counting for more."""

    paper = _PAPER
    base: Annotated[float, Gt(1)] = 10000.0  # the base that the model was trained with; Llama 2: 10000
    bases: tuple[float, ...] = (10000.0, 17500.0, 18000.0, 19000.0, 20000.0, 25000.0)  # the authors' code, tool use
    rotary: int | None = None  # how many of a head's dimensions are turned; None: all

    def __post_init__(self) -> None:
        if not self.bases or len(set(self.bases)) < len(self.bases) or min(self.bases) <= 1:
            raise FieldError(
                self, "bases", self.bases, "must be one or more unlike numbers above 1", (10000.0, 18000.0)
            )
        if self.rotary is not None and (self.rotary < 2 or self.rotary % 2):
            raise FieldError(self, "rotary", self.rotary, "must be an even number of dimensions", 64)

    @classmethod
    def neutral(cls) -> AttentionBuckets:
        return cls(bases=(10000.0,))

    @classmethod
    def example(cls) -> AttentionBuckets:
        return cls(bases=(10.0, 100.0))

    def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
        own = {self.base: Stack()}
        return {
            f"base {new}": (prompt, own.get(new, Stack((_Rebase(self.base, new, self.rotary),)))) for new in self.bases
        }

    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        each = torch.stack([x.float() for x in logits.values()])
        return torch.softmax(each.amax(-1), 0) @ each


if __name__ == "__main__":
    from heedful import decode, models

    model, tokenizer, _ = models.default()
    pairs = {"lemon": "river", "stone": "candle", "tiger": "window", "glove": "planet"}
    text = "".join(f"{k}: {v}\n" for k, v in pairs.items()) + "tiger:"
    buckets = AttentionBuckets(base=100000.0, bases=tuple(10 * b for b in AttentionBuckets().bases))
    found = decode(model, Prompt(tuple(tokenizer(text).input_ids)), buckets, new_tokens=3)
    print(tokenizer.decode(found))
