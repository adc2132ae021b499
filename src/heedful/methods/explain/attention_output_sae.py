"""x' = a D + c with a = relu((x - c) E + e), x being all heads of a layer; fitted to |x' - x|^2 + penalty * sum a."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError
from heedful.core.figures import Description, Finding, HeadMap, Listing, head_name, percent
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Mean, Statistic
from heedful.kit.batches import at_least_one, read
from heedful.kit.seeds import seed_of

RANDOM_FEATURES = 32  # that a seed alone draws
SHOWN = 20  # strongest features to list
NAMES = ("encoder", "decoder", "bias", "center")


@dataclass(frozen=True, eq=False)
class Features:
    """What the features of one layer's heads did on a text."""

    layer: int
    rate: Tensor  # [m] share of the tokens at which each fired
    strength: Tensor  # [m] mean activation, silent tokens and all
    by_head: Tensor  # [m h] what each head gave of that; the rest is the feature's bias
    lost: float  # squared length that the features together leave out, as a share of all

    @property
    def at_once(self) -> float:
        """How many features fire at a token, on average."""
        return float(self.rate.sum())

    def __str__(self) -> str:
        return f"{self.at_once:.1f} of {len(self.rate)} features at a token, {percent(self.lost)} of the heads lost"


class AttentionOutputSAE(Method):
    """Which features all heads of one layer hand over together, from a sparse autoencoder: a `Features`.

    `heedful.fit(AttentionOutputSAE(layer), model, batches)` learns it from texts, whose heads it holds in memory. A
    model runs on what features keep under `edit(Site.HEAD_OUTPUT, lambda x, call: sae.through(x)).on(layers=layer)`.
    """

    paper = Paper(
        "P289",
        "Interpreting Attention Layer Outputs with Sparse Autoencoders",
        "Connor Kissane, Robert Krzyzanowski, Joseph Isaac Bloom, Arthur Conmy, Neel Nanda",
        2024,
        "2406.17759",
        differs=(
            "Features that never fire are not drawn anew, and the rate neither warms up nor falls.",
            "What tokens a feature comes from (weights times values) is not here, nor the circuits traced with it.",
            "Texts are read before the training and shuffled in each pass; the authors' code streams a hundred million "
            "tokens.",
        ),
    )
    layer: NonNegativeInt = 0  # the layer whose heads are looked at
    widen: PositiveInt = 32  # features for each dimension of all heads; the authors' code: 32
    # on the sum of activations, by layer and model; the authors' code for GPT-2's layer 7: 0.5
    penalty: NonNegativeFloat = 0.5
    rate: PositiveFloat = 1.2e-3  # Adam's learning rate; the authors' code: 0.0012
    tokens: PositiveInt = 4096  # in a step; the authors' code: 4096
    epochs: PositiveInt = 1  # passes over the texts; the authors' code: 1
    sae: Fitted | None = None  # "encoder" [h d m], "decoder" [m h d], "bias" [m] and "center" [h d], from a fit
    seed: int | None = None  # of a fit, 0 unless given; without a fit: random features

    @classmethod
    def example(cls) -> AttentionOutputSAE:
        return cls(seed=0)

    def idle(self, call: Call) -> bool:
        return call.layer != self.layer

    def features(self, heads: Tensor) -> Tensor:
        """How strongly each feature fires, `[b n m]`, given all heads `[b h n d]`."""
        encoder, _, bias, center = self._maps(heads)
        return (torch.einsum("bhnd,hdm->bnm", heads - center[:, None], encoder) + bias).relu()

    def through(self, heads: Tensor) -> Tensor:
        """What the features keep of all heads, `[b h n d]`."""
        _, decoder, _, center = self._maps(heads)
        return torch.einsum("bnm,mhd->bhnd", self.features(heads), decoder) + center[:, None]

    def _maps(self, heads: Tensor) -> list[Tensor]:
        _, h, _, d = heads.shape
        if self.sae is not None:
            found = [self.sae[name].to(heads) for name in NAMES]
        else:
            found = [x.to(heads) for x in _start(h, d, RANDOM_FEATURES, seed_of(self, "sae"))]
        if found[0].shape[:2] != (h, d):
            rule = f"must be fitted to all heads of the layer, {h} of width {d} here, without .on(heads=...)"
            raise FieldError(self, "sae", self.sae, rule, "a fit to this model")
        return found

    @reads(Site.HEAD_OUTPUT)
    def look(self, heads: Tensor, call: Call) -> Statistic:
        x = heads.detach()
        is_text = call.is_text[:, 0].expand(len(x), -1)
        encoder, _, _, center = self._maps(x)
        fired = self.features(x)[is_text].double()  # [t m]
        error, x = ((y.transpose(1, 2)[is_text]).double() for y in (self.through(x) - x, x))  # [t h d]
        parts = torch.einsum("thd,hdm->htm", x - center, encoder.double())
        each = torch.stack([(fired > 0).double().sum(0), fired.sum(0), *(parts * (fired > 0)).sum(1)], -1)  # [m 2+h]
        whole = torch.zeros_like(each[:1])
        whole[0, 0], whole[0, 1] = error.square().sum(), x.square().sum()
        return Mean.of(torch.cat([each, whole]), float(len(x)))

    def answer(self, readings: Readings) -> Features:
        layer, stat = next(iter(readings.items()))
        each, (error, size, *_) = stat.value[:-1], stat.value[-1].tolist()
        return Features(layer, each[:, 0], each[:, 1], each[:, 2:], error / size)

    def describe(self, answer: Features) -> Description:
        alive = answer.rate > 0
        most = answer.by_head.argmax(1)  # the head that gives most of each feature
        counts = torch.stack([(alive & (most == h)).sum() for h in range(answer.by_head.shape[1])]).double()
        shares = counts / alive.sum().clamp(min=1)
        what = (
            "The share of the features that fired of which each head gives most; heads of many features do many things."
        )
        loudest = answer.strength.argsort(descending=True)[:SHOWN].tolist()
        rows = [
            (i, percent(float(answer.rate[i])), f"{answer.strength[i]:.3f}", head_name(answer.layer, int(most[i])))
            for i in loudest
            if alive[i]
        ]
        listing = Listing(
            "features", "Strongest features of the heads",
            "Features that are most active on this text, how often they fire, and the head that gives most of each.",
            ("feature", "fires", "mean activation", "most from"), rows,
        )  # fmt: skip
        text = (
            f"In layer {answer.layer} {int(alive.sum())} of {len(alive)} features fire, {answer.at_once:.1f} at a "
            f"token, and keep {percent(1 - answer.lost)} of the heads' squared length; {int((counts > 1).sum())} of "
            f"{len(counts)} heads give most of more than one."
        )
        values = HeadMap("features-heads", "Features of each head", what, [answer.layer], shares[None], low=0, high=1)
        return Description((values, listing), findings=(Finding(text, 0.3),))

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> AttentionOutputSAE:
        """Features learned from all tokens of the model's inputs in `batches`."""
        if self.layer >= len(context.layers):
            raise FieldError(self, "layer", self.layer, f"must be below {len(context.layers)}", len(context.layers) - 1)
        x = torch.cat(read(context, _Kept().on(layers=self.layer), at_least_one(self, batches)))
        h, d = x.shape[1:]
        seed = self.seed or 0
        maps = [p.to(x.device).requires_grad_() for p in _start(h, d, self.widen * h * d, seed)]
        encoder, decoder, bias, center = maps
        optimiser = torch.optim.Adam(maps, lr=self.rate, betas=(0.0, 0.9999))
        draw = torch.Generator().manual_seed(seed)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(x), generator=draw).split(self.tokens):
                given = x[rows.to(x.device)]
                fired = (torch.einsum("thd,hdm->tm", given - center, encoder) + bias).relu()
                error = torch.einsum("tm,mhd->thd", fired, decoder) + center - given
                loss = (error.square().sum((1, 2)) + self.penalty * fired.sum(1)).mean()
                optimiser.zero_grad()
                loss.backward()
                with torch.no_grad():  # decoder rows stay as long as they are: 1, before each step
                    decoder /= _length(decoder)
                    slope: Tensor = decoder.grad  # type: ignore[assignment]
                    slope -= (slope * decoder).sum((1, 2), keepdim=True) * decoder
                optimiser.step()
        return replace(self, sae=Fitted(dict(zip(NAMES, maps, strict=True))))


