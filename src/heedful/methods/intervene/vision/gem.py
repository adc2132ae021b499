"""x <- x + W mean_u softmax(t u u') v over the last layers, u of q, k, v drawn together by u <- softmax(t u u') u."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from heedful.core.call import Call, Phase
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError, SiteError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveFloat, PositiveInt
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Statistic
from heedful.kit.written import map_of, written

PROJECTIONS = ("query", "key", "value")


class GEM(Method):
    """A second path beside a vision model's last layers, on which patches that are alike draw together.

    The model goes on as it is; `run[method]` has the stream `[b n e]` at the end of the second path for each forward.
    The model's last norm and projection make features of it: patches whose features are near that of a text, or of
    another picture's thing, are where that thing is. `fit(method, model, ())` copies what the path is projected with.
    Where a language model stands behind it, attach it to the vision model alone, by `only=`.
    """

    paper = Paper(
        "P168",
        "Grounding Everything: Emerging Localization Properties in Vision-Language Transformers",
        "Walid Bousselham, Felix Petersen, Vittorio Ferrari, Hilde Kuehne",
        2024,
        "2312.00878",
        "CVPR 2024",
        differs=(
            "The path alone: what compares its features with a text's is the model's own, if it has one.",
            "Every token sees every other, as in the authors' models; masks have no part in the second path.",
            "Where a model shows no stream before the path, the path begins at zero.",
        ),
    )
    subjects = ("image",)
    last: PositiveInt = 6  # layers that have the path, the last ones; the authors' code: 6
    rounds: NonNegativeInt = 1  # how often tokens draw together before they mix values; the authors' code: 1
    # on cosines; None: the tokens' mean length over the root of d, as the authors'
    temperature: PositiveFloat | None = None
    of: tuple[str, ...] = PROJECTIONS  # which attend to themselves, the mean of which is taken; the paper: all three
    maps: Fitted | None = None  # o.<layer> [e h d] and b.<layer> [e], from a fit
    seed: int | None = None  # without a fit: random projections

    def __post_init__(self) -> None:
        if not self.of or len(set(self.of)) < len(self.of) or not set(self.of) <= set(PROJECTIONS):
            rule = f"must be one or more of {', '.join(PROJECTIONS)}, each once"
            raise FieldError(self, "of", self.of, rule, PROJECTIONS)

    @classmethod
    def example(cls) -> GEM:
        return cls(last=1, seed=0)

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE or call.cross or call.layer < self._first(call) - 1

    def _first(self, call: Call) -> int:
        return max(call.lowest, call.listed.stop - self.last)

    @reads(Site.EMBEDDING)
    def begin(self, stream: Tensor, call: Call) -> None:
        if self._first(call) == call.lowest:
            call.state.forward["stream"] = stream.detach()

    @reads(Site.RESIDUAL)
    def part(self, stream: Tensor, call: Call) -> None:
        if call.layer == self._first(call) - 1:
            call.state.forward["stream"] = stream.detach()

    @reads(Site.HEAD_OUTPUT)
    def add(self, heads: Tensor, call: Call) -> Statistic | None:
        if call.layer < self._first(call) or call.query is None or call.key is None or call.value is None:
            return None
        q, k, v = (call.spread(x.detach()).to(heads) for x in (call.query, call.key, call.value))
        if q.shape[2] != k.shape[2]:
            raise SiteError(f"GEM, layer {call.layer}: tokens draw together that are read at once; hand it no cache")
        heat = self._heat(q, call)
        each = [self._alike({"query": q, "key": k, "value": v}[name], heat) @ v for name in self.of]
        maps, bias = (x.to(heads) for x in map_of(self, call, heads.shape[1], heads.shape[3]))
        added = torch.einsum("bhnd,ehd->bne", torch.stack(each).mean(0), maps) + bias
        call.state.forward["stream"] = call.state.forward.get("stream", 0) + added
        return Cat.of(f"{call.forward:06d}", call.state.forward["stream"]) if call.ends_list else None

    def _heat(self, query: Tensor, call: Call) -> Tensor | float:
        if self.temperature is not None:
            return self.temperature
        if call.hidden is None:
            rule = f"{call.name} does not show what it is handed, which tells a temperature"
            raise FieldError(self, "temperature", None, rule, 10.0)
        return call.hidden.detach().norm(dim=-1).mean(-1)[:, None, None, None] * query.shape[-1] ** -0.5

    def _alike(self, x: Tensor, heat: Tensor | float) -> Tensor:
        """How much each token sees of those that are like it, `[b h n n]`, once they have drawn together."""
        for _ in range(self.rounds):
            x = _cosines(x, heat) @ normalize(x, dim=-1)
        return _cosines(x, heat)

    def answer(self, readings: Readings) -> list[Tensor]:
        """One `[b n e]` for each forward, in their order."""
        return [x for stat in readings.values() for x in stat.value]

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> GEM:
        """The output projections of the last layers, with what their blocks scale them by; `batches` may be empty."""
        return replace(self, maps=written(context, self.last))


def _cosines(x: Tensor, heat: Tensor | float) -> Tensor:
    x = normalize(x, dim=-1)
    return (x @ x.mT * heat).softmax(-1)


if __name__ == "__main__":
    from heedful import attach, fit, models

    model = models.tiny("vit", image_size=32)
    method = fit(GEM(last=1), model, ())
    with torch.no_grad(), attach(model, method) as run:
        run(**models.tiny_inputs(model))
        features = normalize(model.vit.layernorm(run[method][0]), dim=-1)
    print((features[0, 1:] @ features[0, 10]).reshape(8, 8))  # what is like the patch in row 1, column 1
