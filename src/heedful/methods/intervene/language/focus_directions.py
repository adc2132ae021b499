"""Learned directions: softmax((Q + alpha d_Q)(K + alpha d_K)^T / sqrt(d)) in the heads that look at relevant text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.method import FitContext, Layer, Method, Readings
from heedful.core.paper import Paper
from heedful.core.sites import Site, at, reads
from heedful.core.state import ByIndex
from heedful.core.stats import Mean, Statistic, Sum
from heedful.kit.seeds import seed_of


class FocusDirections(Method):
    """Adds a direction to the queries, and one to the keys, of the heads that attend most to relevant text."""

    paper = Paper(
        "P088",
        "Focus Directions Make Your Language Models Pay More Attention to Relevant Contexts",
        "Youxiang Zhu, Ruochen Li, Danqing Wang, Daniel Haehn, Xiaohui Liang",
        2025,
        "2503.23306",
        differs=(
            "No authors' code was found: the loss (minus the log of each chosen head's mass on the relevant text, from "
            "the last token) and the optimiser follow accounts of the paper.",
            "Directions are added before rotary embedding, which the paper leaves open: only so do they not care where "
            "a text begins, and only so does d_K matter (without rotary embedding softmax forgets it).",
            "With grouped heads there is one d_K for each key head.",
            "Directions are learned at strength 1 and used at strength alpha.",
        ),
    )
    alpha: float = 0.3  # strength; the paper's best: 0.3, below 0 turns away
    heads: int = 20  # heads that a fit chooses; the paper: 20
    epochs: int = 10  # passes of a fit over its batches; the paper: 10
    rate: float = 1e-3  # AdamW's learning rate in a fit; the paper: 1e-3
    directions: Fitted | None = None  # q.<layer> [h d] and k.<layer> [g d], zero in heads that were not chosen
    seed: int | None = None  # without a fit: random directions in every head, the paper's control

    def __post_init__(self) -> None:
        if not abs(self.alpha) < float("inf"):
            raise FieldError(self, "alpha", self.alpha, "must be finite", 0.3)
        for name in ("heads", "epochs"):
            if getattr(self, name) < 1:
                raise FieldError(self, name, getattr(self, name), "must be 1 or more", 10)
        if not self.rate > 0:
            raise FieldError(self, "rate", self.rate, "must be above 0", 1e-3)

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
        return not {f"q.{call.layer}", f"k.{call.layer}"} & self.directions.keys()

    @at(Site.QUERY)
    def turn_queries(self, query: Tensor, call: Call) -> Tensor:
        added = self._added(query, "q", call)
        return query if added is None else query + self.alpha * added

    @at(Site.KEY)
    def turn_keys(self, key: Tensor, call: Call) -> Tensor:
        added = self._added(key, "k", call)
        if added is None:
            return key
        if call.rotate is not None:
            added, start = added.expand(len(key), -1, -1, -1), call.queries.first or 0
            # cached keys were turned in earlier calls, and the cache holds them as they were
            before = call.state.cache.get("keys", added[:, :, :0])[:, :, :start]
            if before.shape[2] < start:
                rule = "must be turned from the text's first token on; read the whole text under this method"
                raise FieldError(self, "keys", before.shape[2], rule, start)
            added = torch.cat([before, added], 2)
            call.state.cache["keys"] = ByIndex(added, 2)
            place = call.keys.index.clamp(max=added.shape[2] - 1)[..., None]
            added = added.gather(2, place.expand(key.shape))
        return key + self.alpha * added

    def _added(self, x: Tensor, side: str, call: Call) -> Tensor | None:
        """The direction as this call's tokens hold it, `[b|1 heads n d]`; None where nothing is added."""
        direction = self._direction(x, side, call)
        if direction is None:
            return None
        flat = direction.to(x)[None, :, None]
        return flat if call.rotate is None else call.rotate(flat)

    def _direction(self, x: Tensor, side: str, call: Call) -> Tensor | None:
        """What to add to every token of `x [b heads n d]`, `[heads d]`."""
        shape = (x.shape[1], x.shape[3])
        if self.directions is None:
            seed = 4099 * seed_of(self, "directions") + call.layer
            source = torch.Generator().manual_seed(2 * seed + (side == "k"))
            return torch.randn(shape, generator=source)
        found = self.directions.get(f"{side}.{call.layer}")
        if found is not None and found.shape != shape:
            raise self._misfit(f"[{side} d] is {list(shape)} here")
        return found

    def _misfit(self, here: str) -> FieldError:
        good = "heedful.fit(FocusDirections(), model, batches)"
        return FieldError(self, "directions", self.directions, f"was fitted to another model; {here}", good)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> FocusDirections:
        """Rank heads by their mass on the role "relevant", and learn directions for the best of them.

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
        chosen = [(layer, i) for _, layer, i in ranked[: self.heads]]
        layers = sorted({layer for layer, _ in chosen})
        stack = _Learner(chosen=tuple(chosen)).on(layers=layers) | reader.on(layers=layers)
        with context.attach(stack) as run:
            # a large eps: without rotary embedding d_K's gradient is rounding noise, which must not grow a direction
            optimiser = torch.optim.AdamW(run.parameters(), lr=self.rate, eps=1e-4, weight_decay=0.0)
            for _ in range(self.epochs):
                for inputs, run.roles in split:
                    run.reset()
                    run(**inputs)
                    mass = run[stack.parts[1]]
                    loss = -torch.stack([mass[layer][i].clamp(min=1e-9).log() for layer, i in chosen]).mean()
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
            learned = run.state_dict()
        names = {place: place.split(".") for place in learned}  # part.layer.side
        return replace(self, directions=Fitted({f"{side}.{n}": learned[p] for p, (_, n, side) in names.items()}))


class _Mass(Method):
    """Each head's weight from a text's last token on the role "relevant"; keeps the gradient."""

    @reads(Site.PATTERN)
    def relevant(self, pattern: Tensor, call: Call) -> Statistic:
        marked = call.marked("relevant")[:, :, None]
        out = pattern.new_zeros(*pattern.shape[:2], call.rows.stop)
        out[..., call.rows] = pattern.masked_fill(~marked, 0.0).sum(-1)
        return Sum(out)

    def finish(self, statistic: Statistic, call: Call) -> Statistic:
        found = statistic.value
        last = found.gather(-1, call.last[..., None].expand(*found.shape[:2], 1)).sum((0, 2))
        return Mean(last, torch.full_like(last, len(found)))

    def answer(self, readings: Readings) -> dict[int, Tensor]:
        return {layer: statistic.value for layer, statistic in readings.items()}


class _Learner(FocusDirections):
    """Directions that learn, at strength 1, zero elsewhere than in the chosen heads."""

    alpha: float = 1.0
    chosen: tuple[tuple[int, int], ...] = ()  # (layer, head)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"q": torch.zeros(layer.heads, layer.head_dim), "k": torch.zeros(layer.kv_heads, layer.head_dim)}

    def _direction(self, x: Tensor, side: str, call: Call) -> Tensor:
        mine = [i * x.shape[1] // call.heads for layer, i in self.chosen if layer == call.layer]
        return torch.zeros_like(call.params[side]).index_put((torch.tensor(mine),), call.params[side][mine])


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sky is green today. The code is 7491. The sea is calm. So the code is", return_tensors="pt")
    roles = {"relevant": ((7, 14),)}
    method = fit(FocusDirections(heads=4, rate=0.05), model, [{**text, "roles": roles}])
    for part in (_Mass(), method | _Mass()):
        with torch.no_grad(), attach(model, part, roles=roles) as run:
            run(**text)
            print(part, {layer: round(float(m.mean()), 4) for layer, m in run[_Mass()].items()})
