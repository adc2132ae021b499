"""Each of the k best heads votes for argmax_c cos(h, m_c): h its output at the end, m_c its mean over a class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from heedful.core.call import Call, Phase
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Statistic
from heedful.kit.head_search import Head, heads_here
from heedful.kit.seeds import drawn_for


@dataclass(frozen=True, eq=False)
class Votes:
    """What the heads say of each text, in the order in which texts were read."""

    heads: tuple[Head, ...]  # the best first
    each: Tensor = field(repr=False)  # [texts heads]: the class that each votes for

    @property
    def classes(self) -> Tensor:
        """What most say, `[texts]`; of equally many the class whose best head is better."""
        same = self.each[:, :, None] == self.each[:, None]  # [texts heads heads]
        return self.each.gather(1, same.sum(-1).argmax(1, keepdim=True))[:, 0]

    def __str__(self) -> str:
        return f"{len(self.heads)} heads vote for the classes {self.classes.tolist()}"


class SparseAttentionVectors(Method):
    """Names classes by the outputs of a few heads, chosen by a few examples of each; nothing is trained.

    `fit` takes batches with "label" `[b]`, classes counted from 0, beside the model's input. A text is read at its last
    token, an image at its class token.
    """

    paper = Paper(
        "P232",
        "Sparse Attention Vectors: Generative Multimodal Model Features Are Discriminative Vision-Language Classifiers",
        "Chancharik Mitra, Brandon Huang, Tianning Chai, Zhiqiu Lin, Assaf Arbelle, Rogerio Feris, Leonid Karlinsky, "
        "Trevor Darrell, Deva Ramanan, Roei Herzig",
        2025,
        "2412.00142",
        "ICCV 2025",
        differs=(
            "Of heads that name as many examples rightly the earlier ones are kept; the authors leave it to a sort.",
            "The class token of an image stands for the last token; the authors have generative models alone.",
            "Nothing is voted for while a text is written.",
        ),
    )
    one_text = True
    chunk_invariant = False  # in a text that is read in pieces the end of each piece would vote
    count: PositiveInt = 20  # heads that vote; the authors: 20
    heads: tuple[Head, ...] = ()  # (layer, head) pairs from a fit, the best first
    centroids: Fitted | None = None  # c.<layer> [classes heads d] of these heads, in their order
    seed: int | None = None  # without a fit: random centroids of two classes in every head

    @classmethod
    def example(cls) -> SparseAttentionVectors:
        return cls(seed=0)

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE or (bool(self.heads) and not heads_here(self, self.heads, call))

    @reads(Site.HEAD_OUTPUT)
    def vote(self, heads: Tensor, call: Call) -> Statistic:
        mine = heads_here(self, self.heads, call) or list(range(heads.shape[1]))
        ends = normalize(_ends(heads, call)[:, mine], dim=-1)  # [b k d]
        centroids = normalize(self._centroids(call.layer, len(mine), ends.shape[-1]).to(ends), dim=-1)
        return Cat.of(f"{call.forward:06d}", torch.einsum("bkd,ckd->bck", ends, centroids).argmax(1))

    def _centroids(self, layer: int, heads: int, width: int) -> Tensor:
        if self.centroids is None:
            return torch.randn(2, heads, width, generator=drawn_for(self, "centroids", layer))
        found = self.centroids.get(f"c.{layer}")
        if found is None or found.shape[1:] != (heads, width):
            rule = f"were fitted to another model: [classes, {heads}, {width}] is needed in layer {layer}"
            raise FieldError(self, "centroids", self.centroids, rule, "a fit to this model")
        return found

    def answer(self, readings: Readings) -> Votes:
        votes = {layer: torch.cat(stat.value) for layer, stat in readings.items()}
        found = {
            (layer, head): row
            for layer, x in votes.items()
            for head, row in zip(
                [head for at, head in self.heads if at == layer] or range(x.shape[1]), x.T, strict=True
            )
        }
        heads = self.heads or tuple(found)
        return Votes(heads, torch.stack([found[head] for head in heads], 1))

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> SparseAttentionVectors:
        """Centroids of every head, and the heads whose own examples lie nearest to the right one."""
        labels: list[int] = []
        part = _Ends()
        with torch.no_grad(), context.attach(part) as run:
            for batch in batches:
                if "label" not in batch:
                    raise FieldError(self, "batches", sorted(batch), 'must have "label" [b]', [{"label": "..."}])
                labels += torch.as_tensor(batch["label"]).tolist()
                run(**{name: x for name, x in batch.items() if name != "label"})
            classes = sorted(set(labels))
            if classes != list(range(max(2, len(classes)))):
                rule = "must hold examples of two classes or more, counted from 0 without a gap"
                raise FieldError(self, "batches", classes, rule, [{"label": [0, 1]}])
            ends = {layer: torch.cat(stat.value) for layer, stat in run[part].items()}  # [n h d]
        label = torch.tensor(labels)
        means = {layer: torch.stack([x[label == c].mean(0) for c in classes]) for layer, x in ends.items()}
        ranked = []
        for layer, x in ends.items():
            near = torch.einsum("nhd,chd->nch", normalize(x, dim=-1), normalize(means[layer], dim=-1)).argmax(1)
            right = (near == label.to(near.device)[:, None]).sum(0)
            ranked += [(-n, layer, head) for head, n in enumerate(right.tolist())]
        heads = tuple((layer, head) for _, layer, head in sorted(ranked)[: self.count])
        kept = {layer: [head for at, head in heads if at == layer] for layer in {layer for layer, _ in heads}}
        centroids = {f"c.{layer}": means[layer][:, mine] for layer, mine in kept.items()}
        return replace(self, heads=heads, centroids=Fitted(centroids))


class _Ends(Method):
    """Each head's output where a text ends, `[b h d]`."""

    @reads(Site.HEAD_OUTPUT)
    def end(self, heads: Tensor, call: Call) -> Statistic:
        return Cat.of(f"{call.forward:06d}", _ends(heads, call).float())


def _ends(heads: Tensor, call: Call) -> Tensor:
    """Of `[b h q d]` what stands at the class token of an image, or at a text's last token, `[b h d]`."""
    row = call.marked_queries("cls")[:, 0].int().argmax(-1, keepdim=True) if "cls" in call.roles else call.last
    b, h, _, d = heads.shape
    return heads.gather(2, row[:, :, None, None].expand(b, h, 1, d))[:, :, 0]


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    tokenizer.padding_side = "left"
    animals, tools = ["dog", "horse", "sheep", "goat"], ["hammer", "saw", "drill", "wrench"]
    shown = tokenizer([f"A {word} is" for word in animals[:3] + tools[:3]], return_tensors="pt", padding=True)
    method = fit(SparseAttentionVectors(), model, [{**shown, "label": [0, 0, 0, 1, 1, 1]}])
    with attach(model, method) as run:
        run(**tokenizer([f"A {word} is" for word in (animals[3], tools[3])], return_tensors="pt", padding=True))
        print(run[method])
