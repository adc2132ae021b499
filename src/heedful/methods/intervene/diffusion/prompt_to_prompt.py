"""A <- the map that the same layer had at the same step of another picture: other words, the same layout."""

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
from heedful.core.ranges import Share
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Cat

GOOD = "heedful.fit(PromptToPrompt(), model, batches)"


class PromptToPrompt(Method):
    """Makes a picture of changed words where another was made, by the attention of that other one.

    `fit` takes every forward of the first picture in the making, with "step" beside the inputs: its number, and of how
    many. The second begins with the same noise, at steps that are told by `run.denoising`. A word may be replaced by
    another in its place; where words are added behind the first prompt's, `role` names those that both have.
    """

    paper = Paper(
        "2208.01626",
        "Prompt-to-Prompt Image Editing with Cross Attention Control",
        "Amir Hertz, Ron Mokady, Jay Tenenbaum, Kfir Aberman, Yael Pritch, Daniel Cohen-Or",
        2022,
        "2208.01626",
        "ICLR 2023",
        differs=(
            "The first picture is made before the second; the authors make both side by side.",
            "Words that both prompts have stand in the same place in both; the authors align them.",
            "Maps of self-attention are taken in all layers it is attached to; the authors take those of few places.",
            "Words made stronger or weaker, which the authors call reweighting, are HRV(factor=...).",
        ),
    )
    whole_map = True
    subjects = ("cross",)
    cross: Share = 0.8  # share of the steps whose cross-attention is the first picture's; the authors: 0.8
    inner: Share = 0.4  # the same of self-attention; the authors: 0.4
    role: str = ""  # the words whose maps are the first picture's; "": all
    maps: Fitted | None = None  # "LAYER.STEP" [b|1 h n k], from a fit; None: even weights, as a control

    @classmethod
    def neutral(cls) -> PromptToPrompt:
        return cls(0.0, 0.0)

    def idle(self, call: Call) -> bool:
        begun = 0.0 if call.denoising is None else call.denoising.share
        return begun >= (self.cross if call.cross else self.inner)

    @at(Site.PATTERN)
    def take(self, pattern: Tensor, call: Call) -> Tensor:
        found = self._even(pattern, call) if self.maps is None else self._first(self.maps, pattern, call)
        if not call.cross or not self.role:
            return found
        return torch.where(call.spread(call.marked(self.role))[:, :, None], found, pattern)

    def _even(self, pattern: Tensor, call: Call) -> Tensor:
        seen = torch.ones_like(pattern) if call.keep is None else call.keep.to(pattern).expand_as(pattern)
        return seen / seen.sum(-1, keepdim=True).clamp(min=1)

    def _first(self, maps: Fitted, pattern: Tensor, call: Call) -> Tensor:
        step = 0 if call.denoising is None else call.denoising.number
        found = maps.get(f"{call.layer}.{step}")
        rule = f"have none for layer {call.layer} and step {step}"
        if found is not None:
            words = pattern.shape[3] - found.shape[3]
            if call.cross and self.role and words > 0:
                found = torch.nn.functional.pad(found, (0, words))
            if found.shape[1:] == pattern.shape[1:] and len(found) in (1, len(pattern)):
                return found.to(pattern).expand_as(pattern)
            rule = f"are {list(found.shape)} in layer {call.layer}, whose map is {list(pattern.shape)}"
        raise FieldError(self, "maps", maps, f"{rule}: fit to this model, these steps and as many pictures", GOOD)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> PromptToPrompt:
        """The maps of every forward that may be taken over."""
        found: dict[str, Tensor] = {}
        reader = _Maps(self.cross, self.inner)
        with context.attach(reader) as run, torch.no_grad():
            for given in batches:
                batch = dict(given)
                number, of = batch.pop("step", (0, 1))
                if number < max(self.cross, self.inner) * of:
                    run.reset()
                    with run.denoising(number, of):
                        run(**batch)
                    found |= {f"{layer}.{number}": x for layer, x in run[reader].items()}
        if not found:
            raise FieldError(self, "batches", 0, "must hold each forward of the first picture", [{"step": (0, 50)}])
        return replace(self, maps=Fitted(found))


class _Maps(Method):
    """Maps by layer, of the steps in which they are wanted."""

    whole_map = True
    cross: float = 0.8
    inner: float = 0.4

    def idle(self, call: Call) -> bool:
        return call.denoising is None or call.denoising.share >= (self.cross if call.cross else self.inner)

    @reads(Site.PATTERN)
    def read(self, pattern: Tensor, call: Call) -> Cat:
        return Cat.of("map", pattern)

    def answer(self, readings: Readings) -> dict[int, Tensor]:
        return {layer: stat.value[0] for layer, stat in readings.items()}


if __name__ == "__main__":
    from heedful import attach, fit, models

    model = models.tiny("bart")
    one, other = ({n: torch.randint(3, 60, (1, 12)) for n in ("input_ids", "decoder_input_ids")} for _ in range(2))
    method = fit(PromptToPrompt(), model, [one])
    with attach(model, method) as run:
        print(run.difference(**other))
