"""operate(): a copy with other weights, right in every model that it does not refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from benchmarks.coverage.tiny import build
from heedful import Method, Site, attach, models, operate
from heedful.adapters.choosing import adapter_for
from heedful.adapters.projections import projections, size_of
from heedful.adapters.weights import read_weights
from heedful.authoring import Call, Layer, Paper, Surgery, at
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, RefusedModel, SiteError
from heedful.core.kinds.weights import HeadWeights

PAPER = Paper("T000", "A test", "A. Tester", 2026, url="https://example.org")


class Drop(Surgery):
    """Takes groups out of layer 1."""

    paper = PAPER
    groups: tuple[int, ...] = (0,)

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        if layer.number != 1:
            return weights
        return weights.keep_groups(tuple(g for g in range(weights.kv_heads) if g not in self.groups))


class Silence(Method):
    """What dropping must come to: the groups' heads are zero."""

    paper = PAPER
    groups: tuple[int, ...] = (0,)

    @at(Site.HEAD_OUTPUT)
    def zero(self, heads: Tensor, call: Call) -> Tensor:
        size = call.heads // call.kv_heads
        out = heads.clone()
        for g in self.groups:
            out[:, g * size : (g + 1) * size] = 0
        return out


class Double(Surgery):
    """Doubles the output projection, which doubles every head."""

    paper = PAPER

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        return HeadWeights(
            weights.q,
            weights.k,
            weights.v,
            2 * weights.o,
            weights.q_bias,
            weights.k_bias,
            weights.v_bias,
            weights.o_bias,
        )


class Twice(Method):
    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def twice(self, heads: Tensor, call: Call) -> Tensor:
        return 2 * heads


class Nothing(Surgery):
    """Hands back what it was given."""

    paper = PAPER

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        return weights


class Uneven(Surgery):
    """Drops one query head of a group."""

    paper = PAPER

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        return HeadWeights(weights.q[1:], weights.k, weights.v, weights.o[:, 1:])


class Share(Surgery):
    """Lets two query heads share each key head, of layer 1 or of all."""

    paper = PAPER
    layers: tuple[int, ...] = (0, 1)

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        if layer.number not in self.layers:
            return weights
        return HeadWeights(weights.q, weights.k[::2], weights.v[::2], weights.o)


class Wrong(Surgery):
    """Returns a tensor."""

    paper = PAPER

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        return weights.o  # type: ignore[return-value]


def _first(output: Any) -> Tensor:
    return next(x for x in output.values() if isinstance(x, Tensor) and x.is_floating_point() and x.ndim)


def _out(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return _first(model(**inputs))


SHRINKS = [
    "llama",
    "mha",
    "odd_head_dim",
    "bert",
    "qwen3",
    "gemma2",
    "mistral",
    "bart",
    "vit",
    "clip",
    "whisper",
    "llava",
]


@pytest.mark.parametrize("kind", SHRINKS)
def test_dropping_heads_is_silencing_them(kind: str) -> None:
    model = models.tiny(kind)
    inputs = models.tiny_inputs(model)
    small = operate(model, Drop())
    with attach(model, Silence().on(layers=1)) as run:
        wanted = _out(run, inputs)
    assert close_model(_out(small, inputs), wanted)
    assert not close_model(_out(model, inputs), wanted)
    assert small.num_parameters() < model.num_parameters()


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "gpt_oss", "gpt2"])
def test_weights_of_the_same_shape(kind: str) -> None:
    model = models.tiny(kind)
    inputs = models.tiny_inputs(model)
    with attach(model, Twice()) as run:
        wanted = _out(run, inputs)
    # a doubled projection leaves its bias alone, and so does doubling heads
    assert close_model(_out(operate(model, Double()), inputs), wanted)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gpt2", "GPT2Attention maps to queries, keys and values at once; its heads can be silenced, as"),
        ("falcon", r"self_attention \(FalconAttention\) computes attention by itself"),
        ("t5", "takes a position bias with one row a head from another layer; no head can be dropped"),
        ("gpt_oss", r"GptOssAttention.sinks \(4,\) goes over all heads"),
    ],
)
def test_what_cannot_be_right_is_refused(kind: str, reason: str) -> None:
    with pytest.raises(RefusedModel, match=reason):
        operate(models.tiny(kind), Drop())


def test_norms_over_all_heads_are_refused() -> None:
    model = models.tiny("llama")
    model.model.layers[1].self_attn.q_norm = torch.nn.RMSNorm(32)
    with pytest.raises(RefusedModel, match=r"q_norm.weight \(32,\) goes over all heads"):
        operate(model, Drop())


