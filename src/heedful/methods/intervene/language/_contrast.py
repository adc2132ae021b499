"""What methods that steer by a contrast share: what is seen of texts with a trait, and of texts without it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.method import Method, Stack
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Mean
from heedful.kit.batches import Batch
from heedful.kit.seeds import seed_of

TEXTS = "to texts with and without the trait"  # what is fitted


class _LastHeads(Method):
    """What each head hands over at each text's last token, `[b h d]`."""

    @reads(Site.HEAD_OUTPUT)
    def read(self, heads: Tensor, call: Call) -> Cat:
        b, h, _, d = heads.shape
        return Cat.of("end", heads.double().gather(2, call.last[:, None, :, None].expand(b, h, 1, d))[:, :, 0])


class _LastStates(Method):
    """The residual stream at each text's last token, `[b e]`."""

    @reads(Site.RESIDUAL)
    def read(self, stream: Tensor, call: Call) -> Cat:
        b, _, e = stream.shape
        return Cat.of("end", stream.double().gather(1, call.last[..., None].expand(b, 1, e))[:, 0])


_ENDS: dict[Site, Method] = {Site.HEAD_OUTPUT: _LastHeads(), Site.RESIDUAL: _LastStates()}


@dataclass(frozen=True, eq=False)
class Contrast:
    """One layer's ends of texts, in the order in which they were read."""

    trait: Tensor  # [texts ...]
    other: Tensor  # [texts ...]

    @property
    def difference(self) -> Tensor:
        """The mean over texts with the trait, less the mean over the others."""
        return self.trait.mean(0) - self.other.mean(0)


def contrast(
    owner: object, context: FitContext, site: Site, batches: Iterable[Batch], paired: bool = False
) -> dict[int, Contrast]:
    """By layer, what texts end in at a site, of batches with "positive", a bool for the batch or `[b]`.

    Where they are `paired`, the first text with the trait goes with the first without, and so on.
    """
    reader = _ENDS[site]
    found: dict[int, list[Tensor]] = {}
    marks: list[Tensor] = []
    for batch in batches:
        inputs: dict[str, Any] = dict(batch)
        positive = _marks(owner, inputs).bool()
        with torch.no_grad(), context.attach(reader) as run:
            run(**inputs)
            for layer, kept in run[reader].items():
                found.setdefault(layer, []).append(kept.value[0])
        marks.append(positive.expand(len(next(iter(found.values()))[-1])))
    with_it = torch.cat(marks) if marks else torch.zeros(0, dtype=torch.bool)
    counts = int(with_it.sum()), int((~with_it).sum())
    if 0 in counts:
        raise _one_sided(owner, len(marks))
    if paired and counts[0] != counts[1]:
        raise FieldError(owner, "batches", counts, "must hold a text without the trait for each one with it", (8, 8))
    joined = {layer: torch.cat(each) for layer, each in found.items()}
    return {layer: Contrast(x[with_it.to(x.device)], x[~with_it.to(x.device)]) for layer, x in joined.items()}


class _ClassHeads(Method):
    """The mean of what each head hands to the output projection, for each class of texts."""

    share: Fitted  # "tokens" [2 b n]: what each token weighs in its text's mean, by class

    @reads(Site.HEAD_OUTPUT)
    def read(self, heads: Tensor, call: Call) -> Mean:
        share = self.share["tokens"].to(heads)
        return Mean.of(torch.einsum("cbn,bhnd->chd", share, heads), share.sum((1, 2))[:, None, None])


class _ClassOutputs(Method):
    """The mean of the attention block's output, for each class of texts."""

    share: Fitted

    @reads(Site.OUTPUT)
    def read(self, output: Tensor, call: Call) -> Mean:
        share = self.share["tokens"].to(output)
        return Mean.of(torch.einsum("cbn,bne->ce", share, output), share.sum((1, 2))[:, None])


_MEANS = {Site.HEAD_OUTPUT: _ClassHeads, Site.OUTPUT: _ClassOutputs}


def class_means(
    owner: object, context: FitContext, sites: tuple[Site, ...], batches: Iterable[Batch]
) -> dict[Site, dict[int, Tensor]]:
    """By site and layer `[2 ...]`: the mean over each text's tokens, then over texts, those without the trait first.

    Batches have "positive", a bool for the batch or `[b]`, and, if only some tokens count, "response", bool `[b n]`.
    """
    found: dict[Site, dict[int, Mean]] = {site: {} for site in sites}
    for batch in batches:
        inputs = dict(batch)
        share = Fitted({"tokens": _shares(owner, inputs)})
        parts = {site: _MEANS[site](share) for site in sites}
        with torch.no_grad(), context.attach(Stack(tuple(parts.values()))) as run:
            run(**inputs)
            for site, part in parts.items():
                for layer, mean in run[part].items():
                    found[site][layer] = found[site][layer] + mean if layer in found[site] else mean
    means = [mean for layers in found.values() for mean in layers.values()]
    if not means or any(bool((mean.count == 0).any()) for mean in means):
        raise _one_sided(owner, len(means))
    return {site: {layer: mean.value for layer, mean in layers.items()} for site, layers in found.items()}


def _shares(owner: object, inputs: dict[str, Any]) -> Tensor:
    """Each token's weight in its text's mean, `[2 b n]`, other texts first; takes what is ours out of the inputs."""
    positive, marked = _marks(owner, inputs), inputs.pop("response", None)
    ids = inputs["input_ids"]
    tokens = inputs.get("attention_mask", torch.ones_like(ids)) if marked is None else marked
    tokens = tokens.to(ids.device, torch.float64)
    share = tokens / tokens.sum(-1, keepdim=True).clamp(min=1)
    positive = positive.to(ids.device, torch.float64)[:, None].expand(len(ids), 1)
    return torch.stack([share * (1 - positive), share * positive])


def _marks(owner: object, inputs: dict[str, Any]) -> Tensor:
    """Which of a batch's texts have the trait, `[b|1]`; taken out of the inputs."""
    if "positive" not in inputs:
        raise FieldError(owner, "batches", sorted(inputs), "need 'positive' in each", {"positive": True})
    return torch.as_tensor(inputs.pop("positive")).reshape(-1)


def _one_sided(owner: object, count: int) -> FieldError:
    return FieldError(owner, "batches", count, "must hold positive and other texts", {"positive": True})


class AddsVector(Method, abstract=True):
    """Adds a vector of each layer to whatever it acts on: of a fit, or a random one."""

    strength: float = 1.0  # factor on the vector; below 0 it turns the other way
    vectors: Fitted | None = None  # "v.LAYER" [e], from a fit
    seed: int | None = None  # draw random vectors in place of fitted ones: the control that any steering needs

    @classmethod
    def neutral(cls) -> Self:
        return cls(strength=0.0)

    @classmethod
    def example(cls) -> Self:
        return cls(seed=0)

    def idle(self, call: Call) -> bool:
        return self.strength == 0

    def added(self, layer: int, width: int) -> Tensor:
        """What is added in a layer, `[e]`."""
        if self.vectors is None:
            random = torch.Generator().manual_seed(1_000_003 * seed_of(self, "vectors", TEXTS) + layer)
            return self.strength * torch.randn(width, generator=random)
        found = self.vectors.get(f"v.{layer}")
        if found is None or found.shape != (width,):
            rule = f"have no vector of width {width} for layer {layer}: fit to this model"
            raise FieldError(
                self, "vectors", self.vectors, rule, f"heedful.fit({type(self).__name__}(), model, batches)"
            )
        return self.strength * found
