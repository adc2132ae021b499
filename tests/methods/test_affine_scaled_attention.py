"""Affine-scaled attention against a reading of the paper's formulas in loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from heedful import attach, models
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.entry import Layer
from heedful.core.errors import FieldError, SiteError
from heedful.methods import AffineScaledAttention
from tests.by_hand import block_inputs, heads_of, llama_states

SIZE = Layer(3, 4, 2, 8, 6, 32)


def linear_clipping(x: float) -> float:
    return 0.0 if x <= -5 else 1.0 if x >= 5 else 0.1 * x + 0.5


def drawn() -> dict[str, Tensor]:
    weight = 2 * torch.randn(4, 24, generator=torch.Generator().manual_seed(1))  # some scales are clipped on each side
    return {"weight": weight, "mean": torch.tensor([0.0, 0.4, 0.5, 1.0])}


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_the_formula_in_every_backend(backend: str) -> None:
    text = torch.ones(2, 19, dtype=torch.bool)
    text[0, :4] = False
    bare = Bare(text=text, dtype=torch.float64)  # what rows give and take nearly cancels
    params = {name: x.double() for name, x in drawn().items()}
    heads, _ = bare.run(AffineScaledAttention(), backend, params=params, tile_rows=7 if backend == "tiled" else None)
    scales = []
    for b in range(2):
        for h in range(4):
            for t in range(19):
                seen = [j for j in range(t + 1) if text[b, j]]
                if not seen:
                    assert not bool(heads[b, h, t].any())
                    continue
                a = linear_clipping(float(params["weight"][h] @ bare.hidden[b, t]))
                scales.append(a)
                scores = torch.stack([bare.q[b, h, t] @ bare.k[b, h // 2, j] * bare.call.scale for j in seen])
                soft = scores.exp() / scores.exp().sum()
                shift = (float(params["mean"][h]) - a) / len(seen)
                wanted = sum((a * w + shift) * bare.v[b, h // 2, j] for w, j in zip(soft, seen, strict=True))
                assert close(heads[b, h, t], wanted, 2048)
    assert min(scales) == 0.0
    assert max(scales) == 1.0


def test_a_call_that_hides_nothing_shifts_every_key() -> None:
    bare, params = Bare(rules=()), drawn()
    heads, _ = bare.run(AffineScaledAttention(), "reference", params=params)
    a = torch.tensor([[[linear_clipping(float(x @ w)) for x in xs] for w in params["weight"]] for xs in bare.hidden])
    soft = (bare.q @ bare.k.repeat_interleave(2, 1).mT * bare.call.scale).softmax(-1)
    weights = a[..., None] * soft + (params["mean"][:, None, None] - a[..., None]) / 19
    assert close(heads, heads_of(weights, bare.v))


def test_rows_add_up_to_the_running_mean_and_hidden_pairs_have_no_weight() -> None:
    keep = torch.ones(5, 5, dtype=torch.bool).tril()
    bare, params = Bare(), drawn()
    call = replace(bare.call, query=bare.q[:, :, :5], hidden=bare.hidden[:, :5], keep=keep, params=params)
    soft = torch.randn(2, 4, 5, 5).masked_fill(~keep, -torch.inf).softmax(-1)
    weights = AffineScaledAttention().scale(soft, call)
    assert close(weights.sum(-1), params["mean"][:, None].expand(2, 4, 5))
    assert not bool(weights.masked_select(~keep).any())


def test_the_running_mean_moves_in_training_alone_and_leaves_padding_out() -> None:
    text = torch.ones(2, 19, dtype=torch.bool)
    text[0, :4] = False
    bare, method = Bare(text=text), AffineScaledAttention(0.75)
    params: dict[str, Tensor] = {name: nn.Parameter(x) for name, x in drawn().items()}
    before = params["mean"].detach().clone()
    with torch.no_grad():
        bare.run(method, "reference", params=params)
    assert torch.equal(params["mean"], before)
    heads, found = bare.run(method, "tiled", params=params, tile_rows=7)
    weight = params["weight"].detach()
    rows = [bare.hidden[b, t] for b in range(2) for t in range(19) if text[b, t]]
    means = torch.tensor([sum(linear_clipping(float(w @ x)) for x in rows) / len(rows) for w in weight])
    assert close(params["mean"].detach(), 0.75 * before + 0.25 * means)
    assert close(next(iter(found.values())).value.float(), means)
    heads.sum().backward()
    assert params["mean"].grad is None
    assert params["weight"].grad is not None


def test_one_token_alone_is_its_own_mean_and_padding_alone_is_zero() -> None:
    for many in (0, 1):
        bare = Bare(text=(torch.arange(19) < many).expand(2, 19) & torch.tensor([[True], [False]]))
        params = {name: nn.Parameter(x) for name, x in drawn().items()}
        AffineScaledAttention(0.0).watch(bare.q, replace(bare.call, hidden=bare.hidden, params=params))
        wanted = [many * linear_clipping(float(w @ bare.hidden[0, 0])) for w in params["weight"].detach()]
        assert close(params["mean"].detach(), torch.tensor(wanted))


def test_the_first_step_s_loss_and_gradient() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    with attach(model, AffineScaledAttention()) as run:
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        learned = run.parameters()
    weights = [p for p in learned if p.ndim == 2]
    means = [p for p in learned if p.ndim == 1]
    mine = [p.detach().clone().requires_grad_() for p in weights]

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor, rotate: object) -> Tensor:
        q, k = rotate(q), rotate(k)  # type: ignore[operator]
        n = q.shape[2]
        a = (0.1 * torch.einsum("bne,he->bhn", inputs[i], mine[i]) + 0.5).clamp(0, 1)[..., None]
        mean = 0.1 * a.detach().mean((0, 2, 3))
        assert close(means[i].detach(), mean)
        keep = torch.ones(n, n).tril()
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5
        soft = scores.masked_fill(keep == 0, -torch.inf).softmax(-1)
        return heads_of(a * soft + (mean[:, None, None] - a) * keep / keep.sum(-1, keepdim=True), v)

    with block_inputs(model) as inputs:
        logits = model.lm_head(llama_states(model, ids, attend))
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert close(loss, wanted)
    wanted.backward()
    for got, tensor in zip(weights, mine, strict=True):
        assert got.grad is not None
        assert tensor.grad is not None
        assert bool(got.grad.any())
        assert close(got.grad, tensor.grad)


def test_it_starts_as_a_linear_map_with_no_mean() -> None:
    found = AffineScaledAttention().parameters(SIZE)
    again = torch.rand(4, 32, generator=torch.Generator().manual_seed(3))
    assert close(found["weight"], (2 * again - 1) / 32**0.5)
    assert found["mean"].tolist() == [0.0] * 4
    assert not found["mean"].requires_grad, "the mean moves by itself"


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"momentum = 1.0: must be 0 or more, and below 1"):
        AffineScaledAttention(1)
    with pytest.raises(FieldError, match=r"momentum = -0.1"):
        AffineScaledAttention(-0.1)
    AffineScaledAttention(0)
    bare = Bare()
    for hidden in (None, bare.hidden[:, 1:]):
        with pytest.raises(SiteError, match="layer 0: the layer's input"):
            AffineScaledAttention().watch(bare.q, replace(bare.call, hidden=hidden, params=drawn()))
    with pytest.raises(SiteError, match="from SCORES on"):
        AffineScaledAttention().scales(replace(bare.call, query=None))
