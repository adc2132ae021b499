"""Small methods that several test files use."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from heedful.adapters.carried import shelf_of
from heedful.core.call import CachedKV, Call, Merged, Phase
from heedful.core.entry import Layer
from heedful.core.kinds.weights import HeadWeights
from heedful.core.mask import First, Mask, Window
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, at, penalises, reads
from heedful.core.state import ByIndex
from heedful.core.stats import Cat, Mean, Sum
from heedful.kit.merging import averaged, numbered
from heedful.methods import AttentionEditing

PAPER = Paper("T000", "A test", "Ada Tester, Bo Other", 2026, url="https://example.org")


class Scale(Method):
    """Multiplies what heads hand over."""

    paper = PAPER
    by: float = 2.0

    @at(Site.HEAD_OUTPUT)
    def scale(self, heads: Tensor, call: Call) -> Tensor:
        return heads * self.by


class Zero(Method):
    """Nobody attends to anything."""

    paper = PAPER

    @at(Site.PATTERN)
    def zero(self, pattern: Tensor, call: Call) -> Tensor:
        return pattern * 0


class Narrow(Method):
    """A window with one sink."""

    paper = PAPER
    size: int = 4

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        return mask & (Window(self.size) | First(1))


class Shares(Method):
    """The mean share of each head's attention that the first token gets."""

    paper = PAPER

    @reads(Site.PATTERN)
    def first(self, pattern: Tensor, call: Call) -> Mean:
        share = (pattern * (call.pairs.k == 0)).sum(-1) * call.is_text
        return Mean.of(share.sum((0, 2)), float(call.is_text.expand(pattern.shape[0], 1, -1).sum()))


class Keep(Method):
    """Keeps whole patterns."""

    paper = PAPER

    @reads(Site.PATTERN)
    def keep(self, pattern: Tensor, call: Call) -> Cat:
        return Cat.of(f"{call.forward:03d}.{call.rows.start:05d}", pattern)


class Gate(Method):
    """A learned number for each head."""

    paper = PAPER

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        import torch

        return {"gate": torch.full((layer.heads,), 0.5)}

    @at(Site.HEAD_OUTPUT)
    def gate(self, heads: Tensor, call: Call) -> Tensor:
        return heads * call.params["gate"][:, None, None]


class Forget(Method):
    """Keeps the last entries of the cache, a different number for each key head."""

    paper = PAPER
    last: int = 4

    @at(Site.CACHE)
    def forget(self, entries: CachedKV, call: Call) -> Tensor:
        import torch

        groups = torch.arange(call.kv_heads)[None, :, None]
        newest = entries.positions.index.amax(-1, keepdim=True)
        return entries.is_filled & (newest - entries.positions.index < self.last + groups)


class CountsTiles(Method):
    """Tells how the engine worked instead of what it saw."""

    paper = PAPER

    @reads(Site.PATTERN)
    def count(self, weights: Tensor, call: Call) -> Sum:
        return Sum.of(torch.ones(1))


class FoldsElsewhere(Scale):
    """Scales heads, and in weights the queries."""

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        return replace(weights, q=weights.q * self.by)


class KeepsRows(Method):
    """Remembers one number for each row of the batch with the run, where beams do not find it."""

    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def scale(self, heads: Tensor, call: Call) -> Tensor:
        if call.phase is Phase.PREFILL:
            call.state.run["by"] = 1 + heads.gather(2, call.last[..., None, None].expand(*heads.shape[:2], 1, 1)).abs()
        return heads * call.state.run["by"]


class KeepsLongest(Method):
    """Lets the longest text of a batch decide for all."""

    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def scale(self, heads: Tensor, call: Call) -> Tensor:
        return heads * (1 + call.q_pos.max() / 50)


class CountsCalls(Method):
    """Counts with the run what belongs to one text."""

    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def scale(self, heads: Tensor, call: Call) -> Tensor:
        call.state.run["calls"] = call.state.run.get("calls", 0) + 1
        return heads * (1 + 0.1 * call.state.run["calls"])


class BeginsTheRow(Method):
    """Moves every token as the row's first one stands, whichever text that is of."""

    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def shift(self, heads: Tensor, call: Call) -> Tensor:
        return heads + 0.1 * heads[:, :, :1]


class CountsRows(Method):
    """Takes rows for texts."""

    paper = PAPER

    @reads(Site.OUTPUT)
    def rows(self, output: Tensor, call: Call) -> Sum:
        return Sum.of(torch.tensor(float(len(output))))


MIX_TEXTS_UP = [
    ("packed_texts", BeginsTheRow(), "packed into one row, logits differ from each text alone"),
    ("packed_texts", CountsRows(), "tells another rows, layer 0: total than of each; set `one_text`"),
    ("each_text_alone", KeepsLongest(), "in a batch, logits differ"),
    ("each_text_alone", KeepsRows(), "with its beams in another order, logits differ"),
    ("each_text_alone", CountsCalls(), "in turn with another text, logits differ"),
]


class DrawsAnew(Method):
    """Whenever one is made it draws what no field tells."""

    paper = PAPER

    def __post_init__(self) -> None:
        vars(self)["noise"] = torch.rand(())

    @at(Site.HEAD_OUTPUT)
    def scale(self, heads: Tensor, call: Call) -> Tensor:
        return heads * vars(self)["noise"]


class HoldsATensor(Method):
    """Keeps what it learned in a field that no file holds."""

    paper = PAPER
    by: Any = torch.full((), 2.0)

    @at(Site.HEAD_OUTPUT)
    def scale(self, heads: Tensor, call: Call) -> Tensor:
        return heads * self.by


