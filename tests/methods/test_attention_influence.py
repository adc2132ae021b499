"""AttentionInfluence against maps made even by hand, and the heads that dense maps show to copy."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from heedful import attach, fit, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods import AttentionInfluence
from tests.by_hand import causal_map, heads_of, llama_states

HEADS = ((0, 1), (0, 3), (1, 2))


def test_chosen_heads_weigh_all_that_they_see_alike() -> None:
    bare = Bare(Shape(b=1, q=11, k=11), dtype=torch.float64, depth=2)
    v = bare.v.repeat_interleave(2, 1)
    even = torch.stack([v[:, :, : i + 1].mean(2) for i in range(11)], 2)
    got = bare.run(AttentionInfluence(heads=HEADS), "reference")[0].unflatten(1, (2, 4))
    plain = causal_map(bare.q, bare.k) @ v
    for layer in (0, 1):
        for h in range(4):
            assert close(got[:, layer, h], (even if (layer, h) in HEADS else plain)[:, h])
    assert close(bare.run(AttentionInfluence(), "tiled", 4)[0], even.repeat(1, 2, 1, 1))


def test_each_layer_has_heads_of_its_own() -> None:
    model = models.tiny("llama", num_hidden_layers=3)
    ids = models.tiny_inputs(model, 1, 12)["input_ids"]

    def attend(layer, q, k, v, rotate):
        weights = causal_map(rotate(q), rotate(k))
        for one, h in HEADS:
            if one == layer:
                weights[:, h] = torch.ones(12, 12).tril() / torch.arange(1.0, 13)[:, None]
        return heads_of(weights, v)

    with torch.no_grad():
        want = model.lm_head(llama_states(model, ids, attend))
        with attach(model, AttentionInfluence(heads=HEADS)) as run:
            got = run(input_ids=ids).logits
    assert close_model(got, want)


def test_a_fit_takes_the_heads_that_look_at_what_comes_next() -> None:
    model = models.tiny("llama", num_hidden_layers=2, attn_implementation="eager")
    texts = [models.tiny_inputs(model, 3, 16, seed=seed)["input_ids"] for seed in (0, 1)]
    spans = [((0, 6), (8, 14)), ((1, 7), (9, 15))]  # needle and answer
    hits, asked = torch.zeros(2, 4), 0
    for ids, ((start, _), (first, last)) in zip(texts, spans, strict=True):
        with torch.no_grad():
            maps = torch.stack(model(input_ids=ids, output_attentions=True).attentions)  # [l b h q k]
        for text in range(3):
            for i in range(last - first):
                asked += 1
                hits += maps[:, text, :, first + i - 1].argmax(-1) == start + i
    scores = {(layer, h): float(hits[layer, h]) / asked for layer in range(2) for h in range(4)}
    order = sorted(scores, key=lambda head: (-scores[head], head))
    batches = [
        {"input_ids": ids, "roles": {"needle": (needle,), "answer": (answer,)}}
        for ids, (needle, answer) in zip(texts, spans, strict=True)
    ]
    assert scores[order[0]] > scores[order[-1]]
    for share, count in ((0.05, 1), (0.3, 2), (0.5, 4)):
        assert fit(AttentionInfluence(share), model, batches).heads == tuple(sorted(order[:count]))


def test_influence_is_the_relative_rise_of_the_loss() -> None:
    draw = torch.Generator().manual_seed(0)
    plain, masked = (torch.randn(2, 5, 7, generator=draw) for _ in range(2))
    ids = torch.randint(7, (2, 5), generator=draw)
    text = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])

    def loss(logits: torch.Tensor, row: int) -> float:
        found = [
            math.log(sum(math.exp(x) for x in logits[row, i].tolist())) - float(logits[row, i, ids[row, i + 1]])
            for i in range(4)
            if text[row, i] and text[row, i + 1]
        ]
        return sum(found) / len(found)

    got = AttentionInfluence.influence(plain, masked, {"input_ids": ids, "attention_mask": text})
    want = [(loss(masked, row) - loss(plain, row)) / loss(plain, row) for row in (0, 1)]
    assert got.tolist() == pytest.approx(want, rel=1e-4)


def test_what_it_leaves_alone() -> None:
    call = replace(Bare().call, depth=3)
    method = AttentionInfluence(heads=HEADS)
    assert [method.idle(replace(call, layer=n)) for n in range(3)] == [False, False, True]
    assert not AttentionInfluence().idle(call)
    assert AttentionInfluence().idle(replace(call, cross=True))
    assert method.idle(replace(call, cross=True))


def test_fields_and_batches() -> None:
    assert (AttentionInfluence().share, AttentionInfluence().heads) == (0.05, None)
    assert AttentionInfluence(1.0).share == 1
    for share in (0.0, 1.1):
        with pytest.raises(FieldError, match=r"share = .*: must be above 0, and 1 at most"):
            AttentionInfluence(share)
    with pytest.raises(FieldError, match="must be a pair of layer and head"):
        AttentionInfluence(heads=((0, -1),))
    model = models.tiny("llama", num_hidden_layers=1)
    ids = models.tiny_inputs(model, 1, 8)
    for batches in ([], [ids], [ids | {"roles": {"needle": ((0, 2),)}}]):
        with pytest.raises(FieldError, match=r'each with roles naming "needle" and "answer"; .*\(\(4, 9\),\)'):
            fit(AttentionInfluence(), model, batches)
    with pytest.raises(FieldError, match="fitted to another model"):
        Bare().run(AttentionInfluence(heads=((0, 9),)), "reference")
