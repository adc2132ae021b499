"""A <- A + a M_i (A_i - A), layer upon layer; A_i has none of the words of all else; a = 1 in the first steps."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

from heedful.authoring import Call, FieldError, Method, NonNegativeInt, Paper, Share, Site, at


class LayerBind(Method):
    """Draws each thing in a place of its own, by its own words, and nearer things over those behind them.

    Roles name the places of each thing and the words for it, from the farthest to the nearest:
    `{"back": spans, "front": spans, "back words": ((1, 3),), "front words": ((4, 6),), "prompt": ((0, 9),)}`. It is for
    layers in which places attend to words: joint attention, where places and words are tokens of one sequence, and
    cross-attention, where all keys are words and no "prompt" is asked for. Steps are told by `run.denoising`.
    """

    paper = Paper(
        "P333",
        "Layer-wise Instance Binding for Regional and Occlusion Control in Text-to-Image Diffusion Transformers",
        "Ruidong Chen, Yancheng Bai, Xuanpu Zhang, Jianhao Zeng, Lanjun Wang, Dan Song, Lei Sun, Xiangxiang Chu, "
        "Anan Liu",
        2026,
        "2603.05769",
        "CVPR 2026",
        differs=(
            "Read off the paper's equations as others tell them; the authors' code was not found.",
            "The authors branch off a latent for each thing in the first steps and paste them together, with masks "
            "of what is in front; here all share one, a place belongs to the nearest thing, and sees none of the "
            "others'.",
            "Layers in which a thing sees nothing but itself and its words are named by hand, by default none; the "
            "authors take those that answer most to words, the first among them.",
            "Words for a thing are some of the prompt's; the authors encode a prompt for each, and one for the "
            "background. Rows of words are left as they are.",
        ),
    )
    regions: tuple[str, ...] = ("back", "front")  # roles of the things' places, from the farthest to the nearest
    words: tuple[str, ...] = ("back words", "front words")  # roles of the words for each
    prompt: str = "prompt"  # the role of all words, in joint attention
    binding: Share = 0.2  # share of the steps in which a thing has its own words alone; the authors, FLUX: 0.2
    until: Share = 0.7  # share of the steps after which nothing is done; the authors: 0.7
    opacity: Share = 0.7  # of the layers in between; the authors: 0.7
    hard: tuple[
        NonNegativeInt, ...
    ] = ()  # layers in which, while it binds, a thing sees itself and its words; of joint attention

    def __post_init__(self) -> None:
        if not self.regions or len(self.regions) != len(self.words):
            rule = f"must name as many roles as regions, {len(self.regions)}, and one or more"
            raise FieldError(self, "words", self.words, rule, ("back words", "front words"))

    @classmethod
    def neutral(cls) -> LayerBind:
        return cls(binding=0.0, until=0.0)

    @classmethod
    def example(cls) -> LayerBind:
        return cls(regions=("documents", "answer"), words=("bos", "marked"), binding=1.0)

    def idle(self, call: Call) -> bool:
        return _begun(call) >= max(self.binding, self.until)

    @at(Site.PATTERN)
    def bind(self, pattern: Tensor, call: Call) -> Tensor:
        binds = _begun(call) < self.binding
        words = [_keys(role, call) for role in self.words]
        out = self._ground(pattern, call) if binds else pattern
        for number, (region, mine) in enumerate(zip(self.regions, words, strict=True)):
            local = _alone(pattern, mine if call.cross else mine | self._picture(number, binds, call))
            much = (1.0 if binds else self.opacity) * _rows(region, call).to(pattern.dtype)
            out = out + much * (local - out)
        return out

    def _ground(self, pattern: Tensor, call: Call) -> Tensor:
        """The pattern in which places have none of the things' words; those of things are seen to afterwards."""
        alone = _alone(pattern, ~_any(_keys(role, call) for role in self.words))
        if call.cross:
            return alone
        return pattern.where(_any(_rows(role, call) for role in (self.prompt, *self.words)), alone)

    def _picture(self, number: int, binds: bool, call: Call) -> Tensor:
        """Which places a thing sees, in joint attention."""
        picture = ~_any(_keys(role, call) for role in (self.prompt, *self.words))
        if not binds:
            return picture
        things = [_keys(region, call) for region in self.regions]
        own, nearer = things[number], things[number + 1 :]
        own = own & ~_any(nearer) if nearer else own
        return own if call.layer in self.hard else own | (picture & ~_any(things))


def _begun(call: Call) -> float:
    """The share of the steps that lie behind."""
    return 0.0 if call.denoising is None else call.denoising.share


def _keys(role: str, call: Call) -> Tensor:
    return call.spread(call.marked(role))[:, :, None]


def _rows(role: str, call: Call) -> Tensor:
    return call.spread(call.marked_queries(role))[..., None]


def _any(each: Iterable[Tensor]) -> Tensor:
    return reduce(torch.logical_or, each)


def _alone(pattern: Tensor, seen: Tensor) -> Tensor:
    """The pattern with these keys alone; as it is in rows that have none of them."""
    kept = pattern * seen
    total = kept.sum(-1, keepdim=True)
    return torch.where(total > 0, kept / total.clamp(min=torch.finfo(total.dtype).tiny), pattern)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bart")
    ids = torch.randint(3, 60, (1, 12))
    roles = {"back": ((0, 6),), "front": ((4, 8),), "back words": ((1, 3),), "front words": ((4, 6),)}
    layers = tuple(f"model.decoder.layers.{i}.encoder_attn" for i in range(2))
    with attach(model, LayerBind(), roles=roles, only=layers) as run:
        for step in (0, 4, 8):
            with run.denoising(step, of=10):
                print(step, run.difference(input_ids=ids, decoder_input_ids=ids))
