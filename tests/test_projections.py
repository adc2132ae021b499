"""Projections under names that few classes use: their sizes, and folding into them."""

from __future__ import annotations

import pytest
import torch

import heedful
from benchmarks.coverage.probe import Gates
from benchmarks.coverage.tiny import Tiny, build, output_tensors
from heedful.adapters.layers import projections
from heedful.conformance.tolerances import close_model
from heedful.methods import HeadScale

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of parts that are not built


@torch.no_grad()
def test_an_edit_goes_into_them() -> None:
    one, method = build("Pix2StructForConditionalGeneration"), HeadScale(1.6)
    plain = output_tensors(one.forward())
    with heedful.attach(one.model, method):
        wanted = output_tensors(one.forward())
    found = output_tensors(Tiny(heedful.fold(one.model, method), one.inputs).forward())
    assert all(close_model(x, y) for x, y in zip(found, wanted, strict=True))
    assert not close_model(plain[0], wanted[0])


@pytest.mark.parametrize("name", ["Wav2Vec2ConformerModel", "SeamlessM4TForSpeechToText", "Wav2Vec2BertModel"])
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
