"""code = argmax relu((o - c) E + e) of what each head writes on average, o; score = codes of positives alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from heedful.core.call import Call, Phase
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError
from heedful.core.figures import Description, Finding, Head, HeadMap, Role, head_name
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Statistic
from heedful.kit.seeds import seed_of

RANDOM_FEATURES, FIRST = 16, 10  # features that a seed alone draws; heads that a role names


@dataclass(frozen=True, eq=False)
class Codes:
    """What each head did in each text, as one number; layers are in the order of `layers`."""

    layers: tuple[int, ...]
    codes: Tensor = field(repr=False)  # [texts layers h]; -1 where a layer has no such head
    scores: Tensor = field(repr=False)  # [layers h], of the fit's examples; nan without one

    @property
    def ranked(self) -> dict[Head, float]:
        """Heads by how many codes positive examples alone have, most first."""
        there = (~self.scores.isnan()).nonzero().tolist()
        each = {(self.layers[n], h): float(self.scores[n, h]) for n, h in there}
        return dict(sorted(each.items(), key=lambda head: -head[1]))

    def __str__(self) -> str:
        top = ", ".join(f"{head_name(*head)} {score:.0f}" for head, score in list(self.ranked.items())[:FIRST])
        return f"codes of {len(self.codes)} texts; codes of positive examples alone, by head {top or 'none'}"


class CircuitCodes(Method):
    """Which heads take part in a task, from a few examples that a model can do and a few that it cannot, in seconds.

    `fit` takes batches with "positive" `[b]` beside the model's input; `run[method]` has the codes of what was read,
    and for each head its score.
    """

    paper = Paper(
        "P061",
        "Sparse Autoencoders Enable Scalable and Reliable Circuit Identification in Language Models",
        "Charles O'Neill, Thang Bui",
        2024,
        "2405.12522",
        differs=(
            "Written from the authors' code, their full text not being at hand.",
            "The autoencoder learns from all examples that are given, and codes are counted on these; the authors' "
            "learns from ten of the five hundred whose codes they count.",
            "No threshold says from where on a head is of the circuit, as the authors draw the curve over all of them. "
            "Their feed-forward parts, and pairs of heads, a circuit's edges, are not here.",
        ),
    )
    one_text = True
    chunk_invariant = False  # in a text that is read in pieces each piece would have a code
    features: Annotated[int, Ge(2)] = 200  # the authors' code: 200
    # on the sum of activations; the authors' code: 0.02, and 0.05 for one of three tasks
    penalty: NonNegativeFloat = 0.02
    rate: PositiveFloat = 1e-3  # Adam's learning rate; the authors' code: 0.001
    steps: PositiveInt = 500  # each on all examples; the authors' code: 500
    sae: Fitted | None = None  # "encoder.<layer>" [h d m], "bias" [m], and "scores.<layer>" [h], from a fit
    seed: int | None = None  # of a fit, 0 unless given; without a fit: random features

    @classmethod
    def example(cls) -> CircuitCodes:
        return cls(seed=0)

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE

    @reads(Site.HEAD_OUTPUT)
    def encode(self, heads: Tensor, call: Call) -> Statistic:
        means = _means(heads, call)
        return Cat.of(f"{call.forward:06d}", _code(means, *self._maps(means, call.layer)))

    def _maps(self, means: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """From what heads `[b h d]` hand over to features: `[h d m]`, the output projection in it, and `[m]`."""
        h, d = means.shape[1:]
        if self.sae is None:
            encoder = _drawn(d, RANDOM_FEATURES, torch.Generator().manual_seed(seed_of(self, "sae")))
            return encoder.to(means).expand(h, -1, -1), means.new_zeros(RANDOM_FEATURES)
        own = self.sae.get(f"encoder.{layer}")
        if own is None or own.shape[:2] != (h, d):
            rule = (
                f"must be fitted to all heads of the layer, {h} of width {d} in layer {layer}, without .on(heads=...)"
            )
            raise FieldError(self, "sae", self.sae, rule, "a fit to this model")
        return own.to(means), self.sae["bias"].to(means)

    def answer(self, readings: Readings) -> Codes:
        each = [torch.cat(stat.value).T for stat in readings.values()]  # [h texts]
        codes = pad_sequence(each, True, -1).permute(2, 0, 1)
        held = {} if self.sae is None else {n: self.sae.get(f"scores.{n}") for n in readings}
        scores = [
            torch.full((len(x),), float("nan")) if held.get(n) is None else held[n]
            for n, x in zip(readings, each, strict=True)
        ]
        return Codes(tuple(readings), codes, pad_sequence(scores, True, float("nan")))  # type: ignore[arg-type]

    def describe(self, answer: Codes) -> Description:
        heads = answer.ranked
        if not heads:
            return Description()
        what = "How many codes of each head positive examples alone have: many where it does something of its own."
        values = HeadMap("circuit", "Heads of the task", what, answer.layers, answer.scores, "", low=0)
        best = dict(list(heads.items())[:FIRST])
        first, most = next(iter(best.items()))
        text = (
            f"Head {head_name(*first)} has the most codes that positive examples alone have, {most:.0f}; "
            f"{sum(x == 0 for x in heads.values())} of {len(heads)} heads have none."
        )
        role = Role("of the task", what, best, "")
        return Description((values,), (role,), (Finding(text, 0.3, ("Patch",), "circuit"),))

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> CircuitCodes:
        """An autoencoder of what all heads write, and how many of each head's codes are of positive examples alone."""
        positive: list[bool] = []
        part = _Means()
        with torch.no_grad(), context.attach(part) as run:
            for batch in batches:
                if "positive" not in batch:
                    raise FieldError(self, "batches", sorted(batch), 'must have "positive" [b]', [{"positive": "..."}])
                labels = torch.as_tensor(batch["positive"]).bool().flatten().tolist()
                run(**{name: x for name, x in batch.items() if name != "positive"})
                texts = sum(map(len, next(iter(run[part].values())).value)) - len(positive)
                if len(labels) not in (1, texts):
                    rule = f"'positive' must be one label, or one for each of {texts} texts"
                    raise FieldError(self, "batches", labels, rule, [{"positive": [True] * texts}])
                positive += labels if len(labels) == texts else labels * texts
            if len(set(positive)) < 2:
                rule = "must hold positive examples and others"
                raise FieldError(self, "batches", positive, rule, [{"positive": [True, False]}])
            means = {layer: torch.cat(stat.value) for layer, stat in run[part].items()}  # [n h d]
        outputs = {layer: context.weights(layer).o.detach().float() for layer in means}  # [e h d]
        written = [torch.einsum("nhd,ehd->nhe", x, outputs[layer]).flatten(0, 1) for layer, x in means.items()]
        encoder, bias = self._learn(torch.cat(written))
        found = {"bias": bias}
        for layer, x in means.items():
            found[f"encoder.{layer}"] = torch.einsum("ehd,em->hdm", outputs[layer], encoder)
            codes = _code(x, found[f"encoder.{layer}"], bias)
            found[f"scores.{layer}"] = torch.tensor([_unique(column, positive) for column in codes.T.tolist()]).float()
        return replace(self, sae=Fitted(found))

    def _learn(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder `[e m]` and bias `[m]` from what heads write `[n e]`."""
        e, draw = x.shape[1], torch.Generator().manual_seed(self.seed or 0)
        encoder, decoder = _drawn(e, self.features, draw), _drawn(self.features, e, draw)
        bias, center = (2 * torch.rand(self.features, generator=draw) - 1) * e**-0.5, torch.zeros(e)
        learned = [p.to(x.device).requires_grad_() for p in (encoder, decoder, bias, center)]
        encoder, decoder, bias, center = learned
        optimiser = torch.optim.Adam(learned, lr=self.rate)
        with torch.enable_grad():
            for _ in range(self.steps):
                fired = ((x - center) @ encoder + bias).relu()
                loss = (fired @ decoder + center - x).square().mean() + self.penalty * fired.sum(1).mean()
                optimiser.zero_grad()
                loss.backward()
                for p in (encoder, decoder):  # their columns stay as long as they are: 1
                    slope: Tensor = p.grad  # type: ignore[assignment]
                    slope -= (slope * p.detach()).sum(0) * p.detach()
                optimiser.step()
                for p in (encoder, decoder):
                    p.data = normalize(p.data, dim=0)
        return encoder.detach(), (bias - center @ encoder).detach()


def _unique(codes: list[int], positive: list[bool]) -> int:
    """How many codes positive examples alone have."""
    others = {code for code, is_positive in zip(codes, positive, strict=True) if not is_positive}
    return len(set(codes) - others)


def _code(means: Tensor, encoder: Tensor, bias: Tensor) -> Tensor:
    """The feature that fires most, of heads `[b h d]`; the first where none does."""
    return (torch.einsum("bhd,hdm->bhm", means, encoder) + bias).relu().argmax(-1)


def _drawn(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    """A random matrix `[rows columns]` with columns of length 1."""
    return normalize(torch.randn(rows, columns, generator=draw), dim=0)


def _means(heads: Tensor, call: Call) -> Tensor:
    """Of `[b h q d]` the mean over the tokens of each text, `[b h d]`."""
    is_text = call.is_text[..., None]  # [b|1 1 q 1]
    return heads.detach().where(is_text, 0.0).sum(2) / is_text.sum(2).clamp(min=1)


class _Means(Method):
    """What each head hands over, the mean over a text, `[b h d]`."""

    @reads(Site.HEAD_OUTPUT)
    def mean(self, heads: Tensor, call: Call) -> Statistic:
        return Cat.of(f"{call.forward:06d}", _means(heads, call).float())


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    draw = torch.Generator().manual_seed(0)
    words = torch.randint(1000, 20_000, (12, 20), generator=draw)
    again, new = torch.cat([words, words[:, :8]], 1), torch.cat([words.roll(1, 0), words[:, :8]], 1)
    method = fit(
        CircuitCodes(), model, [{"input_ids": torch.cat([again, new]), "positive": [True] * 12 + [False] * 12}]
    )
    with torch.no_grad(), attach(model, method) as run:
        run(input_ids=again)
        print(run[method])
