"""logits = strong + w (strong - weak); in the weak run chosen heads have (1 - u) A + u I in place of their map A."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.kinds import NOTHING_READ, Decode, Prompt, Read
from heedful.core.method import FitContext, Method, Stack
from heedful.core.paper import Paper
from heedful.core.sites import Site, at
from heedful.kit.head_search import Head, require_heads
from heedful.methods.intervene.language._task import next_logits

_PAPER = Paper(
    "P040",
    "Fine-Grained Perturbation Guidance via Attention Head Selection",
    "Donghoon Ahn, Jiwon Kang, Sanghyun Lee, Minjae Kim, Jaewon Min, Wooseok Jang, Saungwu Lee, Sayak Paul, Susung "
    "Hong, Seungryong Kim",
    2025,
    "2506.10978",
    differs=(
        "The paper guides the noise or flow that a diffusion model predicts; here the next-token logits of a language "
        "model are guided, which the authors do not try.",
        "Identity is each token's weight on itself; the paper's maps run over image tokens, without causality.",
        "HeadHunter's objective, a score of generated images there, is the log-probability of given next tokens here. "
        "Neither full text nor code was at hand: how many heads a round takes, and in how many rounds, is not theirs.",
    ),
)


class _TowardsSelf(Method):
    """Maps on their way to identity: every token looks at itself."""

    u: float = 1.0

    @at(Site.PATTERN)
    def mix(self, pattern: Tensor, call: Call) -> Tensor:
        own = (call.pairs.q_index == call.pairs.k_index).to(pattern)
        return (1 - self.u) * pattern + self.u * own


Heads = tuple[Head, ...]


class SoftPAG(Decode):
    """Guides decoding away from what the model would say with some heads looking at nothing but their own token.

    `fit` is the paper's HeadHunter: round by round it takes the heads whose perturbation guides best to the answers in
    "target", the first tokens `[b]` of what should follow the batch's texts.
    """

    paper = _PAPER
    heads: Heads = ()  # (layer, head) pairs to perturb; none: every head
    u: float = 0.5  # how far towards identity, 0 to 1; 1 is the older PAG
    w: float = 1.0  # how much of the difference is added; 0 changes nothing
    rounds: int = 3  # of a fit
    each: int = 1  # heads that a round of a fit takes
    among: Heads = ()  # heads that a fit may take; none: every head, one forward for each and round

    def __post_init__(self) -> None:
        if not 0 <= self.u <= 1:
            raise FieldError(self, "u", self.u, "must lie from 0 to 1", 0.5)
        if not abs(self.w) < float("inf"):
            raise FieldError(self, "w", self.w, "must be finite", 1.0)
        for name in ("rounds", "each"):
            if getattr(self, name) < 1:
                raise FieldError(self, name, getattr(self, name), "must be 1 or more", 1)
        for name in ("heads", "among"):
            require_heads(self, getattr(self, name), name)

    @classmethod
    def neutral(cls) -> SoftPAG:
        return cls(w=0.0)

    @classmethod
    def example(cls) -> SoftPAG:
        return cls(heads=((0, 0), (1, 2)), w=4.0)

    def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
        return {"strong": (prompt, Stack()), "weak": (prompt, self._weak(self.heads))}

    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        strong, weak = logits["strong"].float(), logits["weak"].float()
        return strong if self.w == 0 else strong + self.w * (strong - weak)

    def _weak(self, heads: Heads) -> Stack:
        part = _TowardsSelf(self.u)
        layers = sorted({layer for layer, _ in heads})
        return Stack(tuple(part.on(i, [h for layer, h in heads if layer == i]) for i in layers) or (part,))

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> SoftPAG:
        found = [dict(batch) for batch in batches]
        if not found or any("target" not in batch for batch in found):
            raise FieldError(self, "batches", len(found), 'must be 1 or more, each with "target"', [{"target": "ids"}])
        pairs = [(batch.pop("target"), batch) for batch in found]
        strong = self._read(context, Stack(), pairs)

        def objective(heads: Heads) -> float:
            """The mean log-probability of the answers, guided away from these heads' perturbation."""
            weak = self._read(context, self._weak(heads), pairs)
            guided = [self.combine({"strong": a, "weak": b}) for a, b in zip(strong, weak, strict=True)]
            each = [x.log_softmax(-1).gather(-1, t[:, None]) for (t, _), x in zip(pairs, guided, strict=True)]
            return float(torch.cat(each).mean())

        every = tuple((layer.number, head) for layer in context.layers for head in range(layer.heads))
        chosen: Heads = ()
        for _ in range(self.rounds):
            left = [pair for pair in self.among or every if pair not in chosen]
            ranked = sorted(left, key=lambda pair, so_far=chosen: (-objective((*so_far, pair)), pair))  # type: ignore[misc]
            chosen += tuple(ranked[: self.each])
        return replace(self, heads=chosen)

    @staticmethod
    @torch.no_grad()
    def _read(context: FitContext, stack: Stack, pairs: list[tuple[Tensor, dict[str, Any]]]) -> list[Tensor]:
        with context.attach(stack) as run:
            return [next_logits(run, inputs) for _, inputs in pairs]


if __name__ == "__main__":
    from heedful import decode, fit, models

    model, tokenizer, _ = models.default()
    shown = tokenizer("lemon: river\nstone: candle\ntiger: window\nstone:", return_tensors="pt")
    target = torch.tensor([tokenizer(" candle").input_ids[0]])
    among = tuple((layer, head) for layer in (10, 20) for head in range(0, 9, 3))
    method = fit(SoftPAG(rounds=1, among=among), model, [{**shown, "target": target}])
    print(method.heads)
    asked = Prompt(tuple(tokenizer("glove: planet\nhouse: music\nriver: coffee\nhouse:").input_ids))
    print(tokenizer.decode(decode(model, asked, method, new_tokens=3)))
