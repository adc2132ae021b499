"""softmax(q [K_source; g K]) [V_source; V]: a picture in the making sees another one, the scene, beside itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.authoring import (
    Call,
    Cat,
    FieldError,
    FitContext,
    Fitted,
    Method,
    Paper,
    PositiveFloat,
    Readings,
    Share,
    Site,
    at,
    reads,
)
from heedful.kit.running import wide
from heedful.kit.scores import scores_of
from heedful.kit.seen import softmax_over

GOOD = "heedful.fit(AddIt(), model, batches)"
LOW, HIGH, HALVINGS = 0.1, 10.0, 40  # where the scale that balances is looked for


class AddIt(Method):
    """Puts a thing into a scene: the new picture's self-attention sees the scene's keys and values too.

    `fit` takes every forward of the scene in the making, with "step" beside the inputs: its number, and of how many.
    The new picture begins with noise of its own, at steps that are told by `run.denoising`.
    """

    paper = Paper(
        "P247",
        "Add-it: Training-Free Object Insertion in Images With Pretrained Diffusion Models",
        "Yoad Tewel, Rinon Gal, Dvir Samuel, Yuval Atzmon, Lior Wolf, Gal Chechik",
        2024,
        "2411.07232",
        "ICLR 2025",
        differs=(
            "The scene is made before the new picture; the authors make both side by side, in one batch.",
            "As in the authors' code the scale is on all keys of the new picture; where attention is joint those are "
            "its prompt's too, and `role` names the scene's tokens that are its image's.",
            "A scale of None balances each call, all heads and queries as one, by halving the range; the authors "
            "balance over a few pictures beforehand, and give everybody the 1.05 that they find. Their code can also "
            "find one for each picture, from the sixth step on, with which its prompt gives it 1.05 times what the "
            "scene gets.",
            "A third of thirty steps is ten; the authors' test takes an eleventh along.",
            "Starting from the scene under noise and putting its background back late, which are done to latents and "
            "not to attention, are left to whoever denoises.",
        ),
    )
    subjects = ("image",)
    scale: PositiveFloat | None = 1.05  # of the new picture's own keys; None: so that both pictures are given as much
    until: Share = 1 / 3  # share of the steps that see the scene; the authors: a third, and two in single-stream layers
    role: str = ""  # which of the scene's tokens are seen; "": all
    source: Fitted | None = None  # "key.LAYER.STEP", "value.LAYER.STEP" [b|1 g n d], from a fit; None: no scene

    @classmethod
    def neutral(cls) -> AddIt:
        return cls(scale=1.0)

    @classmethod
    def example(cls) -> AddIt:
        return cls(scale=1.5)

    def idle(self, call: Call) -> bool:
        begun = 0.0 if call.denoising is None else call.denoising.share
        alone = self.source is None and self.scale in (None, 1.0)
        return call.cross or begun >= self.until or alone

    @at(Site.MIX)
    def look(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        theirs, values = self._scene(q, k, v, call)
        scale = self.scale if self.scale is not None else balance(lambda g: self._given(q, k, theirs, g, call))
        weights = self._weights(q, k, theirs, scale, call)
        return (weights @ call.spread(torch.cat([values, v], 2))).to(qkv[2].dtype)

    def _weights(self, q: Tensor, k: Tensor, theirs: Tensor, scale: float, call: Call) -> Tensor:
        """The pattern over the scene's tokens and then over the picture's own, `[b h q n+k]`."""
        own = scores_of(q, scale * k, call, slice(None))
        scene = scores_of(q, theirs, replace(call, bias=None), slice(None))
        keep = call.mask.keeps(call.pairs)
        keep = None if keep is None else pad(keep, (theirs.shape[2], 0), value=True)  # all see the scene
        return softmax_over(torch.cat([scene, own], -1), keep)

    def _given(self, q: Tensor, k: Tensor, theirs: Tensor, scale: float, call: Call) -> float:
        """The share of all weight that the scene is given."""
        return float(self._weights(q, k, theirs, scale, call)[..., : theirs.shape[2]].sum(-1).mean())

    def _scene(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """The scene's keys and values in this layer, at this step: none where there is no scene."""
        if self.source is None:
            return k[:, :, :0], v[:, :, :0]
        step = 0 if call.denoising is None else call.denoising.number
        names = [f"{what}.{call.layer}.{step}" for what in ("key", "value")]
        if not all(name in self.source for name in names):
            rule = f"has nothing for layer {call.layer} and step {step}: fit to this model and these steps"
            raise FieldError(self, "source", self.source, rule, GOOD)
        found = [self.source[name].to(own) for name, own in zip(names, (k, v), strict=True)]
        for x, own in zip(found, (k, v), strict=True):
            if (x.shape[1], x.shape[3]) != (own.shape[1], own.shape[3]) or len(x) not in (1, len(own)):
                rule = f"is {list(x.shape)} in layer {call.layer}, where the picture has {list(own.shape)}"
                raise FieldError(self, "source", self.source, f"{rule}: fit to this model and as many scenes", GOOD)
        seen = self._seen(found[0].shape[2], call).to(q.device)
        keys, values = (x[:, :, seen].expand(len(q), -1, -1, -1) for x in found)
        return keys, values

    def _seen(self, count: int, call: Call) -> Tensor:
        if not self.role:
            return torch.arange(count)
        places = [i for start, stop in call.region(self.role) for i in range(start, stop)]
        if max(places, default=0) >= count:
            raise FieldError(self, "role", self.role, f"names tokens that the scene's {count} have not", "")
        return torch.tensor(places, dtype=torch.long)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> AddIt:
        """The scene's keys and values in every forward that is to be seen."""
        found: dict[str, Tensor] = {}
        steps: set[int] = set()
        reader = _Scene()
        with context.attach(reader) as run, torch.no_grad():
            for given in batches:
                batch = dict(given)
                step = batch.pop("step", (0, 1))
                if not isinstance(step, Sequence) or len(step) != 2 or step[0] in steps:
                    rule = 'must hold one forward for each step, told by "step": its number, and of how many'
                    raise FieldError(self, "batches", step, rule, [{"step": (0, 50)}, {"step": (1, 50)}])
                number, of = step
                steps.add(number)
                if number < self.until * of:
                    run.reset()
                    with run.denoising(number, of):
                        run(**batch)
                    for layer, pieces in run[reader].items():
                        found |= {f"{what}.{layer}.{number}": x for what, x in pieces.items()}
        if not found:
            raise FieldError(self, "batches", 0, "must hold each forward of the scene", [{"step": (0, 50)}])
        return replace(self, source=Fitted(found))


