"""code = argmax relu(E h + e) of each head's output h where a text ends; score = codes of positives alone / codes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from heedful.core.call import Call, Phase
from heedful.core.errors import FieldError
from heedful.core.figures import Description, Finding, Head, HeadMap, Role, head_name, percent
from heedful.core.fitted import Fitted
from heedful.core.method import FitContext, Method, Readings
from heedful.core.paper import Paper
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
        """Heads by the share of their codes that positive examples alone have, highest first."""
        there = (~self.scores.isnan()).nonzero().tolist()
        each = {(self.layers[n], h): float(self.scores[n, h]) for n, h in there}
        return dict(sorted(each.items(), key=lambda head: -head[1]))

    def __str__(self) -> str:
        top = ", ".join(f"{head_name(*head)} {percent(score)}" for head, score in list(self.ranked.items())[:FIRST])
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
            "The authors' full text was not at hand, nor code of theirs: this follows its abstract and summaries, and "
            "size, penalty, rate and steps of the autoencoder are ours.",
            "One autoencoder for the outputs of all heads where a text ends, each made to length 1.",
            "A head's score is the share of its codes that positive examples alone have, and no threshold says from "
            "where on a head is of the circuit. Pairs of heads, a circuit's edges, are not here.",
        ),
    )
    one_text = True
    chunk_invariant = False  # in a text that is read in pieces the end of each piece would have a code
    features: int = 128
    penalty: float = 0.02  # on the sum of activations
    rate: float = 1e-2  # Adam's learning rate
    steps: int = 300  # each on all examples
    sae: Fitted | None = None  # "encoder" [d m], "bias" [m], and "scores.<layer>" [h], from a fit
    seed: int | None = None  # of a fit, 0 unless given; without a fit: random features

    def __post_init__(self) -> None:
        for name, least in (("features", 2), ("steps", 1)):
            if getattr(self, name) < least:
                raise FieldError(self, name, getattr(self, name), f"must be {least} or more", getattr(type(self), name))
        if not 0 <= self.penalty < math.inf:
            raise FieldError(self, "penalty", self.penalty, "must be 0 or more, and finite", 0.02)
        if not 0 < self.rate < math.inf:
            raise FieldError(self, "rate", self.rate, "must be above 0, and finite", 1e-2)

    @classmethod
    def example(cls) -> CircuitCodes:
        return cls(seed=0)

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE

    @reads(Site.HEAD_OUTPUT)
    def encode(self, heads: Tensor, call: Call) -> Statistic:
        ends = _ends(heads, call)
        encoder, bias = self._maps(ends)
        return Cat.of(f"{call.forward:06d}", _code(ends, encoder, bias))

    def _maps(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        d = ends.shape[-1]
        if self.sae is not None:
            if self.sae["encoder"].shape[0] != d:
                rule = f"was fitted to heads of width {self.sae['encoder'].shape[0]}, and these are {d} wide"
                raise FieldError(self, "sae", self.sae, rule, "a fit to this model")
            return self.sae["encoder"].to(ends), self.sae["bias"].to(ends)
        encoder, _ = _start(d, RANDOM_FEATURES, seed_of(self, "sae"))
        return encoder.to(ends), ends.new_zeros(RANDOM_FEATURES)

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
        what = (
            "The share of each head's codes that positive examples alone have: high where it does something of its own."
        )
        values = HeadMap("circuit", "Heads of the task", what, answer.layers, answer.scores, low=0, high=1)
        best = dict(list(heads.items())[:FIRST])
        first, share = next(iter(best.items()))
        text = (
            f"Head {head_name(*first)} does most that positive examples alone have, {percent(share)} of its codes; "
            f"{sum(x == 0 for x in heads.values())} of {len(heads)} heads do nothing of that kind."
        )
        return Description((values,), (Role("of the task", what, best),), (Finding(text, 0.3, ("Patch",), "circuit"),))

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> CircuitCodes:
        """An autoencoder of all heads' outputs where examples end, and how many of each head's codes are positive."""
        positive: list[bool] = []
        part = _Ends()
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
            ends = {layer: torch.cat(stat.value) for layer, stat in run[part].items()}  # [n h d]
        encoder, bias = self._learn(torch.cat([x.flatten(0, 1) for x in ends.values()]))
        found = {"encoder": encoder, "bias": bias}
        for layer, x in ends.items():
            codes = _code(x, encoder, bias)
            found[f"scores.{layer}"] = torch.tensor([_unique(column, positive) for column in codes.T.tolist()])
        return replace(self, sae=Fitted(found))

    def _learn(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder `[d m]` and bias `[m]` from outputs `[n d]`."""
        x = _unit(x).float()
        with torch.enable_grad():
            encoder, decoder = (
                p.to(x.device).requires_grad_() for p in _start(x.shape[1], self.features, self.seed or 0)
            )
            bias = x.new_zeros(self.features).requires_grad_()
            optimiser = torch.optim.Adam([encoder, decoder, bias], lr=self.rate)
            for _ in range(self.steps):
                fired = (x @ encoder + bias).relu()
                loss = ((fired @ decoder - x).square().sum(1) + self.penalty * fired.sum(1)).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return encoder.detach(), bias.detach()


def _unique(codes: list[int], positive: list[bool]) -> float:
    """The share of the codes that positive examples alone have."""
    others = {code for code, is_positive in zip(codes, positive, strict=True) if not is_positive}
    return len(set(codes) - others) / len(set(codes))


def _code(ends: Tensor, encoder: Tensor, bias: Tensor) -> Tensor:
    """The feature that fires most, of outputs `[... d]`; the first where none does."""
    return (_unit(ends) @ encoder + bias).relu().argmax(-1)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _start(d: int, m: int, seed: int) -> tuple[Tensor, Tensor]:
    """A fresh encoder `[d m]`, columns of length 1, and the decoder that turns it round."""
    encoder = torch.nn.functional.normalize(torch.randn(d, m, generator=torch.Generator().manual_seed(seed)), dim=0)
    return encoder, encoder.T.clone()


def _ends(heads: Tensor, call: Call) -> Tensor:
    """Of `[b h q d]` what stands at each text's last token, `[b h d]`."""
    b, h, _, d = heads.shape
    return heads.detach().gather(2, call.last[:, :, None, None].expand(b, h, 1, d))[:, :, 0]


class _Ends(Method):
    """Each head's output where a text ends, `[b h d]`."""

    @reads(Site.HEAD_OUTPUT)
    def end(self, heads: Tensor, call: Call) -> Statistic:
        return Cat.of(f"{call.forward:06d}", _ends(heads, call).float())


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
