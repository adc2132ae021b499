"""TransformerAttribution: gradient times weights, rolled out from layer to layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, StatisticError
from heedful.methods.explain.transformer_attribution import TransformerAttribution, _relevance

IDS = torch.tensor([[5, 17, 9, 88, 40, 23], [9, 5, 61, 30, 2, 70]])


def _with_gradient(weights: Tensor, gradient: Tensor) -> Tensor:
    weights = weights.clone().requires_grad_()
    weights.grad = gradient.clone()
    return weights


def test_the_rule_by_loops() -> None:
    draw = torch.Generator().manual_seed(0)
    b, h, n = 2, 3, 4
    maps = [(torch.rand(b, h, n, n, generator=draw), torch.randn(b, h, n, n, generator=draw)) for _ in range(3)]
    found = _relevance([_with_gradient(*pair) for pair in maps])
    assert found is not None
    assert not found.requires_grad
    for text in range(b):
        rel = [[float(i == j) for j in range(n)] for i in range(n)]
        for weights, gradient in maps:
            mean = [
                [sum(max(0.0, float(weights[text, x, i, j] * gradient[text, x, i, j])) for x in range(h)) / h
                 for j in range(n)]
                for i in range(n)
            ]  # fmt: skip
            rel = [[rel[i][j] + sum(mean[i][k] * rel[k][j] for k in range(n)) for j in range(n)] for i in range(n)]
        assert close(found[text], torch.tensor(rel))


def test_maps_without_a_backward_have_none() -> None:
    assert _relevance([torch.rand(1, 2, 3, 3)]) is None


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_each_forward_with_a_backward_has_its_relevance(kind: str) -> None:
    model = models.tiny(kind, attn_implementation="eager", num_hidden_layers=3)
    wanted = []
    for ids in (IDS, IDS[:, :4]):
        output = model(input_ids=ids, output_attentions=True)
        for x in output.attentions:
            x.retain_grad()
        output.logits[:, 3, 77].sum().backward()
        r = torch.eye(ids.shape[1])
        for x in output.attentions:
            r = r + (x.grad * x.detach()).clamp(min=0).mean(1) @ r
        wanted.append(r)
    with attach(model, TransformerAttribution()) as run:
        run(input_ids=IDS).logits[:, 3, 77].sum().backward()
        with torch.no_grad():
            run(input_ids=IDS)
        run(input_ids=IDS[:, :4]).logits[:, 3, 77].sum().backward()
    found = run[TransformerAttribution()]
    assert len(found) == 2
    for one, want in zip(found, wanted, strict=True):
        assert close_model(one, want)


@pytest.mark.parametrize("way", ["generate", "forward"])
def test_without_any_backward_there_is_a_reason_and_no_empty_answer(way: str) -> None:
    model = models.tiny("llama").eval()
    with attach(model, TransformerAttribution()) as run:
        if way == "generate":
            run.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
        else:
            run(input_ids=IDS)
        with pytest.raises(StatisticError, match="needs gradients, and none reached the maps of its 1 forwards"):
            run[TransformerAttribution()]


def test_decoding_steps_are_left_out_and_pieces_refused() -> None:
    model = models.tiny("llama")
    with attach(model, TransformerAttribution()) as run:
        out = run(input_ids=IDS, use_cache=True)
        out.logits[:, -1, 3].sum().backward()
        with torch.no_grad():
            run(input_ids=IDS[:, :1], **{CACHE: out[CACHE]})
    assert [x.shape for x in run[TransformerAttribution()]] == [(2, 6, 6)]
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True)[CACHE]
    run = attach(model, TransformerAttribution())
    with run, pytest.raises(FieldError, match="comes in pieces"):
        run(input_ids=IDS[:, :3], **{CACHE: cache})