def balance(given: Callable[[float], float]) -> float:
    """The scale at which `given(scale)`, the share that the scene gets, is a half; an end of the range if nowhere."""
    low, high = LOW, HIGH
    if (given(low) > 0.5) == (given(high) > 0.5):
        return min((low, high), key=lambda scale: abs(given(scale) - 0.5))
    falls = given(low) > 0.5
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        if (given(middle) > 0.5) == falls:
            low = middle
        else:
            high = middle
    return (low * high) ** 0.5


class _Scene(Method):
    """Keys and values of self-attention by layer."""

    def idle(self, call: Call) -> bool:
        return call.cross

    @reads(Site.KEY)
    def note(self, key: Tensor, call: Call) -> None:
        call.state.forward["key"] = key

    @reads(Site.VALUE)
    def keep(self, value: Tensor, call: Call) -> Cat:
        return Cat({"key": call.state.forward["key"], "value": value})

    def answer(self, readings: Readings) -> dict[int, dict[str, Tensor]]:
        return {layer: dict(stat.pieces) for layer, stat in readings.items() if isinstance(stat, Cat)}


if __name__ == "__main__":
    from heedful import attach, fit, models

    model = models.tiny("vit")
    scene, picture = ({"pixel_values": torch.randn(1, 3, 8, 8)} for _ in range(2))
    with attach(model, fit(AddIt(), model, [scene])) as run:
        print(run.difference(**picture))
