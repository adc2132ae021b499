"""k, v <- those of another text's words in chosen cross-attention layers: what changes was read there."""

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
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Cat
from heedful.kit.seeds import seed_of


class PatchWords(Method):
    """Lets layers of cross-attention read another prompt than the rest: `.on(layers=...)` says which.

    `fit` takes one forward with the other prompt, of as many words, as its one batch.
    """

    paper = Paper(
        "P147",
        "Precise Parameter Localization for Textual Generation in Diffusion Models",
        "Łukasz Staniszewski, Bartosz Cywiński, Franziska Boenisch, Kamil Deja, Adam Dziedzic",
        2025,
        "2502.09935",
        "ICLR 2025",
        differs=(
            "For cross-attention alone. Where words and picture share one attention, the authors patch what the words "
            "have become in another run at every step.",
            "Trying the layers one by one, and what the authors do with those that they find, is the caller's.",
        ),
    )
    subjects = ("cross",)
    words: Fitted | None = None  # "key.LAYER" and "value.LAYER", [b|1 g k d], from a fit
    seed: int | None = None  # without a fit: random keys and values, as a control

    @classmethod
    def example(cls) -> PatchWords:
        return cls(seed=0)

    def idle(self, call: Call) -> bool:
        return not call.cross

    @at(Site.KEY)
    def patch_keys(self, key: Tensor, call: Call) -> Tensor:
        return self._other("key", key, call)

    @at(Site.VALUE)
    def patch_values(self, value: Tensor, call: Call) -> Tensor:
        return self._other("value", value, call)

    def _other(self, what: str, x: Tensor, call: Call) -> Tensor:
        if self.words is None:
            seed = seed_of(self, "words", "to a forward with the other prompt", "[inputs]")
            draw = torch.Generator().manual_seed(1_000_003 * seed + 2 * call.layer + (what == "value"))
            drawn = torch.randn(x.shape[2], x.shape[1], x.shape[3], generator=draw)  # word by word, padding last
            return drawn.transpose(0, 1).to(x).expand_as(x)
        found = self.words.get(f"{what}.{call.layer}")
        if found is None or found.shape[1:] != x.shape[1:] or len(found) not in (1, len(x)):
            rule = f"layer {call.layer} has [b g k d] = {list(x.shape)}: fit to this model and as many words"
            raise FieldError(self, "words", self.words, rule, "heedful.fit(PatchWords(), model, [inputs])")
        return found.to(x).expand_as(x)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> PatchWords:
        """The other prompt's keys and values in every layer of cross-attention."""
        found = list(batches)
        if len(found) != 1:
            raise FieldError(self, "batches", len(found), "must be one forward with the other prompt", [{"context": 0}])
        with context.attach(_Words()) as run, torch.no_grad():
            run(**found[0])
            return replace(self, words=Fitted(run[_Words()]))


class _Words(Method):
    """Keys and values of cross-attention, by name and layer."""

    def idle(self, call: Call) -> bool:
        return not call.cross

    @reads(Site.HEAD_OUTPUT)
    def read(self, heads: Tensor, call: Call) -> Cat:
        return Cat({name: x.detach() for name, x in (("key", call.key), ("value", call.value)) if x is not None})

    def answer(self, readings: Readings) -> dict[str, Tensor]:
        return {f"{name}.{layer}": x for layer, stat in readings.items() for name, x in stat.tensors().items()}


if __name__ == "__main__":
    from heedful import attach, fit, models

    model = models.tiny("bart")
    one, other = (torch.randint(3, 60, (1, 12)) for _ in range(2))
    names = [f"model.decoder.layers.{i}.encoder_attn" for i in range(2)]
    for name in names:
        fitted = fit(PatchWords(), model, [{"input_ids": other, "decoder_input_ids": one}], only=[name])
        with attach(model, fitted, only=[name]) as run:
            print(name, run.difference(input_ids=one, decoder_input_ids=one))
