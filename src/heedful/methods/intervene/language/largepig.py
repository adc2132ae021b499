"""(1 - p) softmax(logits) + p pointer: what the last layer looks at in a source, p by how unlike early exits are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.errors import FieldError
from heedful.core.kinds.decode import NOTHING_READ, Decode, Read
from heedful.core.kinds.tokens import Prompt
from heedful.core.method import Method, Stack
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, RoleName, Share
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Sum

_PAPER = Paper(
    "P013",
    "LargePiG: Your Large Language Model is Secretly a Pointer Generator",
    "Zhongxiang Sun, Zihua Si, Xiaoxue Zang, Kai Zheng, Yang Song, Xiao Zhang, Jun Xu",
    2024,
    "2410.11366",
    "WWW 2025",
    differs=(
        "This follows the authors' code, with its order of the two distributions in the divergences and its mean over "
        "the vocabulary; the full text was not at hand.",
        "An early exit goes through the model's last norm, without which its logits have another scale; the authors' "
        "code hands states to the unembedding as they are.",
        "What may be copied is a role's spans, and no special token is left out of them.",
        "The form in which early exits are also taken from the logits, as in DoLa, is not here.",
        "Each early exit is a run of its own.",
    ),
)
LAST = "last layer"


class _Pointer(Method):
    """What the last layer's last query gives to each place of a source, heads averaged, from a prompt's end on."""

    end: int  # the position of the prompt's last token
    places: tuple[int, ...]
    tokens: tuple[int, ...]  # that stand there

    def idle(self, call: Call) -> bool:
        return call.cross or not call.last_layer

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Sum | None:
        mine = (call.q_pos[0, 0] >= self.end).nonzero().flatten()
        if not len(mine):
            return None
        found = call.k_pos[0, 0, :, None] == torch.tensor(self.places, device=weights.device)
        return Sum.of(weights[0, :, mine[-1]].mean(0) @ found.to(weights))

    def answer(self, readings: Readings) -> tuple[Tensor, Tensor]:
        """The tokens of the source and the weight of each, which add up to 1."""
        (given,) = readings.values_by_layer
        tiny = torch.finfo(given.dtype).tiny
        return torch.tensor(self.tokens, device=given.device), given / given.sum().clamp(min=tiny)


class _Exit(Method):
    """The stream leaves the model as it left an earlier layer."""

    layer: int

    def idle(self, call: Call) -> bool:
        return not call.last_layer and call.layer != self.layer

    @at(Site.RESIDUAL)
    def leave(self, stream: Tensor, call: Call) -> Tensor:
        if call.layer == self.layer:
            call.state.forward["stream"] = stream
        if not call.last_layer:
            return stream
        if "stream" not in call.state.forward:
            rule = f"must be below {call.depth}, the layers of this model"
            raise FieldError("LargePiG", "layers", self.layer, rule, call.depth // 2)
        left: Tensor = call.state.forward["stream"]
        return left


class LargePiG(Decode):
    """Mixes the words of a marked source into what the model says next, the more its last layers change their mind."""

    paper = _PAPER
    role: RoleName = "context"  # the spans of the prompt that may be copied from
    layers: tuple[int, ...] = (15, 17, 19, 21, 23, 25, 27, 29)  # early exits after these; the authors' for 32 layers
    scale: NonNegativeFloat = 500.0  # what the greatest divergence is multiplied with; the authors' runs: 500
    most: Share = 0.5  # what the pointer weighs at most; the authors' code: 0.5; 0 changes nothing

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 0 or len(set(self.layers)) < len(self.layers):
            raise FieldError(self, "layers", self.layers, "must be one or more unlike numbers from 0 up", (14, 22))

    @classmethod
    def neutral(cls) -> LargePiG:
        return cls(most=0.0)

    @classmethod
    def example(cls) -> LargePiG:
        return cls(layers=(0,), scale=1e6)

    def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
        if self.most == 0:
            return {LAST: (prompt, Stack())}
        places = tuple(sorted({i for span in prompt.spans(self.role) for i in range(*span)}))
        pointer = _Pointer(len(prompt) - 1, places, tuple(prompt.tokens[i] for i in places))
        exits = {f"layer {i}": (prompt, Stack((_Exit(i),))) for i in self.layers}
        return {LAST: (prompt, Stack((pointer,))), **exits}

    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        last = logits[LAST].float()
        if self.most == 0:
            return last
        ((tokens, given),) = read[LAST].values()
        pointer = torch.zeros_like(last).index_add(0, tokens, given.to(last))
        p = self.copying(logits)
        mixed = (1 - p) * last.softmax(-1) + p * pointer
        return mixed.clamp(min=torch.finfo(mixed.dtype).tiny).log()

    def copying(self, logits: Mapping[str, Tensor]) -> Tensor:
        """What the pointer weighs."""
        last = logits[LAST].float().log_softmax(-1)
        early = torch.stack([x.float().log_softmax(-1) for name, x in logits.items() if name != LAST])
        middle = (last.exp() + early.exp()) / 2
        apart = torch.special.xlogy(middle, middle) - middle * (last + early) / 2
        return (self.scale * apart.mean(-1).amax()).clamp(0, self.most)


if __name__ == "__main__":
    from heedful import decode, models

    model, tokenizer, _ = models.default()
    text = "The mayor of Velmora is Tarquin Ossivel, and the mayor of Ghent is Oda Brill."
    source = tokenizer(text).input_ids
    ids = source + tokenizer("\nSo the mayor of Velmora is").input_ids
    asked = Prompt(tuple(ids), roles={"context": ((0, len(source)),)})
    for most in (0.0, 0.5):
        found = decode(model, asked, LargePiG(layers=(14, 18, 22, 26), most=most), new_tokens=8)
        print(most, tokenizer.decode(found))
