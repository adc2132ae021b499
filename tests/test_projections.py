"""Projections under names that few classes use, or with something built around them: their sizes, and folding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma4VisionConfig, Gemma4VisionModel

import heedful
from benchmarks.coverage.probe import Gates
from benchmarks.coverage.tiny import Tiny, build, output_tensors
from heedful.adapters.around import gives_alone
from heedful.adapters.choosing import adapter_for
from heedful.adapters.projections import projections
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call
from heedful.core.entry import FitContext, Layer
from heedful.core.errors import FoldError, RefusedModel
from heedful.core.kinds.weights import HeadWeights
from heedful.core.method import Method
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Cat
from heedful.methods import HeadScale, PruneHeads

from .samples import PAPER

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of parts that are not built


@pytest.mark.parametrize("name", ["Pix2StructForConditionalGeneration", "MoshiModel"])
@torch.no_grad()
def test_an_edit_goes_into_them(name: str) -> None:
    one, method = build(name), HeadScale(1.6)
    plain = output_tensors(one.forward())
    with heedful.attach(one.model, method):
        wanted = output_tensors(one.forward())
    found = output_tensors(Tiny(heedful.fold(one.model, method), one.inputs).forward())
    assert all(close_model(x, y) for x, y in zip(found, wanted, strict=True))
    assert not close_model(plain[0], wanted[0])


@pytest.mark.parametrize(
    "name", ["Wav2Vec2ConformerModel", "SeamlessM4TForSpeechToText", "Wav2Vec2BertModel", "MoshiModel", "NeoMMEModel"]
)
@torch.no_grad()
def test_what_is_learned_for_each_head_has_the_size_of_the_calls(name: str) -> None:
    one = build(name)
    plain = output_tensors(one.forward())
    with heedful.attach(one.model, Gates()):
        assert not close_model(output_tensors(one.forward())[0], plain[0])


@pytest.mark.parametrize("name", ["Wav2Vec2ConformerModel", "Wav2Vec2BertModel"])
def test_they_are_found(name: str) -> None:
    found = projections(build(name).model, "encoder.layers.0.self_attn", 0)
    names = [child for _, child in (found.q, found.k, found.v, found.o)]
    assert names == ["linear_q", "linear_k", "linear_v", "linear_out"]


class Look(Method):
    """The sizes of every layer's call."""

    paper = PAPER

    @reads(Site.HEAD_OUTPUT)
    def look(self, heads: Tensor, call: Call) -> Cat:
        assert call.query is not None
        assert call.value is not None
        sizes = [call.heads, call.value.shape[1], call.query.shape[-1], call.value.shape[-1]]
        return Cat.of("sizes", torch.tensor(sizes))


class Tilt(Method):
    """What attention adds to the stream, larger from entry to entry; norms behind it would undo one factor for all."""

    paper = PAPER

    @at(Site.OUTPUT)
    def tilt(self, output: Tensor, call: Call) -> Tensor:
        return output * torch.linspace(0, 2, output.shape[-1])

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        assert weights.o_bias is None
        return replace(weights, o=weights.o * torch.linspace(0, 2, len(weights.o))[:, None, None])


