"""Attention lenses: their first step by hand, and what they tell of each head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import heedful
from heedful import attach, models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.stats import Cat
from heedful.methods.explain.attention_lens import AttentionLens
from tests.by_hand import Steps, causal_map, heads_of, llama_states

VOCABULARY = 40


def llama() -> Any:
    torch.manual_seed(7)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = models.tiny("llama", vocab_size=VOCABULARY, tie_word_embeddings=False, **sizes)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # a model with opinions
    return model


@torch.no_grad()
def by_hand(model: Any, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Heads of one layer `[b h n d]` and final logits."""
    kept = {}

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
        kept[i] = heads_of(causal_map(rotate(q), rotate(k)), v)
        return kept[i]

    final = model.lm_head(llama_states(model, ids, attend))
    return kept[layer], final


@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_step_goes_down_the_divergence_of_the_sum_of_heads(
    layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, steps = llama(), Steps(monkeypatch, "Adam")
    ids = torch.randint(VOCABULARY, (2, 5))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    batches = [{"input_ids": ids}, {"input_ids": ids.flip(1)}]
    found = heedful.fit(AttentionLens(layer, rate=0.02, epochs=3), model, batches)
    # the lens begins as the unembedding of what each head writes
    o = model.model.layers[layer].self_attn.o_proj.weight
    start = torch.stack([model.lm_head.weight @ o[:, 8 * h : 8 * h + 8] for h in range(4)]).detach().requires_grad_()
    bias = torch.zeros(4, VOCABULARY, requires_grad=True)
    assert close(steps.before[0][0], start)
    assert not steps.before[0][1].any()
    heads, final = by_hand(model, ids, layer)
    loss = torch.zeros(())
    for b in range(2):
        for n in range(5):
            said = sum(start[h] @ heads[b, h, n] + bias[h] for h in range(4)).log_softmax(0)
            p = final[b, n].softmax(0)
            loss = loss + (p * (p.log() - said)).sum() / 10
    loss.backward()
    assert close(steps.grads[0][0], start.grad)
    assert close(steps.grads[0][1], bias.grad)
    assert steps.rates == [0.02] * 6
    again = heedful.fit(AttentionLens(layer, rate=0.02, epochs=1), model, batches)
    assert len(steps.grads) == 8
    assert close(steps.grads[1][0], steps.grads[7][0])
    assert not close(again.lens["weight"], found.lens["weight"])
    assert found.layer == layer
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_padding_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = llama(), Steps(monkeypatch, "Adam")
    ids = torch.randint(1, VOCABULARY, (1, 5))
    heedful.fit(AttentionLens(), model, [{"input_ids": ids}])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 3), torch.ones(1, 5)], 1).long()
    heedful.fit(AttentionLens(), model, [{"input_ids": padded, "attention_mask": mask}])
    for alone, beside in zip(*steps.grads, strict=True):
        assert close(alone, beside)


def test_it_tells_the_tokens_of_each_head() -> None:
    model, ids = llama(), torch.randint(VOCABULARY, (2, 6))
    heads, _ = by_hand(model, ids, 1)
    weight, bias = torch.randn(4, VOCABULARY, 8), torch.randn(4, VOCABULARY)
    method = AttentionLens(1, most=3, lens=Fitted({"weight": weight, "bias": bias}))
    with torch.no_grad(), attach(model, method) as run:
        run(input_ids=ids)
        run(input_ids=ids[:1, :4])
    first, second = run[method]
    for b in range(2):
        for h in range(4):
            for n in range(6):
                logits = weight[h] @ heads[b, h, n] + bias[h]
                assert first.tokens[b, h, n].tolist() == logits.argsort(descending=True)[:3].tolist()
                assert close(first.logits[b, h, n], logits.sort(descending=True).values[:3])
    assert torch.equal(second.tokens[0], first.tokens[0, :, :4])
    assert close(method.through(heads)[1, 2, 3], weight[2] @ heads[1, 2, 3] + bias[2])


def test_no_gradient_is_kept_of_what_was_read() -> None:
    model, method = llama(), AttentionLens(seed=0)
    with attach(model, method) as run:
        run(input_ids=torch.arange(5)[None])
    assert not run[method][0].logits.requires_grad


def test_a_small_vocabulary_is_told_whole_and_a_seed_draws_its_own() -> None:
    method = AttentionLens(most=1000, seed=3)
    heads = torch.randn(1, 2, 3, 4)
    assert method.through(heads).shape == (1, 2, 3, 50)
    assert torch.equal(method.through(heads), AttentionLens(seed=3).through(heads))
    assert not torch.equal(method.through(heads), AttentionLens(seed=4).through(heads))
    model = llama()
    with torch.no_grad(), attach(model, method) as run:
        run(input_ids=torch.arange(5)[None])
    assert run[method][0].tokens.shape == (1, 4, 5, 50)


def test_only_its_layer_is_looked_at() -> None:
    model, method = llama(), AttentionLens(1, seed=0)
    with torch.no_grad(), attach(model, method) as run:
        run(input_ids=torch.arange(5)[None])
        assert [layer for _, _, layer in run.state.statistics] == [1]
        assert all(isinstance(stat, Cat) for stat in run.state.statistics.values())


def test_says_what_is_wrong() -> None:
    for wrong in ({"layer": -1}, {"most": 0}, {"epochs": 0}, {"rate": 0.0}):
        with pytest.raises(FieldError, match=next(iter(wrong))):
            AttentionLens(**wrong)
    assert AttentionLens(0, most=1, epochs=1).most == 1
    model, ids = llama(), torch.arange(5)[None]
    with pytest.raises(FieldError, match="batches"):
        heedful.fit(AttentionLens(), model, [])
    with pytest.raises(FieldError, match="below 2"):
        heedful.fit(AttentionLens(2), model, [{"input_ids": ids}])
    with pytest.raises(FieldError, match=r"heedful\.fit"), attach(model, AttentionLens()) as run:
        run(input_ids=ids)
    for shape in ((3, VOCABULARY, 8), (4, VOCABULARY, 6)):
        lens = Fitted({"weight": torch.randn(shape), "bias": torch.randn(shape[:2])})
        with pytest.raises(FieldError, match="4 of width 8 here"), attach(model, AttentionLens(lens=lens)) as run:
            run(input_ids=ids)
