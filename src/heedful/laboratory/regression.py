"""Regression in context: points and their values on a plane that no other text has, and one point more.

After S. Garg, D. Tsipras, P. Liang and G. Valiant, What Can Transformers Learn In-Context? (arXiv 2208.01066).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from heedful.adapters.wrapped import device_of
from heedful.laboratory.course import Batch, Course, Opener, Quantity

TRIED = 512  # texts in the end
LONGER = 2  # times as many points as in training


@cache
def _kind() -> Any:
    """A Llama that reads points and values where others read words, and tells a value at each point."""
    from transformers import LlamaForCausalLM

    class Regressor(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.shown = nn.Linear(config.vocab_size, config.hidden_size)

        def forward(self, points: Tensor, values: Tensor, **more: Any) -> dict[str, Tensor]:
            """Points `[b n d]` and values `[b n]`, which stand by turns; the value told at each point, and the loss."""
            none = torch.zeros_like
            first = torch.cat([points, none(values)[..., None]], -1)
            second = torch.cat([none(points), values[..., None]], -1)
            rows = torch.stack([first, second], 2).flatten(1, 2)[:, :-1]  # nothing is asked after the last value
            states = self.model(inputs_embeds=self.shown(rows), use_cache=False).last_hidden_state
            told = self.lm_head(states)[:, ::2, 0]
            return {"loss": (told - values).square().mean(), "told": told}

    return Regressor


@dataclass(frozen=True)
class Regression(Course):
    """Planes through the origin, drawn anew for every text; squared error where nothing known would leave one of 1."""

    name: ClassVar[str] = "regression"
    about: ClassVar[str] = (
        "Tells the value of a point from points and values before it; squared error, where telling zero has 1."
    )
    timed: ClassVar[bool] = False  # the text's costs are its own
    tokens: int = 1_024_000
    dimensions: int = 3
    points: int = 8  # of a text
    rows: int = 64
    width: int = 64
    layers: int = 2
    heads: int = 4

    @property
    def a_batch(self) -> int:
        return self.rows * 2 * self.points

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        last = f"Of the last of {self.points} points; {self.dimensions} before it settle the plane."
        more = f"Of the last of {LONGER * self.points} points, more than a text of training has."
        return (
            Quantity("error", last, "variance", False),
            Quantity("early error", f"Of point {self.dimensions}, one too few for a plane.", "variance", False),
            Quantity(f"error at {LONGER} x", more, "variance", False),
        )

    def model(self, seed: int) -> Any:
        from transformers import LlamaConfig

        torch.manual_seed(seed)
        return _kind()(
            LlamaConfig(
                vocab_size=self.dimensions + 1, hidden_size=self.width, intermediate_size=5 * self.width // 2,
                num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads,
                max_position_embeddings=2 * self.points, attn_implementation="sdpa",
            )
        )  # fmt: skip

    def drawn(self, random: Generator, rows: int, times: int = 1) -> Batch:
        """Points from a normal distribution, and values of unit variance."""
        points = torch.randn(rows, times * self.points, self.dimensions, generator=random)
        planes = torch.randn(rows, self.dimensions, 1, generator=random) / self.dimensions**0.5
        return {"points": points, "values": (points @ planes)[..., 0]}

    def batch(self, seed: int, random: Generator) -> Batch:
        return self.drawn(random, self.rows)

    def measure(self, opened: Opener, seed: int) -> dict[str, float]:
        random, errors = Generator().manual_seed(10_000 + seed), {}
        with opened() as run:
            device = device_of(run.model)
            for times in (1, LONGER):
                tried = self.drawn(random, TRIED, times)
                told = run(**{name: x.to(device) for name, x in tried.items()})["told"].cpu()
                errors[times] = (told - tried["values"]).square().mean(0)
        return {
            "error": float(errors[1][-1]), "early error": float(errors[1][self.dimensions - 1]),
            f"error at {LONGER} x": float(errors[LONGER][-1]),
        }  # fmt: skip
