"""Slots take means of tokens, w_ij / sum_i w_ij, w a softmax over slots, in rounds with a GRU and an MLP."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from heedful.authoring import Call, Layer, Method, Paper, PositiveInt, Site, SiteError, at

LEAST = 1e-8  # added to every weight before it is divided by a slot's sum; the authors' code
EPS = 1e-3  # of the norms; that of the authors' library


class SlotAttention(Method):
    """A few slots compete for an image's tokens, which get what their slots came to. For models trained with it."""

    paper = Paper(
        "P273",
        "Object-Centric Learning with Slot Attention",
        "Francesco Locatello, Dirk Weissenborn, Thomas Unterthiner, Aravindh Mahendran, Georg Heigold, "
        "Jakob Uszkoreit, Alexey Dosovitskiy, Thomas Kipf",
        2020,
        "2006.15055",
        "NeurIPS 2020",
        differs=(
            "It stands in a block's place, so slots go back to tokens: each gets their mean by its weights of the last "
            "round, mapped once more. The authors decode each slot to an image, or read it out by itself.",
            "What slots begin with is the learned mean and spread with noise that is drawn once for each layer, where "
            "the authors draw it anew for every input; a model answers the same twice.",
            "Slots are as wide as tokens, and their norm has no shift, which a softmax over slots cannot see. Weights "
            "are drawn as torch.nn.Linear draws them, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("image",)
    slots: PositiveInt = 7  # the paper: 7 on CLEVR6
    rounds: PositiveInt = 3  # the paper: 3
    units: PositiveInt = 128  # width of the MLP; the paper: 128

    @classmethod
    def example(cls) -> SlotAttention:
        return cls(3, 2, 8)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e = torch.Generator().manual_seed(layer.number), layer.width

        def drawn(*shape: int, fan: int = e) -> Tensor:
            return (torch.rand(shape, generator=random) * 2 - 1) / math.sqrt(fan)

        square = {name: drawn(e, e) for name in ("query", "key", "value", "out")}
        norms = {f"{name}_norm": torch.ones(e) for name in ("input", "slot", "inner")}
        shifts = {f"{name}_shift": torch.zeros(e) for name in ("input", "inner")}
        return square | norms | shifts | {
            "mean": drawn(e), "spread": drawn(e),
            "gate_input": drawn(3 * e, e), "gate_slot": drawn(3 * e, e),
            "gate_input_bias": drawn(3 * e), "gate_slot_bias": drawn(3 * e),
            "up": drawn(self.units, e), "up_bias": drawn(self.units),
            "down": drawn(e, self.units, fan=self.units), "down_bias": drawn(e, fan=self.units),
        }  # fmt: skip

    @at(Site.BLOCK)
    def attend(self, hidden: Tensor, call: Call) -> Tensor:
        if call.mask.rules:
            rule = "slots take from all tokens, and there is a mask; restrict it to layers without one"
            raise SiteError(f"{self!r}, layer {call.layer}: {rule}")
        p = call.params
        inputs = self._normed("input", hidden.to(p["key"].dtype), call)
        key, value = linear(inputs, p["key"]), linear(inputs, p["value"])
        noise = torch.randn(self.slots, len(p["mean"]), generator=torch.Generator().manual_seed(call.layer))
        slots = (p["mean"] + p["spread"].exp() * noise.to(p["mean"])).expand(len(hidden), -1, -1)
        for _ in range(self.rounds):
            weights, slots = self._round(key, value, slots, call)
        return linear(weights @ slots, p["out"])

    def _round(self, key: Tensor, value: Tensor, slots: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        query = linear(self._normed("slot", slots, call), call.params["query"]) / math.sqrt(slots.shape[-1])
        weights, shares = self._weighed(key @ query.mT)
        return weights, self._next(shares.mT @ value, slots, call)

    def _weighed(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """How much of each token goes to each slot, and of each slot to each token, `[b n slots]`."""
        weights = scores.softmax(-1)
        kept = weights + LEAST
        return weights, kept / kept.sum(1, keepdim=True)

    def _next(self, update: Tensor, slots: Tensor, call: Call) -> Tensor:
        p, shape = call.params, slots.shape
        gates = (p["gate_input"], p["gate_slot"], p["gate_input_bias"], p["gate_slot_bias"])
        slots = torch.gru_cell(update.flatten(0, 1), slots.flatten(0, 1), *gates).view(shape)
        inner = linear(self._normed("inner", slots, call), p["up"], p["up_bias"]).relu()
        return slots + linear(inner, p["down"], p["down_bias"])

    def _normed(self, name: str, x: Tensor, call: Call) -> Tensor:
        return layer_norm(x, x.shape[-1:], call.params[f"{name}_norm"], call.params.get(f"{name}_shift"), EPS)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    inputs = models.tiny_inputs(model)
    with attach(model, SlotAttention(3)) as run:
        print(run.difference(**inputs))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