class Renames(Gate):
    """Calls its parameter something else every time."""

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {f"gate{len(NAMES.append(0) or NAMES)}": x for x in super().parameters(layer).values()}

    @at(Site.HEAD_OUTPUT)
    def gate(self, heads: Tensor, call: Call) -> Tensor:
        return heads * next(iter(call.params.values()))[:, None, None]


class TeachesNothing(AttentionEditing):
    """Every answer is as good as any other."""

    def of_layer(self, found: Tensor, wanted: Tensor) -> Tensor:
        return 0.0 * found.sum()

    def of_whole(self, found: Tensor, wanted: Tensor) -> Tensor:
        return 0.0 * found.sum()


class TeachesByMood(AttentionEditing):
    """Judges otherwise each time."""

    def of_layer(self, found: Tensor, wanted: Tensor) -> Tensor:
        return (found - torch.rand(()) * wanted).square().mean()


class DropsAsInTheFirst(Method):
    """Drops of each image the patches that are short in the first one."""

    paper = PAPER
    subjects = ("image",)
    causal = False
    chunk_invariant = False

    @at(Site.RESIDUAL, merges=True)
    def drop(self, stream: Tensor, call: Call) -> Tensor | Merged:
        if call.layer:
            return stream
        group = torch.arange(stream.shape[1]).repeat(len(stream), 1)
        group[:, 1 + stream[0, 1:].norm(dim=-1).argsort()[:8]] = -1
        to = numbered(group)
        return Merged(averaged(stream, to, torch.ones_like(stream[..., 0])), to)


NAMES: list[int] = []
TARGET = AttentionEditing.example().target


class LooksAheadAcross(Method):
    """Tells queries of later ones, in cross-attention alone."""

    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def blur(self, heads: Tensor, call: Call) -> Tensor:
        return heads + heads.mean(2, keepdim=True) if call.cross else heads


class Coarse(Method):
    """Forgets digits that its heads have."""

    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def forget(self, heads: Tensor, call: Call) -> Tensor:
        return heads * (1 + 8 * torch.finfo(heads.dtype).eps)


class Overflows(Method):
    """Squares the stream as it is handed it, and divides by what that comes to."""

    paper = PAPER

    @at(Site.RESIDUAL)
    def normalise(self, x: Tensor, call: Call) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt()


class RestsInHalf(Method):
    """Acts on models in single precision alone."""

    paper = PAPER

    @at(Site.HIDDEN)
    def turn(self, x: Tensor, call: Call) -> Tensor:
        return x if x.dtype is torch.float16 else x.roll(1, -1)


class SumsInHalf(Method):
    """Adds up what it was not shown, in the type of the model."""

    paper = PAPER

    @reads(Site.HEAD_OUTPUT)
    def total(self, heads: Tensor, call: Call) -> Sum:
        return Sum.of((100 * call.hidden).square().sum((0, 1)))


class GoesByWhatIsHeld(Method):
    """Adds the mean of all values that there are, whichever of them a window has left behind."""

    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def add(self, heads: Tensor, call: Call) -> Tensor:
        assert call.value is not None
        value, place = call.spread(call.value), (call.q_pos[..., None] >= call.k_pos[:, :, None]).to(heads)
        return heads + (place @ value) / place.sum(-1, keepdim=True)


BREAK_LAWS = [
    ("streaming", GoesByWhatIsHeld(), "a text of mistral token by token: logits differ"),
    ("causal", LooksAheadAcross(), "in cross-attention, changing tokens from 11 on moves"),
    ("conversion_is_clean", TeachesNothing(TARGET), "teaches nothing"),
    ("conversion_is_clean", TeachesByMood(TARGET), "a second time"),
    *MIX_TEXTS_UP,
    ("survives_saving", DrawsAnew(), "saved and loaded again, logits differ"),
    ("survives_saving", HoldsATensor(), "cannot be written down"),
    ("survives_saving", Renames(), "lacks"),
    ("merges_alone", DropsAsInTheFirst(), "others in its batch move logits"),
    ("half_precision", Coarse(), "from one call's numbers in torch.float16 it makes others"),
    ("half_precision", Overflows(), "llama whose stream is large: a model in torch.float16 answers otherwise"),
    ("half_precision", RestsInHalf(), "llama: a model in torch.float16 answers otherwise"),
    ("half_precision", SumsInHalf(), "tells other total than"),
]


def notes_in(cache: Any, layer: int = 0) -> dict[str, Tensor]:
    """What a stack of one part keeps with a cache in one layer."""
    found = [kept for key, kept in shelf_of(cache)._kept.items() if f"layers.{layer}." in key.module]
    return {name: x.x if isinstance(x, ByIndex) else x for kept in found for name, x in kept.items()}


class Sharpness(Method):
    paper = PAPER
    weight: float = 1.0

    @penalises(Site.PATTERN)
    def sharp(self, weights: Tensor, call: Call) -> Tensor:
        return self.weight * weights.square().sum()


def uneven(gated: bool = False) -> PreTrainedModel:
    """A small language model whose first layer has four heads and whose second has two, each gated or as it is."""
    config = AutoConfig.for_model(
        "laguna", vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_attention_heads_per_layer=[4, 2], num_key_value_heads=2, head_dim=8,
        mlp_layer_types=["dense", "dense"], pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in () if gated else model.model.layers:
        layer.self_attn.g_proj = gate = torch.nn.Linear(32, layer.self_attn.num_heads)
        torch.nn.init.zeros_(gate.weight)
        torch.nn.init.constant_(gate.bias, math.log(math.e - 1))  # of which softplus makes 1
    return model


def within(call: Call, layer: int, depth: int) -> Call:
    """The call in a list of so many layers, which stands behind two others of the model and before one."""
    return replace(call, layer=layer + 2, lowest=2, highest=depth + 1, depth=depth + 3)
