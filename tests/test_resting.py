"""Layers in which nothing acts are handed on to the model, unless somebody needs to understand them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

from heedful import attach
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call, Merged
from heedful.core.method import Method
from heedful.core.sites import Site, at, reads
from heedful.methods import TempScale
from heedful.tiny import tiny, tiny_inputs

from .samples import PAPER

IDS = torch.arange(3, 13)[None]


class Told(Method):
    """Notes where queries of cross attention stand, and whether none may know of later ones."""

    paper = PAPER

    @reads(Site.PATTERN)
    def look(self, x: Tensor, call: Call) -> None:
        if call.cross:
            SEEN.append((call.q_pos[0, 0].tolist(), call.causal))


class Halve(Method):
    """Leaves every second token of an encoder."""

    paper = PAPER
    causal = chunk_invariant = False

    @at(Site.RESIDUAL, merges=True)
    def merge(self, x: Tensor, call: Call) -> Merged:
        to = torch.arange(x.shape[1]) // 2
        return Merged(x[:, ::2], to.expand(len(x), -1))


SEEN: list[tuple[list[int], bool]] = []


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    SEEN.clear()


@torch.no_grad()
def test_those_behind_know_where_packed_texts_begin() -> None:
    few = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    few |= {"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["full_attention"]}
    sides = {"encoder": T5GemmaModuleConfig(**few), "decoder": T5GemmaModuleConfig(**few)}
    model = T5GemmaForConditionalGeneration(T5GemmaConfig(**sides, vocab_size=128)).eval()
    places = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
    with attach(model, Told().on(layers=2)) as run:
        run(input_ids=IDS, decoder_input_ids=IDS, decoder_position_ids=places)
    assert [(places[0].tolist(), True)] == SEEN


@torch.no_grad()
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_those_behind_know_that_no_query_may_know_of_later_ones(kind: str) -> None:
    model = tiny(kind)
    with attach(model, Told()) as run:
        run(**tiny_inputs(model))
        crossed = [i for i, name in enumerate(run.layer_names) if "encoder_attn" in name or "EncDec" in name]
    every, SEEN[:] = [*SEEN], []
    with attach(model, Told().on(layers=crossed)) as run:
        run(**tiny_inputs(model))
    assert every == SEEN
    assert {causal for _, causal in every} == {True}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_a_backend_that_is_asked_for_serves_them_too(kind: str) -> None:
    model = tiny(kind)
    inputs = tiny_inputs(model)
    with attach(model, TempScale(0.5).on(layers=0)) as run:
        found = run(**inputs).logits
    assert len({*run.state.backends.values()}) > 1
    with attach(model, TempScale(0.5).on(layers=0), backend="tiled") as run:
        assert close_model(run(**inputs).logits, found)
    assert {*run.state.backends.values()} == {"tiled"}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_they_give_their_patterns_to_who_asks(kind: str) -> None:
    model = tiny(kind)
    found = {}
    for kernel in ("eager", "sdpa"):
        model.set_attn_implementation(kernel)
        with attach(model, TempScale(0.5).on(layers=0)) as run:
            out = run(**tiny_inputs(model), output_attentions=True)
        found[kernel] = [*(out.attentions if kind == "llama" else out.cross_attentions)]
    assert len(found["eager"]) > 1
    assert all(close_model(a, b) for a, b in zip(*found.values(), strict=True))


@torch.no_grad()
def test_they_attend_to_the_tokens_that_are_left() -> None:
    model = tiny("bart")
    inputs = tiny_inputs(model)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][:, -3:] = 0
    with attach(model, Halve().on(layers=0)) as run:
        found = run(**inputs).logits
    with attach(model, Halve().on(layers=0), backend="reference") as run:
        assert close_model(run(**inputs).logits, found)
    assert not close_model(model(**inputs).logits, found)
