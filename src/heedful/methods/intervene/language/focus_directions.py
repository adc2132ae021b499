"""Learned directions: softmax((q + alpha d) K^T / sqrt(d)) in the heads that look at relevant text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext, Layer, Readings
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveFloat, PositiveInt
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Mean, Statistic, Sum
from heedful.kit.seeds import drawn_for

_Split = list[tuple[dict[str, Any], dict[str, Any]]]


class FocusDirections(Method):
    """Adds a direction to the queries of the heads that attend most to relevant text.

    `fit` takes batches with "roles" that mark the relevant text, and, if there is one, the model's "response": its
    tokens are those that shall look there. Without it a text's last token is.
    """

    paper = Paper(
        "P088",
        "Focus Directions Make Your Language Models Pay More Attention to Relevant Contexts",
        "Youxiang Zhu, Ruochen Li, Danqing Wang, Daniel Haehn, Xiaohui Liang",
        2025,
        "2503.23306",
        differs=(
            "Keys get no direction. The paper adds one to them too, in the authors' code after rotary embedding, as "
            "here to queries: it adds one number to all scores of a row, which softmax forgets.",
            "The authors train directions for all heads and keep those of the chosen ones, which comes to the same.",
            "Directions start at zero, the authors' at noise of spread 0.01; a fit takes one batch a step, in their "
            "order, the authors' one text, in an order that is drawn.",
            "The response is the caller's to write; the authors' is what the model answers when it is shown the "
            "relevant text alone, and, to choose heads by, all of it.",
        ),
    )
    alpha: float = 0.3  # strength; the paper's best: 0.3, the authors' script: 0.2; below 0 turns away
    count: PositiveInt = 20  # heads that a fit chooses; the paper: 20
    epochs: PositiveInt = 10  # passes of a fit over its batches; the paper: 10
    rate: PositiveFloat = 1e-3  # AdamW's learning rate in a fit; the paper: 1e-3
    directions: Fitted | None = None  # q.<layer> [h d], zero in heads that were not chosen
    seed: int | None = None  # without a fit: random directions in every head, the paper's control

    @classmethod
    def neutral(cls) -> FocusDirections:
        return cls(alpha=0.0)

    @classmethod
    def example(cls) -> FocusDirections:
        return cls(alpha=1.0, seed=0)

    def idle(self, call: Call) -> bool:
        if self.alpha == 0 or self.directions is None:
            return self.alpha == 0
        if any(int(name.partition(".")[2]) >= call.depth for name in self.directions):
            raise self._misfit(f"this one has {call.depth} layers")
        return f"q.{call.layer}" not in self.directions

    @at(Site.QUERY)
    def turn(self, query: Tensor, call: Call) -> Tensor:
        return query + self.alpha * self._direction(query, call).to(query)[:, None]

    def _direction(self, query: Tensor, call: Call) -> Tensor:
        """What is added to every token of `query [b h n d]`, `[h d]`."""
        shape = (query.shape[1], query.shape[3])
        if self.directions is None:
            return torch.randn(shape, generator=drawn_for(self, "directions", call.layer))
        found = self.directions[f"q.{call.layer}"]
        if found.shape != shape:
            raise self._misfit(f"[h d] is {list(shape)} here")
        return found

    def _misfit(self, here: str) -> FieldError:
        good = "heedful.fit(FocusDirections(), model, batches)"
        return FieldError(self, "directions", self.directions, f"was fitted to another model; {here}", good)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> FocusDirections:
        """Rank heads by their mass on the role "relevant", and learn directions for the best, each layer by itself.

        A batch holds the model's inputs and "roles": {"relevant": spans}, the same spans for every text in it.
        """
        split = [({k: v for k, v in b.items() if k != "roles"}, dict(b.get("roles", {}))) for b in batches]
        if not split or any("relevant" not in roles for _, roles in split):
            good = [{"input_ids": "...", "roles": {"relevant": ((4, 9),)}}]
            raise FieldError(self, "batches", len(split), 'must be 1 or more, each with roles naming "relevant"', good)
        reader = _Mass()
        with torch.no_grad(), context.attach(reader) as run:
            for inputs, run.roles in split:
                run(**inputs)
            mass = run[reader]
        ranked = sorted((-float(m), layer, i) for layer, row in mass.items() for i, m in enumerate(row))
        chosen: dict[int, list[int]] = {}
        for _, layer, head in ranked[: self.count]:
            chosen.setdefault(layer, []).append(head)
        learned = {f"q.{layer}": self._learned(context, split, layer, heads) for layer, heads in chosen.items()}
        return replace(self, directions=Fitted(learned))

    def _learned(self, context: FitContext, split: _Split, layer: int, heads: list[int]) -> Tensor:
        """The directions of a layer's heads `[h d]`, in a model that is as it was in all others."""
        stack = _Learner().on(layers=layer) | _Mass().on(layers=layer)
        with context.attach(stack) as run:
            optimiser = torch.optim.AdamW(run.parameters(), lr=self.rate)
            for _ in range(self.epochs):
                for inputs, run.roles in split:
                    run.reset()
                    run(**inputs)
                    loss = -run[stack.parts[1]][layer][heads].mean()
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
            (found,) = run.state_dict().values()
        return found


class _Mass(Method):
    """Each head's weight on the role "relevant", from the "response" or a text's last token; keeps the gradient."""

    @reads(Site.PATTERN)
    def relevant(self, pattern: Tensor, call: Call) -> Statistic:
        marked = call.marked("relevant")[:, :, None]
        out = pattern.new_zeros(*pattern.shape[:2], call.rows.stop)
        out[..., call.rows] = pattern.masked_fill(~marked, 0.0).sum(-1)
        return Sum(out)

    def finish(self, statistic: Statistic, call: Call) -> Statistic:
        found = statistic.value  # [b h n]
        if "response" in call.roles:
            asks = call.spread(call.marked_queries("response") & call.is_text).to(found)
            each = (found * asks).sum(-1) / asks.sum(-1).clamp(min=1)
        else:
            each = found.gather(-1, call.last[..., None].expand(*found.shape[:2], 1))[..., 0]
        total = each.sum(0)
        return Mean(total, torch.full_like(total, len(found)))

    def answer(self, readings: Readings) -> dict[int, Tensor]:
        return {layer: statistic.value for layer, statistic in readings.items()}


class _Learner(FocusDirections):
    """Directions that learn, at strength 1; heads whose mass is not asked for get no gradient and stay zero."""

    alpha: float = 1.0

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"q": torch.zeros(layer.heads, layer.head_dim)}

    def _direction(self, query: Tensor, call: Call) -> Tensor:
        return call.params["q"]


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sky is green today. The code is 7491. The sea is calm. So the code is", return_tensors="pt")
    roles = {"relevant": ((7, 14),)}
    method = fit(FocusDirections(count=4, rate=0.05), model, [{**text, "roles": roles}])
    for part in (_Mass(), method | _Mass()):
        with torch.no_grad(), attach(model, part, roles=roles) as run:
            run(**text)
            print(part, {layer: round(float(m.mean()), 4) for layer, m in run[_Mass()].items()})
