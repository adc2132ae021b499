"""The residual stream as a site: what is read is what transformers calls hidden states, and edits go on from there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.adapters.layers import block_of
from heedful.core.call import Call
from heedful.core.method import Method
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Cat

from .samples import PAPER


class Streams(Method):
    """Keeps the stream of every layer."""

    paper = PAPER

    @reads(Site.RESIDUAL)
    def keep(self, stream: Tensor, call: Call) -> Cat:
        return Cat.of(f"{call.forward}", stream)


class Push(Method):
    """Moves the stream of every token by the same amount."""

    paper = PAPER
    by: float = 1.0

    @at(Site.RESIDUAL)
    def push(self, stream: Tensor, call: Call) -> Tensor:
        return stream + self.by * torch.linspace(-1, 1, stream.shape[-1])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit"])
def test_what_is_read_is_the_model_s_hidden_states(kind: str) -> None:
    model = models.tiny(kind)
    inputs = models.tiny_inputs(model)
    with torch.no_grad(), heedful.attach(model, Streams()) as run:
        hidden = run(**inputs, output_hidden_states=True).hidden_states
        found = [pieces[0] for pieces in run[Streams()].values_by_layer]
    assert len(found) == len(run.layer_names)
    for mine, theirs in zip(found[:-1], hidden[1:-1], strict=True):  # the last one is normalised in some models
        assert torch.equal(mine, theirs)


def leaves(model: torch.nn.Module, block: torch.nn.Module, **inputs: Tensor) -> Tensor:
    """What a layer hands on, hooks and all."""
    seen: list[Tensor] = []
    handle = block.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    model(**inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(("kind", "layers"), [("llama", "model.layers"), ("t5", "decoder.block")])
def test_an_edit_goes_on_from_where_it_is_and_once_a_layer(kind: str, layers: str) -> None:
    """T5's decoder layers hold two attentions."""
    model = models.tiny(kind)
    inputs = models.tiny_inputs(model)
    first, second, *_ = model.get_submodule(layers)
    only = layers.split(".", maxsplit=1)[0] if kind == "t5" else None
    push = 0.5 * torch.linspace(-1, 1, model.config.hidden_size)
    with torch.no_grad():
        plain = leaves(model, first, **inputs), leaves(model, second, **inputs)
        with heedful.attach(model, Push(0.5).on(layers=[0, 1] if only else [0]), only=only) as run:
            pushed = leaves(model, first, **inputs), leaves(model, second, **inputs)
            assert run.activity().active
        assert torch.equal(pushed[0], plain[0] + push)
        assert not torch.equal(pushed[1], plain[1])
        assert torch.equal(leaves(model, second, **inputs), plain[1])


def test_the_block_of_an_attention() -> None:
    llama, t5 = models.tiny("llama"), models.tiny("t5")
    assert block_of(llama, "model.layers.1.self_attn") == "model.layers.1"
    assert block_of(t5, "encoder.block.1.layer.0.SelfAttention") == "encoder.block.1"
    assert block_of(torch.nn.Sequential(torch.nn.Linear(2, 2)), "0") is None


def test_hidden_states_are_those_after_the_edits_whoever_collected_them_before() -> None:
    """transformers leaves its own hooks in a model from the first time on that hidden states are asked for."""
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True).hidden_states
        with heedful.attach(model, Push(0.5).on(layers=[0])) as run:
            pushed = run(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(pushed[1], plain[1] + 0.5 * torch.linspace(-1, 1, model.config.hidden_size))