def tower(clipped: bool) -> Any:
    """Gemma 4's vision tower, whose projections can clip what goes in and what comes out; these bounds bind."""
    config = Gemma4VisionConfig(
        hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, use_clipped_linears=clipped, patch_size=2, position_embedding_size=8, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma4VisionModel(config).eval()
    for name, bound in model.named_buffers():
        if name.endswith(("_min", "_max")):
            bound.fill_(-0.5 if name.endswith("_min") else 0.5)
    return model


PLACES = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"), -1).view(1, 9, 2)
SEEN = {"pixel_values": torch.rand(1, 9, 12, generator=torch.Generator().manual_seed(0)), "pixel_position_ids": PLACES}


@torch.no_grad()
def test_projections_that_clip_tell_sizes_and_no_weights() -> None:
    model = tower(clipped=True)
    plain = model(**SEEN).last_hidden_state
    with heedful.attach(model, Look()) as run:
        model(**SEEN)
        seen = [stat.pieces["sizes"].tolist() for stat in run[Look()].values()]
    found = [[x.heads, x.kv_heads, x.head_dim, x.value_dim] for x in adapter_for(model, None).sizes()]
    assert found == seen == [[4, 2, 8, 8]] * 2
    assert [x.width for x in adapter_for(model, None).sizes()] == [24, 24]
    with heedful.attach(model, Gates()):
        assert not close_model(model(**SEEN).last_hidden_state, plain)
    said = r"encoder.layers.0.self_attn.q_proj \(Gemma4ClippableLinear\) does more than the linear map in it"
    for verb, error in ((lambda: heedful.fold(model, Tilt()), FoldError),
                        (lambda: heedful.operate(model, PruneHeads(groups=((0, 0),))), RefusedModel)):  # fmt: skip
        with pytest.raises(error, match=said):
            verb()


@torch.no_grad()
def test_what_could_clip_and_does_not_is_folded_into() -> None:
    model, method = tower(clipped=False), Tilt()
    with heedful.attach(model, method):
        wanted = model(**SEEN).last_hidden_state
    assert close_model(heedful.fold(model, method)(**SEEN).last_hidden_state, wanted)
    assert not close_model(model(**SEEN).last_hidden_state, wanted)


class Around(nn.Module):
    """A linear map, and what is done around it by name."""

    def __init__(self, does: str = "") -> None:
        super().__init__()
        self.does, self.linear = does, nn.Linear(4, 4)

    def forward(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        if self.does == "asks" and bool(x.any()):
            return -self.linear(x)
        if self.does == "before":
            x = x.relu()
        if self.does == "places":
            return self.linear(places)
        if self.does == "twice":
            x = self.linear(x)
        y = self.linear(x)
        if self.does == "drops":
            y = nn.functional.dropout(y, training=self.training)
        if self.does == "trains" and self.training:
            y = -y
        if self.does == "rests" and not self.training:
            y = -y
        if self.does == "weighs":
            y = x @ self.linear.weight
        return y.clamp(-1, 1) if self.does == "behind" else y


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("does", ["asks", "before", "behind", "places", "twice", "drops", "trains", "rests", "weighs"])
def test_what_is_around_a_linear_map_is_told_in_training_and_at_rest(does: str, training: bool) -> None:
    assert gives_alone(Around().train(training)) == "linear"
    module = Around(does).train(training)
    assert gives_alone(module) is None
    assert module.training is module.linear.training is training


class Keeps(Around):
    """Keeps what it saw last, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self.past: list[Tensor] = []
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        self.last = x
        self.past.append(x)
        self.seen.add_(1)
        return super().forward(x)


def test_a_module_that_is_looked_at_keeps_nothing_of_it() -> None:
    module = Keeps()
    gives_alone(module)
    assert module.last is None
    assert module.past == []
    assert module.seen == 0
    module(torch.ones(2, 4))
    assert module.seen == 1


def test_what_has_another_part_or_another_forward_is_more_than_a_linear_map() -> None:
    with_part, replaced = Around(), Around()
    with_part.norm = nn.LayerNorm(4)
    replaced.forward = lambda x: -replaced.linear(x)  # type: ignore[method-assign]
    assert gives_alone(with_part) is gives_alone(replaced) is gives_alone(nn.Linear(4, 4)) is None


def test_what_does_nothing_around_a_linear_map_is_not_blamed_for_what_is_missing() -> None:
    model = heedful.models.tiny("llama")
    layer = model.model.layers[0].self_attn
    layer.v_proj, layer.o_proj = Mixed(layer.v_proj), nn.Sequential(layer.o_proj)
    with pytest.raises(RefusedModel, match=r"has no separate value projection that heedful knows"):
        projections(model, "model.layers.0.self_attn", 0)


class Mixed(nn.Module):
    """Two maps, so that it is not told how many numbers heads have."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.first, self.second = linear, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


class Reads(Method):
    """Is fitted to the weights of the second layer alone."""

    paper = PAPER
    found: float = 0.0

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> Reads:
        return Reads(float(context.weights(1).q.abs().sum()))

    @at(Site.HIDDEN)
    def leave(self, hidden: Tensor, call: Call) -> Tensor:
        return hidden


@torch.no_grad()
def test_a_layer_where_nothing_is_done_need_tell_no_sizes() -> None:
    model = heedful.models.tiny("llama")
    ids = heedful.models.tiny_inputs(model)["input_ids"]
    layer = model.model.layers[0].self_attn
    layer.v_proj, layer.o_proj = Mixed(layer.v_proj), Mixed(layer.o_proj)
    plain, here = model(ids).logits, [1]
    with heedful.attach(model, Gates().on(layers=here)):
        assert not close_model(model(ids).logits, plain)
    with pytest.raises(RefusedModel, match=r"layers.0.self_attn .* has no separate value, output projection"):
        heedful.attach(model, Gates())
    method = HeadScale(1.6).on(layers=here)
    with heedful.attach(model, method):
        wanted = model(ids).logits
    assert close_model(heedful.fold(model, method)(ids).logits, wanted)
    q = model.model.layers[1].self_attn.q_proj.weight
    assert close_model(torch.tensor(heedful.fit(Reads(), model, ()).found), q.abs().sum())
    with pytest.raises(FoldError, match=r"layers.0.self_attn .* has no separate value, output projection"):
        heedful.fold(model, HeadScale(1.6))
