"""Variational attention: what is drawn, what it costs and what is kept at rest, by loops over the formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heedful import attach, models
from heedful.authoring import FieldError, Layer, SiteError
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.mask import Padding
from heedful.core.positions import Positions
from heedful.methods import VariationalAttention
from heedful.nn import Attention

LENGTHS = (13, 8)  # of the two sources
TEXT = torch.arange(13) < torch.tensor(LENGTHS)[:, None]
WRITTEN = (6, 4)  # and of what is written
METHOD = VariationalAttention(3, 0.7, 0.8, seed=2)


def _drawn() -> tuple[Bare, dict[str, Tensor]]:
    bare, draw = Bare(Shape(q=6, k=13), dtype=torch.float64, rules=(Padding(TEXT),)), torch.Generator().manual_seed(1)
    filled = (torch.arange(6) < torch.tensor(WRITTEN)[:, None])[:, None]
    bare.call = replace(bare.call, layer=5, cross=True, forward=3, queries=Positions.row(0, 6, is_filled=filled))
    return bare, {"ask": torch.randn(4 * 8, 24, generator=draw, dtype=torch.float64) / 3}


def _by_hand(bare: Bare, ask: Tensor, layer: int = 5) -> tuple[Tensor, Tensor]:
    """Heads, and KL(q | p): added up over heads, the mean over all tokens that are written."""
    random = torch.Generator().manual_seed(1_000_003 * 2 + 1009 * 3 + layer)
    noise = torch.empty(2, 4, 6, 13, dtype=torch.float64).exponential_(generator=random)
    out, apart = torch.zeros_like(bare.q), torch.zeros((), dtype=torch.float64)
    for b, length in enumerate(LENGTHS):
        for h in range(4):
            keys, values = bare.k[b, h // 2, :length], bare.v[b, h // 2, :length]
            for i in range(6):
                p = torch.stack([bare.q[b, h, i] @ k for k in keys]).div(math.sqrt(8)).softmax(0)
                q = p
                if i + 1 < WRITTEN[b]:
                    told = ask[8 * h : 8 * h + 8] @ bare.hidden[b, i + 1]
                    q = p * torch.exp(torch.stack([told @ k for k in keys]) / math.sqrt(8))
                    q = q / q.sum()
                    apart = apart + sum(q[j] * torch.log(q[j] / p[j]) for j in range(length))
                gumbel = -torch.log(noise[b, h, i, :length])
                z = torch.exp((torch.log(q) + gumbel) / 0.8)
                z = z / z.sum()
                drawn = torch.eye(length, dtype=z.dtype)[int(z.argmax())]
                out[b, h, i] = (drawn - z.detach() + z) @ values
    return out, apart / sum(WRITTEN)


def _found(bare: Bare, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same by the class; the divergence with its weight taken off."""
    call = replace(bare.call, params=params, key=bare.k)
    scores = (bare.q @ call.spread(bare.k).mT * call.scale).masked_fill(~TEXT[:, None, None], -torch.inf)
    call = replace(call, keep=TEXT[:, None, None])
    sample = METHOD.draw(scores.softmax(-1), call)
    penalty = METHOD.diverge(sample, call)
    assert penalty is not None
    return sample @ call.spread(bare.v), penalty / 0.7


def test_what_is_drawn_and_what_it_costs() -> None:
    bare, params = _drawn()
    assert close(bare.run(METHOD, "reference", params=params)[0], _by_hand(bare, params["ask"], layer=0)[0])
    wanted, apart = _by_hand(bare, params["ask"])
    found, penalty = _found(bare, params)
    assert close(found, wanted)
    assert close(penalty, apart)


def test_what_it_costs_is_a_mean_over_all_tokens_where_none_is_padding() -> None:
    bare, params = _drawn()
    whole = replace(bare.call, queries=Positions.row(0, 6), params=params, key=bare.k)
    prior = torch.rand(2, 4, 6, 13, generator=torch.Generator().manual_seed(4), dtype=torch.float64).softmax(-1)
    METHOD.draw(prior, whole)
    found, each = whole.state.forward.pop(whole.name), []
    for b in range(2):
        one = replace(whole, batch=1, hidden=bare.hidden[b : b + 1], key=bare.k[b : b + 1])
        METHOD.draw(prior[b : b + 1], one)
        each.append(one.state.forward.pop(one.name))
    assert close(found, sum(each) / 2)


def test_the_first_steps_loss_and_gradient() -> None:
    bare, params = _drawn()
    leaves = [params["ask"], bare.q, bare.k, bare.v, bare.hidden]
    for x in leaves:
        x.requires_grad_(True)
    losses = [heads.pow(2).sum() + 5 * apart for heads, apart in (_found(bare, params), _by_hand(bare, params["ask"]))]
    assert close(losses[0].detach(), losses[1].detach())
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


