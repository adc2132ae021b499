"""Tokens by max over layers, heads and last queries q of w_q A_qj, w from 0 to 1, pooled over neighbours; best kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.errors import FieldError
from heedful.core.kinds.tokens import Prompt, Reader, Tokens
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveInt
from heedful.core.sites import Site, reads
from heedful.core.stats import Max
from heedful.kit.budget import Budget, room_for

_PAPER = Paper(
    "P280",
    "Draft-based Approximate Inference for LLMs",
    "Kevin Galim, Ethan Ewer, Wonjun Kang, Minjae Lee, Hyung Il Koo, Kangwook Lee",
    2025,
    "2506.08373",
    "arXiv",
    differs=(
        "The draft is some layers of the model itself and not a smaller model; asking it costs as much as reading the "
        "prompt.",
        "SpecPC alone is here: SpecKV needs tokens that a draft wrote ahead, and no draft is at hand.",
        "The draft looks ahead by one token, as in the authors' setting, which is not read: the prompt's own last "
        "queries alone are asked.",
        "Of equal scores the earlier token goes first.",
        "A budget smaller than the window keeps the prompt's end; the authors' code keeps the window's beginning.",
    ),
)


class _LastQueries(Method):
    """The most that any of a prompt's last queries gives to each token, the later queries counting for more."""

    rows: int
    total: int  # tokens of the prompt
    first: int  # the first layer that is asked
    stop: int | None  # the first one behind it that is not; None: all are

    def idle(self, call: Call) -> bool:
        return call.layer < self.first or (self.stop is not None and call.layer >= self.stop)

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Max | None:
        place = call.q_pos[0, 0] - (self.total - self.rows)
        mine = (place >= 0).nonzero().flatten()
        if not len(mine):
            return None
        share = place[mine] / (self.rows - 1) if self.rows > 1 else torch.ones_like(mine)
        most = (weights[0][:, mine] * share[:, None]).amax((0, 1))
        return Max.of(call.by_key(most, self.total)[:, None])

    def answer(self, readings: Readings) -> Tensor:
        return torch.stack(readings.values_by_layer).amax(0)


class SpecPC(Tokens):
    """Drops the tokens of a prompt to which a draft's last queries give least; their neighbours stay with the best."""

    paper = _PAPER
    budget: Budget = 1024  # tokens that stay, or a share; the authors: 1024 to 3072
    window: PositiveInt = 64  # last tokens, whose queries are asked, and which stay; the authors: 64
    kernel: PositiveInt = 64  # tokens over which scores are pooled; the authors: 64, for Llama 32
    near: NonNegativeInt = 64  # tokens around a good one that stay with it; the authors: 64, for Llama 32
    first: NonNegativeInt = 8  # the first layer of the draft that is asked; the authors: 8
    stop: int | None = None  # the draft ends before this layer of the model; None: it is the model

    def __post_init__(self) -> None:
        if self.stop is not None and self.stop <= self.first:
            rule = f"must lie behind the first layer that is asked, {self.first}, or be None"
            raise FieldError(self, "stop", self.stop, rule, self.first + 1)

    @classmethod
    def neutral(cls) -> SpecPC:
        return cls(budget=1.0)

    @classmethod
    def example(cls) -> SpecPC:
        return cls(budget=0.5, window=2, kernel=3, near=2, first=0)

    def arrange(self, prompt: Prompt, read: Reader) -> Prompt:
        total = len(prompt)
        room = room_for(self.budget, total)
        if room >= total:
            return prompt
        rows = min(self.window, total)
        return prompt.only(self.chosen(self.scores(prompt, read, rows), room, rows))

    def scores(self, prompt: Prompt, read: Reader, rows: int) -> Tensor:
        """What each token of the prompt gets, `[n]`."""
        found: Tensor = read(prompt, _LastQueries(rows, len(prompt), self.first, self.stop))
        return found

    def chosen(self, scores: Tensor, room: int, rows: int) -> tuple[int, ...]:
        """The numbers of `room` tokens: the last rows, then the best ones, each with what stands near it."""
        total, before = len(scores), (self.kernel - 1) // 2
        pooled = max_pool1d(pad(scores[None], (before, self.kernel - 1 - before)), self.kernel, 1)[0]
        best = pooled.argsort(descending=True, stable=True)[:room].tolist()
        around = range(-((self.near - 1) // 2), self.near - (self.near - 1) // 2) if self.near else (0,)
        nearest = sorted(around, key=abs)
        window = range(total - 1, total - rows - 1, -1)  # where there is no room for all of it, its end stays
        order = [*window, *(min(max(0, i + by), total - 1) for i in best for by in nearest)]
        return tuple(sorted(list(dict.fromkeys(order))[:room]))


if __name__ == "__main__":
    from heedful import arrange, models

    model, tokenizer, _ = models.default()
    text = "The sun rises in the east. " * 20 + "The number of Oslo is 7312. " + "It sets in the west. " * 20
    tokens = tokenizer(text + "The number of Oslo is").input_ids
    print(tokenizer.decode(arrange(model, Prompt(tuple(tokens)), SpecPC(0.2, 8, 5, 4)).tokens))
