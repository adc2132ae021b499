"""A <- r_h A for marked words in head h of cross-attention; r counts how often a concept's words won the head's eye."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import RoleName
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Sum
from heedful.kit.batches import read
from heedful.kit.head_search import Head


class HRV(Method):
    """Rescales marked words' cross-attention, head by head, by how relevant each head is to a concept.

    `fit` takes one batch for each forward of a denoiser, with "roles" that mark a word of each concept among the keys:
    words put behind those of the prompt, which the picture does not see. Every forward counts once in each head.
    Without a fit the words' maps are multiplied with `factor` in every head: `HRV().on(layers=2, heads=[0, 3])` is the
    weakening by which the authors try the order of the heads.
    """

    paper = Paper(
        "P271",
        "Cross-Attention Head Position Patterns Can Align with Human Visual Concepts in Text-to-Image Generative "
        "Models",
        "Jungwon Park, Jungmin Ko, Dongnam Byun, Jangwon Suh, Wonjong Rhee",
        2024,
        "2412.02237",
        differs=(
            "Words of concepts compete with each other alone; in the authors' code the token that starts a text is "
            "among them, which they say is not needed.",
            "The authors have 34 concepts of 10 words, drawn anew in each layer; here a batch's words hold for all.",
            "With guidance by a text and by none, both halves of a batch are counted and rescaled alike: the authors' "
            "half with the text alone does so if the words are marked there only, with roles row by row.",
            "Rescaling in prompt-to-prompt's second branch and in attend-and-excite's loss is not here.",
        ),
    )
    subjects = ("cross",)
    role: RoleName = "marked"  # the words whose maps are rescaled
    factor: float = -2.0  # on their maps in every head, without a fit; the authors' weakening: -2
    concept: str = ""  # whose relevance rescales; with `relevance`
    against: str = ""  # the concept that is not meant: factors are twice those of `concept` less these; none: ""
    relevance: Fitted | None = None  # <concept>.<layer> [h], from a fit: 1 on average over all heads

    def __post_init__(self) -> None:
        known = {name.rpartition(".")[0] for name in self.relevance or ()}
        for name in ("concept", "against"):
            if self.relevance is not None and (name == "concept" or self.against) and getattr(self, name) not in known:
                raise FieldError(self, name, getattr(self, name), f"must be one of {sorted(known)}", min(known))

    @classmethod
    def neutral(cls) -> HRV:
        return cls(factor=1.0)

    def idle(self, call: Call) -> bool:
        return not call.cross or (self.relevance is None and self.factor == 1)

    @at(Site.PATTERN)
    def rescale(self, pattern: Tensor, call: Call) -> Tensor:
        factor = torch.as_tensor(self.factors(call.layer, call.heads)).to(pattern)[..., None, None]
        words = call.spread(call.marked(self.role))[:, :, None]
        return torch.where(words, factor * pattern, pattern)

    def factors(self, layer: int, heads: int) -> Tensor | float:
        """What the words' maps are multiplied with in a layer's heads, `[h]` or one for all."""
        if self.relevance is None:
            return self.factor
        found = self.relevance.get(f"{self.concept}.{layer}")
        if found is None or found.shape != (heads,):
            rule = f"was fitted to another model; this one attends to words in layer {layer} with {heads} heads"
            raise FieldError(self, "relevance", self.relevance, rule, "heedful.fit(HRV(), model, batches)")
        return 2 * found - self.relevance[f"{self.against}.{layer}"] if self.against else found

    def order(self) -> tuple[Head, ...]:
        """All heads of cross-attention, the most relevant to the concept first."""
        if self.relevance is None:
            raise FieldError(self, "relevance", None, "must be there", "heedful.fit(HRV(), model, batches)")
        mine = {name: x for name, x in self.relevance.items() if name.rpartition(".")[0] == self.concept}
        each = {(int(name.rpartition(".")[2]), h): float(r) for name, x in mine.items() for h, r in enumerate(x)}
        return tuple(sorted(each, key=lambda head: (-each[head], head)))

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> HRV:
        """Each concept's wins in each head, as shares of all heads' wins times how many heads there are."""
        found = list(batches)
        concepts = tuple(found[0].get("roles", ())) if found else ()
        if len(concepts) < 2 or any(tuple(batch.get("roles", ())) != concepts for batch in found):
            rule = 'must be 1 or more, each with "roles" that mark a word of each of the same concepts, 2 or more'
            good = [{"roles": {"colour": ((5, 6),), "shape": ((6, 7),)}}]
            raise FieldError(self, "batches", len(found), rule, good)
        if self.concept not in concepts:
            raise FieldError(self, "concept", self.concept, f"must be one of {list(concepts)}", concepts[0])
        counted: dict[int, Tensor] = read(context, _Wins(concepts), found)
        share = torch.cat(list(counted.values()))  # [all heads, concepts]; a head has as many wins as any other
        if never := [name for name, won in zip(concepts, share.sum(0), strict=True) if not won]:
            rule = f"words of {never} never won in any head: give more batches, or other words"
            raise FieldError(self, "batches", len(found), rule, 2 * len(found))
        relevance = {
            f"{name}.{layer}": (won[:, i] / share[:, i].sum() * len(share)).float()
            for layer, won in counted.items()
            for i, name in enumerate(concepts)
        }
        return replace(self, relevance=Fitted(relevance))


class _Wins(Method):
    """Which concept's words a head looks at most in the mean over a picture, counted; nobody sees the words."""

    concepts: tuple[str, ...]

    def idle(self, call: Call) -> bool:
        return not call.cross

    def words(self, call: Call) -> Tensor:
        """Which keys are a concept's, `[c b|1 h 1 k]`."""
        return torch.stack([call.spread(call.marked(name)) for name in self.concepts])[:, :, :, None]

    @reads(Site.SCORES)
    def look(self, scores: Tensor, call: Call) -> Sum:
        words = self.words(call)
        weights = scores.double().masked_fill(~words.any(0), -torch.inf).softmax(-1)
        each = (weights * words).sum(-1) / words.sum(-1)  # [c b h r]
        return Sum.of((each * call.is_text).sum(-1).permute(1, 2, 0))

    def finish(self, statistic: Any, call: Call) -> Sum:
        won = torch.nn.functional.one_hot(statistic.value.argmax(-1), len(self.concepts))
        return Sum.of(won.sum(0))  # [h c]

    @at(Site.PATTERN)
    def hide(self, pattern: Tensor, call: Call) -> Tensor:
        kept = pattern.masked_fill(self.words(call).any(0), 0.0)
        return kept / kept.sum(-1, keepdim=True)

    def answer(self, readings: Readings) -> dict[int, Tensor]:
        return {layer: stat.value for layer, stat in readings.items()}


if __name__ == "__main__":
    from heedful import attach, fit, models

    model = models.tiny("bart")
    ids = torch.randint(3, 60, (4, 12))
    words = {"beginnings": ((0, 1),), "ends": ((11, 12),)}
    found = fit(HRV(concept="ends"), model, [{"input_ids": ids, "decoder_input_ids": ids, "roles": words}])
    print(found.order())
    with attach(model, HRV().on(*found.order()[0]), roles={"marked": words["ends"]}) as run:
        print(run.difference(input_ids=ids, decoder_input_ids=ids))
