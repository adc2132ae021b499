"""An encoder-decoder that copies, reverses and sorts strings: where it must look is known for two of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from heedful.adapters.wrapped import device_of
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.sites import Site, reads
from heedful.core.stats import Mean
from heedful.laboratory.course import Batch, Course, Opener, Quantity, told

START, WORDS, FIRST = 0, 16, 4  # tokens 1 to 3 name what is to be done, words follow
WAYS = ("copy", "reverse", "sort")
TRIED = 128  # strings of each in the end


class _OnItsWord(Method):
    """The share of its attention that a written word gives the word of the source that it is, head by head."""

    length: int  # words of a string
    backwards: bool

    @reads(Site.PATTERN)
    def read(self, weights: Tensor, call: Call) -> Mean:
        # place 0 of the source names the task, and row n writes word n
        wanted = self.length - call.q_pos if self.backwards else 1 + call.q_pos
        there = call.k_pos[..., None, :] == wanted[..., None]
        size = weights.abs()  # rows need not add up to one, nor be positive
        share = (size * there).sum(-1) / size.sum(-1).clamp(min=1e-9)
        return Mean.of(share.mean(-1).sum(0), len(weights))


@dataclass(frozen=True)
class Strings(Course):
    """As many strings to copy as to reverse and to sort; accuracy on fresh ones, and where cross-attention looks."""

    name: ClassVar[str] = "strings"
    about: ClassVar[str] = "Copies, reverses and sorts random words; the share of the words written that are right."
    tokens: int = 756_000
    length: int = 10  # words of a string
    rows: int = 16  # of a batch, for each of the three
    width: int = 64
    layers: int = 2  # of the encoder, and of the decoder
    heads: int = 4
    where: str = ""  # where a mechanism acts: everywhere, or in "cross", "encoder" or "decoder" alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.where not in ("", "cross", "encoder", "decoder"):
            raise FieldError(self, "where", self.where, 'must be "cross", "encoder", "decoder" or "" for all', "cross")

    @property
    def a_batch(self) -> int:
        return self.rows * len(WAYS) * (2 * self.length + 1)

    @property
    def only(self) -> tuple[str, ...] | None:
        layers = range(self.layers)
        return {
            "": None,
            "encoder": ("model.encoder",),
            "decoder": tuple(f"model.decoder.layers.{i}.self_attn" for i in layers),
            "cross": tuple(f"model.decoder.layers.{i}.encoder_attn" for i in layers),
        }[self.where]

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        return (
            *(Quantity(way, "", "share right", True) for way in WAYS),
            *(
                Quantity(
                    f"{way} off",
                    f"What the best head of cross-attention gives other words than the one to {way}.",
                    "share",
                    False,
                )
                for way in WAYS[:2]
            ),
        )

    def model(self, seed: int) -> Any:
        from transformers import BartConfig, BartForConditionalGeneration

        torch.manual_seed(seed)
        return BartForConditionalGeneration(
            BartConfig(
                vocab_size=FIRST + WORDS, d_model=self.width, encoder_layers=self.layers, decoder_layers=self.layers,
                encoder_attention_heads=self.heads, decoder_attention_heads=self.heads,
                encoder_ffn_dim=2 * self.width, decoder_ffn_dim=2 * self.width, decoder_start_token_id=START,
                pad_token_id=None, bos_token_id=None, eos_token_id=None, forced_eos_token_id=None,
                max_position_embeddings=2 * self.length, dropout=0.0, attn_implementation="sdpa",
            )
        )  # fmt: skip

    def drawn(self, random: Generator, rows: int) -> Batch:
        """Strings to copy, then as many to reverse and to sort."""
        sources, targets = [], []
        for number, way in enumerate(WAYS):
            words = torch.randint(FIRST, FIRST + WORDS, (rows, self.length), generator=random)
            done = {"copy": words, "reverse": words.flip(1), "sort": words.sort(1).values}[way]
            sources.append(torch.cat([torch.full((rows, 1), 1 + number), words], 1))
            targets.append(done)
        labels = torch.cat(targets)
        before = torch.cat([torch.full((len(labels), 1), START), labels[:, :-1]], 1)
        return {"input_ids": torch.cat(sources), "decoder_input_ids": before, "labels": labels}

    def batch(self, seed: int, random: Generator) -> Batch:
        return self.drawn(random, self.rows)

    def measure(self, opened: Opener, seed: int) -> dict[str, float]:
        tried = self.drawn(Generator().manual_seed(10_000 + seed), TRIED)
        found = {}
        parts = {k: x.chunk(len(WAYS)) for k, x in tried.items()}
        for number, way in enumerate(WAYS):
            reader = _OnItsWord(self.length, way == "reverse")
            with opened(*([reader] if way != "sort" else [])) as run:
                device = device_of(run.model)
                inputs = {k: x[number].to(device) for k, x in parts.items() if k != "labels"}
                best = run(**inputs, use_cache=False).logits.argmax(-1).cpu()
                found[way] = float((best == parts["labels"][number]).float().mean())
                if (by_layer := told(run, reader)) is not None:
                    cross = [i for i, name in enumerate(run.layer_names) if name.endswith("encoder_attn")]
                    shares = [by_layer[i].value.max() for i in cross if i in by_layer]
                    if shares:
                        found[f"{way} off"] = 1 - float(torch.stack(shares).max())
        return found
