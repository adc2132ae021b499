"""A language model of bytes on Python's own documentation, which every interpreter brings along."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from heedful.adapters.wrapped import device_of
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.figures import Curves, Figure
from heedful.core.kinds.tokens import Prompt
from heedful.core.method import Method
from heedful.core.sites import Site, reads
from heedful.core.stats import Mean
from heedful.engine.run import Run
from heedful.laboratory.course import Batch, Course, Opener, Quantity, told
from heedful.methods import MaxActivations, SinkRate

TENTHS = 10
LONGER = (2, 4, 8)  # times the training length at which a model is tried
AT_ONCE = 4096  # tokens that are read in one call


@cache
def text(tenth: int, held_out: bool) -> Tensor:
    """The bytes of every tenth topic, counted from that one on, or of all others."""
    from pydoc_data.topics import topics

    chosen = [body for i, (_, body) in enumerate(sorted(topics.items())) if (i % TENTHS == tenth) == held_out]
    return torch.frombuffer(bytearray("\n".join(chosen).encode()), dtype=torch.uint8).long()


def byte_model(width: int, layers: int, heads: int, length: int, words: int = 256) -> Any:
    """A small Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words, hidden_size=width, intermediate_size=5 * width // 2, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=length,
            tie_word_embeddings=True, attn_implementation="sdpa",
        )
    )  # fmt: skip


class _Kurtosis(Method):
    """How far outliers stand out of what a text's attention block adds: the mean over texts."""

    @reads(Site.OUTPUT)
    def read(self, output: Tensor, call: Call) -> Mean:
        x = output.flatten(1).double()
        centred = x - x.mean(1, keepdim=True)
        return Mean.of((centred.pow(4).mean(1) / centred.square().mean(1).square()).sum(), len(x))


SINKS, MAXIMA, KURTOSIS = SinkRate(), MaxActivations(), _Kurtosis()
OUTLIERS = (
    Quantity("sinks", "The share of heads and texts that park on the first token.", "share"),
    Quantity("largest", "The largest activation of the residual stream over its layer's mean.", "× mean"),
    Quantity("kurtosis", "Kurtosis of what attention blocks add; of a normal curve 3.", ""),
)


def outliers(run: Run) -> dict[str, float]:
    """What SINKS, MAXIMA and KURTOSIS saw, those of them that could act."""
    found = {}
    if (sinks := told(run, SINKS)) is not None:
        found["sinks"] = sinks.first
    if (maxima := told(run, MAXIMA)) is not None:
        found["largest"] = max(peaks.ratio for peaks in maxima.layers.values())
    if (by_layer := told(run, KURTOSIS)) is not None:
        found["kurtosis"] = fmean(float(mean.value) for mean in by_layer.values())
    return found


def _rounded(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    step = ((high - low) / 255).clamp(min=1e-12)
    return ((x - low) / step).round().clamp(0, 255) * step + low


@contextmanager
def eight_bits(model: nn.Module) -> Iterator[None]:
    """Every linear map with 8-bit weights and 8-bit inputs, for the length of a `with`: one scale a tensor."""
    maps = [m for m in model.modules() if isinstance(m, nn.Linear)]
    weights = [m.weight.data for m in maps]
    handles = []
    try:
        for m in maps:
            top = m.weight.data.abs().max()
            m.weight.data = _rounded(m.weight.data, -top, top)
            handles.append(
                m.register_forward_pre_hook(
                    # a mechanism in attention's place gives its projections no rows, which have no least number
                    lambda _, args: (_rounded(x, x.min(), x.max()) if (x := args[0]).numel() else x, *args[1:])
                )
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
        for m, weight in zip(maps, weights, strict=True):
            m.weight.data = weight


@dataclass(frozen=True)
class Text(Course):
    """Predict the next byte. Each seed holds out another tenth of the topics, all of which is read in the end."""

    name: ClassVar[str] = "text"
    about: ClassVar[str] = "Predicts the next byte of Python's documentation; at 2 x: on texts twice as long."
    tokens: int = 409_600
    length: int = 128  # bytes of a training text
    rows: int = 8  # texts of a batch
    width: int = 64
    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise FieldError(self, "width", self.width, f"must be a multiple of {self.heads} heads", 16 * self.heads)

    @property
    def a_batch(self) -> int:
        return self.rows * self.length

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        longer = (Quantity(f"loss at {n} x", "", "nats", False) for n in LONGER)
        return (
            Quantity("loss", "Held-out loss a byte.", "nats", False),
            *longer,
            Quantity("8-bit", "What 8-bit weights and activations add to the held-out loss.", "nats", False),
            *OUTLIERS,
        )

    @property
    def prompt(self) -> Prompt:
        return Prompt(tuple(text(0, held_out=True)[: LONGER[1] * self.length].tolist()))

    def model(self, seed: int) -> Any:
        torch.manual_seed(seed)
        return byte_model(self.width, self.layers, self.heads, self.length)

    def batch(self, seed: int, random: Generator) -> Batch:
        data = text(seed % TENTHS, held_out=False)
        starts = torch.randint(0, len(data) - self.length, (self.rows,), generator=random)
        ids = torch.stack([data[i : i + self.length] for i in starts.tolist()])
        return {"input_ids": ids, "labels": ids}

    def held_out(self, seed: int, times: int = 1) -> Iterator[Tensor]:
        """The held-out text `[b n]`, cut so many times as long as in training: the same bytes whatever the cut."""
        data = text(seed % TENTHS, held_out=True)
        piece = LONGER[-1] * self.length
        rows = data[: len(data) // piece * piece].view(-1, times * self.length)
        yield from rows.split(max(1, AT_ONCE // rows.shape[1]))

    def loss(self, run: Run, seed: int, times: int = 1) -> float:
        """Held-out loss in nats a byte."""
        device = device_of(run.model)
        losses, count = 0.0, 0
        for ids in self.held_out(seed, times):
            logits = run(input_ids=ids.to(device), use_cache=False).logits[:, :-1].flatten(0, 1).float()
            losses += float(nn.functional.cross_entropy(logits, ids[:, 1:].flatten().to(device), reduction="sum"))
            count += len(logits)
        return losses / count

    def measure(self, opened: Opener, seed: int) -> dict[str, float]:
        with opened(SINKS, MAXIMA, KURTOSIS) as run:
            found = {"loss": self.loss(run, seed)} | outliers(run)
        with opened() as run:
            for n in LONGER:
                found[f"loss at {n} x"] = self.loss(run, seed, n)
            with eight_bits(run.model):
                found["8-bit"] = self.loss(run, seed) - found["loss"]
        return found

    def curves(self, numbers: Mapping[str, Mapping[str, float]]) -> tuple[Figure, ...]:
        names = ["loss", *(f"loss at {n} x" for n in LONGER)]
        lines = {who: torch.tensor([of.get(name, torch.nan) for name in names]) for who, of in numbers.items()}
        what = (
            "Held-out loss, the mean over seeds, on texts of the length of training and longer ones of the same bytes."
        )
        lengths = [n * self.length for n in (1, *LONGER)]
        return (Curves("lengths", "Loss by length", what, lengths, lines, "bytes of a text", "nats", log_x=True),)
