"""strong + w (strong - weak) of what is predicted; in the weak run chosen heads have (1 - u) A + u I for a map A."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext
from heedful.core.errors import FieldError
from heedful.core.kinds.decode import NOTHING_READ, Decode, Read
from heedful.core.kinds.tokens import Prompt
from heedful.core.method import Method, Stack
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt, Share
from heedful.core.sites import Site, at
from heedful.kit.head_search import Head
from heedful.methods.intervene.language._task import next_logits

_PAPER = Paper(
    "P040",
    "Where and How to Perturb: On the Design of Perturbation Guidance in Diffusion and Flow Models",
    "Donghoon Ahn, Jiwon Kang, Sanghyun Lee, Minjae Kim, Wooseok Jang, Jaewon Min, Sangwu Lee, Sayak Paul, Susung "
    "Hong, Seungryong Kim",
    2025,
    "2506.10978",
    "NeurIPS 2025",
    differs=(
        "The authors search with u at 1, and soften afterwards; here a search has the u of the method.",
        "A fit has a language model's answers for its objective, and next-token logits are guided, which the authors "
        "do not try.",
        "No pipeline is here that draws: `heedful.compare` guides each step of a scene so; whoever else samples from a "
        "diffusion model runs both `variants` in each step and has `combine` join what they predict.",
        "Cross-attention, which the authors' models have not, is left alone: there no token has itself among the keys.",
    ),
)


class _TowardsSelf(Method):
    """Maps on their way to identity: every token looks at itself."""

    u: float = 1.0

    def idle(self, call: Call) -> bool:
        return call.cross

    @at(Site.PATTERN)
    def mix(self, pattern: Tensor, call: Call) -> Tensor:
        own = (call.pairs.q_index == call.pairs.k_index).to(pattern)
        return (1 - self.u) * pattern + self.u * own


Heads = tuple[Head, ...]


class SoftPAG(Decode):
    """Guides away from what the model would say, or draw, with some heads looking at nothing but their own token.

    `variants` names the two runs of each step, and `combine` joins what they predict: next-token logits, or the noise
    or flow of a diffusion model. `hunt` is the paper's HeadHunter: round by round the heads join whose perturbation
    serves an objective best. `fit` hunts by how likely the answers in "target" become, the first tokens `[b]` of what
    should follow the batch's texts.
    """

    paper = _PAPER
    denoises = True
    heads: tuple[Head, ...] = ()  # (layer, head) pairs to perturb; none: every head
    u: Share = 0.5  # how far towards identity, 0 to 1; 1 is the older PAG; the authors find the best below 1
    w: float = 1.0  # how much of the difference is added; 0 changes nothing; the authors' code: 3
    rounds: PositiveInt = 3  # of a hunt; the authors: 5 for a style, 1 for quality
    each: PositiveInt = 1  # heads that a round takes; the authors: 3 and 24 of 576
    among: tuple[Head, ...] = ()  # heads that may be taken; none: every head, one forward of a fit for each and round

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
        return strong if 0 in (self.u, self.w) else strong + self.w * (strong - weak)

    def _weak(self, heads: Heads) -> Stack:
        if self.u == 0:
            return Stack()
        part = _TowardsSelf(self.u)
        layers = sorted({layer for layer, _ in heads})
        return Stack(tuple(part.on(i, [h for layer, h in heads if layer == i]) for i in layers) or (part,))

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> SoftPAG:
        found = [dict(batch) for batch in batches]
        if not found or any("target" not in batch for batch in found):
            raise FieldError(self, "batches", len(found), 'must be 1 or more, each with "target"', [{"target": "ids"}])
        pairs = [(batch.pop("target"), batch) for batch in found]
        strong = self._read(context, Stack(), pairs)

        def objective(method: SoftPAG) -> float:
            """The mean log-probability of the answers, guided away from its heads' perturbation."""
            weak = self._read(context, method._weak(method.heads), pairs)
            guided = [self.combine({"strong": a, "weak": b}) for a, b in zip(strong, weak, strict=True)]
            each = [x.log_softmax(-1).gather(-1, t[:, None]) for (t, _), x in zip(pairs, guided, strict=True)]
            return float(torch.cat(each).mean())

        every = tuple((layer.number, head) for layer in context.layers for head in range(layer.heads))
        return replace(self, heads=replace(self, among=self.among or every).hunt(objective).heads)

    def hunt(self, objective: Callable[[SoftPAG], float]) -> SoftPAG:
        """The same with the heads `among` those named that serve an objective best: the more it gives, the better.

        The objective is handed the method with one more head at a time, and says how good what comes of it is.
        """
        wanted = self.rounds * self.each
        if len(set(self.among)) < wanted:
            good = tuple((0, head) for head in range(wanted))
            raise FieldError(self, "among", self.among, f"must name {wanted} heads or more to choose from", good)
        chosen: Heads = ()
        for _ in range(self.rounds):
            left = [pair for pair in self.among if pair not in chosen]
            found = {pair: objective(replace(self, heads=(*chosen, pair))) for pair in left}
            chosen += tuple(sorted(left, key=lambda pair, found=found: (-found[pair], pair))[: self.each])  # type: ignore[misc]
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