def _length(decoder: Tensor) -> Tensor:
    return decoder.flatten(1).norm(dim=1)[:, None, None]


def _start(h: int, d: int, m: int, seed: int) -> list[Tensor]:
    """Fresh maps: uniform to Kaiming's bound as the authors draw them, decoder rows of length 1."""
    draw = torch.Generator().manual_seed(seed)
    encoder = (2 * torch.rand(h, d, m, generator=draw) - 1) * (6 / m) ** 0.5
    decoder = 2 * torch.rand(m, h, d, generator=draw) - 1
    return [encoder, decoder / _length(decoder), torch.zeros(m), torch.zeros(h, d)]


class _Kept(Method):
    """Heads of one layer at all tokens that are no padding, `[t h d]` a forward."""

    @reads(Site.HEAD_OUTPUT)
    def keep(self, heads: Tensor, call: Call) -> Statistic:
        is_text = call.is_text[:, 0].expand(len(heads), -1)
        return Cat.of(f"{call.forward:06d}", heads.transpose(1, 2)[is_text].float())

    def answer(self, readings: Readings) -> list[Tensor]:
        return next(iter(readings.values())).value


if __name__ == "__main__":
    from pydoc_data.topics import topics

    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    texts = [tokenizer(text[:2000], return_tensors="pt") for _, text in sorted(topics.items())[:9]]
    sae = fit(AttentionOutputSAE(20, widen=1, tokens=256, epochs=5), model, texts[1:])
    with torch.no_grad(), attach(model, sae) as run:
        run(**texts[0])
    print(run[sae])