def test_the_original_and_its_copy_share_nothing() -> None:
    model = models.tiny("llama")
    before = copy.deepcopy(model.state_dict())
    small = operate(model, Drop(), Double())
    with torch.no_grad():
        for p in small.parameters():
            p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.model.layers[1].self_attn.q_proj.out_features == 32
    assert operate(model, Nothing()) is not model


def test_surgeries_follow_one_another() -> None:
    model = models.tiny("mha")
    inputs = models.tiny_inputs(model)
    small = operate(model, Drop((0,)), Drop((1,)), Double())
    with attach(model, Silence((0, 2)).on(layers=1) | Twice()) as run:
        assert close_model(_out(small, inputs), _out(run, inputs))


@pytest.mark.parametrize("kind", ["llama", "mha", "qwen3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_pruned_model_generates_with_a_cache(kind: str, cache: str) -> None:
    small = operate(models.tiny(kind), Drop())
    ids = models.tiny_inputs(small)["input_ids"]
    how = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    cached = small.generate(input_ids=ids, cache_implementation=cache, **how)
    assert torch.equal(cached, small.generate(input_ids=ids, use_cache=False, **how))


def test_a_pruned_model_can_be_attached_to_and_trained() -> None:
    small = operate(models.tiny("llama"), Drop())
    inputs = models.tiny_inputs(small)
    with attach(small, Twice()) as run:
        found = _out(run, inputs)
    assert close_model(found, _out(operate(small, Double()), inputs))
    small(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("layers", [(1,), (0, 1)])
def test_query_heads_may_come_to_share_key_heads(layers: tuple[int, ...]) -> None:
    model = models.tiny("mha")
    inputs = models.tiny_inputs(model)
    small = operate(model, Share(layers))
    wanted = copy.deepcopy(model)  # the same with each of these key heads twice
    for i in layers:
        part = wanted.model.layers[i].self_attn
        for linear in (part.k_proj, part.v_proj):
            by_head = linear.weight.data.view(4, 8, 32)
            by_head[1::2] = by_head[::2].clone()
    assert close_model(_out(small, inputs), _out(wanted, inputs))
    assert small.config.num_key_value_heads == (2 if len(layers) == 2 else 4)


def test_weights_are_read_head_by_head() -> None:
    model = models.tiny("bert")
    name = adapter_for(model, None).layer_names[0]
    weights = read_weights(projections(model, name, 0))
    attention = model.get_submodule(name)
    x = torch.randn(32)
    for h in range(4):
        found = weights.q[h] @ x + weights.q_bias[h]  # type: ignore[index]
        assert close_model(found, attention.query(x).view(4, 8)[h])
    heads = torch.randn(4, 8)
    out = torch.einsum("ehd,hd->e", weights.o, heads) + weights.o_bias
    dense = model.bert.encoder.layer[0].attention.output.dense
    assert close_model(out, dense(heads.flatten()))


@pytest.mark.filterwarnings("ignore")  # transformers' own, of kernels that are not installed
def test_gates_that_come_with_the_queries_are_no_heads() -> None:
    model = build("Qwen3NextForCausalLM").model
    name = adapter_for(model, None).layer_names[0]
    size, attention = size_of(model, name, 0), model.get_submodule(name)
    assert (size.heads, size.kv_heads) == (model.config.num_attention_heads, model.config.num_key_value_heads)
    assert attention.q_proj.out_features == 2 * size.heads * size.head_dim
    with pytest.raises(
        RefusedModel, match=r"query projection has rows for 8 heads, and its output projection takes 4 of"
    ):
        operate(model, Double())


def test_only_one_part_of_a_model() -> None:
    model = models.tiny("bart")
    decoder = operate(model, Double(), only="model.decoder")
    same = {n: torch.equal(a, b) for (n, a), b in zip(model.named_parameters(), decoder.parameters(), strict=True)}
    assert all(equal for name, equal in same.items() if "encoder.layers" in name)
    assert not all(same.values())


def test_errors() -> None:
    model = models.tiny("llama")
    with pytest.raises(FieldError, match=r"operate\(\).surgeries = .*must be surgery; attach\(\) methods instead"):
        operate(model, Twice())  # type: ignore[arg-type]
    with pytest.raises(SiteError, match=r"3 query heads for 2 key heads.*keep_groups"):
        operate(model, Uneven())
    with pytest.raises(SiteError, match=r"Wrong\(\): operate must return HeadWeights, not Tensor"):
        operate(model, Wrong())
    with attach(model, Silence()), pytest.raises(FieldError, match="a run is attached to it"):
        operate(model, Double())


def test_a_surgery_without_a_fit_stays_itself() -> None:
    surgery = Double()
    assert heedful.fit(surgery, models.tiny("llama"), []) is surgery