def test_at_rest_the_likeliest_places_are_kept_and_no_later_word_tells() -> None:
    bare, params = _drawn()
    bare.call = replace(bare.call, training=False)
    found, _ = bare.run(METHOD, "reference", params=params)
    for b, length in enumerate(LENGTHS):
        for h in range(4):
            for i in range(6):
                p = (bare.k[b, h // 2, :length] @ bare.q[b, h, i] / math.sqrt(8)).softmax(0).tolist()
                best = sorted(range(length), key=lambda j: -p[j])[:3]
                total = sum(p[j] for j in best)
                assert close(found[b, h, i], sum(p[j] / total * bare.v[b, h // 2, j] for j in best))
    bare.hidden[:, 1:] += 1.0
    assert torch.equal(bare.run(METHOD, "reference", params=params)[0], found)


def test_rows_that_see_nothing_and_rows_with_a_sink() -> None:
    bare, params = _drawn()
    call = replace(bare.call, params=params, key=bare.k, keep=TEXT[:, None, None] & torch.tensor(False))
    for edit in (METHOD.draw, METHOD.keep_best):
        assert not edit(torch.zeros(2, 4, 6, 13, dtype=torch.float64), call).any()
    assert float(call.state.forward.pop(call.name)) == 0
    half = torch.full((2, 4, 6, 13), 0.5 / 13, dtype=torch.float64)  # the other half went to a sink
    for edit in (METHOD.draw, METHOD.keep_best):
        assert close(edit(half, replace(call, keep=None)).sum(-1), torch.full((2, 4, 6), 0.5, dtype=torch.float64))


def test_rows_of_earlier_calls_that_an_edit_beside_it_looks_at_are_not_its_own() -> None:
    bare, params = _drawn()
    call = replace(bare.call, params=params, key=bare.k)
    mine = METHOD.evidence(call)
    assert close(METHOD.evidence(replace(call, earlier=2, rows=slice(1, 7)))[:, :, 1:], mine[:, :, :5])


def test_in_a_model_its_loss_joins_the_models_own() -> None:
    model: Any = models.tiny("bart").train()
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    names = [f"model.decoder.layers.{i}.encoder_attn" for i in range(2)]
    target = ids[:, :5].contiguous()
    given = {"input_ids": ids, "decoder_input_ids": target}
    with attach(model, VariationalAttention(), only=names) as run:
        out = run(**given, labels=target)
        own = nn.functional.cross_entropy(out.logits.flatten(0, 1), target.flatten())
        assert float(run.loss().detach()) > 0
        assert close_model(out.loss, own + run.loss())
        out.loss.backward()
        assert all(bool(x.grad.any()) for x in run.parameters())
        model.eval()
        with torch.no_grad():
            out = run(**given, labels=target)
            own = nn.functional.cross_entropy(out.logits.flatten(0, 1), target.flatten())
            assert close_model(out.loss, own)


def test_each_forward_draws_anew_and_a_seed_its_own() -> None:
    def drawn(seed: int) -> list[Tensor]:
        torch.manual_seed(0)
        own = Attention(8, 2, VariationalAttention(temperature=0.5, seed=seed)).train()
        draw = torch.Generator().manual_seed(1)
        query, source = (torch.randn(4, 3, 8, generator=draw) for _ in range(2))
        return [own(query, source, source)[0].detach() for _ in range(2)]

    first, second = drawn(0)
    assert not close(first, second)
    assert torch.equal(first, drawn(0)[0])
    assert not close(first, drawn(1)[0])


def test_the_start() -> None:
    layer = Layer(2, 4, 2, 6, 6, 25)
    (found,) = VariationalAttention().parameters(layer).values()
    draw = torch.Generator().manual_seed(2)
    assert close(found, (2 * torch.rand(24, 25, generator=draw) - 1) / 5)
    assert not torch.equal(found, VariationalAttention().parameters(replace(layer, number=0))["ask"])
    assert (VariationalAttention().best, VariationalAttention().weight, VariationalAttention().temperature) == (5, 1, 1)
    assert VariationalAttention().seed == 0


def test_errors() -> None:
    bare, params = _drawn()
    assert VariationalAttention().idle(Bare().call)
    assert not VariationalAttention().idle(bare.call)
    assert (VariationalAttention(1).best, VariationalAttention(weight=0.0).weight) == (1, 0)
    with pytest.raises(FieldError, match=r"VariationalAttention.best = 0: must be 1 or more"):
        VariationalAttention(0)
    for weight in (-0.1, math.inf):
        with pytest.raises(FieldError, match=r"VariationalAttention.weight = .*: must be 0 or more"):
            VariationalAttention(weight=weight)
    for temperature in (0.0, math.inf):
        with pytest.raises(FieldError, match=r"VariationalAttention.temperature = .*: must be above 0"):
            VariationalAttention(temperature=temperature)
    for lacks in ("hidden", "key"):
        call = replace(bare.call, params=params, key=bare.k)
        with pytest.raises(SiteError, match="layer 5: the block is not handed hidden states to tell q"):
            METHOD.evidence(replace(call, **{lacks: None}))
